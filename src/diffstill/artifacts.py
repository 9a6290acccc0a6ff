"""Typed folders: every stage writes one, every stage reads some.

An artifact is a folder with `manifest.json`: its kind, the configuration that made it, the digests of its inputs and
of its own files, and a few facts. No times, hosts or paths, so equal work gives equal bytes. A folder is written
beside its final place and renamed: a reader sees a whole artifact or none. `ancestors/<digest>.json` are the manifests
of its inputs, of their inputs and so on: whoever has the folder has its whole lineage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Literal, Self, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from diffstill.config import Section
from diffstill.environment import maker
from diffstill.errors import DiffstillError
from diffstill.names import is_inside, is_name

log = logging.getLogger("diffstill")
Kind = Literal["images", "generator", "latents", "denoiser", "distilled", "scores", "report", "card"]
Array = npt.NDArray[Any]
Item = TypeVar("Item")
SCHEMA: Literal[1] = 1
MANIFEST = "manifest.json"
ANCESTORS = "ancestors"
DESKTOP_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
"""What file browsers leave in folders that they show; no part of an artifact."""


class Manifest(BaseModel):
    """What an artifact says of itself. `files` maps relative paths to SHA-256."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    schema_version: Literal[1] = SCHEMA
    config: dict[str, Any]
    inputs: dict[str, str]
    facts: dict[str, Any]
    files: dict[str, str]

    @model_validator(mode="after")
    def _leads_nowhere_else(self) -> Self:
        """Files, classes, students, seeds and digests become paths, wherever an artifact is used: no manifest has others than these."""
        single = {name: self.facts[name] for name in ("classes", "students", "sources", "source") if name in self.facts}
        for what, found in ({"inputs": list(self.inputs)} | single).items():
            for name in found if isinstance(found, list) else [found]:
                if not is_name(name):
                    raise ValueError(f"names {name!r:.80} in `{what}`, which is no name of a file or folder")
        for name in self.files:
            if not is_inside(name):
                raise ValueError(f"names {name!r:.80} in `files`, which is no path of a file in its folder")
        if wrong := [digest for digest in self.inputs.values() if not is_digest(digest)]:
            raise ValueError(f"names {wrong[0]!r:.80} in `inputs`, which is no SHA-256")
        seeds = self.facts.get("seeds", [])
        if not isinstance(seeds, list) or any(type(seed) is not int for seed in seeds):
            raise ValueError(f"names {seeds!r:.80} in `seeds`, which are no whole numbers")
        return self

    def text(self) -> str:
        """The bytes of `manifest.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Artifact:
    """A whole, verified artifact."""

    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and through it of every file."""
        return hashlib.sha256(self.manifest.text().encode()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """Counts, class names and the like, by kind."""
        return self.manifest.facts


@dataclass
class Draft:
    """An artifact being written: put files into `folder`, facts into `facts`."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)


def is_digest(text: str) -> bool:
    """Whether it is a SHA-256 in hexadecimal, as folders of the cache and kept ancestors are named."""
    return bool(re.fullmatch("[0-9a-f]{64}", text))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, at: Path) -> None:
    """Note at `at`, outside of `folder`, what its files are."""
    at.write_text(_tree_digest(folder))


def is_sealed(folder: Path, at: Path) -> bool:
    """Whether the files of `folder` are those that `seal` noted at `at`."""
    return at.is_file() and at.read_text(errors="replace") == _tree_digest(folder)


def _tree_digest(folder: Path) -> str:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in DESKTOP_LITTER)
    with ThreadPoolExecutor() as threads:
        named = zip([path.relative_to(folder).as_posix() for path in paths], threads.map(file_digest, paths), strict=True)
        return hashlib.sha256(json.dumps(list(named)).encode()).hexdigest()


def read_manifest(folder: Path, kind: Kind) -> Artifact:
    """The artifact at `folder` without verifying its files. Raises `DiffstillError` on another kind, schema or no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no manifest.json, so it is no artifact" if folder.is_dir() else "does not exist"
        raise DiffstillError(f"{folder}: {what}; expected the `{kind}` artifact; run the stage that makes it first")
    try:
        raw = json.loads(path.read_text())
        found = raw.get("kind") if isinstance(raw, dict) else None
        if found != kind:
            raise DiffstillError(f"{folder}: holds a `{found}` artifact where `{kind}` is expected; pass the `{kind}` folder")
        return Artifact(folder, Manifest.model_validate(raw))
    except ValidationError as error:
        raise DiffstillError(f"{path}: not a manifest of schema {SCHEMA} ({_told(error)}); remove {folder} and run its stage again") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DiffstillError(
            f"{path}: not a manifest of schema {SCHEMA} ({type(error).__name__}); remove {folder} and run its stage again"
        ) from error


def _told(error: ValidationError) -> str:
    """What is wrong first."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": Value error, ")


def open_artifact(folder: Path, kind: Kind, *, shard: bool = False) -> Artifact:
    """Open and verify: right kind, every file present and of its digest, none added; with `shard`, one shard of it, else the whole.

    Raises `DiffstillError` naming the file.
    """
    artifact = read_manifest(folder, kind)
    if ("shard" in artifact.facts) != shard:
        held = f"only shard {artifact.facts['shard']} of" if not shard else "no shard but the whole of"
        raise DiffstillError(f"{folder}: holds {held} a `{kind}` artifact; `--parts` takes shards and gathers them, everything else takes the whole")
    listed = artifact.manifest.files
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name not in DESKTOP_LITTER} - {MANIFEST}
    with ThreadPoolExecutor() as threads:
        digests = threads.map(file_digest, [folder / name for name in sorted(listed.keys() & present)])
        for name in sorted(listed.keys() | present):
            path = folder / name
            if name not in present:
                raise DiffstillError(
                    f"{path}: listed in the manifest but missing; remove {folder} and make the `{kind}` artifact anew (`diffstill run`)"
                )
            if name not in listed:
                raise DiffstillError(
                    f"{path}: not listed in the manifest; remove it, or remove {folder} and make the `{kind}` artifact anew (`diffstill run`)"
                )
            if next(digests) != listed[name]:
                raise DiffstillError(
                    f"{path}: content differs from the digest in its manifest; remove {folder} and make the `{kind}` artifact anew (`diffstill run`)"
                )
    return artifact


@contextmanager
def new_artifact(folder: Path, kind: Kind, config: Section, inputs: Mapping[str, Artifact]) -> Iterator[Draft]:
    """Write an artifact in a `with` block; it appears at `folder` whole when the block ends well, and not at all otherwise.

    An earlier `kind` at `folder` stays until then and is replaced. Raises `DiffstillError` if `folder` holds anything else.
    """
    refuse_foreign(folder, kind)
    refuse_overlap(folder, {name: artifact.folder for name, artifact in inputs.items()})
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Draft(Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)))
    try:
        yield draft
        _keep_ancestors(draft.folder / ANCESTORS, inputs.values())
        paths = [path for path in draft.folder.rglob("*") if path.is_file()]
        with ThreadPoolExecutor() as threads:
            files = {path.relative_to(draft.folder).as_posix(): digest for path, digest in zip(paths, threads.map(file_digest, paths), strict=True)}
        digests = {name: artifact.digest for name, artifact in inputs.items()}
        try:
            manifest = Manifest(kind=kind, config=config.plain(), inputs=digests, facts=draft.facts, files=dict(sorted(files.items())))
        except ValidationError as error:
            raise DiffstillError(f"{folder}: the manifest {_told(error)}; mend what it is made from") from error
        (draft.folder / MANIFEST).write_text(manifest.text())
        open_as_usual(draft.folder)
        _replace(draft.folder, folder)
    finally:
        shutil.rmtree(draft.folder, ignore_errors=True)


def open_as_usual(folder: Path) -> None:
    """Give a folder and all in it the modes of newly made ones, as the umask has them: safetensors and `mkdtemp` write for their owner alone."""
    new = folder / ".new"
    new.mkdir()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.rmdir()
    for path in (folder, *folder.rglob("*")):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def _keep_ancestors(kept: Path, inputs: Iterable[Artifact]) -> None:
    for artifact in inputs:
        kept.mkdir(exist_ok=True)
        (kept / f"{artifact.digest}.json").write_text(artifact.manifest.text())
        for path in sorted((artifact.folder / ANCESTORS).glob("*.json")):
            shutil.copyfile(path, kept / path.name)


def ancestors(artifact: Artifact) -> dict[str, Manifest]:
    """The manifests that an artifact descends from, by digest. Raises `DiffstillError` naming one that is damaged or lacking."""
    found: dict[str, Manifest] = {}
    waiting = sorted(artifact.manifest.inputs.values())
    while waiting:
        digest = waiting.pop()
        if digest not in found:
            found[digest] = _ancestor(artifact.folder / ANCESTORS / f"{digest}.json")
            waiting += sorted(found[digest].inputs.values())
    return found


def _ancestor(path: Path) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise DiffstillError(f"{path}: missing, so the lineage has a gap; make the artifact anew with this version of diffstill") from error
    except ValidationError as error:
        raise DiffstillError(f"{path}: not a manifest of schema {SCHEMA} ({_told(error)}); make the artifact anew") from error
    if hashlib.sha256(manifest.text().encode()).hexdigest() != path.stem:
        raise DiffstillError(f"{path}: has another digest than its name says; make the artifact anew")
    return manifest


def refuse_foreign(folder: Path, kind: Kind | None = None) -> None:
    """Raise `DiffstillError` if `folder` holds anything but an artifact (of that kind), so that a mistyped path destroys nothing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    found = _kind_at(folder)
    if found is None:
        raise DiffstillError(f"{folder}: exists and is not an artifact; refusing to replace it, remove it or choose another output folder")
    if kind not in (None, found):
        raise DiffstillError(f"{folder}: holds a `{found}` artifact; refusing to replace it by `{kind}`, remove it or choose another output folder")


def refuse_overlap(output: Path | str, inputs: Mapping[str, Path | str]) -> None:
    """Raise `DiffstillError` if the output is an input, lies in one or holds one, links followed: writing the one would ruin the other."""
    target = _resolved(output)
    for name, given in inputs.items():
        place = _resolved(given)
        if target == place or place in target.parents or target in place.parents:
            how = "is" if target == place else "lies inside" if place in target.parents else "holds"
            raise DiffstillError(
                f"{output}: the output {how} the input `{name}` ({given}), which would be ruined; choose another place for the output"
            )


def _resolved(place: Path | str) -> PurePath:
    """Where it lies, without links; a place in a store as it is written."""
    return PurePosixPath(place) if isinstance(place, str) and "://" in place else Path(place).expanduser().resolve()


def _kind_at(folder: Path) -> str | None:
    """The kind that the manifest names, of whatever schema; None without a manifest of ours."""
    try:
        raw = json.loads((folder / MANIFEST).read_text())
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return None
    known = isinstance(raw, dict) and "schema_version" in raw and raw.get("kind") in get_args(Kind)
    return str(raw["kind"]) if known else None


def _replace(new: Path, folder: Path) -> None:
    """Move `new` to `folder`. An earlier artifact steps aside and comes back if that fails or is interrupted."""
    if not folder.exists():
        new.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent)) / folder.name
    try:
        folder.rename(aside)
        new.rename(folder)
    finally:
        if not folder.exists():
            aside.rename(folder)
        shutil.rmtree(aside.parent)


def write_shards(folder: Path, prefix: str, arrays: Mapping[str, Array], shard_size: int, first: int = 0) -> None:
    """Cut equally long `arrays` along their first axis into `<prefix>-00000.safetensors`, ... of `shard_size` rows, numbered from `first`."""
    rows = len(next(iter(arrays.values())))
    for number, start in enumerate(range(0, rows, shard_size), first):
        part = {name: np.ascontiguousarray(array[start : start + shard_size]) for name, array in arrays.items()}
        save_file(part, folder / f"{prefix}-{number:05d}.safetensors")


def _shards(folder: Path, prefix: str) -> list[Path]:
    paths = sorted(folder.glob(f"{prefix}-[0-9]*.safetensors"), key=lambda path: (len(path.name), path.name))  # 100000 comes after 99999
    if not paths:
        raise DiffstillError(f"{folder}: has no shard {prefix}-*.safetensors; make the artifact anew")
    return paths


def read_shards(folder: Path, prefix: str) -> dict[str, Array]:
    """The arrays that `write_shards` cut, joined again. Raises `DiffstillError` if there are none."""
    parts = [load_file(path) for path in _shards(folder, prefix)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def load_split(images: Artifact, split: str) -> tuple[Array, npt.NDArray[np.int64]]:
    """One split of an `images` artifact: pixels (N, channels, side, side) uint8, labels (N,) int64."""
    arrays = read_shards(images.folder, split)
    return arrays["pixels"], arrays["labels"]


class Rows:
    """One array of a split in shards, read as far as it is asked for: `rows[10:20]`, `rows[numbers]`; never the whole of it."""

    def __init__(self, folder: Path, prefix: str, name: str) -> None:
        self._paths, self._name = _shards(folder, prefix), name
        shapes = []
        for path in self._paths:
            with safe_open(path, framework="numpy") as file:
                shapes.append(file.get_slice(name).get_shape())
        self._starts = np.cumsum([0, *(shape[0] for shape in shapes)])
        self.shape: tuple[int, ...] = (int(self._starts[-1]), *shapes[0][1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: slice | npt.NDArray[np.int64]) -> Array:
        """Those rows, in the order asked for. Neighbours are read at once."""
        numbers = np.arange(len(self))[wanted]
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        cuts = np.flatnonzero((np.diff(numbers) != 1) | (np.diff(shards) != 0)) + 1
        runs = [(int(shards[run[0]]), int(numbers[run[0]]), len(run)) for run in np.split(np.arange(len(numbers)), cuts) if len(run)]
        parts = [self._run(*run) for run in runs] or [self._run(0, 0, 0)]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _run(self, shard: int, first: int, count: int) -> Array:
        start = first - int(self._starts[shard])
        with safe_open(self._paths[shard], framework="numpy") as file:
            run: Array = file.get_slice(self._name)[start : start + count]
        return run


def read_ahead(items: Generator[Item]) -> Generator[Item]:
    """The items, each made in a background thread while the one before it is used."""
    with closing(items), ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item


def to_unit(pixels: Array) -> npt.NDArray[np.float32]:
    """uint8 0..255 to float32 -1..1, as the autoencoder takes them. Inverse of `to_pixels`."""
    return pixels.astype(np.float32) / 127.5 - 1.0


def to_pixels(unit: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Float -1..1 (clipped) to uint8 0..255. Inverse of `to_unit`."""
    return np.rint((unit.clip(-1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def work_root() -> Path:
    """Where processes keep what is no artifact: `$DIFFSTILL_WORK`, by default `.diffstill/work` in the current folder."""
    return Path(os.environ.get("DIFFSTILL_WORK", ".diffstill/work"))


def cache_folder() -> Path:
    """Where downloads are kept: `$DIFFSTILL_CACHE`, or `~/.cache/diffstill`."""
    root = os.environ.get("DIFFSTILL_CACHE")
    return Path(root) if root else Path.home() / ".cache" / "diffstill"


class WorkFolder:
    """Where a long stage keeps what a killed run goes on from: outside its outputs, one folder per configuration and inputs.

    Lies under `work_root()`. Every file and line carries a digest of its content and a key of what made it: stage,
    settings, inputs, code, kind of device, number of processes. What is damaged or has another key counts as absent,
    with one line in the log, so that it is made again.
    """

    def __init__(
        self,
        stage: str,
        config: Section,
        inputs: Mapping[str, Artifact],
        *more: str,
        device: str = "cpu",
        wait: bool = False,
    ) -> None:
        work = json.dumps([config.canonical(), {name: artifact.digest for name, artifact in sorted(inputs.items())}, more])
        self.folder = work_root() / f"{stage}-{_short_digest(work)}"
        self._key = _short_digest(f"{self.folder.name} {maker(device)}")
        self._lock = FileLock(self.folder.with_suffix(".lock"), timeout=0)
        self._told: set[str] = set()
        self._wait = wait

    def __enter__(self) -> Self:
        """Keep other processes out; where one is at work on the same thing, raise `DiffstillError` or wait for it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        busy = f"{self.folder}: another diffstill is at work on this very step"
        try:
            self._lock.acquire()
        except Timeout as error:
            if not self._wait:
                raise DiffstillError(f"{busy}; wait until it has finished") from error
            log.warning("%s; waiting until it has finished", busy)
            self._lock.acquire(timeout=-1)
        return self

    def __exit__(self, *_error: object) -> None:
        self._lock.release()

    def save(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Atomically keep named arrays under `name`; what was kept there before stays until then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.{os.getpid()}.partial"
        # safetensors ignores strides
        save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # before the file in whose place it comes is gone
        before = self._files(name)
        # The seal is in the name and not in the file, whose bytes `place` makes part of an artifact.
        kept = self.folder / f"{name}.{self._key}.{file_digest(partial)}.safetensors"
        partial.replace(kept)
        for path in before:
            if path != kept:
                path.unlink()

    def load(self, name: str) -> dict[str, Array] | None:
        """What `save` kept under `name`; None without it, or where it is damaged or of another key."""
        kept = self._whole(name)
        return load_file(kept) if kept else None

    def holds(self, name: str) -> bool:
        """Whether `load` would give something."""
        return self._whole(name) is not None

    def place(self, name: str, folder: Path) -> None:
        """Put what `save` kept under `name` into `folder` as `<name>.safetensors`: linked, or a copy where that cannot be."""
        (kept,) = (path for path in self._files(name) if path.name.split(".")[1] == self._key)
        placed = folder / f"{name}.safetensors"
        try:
            placed.hardlink_to(kept)
        except OSError:
            shutil.copyfile(kept, placed)

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add one line to `<name>.jsonl`, flushed to disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps({"key": self._key, "line": line, "sha256": self._line_digest(line)}, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of `<name>.jsonl` but those that are damaged or of another key; a last one cut off by a kill is dropped."""
        path = self.folder / f"{name}.jsonl"
        text = path.read_text(errors="replace") if path.is_file() else ""
        whole = text[: text.rfind("\n") + 1].splitlines(keepends=True)
        kept = {line: value for line in whole if (value := self._line(path, line)) is not None}
        if text != "".join(kept):
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(path)
        return list(kept.values())

    def clear(self) -> None:
        """Forget everything: the artifact is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self, name: str) -> list[Path]:
        """All that is kept under a name, the newest first: a kill may leave the one before it, too."""
        found = self.folder.glob(f"{name}.*safetensors")
        return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def _whole(self, name: str) -> Path | None:
        for path in self._files(name):
            _, *seal, _ = path.name.split(".")
            if not seal or seal[0] != self._key:
                self._tell_foreign()
            elif seal[1:] != [file_digest(path)]:
                self._tell(f"{path}: damaged, its digest is another; made again")
            else:
                return path
        return None

    def _line(self, path: Path, line: str) -> dict[str, Any] | None:
        try:
            found = json.loads(line)
            value: dict[str, Any] = found["line"]
            if found["key"] != self._key:
                self._tell_foreign()
                return None
            if found["sha256"] == self._line_digest(value):
                return value
        except (ValueError, KeyError, TypeError):
            pass
        self._tell(f"{path}: a line is damaged, its digest is another; what it stood for is made again")
        return None

    def _line_digest(self, line: Mapping[str, Any]) -> str:
        return hashlib.sha256(f"{self._key}{json.dumps(line, sort_keys=True)}".encode()).hexdigest()

    def _tell_foreign(self) -> None:
        why = "made by other code, on another kind of device or by another number of processes"
        self._tell(f"{self.folder}: holds work {why}; made again")

    def _tell(self, what: str) -> None:
        if what not in self._told:
            log.warning("%s", what)
        self._told.add(what)


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
