"""Sources, splits and decoding, against small real files."""

import gzip
import hashlib
import os
import shutil
import struct
import tarfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from chains import contents, flip
from diffstill import datasets
from diffstill.config import PrepareConfig
from diffstill.datasets import (
    FASHION_CLASSES,
    FASHION_DIGESTS,
    FASHION_FOLDER,
    SPLITS,
    VALIDATION_IMAGE,
    Dataset,
    Rejected,
    decode,
    divide,
    fashion_mnist,
    read_idx,
    read_pieces,
    refuse_emptied,
    refuse_many_bad,
)
from diffstill.errors import DiffstillError
from diffstill.imagenet import SUBSETS
from diffstill.record import Record, ignore

LIMIT = 10_000
NO_IMAGE = "not a readable image (JPEG, PNG, BMP, GIF, WEBP, TIFF)"


@dataclass(frozen=True)
class Split:
    pixels: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Loaded:
    """A dataset read to its end."""

    dataset: Dataset
    splits: Mapping[str, Split]
    bad: Mapping[int, str]

    @property
    def classes(self) -> Sequence[str]:
        return self.dataset.classes

    @property
    def channels(self) -> int:
        return self.dataset.channels

    @property
    def division(self) -> str:
        return self.dataset.division

    @property
    def left_out(self) -> dict[str, str]:
        return {one.file: one.reason for one in self.dataset.left_out}

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        return tuple(Rejected(self.dataset.names[row], reason) for row, reason in self.bad.items())

    def counts(self) -> dict[str, dict[str, int]]:
        return self.dataset.counts(self.bad)


def read(dataset: Dataset, config: PrepareConfig, record: Record = ignore) -> Loaded:
    """All pieces, in memory, judged as the stage judges them."""
    parts, bad = {split: [] for split in SPLITS}, {}
    with record.progress("prepare", len(dataset.labels), "img") as progress:
        for found in read_pieces(dataset, dataset.pieces(config.shard_size), config.side, progress):
            parts[found.piece.split].append(found)
            bad |= found.rejected
    refuse_many_bad(dataset, bad, config.max_bad_fraction, Path("the list"))
    refuse_emptied(dataset, bad)
    splits = {
        split: Split(np.concatenate([part.pixels for part in own]), np.concatenate([part.labels for part in own])) for split, own in parts.items()
    }
    return Loaded(dataset, splits, bad)


def load(config: PrepareConfig, record: Record = ignore) -> Loaded:
    return read(datasets.load(config, record), config, record)


def fashion(config: PrepareConfig, digests: Mapping[str, str] = FASHION_DIGESTS) -> Loaded:
    return read(fashion_mnist(config, digests=digests), config)


def folder_config(root: Path, **knobs) -> PrepareConfig:
    return PrepareConfig(**({"source": "folder", "location": str(root), "side": 8, "channels": None} | knobs))


def plain(path: Path, value: int = 0, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, 0, 255 - value)).save(path)
    return path


def tree(root: Path, counts: dict[str, int], split: str = "train", start: int = 0) -> Path:
    """`counts` images per class, each of its own grey value from `start` on."""
    for number, (name, count) in enumerate(sorted(counts.items())):
        for i in range(count):
            plain(root / split / name / f"{i:03d}.png", start + number * 20 + i)
    return root


def brought(root: Path) -> Path:
    """One image of each of the classes a and b for test and for val, so that no bad file of train can be the only one of its split."""
    return tree(tree(root, {"a": 1, "b": 1}, "test"), {"a": 1, "b": 1}, "val")


def values(dataset: Loaded, split: str) -> list[int]:
    """The grey value of each (plain) image of a split."""
    return [int(value) for value in dataset.splits[split].pixels[:, 0, 0, 0]]


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, shape, np.uint8)


# --- digits ------------------------------------------------------------------------------------------------------


def test_digits_are_scaled_and_split_by_class():
    dataset = load(PrepareConfig())
    assert dataset.classes == tuple("0123456789")
    counts, raw = dataset.counts(), load_digits()
    for label, total in Counter(raw.target.tolist()).items():
        test = round(0.2 * total)
        val = round(0.1 * (total - test))
        assert [counts[split][str(label)] for split in SPLITS] == [total - test - val, val, test]
    first = dataset.splits["train"]
    assert first.pixels.dtype == np.uint8
    assert first.labels.dtype == np.int64
    assert first.pixels.shape[1:] == (1, 8, 8)
    got = sorted(pixels.tobytes() for split in dataset.splits.values() for pixels in split.pixels)
    assert got == sorted(np.floor(image * 255 / 16 + 0.5).astype(np.uint8).tobytes() for image in raw.images)


def test_digits_split_follows_the_seed():
    one, same, other = (load(PrepareConfig(seed=seed)).splits["test"].pixels for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_a_subset_of_classes_keeps_its_order_and_its_splits():
    whole, some = load(PrepareConfig()), load(PrepareConfig(classes=("7", "2")))
    assert some.classes == ("7", "2")
    for name in SPLITS:
        for label, native in enumerate((7, 2)):
            left, right = some.splits[name], whole.splits[name]
            assert np.array_equal(left.pixels[left.labels == label], right.pixels[right.labels == native])


def test_digits_in_colour_are_replicated_and_other_sides_resized():
    grey, colour = load(PrepareConfig(side=12)), load(PrepareConfig(side=12, channels=3))
    assert grey.splits["val"].pixels.shape[1:] == (1, 12, 12)
    assert colour.channels == 3
    assert np.array_equal(colour.splits["val"].pixels, np.repeat(grey.splits["val"].pixels, 3, axis=1))
    assert load(PrepareConfig(channels=None)).channels == 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"classes": ("1", "x", "y")}, r"`prepare.classes` names 'x', 'y', unknown to digits; known are '0', '1'"),
        ({"classes": ("1",)}, r"only the class '1'.*at least two; name more in `prepare.classes`"),
        ({"location": "somewhere"}, r"'somewhere', but the digits lie inside scikit-learn; set it to null"),
        ({"source": "folder", "location": "s3://bucket/x"}, r"'s3://bucket/x': source folder does not read s3://"),
        ({"source": "fashion-mnist", "location": "s3://bucket/x"}, r"source fashion-mnist does not read s3://"),
        ({"source": "folder", "location": "https://host/x"}, r"source folder does not read https://"),
        ({"source": "folder"}, r"`prepare.location` is null.*train/<class>/<image>"),
    ],
)
def test_knobs_that_cannot_work_are_refused(knobs, message):
    with pytest.raises(DiffstillError, match=message):
        load(PrepareConfig(**knobs))


# --- splits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fractions", [(0.2, 0.1), (0.001, 0.001), (0.99, 0.99), (0.5, 0.5)])
@pytest.mark.parametrize("count", [3, 4, 11, 200])
def test_every_class_is_in_every_wanted_split(fractions, count):
    config = PrepareConfig(test_fraction=fractions[0], val_fraction=fractions[1], seed=1)
    labels = np.repeat(np.arange(3), count)
    assigned = divide(labels, np.full(3 * count, "train"), ["a", "b", "c"], (), config)
    for label in range(3):
        sizes = Counter(assigned[labels == label].tolist())
        assert sizes["train"] >= 1
        assert sizes["test"] >= 1
        assert sizes["val"] >= 1
        assert abs(sizes["test"] - fractions[0] * count) <= 2


def test_classes_of_one_size_are_drawn_apart():
    assigned = divide(np.repeat([0, 1], 100), np.full(200, "train"), ["a", "b"], (), PrepareConfig())
    assert not np.array_equal(assigned[:100], assigned[100:])


def test_brought_splits_stay_as_they_are():
    origin = np.array(["train"] * 6 + ["test"] * 4)
    labels = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1, 1])
    assigned = divide(labels, origin, ["a", "b"], ("test",), PrepareConfig())
    assert assigned[6:].tolist() == ["test"] * 4
    assert sorted(assigned[:3]) == sorted(assigned[3:6]) == ["train", "train", "val"]


# --- fashion-mnist -----------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_fashion(tmp_path) -> tuple[Path, dict[str, str], dict[str, np.ndarray]]:
    """A folder of four true IDX files, their digests and their arrays."""
    shapes = {"train-images": (60, 28, 28), "train-labels": (60,), "t10k-images": (20, 28, 28), "t10k-labels": (20,)}
    arrays = {name: noise(shape) if len(shape) == 3 else np.arange(*shape) % 10 for name, shape in shapes.items()}
    files = dict(zip(FASHION_DIGESTS, arrays, strict=True))
    where = tmp_path / "fashion"
    where.mkdir()
    for file, name in files.items():
        (where / file).write_bytes(gzip.compress(idx(arrays[name])))
    return where, {file: hashlib.sha256(idx(arrays[name])).hexdigest() for file, name in files.items()}, arrays


def test_fashion_keeps_its_own_test_split(small_fashion):
    where, digests, arrays = small_fashion
    dataset = fashion(PrepareConfig(source="fashion-mnist", location=str(where), side=28), digests=digests)
    assert dataset.classes == FASHION_CLASSES
    assert np.array_equal(dataset.splits["test"].pixels[:, 0], arrays["t10k-images"])
    assert np.array_equal(dataset.splits["test"].labels, arrays["t10k-labels"])
    assert set(dataset.counts()["train"].values()) == {5}
    assert set(dataset.counts()["val"].values()) == {1}
    given = {image.tobytes(): label for image, label in zip(arrays["train-images"], arrays["train-labels"], strict=True)}
    got = {
        pixels.tobytes(): label
        for split in (dataset.splits["train"], dataset.splits["val"])
        for pixels, label in zip(split.pixels, split.labels, strict=True)
    }
    assert got == given
    assert dataset.division.startswith("test is the test split that comes with the data; val is a share of 0.1 of each class of the training images,")


def test_fashion_other_side_and_subset(small_fashion):
    where, digests, _ = small_fashion
    config = PrepareConfig(source="fashion-mnist", location=str(where), side=32, classes=("bag", "coat"), channels=3)
    dataset = fashion(config, digests=digests)
    assert dataset.counts() == {"train": {"bag": 5, "coat": 5}, "val": {"bag": 1, "coat": 1}, "test": {"bag": 2, "coat": 2}}
    assert dataset.splits["test"].pixels.shape == (4, 3, 32, 32)


def test_fashion_refuses_other_content_by_name_and_digests(small_fashion):
    where, digests, _ = small_fashion
    name = "t10k-labels-idx1-ubyte.gz"
    with pytest.raises(DiffstillError, match=f"train-images.*SHA-256 {digests['train-images-idx3-ubyte.gz']}, expected c59f468a"):
        load(PrepareConfig(source="fashion-mnist", location=str(where)))
    with pytest.raises(DiffstillError, match=f"{name}.* has SHA-256 {digests[name]}, expected 0402a96d"):
        read_idx(where / name, FASHION_DIGESTS[name])


@pytest.mark.parametrize("damage", ["cut", "page", "garbled"])
def test_fashion_refuses_a_damaged_gzip_file(small_fashion, damage):
    where, digests, _ = small_fashion
    path = where / "train-images-idx3-ubyte.gz"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-9], "page": b"<html>", "garbled": data[:20] + b"\xff" * 20 + data[40:]}[damage])
    with pytest.raises(DiffstillError, match=r"train-images-idx3-ubyte.gz: not a whole gzip file"):
        fashion(PrepareConfig(source="fashion-mnist", location=str(where)), digests=digests)


def test_fashion_missing_files_say_how_to_get_them(small_fashion):
    where, digests, _ = small_fashion
    (where / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        DiffstillError, match=r"lacks t10k-labels-idx1-ubyte.gz; install the Debian package dataset-fashion-mnist, or set `prepare.location`"
    ):
        fashion(PrepareConfig(source="fashion-mnist", location=str(where)), digests=digests)


class _Server(BaseHTTPRequestHandler):
    """Serves a folder; fails the first request with 503; claims gzip encoding, as some servers do for .gz files."""

    def __init__(self, *args, where: Path, seen: list[str]):
        self.where, self.seen = where, seen
        super().__init__(*args)

    def do_GET(self):
        self.seen.append(self.path)
        path = self.where / Path(self.path).name
        if len(self.seen) == 1 or not path.is_file():
            self.send_error(503 if len(self.seen) == 1 else 404)
            return
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        self.wfile.write(path.read_bytes())

    def log_message(self, *args):
        pass


@pytest.fixture
def served(small_fashion, tmp_path, monkeypatch) -> Iterator[tuple[str, list[str]]]:
    """A URL prefix with the four files, and the paths asked for."""
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    seen: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, where=small_fashion[0], seen=seen))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/data/", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_fashion_downloads_once_into_the_cache(small_fashion, served, tmp_path):
    (where, digests, _), (url, seen) = small_fashion, served
    config = PrepareConfig(source="fashion-mnist", location=url, side=28)
    first = fashion(config, digests=digests)
    assert seen == [f"/data/{name}" for name in [next(iter(digests)), *digests]]  # the first was answered 503 and asked for again
    second = fashion(config, digests=digests)
    assert len(seen) == 5
    flip(tmp_path / "cache/fashion-mnist" / next(iter(digests)))
    second = fashion(config, digests=digests)
    assert seen[5:] == [f"/data/{next(iter(digests))}"]
    local = fashion(PrepareConfig(source="fashion-mnist", location=str(where), side=28), digests=digests)
    for name in SPLITS:
        assert np.array_equal(first.splits[name].pixels, local.splits[name].pixels)
        assert np.array_equal(second.splits[name].pixels, local.splits[name].pixels)
    assert sorted(path.name for path in (tmp_path / "cache/fashion-mnist").iterdir()) == sorted(digests)


def test_fashion_download_failures_leave_no_file_behind(small_fashion, served, tmp_path):
    (where, digests, _), (url, _) = small_fashion, served
    config = PrepareConfig(source="fashion-mnist", location=url)
    with pytest.raises(DiffstillError, match=r"^http://.*/data/train-images-idx3-ubyte.gz: its decompressed content has SHA-256 \w+, expected c59f"):
        fashion(config)
    (where / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(DiffstillError, match=r"train-images-idx3-ubyte.gz: cannot be downloaded \(404.*check `prepare.location`"):
        fashion(config, digests=digests)
    assert list((tmp_path / "cache/fashion-mnist").iterdir()) == []


@pytest.mark.skipif(not FASHION_FOLDER.is_dir(), reason=f"{FASHION_FOLDER} is not there; install the Debian package dataset-fashion-mnist")
def test_the_real_fashion_mnist():
    dataset = load(PrepareConfig(source="fashion-mnist", side=28))
    assert dataset.counts() == {name: dict.fromkeys(FASHION_CLASSES, n) for name, n in (("train", 5400), ("val", 600), ("test", 1000))}


# --- folders -----------------------------------------------------------------------------------------------------


def test_folder_without_other_splits_is_cut_by_class(tmp_path):
    dataset = load(folder_config(tree(tmp_path, {"cat": 15, "ant": 10}), seed=2))
    assert dataset.classes == ("ant", "cat")
    assert dataset.counts() == {"train": {"ant": 7, "cat": 11}, "val": {"ant": 1, "cat": 1}, "test": {"ant": 2, "cat": 3}}
    everything = [value for name in SPLITS for value in values(dataset, name)]
    assert sorted(everything) == [*range(10), *range(20, 35)]  # none lost, none twice
    assert all((value >= 20) == label for name in SPLITS for value, label in zip(values(dataset, name), dataset.splits[name].labels, strict=True))
    assert dataset.division == (
        "test is a share of 0.2 of each class of the training images, drawn with seed 2; "
        "val is a share of 0.1 of each class of the training images that is left, drawn with seed 2"
    )


def test_a_folder_per_class_is_all_that_is_needed(tmp_path):
    """And gives the images of train/ of the same content, byte by byte."""
    split, flat = (load(folder_config(tree(tmp_path / name, {"cat": 15, "ant": 10}, sub))) for name, sub in (("split", "train"), ("flat", ".")))
    assert flat.classes == ("ant", "cat")
    assert (flat.counts(), flat.division) == (split.counts(), split.division)
    for name in SPLITS:
        assert np.array_equal(flat.splits[name].pixels, split.splits[name].pixels)
        assert np.array_equal(flat.splits[name].labels, split.splits[name].labels)
    plain(tmp_path / "flat" / "lost.png")
    assert load(folder_config(tmp_path / "flat")).left_out == {"lost.png": "in no class folder"}
    assert load(folder_config(tmp_path / "flat", classes=("cat", "ant"))).classes == ("cat", "ant")


@pytest.mark.parametrize("sub", ["train", "."])
def test_images_may_lie_deeper_in_their_class(tmp_path, sub):
    root = tree(tmp_path, {"a": 6, "b": 6}, sub)
    for number, place in enumerate(("a/2024/x.png", "a/2024/summer/x.png", "b/more/notes.txt", "b/.cache/x.png")):
        plain((root / sub / place).with_suffix(".png"), 100 + number).rename(root / sub / place)
    (root / sub / "b/more/notes.txt").write_text("no image")
    (root / sub / "b/again").symlink_to(root / sub / "a", target_is_directory=True)
    (root / sub / "b/round").symlink_to(root / sub, target_is_directory=True)
    dataset = load(folder_config(root))
    assert sorted(value for name in SPLITS for value in values(dataset, name)) == [*range(6), *range(20, 26), 100, 101]
    where = "" if sub == "." else f"{sub}/"
    assert dataset.left_out == {
        f"{where}b/again": "a link to a folder",
        f"{where}b/round": "a link to a folder",
        f"{where}b/more/notes.txt": NO_IMAGE,
    }
    before = dataset.dataset.fingerprint
    plain(root / sub / "a/2024/new.png", 7)
    assert load(folder_config(root)).dataset.fingerprint != before


@pytest.mark.parametrize(
    ("beside", "test", "val", "words"),
    [
        (("test",), "test", None, "test is the folder test/; val is a share of 0.1"),
        (("val",), "val", None, "test is the folder val/; val is a share of 0.1"),
        (("test", "val"), "test", "val", "test is the folder test/; val is the folder val/"),
    ],
)
def test_folder_with_splits_of_its_own(tmp_path, beside, test, val, words):
    tree(tmp_path, {"a": 5, "b": 5})
    for number, split in enumerate(beside, 1):
        tree(tmp_path, {"a": 2, "b": 2}, split, start=100 * number)
    contents = {split: [100 * number + i for i in (0, 1, 20, 21)] for number, split in enumerate(beside, 1)}
    dataset = load(folder_config(tmp_path))
    assert values(dataset, "test") == contents[test]
    if val:
        assert values(dataset, "val") == contents[val]
        assert values(dataset, "train") == [0, 1, 2, 3, 4, 20, 21, 22, 23, 24]
    else:
        assert dataset.counts()["val"] == {"a": 1, "b": 1}
        assert sorted(values(dataset, "train") + values(dataset, "val")) == [0, 1, 2, 3, 4, 20, 21, 22, 23, 24]
    assert dataset.division.startswith(words)


def test_folder_subset_and_other_files(tmp_path):
    tree(tmp_path, {"a": 3, "b": 3, "c": 3})
    (tmp_path / "train/a/notes.txt").write_text("BMP: not an image")
    (tmp_path / "train/README").write_text("about")
    (tmp_path / "train/a/.hidden.png").write_text("not an image either")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/b/000.png").rename(tmp_path / "train/b/000.PNG")
    (tmp_path / "train/b/junk.txt").write_text("of a class that is left out")
    dataset = load(folder_config(tmp_path, classes=("c", "a")))
    assert dataset.classes == ("c", "a")
    assert dataset.left_out == {"train/README": "in no class folder", "train/a/notes.txt": NO_IMAGE}
    assert load(folder_config(tmp_path)).counts()["train"] == {"a": 1, "b": 1, "c": 1}


def test_folder_is_grey_only_if_every_readable_image_is(tmp_path):
    tree(tmp_path, {"a": 4, "b": 4})
    assert load(folder_config(tmp_path)).channels == 1
    bad = plain(tmp_path / "train/a/0.png", 9, mode="RGB")  # the first of all
    bad.write_bytes(bad.read_bytes()[:45])
    assert load(folder_config(tmp_path, max_bad_fraction=0.2)).channels == 1
    plain(bad, 9, mode="RGB")
    mixed, grey = load(folder_config(tmp_path)), load(folder_config(tmp_path, channels=1))
    assert mixed.channels == 3
    assert load(folder_config(tmp_path, channels=3)).channels == 3
    coloured = {tuple(image[:, 0, 0]) for split in mixed.splits.values() for image in split.pixels}
    assert coloured == {(value,) * 3 for value in [*range(4), *range(20, 24)]} | {(9, 0, 246)}
    assert grey.splits["train"].pixels.shape[1] == 1


def test_unreadable_files_are_listed_up_to_the_tolerated_share(tmp_path):
    brought(tree(tmp_path, {"a": 8, "b": 8}))
    (tmp_path / "train/a/text.png").write_text("no image")
    (tmp_path / "train/b/empty.jpg").touch()
    (tmp_path / "train/b/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    huge = tmp_path / "train/b/huge.png"
    huge.write_bytes(png_header(100_000, 100_000))
    dataset = load(folder_config(tmp_path, max_bad_fraction=0.17))
    assert {bad.file: bad.reason for bad in dataset.rejected} == {
        "train/a/text.png": "not a readable image (JPEG, PNG, BMP, GIF, WEBP, TIFF)",
        "train/b/empty.jpg": "not a readable image (JPEG, PNG, BMP, GIF, WEBP, TIFF)",
        "train/b/gone.jpg": "No such file or directory",
        "train/b/huge.png": "has 100000 x 100000 pixels, above `prepare.max_pixels` 50000000",
    }
    assert sum(len(split.labels) for split in dataset.splits.values()) == 20
    message = (
        r"4 of 24 image files cannot be used, above `prepare.max_bad_fraction` 0.16 \(train/a/text.png: not a readable.*; remove these files or raise"
    )
    with pytest.raises(DiffstillError, match=message):
        load(folder_config(tmp_path, max_bad_fraction=0.16))


def test_long_lists_of_bad_files_are_shortened(tmp_path):
    brought(tree(tmp_path, {"a": 3, "b": 3}))
    for i in range(7):
        (tmp_path / f"train/a/bad{i}.png").touch()
    with pytest.raises(DiffstillError, match=r"7 of 17 .*bad4.png: [^;]*; and 2 more; all are listed in the list\)"):
        load(folder_config(tmp_path))


def test_the_content_of_a_file_of_another_name_decides(tmp_path):
    tree(tmp_path, {"a": 3, "b": 3})
    picture = Image.fromarray(noise((8, 8)))
    for name, form in (("a.jfif", "JPEG"), ("b.HEIC", "JPEG"), ("c", "PNG"), ("d.jpe", "JPEG"), ("e.dat", "WEBP")):
        picture.save(tmp_path / "train/a" / name, format=form)
    (tmp_path / "train/a/really.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    (tmp_path / "train/a/none").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "train/b/pipe")
    (tmp_path / "validation/a").mkdir(parents=True)
    dataset = load(folder_config(tmp_path))
    assert sum(dataset.counts()[split]["a"] for split in SPLITS) == 3 + 5
    assert dataset.left_out == {
        "validation/": "neither train/ nor test/ nor val/",
        "train/a/really.heic": NO_IMAGE,
        "train/a/none": "not a file",
        "train/b/pipe": "not a file",
    }


CAFE = ("th\u00e9", "the\u0301")
"""One word composed (NFC) and decomposed (NFD)."""


@pytest.mark.parametrize(("train", "test"), [CAFE, CAFE[::-1], (CAFE[1], CAFE[1])])
@pytest.mark.parametrize("wanted", CAFE)
def test_a_class_is_the_same_however_its_accents_are_spelled(tmp_path, train, test, wanted):
    tree(tree(tmp_path, {"a": 3, train: 4}), {"a": 1, test: 2}, "test", start=100)
    dataset = load(folder_config(tmp_path))
    assert dataset.classes == ("a", CAFE[0])
    assert dataset.counts()["test"] == {"a": 1, CAFE[0]: 2}
    assert values(dataset, "test") == [100, 120, 121]
    again = load(folder_config(tmp_path, classes=(wanted, "a")))
    assert again.classes == (CAFE[0], "a")
    assert again.counts()["test"] == {CAFE[0]: 2, "a": 1}


def test_one_name_spelled_twice_in_a_split_is_refused(tmp_path):
    tree(tmp_path, {"a": 3, CAFE[0]: 3, CAFE[1]: 3})
    with pytest.raises(DiffstillError, match=r"train: the class folders 'the\\u0301' and 'th\\xe9' are one name spelled in two ways"):
        load(folder_config(tmp_path))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("metadata.csv", "a file which lies beside"),
        ("Metadata.CSV", "a file which lies beside"),
        ("classes.json", "a file which lies beside"),
        ("manifest.json", "a file which lies beside"),
        ("seed-0", "a file which lies beside"),
        ("seed-12.png", "a file which lies beside"),
        ("Thumbs.db", "a file which lies beside"),
        ("aux", "none that Windows can have"),
        ("Con.x", "none that Windows can have"),
        ("ends with.", "none that Windows can have"),
        ("ends with ", "none that Windows can have"),
        ("a\\b", "none that Windows can have"),
        ("a\nb", "control characters"),
    ],
)
def test_class_folders_that_no_set_could_have_are_refused(tmp_path, name, why):
    tree(tmp_path, {"a": 3, name: 3})
    with pytest.raises(DiffstillError, match=f"cannot be a class, its name .*{why}.*; rename it"):
        load(folder_config(tmp_path))
    assert load(folder_config(tree(tmp_path, {"b": 3}), classes=("a", "b"))).classes == ("a", "b")


def empty_class(root: Path) -> None:
    (root / "train/b/x").parent.mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: (root / "x.png").touch(), r"holds no folder at all; expected <location>/<class>/<image>, or <location>/train/<class>/<image>"),
        (lambda root: tree(root, {"a": 3}, "."), r"has only the class 'a' to work with, but telling classes apart takes at least two"),
        (lambda root: tree(root, {"a": 3, "b": 3}, "test"), r"has a folder test/ but no folder train/, it holds 'test'; expected"),
        (
            lambda root: tree(tree(root, {"a": 3}, "."), {"a": 3, "b": 3}, "val"),
            r"has a folder val/ but no folder train/, it holds 'a', 'val'; expected",
        ),
        (lambda root: (root / "train").mkdir(), r"train has no class to work with"),
        (lambda root: tree(root, {"a": 3}), r"train has only the class 'a' to work with, but telling classes apart takes at least two"),
        (lambda root: tree(root, {"a": 3}) and empty_class(root), r"train/b: class 'b' has no image there \(JPEG, PNG"),
        (
            lambda root: tree(root, {"a": 3, "b": 1}),
            r"class 'b' has 1 readable training image, but 3 are needed, at least one each for train, test, val; add",
        ),
        (lambda root: tree(tree(root, {"a": 3, "b": 3}), {"a": 3}, "test"), r"class 'b' is in train/ but not in test/"),
        (lambda root: tree(tree(root, {"a": 3, "b": 3}), {"a": 3, "b": 3, "c": 1}, "val"), r"class 'c' is in val/ but not in train/"),
    ],
)
def test_folders_that_cannot_work_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DiffstillError, match=message):
        load(folder_config(tmp_path))


def test_a_missing_location_is_refused(tmp_path):
    with pytest.raises(DiffstillError, match=r"nowhere: is no folder, but `prepare.location` names it"):
        load(folder_config(tmp_path / "nowhere"))


def test_unknown_classes_are_refused_with_a_shortened_list(tmp_path):
    tree(tmp_path, {f"class{i:02d}": 1 for i in range(25)})
    with pytest.raises(DiffstillError, match=r"names 'dog', unknown to .*train; known are 'class00', .*'class19' and 5 more$"):
        load(folder_config(tmp_path, classes=("class01", "dog")))


def test_classes_emptied_by_bad_files_are_refused(tmp_path):
    tree(tree(tmp_path, {"a": 4, "b": 4}), {"a": 1}, "test")
    (tmp_path / "test/b").mkdir()
    (tmp_path / "test/b/x.png").touch()
    with pytest.raises(DiffstillError, match=r"class 'b' has no readable image for test"):
        load(folder_config(tmp_path, max_bad_fraction=0.5))


# --- one image ---------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims that size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def decoded(image: Image.Image, path: Path, side: int, **options) -> Image.Image:
    image.save(path, **options)
    return decode(path, side, LIMIT)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "jpg"])
def test_images_of_the_right_size_are_kept_as_they_are(tmp_path, suffix):
    source = Image.fromarray(noise((9, 9)))
    image = decoded(source, tmp_path / f"x.{suffix}", 9)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / f"x.{suffix}")))
    if suffix != "jpg":
        assert np.array_equal(np.asarray(image), np.asarray(source))


def test_colour_keeps_its_channels(tmp_path):
    pixels = noise((9, 9, 3))
    assert np.array_equal(np.asarray(decoded(Image.fromarray(pixels), tmp_path / "x.webp", 9, lossless=True)), pixels)


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(8, 13, slice(0, 8), slice(2, 10)), (12, 8, slice(2, 10), slice(0, 8))])
def test_the_centre_is_cut_out(tmp_path, height, width, rows, columns):
    pixels = noise((height, width))
    assert np.array_equal(np.asarray(decoded(Image.fromarray(pixels), tmp_path / "x.png", 8)), pixels[rows, columns])


def test_shrinking_averages_rather_than_skips(tmp_path):
    checkers = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = np.asarray(decoded(Image.fromarray(checkers), tmp_path / "x.png", 8))
    assert np.all(np.abs(small.astype(int) - 127) <= 2)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :8], upright[:8, 8:] = 200, 100  # two corners suffice to tell all eight positions apart
    stored = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    image = decoded(Image.fromarray(np.ascontiguousarray(stored)), path, 16, exif=exif)
    assert np.abs(np.asarray(image.convert("L")).astype(int) - upright).max() <= 4


def exif_of(*tags: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of tags (number, type, count, four bytes of value or place), little-endian."""
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in sorted(tags))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + struct.pack("<ii", -1, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "tag",
    [
        (0x011A, 10, 1, struct.pack("<I", 38)),  # XResolution -1/0, signed
        (0x011A, 2, 4, b"abc\0"),  # XResolution as text
        (0x011A, 5, 1, struct.pack("<I", 10**9)),  # its value far behind the end
        (0x0131, 3, 1, struct.pack("<HH", 7, 0)),  # Software as a number
        (0x8769, 4, 1, struct.pack("<I", 10**9)),  # camera settings nowhere
        (0x9286, 99, 1, bytes(4)),  # of no known type
    ],
)
def test_orientation_is_read_beside_a_malformed_tag(tmp_path, suffix, tag):
    stored = np.zeros((16, 16), np.uint8)
    stored[:8, :8], stored[:8, 8:] = 200, 100
    exif = exif_of((0x0112, 3, 1, struct.pack("<HH", 6, 0)), tag)
    image = decoded(Image.fromarray(stored), tmp_path / f"x.{suffix}", 16, exif=exif)
    assert np.abs(np.asarray(image.convert("L")).astype(int) - np.rot90(stored, -1)).max() <= 4


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no such thing", b"Exif\0\0II*\0", exif_of((0x0112, 2, 1, b"6\0\0\0")), exif_of((0x0112, 3, 1, b"\x63\0\0\0"))]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_without_a_readable_orientation_is_as_it_is_stored(tmp_path, suffix, exif):
    picture = Image.fromarray(noise((16, 16)) // 4 * 4)
    plainly = np.asarray(decoded(picture, tmp_path / f"y.{suffix}", 16))
    assert np.array_equal(decoded(picture, tmp_path / f"x.{suffix}", 16, exif=exif), plainly)


def test_palettes_become_colour(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 250, 10, 60])
    assert decoded(image, tmp_path / "x.png", 8).getcolors() == [(64, (250, 10, 60))]


def test_transparent_palettes_are_laid_on_white(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 250, 10, 60])
    image.putpixel((0, 0), 0)
    got = decoded(image, tmp_path / "x.png", 8, transparency=0)
    assert got.getpixel((0, 0)) == (255, 255, 255)
    assert got.getpixel((1, 0)) == (250, 10, 60)


def test_cmyk_becomes_colour(tmp_path):
    image = decoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "x.jpg", 16, quality=100)
    red, green, blue = image.getpixel((8, 8))
    assert image.mode == "RGB"
    assert red >= 250
    assert max(green, blue) <= 5


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, suffix):
    pixels = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    image = decoded(Image.fromarray(pixels), tmp_path / f"x.{suffix}", 8)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), np.rint(pixels / 257).astype(np.uint8))


def test_1_bit_is_black_and_white(tmp_path):
    bits = noise((8, 8)) > 127
    image = decoded(Image.fromarray(bits), tmp_path / "x.png", 8)
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), bits * 255)


def test_transparency_is_laid_on_white(tmp_path):
    colour = decoded(Image.new("RGBA", (8, 8), (0, 100, 200, 51)), tmp_path / "c.png", 8)
    assert colour.getcolors() == [(64, (204, 224, 244))]  # 255 + (value - 255) / 5
    grey = decoded(Image.new("LA", (8, 8), (0, 51)), tmp_path / "g.png", 8)
    assert (grey.mode, grey.getcolors()) == ("L", [(64, 204)])
    keyed = decoded(Image.new("L", (8, 8), 7), tmp_path / "k.png", 8, transparency=7)
    assert (keyed.mode, keyed.getcolors()) == ("L", [(64, 255)])
    deep = decoded(Image.fromarray(np.full((8, 8), 700, np.uint16)), tmp_path / "d.png", 8, transparency=700)
    assert (deep.mode, deep.getcolors()) == ("L", [(64, 255)])


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_animations_give_their_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = decoded(frames[0], tmp_path / f"x.{suffix}", 8, save_all=True, append_images=frames[1:])
    red, _, blue = image.getpixel((4, 4))
    assert (red > 240, blue < 15) == (True, True)


def test_formats_go_by_content_not_by_suffix(tmp_path):
    Image.new("L", (8, 8), 9).save(tmp_path / "x.jpg", format="PNG")
    assert decode(tmp_path / "x.jpg", 8, LIMIT).getcolors() == [(64, 9)]


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "webp", "tiff"])
def test_truncated_files_are_bad(tmp_path, suffix):
    path = tmp_path / f"train/a/x.{suffix}"
    brought(tree(tmp_path, {"a": 3, "b": 3}))
    Image.fromarray(noise((64, 64, 3))).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (bad,) = load(folder_config(tmp_path, max_bad_fraction=0.5)).rejected
    assert bad.file == f"train/a/x.{suffix}"
    assert str(tmp_path) not in bad.reason


@pytest.mark.filterwarnings("ignore")
def test_any_single_broken_byte_is_either_read_or_rejected(tmp_path):
    tree(tmp_path, {"a": 3, "b": 3})
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "gif", "webp", "tiff", "bmp"):
        good = tmp_path / f"good.{suffix}"
        Image.fromarray(noise((12, 12, 3))).save(good, **({} if suffix in ("gif", "bmp") else {"exif": exif}))
        data = good.read_bytes()
        for i in range(40):
            broken = bytearray(data)
            broken[rng.integers(len(data)) if i % 2 else rng.integers(min(120, len(data)))] ^= 1 << int(rng.integers(8))
            (tmp_path / f"train/a/{suffix}{i}.{suffix}").write_bytes(broken)
    dataset = load(folder_config(tmp_path, max_bad_fraction=0.99, max_pixels=LIMIT))
    assert sum(len(split.labels) for split in dataset.splits.values()) + len(dataset.rejected) == 6 + 6 * 40
    assert dataset.rejected
    assert not any(str(tmp_path) in bad.reason for bad in dataset.rejected)


def test_the_size_limit_is_ours_both_ways(tmp_path, monkeypatch):
    path = plain(tmp_path / "x.png", 3, (20, 10))
    with pytest.raises(ValueError, match=r"has 20 x 10 pixels, above `prepare.max_pixels` 199"):
        decode(path, 8, 199)
    assert decode(path, 8, 200).size == (8, 8)
    tree(tmp_path, {"a": 3, "b": 3})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # Pillow alone would refuse all
    assert load(folder_config(tmp_path)).rejected == ()
    assert Image.MAX_IMAGE_PIXELS == 4


def test_32_bit_pixels_of_unknown_range_are_bad(tmp_path):
    with pytest.raises(ValueError, match="mode F, whose range is unknown"):
        decoded(Image.fromarray(np.zeros((8, 8), np.float32)), tmp_path / "x.tiff", 8)


def test_progress_counts_every_image(tmp_path):
    class Counting:
        def __init__(self):
            self.done = {}

        @contextmanager
        def progress(self, description, total, unit):
            self.description = description, total, unit
            self.done[self.description] = 0
            yield self

        def update(self, n=1):
            self.done[self.description] += n

    tree(tmp_path, {"a": 3, "b": 4})
    (tmp_path / "train/a/bad.png").touch()
    for config, total in ((folder_config(tmp_path, max_bad_fraction=0.5, seed=1), 8), (PrepareConfig(), 1797), (PrepareConfig(side=9), 1797)):
        record = Counting()
        load(config, record)
        assert record.done["prepare", total, "img"] == total
        if config.source == "folder":
            assert record.done == {("list", 2, "folder"): 2, ("read headers", 8, "img"): 8, ("prepare", 8, "img"): 8}


# --- ImageNet's subsets ------------------------------------------------------------------------------------------

WOOF = SUBSETS["imagewoof"]
FISH = "n01440764"
"""A class of imagenette."""


def photo(path: Path) -> None:
    """A small JPEG of its own colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(list(os.fsencode(path.name))).integers(0, 256, (9, 11, 3), np.uint8)).save(path, format="JPEG")


def photos(root: Path, sub: str, wnids: Sequence[str], training: int, validation: int) -> None:
    """That many of ImageNet's training and of its validation images in each class."""
    for place, wnid in enumerate(wnids):
        for i in range(training):
            photo(root / sub / wnid / f"{wnid}_{sub}{i}.JPEG")
        for i in range(validation):
            photo(root / sub / wnid / f"{VALIDATION_IMAGE}{place * 10 + i:08d}.JPEG")


@pytest.fixture
def imagenet_tree(tmp_path) -> Path:
    """A part of ImageNet: imagewoof's classes and another."""
    photos(tmp_path / "imagenet", "train", (*WOOF, FISH), 4, 0)
    photos(tmp_path / "imagenet", "val", (*WOOF, FISH), 0, 2)
    return tmp_path / "imagenet"


@pytest.fixture
def fastai_tree(tmp_path) -> Path:
    """A re-split as fastai's: three in four of its validation images are training images of ImageNet."""
    photos(tmp_path / "imagewoof2", "train", WOOF, 4, 1)
    photos(tmp_path / "imagewoof2", "val", WOOF, 3, 1)
    (tmp_path / "imagewoof2/noisy_imagewoof.csv").write_text("path,noisy_labels_0\n")
    return tmp_path / "imagewoof2"


def woof(location: object, **knobs) -> PrepareConfig:
    return PrepareConfig(**({"source": "imagewoof", "location": str(location), "side": 8, "channels": 3} | knobs))


def test_imagenet_tree_gives_the_split_of_the_literature(imagenet_tree, caplog):
    dataset = load(woof(imagenet_tree))
    assert dataset.classes == WOOF
    assert dataset.counts() == {"train": dict.fromkeys(WOOF, 3), "val": dict.fromkeys(WOOF, 1), "test": dict.fromkeys(WOOF, 2)}
    assert dataset.division.startswith("test is the folder val/, ImageNet's own validation images, as in the literature; val is a share of 0.1")
    assert (dataset.dataset.leakage, caplog.records) == (None, [])
    names = np.array(dataset.dataset.names)
    assert all(VALIDATION_IMAGE in name for name in names[dataset.dataset.assigned == "test"])
    assert not any(FISH in name for name in names)
    label = WOOF.index("n02086240")
    files = sorted((imagenet_tree / "val/n02086240").iterdir())
    expected = [np.asarray(decode(file, 8, LIMIT)).transpose(2, 0, 1) for file in files]
    assert np.array_equal(dataset.splits["test"].pixels[dataset.splits["test"].labels == label], expected)


def test_a_re_split_says_so_and_warns_of_leakage(fastai_tree, caplog):
    dataset = load(woof(fastai_tree))
    assert dataset.counts()["test"] == dict.fromkeys(WOOF, 4)
    assert "test is the folder val/ of a re-split, as in fastai's archives: not the literature's" in dataset.division
    leakage = dataset.dataset.leakage
    assert leakage is not None
    assert leakage.startswith("30 of 40 test images (75%) are training images of ImageNet, which a generator pre-trained on ImageNet has seen")
    assert [record.getMessage() for record in caplog.records] == [f"{fastai_tree}: {leakage}"]


def test_a_re_split_whose_test_images_are_all_validation_images_does_not_leak(imagenet_tree, caplog):
    photos(imagenet_tree, "train", WOOF, 0, 3)
    dataset = load(woof(imagenet_tree))
    assert "of a re-split" in dataset.division
    assert (dataset.dataset.leakage, caplog.records) == (None, [])


def test_some_classes_of_a_subset_in_their_order(imagenet_tree):
    assert load(woof(imagenet_tree, classes=(WOOF[7], WOOF[2]))).classes == (WOOF[7], WOOF[2])
    with pytest.raises(DiffstillError, match=rf"`prepare.classes` names '{FISH}', unknown to source imagewoof; known are"):
        load(woof(imagenet_tree, classes=(WOOF[0], FISH)))


def packed(tree: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, tree.name)
    return archive


def no_litter(cache: Path) -> bool:
    return [path for path in (cache / "archives").iterdir() if path.suffix != ".lock"] == []


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_archive_is_what_was_packed(fastai_tree, cache, tmp_path):
    archive = packed(fastai_tree, tmp_path / "imagewoof2.tgz")
    plainly, first = load(woof(fastai_tree)), load(woof(archive))
    (unpacked,) = (path for path in (cache / "archives").iterdir() if path.is_dir())
    touched = unpacked.stat().st_mtime_ns
    second = load(woof(archive))
    assert unpacked.stat().st_mtime_ns == touched
    for name in SPLITS:
        assert np.array_equal(first.splits[name].pixels, plainly.splits[name].pixels)
        assert np.array_equal(second.splits[name].pixels, plainly.splits[name].pixels)
    assert first.dataset.leakage == plainly.dataset.leakage
    assert first.dataset.fingerprint == second.dataset.fingerprint


def test_an_archive_that_was_changed_in_the_cache_is_unpacked_again(fastai_tree, cache, tmp_path, caplog):
    archive = packed(fastai_tree, tmp_path / "imagewoof2.tgz")
    load(woof(archive))
    (unpacked,) = (path for path in (cache / "archives").iterdir() if path.is_dir())
    before = contents(unpacked)
    flip(next(path for path in unpacked.rglob("*") if path.is_file()))
    load(woof(archive))
    assert contents(unpacked) == before
    assert caplog.text.count("was changed since it was unpacked; unpacked again") == 1


def test_an_archive_of_another_content_is_unpacked_anew(fastai_tree, cache, tmp_path):
    load(woof(packed(fastai_tree, tmp_path / "x.tgz")))
    photos(fastai_tree, "train", WOOF, 6, 1)
    assert load(woof(packed(fastai_tree, tmp_path / "x.tgz"))).counts()["train"] == dict.fromkeys(WOOF, 6)


@pytest.fixture
def web(tmp_path, monkeypatch) -> Iterator[tuple[str, Path, list[str]]]:
    """A URL prefix, the folder that it serves, and the paths asked for; the first request is answered 503."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    seen: list[str] = []
    (tmp_path / "web").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Server, where=tmp_path / "web", seen=seen))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/data", tmp_path / "web", seen
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_archive_is_downloaded_once(fastai_tree, cache, web):
    url, where, seen = web
    packed(fastai_tree, where / "imagewoof2.tgz")
    for _ in range(2):
        assert load(woof(f"{url}/imagewoof2.tgz")).counts()["test"] == dict.fromkeys(WOOF, 4)
    assert seen == ["/data/imagewoof2.tgz"] * 2  # the first was answered 503
    assert len([path for path in (cache / "archives").iterdir() if path.is_dir()]) == 1


@pytest.mark.filterwarnings("ignore")
def test_an_archive_that_cannot_be_had_leaves_nothing(cache, web):
    url, where, _ = web
    with pytest.raises(DiffstillError, match=r"^http://.*/imagewoof2.tgz: cannot be downloaded \(.*404.*check `prepare.location`"):
        load(woof(f"{url}/imagewoof2.tgz"))
    (where / "page.tgz").write_text("<html>moved</html>")
    with pytest.raises(DiffstillError, match=r"^http://.*/page.tgz: not a whole .tgz archive \(.*\); fetch it anew"):
        load(woof(f"{url}/page.tgz"))
    assert no_litter(cache)


@pytest.mark.parametrize("damage", ["cut", "garbled", "checksum", "empty"])
def test_a_damaged_archive_is_refused_and_leaves_nothing(fastai_tree, cache, tmp_path, damage):
    archive = packed(fastai_tree, tmp_path / "x.tgz")
    data = archive.read_bytes()
    middle = len(data) // 2
    broken = {"cut": data[:middle], "garbled": data[:middle] + b"\0" * 50 + data[middle + 50 :], "empty": b""}
    archive.write_bytes((broken | {"checksum": data[:-8] + bytes(4) + data[-4:]})[damage])
    with pytest.raises(DiffstillError, match=r"x.tgz: not a whole .tgz archive \(.+\); fetch it anew"):
        load(woof(archive))
    assert no_litter(cache)


def link(target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo("imagewoof2/train/link")
    member.type, member.linkname = kind, target
    return member


def device() -> tarfile.TarInfo:
    member = tarfile.TarInfo("imagewoof2/disk")
    member.type = tarfile.BLKTYPE
    return member


@pytest.mark.parametrize(
    "member",
    [tarfile.TarInfo("../outside.txt"), tarfile.TarInfo("imagewoof2/../../outside.txt"), link("/etc"), link("../../.."), device()],
    ids=["parent", "inner parent", "absolute link", "link", "device"],
)
def test_an_archive_that_leads_outside_is_refused_and_leaves_nothing(fastai_tree, cache, tmp_path, member):
    archive = tmp_path / "x.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(fastai_tree, "imagewoof2")
        tar.addfile(member)
    with pytest.raises(DiffstillError, match=r"x.tgz: holds what no archive of images needs, nothing of it was kept"):
        load(woof(archive))
    assert no_litter(cache)
    assert not list(tmp_path.rglob("outside.txt"))


def lacking(root: Path) -> None:
    for wnid in WOOF[3:]:
        shutil.rmtree(root / "train" / wnid)


def flat(root: Path) -> None:
    for image in sorted((root / "val").rglob("*.JPEG")):
        image.rename(root / "val" / image.name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lacking,
            r"train: lacks 7 of the 10 classes of imagewoof: 'n02088364 \(beagle\)', .* and 2 more; name a location that has them, or list",
        ),
        (lambda root: shutil.rmtree(root / "val" / WOOF[9]), r"val: lacks 1 of the 10 classes of imagewoof: 'n02105641 \(Old English sheepdog\)'"),
        (flat, r"val: holds 22 images directly, such as ILSVRC2012_val_00000000.JPEG, .*move every image into val/<wnid>/ .*LOC_val_solution.csv"),
        (lambda root: shutil.rmtree(root / "val"), r"has no folder val/, it holds 'train'; expected an ImageNet tree"),
        (lambda root: (root / "train").rename(root / "images"), r"has no folder train/, it holds 'images', 'val'; expected an ImageNet tree"),
        (shutil.rmtree, r"does not exist, but `prepare.location` names it; expected an ImageNet tree .*fastai archive"),
        (
            lambda root: photo(root / "val" / WOOF[0] / "dog.JPEG"),
            r"val/n02096294/dog.JPEG: its name does not tell .*\(n02096294_\*\) or validation images \(ILSVRC2012_val_\*\).*restore the original names",
        ),
        (lambda root: photo(root / "train" / WOOF[0] / "more" / "x.JPEG"), r"holds the folder 'more', but images must lie directly"),
    ],
)
def test_imagenet_trees_that_cannot_work_are_refused(imagenet_tree, make, message):
    make(imagenet_tree)
    with pytest.raises(DiffstillError, match=message):
        load(woof(imagenet_tree))


@pytest.mark.parametrize("source", SUBSETS)
def test_imagenet_without_a_location_is_refused(source):
    with pytest.raises(DiffstillError, match=rf"`prepare.location` is null, but source {source} needs to know where its images lie; expected an Im"):
        load(PrepareConfig(source=source))
    with pytest.raises(DiffstillError, match=rf"'gs://bucket/x': source {source} does not read gs://"):
        load(PrepareConfig(source=source, location="gs://bucket/x"))


# --- listing and reading -----------------------------------------------------------------------------------------


def test_the_fingerprint_follows_names_sizes_and_times(tmp_path):
    tree(tmp_path, {"a": 3, "b": 3})
    config, path = folder_config(tmp_path), tmp_path / "train/a/001.png"
    seen = [datasets.load(config).fingerprint]
    assert datasets.load(config).fingerprint == seen[0]
    os.utime(path, ns=(0, 1))
    seen.append(datasets.load(config).fingerprint)
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=(0, 1))
    seen.append(datasets.load(config).fingerprint)
    path.rename(path.with_name("003.png"))
    seen.append(datasets.load(config).fingerprint)
    (tmp_path / "train/b").rename(tmp_path / "train/c")
    seen.append(datasets.load(config).fingerprint)
    assert len(set(seen)) == 5


def test_the_number_of_cpus_changes_nothing(tmp_path, monkeypatch):
    tree(tmp_path, {"a": 40, "b": 20})
    for name in ("000", "017", "021"):
        (tmp_path / f"train/a/{name}.png").write_text("bad")
    config, found = folder_config(tmp_path, max_bad_fraction=0.1, shard_size=7), []
    for cpus in (1, 2, 9):
        monkeypatch.setattr("joblib.cpu_count", lambda cpus=cpus: cpus)
        found.append(load(config))
    for other in found[1:]:
        assert other.rejected == found[0].rejected
        assert list(other.bad) == list(found[0].bad)
        for split in SPLITS:
            assert np.array_equal(other.splits[split].pixels, found[0].splits[split].pixels)
            assert np.array_equal(other.splits[split].labels, found[0].splits[split].labels)


def test_pieces_are_read_one_by_one(tmp_path):
    brought(tree(tmp_path, {"a": 10, "b": 10}))
    for number in (1, 2):
        (tmp_path / f"train/a/00{number}.png").write_text("bad")
    (tmp_path / "train/b/009.png").write_text("bad")
    config, seen = folder_config(tmp_path, shard_size=5, max_bad_fraction=0.05), []
    dataset = datasets.load(config)

    class Counting:
        def update(self, n=1):
            seen.append(n)

    pieces = read_pieces(dataset, dataset.pieces(5), 8, Counting())
    found = next(pieces)
    pieces.close()
    with pytest.raises(
        DiffstillError, match=r"2 of 24 image files cannot be used, above `prepare.max_bad_fraction` 0.05 \(train/a/001.png: [^;]*; train/a/002"
    ):
        refuse_many_bad(dataset, found.rejected, config.max_bad_fraction, tmp_path)
    assert sum(seen) == 5
