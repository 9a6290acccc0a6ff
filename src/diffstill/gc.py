"""What piles up, and its removal: sets in a store that no version names, downloads that nobody uses, work that nobody goes on with.

First everything is listed, then the registries are asked what their versions name, then what is left and has long been idle is garbage. Right before
each removal all of that is looked at again. Where a registry does not answer nothing is removed. Artifacts of a chain are never touched.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock, Timeout
from pydantic import ValidationError
from rich.filesize import decimal

from diffstill import storage
from diffstill.artifacts import MANIFEST, Kind, Manifest, WorkFolder, cache_folder, read_manifest, work_root
from diffstill.config import Params
from diffstill.errors import DiffstillError
from diffstill.html import plural
from diffstill.plan import STAGES, Step, chain
from diffstill.record import Record, ignore
from diffstill.registry import STORED, Registry
from diffstill.tracking import OFF, registry_uri

SHORTEST = timedelta(hours=1)
"""A publisher may take as long between its upload and its registration."""
NAMED = "named by a version"
YOUNG = "not idle long enough"
IN_USE = "in use by a process"
CURRENT = "where a step of this chain would go on"
FOREIGN = "not made by `diffstill publish` alone"
CACHED: Mapping[str, str] = {
    **dict.fromkeys((*get_args(Kind), "s3"), r"[0-9a-f]{64}"),
    "dvc": r"[0-9a-f]{32}(\.dir)?",
    "archives": r"[0-9a-f]{16}",
    "hub": r"(models|datasets)--.+",
}
"""The folders of the cache, and the names that their entries have. `fashion-mnist` is an entry itself."""
ASIDE = ".removing"
ARTIFACT = rf"{'|'.join(get_args(Kind))}|untuned|(real|distilled|untuned)-.+?|[0-9a-f]{{16}}"
"""The folders of a chain and of its scores, and those on their way to a store."""
DRAFT = re.compile(rf"\.(?P<name>{ARTIFACT})(?P<old>\.old)?\.[a-z0-9_]{{8}}({re.escape(ASIDE)})?")
"""What a killed stage leaves beside its output, as `new_artifact` names it, and a killed removal of that."""
NOUNS = {
    **{kind: kind for kind in get_args(Kind)},
    "distilled": "distilled set",
    "parts": "unfinished upload",
    "cache": "download",
    "work": "work folder",
    "draft": "draft",
    "locks": "group of lock files",
}
"""What a kind of garbage is called."""
LOCK = re.compile(r"\.?([a-z]+-)?[0-9a-f]{16,64}(\.dir)?\.lock")


@dataclass(frozen=True)
class Garbage:
    """Something that nobody needs: `remove` takes it away, or says why it was spared after all."""

    kind: str
    place: str
    files: int
    size: int
    idle: timedelta
    why: str
    remove: Callable[[], str | None] = field(repr=False, compare=False)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        idle = None if self.idle == timedelta.max else int(self.idle.total_seconds())
        return {"kind": self.kind, "place": self.place, "files": self.files, "bytes": self.size, "idle_seconds": idle, "why": self.why}


@dataclass(frozen=True)
class Survey:
    """What was found in one place: garbage, and how many things are kept for which reason. `doubt` says why it must not be believed as it is."""

    garbage: tuple[Garbage, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)
    doubt: str | None = None

    def __add__(self, other: Survey) -> Survey:
        """Both together."""
        return Survey(self.garbage + other.garbage, Counter(self.kept) + Counter(other.kept), self.doubt or other.doubt)


@dataclass
class _Sorting:
    """Sorts what is found into garbage and what is kept."""

    garbage: list[Garbage] = field(default_factory=list)
    kept: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str | None, found: Garbage) -> None:
        """Keep it for a reason, or not."""
        if reason is None:
            self.garbage.append(found)
        else:
            self.kept[reason] += 1

    def survey(self, doubt: str | None = None) -> Survey:
        """What came of it."""
        return Survey(tuple(self.garbage), self.kept, doubt)


def sweep(survey: Survey, record: Record = ignore) -> Iterator[tuple[Garbage, str | None]]:
    """Remove garbage, piece by piece: each with None, or why it was spared. Raises `DiffstillError` before the first if the survey is in doubt."""
    if survey.doubt:
        raise DiffstillError(f"{survey.doubt}; nothing was removed")
    with record.progress("remove", len(survey.garbage), "thing") as progress:
        for one in survey.garbage:
            yield one, one.remove()
            progress.update()


def idle_time(text: str) -> timedelta:
    """`7d`, `36h`. Raises `DiffstillError` on anything else, and below an hour."""
    found = re.fullmatch(r"([0-9]{1,5})([dh])", text)
    time_given = timedelta(**{{"d": "days", "h": "hours"}[found[2]]: int(found[1])}) if found else timedelta()
    if time_given < SHORTEST:
        raise DiffstillError(f"--older-than {text!r}: give days or hours, such as 7d or 36h, and at least 1h: somebody may be publishing right now")
    return time_given


# --- the store of versions ------------------------------------------------------------------------------------------


def registries(named: Sequence[str] = ()) -> list[Registry]:
    """Those at the URIs that are named, and that of the environment. Raises `DiffstillError` where there is none, or one that is not there."""
    own = registry_uri()
    given = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get("MLFLOW_TRACKING_URI")
    uris = [*named, *([own] if own != OFF and (given or not named) else [])]
    if not uris:
        raise DiffstillError(
            "what may go from a store is what no version names, and MLFLOW_TRACKING_URI is `none`; set it to the MLflow that has the versions, or give --registry"
        )
    return [Registry.at(uri) for uri in dict.fromkeys(uris)]


def in_store(store: str, asked: Sequence[Registry], grace: timedelta, *, confirmed: bool = False) -> Survey:
    """Sets and reports below `store` that no version in `asked` names, and uploads in parts that nobody completes, idle for longer than `grace`.

    What lies there and has not the form `<kind>/<SHA-256>/...` is not looked at. A digest that a version names in any way keeps what has it.
    Where the versions name nothing of all that is there, it may be the wrong registry: that is a doubt, unless it is `confirmed`.
    """
    root = store.rstrip("/")
    places = {f"{root}/{kind}": storage.areas(f"{root}/{kind}") for kind in STORED}
    parts = [(place, one) for place in places for one in storage.unfinished(place)]
    named = _named(asked)  # after the listing: what is uploaded and registered from now on was not listed
    sorting = _Sorting()
    for kind, areas in zip(STORED, places.values(), strict=True):
        for area in areas:
            if re.fullmatch(r"[0-9a-f]{64}", area.name):
                sorting.add(_reason_for_area(area, named, grace), _area(kind, area, asked, grace))
    for place, one in parts:
        if re.match(r"[0-9a-f]{64}/", one.name):
            sorting.add(YOUNG if one.age <= grace else None, _parts(place, one))
    sets = [found for found in sorting.garbage if found.kind in STORED]
    if confirmed or not sets or sorting.kept[NAMED]:
        return sorting.survey()
    addresses = " and ".join(one.address for one in asked)
    return sorting.survey(
        f"no version at {addresses} names anything in {store}: is it the MLflow whose versions are stored there? "
        "If it is, and all of them were deleted, name it with --registry"
    )


def _named(asked: Iterable[Registry]) -> frozenset[str]:
    return frozenset().union(*(registry.digests() for registry in asked))


def _reason_for_area(area: storage.Area, named: frozenset[str], grace: timedelta) -> str | None:
    if area.name in named:
        return NAMED
    if area.age <= grace:
        return YOUNG
    return _foreign(area.uri, storage.names(area.uri)) if area.whole else None


def _foreign(uri: str, names: Sequence[str]) -> str | None:
    """Why a prefix with a manifest is not, or not only, what its name says."""
    if MANIFEST not in names:
        return None
    content = storage.read(f"{uri}/{MANIFEST}")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError:
        return FOREIGN
    named = (manifest.kind, sha256(content).hexdigest()) == tuple(uri.split("/")[-2:])
    return None if named and set(names) <= {MANIFEST, *manifest.files} else FOREIGN


def _area(kind: str, area: storage.Area, asked: Sequence[Registry], grace: timedelta) -> Garbage:
    why = "no version names it" if area.whole else "no version names it, and it is not whole"
    return Garbage(kind, area.uri, area.objects, area.size, area.age, why, partial(_remove_area, area, asked, grace))


def _remove_area(area: storage.Area, asked: Sequence[Registry], grace: timedelta) -> str | None:
    def reason(names: Sequence[str], age: timedelta) -> str | None:
        if age <= grace:
            return "was written to meanwhile"
        if foreign := _foreign(area.uri, names):
            return foreign
        return "is named by a version by now" if area.name in _named(asked) else None

    return storage.remove(area.uri, reason)


def _parts(place: str, one: storage.Parts) -> Garbage:
    def free() -> None:
        storage.abort(place, one)

    return Garbage("parts", f"{place}/{one.name}", 1, one.size, one.age, "its upload in parts was never completed", free)


# --- this machine: downloads ------------------------------------------------------------------------------------------


def in_cache(grace: timedelta) -> Survey:
    """Downloads in `DIFFSTILL_CACHE` that were not read for longer than `grace`, and what killed downloads left. They come again when they are asked for."""
    sorting, root = _Sorting(), cache_folder()
    for group, name in CACHED.items():
        for path in _entries(root / group):
            _sort_download(sorting, path, grace, name)
        _sort_locks(sorting, root / group, grace)
    for path in _entries(root):
        if path.name.removesuffix(ASIDE) in ("fashion-mnist", ".fashion-mnist"):
            _sort_download(sorting, path, grace, "fashion-mnist")
    for path in _entries(root / "fashion-mnist"):
        _sort_download(sorting, path, grace, "-")
    return sorting.survey()


def _sort_download(sorting: _Sorting, path: Path, grace: timedelta, name: str) -> None:
    """An entry, or what is left of one: `.<name>.partial` and the scratch folders of downloads, `.<name>.removing` of a killed removal."""
    lock = path.with_name(f"{path.name}.lock") if path.parent.name == "archives" else path.with_name(f".{path.name}.lock")
    if path.name.endswith(ASIDE):
        _sort_folder(sorting, "cache", path, None, timedelta(), "its removal was not finished")
    elif path.name.startswith((".unpacking.", ".download.")):
        _sort_folder(sorting, "cache", path, None, grace, "its download was not finished")
    elif path.name.endswith(".partial"):
        _sort_folder(sorting, "cache", path, path.with_suffix(".lock"), grace, "its download was not finished")
    elif re.fullmatch(name, path.name):
        _sort_folder(sorting, "cache", path, lock, grace, "nobody used it; it comes again when somebody does")


# --- this machine: work -----------------------------------------------------------------------------------------------


def in_work(grace: timedelta, params: Params | None, artifacts: Path) -> Survey:
    """What killed stages left and nobody goes on with, idle for longer than `grace`: in `DIFFSTILL_WORK`, and drafts beside the artifacts of a chain.

    What a process works on stays, and that in which a step of the chain of `params` in `artifacts` would go on.
    """
    sorting, root = _Sorting(), work_root()
    current = current_work(params, artifacts) if params else frozenset()
    why = "no step of this chain would go on there" if params else "nobody goes on there"
    stages = "|".join(STAGES)
    for path in _entries(root):
        if re.fullmatch(rf"({stages})-[0-9a-f]{{16}}", path.name):
            reason = CURRENT if path.name in current else None
            _sort_folder(sorting, "work", path, path.with_suffix(".lock"), grace, why, reason)
        elif path.name.endswith(ASIDE):
            _sort_folder(sorting, "work", path, None, timedelta(), "its removal was not finished")
    for path in _entries(root / "outgoing"):
        if re.fullmatch(rf"\.?[0-9a-f]{{16}}({re.escape(ASIDE)})?", path.name) or DRAFT.fullmatch(path.name):
            _sort_folder(sorting, "work", path, None, grace, "it was on its way to a store")
    drafts = [path for path in (*_entries(artifacts), *_entries(artifacts / "scores")) if _is_leftover(path)]
    reason = IN_USE if drafts and any(_is_held(lock) for lock in root.glob("*.lock")) else None
    for path in drafts:
        _sort_folder(sorting, "draft", path, None, grace, "a killed stage left it", reason)
    _sort_locks(sorting, root, grace)
    return sorting.survey()


def current_work(params: Params, artifacts: Path) -> frozenset[str]:
    """Names of the work folders that the steps of a chain have, as far as their inputs are there. That of `prepare` depends on raw data: it is not among them."""
    found = (_work_of(step, params, artifacts) for step in chain(params) if step.stage in ("pretrain", "encode", "finetune", "evaluate"))
    return frozenset(name for name in found if name)


def _work_of(step: Step, params: Params, artifacts: Path) -> str | None:
    stage, config = STAGES[step.stage], params.section(step.stage)
    named = {name: artifacts / str(where) for name, where in step.paths.items() if name != stage.output}
    try:
        inputs = {name: read_manifest(folder, name) for name, folder in named.items()}  # type: ignore[arg-type]  # they are kinds
    except DiffstillError:  # the step before it has not finished
        return None
    if step.stage == "evaluate":
        config = config.model_copy(update={"workers": 1})
    more = [step.student or ""] if step.stage in ("encode", "evaluate") else []
    return WorkFolder(step.stage, config, inputs, *more).folder.name


def _is_leftover(path: Path) -> bool:
    """Whether it is a draft of an artifact; where an earlier artifact stepped aside for one, only if that is not the last copy."""
    found = DRAFT.fullmatch(path.name)
    return found is not None and (not found["old"] or (path.parent / found["name"] / MANIFEST).is_file())


# --- folders on this machine --------------------------------------------------------------------------------------------


def _entries(folder: Path) -> list[Path]:
    """The folders in a folder, by name; links lead elsewhere."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()) if folder.is_dir() else []


def _usage(folder: Path) -> tuple[int, int, timedelta]:
    """Files, bytes, and for how long nothing in it was read or written. A look into a folder, such as this, is no reading."""
    files, size, last = 0, 0, folder.lstat().st_mtime
    for place, _, names in os.walk(folder):
        for path in (Path(place), *(Path(place, name) for name in names)):
            with suppress(FileNotFoundError):  # somebody works there
                known = path.lstat()
                last = max(last, known.st_mtime, known.st_atime if path != Path(place) else 0.0)
                files, size = (files + 1, size + known.st_size) if path != Path(place) else (files, size)
    return files, size, timedelta(seconds=time.time() - last)


def _sort_folder(sorting: _Sorting, kind: str, path: Path, lock: Path | None, grace: timedelta, why: str, reason: str | None = None) -> None:
    files, size, idle = _usage(path)
    reason = reason or (YOUNG if idle <= grace else IN_USE if _is_held(lock) else None)
    sorting.add(reason, Garbage(kind, str(path), files, size, idle, why, partial(_remove_folder, path, lock, grace)))


def _remove_folder(path: Path, lock: Path | None, grace: timedelta) -> str | None:
    """Out of the way at once, then file by file."""
    aside = path if path.name.endswith(ASIDE) else path.with_name(f".{path.name.removeprefix('.')}{ASIDE}")
    with _locked(lock) as free:
        if not free:
            return "is used by a process by now"
        if not path.is_dir():
            return "is gone already"
        if _usage(path)[2] <= grace:
            return "was used meanwhile"
        if aside != path:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        for note in (path.with_suffix(".sha256"), path.with_name(f".{path.name}.sha256")):
            note.unlink(missing_ok=True)
        if lock:
            lock.unlink(missing_ok=True)  # held: who waits for it sees that it is gone, and makes a new one
    shutil.rmtree(aside)
    return None


def _sort_locks(sorting: _Sorting, folder: Path, grace: timedelta) -> None:
    """Lock files whose folder is gone, all of a folder in one."""
    found = [lock for lock in folder.glob("*.lock") if LOCK.fullmatch(lock.name) and lock.is_file() and not _guarded(lock)]
    ages = {lock: timedelta(seconds=time.time() - lock.stat().st_mtime) for lock in found}
    if old := [lock for lock, age in ages.items() if age > grace]:
        idle = min(ages[lock] for lock in old)
        sorting.add(None, Garbage("locks", f"{folder}/*.lock", len(old), 0, idle, "what they guarded is gone", partial(_remove_locks, old)))


def _guarded(lock: Path) -> bool:
    """Whether there is the folder that a lock file is for, as the cache or a stage names it."""
    name = lock.name.removesuffix(".lock")
    return any(lock.with_name(one).exists() for one in (name, name.removeprefix("."), f"{name}.partial"))


def _remove_locks(locks: Sequence[Path]) -> None:
    for lock in locks:
        with _locked(lock) as free:
            if free and not _guarded(lock):
                lock.unlink(missing_ok=True)


@contextmanager
def _locked(lock: Path | None) -> Iterator[bool]:
    """Hold a lock, if there is one; whether it was free."""
    if lock is None:
        yield True
        return
    try:
        with FileLock(lock, timeout=0):
            yield True
    except Timeout:
        yield False


def _is_held(lock: Path | None) -> bool:
    if lock is None or not lock.is_file():
        return False
    with _locked(lock) as free:
        return not free


# --- what is said of it -------------------------------------------------------------------------------------------------


def shown_time(idle: timedelta) -> str:
    """A time for people."""
    if idle == timedelta.max:
        return "-"
    hours = int(idle.total_seconds()) // 3600
    return f"{hours // 24} d" if hours >= 48 else f"{hours} h"


def summary(survey: Survey, gone: Sequence[Garbage], delete: bool) -> str:
    """What goes or is gone, and what stays for which reason."""
    size = decimal(sum(one.size for one in gone))
    spared = f" of {_counted(survey.garbage)}" if len(gone) < len(survey.garbage) else ""
    removed = f"removed {_counted(gone)}{spared}, {size}"
    told = removed if delete else f"dry run: would remove {_counted(gone)}, {size}; nothing was changed, --delete removes them"
    kept = ", ".join(f"{number} {'entry' if number == 1 else 'entries'} {reason}" for reason, number in sorted(survey.kept.items()))
    doubt = [f"in doubt: {survey.doubt}; --delete refuses"] if survey.doubt and not delete else []
    return "\n".join([told, f"kept: {kept or 'nothing else was found'}", *doubt])


def _counted(garbage: Sequence[Garbage]) -> str:
    return ", ".join(plural(number, NOUNS[kind]) for kind, number in Counter(one.kind for one in garbage).items()) or "nothing"
