"""The stack as containers: compose.yaml, by way of `docker compose`."""

from __future__ import annotations

import os
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from diffstill.errors import DiffstillError
from infra.local.processes import called, until
from infra.local.settings import HERE, Settings

DOCKER = os.environ.get("DOCKER", "docker")
FILE = HERE / "compose.yaml"


@dataclass(frozen=True)
class ComposeStack:
    """The services of compose.yaml, with the passwords and ports of a settings file."""

    path: Path
    settings: Settings
    name = "compose"

    def obstacle(self) -> str | None:
        """Why it cannot run here, in a few words; None if it can, and then all its images are here."""
        for words, told in (
            ((DOCKER, "version"), "no Docker engine answers"),
            ((DOCKER, "compose", "version"), "docker has no compose"),
            (self._words("pull", "--quiet", "--ignore-buildable", "--policy=missing"), "images cannot be pulled"),
            (self._words("build", "--quiet"), "the image of MLflow's server cannot be built"),
        ):
            try:
                done = subprocess.run(words, capture_output=True, text=True, env=self._environment(), timeout=1800, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                return f"{told} ({error})"
            if done.returncode:
                return f"{told} ({(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[-1]})"
        return None

    def up(self) -> None:
        """Bring it up as the settings say. PostgreSQL takes a password from its environment when it is made and never again, so it is told."""
        self._compose("up", "--detach", "--wait", "postgres", "s3")
        self._compose("exec", "-T", "postgres", "psql", "-U", "mlflow", "-q", given=f"ALTER ROLE mlflow PASSWORD '{self.settings.postgres_password}'")
        self._compose("up", "--detach", "mlflow")
        if not until(self._healthy):
            raise DiffstillError(f"mlflow does not answer at {self.settings.mlflow_url}; see: docker compose --file {FILE} logs mlflow")

    def down(self, *, delete_data: bool = False) -> None:
        """End all containers; the volumes stay, unless they are to be deleted."""
        self._compose("down", *(("--volumes",) if delete_data else ()))

    def status(self) -> dict[str, bool]:
        """Which roles run."""
        running = self._compose("ps", "--services", "--status=running").split()
        return {role: role in running for role in ("postgres", "s3", "mlflow")}

    def database(self, program: str, *words: str, stdin: IO[bytes] | int = subprocess.DEVNULL, stdout: IO[bytes] | int = subprocess.PIPE) -> str:
        """What a program of PostgreSQL prints that is run in its container, where the version fits."""
        return called(*self._words("exec", "-T", "postgres", program, "-U", "mlflow", *words), stdin=stdin, stdout=stdout, env=self._environment())

    @contextmanager
    def without_mlflow(self) -> Iterator[None]:
        """MLflow's server is down meanwhile, so that nobody writes through it."""
        self._compose("stop", "mlflow")
        try:
            yield
        finally:
            self.up()

    def _healthy(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.settings.mlflow_url}/health", timeout=10) as answer:  # noqa: S310  (http, as written above)
            return bool(answer.status == 200)
        return False

    def _compose(self, *words: str, given: str | None = None) -> str:
        return called(*self._words(*words), given=given, env=self._environment())

    def _words(self, *words: str) -> tuple[str, ...]:
        return (DOCKER, "compose", "--file", str(FILE), "--env-file", str(self.path), *words)

    def _environment(self) -> dict[str, str]:
        """Without what would take precedence over the settings file."""
        return {name: value for name, value in os.environ.items() if name.lower() not in vars(self.settings)}
