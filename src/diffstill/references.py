"""Data that lies elsewhere: a folder of a DVC repository at an exact revision, below an S3 prefix, or weights on the Hugging Face hub.

`dvc+https://host/org/repo.git?rev=<branch, tag or commit>&path=data/images&md5=<md5>` is a location like any other;
`dvc+ssh://git@host/...` and `dvc+file:/path` name repositories too. The md5 is DVC's own for the folder and may be
left out; `pin` fills it in and replaces the revision by its commit. Credentials have no place in a location: git's
credential helpers and the environment have them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, overload
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from diffstill import storage
from diffstill.artifacts import file_digest, is_sealed, seal
from diffstill.errors import DiffstillError, TransientError, without_secrets
from diffstill.names import is_inside
from diffstill.record import Record, ignore

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc_data.index import DataIndex, DataIndexEntry

log = logging.getLogger("diffstill")
FORM = "dvc+https://<host>/<repository>?rev=<branch, tag or commit>&path=<folder>, optionally with &md5=<DVC's md5 of the folder>"
MD5 = r"[0-9a-f]{32}(\.dir)?"
SCHEMES = ("https", "http", "ssh", "file")
TRANSFERS = 8
_SHOWN = 3


@dataclass(frozen=True)
class DvcReference:
    """A folder that DVC tracks: the repository's URL or path, a git revision, the path inside, and DVC's md5 where it is known."""

    repository: str
    revision: str
    path: str
    md5: str | None = None

    def __str__(self) -> str:
        """The location that `parse` reads."""
        query = {"rev": self.revision, "path": self.path} | ({"md5": self.md5} if self.md5 else {})
        where = self.repository if "://" in self.repository else f"file:{quote(self.repository)}"
        return f"dvc+{where}?{urlencode(query, quote_via=quote, safe='/')}"


@dataclass(frozen=True)
class S3Reference:
    """All objects below an S3 prefix."""

    uri: str

    def __str__(self) -> str:
        """The location that `parse` reads."""
        return self.uri


@dataclass(frozen=True)
class HubReference:
    """A repository of models on the Hugging Face hub, `owner/name`, at a branch, tag or commit."""

    repository: str
    revision: str

    def __str__(self) -> str:
        """The location that `parse` reads."""
        return f"hf://{self.repository}@{self.revision}"


@dataclass(frozen=True)
class Fetched:
    """Data in a local folder, which is read only, and the facts that say exactly which data it is."""

    folder: Path
    facts: Mapping[str, str]


Reference = DvcReference | S3Reference | HubReference
HUB_FORM = "hf://<owner>/<repository>@<branch, tag or commit>"
AUTOENCODERS = {name: f"hf://stabilityai/sd-vae-ft-{name}@main" for name in ("ema", "mse")}
WEIGHTS = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.md")
"""What is fetched of a hub repository."""


def parse(location: str) -> Reference | None:
    """The reference that a location is, or that the name of a known autoencoder stands for; None for paths and URLs, which are none. Raises `DiffstillError` on a malformed one."""
    location = AUTOENCODERS.get(location, location)
    if location.startswith("s3://"):
        storage.refuse_malformed(location)
        return S3Reference(location)
    if location.startswith("hf:"):
        return _parse_hub(location)
    return _parse_dvc(location) if re.match(r"dvc[+:]", location) else None


@overload
def pin(reference: DvcReference) -> DvcReference: ...
@overload
def pin(reference: Reference) -> Reference: ...
def pin(reference: Reference) -> Reference:
    """The same data by commit (and md5), without a download. Raises `DiffstillError` if it is not there or has another md5 than the reference."""
    if isinstance(reference, S3Reference):
        return reference
    if isinstance(reference, HubReference):
        return _pin_hub(reference)
    with _opened(reference) as repository:
        return _pinned(reference, repository)


def refuse_unpushed(reference: DvcReference) -> None:
    """Raise `DiffstillError` unless the repository's DVC remote holds every object of the folder."""
    with _opened(reference) as repository:
        pinned, index = _pinned(reference, repository), repository.index.data["repo"]
        entries = [entry for entry in _entries(index, pinned) if entry.hash_info]
        held = index.storage_map.bulk_remote_exists(entries, refresh=True)
    missing = sorted("/".join(entry.key) for entry in entries if not held.get(entry))
    if missing:
        raise DiffstillError(
            f"{reference}: the DVC remote lacks {len(missing)} of {len(entries)} objects ({', '.join(missing[:_SHOWN])}"
            f"{', ...' if len(missing) > _SHOWN else ''}); run `dvc push` where the data is, at commit {pinned.revision}"
        )


def listing_digest(reference: S3Reference) -> str:
    """SHA-256 of names, sizes and ETags below the prefix: another one for other data. Raises `DiffstillError` if the store cannot be listed."""
    return _objects_digest(storage.listing(reference.uri))


def fetch(reference: Reference, cache: Path, record: Record = ignore) -> Fetched:
    """The data in a folder below `cache` that is named after its content, downloaded unless it is there; verified in either case.

    Raises `DiffstillError` if it cannot be had or is not what the reference, git or the store say. The folder is whole or absent.
    """
    if isinstance(reference, HubReference):
        return _fetch_hub(reference, cache)
    return _fetch_dvc(reference, cache, record) if isinstance(reference, DvcReference) else _fetch_s3(reference, cache, record)


# --- the Hugging Face hub ------------------------------------------------------------------------------------------


def _parse_hub(location: str) -> HubReference:
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)@([\w./-]+)", location)
    if not found:
        raise DiffstillError(f"location {location!r} is not {HUB_FORM}; name the revision, so that the same weights come again")
    return HubReference(found[1], found[2])


def _pin_hub(reference: HubReference) -> HubReference:
    from huggingface_hub import HfApi

    with _hub_errors(reference):
        commit = HfApi().model_info(reference.repository, revision=reference.revision).sha
    return replace(reference, revision=str(commit))


def _fetch_hub(reference: HubReference, cache: Path) -> Fetched:
    """With the hub's own client, which goes on where it was cut off, shows progress and verifies sizes; token from HF_TOKEN."""
    from huggingface_hub import snapshot_download

    pinned = reference if re.fullmatch("[0-9a-f]{40}", reference.revision) else _pin_hub(reference)
    fetched = partial(snapshot_download, pinned.repository, revision=pinned.revision, cache_dir=cache / "hub", allow_patterns=list(WEIGHTS))
    with _hub_errors(pinned):
        folder = Path(fetched())
        damaged = [path for path in _files(folder) if not _is_its_blob(path)]
        for path in damaged:
            log.warning("%s: was changed since it was downloaded; downloaded again", path)
            path.resolve().unlink()
            path.unlink()
        if damaged:
            fetched()
    return Fetched(folder, {"repository": pinned.repository, "revision": pinned.revision})


def _is_its_blob(path: Path) -> bool:
    """Whether a file of the hub's cache has the content that its blob is named after; true where its name does not tell."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return file_digest(blob) == blob.name
    if re.fullmatch(r"[0-9a-f]{40}", blob.name):  # as git names it
        with blob.open("rb") as file:
            seen = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
            return hashlib.file_digest(file, lambda: seen).hexdigest() == blob.name
    return True


def hub_failure() -> type[Exception]:
    """What the hub's client raises on any failure to talk to it: that of its HTTP library, whichever it is."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


@contextmanager
def _hub_errors(reference: HubReference) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (hub_failure(), HFValidationError, OSError) as error:
        raise (TransientError if _hub_passes(error) else DiffstillError)(
            f"{reference}: cannot be had from the hub ({_reason(error)}); check name and revision, HF_TOKEN if the repository wants one, HF_ENDPOINT"
        ) from error


def _hub_passes(error: BaseException) -> bool:
    """Whether the hub is away or overloaded; its client hides that behind what it lacks for it."""
    if isinstance(error, hub_failure()):
        answer = getattr(error, "response", None)
        return answer is None or answer.status_code >= 500 or answer.status_code == HTTPStatus.TOO_MANY_REQUESTS
    return error.__cause__ is not None and _hub_passes(error.__cause__)


# --- S3 ----------------------------------------------------------------------------------------------------------


def _objects_digest(objects: list[storage.Object]) -> str:
    return hashlib.sha256(json.dumps([[item.name, item.size, item.etag] for item in objects]).encode()).hexdigest()


def _fetch_s3(reference: S3Reference, cache: Path, record: Record) -> Fetched:
    objects = storage.listing(reference.uri)
    digest = _objects_digest(objects)
    folder = cache / "s3" / digest
    noted = folder.with_name(f".{digest}.sha256")  # ETags are no digests of what was sent in parts

    def arrive(arriving: Path) -> None:
        storage.transfer(reference.uri, objects, arriving, record)
        seal(arriving, noted)

    storage.appear(folder, arrive, whole=partial(is_sealed, at=noted))
    return Fetched(folder, {"location": reference.uri, "listing": digest})


# --- DVC ---------------------------------------------------------------------------------------------------------


def _parse_dvc(location: str) -> DvcReference:
    where, _, query = location.removeprefix("dvc+").partition("?")
    parts = urlsplit(where)
    if parts.password is not None or (parts.username is not None and parts.scheme != "ssh"):
        raise _malformed(location, "credentials have no place in a location, leave them to git's credential helper or to ssh")
    if parts.scheme not in SCHEMES or not parts.path or bool(parts.netloc) == (parts.scheme == "file"):
        raise _malformed(location, f"expected dvc+ and the URL of a git repository ({', '.join(SCHEMES)})")
    fields = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)
    values = dict(fields)
    if len(values) != len(fields) or not {"rev", "path"} <= values.keys() <= {"rev", "path", "md5"}:
        raise _malformed(location, "`?rev=...&path=...` must follow the repository, then at most `&md5=...`, each once")
    return DvcReference(
        unquote(parts.path) if parts.scheme == "file" else where,
        _fitting(location, "rev", values["rev"], r"[^-\s][^\s]*"),
        _inside(location, values["path"].rstrip("/")),
        _fitting(location, "md5", values["md5"], MD5) if "md5" in values else None,
    )


def _fitting(location: str, name: str, value: str, pattern: str) -> str:
    if not re.fullmatch(pattern, value):
        raise _malformed(location, f"`{name}` {value!r} is none")
    return value


def _inside(location: str, path: str) -> str:
    if not is_inside(path):
        raise _malformed(location, f"`path` {path!r} is no path of a folder inside the repository")
    return path


def _malformed(location: str, why: str) -> DiffstillError:
    shown = re.sub(r"[^/:+]*:?[^/:+]*@", "***@", without_secrets(location))
    return DiffstillError(f"{shown}: no reference to a DVC repository, {why}; write {FORM}")


@contextmanager
def _opened(reference: DvcReference) -> Iterator[Repo]:
    """The repository at the revision. What goes wrong in DVC, git or the network is one `DiffstillError`."""
    try:
        from botocore.exceptions import BotoCoreError
        from dvc.exceptions import DvcException
        from dvc.repo import Repo
        from dvc.repo.open_repo import clean_repos
        from dvc_data.index import DataIndexDirError
        from dvc_objects.errors import ObjectFormatError
        from scmrepo.exceptions import SCMError
    except ImportError as error:
        raise DiffstillError(f"{reference}: DVC is not installed; pip install 'diffstill[dvc]'") from error
    with tempfile.TemporaryDirectory(prefix="diffstill-dvc-") as scratch:
        # Copies, not links into the repository's own cache; no state in folders that a container may not have.
        config = {"cache": {"type": ["reflink", "copy"]}, "core": {"site_cache_dir": scratch}}
        try:
            with Repo.open(reference.repository, rev=reference.revision, config=config) as repository:
                yield repository
        except (DvcException, SCMError, DataIndexDirError, ObjectFormatError, BotoCoreError, OSError) as error:
            raise DiffstillError(
                f"{reference}: cannot be read ({_reason(error)}); check the repository, `rev`, `path`, the remote in its .dvc/config "
                "and the credentials in the environment, and that the data was pushed (`dvc push`)"
            ) from error
        finally:
            clean_repos()


def _reason(error: BaseException) -> str:
    """What happened and the first cause of it, in one line: DVC and git wrap causes in general words."""
    first = error
    while cause := first.__cause__ or first.__context__:
        first = cause
    told = dict.fromkeys(" ".join(str(one).split()) or type(one).__name__ for one in (error, first))
    return without_secrets(": ".join(told))[:300]


def _pinned(reference: DvcReference, repository: Repo) -> DvcReference:
    index, key = repository.index.data["repo"], tuple(reference.path.split("/"))
    try:
        found = index.info(key)
    except KeyError as error:
        raise DiffstillError(f"{reference}: DVC tracks nothing at {reference.path!r} in that revision; correct `path` or `rev`") from error
    if found["type"] != "directory":
        raise DiffstillError(f"{reference}: {reference.path!r} is a file; name the folder that has it")
    _refuse_git_files(reference, repository)
    md5 = found.get("md5") or _digest(_listed(index, reference))
    if not re.fullmatch(MD5, md5):  # a folder of the cache is named after it
        raise DiffstillError(f"{reference}: the repository says md5 {md5!r:.80}, which is none; add the folder to DVC anew")
    if reference.md5 not in (None, md5):
        raise DiffstillError(f"{reference}: DVC says md5 {md5} for that revision; correct `rev` or `md5`, one of them names other data")
    return replace(reference, revision=repository.get_rev(), md5=md5)


def _refuse_git_files(reference: DvcReference, repository: Repo) -> None:
    """Files that git has, not DVC, would be left out in silence."""
    from dvc.dvcfile import is_valid_filename

    found = repository.fs.find(repository.fs.join(repository.root_dir, reference.path))
    names = sorted(Path(name).name for name in found if not Path(name).name.startswith((".git", ".dvc")) and not is_valid_filename(name))
    if names:
        raise DiffstillError(f"{reference}: git and not DVC tracks {', '.join(names[:_SHOWN])} there; add all of the folder to DVC, or none of it")


def _entries(index: DataIndex, reference: DvcReference) -> list[DataIndexEntry]:
    return [entry for _, entry in index.iteritems(prefix=tuple(reference.path.split("/")))]


def _listed(index: DataIndex, reference: DvcReference) -> dict[str, str]:
    """The md5 that DVC has for each file, by its path below the folder."""
    depth, listed = len(reference.path.split("/")), {}
    for entry in _entries(index, reference):
        if entry.meta and entry.meta.isdir:
            continue
        name = "/".join(entry.key[depth:])
        if not entry.hash_info or entry.hash_info.name != "md5":
            raise DiffstillError(f"{reference}: {name!r} has no md5 of DVC 3; run `dvc cache migrate --dvc-files`, commit and push")
        if not is_inside(name):
            raise DiffstillError(f"{reference}: DVC lists {name!r}, which is no path of a file below the folder; add the folder to DVC anew")
        listed[name] = entry.hash_info.value
    return listed


def _digest(listed: Mapping[str, str]) -> str:
    """DVC's md5 of a folder that has these files."""
    from dvc_data.hashfile.hash_info import HashInfo
    from dvc_data.hashfile.tree import Tree

    tree = Tree()
    for name, md5 in listed.items():
        tree.add(tuple(name.split("/")), None, HashInfo("md5", md5))
    tree.digest()
    return str(tree.oid)


def _fetch_dvc(reference: DvcReference, cache: Path, record: Record) -> Fetched:
    with _opened(reference) as repository:
        pinned = _pinned(reference, repository)
        folder, downloaded = cache / "dvc" / str(pinned.md5), partial(_download, pinned, repository.index.data["repo"], record)
        storage.appear(folder, downloaded, whole=lambda there: _digest(_held(there)) == pinned.md5)
    return Fetched(folder, {"revision": pinned.revision, "md5": str(pinned.md5), "path": pinned.path})


def _download(pinned: DvcReference, index: DataIndex, record: Record, folder: Path) -> None:
    """Every file into `folder`, verified: each against the listing, the listing against the md5 that git has."""
    from dvc_data.fs import DataFileSystem

    listed, files = _listed(index, pinned), DataFileSystem(index)
    if _digest(listed) != pinned.md5:
        raise DiffstillError(f"{pinned}: the listing of the folder in the DVC remote is corrupted; push it again (`dvc push`) from a good copy")
    for place in {(folder / name).parent for name in listed}:
        place.mkdir(parents=True, exist_ok=True)

    def get(name: str) -> None:
        files.get_file(f"{pinned.path}/{name}", str(folder / name))
        if _md5(folder / name) != listed[name]:
            raise DiffstillError(
                f"{pinned}: {name} has md5 {_md5(folder / name)} in the DVC remote, not {listed[name]}: corrupted; push it again from a good copy"
            )

    pool = ThreadPool(TRANSFERS)
    try:
        with record.progress("download", len(listed), "file") as progress:
            for _ in pool.imap_unordered(get, listed):
                progress.update()
    finally:
        pool.terminate()
        pool.join()  # a thread still at work would write into a folder that is being removed


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def _held(folder: Path) -> dict[str, str]:
    """The md5 of each file, by its path below the folder."""
    return {path.relative_to(folder).as_posix(): _md5(path) for path in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
