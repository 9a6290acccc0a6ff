"""Back the stack up into a folder, and restore it from there.

The database is dumped first, the buckets are copied then. Files are sent before the row that names them and never change, so what the
dump names is in the copy. What is published meanwhile may be in the copy without a row: it costs space and nothing else. Deleting is what must
not happen meanwhile: `diffstill gc`, or versions.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

from diffstill.errors import DiffstillError
from infra.local.processes import called, surroundings
from infra.local.settings import BUCKETS, Settings

DUMP = "database.dump"
SUMS = "SHA256SUMS"
"""As `sha256sum --check` takes it."""
ROWS = "SELECT (SELECT count(*) FROM runs) + (SELECT count(*) FROM registered_models)"


class Stack(Protocol):
    """What a backup needs of a running stack."""

    @property
    def settings(self) -> Settings:
        """Its passwords and ports."""

    def status(self) -> dict[str, bool]:
        """Which roles run."""

    def database(self, program: str, *words: str, stdin: IO[bytes] | int = ..., stdout: IO[bytes] | int = ...) -> str:
        """Run a program of PostgreSQL there."""

    def without_mlflow(self) -> AbstractContextManager[None]:
        """MLflow's server is down meanwhile."""


def back_up(stack: Stack, folder: Path) -> tuple[int, int]:
    """Write the database and the buckets into `folder`, which appears when it is whole. Returns the number of files and bytes."""
    if folder.exists():
        raise DiffstillError(f"{folder}: exists already; name a folder that does not: a backup never replaces another")
    _refuse_down(stack)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a backup that was killed
    partial.mkdir(parents=True, mode=0o700)
    try:
        files = _write(stack, partial)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return len(files), sum((folder / name).stat().st_size for name in files)


def _write(stack: Stack, partial: Path) -> list[str]:
    """The names of what was written, but for the sums."""
    with (partial / DUMP).open("wb") as out:
        stack.database("pg_dump", "--format=custom", "--no-owner", "mlflow", stdout=out)
    for bucket in BUCKETS:
        (partial / bucket).mkdir()
        _rclone(stack.settings, "copy", f"stack:{bucket}", str(partial / bucket))
    files = list(_files(partial))
    if broken := next((name for name in files if name.splitlines() != [name]), None):
        raise DiffstillError(f"{broken!r}: a line break in the name of an object, which {SUMS} cannot hold; rename or delete the object")
    (partial / SUMS).write_text("".join(f"{_sha256(partial / name)}  {name}\n" for name in files), encoding="utf-8", errors="surrogateescape")
    os.sync()
    return files


def restore(stack: Stack, folder: Path) -> None:
    """Put a backup into an empty stack. What a killed restore has put there already is no obstacle: the database, which comes last, is all or nothing."""
    refuse_damaged(folder)
    _refuse_down(stack)
    _refuse_occupied(stack, folder)
    for bucket in BUCKETS:
        _rclone(stack.settings, "copy", "--checksum", str(folder / bucket), f"stack:{bucket}")
    with stack.without_mlflow(), (folder / DUMP).open("rb") as dump:
        stack.database("dropdb", "--force", "--if-exists", "mlflow")
        stack.database("createdb", "mlflow")
        stack.database("pg_restore", "--single-transaction", "--exit-on-error", "--no-owner", "--dbname=mlflow", stdin=dump)


def refuse_damaged(folder: Path) -> None:
    """Raise `DiffstillError` if `folder` is no whole backup, naming the file."""
    if not (folder / SUMS).is_file():
        raise DiffstillError(f"{folder}: has no {SUMS}, so it is no whole backup; name a folder that a backup has written to its end")
    text = (folder / SUMS).read_text(encoding="utf-8", errors="surrogateescape")
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.splitlines())}
    there = set(_files(folder))
    for name in sorted(sums.keys() | there):
        if name not in sums or name not in there or _sha256(folder / name) != sums[name]:
            state = "is no file of this backup" if name not in sums else "is missing" if name not in there else "was changed"
            raise DiffstillError(f"{folder}: {name} {state}; restore from another backup")


def _files(folder: Path) -> Iterator[str]:
    """All files but the sums, by name."""
    yield from sorted(name for path in folder.rglob("*") if path.is_file() and (name := path.relative_to(folder).as_posix()) != SUMS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_down(stack: Stack) -> None:
    if down := [role for role, runs in stack.status().items() if not runs]:
        raise DiffstillError(f"not running: {', '.join(down)}; bring the stack up first: make stack")


def _refuse_occupied(stack: Stack, folder: Path) -> None:
    """A restore adds to nothing and replaces nothing."""
    fix = "restore into an empty stack (make stack-down WIPE=yes, make stack)"
    if rows := int(stack.database("psql", "-qAt", "--dbname=mlflow", f"--command={ROWS}")):
        raise DiffstillError(f"MLflow's database holds {rows} runs and models; {fix}")
    for bucket in BUCKETS:
        listed = _rclone(stack.settings, "lsf", "--recursive", "--files-only", f"stack:{bucket}").splitlines()
        if foreign := [name for name in listed if not (folder / bucket / name).is_file()]:
            raise DiffstillError(f"the bucket {bucket} holds {foreign[0]!r}, which is not in {folder}; {fix}")


def _rclone(settings: Settings, *words: str) -> str:
    """What rclone prints; the remote `stack` is known from the environment alone."""
    if not shutil.which("rclone"):
        raise DiffstillError("not installed: rclone, which copies the buckets; on Debian and Ubuntu: apt-get install rclone")
    remote = {
        "TYPE": "s3",
        "PROVIDER": "Other",
        "ENDPOINT": settings.s3_url,
        "ACCESS_KEY_ID": settings.s3_access_key,
        "SECRET_ACCESS_KEY": settings.s3_secret_key,
        "REGION": "us-east-1",
        "NO_CHECK_BUCKET": "true",
        "CHUNK_SIZE": "8M",  # parts as diffstill and boto3 make them, so that ETags stay comparable
        "UPLOAD_CUTOFF": "8M",
    }
    environment = surroundings() | {f"RCLONE_CONFIG_STACK_{name}": value for name, value in remote.items()} | {"RCLONE_CONFIG": ""}
    shown = ("--progress",) if sys.stdout.isatty() and words[0] == "copy" else ()
    return called("rclone", *shown, *words, env=environment, stdout=None if shown else subprocess.PIPE)
