"""The generator: resumable, and the same as what diffusers opens; a folder of one's own is taken over unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import KillAfter, _Killed

from chains import Chain, contents
from diffstill import torchvision_shim  # noqa: F401
from diffstill.artifacts import load_split, new_artifact, open_artifact, write_shards
from diffstill.config import Params, PretrainConfig
from diffstill.errors import DiffstillError
from diffstill.networks import load_generator
from diffstill.stages.pretrain import pretrain


def settings_of(chain: Chain, **changes: Any) -> PretrainConfig:
    values = chain.params.model_dump(mode="json")
    values["pretrain"] |= changes
    return Params.model_validate_json(json.dumps(values)).pretrain


@pytest.mark.parametrize("updates", [7, 19])  # killed while the autoencoder trains, and while the transformer does
def test_a_killed_run_goes_on_and_ends_alike(tiny_chain: Chain, tmp_path: Path, updates: int) -> None:
    images = tiny_chain.artifacts / "images"
    with pytest.raises(_Killed):
        pretrain(tiny_chain.params.pretrain, images=images, generator=tmp_path / "again", record=KillAfter(updates))
    assert not (tmp_path / "again").exists()
    saved = sorted(path.name for path in (tmp_path / "work").rglob("*.safetensors"))
    assert saved == (["vae.safetensors"] if updates == 7 else ["dit.safetensors", "vae.safetensors"])
    pretrain(tiny_chain.params.pretrain, images=images, generator=tmp_path / "again")
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


def test_a_pipeline_with_other_labels_is_refused(tiny_chain: Chain, tmp_path: Path) -> None:
    images = open_artifact(tiny_chain.artifacts / "images", "images")
    with new_artifact(tmp_path / "images", "images", tiny_chain.params.prepare, {}) as draft:
        for split in ("train", "val", "test"):
            pixels, labels = load_split(images, split)
            write_shards(draft.folder, split, {"pixels": pixels, "labels": labels}, 4096)
        draft.facts |= images.facts | {"classes": ["0", "2", "1"]}
    config = settings_of(tiny_chain, source="folder", location=str(tiny_chain.artifacts / "generator"))
    with pytest.raises(DiffstillError, match=r"has 3 labels \(0, 1, 2\), but the images have 3 classes \(0, 2, 1\)"):
        pretrain(config, images=tmp_path / "images", generator=tmp_path / "out")


def test_refusals(tiny_chain: Chain, tmp_path: Path) -> None:
    images, out = tiny_chain.artifacts / "images", tmp_path / "out"
    with pytest.raises(DiffstillError, match="not a diffusers DiTPipeline folder"):
        pretrain(settings_of(tiny_chain, source="folder", location=str(tmp_path)), images=images, generator=out)
    with pytest.raises(DiffstillError, match="cannot be halved"):
        pretrain(settings_of(tiny_chain, vae={"channels": [16, 16, 16, 16, 16]}), images=images, generator=out)
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


def test_few_timesteps_and_odd_widths_work(tiny_chain: Chain, tmp_path: Path) -> None:
    config = settings_of(tiny_chain, timesteps=7, vae={"channels": [12, 20], "steps": 2, "batch_size": 8})
    pretrain(config, images=tiny_chain.artifacts / "images", generator=tmp_path / "out")
    assert len(load_generator(tmp_path / "out").alphas_cumprod()) == 7
