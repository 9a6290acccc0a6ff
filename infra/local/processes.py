"""Servers that outlive the command that starts them: a record each of which process it is, by which another command finds and ends it."""

from __future__ import annotations

import hashlib
import json
import os
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
    done = subprocess.run(words, input=given, text=True, check=False, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})
    if done.returncode:
        last = (done.stderr or done.stdout or "").strip().splitlines()[-3:] or [f"exit code {done.returncode}"]
        raise DiffstillError(f"{Path(words[0]).name} failed: {' / '.join(last)}")
    return done.stdout or ""


def as_user(user: str | None) -> dict[str, Any]:
    """Options of `subprocess` for a process of that user; None is who we are."""
    return {"user": user, "group": user, "extra_groups": []} if user else {}


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
        ours = self._record(role.name)["ports"] if self.find(role.name) else []
        for variable, port in role.ports.items():
            if listens(port) and port not in ours:
                raise DiffstillError(f"port {port} of {role.name} is taken by another program; end that, or set {variable} to a free port")
        self.stop(role.name)
        if role.scratch:
            shutil.rmtree(role.scratch, ignore_errors=True)
        with self.log(role.name).open("wb") as out:
            process = subprocess.Popen(
                role.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=surroundings() | dict(role.environment),
                cwd=self.folder,
                start_new_session=True,
                **as_user(role.user),
            )
        created = psutil.Process(process.pid).create_time()
        record = {"pid": process.pid, "created": created, "digest": role.digest, "end": role.end, "ports": [*role.ports.values()]}
        self._path(role.name).write_text(json.dumps(record), encoding="utf-8")
        return self._wait(role)

    def stop(self, name: str) -> None:
        """End the role with all its children, if it runs."""
        if process := self.find(name):
            family = [process, *process.children(recursive=True)]
            process.send_signal(self._record(name)["end"])
            until(lambda: not any(map(_lives, family)))
            for one in family:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        self._path(name).unlink(missing_ok=True)

    def _wait(self, role: Role) -> None:
        if not until(lambda: role.answers() or self.find(role.name) is None) or self.find(role.name) is None:
            raise DiffstillError(f"{role.name} does not start: {self.last_words(role.name)} (more in {self.log(role.name)})")

    def last_words(self, name: str) -> str:
        """The end of its log on one line."""
        lines = self.log(name).read_text(encoding="utf-8", errors="replace").strip().splitlines() if self.log(name).exists() else []
        return " / ".join(lines[-2:]) or "it says nothing"

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
