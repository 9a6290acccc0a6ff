"""MLflow's SQLite file: its URI, whether it can be used, one process at a time in it, and artifacts that follow where its folder goes."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock

from diffstill.errors import DiffstillError

log = logging.getLogger("diffstill")
ARTIFACTS = "mlartifacts"
"""The folder beside the database in which runs keep their files."""
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's tables that hold absolute places of files."""


def uri_of(file: Path) -> str:
    """The URI of a database file, as SQLAlchemy reads it back."""
    quoted = str(file).replace("%", "%25").replace("?", "%3F")
    # for `sqlite:///` MLflow makes a folder of the name as it is quoted; where the driver is named, too, it leaves folders alone
    return f"{'sqlite' if quoted == str(file) else 'sqlite+pysqlite'}:///{quoted}"


def file_of(uri: str) -> Path | None:
    """The file of an SQLite database; None for servers, other databases and one in memory."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(uri).database if uri.startswith("sqlite") else None
    except ArgumentError:  # MLflow will say so
        return None
    return Path(name).absolute() if name and not name.startswith((":memory:", "file:")) else None


@contextmanager
def alone(uri: str) -> Iterator[None]:
    """Keep other processes out while tables or the run of a chain are made: MLflow looks first and makes then. Servers look after themselves."""
    file = file_of(uri)
    if file:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)  # as MLflow does
    if file is None or not _is_writable(file.parent):  # nobody makes tables there
        yield
        return
    with FileLock(file.with_name(f"{file.name}.lock")):
        yield


def check(uri: str) -> None:
    """See that the file can be used, which MLflow tries for minutes, and let artifacts follow it.

    Raises `sqlite3.Error` for a file that is no database, `DiffstillError` for one that cannot be made, or has lost its artifacts.
    """
    file = file_of(uri)
    if file is None:
        return
    if not file.exists():
        if not _is_writable(file.parent):
            raise DiffstillError(
                f"{file}: MLflow's database cannot be made here, {file.parent} is no folder or not writable; "
                "work elsewhere, or set MLFLOW_TRACKING_URI to a server, or to none for no tracking"
            )
        return
    with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True, timeout=20)) as database:
        if database.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            _follow(database, file)


def _is_writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK)


def _follow(database: sqlite3.Connection, file: Path) -> None:
    """Where the folder of the database was moved or copied, files of its runs lie beside it, and its entries lead to where they were."""
    here = file.parent / ARTIFACTS
    for experiment, location in database.execute("SELECT experiment_id, artifact_location FROM experiments").fetchall():
        there = Path(unquote(urlsplit(location or "").path))
        if not (location or "").startswith("file:") or there.name != ARTIFACTS or there.resolve() == here.resolve():
            continue
        runs = [name for (name,) in database.execute("SELECT run_uuid FROM runs WHERE experiment_id = ?", (experiment,))]
        another = there.parent / file.name  # where this file alone was copied: the database of that place
        stayed = another.is_file() and any((there / run).is_dir() for run in runs)
        if any((here / run).is_dir() for run in runs) or (another.is_file() and not stayed):
            _rewrite(database, location, here.as_uri())
            log.warning("%s was in %s before; its artifacts are now those in %s", file.name, there.parent, here)
        elif stayed:
            raise DiffstillError(
                f"{file}: is a copy of {another} without the files of its runs, and would write into {there}; "
                f"copy that folder to {here}, or move this file away to begin anew"
            )
        elif runs and not there.parent.is_dir():  # where only the folder of the files is missing, none was written yet
            raise DiffstillError(
                f"{file}: has lost the files of its runs: neither {there}, where they were, nor {here} has them; "
                "move that folder to one of these places, or make the first anew if they are gone for good"
            )


def _rewrite(database: sqlite3.Connection, before: str, after: str) -> None:
    """Replace a place in all tables, and what lies below it."""
    tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    with database:  # all or nothing
        for table, column in PLACES:
            if table in tables:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",  # noqa: S608
                    (after, len(before) + 1, before, len(before) + 1, f"{before}/"),
                )
