"""The generator: resumable, and the same as what diffusers opens; a folder of one's own is taken over unchanged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import KillAfter, _Killed

from chains import Chain, contents, flip
from diffstill.artifacts import load_split, new_artifact, open_artifact, write_shards
from diffstill.config import Params, PretrainConfig
from diffstill.diffusion import add_noise
from diffstill.errors import DiffstillError
from diffstill.networks import LABEL_TABLE, load_generator, open_generator
from diffstill.pretrained import read_checkpoint, weights_digest
from diffstill.stages import pretrain as pretrain_stage
from diffstill.stages.pretrain import pretrain
from original_dit import random_checkpoint

pytestmark = pytest.mark.usefixtures("unhurried")


def settings_of(chain: Chain, **changes: Any) -> PretrainConfig:
    values = chain.params.model_dump(mode="json")
    values["pretrain"] |= changes
    return Params.model_validate_json(json.dumps(values)).pretrain


@pytest.mark.parametrize("updates", [7, 19])  # killed while the autoencoder trains, and while the transformer does
@pytest.mark.parametrize("damaged", [False, True])
def test_a_killed_run_goes_on_and_ends_alike(
    tiny_chain: Chain, tmp_path: Path, updates: int, damaged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    images = tiny_chain.artifacts / "images"
    with pytest.raises(_Killed):
        pretrain(tiny_chain.params.pretrain, images=images, generator=tmp_path / "again", record=KillAfter(updates))
    assert not (tmp_path / "again").exists()
    saved = sorted((tmp_path / "work").rglob("*.safetensors"))
    assert [path.name.split(".")[0] for path in saved] == (["vae"] if updates == 7 else ["dit", "vae"])
    if damaged:
        flip(saved[0])
    pretrain(tiny_chain.params.pretrain, images=images, generator=tmp_path / "again")
    assert ("made again" in caplog.text) == damaged
    assert contents(tmp_path / "again") == contents(tiny_chain.artifacts / "generator")
    assert not list((tmp_path / "work").rglob("*.safetensors"))


def test_training_lowers_both_losses(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffstill.stages.pretrain.LOG_EVERY", 10)

    class Losses:
        def __init__(self) -> None:
            self.seen: dict[str, list[float]] = {}

        def metrics(self, values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                self.seen.setdefault(name, []).append(value)

        file = KillAfter.file
        progress = KillAfter.progress

        def update(self, n: int = 1) -> None: ...

    record = Losses()
    vae, dit = {"channels": [16, 16], "steps": 60, "batch_size": 32}, {"layers": 2, "heads": 2, "head_dim": 16, "steps": 120, "batch_size": 32}
    config = settings_of(tiny_chain, vae=vae, dit=dit, checkpoint_every=10)
    metrics = pretrain(config, images=tiny_chain.artifacts / "images", generator=tmp_path / "out", record=record)
    for name in ("vae_loss", "dit_loss"):
        assert sum(record.seen[name][-3:]) < 0.8 * sum(record.seen[name][:3]), name
    assert 0 < metrics["reconstruction_mse"] < open_artifact(tiny_chain.artifacts / "generator", "generator").facts["reconstruction_mse"]


def test_the_transformer_learns_latents_of_unit_deviation(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spied(x0: torch.Tensor, eps: torch.Tensor, abar_t: torch.Tensor) -> torch.Tensor:
        seen.append(x0)
        return add_noise(x0, eps, abar_t)

    monkeypatch.setattr("diffstill.stages.pretrain.add_noise", spied)
    pretrain(tiny_chain.params.pretrain, images=tiny_chain.artifacts / "images", generator=tmp_path / "out")
    assert torch.cat(seen).std().item() == pytest.approx(1, abs=0.05)


def test_a_pipeline_folder_is_taken_over_unchanged(tiny_chain: Chain, tmp_path: Path) -> None:
    source = tiny_chain.artifacts / "generator"
    pretrain(settings_of(tiny_chain, source="folder", location=str(source)), images=tiny_chain.artifacts / "images", generator=tmp_path / "taken")
    taken, original = contents(tmp_path / "taken"), contents(source)
    for name in original:
        if name.startswith(("transformer/", "vae/", "scheduler/", "model_index")):
            assert taken[name] == original[name]


def test_the_stock_pipeline_opens_the_artifact(tiny_chain: Chain) -> None:
    from diffusers import DiTPipeline

    pipeline = DiTPipeline.from_pretrained(tiny_chain.artifacts / "generator")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([0, 1, 2], guidance_scale=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert [(image.mode, image.size) for image in images] == [("L", (8, 8))] * 3


def images_of(chain: Chain, folder: Path, classes: list[str]) -> Path:
    """The images of the chain under other class names."""
    images = open_artifact(chain.artifacts / "images", "images")
    with new_artifact(folder, "images", chain.params.prepare, {}) as draft:
        for split in ("train", "val", "test"):
            pixels, labels = load_split(images, split)
            write_shards(draft.folder, split, {"pixels": pixels, "labels": labels}, 4096)
        draft.facts |= images.facts | {"classes": classes}
    return folder


def test_classes_go_to_the_labels_of_their_names_and_unknown_ones_to_new_labels(
    tiny_chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = images_of(tiny_chain, tmp_path / "images", ["2", "seven", "0"])
    source = tiny_chain.artifacts / "generator"
    config = settings_of(tiny_chain, source="folder", location=str(source), labels={"seven": "new:1"}, licence="mine")
    pretrain(config, images=images, generator=tmp_path / "out")
    made = open_artifact(tmp_path / "out", "generator")
    assert (made.facts["labels"], made.facts["null_label"], made.facts["licence"]) == ([2, 3, 0], 4, "mine")
    assert made.facts["weights"] == weights_digest(source)
    class_map = json.loads((tmp_path / "out" / "class_map.json").read_text())
    assert [(one["name"], one["label"], one["origin"]) for one in class_map] == [("2", 2, "name"), ("seven", 3, "new: copy of 1"), ("0", 0, "name")]
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["id2label"] == {"0": "0", "1": "1", "2": "2", "3": "seven"}
    assert "1 of 3 classes are new to the generator" in caplog.text
    assert "mine" in caplog.text
    old, new = (load_generator(folder).transformer.state_dict()[LABEL_TABLE] for folder in (source, tmp_path / "out"))
    assert torch.equal(new, torch.stack([old[0], old[1], old[2], old[1], old[3]]))


def test_weights_of_the_hub_want_the_original_frequencies(tiny_chain: Chain, tmp_path: Path) -> None:
    weights = tmp_path / "snapshot"
    shutil.copytree(tiny_chain.artifacts / "generator", weights)
    (weights / "manifest.json").unlink()
    for location, shift in (("hf://facebook/DiT-XL-2-256@main", 0), ("hf://somebody/else@main", 1)):
        config = settings_of(tiny_chain, source="folder", location=location)
        pretrain(config, images=tiny_chain.artifacts / "images", generator=tmp_path / f"{shift}", weights=weights)
        assert open_artifact(tmp_path / f"{shift}", "generator").facts["frequency_shift"] == shift


def test_another_autoencoder_takes_the_place_of_the_folders_own(tiny_chain: Chain, tmp_path: Path) -> None:
    source, vae = tiny_chain.artifacts / "generator", tmp_path / "vae"
    shutil.copytree(source / "vae", vae)
    (vae / "config.json").write_text(json.dumps(json.loads((vae / "config.json").read_text()) | {"scaling_factor": 0.125}))
    config = settings_of(tiny_chain, source="folder", location=str(source), autoencoder=str(vae))
    pretrain(config, images=tiny_chain.artifacts / "images", generator=tmp_path / "out")
    assert open_generator(open_artifact(tmp_path / "out", "generator")).vae.config.scaling_factor == 0.125


@pytest.fixture
def checkpoint(tiny_chain: Chain, tmp_path: Path) -> Path:
    torch.save(random_checkpoint(depth=2, width=64, classes=3, side=4), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_an_original_checkpoint_becomes_a_generator(tiny_chain: Chain, checkpoint: Path, tmp_path: Path) -> None:
    """With the autoencoder of another folder, its learned variance, and the frequencies it was trained with."""
    vae = tiny_chain.artifacts / "generator" / "vae"
    config = settings_of(tiny_chain, source="checkpoint", location=str(checkpoint), autoencoder=str(vae), timesteps=1000)
    pretrain(config, images=tiny_chain.artifacts / "images", generator=tmp_path / "out")
    made = open_artifact(tmp_path / "out", "generator")
    assert (made.facts["frequency_shift"], made.facts["learned_variance"], made.facts["labels"]) == (0.0, True, [0, 1, 2])
    assert "CC-BY-NC" in made.facts["licence"]
    opened, direct = open_generator(made), read_checkpoint(checkpoint)
    x, t, labels = torch.randn(2, 4, 4, 4), torch.tensor([3, 900]), torch.tensor([1, 3])
    with torch.no_grad():
        assert torch.equal(opened.predict(x, t, labels), direct(x, timestep=t, class_labels=labels).sample)
    again = settings_of(tiny_chain, source="folder", location=str(tmp_path / "out"))  # our own manifest says the frequencies
    pretrain(again, images=tiny_chain.artifacts / "images", generator=tmp_path / "twice")
    assert open_artifact(tmp_path / "twice", "generator").facts["frequency_shift"] == 0
    given = settings_of(tiny_chain, source="folder", location=str(tmp_path / "out"), frequency_shift=1)
    pretrain(given, images=tiny_chain.artifacts / "images", generator=tmp_path / "thrice")
    assert open_artifact(tmp_path / "thrice", "generator").facts["frequency_shift"] == 1


def test_weights_that_do_not_fit_are_refused(tiny_chain: Chain, tmp_path: Path) -> None:
    images, vae = tiny_chain.artifacts / "images", str(tiny_chain.artifacts / "generator" / "vae")
    (tmp_path / "two").mkdir()
    for name in ("a.pt", "b.pt"):
        torch.save(random_checkpoint(depth=1, width=64, classes=3, side=8), tmp_path / "two" / name)
    for location, autoencoder, told in (
        (tmp_path / "two", vae, r"holds 2 files \*.pt"),
        (tmp_path / "two" / "a.pt", vae, "makes images of 1 x 16 px"),
        (tmp_path / "two" / "a.pt", str(tmp_path), "not a diffusers AutoencoderKL folder"),
        (tmp_path / "none.pt", vae, "none.pt: not a file of plain tensors"),
    ):
        config = settings_of(tiny_chain, source="checkpoint", location=str(location), autoencoder=autoencoder)
        with pytest.raises(DiffstillError, match=told):
            pretrain(config, images=images, generator=tmp_path / "out")
    torch.save(random_checkpoint(depth=1, width=64, classes=3, side=4, channels=3), tmp_path / "three.pt")
    config = settings_of(tiny_chain, source="checkpoint", location=str(tmp_path / "three.pt"), autoencoder=vae)
    with pytest.raises(DiffstillError, match="takes latents of 3 channels, the autoencoder gives 4"):
        pretrain(config, images=images, generator=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals(tiny_chain: Chain, tmp_path: Path) -> None:
    images, out = tiny_chain.artifacts / "images", tmp_path / "out"
    with pytest.raises(DiffstillError, match="not a diffusers DiTPipeline folder"):
        pretrain(settings_of(tiny_chain, source="folder", location=str(tmp_path)), images=images, generator=out)
    narrow = tiny_chain.params.pretrain.vae.model_copy(update={"channels": (16,) * 5})
    with pytest.raises(DiffstillError, match="cannot be halved"):
        pretrain(tiny_chain.params.pretrain.model_copy(update={"vae": narrow}), images=images, generator=out)
    with pytest.raises(DiffstillError, match="refusing to replace"):
        pretrain(tiny_chain.params.pretrain, images=images, generator=_occupied(tmp_path))
    assert not out.exists()


def _occupied(folder: Path) -> Path:
    (folder / "mine").mkdir()
    (folder / "mine" / "letter.txt").write_text("do not lose me")
    return folder / "mine"


def test_divergence_is_an_error(tiny_chain: Chain, tmp_path: Path) -> None:
    config = settings_of(tiny_chain, dit={"layers": 2, "heads": 2, "head_dim": 16, "steps": 12, "batch_size": 16, "learning_rate": 1e30})
    with pytest.raises(DiffstillError, match=r"diverged; lower `pretrain.dit.learning_rate`"):
        pretrain(config, images=tiny_chain.artifacts / "images", generator=tmp_path / "out")


@pytest.mark.parametrize("rate", [1e2, 1e6])
def test_a_transformer_that_diverged_in_finite_steps_is_refused(tiny_chain: Chain, tmp_path: Path, rate: float) -> None:
    """Its last loss may be a number; what it draws is none, or far from all latents."""
    dit = json.loads(tiny_chain.params.pretrain.dit.model_dump_json()) | {"learning_rate": rate}
    with pytest.raises(DiffstillError, match=r"diverged; lower `pretrain.dit.learning_rate`"):
        pretrain(settings_of(tiny_chain, dit=dit), images=tiny_chain.artifacts / "images", generator=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, 1e30, 0.0])
def test_an_autoencoder_that_shows_nothing_is_refused(tiny_chain: Chain, tmp_path: Path, spoilt: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_stage, "_train_vae", lambda config, vae, *_: vae.decoder.conv_out.weight.data.fill_(spoilt))
    with pytest.raises(DiffstillError, match=r"lower `pretrain.vae.learning_rate`"):
        pretrain(tiny_chain.params.pretrain, images=tiny_chain.artifacts / "images", generator=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_few_timesteps_and_odd_widths_work(tiny_chain: Chain, tmp_path: Path) -> None:
    config = settings_of(tiny_chain, timesteps=7, vae={"channels": [12, 20], "steps": 2, "batch_size": 8})
    pretrain(config, images=tiny_chain.artifacts / "images", generator=tmp_path / "out")
    assert len(load_generator(tmp_path / "out").alphas_cumprod()) == 7
