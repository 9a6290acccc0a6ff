"""S3, and only here: upload, list, download, read, probe and remove what lies under `s3://bucket/prefix`.

Endpoint and credentials come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID` and the other usual ways).
A prefix is a folder: `s3://bucket/a` has `a/b`, but not `ab`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, Literal, Self

from filelock import FileLock

from diffstill.artifacts import DESKTOP_LITTER
from diffstill.errors import DiffstillError, TransientError, without_secrets
from diffstill.names import is_inside
from diffstill.record import Progress, Record, ignore

log = logging.getLogger("diffstill")
FORM = "s3://<bucket>/<prefix>"
BATCH = 1000
"""Files in transfer at a time: a transfer of boto3 keeps some kilobytes until it is let go, and data sets have millions of files."""
TIMEOUTS = (5.0, 20.0)
"""Seconds to connect, and to the next byte."""
CONNECTIONS = 10
"""Files, and parts of large files, on their way to the store at a time."""
PART = 8 * 2**20
"""Bytes of a part; files of as many or more are sent in parts. The default of boto3 and AWS, so that the ETags of their uploads compare."""
ABANDONED = timedelta(hours=1)
"""An upload in parts that began longer ago and is not complete is one of a killed process."""
LEASE = timedelta(minutes=3)
"""For so long after its last sign a removal counts as at work, then as that of a killed process."""
PAUSE = 1.0
"""Seconds between two looks at a prefix that somebody is removing."""
DELETES = 100
"""Objects that are deleted between two signs of a removal."""
LONGEST_KEY = 1024
"""Bytes of UTF-8."""

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN with temporary ones) to valid credentials of this store"
_ENCRYPTION = "if encryption was asked for, see that the store offers it, with this key and over this kind of connection (many want https)"
_FIXES = {
    "NoSuchBucket": "create the bucket or correct its name",
    "AccessDenied": "allow these credentials to list, read, write and delete there",
    "403": "allow these credentials to list, read, write and delete there",
    "InvalidAccessKeyId": _CREDENTIALS,
    "SignatureDoesNotMatch": _CREDENTIALS,
    "InvalidToken": _CREDENTIALS,
    "ExpiredToken": _CREDENTIALS,
    "NoCredentialsError": _CREDENTIALS,
    "PartialCredentialsError": _CREDENTIALS,
    "InvalidRequest": _ENCRYPTION,
    "InvalidArgument": _ENCRYPTION,
    "NotImplemented": _ENCRYPTION,
    "KMS.NotFoundException": _ENCRYPTION,
    "KMS.DisabledException": _ENCRYPTION,
    "ProfileNotFound": "correct or unset AWS_PROFILE",
}
_PROBE, _REMOVAL = ".diffstill-probe-", ".diffstill-removal-"
_TAKEN = (409, 412)  # HTTP: what was to be written only where nothing is, is there already


@dataclass(frozen=True)
class Object:
    """A file in the store: its name below the prefix, its size in bytes, and the ETag that changes with its content."""

    name: str
    size: int
    etag: str


@dataclass(frozen=True)
class Encryption:
    """Server-side encryption that the store is asked for; `key` is the id of a KMS key, by default the store's own."""

    algorithm: Literal["AES256", "aws:kms"]
    key: str | None = None

    def __post_init__(self) -> None:
        if self.key and self.algorithm != "aws:kms":
            raise DiffstillError(f"encryption {self.algorithm!r} takes no key, but one is given; write 'aws:kms', or leave out the key")

    def arguments(self) -> dict[str, str]:
        """As boto3 takes them."""
        return {"ServerSideEncryption": self.algorithm} | ({"SSEKMSKeyId": self.key} if self.key else {})


def upload(folder: Path, uri: str, record: Record = ignore, *, last: str = "manifest.json", encryption: Encryption | None = None) -> int:
    """Send the files in `folder` to the prefix `uri`, which nothing else is written to. Returns the bytes that were sent now.

    What is there already with the same content stays as it is, so a killed upload goes on; nothing is overwritten or deleted,
    but where all is there `last` is written anew, which makes the prefix young to `remove`. The file `last` is sent when the store
    is seen to hold all others: a prefix that has it is whole. Folders without files, and what file browsers leave in folders, are
    not sent. Raises `DiffstillError` naming the file that S3 cannot hold or that changes meanwhile, or the object that differs or
    is none of the files.
    """
    files = _files(folder, _parts(uri)[1])
    if last not in files:
        raise DiffstillError(f"{folder}: has no {last}, so it is not whole; make it anew, then upload it")
    # In this order: after a failure transfers of large files are cancelled first, so that no worker waits for them.
    with _client(uri) as client, _workers() as workers, _manager(client) as manager:
        sending = _Upload(client, manager, workers, uri, files, encryption)
        sending.abort_abandoned()
        missing = sending.missing()
        total, left = sum(file.size for file in files.values()), sum(file.size for file in missing)
        with record.progress("upload", total, "B", done=total - left) as progress:
            rest = [file for file in missing if file.name != last]
            sent = sending.send(rest, progress)
            if files[last] in missing:
                return sent + sending.send([files[last]], progress)
            sending.renew(files[last])
            return sent


def read(uri: str) -> bytes:
    """The content of the small object at `s3://bucket/key`. Raises `DiffstillError` if it is not there, or damaged."""
    bucket, prefix = _parts(uri)
    if not (key := prefix.removesuffix("/")):
        raise DiffstillError(f"{uri}: names no object; write s3://<bucket>/<key>")
    with _client(uri) as client:
        try:
            got = client.get_object(Bucket=bucket, Key=key)
            content: bytes = got["Body"].read()
        except client.exceptions.NoSuchKey as error:
            raise DiffstillError(f"{uri}: is not there; it was never uploaded, or its upload did not finish: upload it again") from error
    if _contradicts(got, _md5(content).hexdigest()):
        raise _damaged(uri, key)
    return content


def listing(uri: str) -> list[Object]:
    """All objects below `uri`, by name. Raises `DiffstillError` if there is none, or one whose name is no path of a file."""
    bucket, prefix = _parts(uri)
    with _client(uri) as client:
        objects = _objects(client, bucket, prefix)
    if not objects:
        raise DiffstillError(f"{uri}: holds no object; correct the prefix, or upload the data there")
    _refuse_no_paths(uri, [item.name for item in objects])
    return sorted(objects, key=lambda item: item.name)


def names(uri: str) -> list[str]:
    """The names of all files below `uri`, also such as no folder can hold; none where there are none."""
    with _client(uri) as client:
        return [item.name for item in _objects(client, *_parts(uri))]


def _objects(client: Any, bucket: str, prefix: str) -> list[Object]:
    """All objects below `prefix` but those that stand for a folder, and those of `probe` and `remove`."""
    return [item for item, _ in _dated(client, bucket, prefix) if _is_file(item.name)]


def _dated(client: Any, bucket: str, prefix: str) -> Iterator[tuple[Object, timedelta]]:
    """All objects below `prefix`, each with its age by the clock of the store."""
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        now = _time(page)
        for item in page.get("Contents", ()):
            yield Object(item["Key"].removeprefix(prefix), item["Size"], item["ETag"]), now - item["LastModified"]


def _time(answer: Mapping[str, Any]) -> datetime:
    """When the store gave an answer."""
    said = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(said) if said else datetime.now(UTC)


def _is_file(name: str) -> bool:
    """Whether it stands for a file, and not for a folder or for what `probe` and `remove` write."""
    return bool(name) and not name.endswith("/") and not _is_ours(name)


def _is_ours(name: str) -> bool:
    """Whether it is an object of `probe` or `remove`, which is no file of anybody."""
    return PurePosixPath(name).name.startswith((_PROBE, _REMOVAL))


def download(uri: str, folder: Path, record: Record = ignore) -> list[Object]:
    """Everything below `uri` as files in `folder`, which must not exist and appears whole or not at all. Returns what was downloaded."""
    if folder.exists():
        raise DiffstillError(f"{folder}: exists already; remove it or choose another folder for {uri}")
    objects = listing(uri)
    appear(folder, lambda partial: transfer(uri, objects, partial, record))
    return objects


def transfer(uri: str, objects: list[Object], folder: Path, record: Record = ignore) -> None:
    """Download `objects` into `folder`. Raises `DiffstillError` if the store changes meanwhile, or sends other bytes than it says it holds."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    bucket, prefix = _parts(uri)
    for place in {(folder / item.name).parent for item in objects}:
        place.mkdir(parents=True, exist_ok=True)
    with (
        record.progress("download", sum(item.size for item in objects), "B") as progress,
        _client(uri) as client,
        create_transfer_manager(client, TransferConfig()) as manager,
    ):
        for start in range(0, len(objects), BATCH):
            batch = [(item, manager.download(bucket, prefix + item.name, str(folder / item.name))) for item in objects[start : start + BATCH]]
            for item, arriving in batch:
                arriving.result()
                _refuse_damaged(client, uri, item, folder / item.name)
                progress.update(item.size)
    if listing(uri) != objects:
        raise _changed(uri)


def _refuse_damaged(client: Any, uri: str, item: Object, path: Path) -> None:
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, _md5).hexdigest()
    if not _contradicts({"ETag": item.etag}, md5):
        return
    bucket, prefix = _parts(uri)
    held = client.head_object(Bucket=bucket, Key=prefix + item.name)
    if held["ETag"] != item.etag:
        raise _changed(uri)
    if _contradicts(held, md5):
        raise _damaged(uri, item.name)


def _contradicts(held: Mapping[str, Any], md5: str) -> bool:
    """Whether what the store says of an object rules out that its content has this MD5: ETags of parts, or with keys of KMS, rule out nothing."""
    etag = held["ETag"].strip('"').lower()
    return bool(re.fullmatch("[0-9a-f]{32}", etag)) and etag != md5 and not str(held.get("ServerSideEncryption")).startswith("aws:kms")


def _changed(uri: str) -> TransientError:
    return TransientError(f"{uri}: changed while it was downloaded; try again when nothing writes there")


def _damaged(uri: str, name: str) -> DiffstillError:
    return DiffstillError(f"{uri}: {name!r} arrives with other bytes than its ETag says; look for a proxy or a failing disk at {_endpoint()}")


def _md5(content: bytes = b"") -> Any:
    return hashlib.md5(content, usedforsecurity=False)


def probe(uri: str) -> None:
    """Write, read and delete a small object below `uri`. Raises `DiffstillError` naming the bucket, the error and the fix."""
    bucket, prefix = _parts(uri)
    key, content = f"{prefix}{_PROBE}{uuid.uuid4().hex}", b"diffstill"
    with _client(uri) as client:
        client.put_object(Bucket=bucket, Key=key, Body=content)
        try:
            found = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        finally:
            client.delete_object(Bucket=bucket, Key=key)
    if found != content:
        raise DiffstillError(f"{uri}: gives back other bytes than were written; look for a proxy or a second writer at {_endpoint()}")


def refuse_malformed(uri: str) -> None:
    """Raise `DiffstillError` if `uri` has not the form of an S3 location."""
    _parts(uri)


def appear(folder: Path, fill: Callable[[Path], object], *, whole: Callable[[Path], bool] = lambda _: True) -> None:
    """Let `fill` write a folder that appears at `folder` whole or not at all.

    If it is there, or comes from another process, and is `whole`, it is only marked as used now: under this lock
    `diffstill gc` leaves it alone then. What is not whole is made again, with one line.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        if folder.exists():
            if whole(folder):
                with suppress(PermissionError):  # of somebody else, or on a disk that is only read
                    os.utime(folder)
                return
            log.warning("%s: was changed since it was downloaded; downloaded again", folder)
            folder.rename(partial)
            shutil.rmtree(partial)
        try:
            partial.mkdir()
            fill(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_no_paths(uri: str, names: list[str]) -> None:
    known = set(names)
    for name in names:
        if not is_inside(name) or any(str(parent) in known for parent in PurePosixPath(name).parents):
            raise DiffstillError(f"{uri}: the object {name!r} cannot be a file beside the others; rename or remove it")


# --- upload -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """A file to upload, as it was when the upload began."""

    name: str
    path: Path
    size: int
    stamp: tuple[int, ...]

    def content(self) -> bytes:
        """All of it."""
        return b"".join(self.chunks(PART))

    def chunks(self, size: int) -> Iterator[bytes]:
        """Its content, piece by piece. Raises `DiffstillError` if it is not what it was."""
        with _Watched(self) as stream:
            yield from iter(lambda: stream.read(size), b"")

    def etag(self, in_parts: bool) -> str:
        """What the store says if it holds this content unencrypted, sent whole or by `upload` in parts."""
        from s3transfer.utils import ChunksizeAdjuster

        if not in_parts:
            return str(_digest(_md5(), self.chunks(PART)).hexdigest())
        parts = [_md5(part).digest() for part in self.chunks(ChunksizeAdjuster().adjust_chunksize(PART, self.size))]
        return f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"

    def sha256(self) -> str:
        """As S3 writes it, in base 64."""
        return _base64(_digest(hashlib.sha256(), self.chunks(PART)))


class _Watched(io.FileIO):
    """A file that is refused as soon as it cannot be read or is not what it was, before anything of that is sent."""

    def __init__(self, file: _File) -> None:
        self._file = file
        with _local(file.path):
            super().__init__(file.path)

    def read(self, size: int | None = -1, /) -> bytes:
        with _local(self._file.path):
            content = super().read(size)
            if _stamp(self._file.path.lstat()) != self._file.stamp:
                raise DiffstillError(f"{self._file.path}: changed while it was uploaded; upload again when nothing writes there")
        return content


@dataclass(frozen=True)
class _Upload:
    """The way of `files` to a prefix."""

    client: Any
    manager: Any
    workers: ThreadPoolExecutor
    uri: str
    files: Mapping[str, _File]
    encryption: Encryption | None
    verified: set[Object] = field(default_factory=set)

    def abort_abandoned(self) -> None:
        """Free what uploads in parts left that were killed; the uploads of others who are at work go on."""
        for parts in _unfinished(self.client, self.uri):
            if parts.age > ABANDONED:
                _abort(self.client, self.uri, parts)

    def missing(self) -> list[_File]:
        """The files that the store lacks. Raises `DiffstillError` if it holds anything but `files`."""
        found = self._settled()
        if foreign := next((item for item in found if item.name not in self.files), None):
            raise DiffstillError(
                f"{self.uri}: holds {foreign.name!r}, which is none of the files to upload; upload to another prefix, or remove it there"
            )
        new = [item for item in found if item not in self.verified]
        for item, held in zip(new, self.workers.map(self._holds, new), strict=True):
            if not held:
                raise DiffstillError(
                    f"{self.uri}: holds {item.name!r} with other content than {self.files[item.name].path}; upload to another prefix, or remove it there"
                )
            self.verified.add(item)
        there = {item.name for item in found}
        return [file for name, file in self.files.items() if name not in there]

    def _settled(self) -> list[Object]:
        """What the store holds, once no `remove` is at work there.

        An upload writes, then looks for the sign of a removal; a removal gives its sign, then looks for what was written. So one of them sees the other.
        """
        while True:
            found = list(_dated(self.client, *_parts(self.uri)))
            if not any(_is_sign(item.name) and age < LEASE for item, age in found):
                return [item for item, _ in found if _is_file(item.name)]
            log.info("%s: waits for a `diffstill gc` that removes what lay there", self.uri)
            time.sleep(PAUSE)

    def send(self, files: list[_File], progress: Progress) -> int:
        """Send `files` and see that the store holds them and all it held before. Returns the bytes sent. Raises `DiffstillError` if it does not."""
        lock = Lock()

        def count(bytes_transferred: int) -> None:
            with lock:
                progress.update(bytes_transferred)

        sent = sum(future.result() for future in as_completed([self.workers.submit(self._send, file, count) for file in files]))
        if files:
            self._refuse_lost({file.name for file in files})
        return sent

    def renew(self, file: _File) -> None:
        """Write a file anew that is there, and see that the store still holds all it held."""
        self._put(file, lambda _: None, only_new=False)
        self._refuse_lost({file.name})

    def _refuse_lost(self, sent: set[str]) -> None:
        expected = sent | {item.name for item in self.verified}
        if lost := expected & {file.name for file in self.missing()}:
            raise TransientError(f"{self.uri}: lost {min(lost)!r} after it was sent; look for what removes objects there, then try again")

    def _send(self, file: _File, count: Callable[[int], None]) -> int:
        """Send one file, unless there is an object of its name by now: what that holds is seen when all are verified."""
        from botocore.exceptions import ClientError

        try:
            self._put(file, count) if file.size < PART else self._put_parts(file, count)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in _TAKEN:
                raise
            return 0
        return file.size

    def _put(self, file: _File, count: Callable[[int], None], *, only_new: bool = True) -> None:
        content = file.content()
        condition = {"IfNoneMatch": "*"} if only_new else {}
        # With the checksum itself beside the algorithm boto3 sends no trailer, which old stores do not know.
        checksum = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": _base64(hashlib.sha256(content))}
        encryption = self._encryption()
        stored = self.client.put_object(**self._address(file.name), Body=content, **condition, **checksum, **encryption)
        if encryption and stored.get("ServerSideEncryption") != encryption["ServerSideEncryption"]:
            raise DiffstillError(
                f"{self.uri}: {_endpoint()} stored {file.name!r} without the encryption {encryption['ServerSideEncryption']!r} that it was asked for; "
                "remove it there, and use a store that encrypts, or ask for no encryption"
            )
        count(file.size)

    def _put_parts(self, file: _File, count: Callable[[int], None]) -> None:
        from boto3.s3.transfer import ProgressCallbackInvoker

        bucket, key = self._address(file.name).values()
        with _Watched(file) as stream:
            self.manager.upload(stream, bucket, key, self._encryption(), [ProgressCallbackInvoker(count)]).result()

    def _holds(self, item: Object) -> bool:
        """Whether an object has the content of its file: by its ETag, else by its SHA-256 if the store has kept one, else by reading it."""
        file = self.files[item.name]
        if item.size != file.size:
            return False
        etag = item.etag.strip('"').lower()
        if etag == file.etag(in_parts="-" in etag):
            return True
        held = self.client.head_object(**self._address(item.name), ChecksumMode="ENABLED").get("ChecksumSHA256")
        if held is None or "-" in held:  # of parts
            with closing(self.client.get_object(**self._address(item.name))["Body"]) as body:
                held = _base64(_digest(hashlib.sha256(), body.iter_chunks(2**20)))
        return bool(held == file.sha256())

    def _address(self, name: str) -> dict[str, str]:
        bucket, prefix = _parts(self.uri)
        return {"Bucket": bucket, "Key": prefix + name}

    def _encryption(self) -> dict[str, str]:
        return self.encryption.arguments() if self.encryption else {}


def _manager(client: Any) -> Any:
    """What sends large files in parts, and not over an object that is there by then (where the store knows that condition)."""
    from boto3.s3.transfer import TransferConfig, create_transfer_manager

    client.meta.events.register("before-parameter-build.s3.CompleteMultipartUpload", lambda params, **_: params.update(IfNoneMatch="*"))
    config = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, max_concurrency=CONNECTIONS, preferred_transfer_client="classic")
    return create_transfer_manager(client, config)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing more when the block ends."""
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _files(folder: Path, prefix: str) -> dict[str, _File]:
    """All files in `folder` by name. Raises `DiffstillError` if there is anything that S3 cannot hold below `prefix`."""
    with _local(folder):
        found = [_file(folder, path, prefix) for path in _entries(folder) if path.name not in DESKTOP_LITTER]
    return {file.name: file for file in found}


def _entries(folder: Path) -> Iterator[Path]:
    """Everything in `folder` and in its folders but the folders themselves."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _entries(Path(entry.path))
        else:
            yield Path(entry.path)


def _file(folder: Path, path: Path, prefix: str) -> _File:
    name, status = path.relative_to(folder).as_posix(), path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise DiffstillError(f"{str(path)!r}: is a link or another special file, which S3 cannot hold; put a regular file there, or remove it")
    if len((prefix + name).encode("utf-8", "surrogateescape")) > LONGEST_KEY:
        raise DiffstillError(f"{str(path)!r}: makes a key of more than {LONGEST_KEY} bytes, which S3 cannot hold; shorten its name or the prefix")
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", name) or _is_ours(name):
        raise DiffstillError(
            f"{str(path)!r}: has a name of control characters, other than UTF-8, or of {_PROBE}* or {_REMOVAL}*, which S3 cannot hold here; rename it"
        )
    return _File(name, path, status.st_size, _stamp(status))


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Another one whenever a file is written or replaced."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def _local(path: Path) -> Iterator[None]:
    """A local file or folder that cannot be read in the block is one message."""
    try:
        yield
    except OSError as error:
        shown = error.filename or path
        raise DiffstillError(f"{shown}: cannot be read ({error.strerror}); see that it is there and readable, and upload again") from error


def _digest(digest: Any, chunks: Iterable[bytes]) -> Any:
    """`digest` after all of `chunks`."""
    for chunk in chunks:
        digest.update(chunk)
    return digest


def _base64(digest: Any) -> str:
    return base64.b64encode(digest.digest()).decode()


# --- remove -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Area:
    """A folder in the store: how many objects of which size, the age of the youngest, and whether it has a manifest."""

    uri: str
    name: str
    objects: int
    size: int
    age: timedelta
    whole: bool


@dataclass(frozen=True)
class Parts:
    """What has arrived of a large file whose upload in parts is not complete: its name below the prefix."""

    name: str
    upload_id: str
    size: int
    age: timedelta


def areas(uri: str, last: str = "manifest.json") -> list[Area]:
    """The folders directly below `uri`, by name."""
    found: dict[str, Area] = {}
    with _client(uri) as client:
        for item, age in _dated(client, *_parts(uri)):
            name, slash, below = item.name.partition("/")
            if slash:
                known = found.get(name, Area(f"{uri.rstrip('/')}/{name}", name, 0, 0, timedelta.max, whole=False))
                youngest = known.age if _is_sign(below) else min(age, known.age)
                whole = known.whole or below == last
                found[name] = replace(known, objects=known.objects + 1, size=known.size + item.size, age=youngest, whole=whole)
    return [found[name] for name in sorted(found)]


def unfinished(uri: str) -> list[Parts]:
    """Uploads in parts below `uri` that are not complete, with the bytes that they hold."""
    with _client(uri) as client:
        return [replace(one, size=_held(client, uri, one)) for one in _unfinished(client, uri)]


def _unfinished(client: Any, uri: str) -> Iterator[Parts]:
    bucket, prefix = _parts(uri)
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        now = _time(page)
        for begun in page.get("Uploads", ()):
            yield Parts(begun["Key"].removeprefix(prefix), begun["UploadId"], 0, now - begun["Initiated"])


def _held(client: Any, uri: str, parts: Parts) -> int:
    bucket, prefix = _parts(uri)
    with suppress(client.exceptions.NoSuchUpload):  # it was completed meanwhile
        pages = client.get_paginator("list_parts").paginate(Bucket=bucket, Key=prefix + parts.name, UploadId=parts.upload_id)
        return sum(part["Size"] for page in pages for part in page.get("Parts", ()))
    return 0


def abort(uri: str, parts: Parts) -> None:
    """Free what an upload in parts has sent; nothing if it is complete or gone."""
    with _client(uri) as client:
        _abort(client, uri, parts)


def _abort(client: Any, uri: str, parts: Parts) -> None:
    bucket, prefix = _parts(uri)
    with suppress(client.exceptions.NoSuchUpload):  # another process was quicker
        client.abort_multipart_upload(Bucket=bucket, Key=prefix + parts.name, UploadId=parts.upload_id)


def remove(uri: str, unless: Callable[[list[str], timedelta], str | None], *, first: str = "manifest.json") -> str | None:
    """Delete all objects below `uri`, `first` before all others, so that what is left of it is not whole. Returns None, or why it was spared.

    `unless` is told their names and the age of the youngest, and says why they must stay after all. Uploads to the prefix wait meanwhile, and
    what they have written before is seen by `unless`. Killed half-way, what is left is a prefix that is not whole: an upload or another removal goes on.
    """
    with _client(uri) as client, _Removal(client, uri) as removal:
        names, age = removal.look()
        if names is None:
            return "is being removed by another `diffstill gc`"
        if reason := unless([name for name in names if _is_file(name)], age):
            return reason
        removal.delete([name for name in names if name == first])
        removal.delete([name for name in names if name != first])
        for parts in _unfinished(client, uri):
            _abort(client, uri, parts)
    return None


@dataclass
class _Removal:
    """A removal at work: while it is, an object of its own in the prefix says so to uploads, and to other removals."""

    client: Any
    uri: str
    sign: str = field(default_factory=lambda: f"{_REMOVAL}{uuid.uuid4().hex}")
    given: float = field(default_factory=time.time)

    def __enter__(self) -> Self:
        self._give_sign()
        return self

    def __exit__(self, *_error: object) -> None:
        with suppress(Exception):  # the first error is the one to show, and the sign ages by itself
            self.client.delete_object(**self._address(self.sign))

    def look(self) -> tuple[list[str] | None, timedelta]:
        """The names of all objects, and the age of the youngest or of an upload in parts; no names while another removal is at work."""
        names, ages = [], [parts.age for parts in _unfinished(self.client, self.uri)]
        for item, age in _dated(self.client, *_parts(self.uri)):
            if _is_sign(item.name) and item.name != self.sign and age < LEASE:
                return None, age
            if not _is_sign(item.name):
                ages.append(age)
            if item.name != self.sign:
                names.append(item.name)
        return names, min(ages, default=timedelta.max)

    def delete(self, names: list[str]) -> None:
        """Delete objects, giving signs. Raises `DiffstillError` if something held it up."""
        with _workers() as workers:
            for start in range(0, len(names), DELETES):
                self._give_sign()
                for future in as_completed([workers.submit(self._delete, name) for name in names[start : start + DELETES]]):
                    future.result()

    def _give_sign(self) -> None:
        self._refuse_late()
        given = time.time()  # of the wall: it goes on while a machine sleeps
        self.client.put_object(**self._address(self.sign), Body=b"")
        self.given = given

    def _delete(self, name: str) -> None:
        """One request per object: stores differ in the checksum that they want with a list of them."""
        self._refuse_late()
        self.client.delete_object(**self._address(name))

    def _refuse_late(self) -> None:
        """Raise `DiffstillError` when the sign is so old that an upload may soon take this removal for dead."""
        if time.time() - self.given > LEASE.total_seconds() / 3:
            raise TransientError(f"{self.uri}: its removal was held up, and somebody may be uploading there by now; try again")

    def _address(self, name: str) -> dict[str, str]:
        bucket, prefix = _parts(self.uri)
        return {"Bucket": bucket, "Key": prefix + name}


def _is_sign(name: str) -> bool:
    return name.startswith(_REMOVAL)


# --- the store ----------------------------------------------------------------------------------------------------


def _parts(uri: str) -> tuple[str, str]:
    """Bucket and prefix; a prefix that is not empty ends in `/`."""
    found = re.fullmatch(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?", uri)
    if not found:
        raise DiffstillError(f"{without_secrets(uri)!r}: no S3 location; write {FORM}, with credentials in the environment and not in it")
    prefix = (found[2] or "").rstrip("/")
    return found[1], f"{prefix}/" if prefix else ""


def _endpoint() -> str:
    return without_secrets(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "Amazon S3")


@contextmanager
def _client(uri: str) -> Iterator[Any]:
    """A client of the store; a failure of the store, the network or the settings in the block is one message without credentials."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError
    except ImportError as error:
        raise DiffstillError(f"{uri}: S3 needs boto3, which is not installed; pip install 'diffstill[s3]'") from error
    try:
        yield _connected(boto3.Session(botocore_session=_session()))
    except (BotoCoreError, ClientError, RetriesExceededError) as error:
        # The code alone: messages of servers quote access keys and signatures.
        code = error.response.get("Error", {}).get("Code", "?") if isinstance(error, ClientError) else type(error).__name__
        fix = _FIXES.get(code, "check AWS_ENDPOINT_URL, the network and the service, then try again")
        raise (DiffstillError if code in _FIXES else TransientError)(
            f"{uri}: bucket {_parts(uri)[0]!r} at {_endpoint()} refuses ({code}); {fix}"
        ) from error


def _session() -> Any:
    from botocore.session import get_session

    session = get_session()
    session.register_component("data_loader", _models())
    return session


@cache
def _models() -> Any:
    """What botocore knows of services. To read it anew is most of the fifth of a second that a client takes."""
    from botocore.loaders import create_loader

    return create_loader()


def _connected(session: Any) -> Any:
    from botocore.config import Config

    (connect, read), retries = TIMEOUTS, {"mode": "standard", "total_max_attempts": 3}
    # Checksums in trailers, boto3's default, fail on stores that do not know them: `upload` sends those that it needs in headers.
    checksums = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_supported"}
    connections = 2 * CONNECTIONS  # of workers, and of the threads that send their parts
    try:
        config = Config(connect_timeout=connect, read_timeout=read, retries=retries, max_pool_connections=connections, **checksums)
        return session.client("s3", config=config)
    except ValueError as error:
        raise DiffstillError(f"AWS_ENDPOINT_URL is {_endpoint()!r}, which is no URL; write http(s)://<host>:<port>") from error
