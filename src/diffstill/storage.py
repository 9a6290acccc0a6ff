"""S3, and only here: list, download and probe what lies under `s3://bucket/prefix`.

Endpoint and credentials come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID` and the other usual ways).
A prefix is a folder: `s3://bucket/a` has `a/b`, but not `ab`.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock

from diffstill.errors import DiffstillError, without_secrets
from diffstill.record import Record, ignore

FORM = "s3://<bucket>/<prefix>"
BATCH = 1000
"""Files in transfer at a time: a transfer of boto3 keeps some kilobytes until it is let go, and data sets have millions of files."""
TIMEOUTS = (5.0, 20.0)
"""Seconds to connect, and to the next byte."""

_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN with temporary ones) to valid credentials of this store"
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
    "ProfileNotFound": "correct or unset AWS_PROFILE",
}


@dataclass(frozen=True)
class Object:
    """A file in the store: its name below the prefix, its size in bytes, and the ETag that changes with its content."""

    name: str
    size: int
    etag: str


def listing(uri: str) -> list[Object]:
    """All objects below `uri`, by name. Raises `DiffstillError` if there is none, or one whose name is no path of a file."""
    bucket, prefix = _parts(uri)
    with _client(uri) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        found = [item for page in pages for item in page.get("Contents", ())]
    objects = [Object(item["Key"].removeprefix(prefix), item["Size"], item["ETag"]) for item in found if not item["Key"].endswith("/")]
    if not objects:
        raise DiffstillError(f"{uri}: holds no object; correct the prefix, or upload the data there")
    _refuse_no_paths(uri, [item.name for item in objects])
    return sorted(objects, key=lambda item: item.name)


def download(uri: str, folder: Path, record: Record = ignore) -> list[Object]:
    """Everything below `uri` as files in `folder`, which must not exist and appears whole or not at all. Returns what was downloaded."""
    if folder.exists():
        raise DiffstillError(f"{folder}: exists already; remove it or choose another folder for {uri}")
    objects = listing(uri)
    appear(folder, lambda partial: transfer(uri, objects, partial, record))
    return objects


def transfer(uri: str, objects: list[Object], folder: Path, record: Record = ignore) -> None:
    """Download `objects` into `folder`. Raises `DiffstillError` if the store changes meanwhile."""
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
                progress.update(item.size)
    if listing(uri) != objects:
        raise DiffstillError(f"{uri}: changed while it was downloaded; try again when nothing writes there")


def probe(uri: str) -> None:
    """Write, read and delete a small object below `uri`. Raises `DiffstillError` naming the bucket, the error and the fix."""
    bucket, prefix = _parts(uri)
    key, content = f"{prefix}.diffstill-probe-{uuid.uuid4().hex}", b"diffstill"
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


def appear(folder: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a folder that appears at `folder` whole or not at all; nothing is done if it is there, or comes from another process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        if folder.exists():
            return
        try:
            partial.mkdir()
            fill(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_inside(name: str) -> bool:
    """Whether a name from outside is the path of a file below the folder that it is meant for."""
    path = PurePosixPath(name)
    return str(path) == name and "\0" not in name and name != "." and not path.is_absolute() and ".." not in path.parts


def _refuse_no_paths(uri: str, names: list[str]) -> None:
    known = set(names)
    for name in names:
        if not is_inside(name) or any(str(parent) in known for parent in PurePosixPath(name).parents):
            raise DiffstillError(f"{uri}: the object {name!r} cannot be a file beside the others; rename or remove it")


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
        yield _connected(boto3.Session())
    except (BotoCoreError, ClientError, RetriesExceededError) as error:
        # The code alone: messages of servers quote access keys and signatures.
        code = error.response.get("Error", {}).get("Code", "?") if isinstance(error, ClientError) else type(error).__name__
        fix = _FIXES.get(code, "check AWS_ENDPOINT_URL, the network and the service, then try again")
        raise DiffstillError(f"{uri}: bucket {_parts(uri)[0]!r} at {_endpoint()} refuses ({code}); {fix}") from error


def _connected(session: Any) -> Any:
    from botocore.config import Config

    (connect, read), retries = TIMEOUTS, {"mode": "standard", "total_max_attempts": 3}
    try:
        return session.client("s3", config=Config(connect_timeout=connect, read_timeout=read, retries=retries))
    except ValueError as error:
        raise DiffstillError(f"AWS_ENDPOINT_URL is {_endpoint()!r}, which is no URL; write http(s)://<host>:<port>") from error
