"""Distilled sets: nested, independent of batches, open to other libraries."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chains import Chain, contents
from diffstill.artifacts import open_artifact, to_pixels
from diffstill.config import Params, SampleConfig
from diffstill.errors import DiffstillError
from diffstill.networks import Generator, apply_delta, open_generator
from diffstill.pictures import read_png
from diffstill.stages.finetune import finetune
from diffstill.stages.sample import _Slot, _sources, sample


def draw(chain: Chain, folder: Path, *, tuned: bool = True, denoiser: Path | None = None, **changes: Any) -> dict[str, str]:
    values = chain.params.model_dump(mode="json")
    values["sample"] |= changes
    values["evaluate"]["images_per_class"] = [1]
    config: SampleConfig = Params.model_validate_json(json.dumps(values)).sample
    denoiser = denoiser or (chain.artifacts / "denoiser" if tuned else None)
    sample(config, generator=chain.artifacts / "generator", denoiser=denoiser, distilled=folder)
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".png") and "/" in name}


def test_a_smaller_set_is_contained_in_a_larger_one(tiny_chain: Chain, tmp_path: Path) -> None:
    small, large = draw(tiny_chain, tmp_path / "small", images_per_class=2), draw(tiny_chain, tmp_path / "large", images_per_class=5)
    assert len(small) == 2 * 3 * 2
    assert len(large) == 2 * 3 * 5
    assert small.items() <= large.items()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_one_class_and_one_seed_give_the_same_images(tiny_chain: Chain, tmp_path: Path, sampler: str) -> None:
    every = draw(tiny_chain, tmp_path / "all", sampler=sampler)
    one = draw(tiny_chain, tmp_path / "one", sampler=sampler, classes=["2"], seeds=[1])
    assert len(one) == 2
    assert one.items() <= every.items()


@pytest.mark.parametrize("guidance", [1e6, 1e30])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_an_absurd_guidance_is_refused_not_drawn_in_black(tiny_chain: Chain, tmp_path: Path, guidance: float, sampler: str) -> None:
    """NaN became 0 in every pixel; and norms in the decoder make images of latents that are thousands of deviations away."""
    told = r"latent 0 of class '0', seed 0: holds the value [\w.+-]+ where sound ones lie within 10000 of 0; lower `sample.guidance` \(1e\+"
    with pytest.raises(DiffstillError, match=told):
        draw(tiny_chain, tmp_path / "out", guidance=guidance, sampler=sampler)
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_no_number_is_refused(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Generator.decode

    def decode(self: Generator, latents: torch.Tensor) -> torch.Tensor:
        images = whole(self, latents)
        images[1, 0, 3, 3] = torch.nan
        return images

    monkeypatch.setattr(Generator, "decode", decode)
    with pytest.raises(DiffstillError, match="image 0 of class '1', seed 0: holds the value nan"):
        draw(tiny_chain, tmp_path / "out")


def test_a_set_of_one_colour_is_refused_and_one_such_image_is_not(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blank = lambda self, latents: latents.new_full((len(latents), 1, 8, 8), -1.5)  # noqa: E731
    whole = Generator.decode

    def but_one(self: Generator, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([blank(self, latents[:1]), whole(self, latents[1:])])

    monkeypatch.setattr(Generator, "decode", but_one)
    draw(tiny_chain, tmp_path / "out")
    monkeypatch.setattr(Generator, "decode", blank)
    with pytest.raises(DiffstillError, match="every image of seed 0 is of one colour"):
        draw(tiny_chain, tmp_path / "blank")
    assert not (tmp_path / "blank").exists()


@pytest.mark.parametrize(("sampler", "guidance", "another"), [("ddpm", 20.0, 1.0), ("ddim", 1.0, 20.0), ("dpm++", 10.0, 20.0)])
def test_every_image_is_drawn_alone_as_the_settings_say(tiny_chain: Chain, tmp_path: Path, sampler: str, guidance: float, another: float) -> None:
    """Class, noise, fine-tune, sampler, steps and guidance; another guidance gives another image."""
    written = draw(tiny_chain, tmp_path / "set", sampler=sampler, guidance=guidance, steps=7, chunk_size=5)
    opened = open_generator(open_artifact(tiny_chain.artifacts / "generator", "generator"))
    apply_delta(opened.transformer, load_file(tiny_chain.artifacts / "denoiser" / "seed-0" / "delta.safetensors"))
    noises = set()
    for name in written:
        seed, label, number = (int(part.removeprefix("seed-").removesuffix(".png")) for part in name.split("/"))
        slot = _Slot(seed=seed, label=label, number=number)
        noises.add(slot.generator().initial_seed())
        image = read_png(tmp_path / "set" / name).astype(int)
        alone, other = (
            to_pixels(opened.draw([label], [slot.generator()], sampler=sampler, steps=7, guidance=scale).numpy()).astype(int)[0]
            for scale in (guidance, another)
        )
        assert np.abs(image - alone).max() <= 1  # another batch size may change rounding
        assert np.abs(image - other).max() > 1
    assert len(noises) == len(written)  # no noise is that of another seed, class or number


def test_images_differ_between_seeds_numbers_and_denoisers(tiny_chain: Chain, tmp_path: Path) -> None:
    tuned, untuned = draw(tiny_chain, tmp_path / "tuned"), draw(tiny_chain, tmp_path / "untuned", tuned=False)
    assert len(set(tuned.values())) == len(tuned)
    assert tuned.keys() == untuned.keys()
    assert tuned != untuned
    assert open_artifact(tmp_path / "tuned", "distilled").facts["source"] == "distilled"
    assert open_artifact(tmp_path / "untuned", "distilled").facts["source"] == "untuned"


def test_each_generation_seed_takes_its_own_fine_tune(tiny_chain: Chain, tmp_path: Path) -> None:
    values = tiny_chain.params.model_dump(mode="json")
    inputs = {"latents": tiny_chain.artifacts / "latents", "generator": tiny_chain.artifacts / "generator"}
    for name, seeds in (("both", [0, 1]), ("second", [1])):
        values["finetune"] |= {"seeds": seeds, "steps": 4, "learning_rate": 0.05}
        finetune(
            Params.model_validate_json(json.dumps(values | {"sample": {**values["sample"], "seeds": seeds}})).finetune,
            **inputs,
            denoiser=tmp_path / name,
        )
    both = draw(tiny_chain, tmp_path / "two-sets", denoiser=tmp_path / "both")
    second = draw(tiny_chain, tmp_path / "one-set", denoiser=tmp_path / "second", seeds=[1])
    assert second.items() <= both.items()
    shared = draw(tiny_chain, tmp_path / "shared", denoiser=tmp_path / "second", seeds=[0, 1])
    assert {name: digest for name, digest in shared.items() if name.startswith("seed-0")}.items() & both.items() == set()
    with pytest.raises(DiffstillError, match="3 entries"):
        draw(tiny_chain, tmp_path / "three", denoiser=tmp_path / "both", seeds=[0, 1, 2])


@pytest.mark.parametrize("seed", [0, 1])
def test_torchvision_and_the_metadata_open_the_set(tiny_chain: Chain, seed: int) -> None:
    from torchvision.datasets import ImageFolder

    folder = tiny_chain.artifacts / "distilled" / f"seed-{seed}"
    assert folder.with_suffix(".png").is_file()
    opened = ImageFolder(str(folder))
    assert opened.classes == ["0", "1", "2"]
    assert len(opened) == 6
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file_name"] for row in rows] == [f"{label}/{number:05d}.png" for label in "012" for number in range(2)]
    assert all((folder / row["file_name"]).is_file() and row["file_name"].startswith(row["label"]) for row in rows)
    with Image.open(folder / rows[0]["file_name"]) as image:
        assert (image.mode, image.size) == ("L", (8, 8))


def test_the_contact_sheet_shows_every_class_in_a_row(tiny_chain: Chain) -> None:
    sheet = np.asarray(Image.open(tiny_chain.artifacts / "distilled" / "seed-0.png"))
    image = np.asarray(Image.open(tiny_chain.artifacts / "distilled" / "seed-0" / "1" / "00000.png"))
    cell = 8 * 6 + 4
    assert sheet.shape == (3 * cell, 2 * cell)
    assert np.array_equal(sheet[cell + 2 : 2 * cell - 2 : 6, 2 : cell - 2 : 6], image)


def test_a_contact_sheet_is_bounded(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffstill.stages.sample.SHEET_COLUMNS", 1)
    monkeypatch.setattr("diffstill.stages.sample.SHEET_ROWS", 2)
    draw(tiny_chain, tmp_path / "set", seeds=[0])
    whole = np.asarray(Image.open(tiny_chain.artifacts / "distilled" / "seed-0.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "set" / "seed-0.png")), whole[: len(whole) * 2 // 3, : whole.shape[1] // 2])


def test_a_denoiser_of_another_generator_is_refused(tiny_chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(tiny_chain.artifacts / "generator", tmp_path / "generator")
    manifest = tmp_path / "generator" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"null_label": 3', '"null_label": 4'))
    with pytest.raises(DiffstillError, match=r"denoiser: was fine-tuned from another generator than .*; run `finetune` again"):
        sample(tiny_chain.params.sample, generator=tmp_path / "generator", denoiser=tiny_chain.artifacts / "denoiser", distilled=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_manifest_says_how_the_images_were_drawn(tiny_chain: Chain, tmp_path: Path) -> None:
    knobs = {"guidance": 3.5, "sampler": "ddim", "steps": 4, "seeds": [2], "images_per_class": 1, "classes": ["2", "0"]}
    draw(tiny_chain, tmp_path / "set", tuned=False, **knobs)
    facts = open_artifact(tmp_path / "set", "distilled").facts
    images = open_artifact(tiny_chain.artifacts / "images", "images")
    assert {name: facts[name] for name in knobs} == knobs
    assert (facts["side"], facts["channels"], facts["images_digest"]) == (8, 1, images.digest)


def test_an_unknown_class_is_refused(tiny_chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(DiffstillError, match=r"'7'.*0, 1, 2"):
        draw(tiny_chain, tmp_path / "out", classes=["7"])
    assert list(tmp_path.iterdir()) == []


def test_more_steps_than_timesteps_are_refused(tiny_chain: Chain, tmp_path: Path) -> None:
    config = tiny_chain.params.sample.model_copy(update={"steps": 1001})
    with pytest.raises(DiffstillError, match=r"`sample.steps` 1001 exceeds the generator's 1000 timesteps"):
        sample(config, generator=tiny_chain.artifacts / "generator", distilled=tmp_path / "out")
    made = open_artifact(tiny_chain.artifacts / "generator", "generator")
    _sources(config.model_copy(update={"steps": 1000}), made, None, "cpu")[0].load()
