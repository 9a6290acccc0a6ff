"""Distilled sets as PyTorch datasets: labels, nested subsets, workers, and the refusal of what is not there."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.load import main as benchmark
from benchmarks.load import opening_times, random_set
from chains import Chain
from diffstill.artifacts import open_artifact
from diffstill.errors import DiffstillError
from diffstill.loading import open_set
from diffstill.stages.sample import sample

ROOT = Path(__file__).parents[1]
CLASSES = ["zebra", "ape", "10", "9"]
"""Neither in the order of the alphabet nor of numbers."""
LABELS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey, 4 classes with 3 images each, generation seeds 5 and 2. Read only."""
    return random_set(tmp_path_factory.mktemp("sets") / "grey", CLASSES, 3, seeds=(5, 2), side=8, channels=1)


def files(folder: Path, seed: int, images_per_class: int) -> list[Path]:
    return [folder / f"seed-{seed}" / name / f"0000{number}.png" for name in CLASSES for number in range(images_per_class)]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# --- labels and images --------------------------------------------------------------------------------------------


def test_labels_are_positions_in_the_classes_of_the_set(folder: Path) -> None:
    opened = open_set(folder)
    assert opened.classes == CLASSES
    assert opened.class_to_idx == {"zebra": 0, "ape": 1, "10": 2, "9": 3}
    assert opened.samples == list(zip(map(str, files(folder, 5, 3)), LABELS, strict=True))
    assert opened.targets == LABELS
    assert len(opened) == 12


def test_items_are_the_images_as_they_lie_there(folder: Path) -> None:
    opened = open_set(folder)
    for (image, label), path, expected in zip(opened, files(folder, 5, 3), LABELS, strict=True):
        assert (image.mode, label) == ("L", expected)
        np.testing.assert_array_equal(np.asarray(image), pixels(path))
    assert opened[-1][1] == 3
    with pytest.raises(IndexError):
        opened[12]


def test_image_folder_sees_the_same_images_under_the_same_names(folder: Path) -> None:
    """But numbers them otherwise."""
    from torchvision.datasets import ImageFolder

    ours, theirs = open_set(folder), ImageFolder(str(folder / "seed-5"))
    assert {(path, ours.classes[label]) for path, label in ours.samples} == {(path, theirs.classes[label]) for path, label in theirs.samples}
    assert ours.class_to_idx != theirs.class_to_idx
    for name in ("classes", "class_to_idx", "samples", "targets", "transform", "target_transform"):
        assert type(getattr(ours, name)) is type(getattr(theirs, name))


@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_hold_what_the_items_show(channels: int, tmp_path: Path) -> None:
    opened = open_set(random_set(tmp_path / "set", ["b", "a"], 2, side=5, channels=channels))
    images, labels = opened.tensors()
    assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert images.shape == (4, channels, 5, 5)
    assert labels.tolist() == [0, 0, 1, 1]
    for tensor, (image, _) in zip(images, opened, strict=True):
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        np.testing.assert_array_equal(tensor.permute(1, 2, 0).squeeze(-1).numpy(), np.asarray(image))


def test_a_set_of_some_classes_numbers_these(tiny_chain: Chain, tmp_path: Path) -> None:
    """The generator's label 2 becomes 0: what `sample` wrote, `metadata.csv` and the dataset agree."""
    config = tiny_chain.params.sample.model_copy(update={"classes": ("2", "0")})
    sample(config, generator=tiny_chain.artifacts / "generator", distilled=tmp_path / "two")
    opened = open_set(tmp_path / "two")
    assert opened.classes == ["2", "0"]
    with (tmp_path / "two" / "seed-0" / "metadata.csv").open(newline="") as file:
        rows = [(str(tmp_path / "two" / "seed-0" / row["file_name"]), row["label"]) for row in csv.DictReader(file)]
    assert [(path, opened.classes[label]) for path, label in opened.samples] == rows


def test_transforms_change_what_items_are(folder: Path) -> None:
    opened = open_set(folder, transform=lambda image: image.size, target_transform=lambda label: -label)
    assert [opened[index] for index in (0, 11)] == [((8, 8), 0), ((8, 8), -3)]
    assert opened.targets == LABELS


# --- parts of a set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ipc", [1, 2, 3])
def test_a_smaller_set_is_the_first_images_of_each_class(ipc: int, folder: Path) -> None:
    opened = open_set(folder, ipc=ipc)
    assert [Path(path) for path, _ in opened.samples] == files(folder, 5, ipc)
    assert opened.images_per_class == ipc
    images, labels = open_set(folder).tensors()
    first = torch.arange(12) % 3 < ipc
    torch.testing.assert_close(opened.tensors(), (images[first], labels[first]), rtol=0, atol=0)


def test_a_seed_picks_its_images_and_the_first_is_the_default(folder: Path) -> None:
    assert open_set(folder).seed == 5
    assert open_set(folder, seed=5).samples == open_set(folder).samples
    other = open_set(folder, seed=2, ipc=2)
    assert other.seed == 2
    assert [Path(path) for path, _ in other.samples] == files(folder, 2, 2)


def test_what_the_set_has_not_is_refused_with_what_it_has(folder: Path) -> None:
    for ipc in (0, -1, 4):
        with pytest.raises(DiffstillError, match=f"grey: cannot give {ipc} images per class; ask for 1 to 3"):
            open_set(folder, ipc=ipc)
    with pytest.raises(DiffstillError, match="grey: has no generation seed 0; its seeds are 5, 2"):
        open_set(folder, seed=0)


def test_manifest_digest_and_card_are_those_of_the_whole(folder: Path) -> None:
    artifact, opened = open_artifact(folder, "distilled"), open_set(folder, ipc=1, card="# Mine")
    assert (opened.manifest, opened.digest, opened.card) == (artifact.manifest, artifact.digest, "# Mine")
    assert open_set(folder).card is None


def test_it_says_what_it_is(folder: Path) -> None:
    lines = repr(open_set(folder, ipc=2, transform=len)).splitlines()
    assert lines[:4] == [
        "Dataset DistilledSet",
        "    Number of datapoints: 8",
        f"    Root location: {folder}",
        "    Classes: 4, images per class: 2, seed: 5",
    ]
    assert lines[-1] == "    Transform: <built-in function len>"


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", ["seed-5/ape/00001.png", "seed-2/9/00000.png", "seed-5/metadata.csv"])
def test_a_damaged_file_is_refused_by_name_even_if_it_is_not_asked_for(damaged: str, folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / damaged).write_bytes((copied / damaged).read_bytes() + b"!")
    with pytest.raises(DiffstillError, match=f"{damaged}: content differs from the digest"):
        open_set(copied, ipc=1)


@pytest.mark.parametrize(
    ("fact", "value", "file"), [("images_per_class", 4, "zebra/00003.png"), ("classes", ["../zebra"], None), ("classes", ["lion"], "lion/00000.png")]
)
def test_only_files_of_the_manifest_are_opened(fact: str, value: object, file: str | None, folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["facts"][fact] = value
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DiffstillError, match=f"lists no seed-5/{file}" if file else "which is no name of a file or folder"):
        open_set(copied)


def test_another_artifact_is_refused(tiny_chain: Chain) -> None:
    with pytest.raises(DiffstillError, match="holds a `images` artifact where `distilled` is expected"):
        open_set(tiny_chain.artifacts / "images")


# --- in use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_load_what_one_process_loads(start: str, folder: Path) -> None:
    from torchvision.transforms import ToTensor

    opened = open_set(folder, seed=2, transform=ToTensor())
    loaded = list(DataLoader(opened, batch_size=5, num_workers=2, multiprocessing_context=start))
    images, labels = opened.tensors()
    torch.testing.assert_close(torch.cat([batch for batch, _ in loaded]), images / 255)
    assert torch.cat([batch for _, batch in loaded]).tolist() == labels.tolist() == LABELS


def test_neither_torchvision_nor_a_service_is_needed() -> None:
    code = "import sys, diffstill.loading; print(*{'torchvision', 'mlflow', 'boto3', 'timm', 'diffusers'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == []


def test_a_thousand_images_open_at_once(tmp_path: Path) -> None:
    """A twentieth of a second when the machine has nothing else to do; the bound only catches another order of magnitude."""
    folder = random_set(tmp_path / "set", [str(label) for label in range(10)], 100)
    assert len(open_set(folder)) == 1000
    assert min(opening_times(folder, 5)) < 1.5


def test_the_benchmark_prints_median_and_spread(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(20, 3)
    assert "open a set of 20 images 32 x 32: median 0." in capsys.readouterr().out  # a thread of an earlier test may print, too


@pytest.mark.parametrize(("side", "channels"), [(8, 1), (32, 3)])
def test_the_example_trains_on_grey_and_on_colour(side: int, channels: int, tmp_path: Path) -> None:
    example = ROOT / "examples" / "train_timm.py"
    assert len([line for line in example.read_text().splitlines()[1:] if line]) <= 15
    folder = random_set(tmp_path / "set", ["a", "b", "c"], 2, side=side, channels=channels)
    command = [sys.executable, str(example), str(folder)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    assert printed.endswith("% on 6 images of 3 classes\n")
    assert float(printed.split()[2].rstrip("%")) > 60
