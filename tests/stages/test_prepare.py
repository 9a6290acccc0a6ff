"""The `images` artifact: its files, facts and determinism, what a kill leaves of it, and how much memory it takes."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from chains import flip
from diffstill.artifacts import load_split, open_artifact
from diffstill.config import PrepareConfig, preset
from diffstill.datasets import SPLITS, decode, divide, load
from diffstill.errors import DiffstillError
from diffstill.imagenet import SUBSETS
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
    for name in SPLITS:
        pixels, labels = load_split(artifact, name)
        rows = np.flatnonzero(dataset.assigned == name)
        assert np.array_equal(pixels, [dataset.read(row) for row in rows])
        assert np.array_equal(labels, dataset.labels[rows])
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
        "left_out": 1,
    }
    assert metrics == {"train_images": 14.0, "val_images": 2.0, "test_images": 4.0, "rejected": 1.0, "left_out": 1.0}
    (rejected,) = json.loads((tmp_path / "images/rejected.json").read_text())
    assert rejected == {"file": "train/cat/bad.jpg", "reason": "not a readable image (JPEG, PNG, BMP, GIF, WEBP, TIFF)"}
    (left_out,) = json.loads((tmp_path / "images/left_out.json").read_text())
    assert left_out == {"file": "train/cat/list.txt", "reason": "not a readable image (JPEG, PNG, BMP, GIF, WEBP, TIFF)"}
    assert artifact.manifest.inputs == {}
    assert load_split(artifact, "test")[0].shape == (4, 3, 8, 8)


def test_what_is_left_out_is_told_with_its_reason(tmp_path, caplog):
    config = small_folder(tmp_path / "data")
    for number in range(4):
        (tmp_path / f"data/train/ant/{number}.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with caplog.at_level(logging.WARNING, "diffstill"):
        prepare(config, images=tmp_path / "images")
    unread, left_out = caplog.messages
    assert unread == (
        "1 file could not be read (1 .jpg), such as 'train/cat/bad.jpg': not a readable image (JPEG, PNG, BMP, GIF, WEBP, TIFF); "
        f"all are listed in {tmp_path / 'images/rejected.json'}"
    )
    assert left_out.startswith("5 files left out (4 .heic, 1 .txt), such as 'train/ant/0.heic': not a readable image (JPEG")
    assert len(json.loads((tmp_path / "images/left_out.json").read_text())) == 5


def test_all_bad_files_of_all_splits_are_listed_at_once(tmp_path):
    config = small_folder(tmp_path / "data").model_copy(update={"shard_size": 2, "max_bad_fraction": 0.0})
    wanted = {"train/cat/bad.jpg"}
    for sub, name, number in (("train", "ant", 3), ("train", "cat", 9), ("val", "ant", 0), ("test", "cat", 1), ("test", "ant", 1)):
        path = tmp_path / "data" / sub / name / f"{number}.png"
        for label in ("ant", "cat"):
            (path.parent.parent / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path.parent.parent / label / "sound.png")
        path.write_text("no image")
        wanted.add(f"{sub}/{name}/{number}.png")
    with pytest.raises(
        DiffstillError, match=r"data: 6 of 30 image files cannot be used, .*; and 1 more; all are listed in .*rejected.json\)"
    ) as refusal:
        prepare(config, images=tmp_path / "images")
    listed = re.search(r"listed in (.*rejected.json)\)", str(refusal.value))[1]
    assert {one["file"] for one in json.loads(Path(listed).read_text())} == wanted
    assert not (tmp_path / "images").exists()


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "images", "work"]


def test_the_tiny_preset(tmp_path):
    prepare(preset("tiny").prepare, images=tmp_path / "images")
    assert open_artifact(tmp_path / "images", "images").facts["classes"] == ["0", "1", "2"]


# --- against the plain way ---------------------------------------------------------------------------------------


def noisy(root: Path, counts: dict[str, int], size: int = 12) -> PrepareConfig:
    """Colour images of noise in class folders of train/."""
    for name, count in counts.items():
        (root / "train" / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.default_rng([i, *name.encode()]).integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{i:04d}.png")
    return PrepareConfig(source="folder", location=str(root), channels=None, max_bad_fraction=0.2, shard_size=7)


def in_memory(config: PrepareConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All images at once, one file after the other: what pieces and threads must give, too."""
    train = Path(str(config.location)) / "train"
    classes = sorted(path.name for path in train.iterdir())
    files = [(label, path) for label, name in enumerate(classes) for path in sorted((train / name).glob("*.png"))]
    labels = np.array([label for label, _ in files])
    assigned = divide(labels, np.full(len(files), "train"), classes, (), config)
    found: dict[str, list[tuple[np.ndarray, int]]] = {split: [] for split in SPLITS}
    for (label, path), split in zip(files, assigned, strict=True):
        try:
            found[split].append((np.asarray(decode(path, config.side, config.max_pixels)).transpose(2, 0, 1), label))
        except OSError:
            continue
    return {split: (np.stack([pixels for pixels, _ in own]), np.array([label for _, label in own])) for split, own in found.items()}


def same_as_in_memory(images: Path, config: PrepareConfig) -> bool:
    found = open_artifact(images, "images")
    return all(
        np.array_equal(array, wanted) for split, own in in_memory(config).items() for array, wanted in zip(load_split(found, split), own, strict=True)
    )


@pytest.mark.parametrize("bad", [(), (3,), (0, 1, 2, 3, 4, 5, 6, 7)])
def test_pieces_in_parallel_give_what_one_file_after_the_other_gives(tmp_path, bad):
    config = noisy(tmp_path / "data", {"a": 30, "b": 25})
    for number in bad:
        (tmp_path / f"data/train/a/{number:04d}.png").write_bytes(b"bad")
    prepare(config, images=tmp_path / "images")
    assert same_as_in_memory(tmp_path / "images", config)
    assert [entry["file"] for entry in json.loads((tmp_path / "images/rejected.json").read_text())] == [f"train/a/{n:04d}.png" for n in bad]
    listed = sum(divide(np.repeat([0, 1], [30, 25]), np.full(55, "train"), ["a", "b"], (), config) == "train")
    assert len(list((tmp_path / "images").glob("train-*"))) == -(-listed // 7)


def test_a_piece_without_a_readable_image_is_an_empty_shard(tmp_path):
    config = noisy(tmp_path / "data", {"a": 20, "b": 20}).model_copy(update={"shard_size": 1})
    (tmp_path / "data/train/a/0003.png").write_bytes(b"bad")
    prepare(config, images=tmp_path / "images")
    assert same_as_in_memory(tmp_path / "images", config)


def test_images_of_one_colour_alone_are_refused(tmp_path):
    """As a decoder that fails in silence gives them; one that differs in a pixel is enough."""
    config = noisy(tmp_path / "data", {"a": 20, "b": 20})
    for path in (tmp_path / "data/train").rglob("*.png"):
        Image.new("L", (9, 9), 7).save(path)
    with pytest.raises(DiffstillError, match="every pixel of every training image is 7"):
        prepare(config, images=tmp_path / "images")
    assert not (tmp_path / "images").exists()
    for path in (tmp_path / "data/train/b").iterdir():
        Image.new("L", (9, 9), 8).save(path)
    prepare(config, images=tmp_path / "images")


# --- killed and resumed ------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from diffstill import datasets
from diffstill.config import PrepareConfig
from diffstill.stages.prepare import prepare

whole = datasets.decode
def slowly(*given):
    time.sleep(0.02)
    return whole(*given)
datasets.decode = slowly
prepare(PrepareConfig.model_validate_json(sys.argv[1]), images=Path(sys.argv[2]))
"""


def kill_after(pieces: int, config: PrepareConfig, images: Path, work: Path) -> None:
    """Start the stage in a process of its own and kill it once that many pieces are finished."""
    with subprocess.Popen([sys.executable, "-c", SLOW, config.model_dump_json(), str(images)]) as running:
        deadline = time.monotonic() + 60
        while len(list(work.glob("prepare-*/*.safetensors"))) < pieces:
            assert running.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL


class Bar:
    """Counts what is done, and raises after `last` images."""

    def __init__(self, last: float = float("inf")) -> None:
        self.opened: list[tuple[object, ...]] = []
        self.done, self.last = 0, last

    @contextmanager
    def progress(self, *opened: object) -> Iterator["Bar"]:
        self.opened.append(opened)
        self.done = 0
        yield self

    def update(self, n: int = 1) -> None:
        self.done += n
        if self.opened[-1][0] == "prepare" and self.done > self.last:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_where_it_was_with_the_same_bytes(tmp_path, monkeypatch):
    config = noisy(tmp_path / "data", {"a": 60, "b": 60})
    (tmp_path / "data/train/b/0004.png").write_bytes(b"bad")
    kill_after(5, config, tmp_path / "images", tmp_path / "work")
    assert not (tmp_path / "images").exists()
    kept = len(list((tmp_path / "work").glob("prepare-*/*.safetensors")))
    bar = Bar()
    prepare(config, images=tmp_path / "images", record=bar)
    (_, total, _, done) = bar.opened[-1]
    assert done == 7 * kept
    assert bar.done == total - done
    monkeypatch.setenv("DIFFSTILL_WORK", str(tmp_path / "other work"))
    prepare(config, images=tmp_path / "undisturbed")
    assert contents(tmp_path / "images") == contents(tmp_path / "undisturbed")
    assert list((tmp_path / "work").glob("prepare-*/*")) == []


def test_a_run_interrupted_again_and_again_gets_there(tmp_path):
    config = noisy(tmp_path / "data", {"a": 40, "b": 40})
    for number in (0, 5, 9):
        (tmp_path / f"data/train/a/{number:04d}.png").write_bytes(b"bad")
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            prepare(config, images=tmp_path / "images", record=Bar(last=20))
    bar = Bar()
    prepare(config, images=tmp_path / "images", record=bar)
    assert bar.opened[-1][3] >= 40
    assert same_as_in_memory(tmp_path / "images", config)
    assert len(json.loads((tmp_path / "images/rejected.json").read_text())) == 3


@pytest.mark.parametrize("damage", ["piece", "note"])
def test_what_is_damaged_is_read_again(tmp_path, damage):
    """A piece, and the note of which of its images were rejected: without it they would be lost without a word."""
    config = noisy(tmp_path / "data", {"a": 40, "b": 40})
    for number in (0, 5, 9):
        (tmp_path / f"data/train/a/{number:04d}.png").write_bytes(b"bad")
    with pytest.raises(KeyboardInterrupt):
        prepare(config, images=tmp_path / "images", record=Bar(last=40))
    if damage == "piece":
        flip(sorted((tmp_path / "work").rglob("*.safetensors"))[0])
    else:
        (notes,) = (tmp_path / "work").rglob("rejected.jsonl")
        notes.write_text(re.sub(r'"\d+": ', '"1": ', notes.read_text()))
    prepare(config, images=tmp_path / "images")
    assert same_as_in_memory(tmp_path / "images", config)
    assert len(json.loads((tmp_path / "images/rejected.json").read_text())) == 3


def test_files_changed_meanwhile_are_read_again(tmp_path):
    config = noisy(tmp_path / "data", {"a": 40, "b": 40})
    with pytest.raises(KeyboardInterrupt):
        prepare(config, images=tmp_path / "images", record=Bar(last=30))
    for path in (tmp_path / "data/train/a").iterdir():
        Image.new("RGB", (9, 9), "red").save(path)
    prepare(config, images=tmp_path / "images")
    assert same_as_in_memory(tmp_path / "images", config)


def test_more_tolerance_goes_on_with_what_is_read(tmp_path):
    config = noisy(tmp_path / "data", {"a": 40, "b": 40})
    for number in range(8):
        (tmp_path / f"data/train/b/{number:04d}.png").write_bytes(b"bad")
    with pytest.raises(DiffstillError, match=r"data: \d of 80 image files cannot be used, above `prepare.max_bad_fraction` 0.05") as first:
        prepare(config.model_copy(update={"max_bad_fraction": 0.05}), images=tmp_path / "images")
    with pytest.raises(DiffstillError) as again:
        prepare(config.model_copy(update={"max_bad_fraction": 0.05}), images=tmp_path / "images")
    assert str(again.value) == str(first.value)
    bar = Bar()
    prepare(config, images=tmp_path / "images", record=bar)
    assert bar.opened[-1][3] > 0
    assert same_as_in_memory(tmp_path / "images", config)


MEASURED = """
import hashlib, sys, tracemalloc
from pathlib import Path
from diffstill import artifacts
from diffstill.config import PrepareConfig
from diffstill.stages.prepare import prepare

# files are hashed in threads with buffers of a quarter of a megabyte, as many as happen to run at once: not what is asked here
artifacts.file_digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
config = PrepareConfig.model_validate_json(sys.argv[1])
tracemalloc.start()
prepare(config, images=Path(sys.argv[2]))
print(tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """An image more costs its name and label, less than 1,000 bytes; its pixels would be 3 KiB. In a process of its own, where nobody else allocates."""
    config = noisy(tmp_path / "data", {"a": 3, "b": 3}, size=32).model_copy(update={"side": 32, "shard_size": 50, "channels": 3})

    def peak(images: int) -> int:
        for name in "ab":
            for number in range(3, images // 2):
                path = tmp_path / f"data/train/{name}/{number:04d}.png"
                if not path.exists():
                    os.link(tmp_path / f"data/train/{name}/0000.png", path)
        command = [sys.executable, "-c", MEASURED, config.model_dump_json(), str(tmp_path / "images")]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    small, large = peak(400), peak(1600)
    assert (large - small) / 1200 < 1000


# --- ImageNet ----------------------------------------------------------------------------------------------------


def re_split(root: Path) -> PrepareConfig:
    """Two dogs out of a tree like fastai's."""
    dogs = SUBSETS["imagewoof"][:2]
    for wnid in dogs:
        for sub, names in {"train": ("a", "b", "c", "d"), "val": ("e", "ILSVRC2012_val_")}.items():
            for name in names:
                path = root / sub / wnid / (f"{name}{wnid}.JPEG" if name.startswith("ILSVRC") else f"{wnid}_{name}.JPEG")
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), "red").save(path)
    return PrepareConfig(source="imagewoof", location=str(root), classes=dogs, channels=3, flip=True)


def test_imagenets_classes_have_titles_and_leakage_is_a_fact(tmp_path, caplog):
    config = re_split(tmp_path / "data")
    with caplog.at_level(logging.WARNING, "diffstill"):
        prepare(config, images=tmp_path / "images")
    facts = open_artifact(tmp_path / "images", "images").facts
    assert facts["source"] == "imagewoof"
    assert facts["classes"] == list(SUBSETS["imagewoof"][:2])
    assert "of a re-split, as in fastai's archives" in facts["split"]
    assert facts["leakage"].startswith("2 of 4 test images (50%) are training images of ImageNet")
    assert facts["leakage"] in caplog.text
    assert str(tmp_path) not in json.dumps(facts)
    assert json.loads((tmp_path / "images/classes.json").read_text()) == [
        {"name": "n02096294", "label": 0, "title": "Australian terrier"},
        {"name": "n02093754", "label": 1, "title": "Border terrier"},
    ]


@pytest.mark.parametrize("name", SUBSETS)
def test_presets_of_imagenet(name):
    config = preset(name)
    knobs = config.prepare
    assert (knobs.source, knobs.side, knobs.channels, knobs.flip, knobs.shard_size) == (name, 256, 3, True, 1024)
    assert (config.encode.batch_size, config.encode.shard_size) == (64, 1024)
