"""The `images` artifact: its files, facts and determinism."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffstill.artifacts import load_split, open_artifact
from diffstill.config import PrepareConfig, preset
from diffstill.datasets import load
from diffstill.errors import DiffstillError
from diffstill.stages.prepare import prepare


def small_folder(root: Path, order: int = 1) -> PrepareConfig:
    """Two classes of ten colour images, one bad file and one that is no image; `order` is the order in which they are made."""
    for name in ("cat", "ant")[::order]:
        for i in range(10)[::order]:
            pixels = np.random.default_rng([i, *name.encode()]).integers(0, 256, (12, 10, 3), np.uint8)
            (root / "train" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / "train" / name / f"{i}.png")
    (root / "train/cat/bad.jpg").write_text("no image")
    (root / "train/cat/list.txt").write_text("no image either")
    return PrepareConfig(source="folder", location=str(root), channels=None, max_bad_fraction=0.1, shard_size=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_digits_round_trip(tmp_path):
    config = PrepareConfig(shard_size=500)
    metrics = prepare(config, images=tmp_path / "images")
    artifact, dataset = open_artifact(tmp_path / "images", "images"), load(config)
    for name, split in dataset.splits.items():
        pixels, labels = load_split(artifact, name)
        assert np.array_equal(pixels, split.pixels)
        assert np.array_equal(labels, split.labels)
        assert (pixels.dtype, labels.dtype) == (np.uint8, np.int64)
        assert metrics[f"{name}_images"] == len(labels)
    assert metrics["rejected"] == 0
    assert len(list((tmp_path / "images").glob("train-*.safetensors"))) == 3
    assert json.loads((tmp_path / "images/rejected.json").read_text()) == []
    assert json.loads((tmp_path / "images/classes.json").read_text()) == [{"name": str(i), "label": i} for i in range(10)]


def test_facts_of_a_folder(tmp_path):
    metrics = prepare(small_folder(tmp_path / "data"), images=tmp_path / "images")
    artifact = open_artifact(tmp_path / "images", "images")
    assert artifact.facts == {
        "source": "folder",
        "classes": ["ant", "cat"],
        "side": 8,
        "channels": 3,
        "flip": False,
        "counts": {"train": {"ant": 7, "cat": 7}, "val": {"ant": 1, "cat": 1}, "test": {"ant": 2, "cat": 2}},
        "split": "test is a share of 0.2 of each class of the training images, drawn with seed 0; "
        "val is a share of 0.1 of each class of the training images that is left, drawn with seed 0",
        "rejected": 1,
        "ignored": 1,
    }
    assert metrics == {"train_images": 14.0, "val_images": 2.0, "test_images": 4.0, "rejected": 1.0}
    (rejected,) = json.loads((tmp_path / "images/rejected.json").read_text())
    assert rejected == {"file": "train/cat/bad.jpg", "reason": "not a readable image (JPEG, PNG, BMP, GIF, WEBP, TIFF)"}
    assert artifact.manifest.inputs == {}
    assert load_split(artifact, "test")[0].shape == (4, 3, 8, 8)


def test_two_runs_give_the_same_bytes(tmp_path):
    config = small_folder(tmp_path / "data")
    prepare(config, images=tmp_path / "one")
    (tmp_path / "data").rename(tmp_path / "old")
    small_folder(tmp_path / "data", order=-1)
    prepare(config, images=tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_splits_do_not_overlap(tmp_path):
    prepare(small_folder(tmp_path / "data"), images=tmp_path / "images")
    artifact = open_artifact(tmp_path / "images", "images")
    images = [pixels.tobytes() for name in ("train", "val", "test") for pixels in load_split(artifact, name)[0]]
    assert len(images) == len(set(images)) == 20


def test_a_failure_leaves_the_earlier_artifact(tmp_path):
    config = small_folder(tmp_path / "data")
    prepare(config, images=tmp_path / "images")
    before = contents(tmp_path / "images")
    with pytest.raises(DiffstillError, match="1 of 21 image files cannot be used"):
        prepare(config.model_copy(update={"max_bad_fraction": 0.0}), images=tmp_path / "images")
    assert contents(tmp_path / "images") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "images"]


def test_the_tiny_preset(tmp_path):
    prepare(preset("tiny").prepare, images=tmp_path / "images")
    assert open_artifact(tmp_path / "images", "images").facts["classes"] == ["0", "1", "2"]
