"""Sources of real images: read, checked, centre-cropped, resized and split into train, val and test.

Every source ends in the same `Dataset`. Arrays are uint8 of shape (N, channels, side, side), labels are positions in
`Dataset.classes`. Nothing here depends on the order in which a file system lists its files.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import requests
from PIL import Image, ImageOps, UnidentifiedImageError
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError
from urllib3.util import Retry

from diffstill.artifacts import cache_folder
from diffstill.config import PrepareConfig
from diffstill.errors import DiffstillError
from diffstill.record import Record, ignore

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SPLITS = ("train", "val", "test")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
LAYOUT = "expected <location>/train/<class>/<image>, and optionally test/ and val/ laid out like train/"

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
_CHUNK = 1 << 20
_SHOWN = 5


@dataclass(frozen=True)
class Split:
    """Images of one split: pixels (N, channels, side, side) uint8, labels (N,) int64."""

    pixels: Pixels
    labels: Labels


@dataclass(frozen=True)
class Rejected:
    """A file that is no readable image: its name relative to the location, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Real images ready to use. `splits` has train, val and test; `division` says in words how they came about."""

    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    division: str
    rejected: tuple[Rejected, ...] = ()
    ignored: int = 0

    def counts(self) -> dict[str, dict[str, int]]:
        """Images by split and class name."""
        return {name: {label: int((split.labels == i).sum()) for i, label in enumerate(self.classes)} for name, split in self.splits.items()}

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return int(self.splits["train"].pixels.shape[1])


@dataclass(frozen=True)
class _Pool:
    """All images of a source before the split. `origin` (N,) is the split each lies in; `brought` describes those that come with the data."""

    pixels: Pixels
    labels: Labels
    origin: npt.NDArray[np.str_]
    classes: tuple[str, ...]
    brought: Mapping[str, str]


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    origin: str
    label: int


def load(config: PrepareConfig, record: Record = ignore) -> Dataset:
    """Read the source that `config` names. Raises `DiffstillError` naming the file, class or knob that is wrong."""
    location = config.location or ""
    downloads = config.source == "fashion-mnist" and _is_url(location)
    if "://" in location and config.source != "digits" and not downloads:
        scheme = location.partition("://")[0]
        raise DiffstillError(
            f"`prepare.location` {location!r}: source {config.source} does not read {scheme}://; name a folder, s3://<bucket>/<prefix> or a DVC repository"
        )
    return {"digits": digits, "fashion-mnist": fashion_mnist, "folder": folder}[config.source](config, record)


def digits(config: PrepareConfig, record: Record = ignore) -> Dataset:
    """The 1,797 grey 8x8 digits inside scikit-learn, values 0..16 spread over 0..255."""
    from sklearn.datasets import load_digits

    if config.location is not None:
        raise DiffstillError(f"`prepare.location` is {config.location!r}, but the digits lie inside scikit-learn; set it to null")
    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    raw = _Pool(grey[:, None], bunch.target, np.full(len(grey), "train"), DIGITS_CLASSES, {})
    return _dataset(_selected(raw, config, record), config)


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
    raw = _Pool(grey[:, None], labels.astype(np.int64), origin, FASHION_CLASSES, brought)
    return _dataset(_selected(raw, config, record), config)


def folder(config: PrepareConfig, record: Record = ignore) -> Dataset:
    """Images in `config.location`/train/<class>/, optionally with test/ and val/ beside; val/ alone serves as test, as in ImageNet-like trees.

    Unreadable files are listed in `Dataset.rejected`; above `config.max_bad_fraction` of all files they are an error.
    """
    if config.location is None:
        raise DiffstillError(f"`prepare.location` is null, but `source: folder` needs the folder of the images; {LAYOUT}")
    root = Path(config.location).expanduser()
    folders = _layout(root)
    classes = _agreed_classes(root, folders, config.classes)
    listings = [_list_class(root, origin, sub, name, label) for origin, sub in folders.items() for label, name in enumerate(classes)]
    files = [file for listed, _ in listings for file in listed]
    ignored = sum(others for _, others in listings) + sum(len(_visible(root / sub, folders=False)) for sub in folders.values())
    brought = {origin: f"the folder {sub}/" for origin, sub in folders.items() if origin != "train"}
    pixels, kept, rejected = _decode_all(files, config, record)
    _refuse_many_bad(root, rejected, len(files), config)
    labels, origins = np.array([file.label for file in kept], np.int64), np.array([file.origin for file in kept], "<U5")
    return _dataset(_Pool(pixels, labels, origins, classes, brought), config, rejected, ignored)


# --- from images to splits ---------------------------------------------------------------------------------------


def _dataset(pool: _Pool, config: PrepareConfig, rejected: tuple[Rejected, ...] = (), ignored: int = 0) -> Dataset:
    assigned = divide(pool.labels, pool.origin, pool.classes, tuple(pool.brought), config)
    splits = {name: Split(pool.pixels[assigned == name], pool.labels[assigned == name]) for name in SPLITS}
    return Dataset(pool.classes, splits, _describe(pool.brought, config), rejected, ignored)


def divide(
    labels: Labels, origin: npt.NDArray[np.str_], classes: Sequence[str], brought: Sequence[str], config: PrepareConfig
) -> npt.NDArray[np.str_]:
    """The split (N,) of each image: `brought` splits stay as `origin` has them, the others are cut from each class of train.

    Cut first test, then val as a share of the rest; every cut takes at least one image and leaves at least one to those after it.
    Which images are cut depends on the seed, the class name and the size of the class alone, so not on `prepare.classes`.
    """
    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    cuts = {name: fraction for name, fraction in fractions.items() if name not in brought}
    assigned = origin.copy()
    for label, name in enumerate(classes):
        for split in brought:
            if not np.any((labels == label) & (origin == split)):
                raise DiffstillError(f"class {name!r} has no readable image for {split}; add some, or leave the class out with `prepare.classes`")
        members = np.flatnonzero((labels == label) & (origin == "train"))
        _refuse_few(name, len(members), cuts)
        order = np.random.default_rng([config.seed, *os.fsencode(name)]).permutation(members)
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


# --- sources that are arrays: digits, fashion-mnist --------------------------------------------------------------


def _selected(raw: _Pool, config: PrepareConfig, record: Record) -> _Pool:
    """The wanted classes of a grey source, relabelled in the wanted order, at the wanted side and channels."""
    classes = _chosen(config.classes, raw.classes, config.source)
    positions = np.array([classes.index(name) if name in classes else -1 for name in raw.classes], np.int64)
    labels = positions[raw.labels]
    keep = labels >= 0
    grey = _resize_all(raw.pixels[keep, 0], config.side, record)
    pixels = np.repeat(grey[:, None], config.channels or 1, axis=1)
    return _Pool(pixels, labels[keep], raw.origin[keep], classes, raw.brought)


def _resize_all(grey: Pixels, side: int, record: Record) -> Pixels:
    with record.progress("prepare", len(grey), "img") as progress:
        if grey.shape[1:] == (side, side):
            progress.update(len(grey))
            return grey
        resized = np.empty((len(grey), side, side), np.uint8)
        for i, image in enumerate(grey):
            resized[i] = np.asarray(_resized(Image.fromarray(image), side))
            progress.update()
    return resized


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


def _download_all(prefix: str, digests: Mapping[str, str], record: Record) -> Path:
    """Fetch the files below `prefix` that the cache lacks; the cache folder."""
    cache = cache_folder() / "fashion-mnist"
    cache.mkdir(parents=True, exist_ok=True)
    retry = Retry(total=4, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504))
    with requests.Session() as session:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        for name, digest in digests.items():
            if not (cache / name).is_file():
                _download(session, f"{prefix.rstrip('/')}/{name}", cache / name, digest, record)
    return cache


def _download(session: requests.Session, url: str, target: Path, digest: str, record: Record) -> None:
    """Fetch `url` to `target`, which appears only once it is whole and its content is verified."""
    with tempfile.TemporaryDirectory(prefix=".download.", dir=target.parent) as partial:
        path = Path(partial) / target.name
        try:
            _stream(session, url, path, record)
        except (requests.RequestException, HTTPError) as error:
            raise DiffstillError(f"{url}: cannot be downloaded ({error}); check `prepare.location`, or name a folder that has the files") from error
        try:
            read_idx(path, digest)
        except DiffstillError as error:
            raise DiffstillError(f"{url}: {str(error).removeprefix(f'{path}: ')}") from error
        path.replace(target)


def _stream(session: requests.Session, url: str, path: Path, record: Record) -> None:
    with session.get(url, stream=True, timeout=(10, 60), headers={"Accept-Encoding": "identity"}) as response:
        response.raise_for_status()
        size = int(response.headers.get("Content-Length", 0))
        with path.open("wb") as file, record.progress(f"download {path.name}", size, "B") as progress:
            # Undecoded: some servers declare a .gz file as gzip-encoded, and decoding would unpack it.
            for chunk in response.raw.stream(_CHUNK, decode_content=False):
                file.write(chunk)
                progress.update(len(chunk))


# --- the source that is a folder ---------------------------------------------------------------------------------


def _layout(root: Path) -> dict[str, str]:
    """Which sub-folder is which split: train/, and test/ and val/ where there are."""
    if not root.is_dir():
        raise DiffstillError(f"{root}: is no folder, but `prepare.location` names it; {LAYOUT}")
    if not (root / "train").is_dir():
        found = _visible(root, folders=True)
        hint = f"it holds {_shortened(found)} instead (class folders belong inside train/)" if found else "it holds no folder at all"
        raise DiffstillError(f"{root}: has no folder train/; {hint}; {LAYOUT}")
    has_test, has_val = (root / "test").is_dir(), (root / "val").is_dir()
    if has_val and not has_test:
        return {"train": "train", "test": "val"}
    return {"train": "train"} | ({"test": "test"} if has_test else {}) | ({"val": "val"} if has_val else {})


def _visible(place: Path, *, folders: bool) -> list[str]:
    """Sorted names in `place` that are not hidden: its folders, or everything else."""
    return sorted(entry.name for entry in place.iterdir() if not entry.name.startswith(".") and entry.is_dir() == folders)


def _agreed_classes(root: Path, folders: Mapping[str, str], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes to keep, which every split must have."""
    present = {sub: _visible(root / sub, folders=True) for sub in folders.values()}
    classes = _chosen(wanted, present["train"], f"{root}/train")
    for name in classes:
        if name != os.fsencode(name).decode(errors="replace"):
            raise DiffstillError(f"{root}: the class folder {os.fsencode(name)!r} has a name that is not UTF-8; rename it")
    for sub, names in present.items():
        for name in [*classes, *(names if wanted is None else ())]:
            if name not in names or name not in present["train"]:
                has, lacks = ("train", sub) if name not in names else (sub, "train")
                raise DiffstillError(
                    f"{root}: class {name!r} is in {has}/ but not in {lacks}/; add it there, or list the classes to keep in `prepare.classes`"
                )
    return classes


def _list_class(root: Path, origin: str, sub: str, name: str, label: int) -> tuple[list[_File], int]:
    """The image files of one class in one split, sorted by name, and how many other files lie beside them."""
    place = root / sub / name
    nested = _visible(place, folders=True)
    if nested:
        raise DiffstillError(
            f"{place}: holds the folder {nested[0]!r}, but images must lie directly in their class folder; move them up, or hide it; {LAYOUT}"
        )
    entries = _visible(place, folders=False)
    images = [entry for entry in entries if Path(entry).suffix.lower() in SUFFIXES]
    if not images:
        raise DiffstillError(
            f"{place}: class {name!r} has no image there (suffixes {' '.join(sorted(SUFFIXES))}); add images, "
            "or list the classes to keep in `prepare.classes`"
        )
    return [_File(place / image, f"{sub}/{name}/{image}", origin, label) for image in images], len(entries) - len(images)


def _decode_all(files: Sequence[_File], config: PrepareConfig, record: Record) -> tuple[Pixels, list[_File], tuple[Rejected, ...]]:
    """Pixels and files of the readable images, and the rest. One full-size image is in memory at a time."""
    pixels = np.empty((len(files), config.channels or 3, config.side, config.side), np.uint8)
    kept: list[_File] = []
    rejected: list[Rejected] = []
    all_grey = True
    with record.progress("prepare", len(files), "img") as progress, _lifted_pillow_limit():
        for file in files:
            try:
                image = decode(file.path, config.side, config.max_pixels)
            except _BAD_IMAGE as error:
                rejected.append(Rejected(file.name, _reason(error)))
            else:
                all_grey &= image.mode == "L"
                pixels[len(kept)] = _planes(image, pixels.shape[1])
                kept.append(file)
            progress.update()
    grey = config.channels is None and all_grey
    return pixels[: len(kept), : 1 if grey else None], kept, tuple(rejected)


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


def _refuse_many_bad(root: Path, rejected: Sequence[Rejected], total: int, config: PrepareConfig) -> None:
    if len(rejected) / total > config.max_bad_fraction:
        shown = "; ".join(f"{bad.file}: {bad.reason}" for bad in rejected[:_SHOWN])
        more = f"; and {len(rejected) - _SHOWN} more" if len(rejected) > _SHOWN else ""
        raise DiffstillError(
            f"{root}: {len(rejected)} of {total} image files cannot be used, above `prepare.max_bad_fraction` {config.max_bad_fraction:g} "
            f"({shown}{more}); remove these files or raise `prepare.max_bad_fraction`"
        )


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
        return _resized(_flattened(_square(ImageOps.exif_transpose(image))), side)


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
