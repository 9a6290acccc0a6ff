"""A merged folder is what the denoiser and its generator are together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from chains import Chain, contents
from diffstill.artifacts import open_artifact
from diffstill.cli import main
from diffstill.config import Params, PretrainConfig
from diffstill.merge import merge
from diffstill.networks import DiTPipeline, apply_delta, load_generator, open_generator
from diffstill.stages.encode import encode
from diffstill.stages.finetune import finetune
from diffstill.stages.pretrain import pretrain
from original_dit import random_checkpoint


@pytest.fixture
def tuned(tiny_chain: Chain, tmp_path: Path) -> Path:
    """Two fine-tunes that have gone far."""
    values = tiny_chain.params.model_dump(mode="json")
    values["finetune"] |= {"seeds": [3, 5], "learning_rate": 0.05, "ema_decay": 0.0}
    config = Params.model_validate_json(json.dumps(values)).finetune
    finetune(config, latents=tiny_chain.artifacts / "latents", generator=tiny_chain.artifacts / "generator", denoiser=tmp_path / "denoiser")
    return tmp_path / "denoiser"


@torch.no_grad()
def test_the_stock_pipeline_computes_what_the_denoiser_does(tiny_chain: Chain, tuned: Path, tmp_path: Path) -> None:
    generator = tiny_chain.artifacts / "generator"
    call = ["merge", "--generator", str(generator), "--denoiser", str(tuned), "--seed", "5", "--output", str(tmp_path / "merged")]
    done = CliRunner().invoke(main, call)
    assert done.exit_code == 0, done.output
    opened = open_generator(open_artifact(generator, "generator"))
    x, t, labels = torch.randn(4, 4, 4, 4), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    untuned = opened.predict(x, t, labels)
    apply_delta(opened.transformer, load_file(tuned / "seed-5" / "delta.safetensors"))
    expected = opened.predict(x, t, labels)
    assert (expected - untuned).norm() > 0.01 * untuned.norm()
    pipeline = DiTPipeline.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(pipeline.transformer.eval()(x, timestep=t, class_labels=labels).sample, expected)
    torch.testing.assert_close(load_generator(tmp_path / "merged").predict(x, t, labels), expected)
    assert pipeline.get_label_ids(["2", "0"]) == [2, 0]


def test_a_merged_folder_says_what_its_weights_want(tiny_chain: Chain, tmp_path: Path) -> None:
    """Of original weights: taken over again they keep their frequencies and their licence."""
    torch.save(random_checkpoint(depth=1, width=64, classes=3, side=4), tmp_path / "DiT.pt")
    vae = tiny_chain.artifacts / "generator" / "vae"
    config = PretrainConfig(source="checkpoint", location=str(tmp_path / "DiT.pt"), autoencoder=str(vae))
    pretrain(config, images=tiny_chain.artifacts / "images", generator=tmp_path / "generator")
    encode(tiny_chain.params.encode, images=tiny_chain.artifacts / "images", generator=tmp_path / "generator", latents=tmp_path / "latents")
    tuning = tiny_chain.params.finetune.model_copy(update={"steps": 1, "preview_every": 0})
    finetune(tuning, latents=tmp_path / "latents", generator=tmp_path / "generator", denoiser=tmp_path / "denoiser")
    merge(tmp_path / "generator", tmp_path / "denoiser", tmp_path / "merged")
    again = PretrainConfig(source="folder", location=str(tmp_path / "merged"))
    pretrain(again, images=tiny_chain.artifacts / "images", generator=tmp_path / "again")
    facts = open_artifact(tmp_path / "again", "generator").facts
    assert facts["frequency_shift"] == 0
    assert "CC-BY-NC" in facts["licence"]
    assert facts["labels"] == [0, 1, 2]


def test_refusals(tiny_chain: Chain, tuned: Path, tmp_path: Path) -> None:
    generator = tiny_chain.artifacts / "generator"
    other = tmp_path / "other"
    shutil.copytree(generator, other)
    (other / "manifest.json").write_text((other / "manifest.json").read_text().replace('"null_label": 3', '"null_label": 4'))
    done = CliRunner().invoke(main, ["merge", f"--generator={other}", f"--denoiser={tuned}", "--seed=5", f"--output={tmp_path / 'new'}"])
    assert (done.exit_code, "was fine-tuned from another generator" in done.output) == (2, True), done.output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("keep")
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    for denoiser, extra, output, told in (
        (tuned, [], "new", "holds 2 fine-tunes; choose one with --seed: 3, 5"),
        (tuned, ["--seed", "4"], "new", "has no such fine-tune; it has 3, 5"),
        (tuned, ["--seed", "5"], "mine", "is there already"),
        (tiny_chain.artifacts / "images", [], "new", "holds a `images` artifact where `denoiser` is expected"),
    ):
        done = CliRunner().invoke(main, ["merge", f"--generator={generator}", f"--denoiser={denoiser}", *extra, f"--output={tmp_path / output}"])
        assert (done.exit_code, told in done.output) == (2, True), done.output
    assert contents(tmp_path / "mine") == contents(tmp_path / "copy")
    assert not (tmp_path / "new").exists()
