"""Servers that outlive the command that starts them: a record each of which process it is, by which another command finds and ends it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from diffstill.errors import DiffstillError

MARK = ".diffstill-stack"
"""Lies in each folder that is ours."""
ROOM = 256 * 2**20
"""Bytes on the disk under which that may be why a server does not start."""
PATIENCE = 120.0
"""Seconds in which a server must answer, and in which it must end."""


@dataclass(frozen=True)
class Role:
    """A server: its command, its surroundings, and how it is seen to answer."""

    name: str
    command: tuple[str, ...]
    answers: Callable[[], bool]
    ports: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    needs: tuple[str, ...] = ()
    """Without which it never answers."""
    scratch: Path | None = None
    """A folder that a server before it must have left nothing in."""
    end: signal.Signals = signal.SIGTERM

    @property
    def digest(self) -> str:
        """Changes with whatever would make it another server; reveals no secret."""
        return hashlib.sha256(json.dumps([self.command, sorted(self.environment.items()), self.user]).encode()).hexdigest()


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def called(*command: object, given: str | None = None, **options: Any) -> str:
    """What a program prints that must succeed. Raises `DiffstillError` with the last lines of what it complains about."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, input=given, text=True, check=False, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
    except FileNotFoundError as error:
        raise DiffstillError(f"{error.filename}: not there; install it") from error
    except subprocess.TimeoutExpired as error:
        raise DiffstillError(f"{Path(words[0]).name} did not end within {error.timeout:.0f} s; the servers that it asks are stuck") from error
    if done.returncode:
        last = (done.stderr or done.stdout or "").strip().splitlines()[-3:] or [f"exit code {done.returncode}"]
        raise DiffstillError(f"{Path(words[0]).name} failed: {' / '.join(last)}")
    return done.stdout or ""


def as_user(user: str | None) -> dict[str, Any]:
    """Options of `subprocess` for a process of that user; None is who we are."""
    return {"user": user, "group": user, "extra_groups": []} if user else {}


def is_occupied(folder: Path) -> bool:
    """Whether something lies in it."""
    return folder.exists() and any(folder.iterdir())


def claim(folder: Path) -> None:
    """Make a folder, or take an empty one, as ours. Raises `DiffstillError` if another's things lie there: of ours, what is in the way is deleted."""
    if is_occupied(folder) and not (folder / MARK).exists():
        raise DiffstillError(f"{folder}: holds what is not of this stack (it has no {MARK}); name an empty or a new folder with --state")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch(mode=0o600)


def private(path: Path) -> int:
    """A new file in the place of any old one, which its owner alone may read, to be written."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


@dataclass(frozen=True)
class Processes:
    """The servers whose records and logs lie in `folder`."""

    folder: Path

    def log(self, name: str) -> Path:
        """What a server prints."""
        return self.folder / f"{name}.log"

    def find(self, name: str) -> psutil.Process | None:
        """The running process of a role; another process that got its number is none."""
        with suppress(OSError, ValueError, psutil.Error):
            record = self._record(name)
            process = psutil.Process(record["pid"])
            if abs(process.create_time() - record["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None

    def is_current(self, role: Role) -> bool:
        """Whether the role runs as it should."""
        return self.find(role.name) is not None and self._record(role.name)["digest"] == role.digest

    def start(self, role: Role) -> None:
        """Have the role run as it should and answer. Raises `DiffstillError` naming a port that is taken, or what the server says."""
        if self.is_current(role):
            return self._wait(role)
        self.refuse_taken(role.name, role.ports)
        self.stop(role.name)
        if role.scratch:
            shutil.rmtree(role.scratch, ignore_errors=True)
        with os.fdopen(private(self.log(role.name)), "wb") as out:
            process = subprocess.Popen(
                role.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=surroundings() | dict(role.environment),
                cwd=self.folder,
                start_new_session=True,
                umask=0o077,
                **as_user(role.user),
            )
        created = psutil.Process(process.pid).create_time()
        record = {"pid": process.pid, "created": created, "digest": role.digest, "end": role.end, "ports": [*role.ports.values()]}
        with os.fdopen(private(self._path(role.name)), "w", encoding="utf-8") as out:
            json.dump(record, out)
        return self._wait(role)

    def refuse_taken(self, name: str, ports: Mapping[str, int]) -> None:
        """Raise `DiffstillError` naming a port that another program has; `ports` are by the names of their settings."""
        ours = self._record(name)["ports"] if self.family(name) else []
        for variable, port in ports.items():
            if listens(port) and port not in ours:
                raise DiffstillError(f"port {port} of {name} is taken by another program; end that, or set {variable} to a free port")

    def stop(self, name: str) -> None:
        """End the role with all its children, if it runs."""
        leader, family = self.find(name), self.family(name)
        if leader:
            with suppress(psutil.NoSuchProcess):
                leader.send_signal(self._record(name)["end"])
            until(lambda: not _lives(leader))
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        until(lambda: not any(map(_lives, family)))
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        self._path(name).unlink(missing_ok=True)

    def family(self, name: str) -> list[psutil.Process]:
        """The running process of a role and those that come from it; these may outlive it."""
        leader = self.find(name)
        family = {leader, *leader.children(recursive=True)} if leader else set()
        with suppress(OSError, ValueError):
            record = self._record(name)
            family |= {one for one in psutil.process_iter() if self._came_from(one, record)}
        return list(family)

    def _came_from(self, process: psutil.Process, record: Mapping[str, Any]) -> bool:
        """Whether it is of the session of the recorded process, and not of a later one with the same number: ours work in our folder."""
        with suppress(OSError, psutil.Error):
            ours = os.getsid(process.pid) == record["pid"] and process.create_time() > record["created"] - 1
            return ours and _lives(process) and Path(process.cwd()).is_relative_to(self.folder)
        return False

    def _wait(self, role: Role) -> None:
        """Until it answers, while it and what it needs live."""
        names = (*role.needs, role.name)

        def dead() -> str | None:
            return next((name for name in names if self.find(name) is None), None)

        answered = until(lambda: dead() is not None or role.answers())
        if (name := dead()) or not answered:
            name = name or role.name
            raise DiffstillError(f"{name} does not start: {self.last_words(name)} (more in {self.log(name)}{self._room()})")

    def last_words(self, name: str) -> str:
        """The end of its log on one line, of the lines that tell an error, if any does."""
        text = self.log(name).read_text(encoding="utf-8", errors="replace") if self.log(name).exists() else ""
        lines = [line.strip()[:300] for line in text.splitlines() if line.strip()]
        told = [line for line in lines if re.search("error:|no space left|storage space|abort", line, re.IGNORECASE)]
        return " / ".join((told or lines)[-2:]) or "it says nothing"

    def _room(self) -> str:
        """A word on the disk when it is nearly full: servers cannot even complain then."""
        free = shutil.disk_usage(self.folder).free
        return f"; {free / 2**20:.0f} MiB are free there" if free < ROOM else ""

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.pid"

    def _record(self, name: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self._path(name).read_text(encoding="utf-8"))
        return record


def surroundings() -> dict[str, str]:
    """Our environment without what servers and their tools would take for settings of theirs."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_", "PG", "CEPH_", "RCLONE_"))}


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def until(true: Callable[[], bool]) -> bool:
    """Whether it comes true while `PATIENCE` lasts."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if true():
            return True
        time.sleep(0.1)
    return False
