"""Distilled sets in the formats of others: an image folder, Parquet, WebDataset, a dataset repository of Hugging Face.

Images are handed on as the PNG files that they are. Equal sets give equal bytes in every format (in those with Parquet:
written by the same version of pyarrow). All but the image folder begin with the first image of every class, then come
the second ones and so on, so the first k * classes images are the set for k images per class.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffstill.artifacts import open_as_usual, refuse_overlap
from diffstill.errors import DiffstillError
from diffstill.loading import DistilledSet
from diffstill.names import OURS
from diffstill.record import Progress, Record, ignore

Format = Literal["imagefolder", "parquet", "webdataset", "huggingface"]
METADATA, CLASSES = "metadata.csv", "classes.json"
ROWS = 100
"""Images in a row group: viewers fetch whole groups."""
SHARD = 1000
"""Images in a file of WebDataset."""
TAGS = ("dataset-distillation", "synthetic", "diffstill")
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"), (10**8, "10M<n<100M"))
PICTURE_ELSEWHERE = re.compile(r"^!\[.*\]\((?!https?://)[^)\n]*\)\n?", re.MULTILINE)
"""A line of Markdown with a picture that lies beside the card, not on the web."""


@dataclass(frozen=True)
class _Image:
    """A PNG file and what it shows."""

    path: Path
    label: int
    name: str

    @property
    def number(self) -> int:
        """Its place in its class."""
        return int(self.path.stem)

    @property
    def file_name(self) -> str:
        """As `metadata.csv` names it."""
        return f"{self.name}/{self.path.name}"


def export(
    opened: DistilledSet,
    folder: Path,
    format: Format,  # noqa: A002  (as the option is called)
    *,
    licence: str | None = None,
    record: Record = ignore,
) -> Path:
    """Write a set to `folder`, which must be absent or empty and appears whole or not at all. Returns `folder`.

    imagefolder: `<class>/<number>.png`, `metadata.csv` (file_name, label, seed) and `classes.json`, the classes in the
    order of their labels; `datasets` takes folders named train or test for splits. parquet: `data.parquet` with the
    columns image, label and class; `datasets` reads images and classes as such. webdataset: `train-00000.tar`, ... with
    a .png, .cls and .json for each image, and `classes.json`. huggingface: `data/train-00000-of-00001.parquet`, and as
    `README.md` the set's card with `licence` and what else the hub asks for; `datasets.load_dataset` opens the folder.
    Raises `DiffstillError` if `folder` holds something, on a class name that the format cannot express, and without the
    libraries of the extra `export`.
    """
    refuse_overlap(folder, {"set": opened.artifact.folder})
    with _appearing(folder) as partial, record.progress("export", len(opened), "img") as progress, _libraries(format):
        _WRITERS[format](opened, partial, progress)
        if format == "huggingface":
            (partial / "README.md").write_text(_dataset_card(opened, licence), encoding="utf-8")
    return folder


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends well."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DiffstillError(f"{folder}: holds something already; export into a new or an empty folder, or remove what is there")
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        open_as_usual(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _libraries(wanted: Format) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DiffstillError(f"the format {wanted} needs {error.name}, which is not installed; pip install 'diffstill[export]'") from error


def _images(opened: DistilledSet) -> list[_Image]:
    """All images, class by class."""
    return [_Image(Path(path), label, opened.classes[label]) for path, label in opened.samples]


def _groups(opened: DistilledSet, size: int) -> Iterator[list[_Image]]:
    """All images, the first of every class first, in groups of `size`."""
    images = sorted(_images(opened), key=lambda image: (image.number, image.label))
    return (images[start : start + size] for start in range(0, len(images), size))


def _write_classes(opened: DistilledSet, folder: Path) -> None:
    classes = [{"name": name, "label": label} for label, name in enumerate(opened.classes)]
    (folder / CLASSES).write_text(json.dumps(classes, indent=1) + "\n")


# --- image folder -------------------------------------------------------------------------------------------------


def _imagefolder(opened: DistilledSet, folder: Path, progress: Progress) -> None:
    for name in opened.classes:
        if OURS.fullmatch(name):
            raise DiffstillError(f"class {name!r} cannot be the name of a folder beside {METADATA}; export as parquet, webdataset or huggingface")
        (folder / name).mkdir()
    for image in _images(opened):
        shutil.copyfile(image.path, folder / image.file_name)
        progress.update()
    with (folder / METADATA).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file_name", "label", "seed"))
        writer.writerows((image.file_name, image.name, opened.seed) for image in _images(opened))
    _write_classes(opened, folder)


# --- WebDataset ---------------------------------------------------------------------------------------------------


def _webdataset(opened: DistilledSet, folder: Path, progress: Progress) -> None:
    from webdataset import TarWriter

    for number, group in enumerate(_groups(opened, SHARD)):
        with (folder / f"train-{number:05d}.tar").open("wb") as file, TarWriter(file, mtime=0, mode=0o644) as shard:
            for image in group:
                key = f"{image.label:05d}-{image.path.stem}"  # readers cut keys at the first dot, and class names have dots
                facts = {"class": image.name, "seed": opened.seed, "number": image.number}
                shard.write({"__key__": key, "png": image.path.read_bytes(), "cls": image.label, "json": facts})
                progress.update()
    _write_classes(opened, folder)


# --- Parquet and Hugging Face -------------------------------------------------------------------------------------


def _parquet(opened: DistilledSet, folder: Path, progress: Progress) -> None:
    _write_table(opened, folder / "data.parquet", ("image", "label", "class"), progress)


def _write_table(opened: DistilledSet, path: Path, columns: tuple[str, ...], progress: Progress) -> None:
    """One row per image. The schema tells `datasets` which columns are images and classes."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    types = {"image": image_type, "label": pa.int64(), "class": pa.string()}
    features = {
        "image": {"_type": "Image"},
        "label": {"names": opened.classes, "_type": "ClassLabel"},
        "class": {"dtype": "string", "_type": "Value"},
    }
    note = json.dumps({"info": {"features": {column: features[column] for column in columns}}})
    schema = pa.schema([(column, types[column]) for column in columns], metadata={"huggingface": note})
    with ParquetWriter(path, schema) as writer:
        for group in _groups(opened, ROWS):
            writer.write_batch(pa.RecordBatch.from_pylist([_row(image) for image in group], schema))
            progress.update(len(group))


def _row(image: _Image) -> dict[str, Any]:
    return {"image": {"bytes": image.path.read_bytes(), "path": image.file_name}, "label": image.label, "class": image.name}


def _huggingface(opened: DistilledSet, folder: Path, progress: Progress) -> None:
    (folder / "data").mkdir()
    _write_table(opened, folder / "data" / "train-00000-of-00001.parquet", ("image", "label"), progress)


def _dataset_card(opened: DistilledSet, licence: str | None) -> str:
    """Metadata for the hub, then the set's own card without pictures that stay behind, then what the files are."""
    from huggingface_hub import DatasetCardData

    names = {str(label): name for label, name in enumerate(opened.classes)}
    label = {"name": "label", "dtype": {"class_label": {"names": names}}}
    data = DatasetCardData(
        **(_licence(licence) if licence else {}),
        task_categories=["image-classification"],
        size_categories=[next(name for limit, name in SIZES if len(opened) < limit)],
        tags=list(TAGS),
        dataset_info={"features": [{"name": "image", "dtype": "image"}, label]},
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    )
    text = PICTURE_ELSEWHERE.sub("", opened.card or "# A distilled image set")
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n\n{_origin(opened)}"


def _licence(text: str) -> dict[str, Any]:
    """The hub knows licences by identifiers like cc-by-4.0; anything else has a name of its own."""
    if re.fullmatch(r"[a-z0-9.-]+", text.lower()):
        return {"license": text.lower()}
    return {"license": "other", "license_name": text}


def _origin(opened: DistilledSet) -> str:
    """What the files are, in Markdown."""
    facts, classes = opened.manifest.facts, len(opened.classes)
    look = f"{facts['side']} x {facts['side']} pixels, {'grey' if facts['channels'] == 1 else 'colour'}"
    return f"""## Files

- {len(opened)} synthetic images of {classes} classes, {opened.images_per_class} for each; {look}.
- Drawn by diffstill from the {"fine-tuned" if facts["source"] == "distilled" else "untuned"} generator with generation seed {opened.seed}; digest of the whole set {opened.digest}.
- The first {classes} x k rows are the set for k images per class: `load_dataset(..., split="train[:{classes}]")` has one of each.
"""


_WRITERS: dict[Format, Callable[[DistilledSet, Path, Progress], None]] = {
    "imagefolder": _imagefolder,
    "parquet": _parquet,
    "webdataset": _webdataset,
    "huggingface": _huggingface,
}
