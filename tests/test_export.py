"""Exports, read back by readers that are not ours and compared with the PNGs of the set."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import webdataset
import yaml
from PIL import Image
from pyarrow import parquet

from benchmarks.load import random_set
from chains import contents
from diffstill import export as module
from diffstill.errors import DiffstillError
from diffstill.export import Format, export
from diffstill.loading import DistilledSet, open_set

FORMATS: tuple[Format, ...] = get_args(Format)
CLASSES = ["zebra", "Äpfel 苹果", "train", "a.b", "0", "no", "x: [*]", "two\nlines", 'a,"b"', "__init__", " 1"]
"""In no alphabetical order; words that formats take for dots, splits, numbers, truths, patterns or lines."""
PLAIN = ["zebra", "Äpfel 苹果", "a.b", "0", "no", 'a,"b"']
CARD = """# My set

Text.
![x: \\[*\\]](get-artifact?run_uuid=0123&path=card/sheets/x.png)
![0](sheets/0.png)
![logo](https://example.org/logo.png)
The end.
"""

Shown = tuple[str, int, Any]
"""Class, label and pixels of an image."""


@dataclass(frozen=True)
class Exported:
    """A set of 2 images per class from generation seed 4, part of one with 3 and another seed, and its exports."""

    opened: DistilledSet
    folder: Path


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exports")
    random_set(folder / "set", CLASSES, 3, seeds=(0, 4), side=6, channels=request.param)
    opened = open_set(folder / "set", seed=4, ipc=2, card=CARD)
    for name in FORMATS:
        assert export(opened, folder / name, name) == folder / name
    random_set(folder / "plain", PLAIN, 2, side=6, channels=request.param)
    export(open_set(folder / "plain"), folder / "plain-imagefolder", "imagefolder")
    return Exported(opened, folder)


def pixels(source: Path | bytes) -> list[Any]:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return np.asarray(image).tolist()


def by_class(folder: Path, classes: list[str], seed: int = 4, images_per_class: int = 2) -> list[Shown]:
    """What the files of a set show, class by class."""
    numbers = range(images_per_class)
    return [(name, label, pixels(folder / f"seed-{seed}/{name}/0000{n}.png")) for label, name in enumerate(classes) for n in numbers]


def by_number(folder: Path, classes: list[str]) -> list[Shown]:
    """The same with the first image of every class first."""
    shown = by_class(folder, classes)
    return shown[0::2] + shown[1::2]


def small_set(folder: Path, classes: list[str] | None = None, images_per_class: int = 2, **more: Any) -> DistilledSet:
    return open_set(random_set(folder, classes or ["b", "a"], images_per_class, side=4, channels=1, **more))


# --- each format, read by others ----------------------------------------------------------------------------------


def test_an_image_folder_is_one_for_torchvision(exported: Exported) -> None:
    from torchvision.datasets import ImageFolder

    folder = exported.folder / "imagefolder"
    opened = ImageFolder(str(folder), loader=lambda path: pixels(Path(path)))
    classes = json.loads((folder / "classes.json").read_text())
    assert classes == [{"name": name, "label": label} for label, name in enumerate(CLASSES)]
    labels = {entry["name"]: entry["label"] for entry in classes}
    found = [(opened.classes[theirs], labels[opened.classes[theirs]], image) for image, theirs in opened]
    assert sorted(found) == sorted(by_class(exported.folder / "set", CLASSES))
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["label"], labels[row["label"]], pixels(folder / row["file_name"])) for row in csv.DictReader(file) if row["seed"] == "4"]
    assert rows == by_class(exported.folder / "set", CLASSES)


def test_images_are_handed_on_byte_by_byte(exported: Exported) -> None:
    original, copied = (contents(exported.folder / name) for name in ("set/seed-4", "imagefolder"))
    pngs = {name: digest for name, digest in copied.items() if name.endswith(".png")}
    assert len(pngs) == 2 * len(CLASSES)
    assert pngs.items() <= original.items()


def test_parquet_holds_images_labels_and_names(exported: Exported) -> None:
    assert [path.name for path in (exported.folder / "parquet").iterdir()] == ["data.parquet"]
    table = parquet.read_table(exported.folder / "parquet" / "data.parquet")
    assert table.column_names == ["image", "label", "class"]
    rows = table.to_pylist()
    assert [(row["class"], row["label"], pixels(row["image"]["bytes"])) for row in rows] == by_number(exported.folder / "set", CLASSES)
    assert [row["image"]["path"] for row in rows[: len(CLASSES)]] == [f"{name}/00000.png" for name in CLASSES]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the collector
def test_webdataset_reads_images_labels_and_facts(exported: Exported) -> None:
    folder = exported.folder / "webdataset"
    assert sorted(path.name for path in folder.iterdir()) == ["classes.json", "train-00000.tar"]
    samples = list(webdataset.WebDataset(str(folder / "train-00000.tar"), shardshuffle=False).decode())
    found = [(sample["json"]["class"], sample["cls"], pixels(sample["png"])) for sample in samples]
    assert found == by_number(exported.folder / "set", CLASSES)
    assert [sample["__key__"] for sample in samples[::12]] == ["00000-00000", "00001-00001"]
    assert [sample["json"]["number"] for sample in samples] == [0] * len(CLASSES) + [1] * len(CLASSES)
    assert {sample["json"]["seed"] for sample in samples} == {4}
    assert json.loads((folder / "classes.json").read_text()) == json.loads((exported.folder / "imagefolder" / "classes.json").read_text())


READ = """
import json, socket, sys
import numpy as np

def refuse(*_):
    raise RuntimeError("the network was used")

socket.socket.connect = socket.getaddrinfo = refuse
from datasets import load_dataset

def shown(data, names):
    rows = [(names(row), np.asarray(row["image"]).tolist()) for row in data]
    return {"rows": rows, "features": {name: type(feature).__name__ for name, feature in data.features.items()}}

root, classes = sys.argv[1], int(sys.argv[2])
whole = load_dataset(root + "/huggingface", split="train")
label = whole.features["label"]
table = load_dataset("parquet", data_files=root + "/parquet/data.parquet", split="train")
print(json.dumps({
    "splits": list(load_dataset(root + "/huggingface")),
    "names": label.names,
    "whole": shown(whole, lambda row: [label.int2str(row["label"]), row["label"]]),
    "first": shown(load_dataset(root + "/huggingface", split=f"train[:{classes}]"), lambda row: [label.int2str(row["label"]), row["label"]]),
    "parquet": shown(table, lambda row: [row["class"], row["label"]]),
    "parquet names": table.features["label"].names,
    "imagefolder": shown(load_dataset("imagefolder", data_dir=root + "/plain-imagefolder", split="train"), lambda row: [row["label"], 0]),
}))
"""


def test_hugging_face_opens_what_is_meant_for_it(exported: Exported, tmp_path: Path) -> None:
    """In a process of its own, because the library looks at its settings once; without a network."""
    settings = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", READ, str(exported.folder), str(len(CLASSES))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = [[[name, label], image] for name, label, image in by_number(exported.folder / "set", CLASSES)]
    assert found["splits"] == ["train"]
    assert found["names"] == found["parquet names"] == CLASSES
    assert found["whole"] == {"rows": expected, "features": {"image": "Image", "label": "ClassLabel"}}
    assert found["first"]["rows"] == expected[: len(CLASSES)]
    assert found["parquet"] == {"rows": expected, "features": {"image": "Image", "label": "ClassLabel", "class": "Value"}}
    plain = [[[name, 0], image] for name, _, image in by_class(exported.folder / "plain", PLAIN, seed=0)]
    assert sorted(found["imagefolder"]["rows"]) == sorted(plain)


# --- the dataset card ---------------------------------------------------------------------------------------------


def card(opened: DistilledSet, folder: Path, licence: str | None = None) -> tuple[dict[str, Any], str]:
    """Front matter and text of an exported repository."""
    export(opened, folder, "huggingface", licence=licence)
    nothing, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert nothing == ""
    return yaml.safe_load(front), text


def test_the_card_says_what_hugging_face_asks_for(exported: Exported, tmp_path: Path) -> None:
    front, text = card(exported.opened, tmp_path / "out")
    names = front["dataset_info"]["features"][1]["dtype"]["class_label"]["names"]
    assert {int(label): name for label, name in names.items()} == dict(enumerate(CLASSES))
    assert front["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    assert front["tags"] == ["dataset-distillation", "synthetic", "diffstill"]
    assert front["task_categories"] == ["image-classification"]
    assert "license" not in front
    assert f"with generation seed 4; digest of the whole set {exported.opened.digest}." in text
    assert str(tmp_path) not in text


def test_the_text_is_the_card_of_the_set_without_pictures_that_stay_behind(exported: Exported, tmp_path: Path) -> None:
    _, text = card(exported.opened, tmp_path / "out")
    start = "\n# My set\n\nText.\n![logo](https://example.org/logo.png)\nThe end.\n\n## Files\n\n- 22 synthetic images of 11 classes, 2 for each; 6 x 6 pixels, "
    assert text.startswith(start)
    _, text = card(small_set(tmp_path / "set"), tmp_path / "without")
    assert text.startswith("\n# A distilled image set\n\n## Files\n")


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("CC-BY-4.0", {"license": "cc-by-4.0"}),
        ("research only: ask us", {"license": "other", "license_name": "research only: ask us"}),
        ("", {}),
        (None, {}),
    ],
)
def test_a_licence_is_named_as_the_hub_names_it(licence: str | None, expected: dict[str, str], tmp_path: Path) -> None:
    front, _ = card(small_set(tmp_path / "set"), tmp_path / "out", licence)
    assert {name: value for name, value in front.items() if name.startswith("license")} == expected


@pytest.mark.parametrize(("images", "category"), [(999, "n<1K"), (1000, "1K<n<10K")])
def test_the_size_category(images: int, category: str, tmp_path: Path) -> None:
    opened = open_set(random_set(tmp_path / "set", ["a"], images, side=1, channels=1))
    assert card(opened, tmp_path / "out")[0]["size_categories"] == [category]


# --- equal bytes, whole or absent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_equal_sets_give_equal_bytes_wherever_they_lie(name: Format, exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.folder / "set", tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "seed-4" / "zebra" / "00000.png", (0, 0))
    export(open_set(tmp_path / "elsewhere", seed=4, ipc=2, card=CARD), tmp_path / "again", name)
    assert contents(tmp_path / "again") == contents(exported.folder / name)


def test_another_seed_gives_other_bytes(exported: Exported, tmp_path: Path) -> None:
    for name in FORMATS:
        export(open_set(exported.folder / "set", seed=0, ipc=2, card=CARD), tmp_path / name, name)
        assert contents(tmp_path / name) != contents(exported.folder / name)


def test_files_in_shards_belong_to_nobody_in_particular(exported: Exported) -> None:
    with tarfile.open(exported.folder / "webdataset" / "train-00000.tar") as tar:
        assert {(file.uid, file.gid, file.mtime, file.mode) for file in tar} == {(0, 0, 0, 0o644)}


def test_long_sets_are_cut_without_loss(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD", 5)
    monkeypatch.setattr(module, "ROWS", 5)
    for name in ("webdataset", "parquet", "huggingface"):
        export(exported.opened, tmp_path / name, name)
    shards = [pngs(tmp_path / "webdataset" / f"train-0000{number}.tar") for number in range(5)]
    assert [len(shard) for shard in shards] == [5, 5, 5, 5, 2]
    assert [image for shard in shards for image in shard] == [image for _, _, image in by_number(exported.folder / "set", CLASSES)]
    for name in ("parquet/data.parquet", "huggingface/data/train-00000-of-00001.parquet"):
        assert parquet.ParquetFile(tmp_path / name).num_row_groups == 5
        assert parquet.read_table(tmp_path / name) == parquet.read_table(exported.folder / name)


def pngs(path: Path) -> list[Any]:
    with tarfile.open(path) as tar:
        return [pixels(tar.extractfile(file).read()) for file in tar if file.name.endswith(".png")]  # type: ignore[union-attr]


def test_progress_counts_every_image(tmp_path: Path) -> None:
    from contextlib import contextmanager

    class Counter:
        done = 0

        @contextmanager
        def progress(self, description: str, total: int, unit: str, done: int = 0):
            self.total = total
            yield self

        def update(self, n: int = 1) -> None:
            self.done += n

    for name in FORMATS:
        counter = Counter()
        export(small_set(tmp_path / "set"), tmp_path / name, name, record=counter)  # type: ignore[arg-type]
        assert (counter.done, counter.total) == (4, 4)


@pytest.mark.parametrize("name", FORMATS)
def test_what_lies_there_is_never_touched(name: Format, tmp_path: Path) -> None:
    opened = small_set(tmp_path / "set")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for target in ("taken", "file"):
        with pytest.raises(DiffstillError, match=f"{target}: holds something already; export into a new or an empty folder"):
            export(opened, tmp_path / target, name)
    assert contents(tmp_path) == before


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path) -> None:
    opened = small_set(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for target in ("link", "deep/er/new"):
        export(opened, tmp_path / target, "parquet")
        assert [path.name for path in (tmp_path / target).iterdir()] == ["data.parquet"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "deep" / "er" / "new").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", FORMATS)
def test_a_failure_half_way_leaves_nothing(name: Format, tmp_path: Path) -> None:
    opened = small_set(tmp_path / "set")
    Path(opened.samples[-1][0]).unlink()
    before = contents(tmp_path)
    with pytest.raises(FileNotFoundError):
        export(opened, tmp_path / "out", name)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# --- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metadata.csv", "classes.json"])
def test_class_names_that_are_no_folder(name: str, tmp_path: Path) -> None:
    opened = small_set(tmp_path / "set", [name, "b"])
    with pytest.raises(DiffstillError, match=f"class '{name}' cannot be the name of a folder"):
        export(opened, tmp_path / "out", "imagefolder")
    assert not (tmp_path / "out").exists()
    export(opened, tmp_path / "table", "parquet")
    assert parquet.read_table(tmp_path / "table" / "data.parquet")["class"].to_pylist() == [name, "b"] * 2
    export(opened, tmp_path / "tars", "webdataset")
    with tarfile.open(tmp_path / "tars" / "train-00000.tar") as tar:
        assert all("/" not in file.name for file in tar)
    assert card(opened, tmp_path / "repository")[0]["dataset_info"]["features"][1]["dtype"]["class_label"]["names"] == {"0": name, "1": "b"}


@pytest.mark.parametrize(("library", "name"), [("webdataset", "webdataset"), ("pyarrow", "parquet"), ("huggingface_hub", "huggingface")])
def test_a_missing_library_is_named(library: str, name: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    opened = small_set(tmp_path / "set")
    with pytest.raises(DiffstillError, match=f"{name} needs {library}, which is not installed; pip install 'diffstill\\[export\\]'"):
        export(opened, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()
