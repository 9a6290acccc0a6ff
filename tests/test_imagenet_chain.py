"""Synthetic pictures with real wnids through the whole chain, on a random checkpoint in the original layout with ImageNet's 1,000 labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from chains import Chain, enter
from diffstill import imagenet
from diffstill.artifacts import open_artifact, to_pixels
from diffstill.config import Params
from diffstill.draws import Purpose, seeded
from diffstill.merge import merge
from diffstill.networks import LABEL_ROWS, LABEL_TABLE, AutoencoderKL, Generator, apply_delta, open_generator
from diffstill.pictures import read_png
from diffstill.run import run_chain
from diffstill.stages.finetune import FineTuning, Latents
from diffstill.stages.sample import sample
from original_dit import random_checkpoint

WOOF = imagenet.SUBSETS["imagewoof"]
SIDE = 16


def write_tree(root: Path, classes: list[str], train: int = 6, val: int = 2) -> None:
    """An ImageNet tree of small pictures, a colour per class."""
    draws = np.random.default_rng(0)
    for label, name in enumerate(classes):
        colour = np.array([25 * label, 255 - 25 * label, 128])
        for split, count, stem in (("train", train, f"{name}_"), ("val", val, "ILSVRC2012_val_0000")):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = (colour + draws.integers(-20, 20, (SIDE + 4, SIDE, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{stem}{label}{number}.JPEG", quality=95)


def settings(root: Path, source: str, **pretrain: object) -> Params:
    """The shape family of the paper's settings, made small."""
    return Params.model_validate_json(
        json.dumps(
            {
                "prepare": {"source": source, "location": str(root / "data"), "side": SIDE, "channels": 3, "flip": True, "shard_size": 16},
                "pretrain": {"source": "checkpoint", "location": str(root / "DiT.pt"), "autoencoder": str(root / "vae"), **pretrain},
                "encode": {"batch_size": 16, "shard_size": 16},
                "finetune": {
                    "epochs": 1,
                    "batch_size": 8,
                    "learning_rate": 0.05,
                    "ema_decay": 0.0,
                    "capacity_real": 4,
                    "capacity_gen": 4,
                    "preview_every": 0,
                },
                "sample": {"images_per_class": 1, "seeds": [0], "guidance": 4.0, "sampler": "ddpm", "steps": 3, "chunk_size": 8},
                "evaluate": {
                    "images_per_class": [1],
                    "student_seeds": [0],
                    "random_seeds": [0],
                    "protocol": "short-20",
                    "evaluations": 1,
                    "workers": 1,
                },
                "publish": {"gate": "off", "name": "distilled-small"},
            }
        )
    )


def distil(folder: Path, source: str, classes: list[str], **pretrain: object) -> Chain:
    """A finished chain on pictures of `classes`."""
    write_tree(folder / "data", classes)
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 8)}
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, sample_size=SIDE, scaling_factor=0.5).save_pretrained(folder / "vae")
    weights = random_checkpoint(depth=2, width=64, side=SIDE // 2)
    weights["final_layer.linear.weight"] *= 0.2  # or latents grow beyond what a trained network draws, and are refused
    torch.save(weights, folder / "DiT.pt")
    params = settings(folder, source, **pretrain)
    with pytest.MonkeyPatch.context() as world:
        enter(world, folder)
        run_chain(params, folder / "artifacts")
    return Chain(params, folder / "artifacts")


@pytest.fixture(scope="module")
def woof(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return distil(tmp_path_factory.mktemp("woof"), "imagewoof", list(WOOF))


def opened(chain: Chain) -> Generator:
    """The generator with its fine-tuned weights."""
    made = open_generator(open_artifact(chain.artifacts / "generator", "generator"))
    apply_delta(made.transformer, load_file(chain.artifacts / "denoiser" / "seed-0" / "delta.safetensors"))
    return made


def drawn(generator: Generator, label: int, position: int) -> np.ndarray:
    """The first image of the class at `position`, from row `label` of the label table; the rest of its chunk does not matter."""
    generator.labels = None
    noise = [seeded(Purpose.IMAGE, 0, position, 0) for _ in range(8)]
    image = generator.draw([label] * 8, noise, sampler="ddpm", steps=3, guidance=4.0)[0]
    return to_pixels(image.numpy())


def test_the_rows_of_the_wnids_are_tuned_and_no_others(woof: Chain) -> None:
    expected = sorted([*(imagenet.index_of(wnid) for wnid in WOOF), 1000])
    delta = load_file(woof.artifacts / "denoiser" / "seed-0" / "delta.safetensors")
    assert delta[LABEL_ROWS].tolist() == expected
    before = open_generator(open_artifact(woof.artifacts / "generator", "generator")).transformer.state_dict()[LABEL_TABLE]
    moved = (opened(woof).transformer.state_dict()[LABEL_TABLE] != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == expected


def test_classes_are_sampled_from_the_rows_of_their_wnids(woof: Chain) -> None:
    for position, wnid in enumerate(WOOF[:3]):
        path = woof.artifacts / "distilled" / "seed-0" / wnid / "00000.png"
        label = imagenet.index_of(wnid)
        np.testing.assert_array_equal(read_png(path), drawn(opened(woof), label, position))
        assert (read_png(path) != drawn(opened(woof), label + 1, position)).any()


def test_the_whole_chain_is_recorded(woof: Chain) -> None:
    generator, report = (open_artifact(woof.artifacts / name, name) for name in ("generator", "report"))
    assert generator.facts["labels"] == [imagenet.index_of(wnid) for wnid in WOOF]
    assert (generator.facts["learned_variance"], generator.facts["frequency_shift"]) == (True, 0.0)
    assert "CC-BY-NC" in generator.facts["licence"]
    assert open_artifact(woof.artifacts / "images", "images").facts["classes"] == list(WOOF)
    page = (report.folder / "report.html").read_text()
    assert all(imagenet.titled(wnid) in page for wnid in WOOF)


def trace(chain: Chain, **changes: object) -> torch.Tensor:
    """The metrics of three steps of fine-tuning."""
    config = chain.params.finetune.model_copy(update={"epochs": None, "steps": 3, **changes})
    data = Latents.open(open_artifact(chain.artifacts / "latents", "latents"), "cpu")
    run = FineTuning(config, 0, data, open_generator(open_artifact(chain.artifacts / "generator", "generator")))
    for _ in range(3):
        run.step()
    return run.history


def test_saving_memory_changes_nothing_and_bf16_rounding_alone(woof: Chain) -> None:
    plain = trace(woof)
    torch.testing.assert_close(trace(woof, gradient_checkpointing=True), plain, rtol=1e-5, atol=1e-6)
    rounded = trace(woof, precision="bf16")
    torch.testing.assert_close(rounded, plain, rtol=0.05, atol=0.05)
    assert not torch.equal(rounded, plain)


def test_images_drawn_in_bf16_are_those_of_float32_but_for_rounding(woof: Chain, tmp_path: Path) -> None:
    config = woof.params.sample.model_copy(update={"precision": "bf16"})
    paths = {name: woof.artifacts / name for name in ("generator", "denoiser")}
    sample(config, **paths, distilled=tmp_path / "rounded")
    images = [
        np.stack([read_png(place / "seed-0" / wnid / "00000.png") for wnid in WOOF]).astype(float)
        for place in (tmp_path / "rounded", woof.artifacts / "distilled")
    ]
    apart = np.abs(images[0] - images[1])
    assert 0 < apart.mean() < 0.05 * images[1].std()


def test_the_class_map_goes_with_the_merged_weights(woof: Chain, tmp_path: Path) -> None:
    merge(woof.artifacts / "generator", woof.artifacts / "denoiser", tmp_path / "merged")
    assert [(one["name"], one["label"]) for one in json.loads((tmp_path / "merged" / "class_map.json").read_text())] == [
        (wnid, imagenet.index_of(wnid)) for wnid in WOOF
    ]


def test_classes_of_ones_own_get_rows_of_their_own(tmp_path: Path) -> None:
    """A class count other than 1,000, sampled with guidance: the null row is the last of 1,002."""
    classes = ["my-cat", "n02086240", "your-cat"]
    chain = distil(tmp_path, "folder", classes, labels={"your-cat": "new:n02123045"})
    generator = open_artifact(chain.artifacts / "generator", "generator")
    assert (generator.facts["labels"], generator.facts["null_label"]) == ([1000, 155, 1001], 1002)
    table = open_generator(generator).transformer.state_dict()[LABEL_TABLE]
    original = random_checkpoint(depth=2, width=64, side=SIDE // 2)["y_embedder.embedding_table.weight"]
    torch.testing.assert_close(
        table, torch.stack([*original[:1000], original[:1000].mean(dim=0), original[imagenet.index_of("n02123045")], original[1000]])
    )
    path = chain.artifacts / "distilled" / "seed-0" / "your-cat" / "00000.png"
    np.testing.assert_array_equal(read_png(path), drawn(opened(chain), 1001, 2))
