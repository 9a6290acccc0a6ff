"""Weights of others: the original checkpoint against an independent forward pass, the class map, licences."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from diffstill import imagenet
from diffstill.config import PretrainConfig
from diffstill.errors import DiffstillError
from diffstill.pretrained import ClassLabel, class_map, known_licence, label_names, map_classes, read_checkpoint, weights_digest
from original_dit import forward, random_checkpoint

WOOF = imagenet.SUBSETS["imagewoof"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(random_checkpoint(), tmp_path / "DiT.pt")
    return tmp_path / "DiT.pt"


@torch.no_grad()
@pytest.mark.parametrize("width", [128, pytest.param(1152, marks=pytest.mark.slow)])
def test_the_converted_checkpoint_computes_what_the_paper_says_at_every_t(tmp_path: Path, width: int) -> None:
    weights = random_checkpoint(depth=3 if width == 128 else 1, width=width, classes=20, side=8 if width == 128 else 4)
    torch.save(weights, tmp_path / "DiT.pt")
    converted = read_checkpoint(tmp_path / "DiT.pt").double()
    side, heads = converted.config.sample_size, converted.config.num_attention_heads
    assert heads == {128: 2, 1152: 16}[width]
    draws = torch.Generator().manual_seed(1)
    worst = 0.0
    for t in torch.arange(1000).split(250 if width == 128 else 500):
        x = torch.randn(len(t), 4, side, side, generator=draws, dtype=torch.float64)
        labels = torch.randint(21, (len(t),), generator=draws)  # 20 is the null label
        ours = converted(x, timestep=t, class_labels=labels).sample
        theirs = forward(weights, x, t, labels, heads)
        assert theirs.std() > 0.1
        worst = max(worst, (ours - theirs).abs().max().item())
    assert worst < 1e-9


def test_of_a_training_checkpoint_the_averaged_weights_are_taken(tmp_path: Path) -> None:
    options = argparse.Namespace(model="DiT-XL/2", epochs=1400)  # as DiT's training script keeps them
    torch.save({"model": random_checkpoint(seed=1), "ema": random_checkpoint(seed=2), "opt": {}, "args": options}, tmp_path / "0050000.pt")
    torch.save(random_checkpoint(seed=2), tmp_path / "ema.pt")
    for ours, theirs in zip(
        read_checkpoint(tmp_path / "0050000.pt").state_dict().values(), read_checkpoint(tmp_path / "ema.pt").state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_what_is_no_checkpoint_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "DiT.pt"
    for written, told in (
        (lambda: path.write_text("hello"), "not a file of plain tensors"),
        (lambda: torch.save({"args": Path("x")}, path), "not a file of plain tensors"),
        (lambda: torch.save({"args": argparse.Namespace(depth=3)}, path), "holds no DiT"),
        (lambda: torch.save(without("y_embedder.embedding_table.weight"), path), "do not make a DiT"),
        (lambda: torch.save(without("blocks."), path), "do not make a DiT"),
        (lambda: torch.save(random_checkpoint() | {"x_embedder.proj.weight": torch.zeros(3, 4, 5)}, path), "do not make a DiT"),
        (lambda: torch.save(random_checkpoint() | {"pos_embed": torch.zeros(16)}, path), "do not make a DiT"),
        (lambda: torch.save(random_checkpoint() | {"pos_embed": torch.zeros(1, 15, 128)}, path), "do not make a DiT"),
        (lambda: torch.save(random_checkpoint() | {"blocks.0.attn.qkv.bias": torch.zeros(1)}, path), "do not make a DiT"),
        (lambda: torch.save(random_checkpoint() | {"step": 5}, path), "'step' is no tensor of weights"),
        (lambda: torch.save(random_checkpoint() | {5: torch.zeros(3)}, path), "is no tensor of weights"),
        (lambda: torch.save(random_checkpoint(classes=0), path), "no label beside the null label"),
        (lambda: torch.save({"weight": torch.zeros(3)}, path), "holds no DiT"),
        (lambda: torch.save([1, 2], path), "holds no DiT"),
        (lambda: torch.save(random_checkpoint() | {"blocks.0.attn.rel_pos": torch.zeros(3)}, path), r"`blocks.0.attn.rel_pos` is unknown"),
        (
            lambda: torch.save({n: v for n, v in random_checkpoint().items() if n != "blocks.1.mlp.fc1.bias"}, path),
            r"fc.*missing|proj.bias` is missing",
        ),
        (lambda: torch.save(random_checkpoint() | {"blocks.1.mlp.fc1.bias": torch.zeros(3)}, path), r"is \(3,\) where \(512,\) is expected"),
        (lambda: torch.save(random_checkpoint() | {"pos_embed": torch.zeros(1, 16, 128)}, path), "other position embeddings"),
        (lambda: torch.save(random_checkpoint(width=100), path), "no multiple of 64"),
    ):
        written()
        with pytest.raises(DiffstillError, match=told):
            read_checkpoint(path)
    with pytest.raises(DiffstillError, match=r"nothing\.pt"):
        read_checkpoint(tmp_path / "nothing.pt")


def without(start: str) -> dict[str, torch.Tensor]:
    """A checkpoint that lacks some weights."""
    return {name: value for name, value in random_checkpoint().items() if not name.startswith(start)}


@pytest.mark.parametrize("form", ["half precision", "the format before torch 1.6"])
def test_checkpoints_in_other_forms_are_read(tmp_path: Path, form: str) -> None:
    weights = random_checkpoint(depth=1)
    half = {name: value.half() for name, value in weights.items()}
    torch.save(half if form == "half precision" else weights, tmp_path / "DiT.pt", _use_new_zipfile_serialization=form == "half precision")
    torch.save(weights, tmp_path / "plain.pt")
    ours, theirs = (read_checkpoint(tmp_path / name).state_dict() for name in ("DiT.pt", "plain.pt"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-3)


# --- the class map -------------------------------------------------------------------------------------------------


def labels(found: list[ClassLabel]) -> list[int]:
    return [one.label for one in found]


def test_wnids_are_imagenet_indices_whatever_the_order() -> None:
    found = map_classes(WOOF, None, 1000, {})
    assert labels(found) == [imagenet.index_of(wnid) for wnid in WOOF]
    assert labels(map_classes(["n02086240"], None, 1000, {})) == [155]  # Shih-Tzu
    assert labels(map_classes(WOOF[::-1], None, 1000, {})) == labels(found)[::-1]
    assert {one.origin for one in found} == {"imagenet"}


def test_labels_get_names_by_which_they_are_known_again() -> None:
    first = map_classes(["n02086240", "my-cat"], None, 1000, {})
    names = label_names(first, None, 1000)
    assert (names[155], names[1000], len(names)) == ("n02086240", "my-cat", 1001)
    again = map_classes(["my-cat", "n02086241", "n02085936", "5"], names, 1001, {})
    assert labels(again) == [1000, 1001, imagenet.index_of("n02085936"), 1002]
    assert label_names(map_classes(["x", "y"], None, 2, {}), None, 2) == ["x", "y"]
    assert label_names(map_classes(["x", "y"], None, 3, {"x": "2"}), None, 3) == ["label-0", "label-1", "x", "y"]
    assert label_names(map_classes(["b", "z"], ["a", "b"], 2, {}), ["a", "b"], 2) == ["a", "b", "z"]


def test_an_unknown_class_gets_a_row_before_the_null_row() -> None:
    found = map_classes(["n02086240", "my-cat", "my-dog"], None, 1000, {"my-dog": "new:n02086240"})
    assert labels(found) == [155, 1000, 1001]
    assert [(one.new, one.copied) for one in found] == [(False, None), (True, None), (True, 155)]
    assert class_map(found)[2] == {"name": "my-dog", "label": 1001, "origin": "new: copy of n02086240", "copied": 155}


def test_names_that_the_generator_knows() -> None:
    assert labels(map_classes(["b", "a"], ["a", "b", "c"], 3, {})) == [1, 0]
    assert labels(map_classes(["b", "z"], ["a", "b", "c"], 3, {})) == [1, 3]
    assert labels(map_classes(["x", "y"], None, 2, {})) == [0, 1]
    assert labels(map_classes(["x", "y"], None, 5, {})) == [5, 6]
    assert labels(map_classes(["x", "y"], None, 5, {"y": "4", "x": "mean"})) == [5, 4]
    assert labels(map_classes(["n02086240", "x"], ["n02086240", "q"], 2, {})) == [0, 2]  # a generator of ours, not of ImageNet


@pytest.mark.parametrize(
    ("classes", "chosen", "told"),
    [
        (["x"], {"z": "1"}, "which is no class of the images"),
        (["x"], {"x": "1000"}, "a label below 1000"),
        (["x"], {"x": "n99999999"}, "a wnid"),
        (["x"], {"x": "new:"}, "a label below 1000"),
        (["x", "n02086240"], {"x": "155"}, "have one label, 155"),
    ],
)
def test_choices_that_cannot_be(classes: list[str], chosen: dict[str, str], told: str) -> None:
    with pytest.raises(DiffstillError, match=told):
        map_classes(classes, None, 1000, chosen)


# --- licences and digests ------------------------------------------------------------------------------------------


def test_licences_are_told() -> None:
    hub = PretrainConfig(source="folder", location="hf://facebook/DiT-XL-2-256@main", autoencoder="hf://stabilityai/sd-vae-ft-mse@main")
    assert known_licence(hub) == "transformer CC-BY-NC-4.0: no commercial use; autoencoder MIT"
    assert known_licence(PretrainConfig(source="checkpoint", location="DiT.pt", autoencoder="vae")).startswith("transformer CC-BY-NC-4.0")
    assert "unknown" in known_licence(PretrainConfig(source="folder", location="/data/pipeline"))


def test_the_digest_of_weights_is_that_of_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = weights_digest(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert weights_digest(tmp_path / "b") == first
    (tmp_path / "b" / "x").rename(tmp_path / "b" / "y")
    assert weights_digest(tmp_path / "b") != first
