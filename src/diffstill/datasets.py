"""Sources of real images: listed, divided into train, val and test, then read piece by piece, centre-cropped and resized.

Every source ends in the same `Dataset`: what there is and how it is divided, known before an image is decoded. Pixels are
uint8 of shape (N, channels, side, side), labels are positions in `Dataset.classes`. Nothing here depends on the order in
which a file system lists its files, or on the number of CPUs.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import shutil
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

import joblib
import numpy as np
import numpy.typing as npt
import requests
from filelock import FileLock
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose as Turn
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from diffstill.artifacts import cache_folder, file_digest, is_sealed, seal
from diffstill.config import SPLITS, PrepareConfig
from diffstill.draws import Purpose, shuffled
from diffstill.errors import DiffstillError
from diffstill.imagenet import SUBSETS, title_of
from diffstill.names import composed, flaw
from diffstill.record import Progress, Record, ignore

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

log = logging.getLogger("diffstill")

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
"""A file of such a name is said to be an image; of another one the content decides."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
LAYOUT = "expected <location>/<class>/<image>, or <location>/train/<class>/<image> and optionally test/ and val/ laid out like train/"
IMAGENET_LAYOUT = (
    "expected an ImageNet tree (<location>/train/<wnid>/*.JPEG and val/<wnid>/*.JPEG) or a fastai archive (a .tgz file, its https:// URL, or the "
    "folder unpacked from it)"
)
VALIDATION_IMAGE = "ILSVRC2012_val_"
"""How the names of ImageNet's validation images begin; those of its training images begin with `<wnid>_`."""

DIGITS_CLASSES = tuple("0123456789")
FASHION_CLASSES = ("t-shirt-top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_DIGESTS: Mapping[str, str] = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of the decompressed content: distributors compress the same content anew."""

# Pillow raises all of these on malformed files; MemoryError and our own mistakes of other kinds are not among them.
_BAD_IMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, struct.error, zlib.error)
_TURNS: Mapping[Any, Turn] = dict(
    zip(
        range(2, 9),
        (Turn.FLIP_LEFT_RIGHT, Turn.ROTATE_180, Turn.FLIP_TOP_BOTTOM, Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90),
        strict=True,
    )
)
"""What makes an image of each EXIF orientation upright."""
_CHUNK = 1 << 20
_SHOWN = 5
_RUN = 16  # images that a thread reads at a time


@dataclass(frozen=True)
class Rejected:
    """A file that is no readable image: its name relative to the location, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Piece:
    """The images of one shard file: those numbered `rows` in their dataset."""

    split: str
    number: int
    rows: Labels

    @property
    def name(self) -> str:
        """The shard file's name without its suffix."""
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class ReadPiece:
    """The readable images of a piece, and why each of the others was rejected, by its number in the dataset."""

    piece: Piece
    pixels: Pixels
    labels: Labels
    rejected: Mapping[int, str]


@dataclass(frozen=True)
class Dataset:
    """N real images, divided but not yet read.

    `assigned` (N,) is the split of each, `division` says in words how that came about, `leakage` what is wrong with it.
    `read` gives one image (channels, side, side) by its number, or raises what Pillow raises on a malformed file.
    `fingerprint` changes when the files do. `place` is where they lie, for messages.
    """

    classes: tuple[str, ...]
    labels: Labels
    assigned: npt.NDArray[np.str_]
    division: str
    channels: int
    read: Callable[[int], Pixels]
    place: str
    names: Sequence[str] = ()
    fingerprint: str = ""
    left_out: Sequence[Rejected] = ()
    leakage: str | None = None

    def pieces(self, size: int) -> list[Piece]:
        """Each split cut into pieces of `size` images."""
        rows = {split: np.flatnonzero(self.assigned == split) for split in SPLITS}
        return [
            Piece(split, number, own[start : start + size]) for split, own in rows.items() for number, start in enumerate(range(0, len(own), size))
        ]

    def counts(self, rejected: Collection[int] = ()) -> dict[str, dict[str, int]]:
        """Images by split and class name, without the rejected ones."""
        kept = np.ones(len(self.labels), bool)
        kept[list(rejected)] = False
        own = {split: np.bincount(self.labels[kept & (self.assigned == split)], minlength=len(self.classes)) for split in SPLITS}
        return {split: dict(zip(self.classes, numbers.tolist(), strict=True)) for split, numbers in own.items()}


@dataclass(frozen=True)
class _Listing:
    """What a source holds. `origin` (N,) is the split each image lies in; `names` are paths below the location."""

    classes: tuple[str, ...]
    labels: Labels
    origin: npt.NDArray[np.str_]
    names: Sequence[str] = ()
    fingerprint: str = ""
    left_out: Sequence[Rejected] = ()


def load(config: PrepareConfig, record: Record = ignore) -> Dataset:
    """List and divide the source that `config` names. Raises `DiffstillError` naming the file, class or knob that is wrong."""
    location = config.location or ""
    downloads = config.source not in ("digits", "folder") and _is_url(location)
    if "://" in location and config.source != "digits" and not downloads:
        scheme = location.partition("://")[0]
        raise DiffstillError(
            f"`prepare.location` {location!r}: source {config.source} does not read {scheme}://; name a folder, s3://<bucket>/<prefix> or a DVC repository"
        )
    sources: Mapping[str, Callable[[PrepareConfig, Record], Dataset]] = {"digits": digits, "fashion-mnist": fashion_mnist, "folder": folder}
    return sources.get(config.source, imagenet)(config, record)


def digits(config: PrepareConfig, _record: Record = ignore) -> Dataset:
    """The 1,797 grey 8x8 digits inside scikit-learn, values 0..16 spread over 0..255."""
    from sklearn.datasets import load_digits

    if config.location is not None:
        raise DiffstillError(f"`prepare.location` is {config.location!r}, but the digits lie inside scikit-learn; set it to null")
    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return _of_arrays(grey, _Listing(DIGITS_CLASSES, bunch.target, np.full(len(grey), "train")), {}, config)


def fashion_mnist(config: PrepareConfig, record: Record = ignore, digests: Mapping[str, str] = FASHION_DIGESTS) -> Dataset:
    """Fashion-MNIST from four gzip IDX files in `config.location`: a folder, a URL prefix, or None for the Debian package's folder.

    `digests` maps the file names to the SHA-256 of their decompressed content. Raises `DiffstillError` on a missing or different file.
    """
    place = config.location or str(FASHION_FOLDER)
    where = _download_all(place, digests, record) if _is_url(place) else Path(place).expanduser()
    missing = [name for name in digests if not (where / name).is_file()]
    if missing:
        raise DiffstillError(
            f"{where}: lacks {', '.join(missing)}; install the Debian package dataset-fashion-mnist, "
            "or set `prepare.location` to a folder or URL prefix that has these files"
        )
    train_images, train_labels, test_images, test_labels = (read_idx(where / name, digest) for name, digest in digests.items())
    origin = np.repeat(["train", "test"], [len(train_labels), len(test_labels)])
    brought = {"test": "the test split that comes with the data"}
    grey, labels = np.concatenate([train_images, test_images]), np.concatenate([train_labels, test_labels])
    return _of_arrays(grey, _Listing(FASHION_CLASSES, labels.astype(np.int64), origin), brought, config)


def folder(config: PrepareConfig, record: Record = ignore) -> Dataset:
    """Images in a folder per class, or in such folders below train/, optionally with test/ and val/ beside.

    val/ without test/ serves as test, as in ImageNet-like trees. Images may lie deeper in the folder of their class.
    """
    if config.location is None:
        raise DiffstillError(f"`prepare.location` is null, but `source: folder` needs the folder of the images; {LAYOUT}")
    root = Path(config.location).expanduser()
    folders = _layout(root)
    present = {sub: _class_folders(root / sub) for sub in folders.values()}
    listing = _list(root, folders, _agreed_classes(root, present, config.classes), record, present, deep=True)
    beside = [] if "" in present else [name for name in _visible(root, folders=True) if name not in present]
    strangers = [Rejected(f"{name}/", "neither train/ nor test/ nor val/") for name in beside]
    listing = replace(listing, left_out=[*strangers, *listing.left_out])
    brought = {origin: f"the folder {sub}/" for origin, sub in folders.items() if origin != "train"}
    return _of_files(root, listing, brought, config, record)


def imagenet(config: PrepareConfig, record: Record = ignore) -> Dataset:
    """The classes of one of ImageNet's subsets, named by `config.source`, out of an ImageNet tree or a fastai archive; val/ is test.

    The file names tell the literature's split from a re-split of the same images, whose test images a generator may have
    been trained on: such leakage is logged, and told by `Dataset.leakage`.
    """
    if config.location is None:
        raise DiffstillError(f"`prepare.location` is null, but source {config.source} needs to know where its images lie; {IMAGENET_LAYOUT}")
    root = _imagenet_root(config.location, record)
    classes = _chosen(config.classes, SUBSETS[config.source], f"source {config.source}")
    for sub in ("train", "val"):
        _refuse_lacking(root / sub, classes, config.source)
    listing = _list(root, {"train": "train", "test": "val"}, classes, record)
    split, leakage = _provenance(root, listing)
    if leakage:
        log.warning("%s: %s", root, leakage)
    return _of_files(root, listing, {"test": split}, config, record, leakage)


# --- from a listing to a dataset ---------------------------------------------------------------------------------


def _of_files(
    root: Path, listing: _Listing, brought: Mapping[str, str], config: PrepareConfig, record: Record, leakage: str | None = None
) -> Dataset:
    assigned = divide(listing.labels, listing.origin, listing.classes, tuple(brought), config)
    channels = config.channels or _channels_of(root, listing.names, config, record)
    return Dataset(
        classes=listing.classes,
        labels=listing.labels,
        assigned=assigned,
        division=_describe(brought, config),
        channels=channels,
        read=partial(_read_file, root, listing.names, channels, config),
        place=str(root),
        names=listing.names,
        fingerprint=listing.fingerprint,
        left_out=listing.left_out,
        leakage=leakage,
    )


def _of_arrays(grey: Pixels, listing: _Listing, brought: Mapping[str, str], config: PrepareConfig) -> Dataset:
    """The wanted classes of grey images (N, height, width), relabelled in the wanted order."""
    classes = _chosen(config.classes, listing.classes, config.source)
    positions = np.array([classes.index(name) if name in classes else -1 for name in listing.classes], np.int64)
    wanted = np.flatnonzero(positions[listing.labels] >= 0)
    labels = positions[listing.labels[wanted]]
    return Dataset(
        classes=classes,
        labels=labels,
        assigned=divide(labels, listing.origin[wanted], classes, tuple(brought), config),
        division=_describe(brought, config),
        channels=config.channels or 1,
        read=partial(_read_array, grey[wanted], config),
        place=config.source,
    )


def divide(
    labels: Labels, origin: npt.NDArray[np.str_], classes: Sequence[str], brought: Sequence[str], config: PrepareConfig
) -> npt.NDArray[np.str_]:
    """The split (N,) of each image: `brought` splits stay as `origin` has them, the others are cut from each class of train.

    Cut first test, then val as a share of the rest; every cut takes at least one image and leaves at least one to those after it.
    Which images are cut depends on the seed, the class name and the size of the class alone, so not on `prepare.classes`.
    """
    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    cuts = {name: fraction for name, fraction in fractions.items() if name not in brought}
    assigned, training = origin.copy(), np.flatnonzero(origin == "train")
    training = training[np.argsort(labels[training], kind="stable")]
    starts = np.searchsorted(labels[training], np.arange(len(classes) + 1))
    for name, (start, stop) in zip(classes, pairwise(starts), strict=True):
        members = training[start:stop]
        _refuse_few(name, len(members), cuts)
        key = struct.unpack("<2I", hashlib.sha256(os.fsencode(name)).digest()[:8])
        order = members[shuffled(len(members), Purpose.SPLIT, config.seed, *key)]
        for later, (split, fraction) in zip(range(len(cuts), 0, -1), cuts.items(), strict=True):
            taken = min(max(1, round(fraction * len(order))), len(order) - later)
            assigned[order[:taken]] = split
            order = order[taken:]
    return assigned


def _refuse_few(name: str, count: int, cuts: Mapping[str, float]) -> None:
    if count < 1 + len(cuts):
        raise DiffstillError(
            f"class {name!r} has {count} readable training image{'' if count == 1 else 's'}, but {1 + len(cuts)} are needed, "
            f"at least one each for {', '.join(['train', *cuts])}; add images, or leave the class out with `prepare.classes`"
        )


def _describe(brought: Mapping[str, str], config: PrepareConfig) -> str:
    parts = []
    for split, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if split in brought:
            parts.append(f"{split} is {brought[split]}")
        else:
            rest = " that is left" if split == "val" and "test" not in brought else ""
            parts.append(f"{split} is a share of {fraction:g} of each class of the training images{rest}, drawn with seed {config.seed}")
    return "; ".join(parts)


def _chosen(wanted: tuple[str, ...] | None, known: Sequence[str], where: str) -> tuple[str, ...]:
    """The classes to keep, in order. Raises `DiffstillError` on unknown or repeated names and on fewer than two classes."""
    classes = tuple(known) if wanted is None else wanted
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise DiffstillError(f"`prepare.classes` names {_shortened(unknown)}, unknown to {where}; known are {_shortened(known, 20)}")
    if len(classes) < 2:
        what = f"only the class {classes[0]!r}" if classes else "no class"
        fix = "name more in `prepare.classes`" if wanted is not None else LAYOUT
        raise DiffstillError(f"{where} has {what} to work with, but telling classes apart takes at least two; {fix}")
    return classes


def _shortened(names: Sequence[str], shown: int = _SHOWN) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(repr(name) for name in names[:shown]) + more


# --- reading, piece by piece -------------------------------------------------------------------------------------


def read_pieces(dataset: Dataset, pieces: Iterable[Piece], side: int, progress: Progress) -> Generator[ReadPiece]:
    """The images of each piece, in order, read by as many threads as there are CPUs for this process; Pillow decodes without Python's lock."""
    with ThreadPoolExecutor(joblib.cpu_count()) as threads, _lifted_pillow_limit():
        for piece in pieces:
            yield _read_piece(dataset, piece, side, threads, progress)


def _read_piece(dataset: Dataset, piece: Piece, side: int, threads: ThreadPoolExecutor, progress: Progress) -> ReadPiece:
    pixels = np.empty((len(piece.rows), dataset.channels, side, side), np.uint8)
    rejected: dict[int, str] = {}
    starts = range(0, len(piece.rows), _RUN)
    runs = [(piece.rows[start : start + _RUN], pixels[start : start + _RUN]) for start in starts]
    for (rows, _), bad in zip(runs, threads.map(partial(_read_run, dataset.read), runs), strict=True):
        rejected |= bad
        progress.update(len(rows))
    labels = dataset.labels[piece.rows]
    if rejected:
        readable = ~np.isin(piece.rows, list(rejected))
        pixels, labels = pixels[readable], labels[readable]
    return ReadPiece(piece, pixels, labels, rejected)


def _read_run(read: Callable[[int], Pixels], run: tuple[Labels, Pixels]) -> dict[int, str]:
    """Read some images into their places; why each of the others cannot be read."""
    rejected = {}
    for row, place in zip(*run, strict=True):
        try:
            place[:] = read(int(row))
        except _BAD_IMAGE as error:
            rejected[int(row)] = _reason(error)
    return rejected


def _read_array(grey: Pixels, config: PrepareConfig, row: int) -> Pixels:
    resized = np.asarray(_resized(Image.fromarray(grey[row]), config.side))
    return np.repeat(resized[None], config.channels or 1, axis=0)


def _read_file(root: Path, names: Sequence[str], channels: int, config: PrepareConfig, row: int) -> Pixels:
    return _planes(decode(root / names[row], config.side, config.max_pixels), channels)


def _channels_of(root: Path, names: Sequence[str], config: PrepareConfig, record: Record) -> int:
    """3 if any readable image has colour, else 1. Headers tell; a file whose header tells of colour is decoded, and the first that can be settles it."""
    has_colour = partial(_has_colour, root, config)
    with record.progress("read headers", len(names), "img") as progress, ThreadPoolExecutor(joblib.cpu_count()) as threads, _lifted_pillow_limit():
        for start in range(0, len(names), config.shard_size):
            some = names[start : start + config.shard_size]
            if any(threads.map(has_colour, some)):
                return 3
            progress.update(len(some))
    return 1


def _has_colour(root: Path, config: PrepareConfig, name: str) -> bool:
    try:
        with Image.open(root / name, formats=FORMATS) as image:
            if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16"):
                return False
        return decode(root / name, config.side, config.max_pixels).mode == "RGB"
    except _BAD_IMAGE:
        return False


def _planes(image: Image.Image, channels: int) -> Pixels:
    """An L or RGB image as (channels, height, width)."""
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels).transpose(2, 0, 1)


@contextmanager
def _lifted_pillow_limit() -> Iterator[None]:
    """Pillow's own limit on pixels must not cut in below `prepare.max_pixels`."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _reason(error: Exception) -> str:
    """Why a file was rejected, free of the absolute paths that Pillow and the system put into their messages."""
    if isinstance(error, UnidentifiedImageError):
        return f"not a readable image ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def refuse_many_bad(dataset: Dataset, rejected: Mapping[int, str], tolerated: float, listed: Path) -> None:
    """Raise `DiffstillError` if more than that share of all images was rejected; all of them are named in the file `listed`."""
    total = len(dataset.labels)
    if len(rejected) / total > tolerated:
        shown = "; ".join(f"{dataset.names[row]}: {reason}" for row, reason in sorted(rejected.items())[:_SHOWN])
        more = f"; and {len(rejected) - _SHOWN} more" if len(rejected) > _SHOWN else ""
        raise DiffstillError(
            f"{dataset.place}: {len(rejected)} of {total} image files cannot be used, above `prepare.max_bad_fraction` {tolerated:g} "
            f"({shown}{more}; all are listed in {listed}); remove these files or raise `prepare.max_bad_fraction`"
        )


def refuse_emptied(dataset: Dataset, rejected: Collection[int]) -> None:
    """Raise `DiffstillError` if the rejected files leave a class without an image in a split."""
    for split, numbers in dataset.counts(rejected).items():
        for name, count in numbers.items():
            if not count:
                raise DiffstillError(
                    f"class {name!r} has no readable image for {split}; mend or remove its unreadable files, add some, "
                    "or leave the class out with `prepare.classes`"
                )


# --- sources that are arrays: digits, fashion-mnist --------------------------------------------------------------


def read_idx(path: Path, digest: str) -> Pixels:
    """The uint8 array in a gzip IDX file whose decompressed content has that SHA-256; `DiffstillError` names both digests otherwise."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DiffstillError(f"{path}: not a whole gzip file ({error}); fetch it anew") from error
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise DiffstillError(f"{path}: its decompressed content has SHA-256 {found}, expected {digest}; fetch the original file")
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _is_url(location: str) -> bool:
    return location.startswith(("http://", "https://"))


@contextmanager
def _session() -> Iterator[requests.Session]:
    """Requests that are tried again while a server is busy."""
    retry = Retry(total=4, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        yield session


def _download_all(prefix: str, digests: Mapping[str, str], record: Record) -> Path:
    """Fetch the files below `prefix` that the cache lacks; the cache folder."""
    cache = cache_folder() / "fashion-mnist"
    cache.mkdir(parents=True, exist_ok=True)
    with _session() as session:
        for name, digest in digests.items():
            if not _is_original(cache / name, digest):
                _download(session, f"{prefix.rstrip('/')}/{name}", cache / name, digest, record)
    return cache


def _is_original(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    try:
        read_idx(path, digest)
    except DiffstillError:
        log.warning("%s: was changed since it was downloaded; downloaded again", path)
        return False
    return True


def _download(session: requests.Session, url: str, target: Path, digest: str, record: Record) -> None:
    """Fetch `url` to `target`, which appears only once it is whole and its content is verified."""
    with tempfile.TemporaryDirectory(prefix=".download.", dir=target.parent) as partial_folder:
        path = Path(partial_folder) / target.name
        _stream(session, url, path, record)
        try:
            read_idx(path, digest)
        except DiffstillError as error:
            raise DiffstillError(f"{url}: {str(error).removeprefix(f'{path}: ')}") from error
        path.replace(target)


def _stream(session: requests.Session, url: str, path: Path, record: Record) -> None:
    try:
        with session.get(url, stream=True, timeout=(10, 60), headers={"Accept-Encoding": "identity"}) as response:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0))
            with path.open("wb") as file, record.progress(f"download {path.name}", size, "B") as progress:
                # Undecoded: some servers declare a .gz file as gzip-encoded, and decoding would unpack it.
                for chunk in response.raw.stream(_CHUNK, decode_content=False):
                    file.write(chunk)
                    progress.update(len(chunk))
    except (requests.RequestException, HTTPError) as error:
        raise DiffstillError(f"{url}: cannot be downloaded ({error}); check `prepare.location`, or name a folder that has the files") from error


# --- the source that is a folder ---------------------------------------------------------------------------------


def _layout(root: Path) -> dict[str, str]:
    """Which sub-folder is which split: train/, and test/ and val/ where there are; the folder itself is train where there is none of them."""
    if not root.is_dir():
        raise DiffstillError(f"{root}: is no folder, but `prepare.location` names it; {LAYOUT}")
    has_test, has_val = (root / "test").is_dir(), (root / "val").is_dir()
    if not (root / "train").is_dir():
        found = _visible(root, folders=True)
        if not found:
            raise DiffstillError(f"{root}: holds no folder at all; {LAYOUT}")
        if has_test or has_val:
            raise DiffstillError(
                f"{root}: has a folder {'test' if has_test else 'val'}/ but no folder train/, it holds {_shortened(found)}; {LAYOUT}"
            )
        return {"train": ""}
    if has_val and not has_test:
        return {"train": "train", "test": "val"}
    return {"train": "train"} | ({"test": "test"} if has_test else {}) | ({"val": "val"} if has_val else {})


def _visible(place: Path, *, folders: bool) -> list[str]:
    """Sorted names in `place` that are not hidden: its folders, or everything else."""
    return sorted(entry.name for entry in place.iterdir() if not entry.name.startswith(".") and entry.is_dir() == folders)


def _class_folders(place: Path) -> dict[str, str]:
    """The folders in `place` by the class that each is of."""
    found: dict[str, str] = {}
    for folder in _visible(place, folders=True):
        if (name := composed(folder)) in found:
            raise DiffstillError(f"{place}: the class folders {found[name]!a} and {folder!a} are one name spelled in two ways; make them one")
        found[name] = folder
    return found


def _agreed_classes(root: Path, present: Mapping[str, Mapping[str, str]], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes to keep, which every split must have."""
    train = next(iter(present))
    classes = _chosen(wanted, list(present[train]), str(root / train))
    for name in classes:
        if name != os.fsencode(name).decode(errors="replace"):
            raise DiffstillError(f"{root}: the class folder {os.fsencode(name)!r} has a name that is not UTF-8; rename it")
        if wrong := flaw(name):
            raise DiffstillError(f"{root}: the class folder {name!r:.80} cannot be a class, its name {wrong}; rename it")
    for sub, names in present.items():
        for name in [*classes, *(names if wanted is None else ())]:
            if name not in names or name not in present[train]:
                has, lacks = (train, sub) if name not in names else (sub, train)
                raise DiffstillError(
                    f"{root}: class {name!r} is in {has}/ but not in {lacks}/; add it there, or list the classes to keep in `prepare.classes`"
                )
    return classes


def _list(
    root: Path,
    folders: Mapping[str, str],
    classes: tuple[str, ...],
    record: Record,
    present: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    *,
    deep: bool = False,
) -> _Listing:
    """The image files of all classes in all splits, by class and name. Names, sizes and times of change make the fingerprint.

    `present` has the folder of a class in each split, where that is not the class's name; `deep` looks into the folders in it.
    """
    names: list[str] = []
    counts: list[int] = []
    seen, left_out = hashlib.sha256(), []
    with record.progress("list", len(folders) * len(classes), "folder") as progress, _lifted_pillow_limit():
        for sub in folders.values():
            left_out += [Rejected(_joined(sub, name), "in no class folder") for name in _visible(root / sub, folders=False)]
            for name in classes:
                where = _joined(sub, present.get(sub, {}).get(name, name))
                images, others = _list_class(root / where, name, deep=deep)
                names += [f"{where}/{inside}" for inside in images]
                counts.append(len(images))
                left_out += [Rejected(f"{where}/{other}", reason) for other, reason in others.items()]
                seen.update("".join([f"{where}\n", *(_stamp(inside, file) for inside, file in images.items())]).encode(errors="surrogateescape"))
                progress.update()
    labels = np.repeat(np.tile(np.arange(len(classes)), len(folders)), counts)
    origin = np.repeat(np.repeat(list(folders), len(classes)), counts)
    return _Listing(classes, labels, origin, names, seen.hexdigest(), left_out)


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _list_class(place: Path, name: str, *, deep: bool) -> tuple[dict[str, os.DirEntry[str]], dict[str, str]]:
    """The image files of one class in one split, sorted by their path in it, and why each other file there is none."""
    images, others = {}, {}
    for inside, entry in sorted(_files_in(place, deep=deep), key=itemgetter(0)):
        if entry.is_dir():
            reason: str | None = "a link to a folder"
        else:
            reason = None if Path(entry.name).suffix.lower() in SUFFIXES else _no_image(entry)
        if reason is None:
            images[inside] = entry
        else:
            others[inside] = reason
    if not images:
        raise DiffstillError(
            f"{place}: class {name!r} has no image there ({', '.join(FORMATS)}{_also_there(others)}); add images, "
            "or list the classes to keep in `prepare.classes`"
        )
    return images, others


def _files_in(place: Path, prefix: str = "", *, deep: bool) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All that is not hidden in a folder and, where `deep`, in the folders in it, by its path; links to folders are not followed."""
    with os.scandir(place) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            if not deep:
                raise DiffstillError(
                    f"{place}: holds the folder {entry.name!r}, but images must lie directly in their class folder; move them up, or hide it"
                )
            yield from _files_in(place / entry.name, f"{prefix}{entry.name}/", deep=deep)
        else:
            yield f"{prefix}{entry.name}", entry


def _no_image(file: os.DirEntry[str]) -> str | None:
    """Why a file is no image, by its first bytes; None for an image."""
    if not file.is_file():
        return "not a file"
    try:
        with Image.open(file.path, formats=FORMATS):
            return None
    except _BAD_IMAGE as error:
        return _reason(error)


def _also_there(others: Collection[str]) -> str:
    return f"; {len(others)} other files, such as {min(others)!r}" if others else ""


def _stamp(inside: str, file: os.DirEntry[str]) -> str:
    """A line that changes when the file does; `inside` is its path in the folder of its class."""
    try:
        found = file.stat()
    except OSError:  # a link to nowhere, which reading will reject
        found = file.stat(follow_symlinks=False)
    return f"{inside}\0{found.st_size}\0{found.st_mtime_ns}\n"


# --- ImageNet's subsets ------------------------------------------------------------------------------------------


def _imagenet_root(location: str, record: Record) -> Path:
    """The folder with train/ and val/, unpacked from an archive if `location` names one."""
    path = Path(location).expanduser()
    root = _unpacked(location, record) if _is_url(location) or path.is_file() else path
    if not root.is_dir():
        raise DiffstillError(f"{root}: does not exist, but `prepare.location` names it; {IMAGENET_LAYOUT}")
    for sub in ("train", "val"):
        if not (root / sub).is_dir():
            held = _shortened([entry.name for entry in sorted(root.iterdir())])
            raise DiffstillError(f"{location}: has no folder {sub}/, it holds {held or 'nothing'}; {IMAGENET_LAYOUT}")
    flat = [name for name in _visible(root / "val", folders=False) if name.startswith(VALIDATION_IMAGE)]
    if flat:
        raise DiffstillError(
            f"{root}/val: holds {len(flat):,} images directly, such as {flat[0]}, where each class needs a folder; move every image into val/<wnid>/ "
            "(the list LOC_val_solution.csv of Kaggle's copy of ImageNet names the wnid of each, and the well-known script valprep.sh sorts them)"
        )
    return root


def _refuse_lacking(place: Path, classes: Sequence[str], source: str) -> None:
    lacking = [f"{name} ({title_of(name)})" for name in classes if not (place / name).is_dir()]
    if lacking:
        raise DiffstillError(
            f"{place}: lacks {len(lacking)} of the {len(classes)} classes of {source}: {_shortened(lacking)}; "
            "name a location that has them, or list the classes to keep in `prepare.classes`"
        )


def _provenance(root: Path, listing: _Listing) -> tuple[str, str | None]:
    """What the test split is, and what is wrong with it, by the names of the files."""
    validation = np.array([_is_validation_image(root, name) for name in listing.names])
    test = listing.origin == "test"
    if np.array_equal(validation, test):
        return "the folder val/, ImageNet's own validation images, as in the literature", None
    split = "the folder val/ of a re-split, as in fastai's archives: not the literature's, whose test images are ImageNet's validation images"
    seen, count = int((test & ~validation).sum()), int(test.sum())
    leakage = (
        f"{seen} of {count} test images ({seen / count:.0%}) are training images of ImageNet, which a generator pre-trained on ImageNet has seen: "
        "scores on them are too good, and not comparable with the literature's"
    )
    return split, leakage if seen else None


def _is_validation_image(root: Path, name: str) -> bool:
    _, wnid, file = name.split("/")
    if file.startswith(VALIDATION_IMAGE):
        return True
    if file.startswith(f"{wnid}_"):
        return False
    raise DiffstillError(
        f"{root}/{name}: its name does not tell whether it is one of ImageNet's training images ({wnid}_*) or validation images "
        f"({VALIDATION_IMAGE}*), so the split cannot be told; restore the original names, or use `source: folder`"
    )


def _unpacked(location: str, record: Record) -> Path:
    """The files of an archive, in the cache: whole or absent."""
    path = Path(location).expanduser()
    key = hashlib.sha256(location.encode()).hexdigest() if _is_url(location) else file_digest(path)
    unpacked = cache_folder() / "archives" / key[:16]
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    noted = unpacked.with_suffix(".sha256")
    with FileLock(unpacked.with_suffix(".lock")):
        if unpacked.is_dir() and not is_sealed(unpacked, noted):
            log.warning("%s: was changed since it was unpacked; unpacked again", unpacked)
            shutil.rmtree(unpacked)
        if not unpacked.is_dir():
            with tempfile.TemporaryDirectory(prefix=".unpacking.", dir=unpacked.parent) as scratch:
                if _is_url(location):
                    path = Path(scratch) / "archive.tgz"
                    with _session() as session:
                        _stream(session, location, path, record)
                _extract(path, location, Path(scratch) / "files", record)
                seal(Path(scratch) / "files", noted)
                (Path(scratch) / "files").rename(unpacked)
    inside = [entry for entry in unpacked.iterdir() if entry.is_dir()]
    return inside[0] if len(inside) == 1 else unpacked


def _extract(archive: Path, location: str, target: Path, record: Record) -> None:
    """Unpack a .tgz file. Raises `DiffstillError` if it is damaged, or holds anything that leads outside of `target`."""
    target.mkdir()
    size = archive.stat().st_size
    try:
        with archive.open("rb") as packed, gzip.open(packed) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            with record.progress(f"unpack {archive.name}", size, "B") as progress:
                done = 0
                for member in tar:
                    tar.extract(member, target, filter="data")
                    progress.update(packed.tell() - done)
                    done = packed.tell()
            while stream.read(_CHUNK):  # to the checksum at the end
                pass
    except tarfile.FilterError as error:
        raise DiffstillError(
            f"{location}: holds what no archive of images needs, nothing of it was kept ({error}); get it from its makers"
        ) from error
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DiffstillError(f"{location}: not a whole .tgz archive ({error}); fetch it anew") from error


# --- one image ---------------------------------------------------------------------------------------------------


def decode(path: Path, side: int, max_pixels: int) -> Image.Image:
    """The first frame of an image file, upright, centre-cropped to a square and resized to `side`, in mode L or RGB.

    The size is judged by the header, before decoding. Raises ValueError if it is nil or above `max_pixels`, and whatever
    Pillow raises on a malformed file.
    """
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if width * height == 0:
            raise ValueError(f"has no pixels ({width} x {height})")
        if width * height > max_pixels:
            raise ValueError(f"has {width} x {height} pixels, above `prepare.max_pixels` {max_pixels}")
        return _resized(_flattened(_square(_upright(image))), side)


def _upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF says. Of that the orientation alone is read: cameras and editors write other tags that are malformed."""
    image.load()  # which turns a TIFF
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _BAD_IMAGE:  # of no EXIF at all, like any viewer
        return image
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, side: int) -> Image.Image:
    """Bicubic with antialiasing; the same pixels where the size is right already."""
    return image.resize((side, side), Image.Resampling.BICUBIC)


def _flattened(image: Image.Image) -> Image.Image:
    """Any mode to L (from grey) or RGB (from colour and palettes); transparency is laid on white."""
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"has pixels of mode {image.mode}, whose range is unknown (save it with 8 or 16 bits)")
    mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


def _from_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, 65535 to 255; Pillow's own conversion clips at 255."""
    values = np.array(image, np.uint32)
    values[values == image.info.get("transparency", -1)] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
