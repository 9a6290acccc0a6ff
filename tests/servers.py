"""Real servers for tests: processes of their own on loopback, gone when the block ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

KEY, SECRET = "testing", "s3cr3t-of-tests"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(
    command: list[str], log: Path, environment: Mapping[str, str] | None = None, user: str | None = None, end: signal.Signals = signal.SIGTERM
) -> Iterator[subprocess.Popen]:
    """Run a process until the block ends, when it gets the signal `end`; its children end with it."""
    around = os.environ | dict(environment or {})
    rights: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=around, cwd=log.parent, start_new_session=True, **rights) as process,
    ):
        try:
            yield process
        finally:
            process.send_signal(end)
            try:
                process.wait(timeout=30)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def served(
    command: list[str],
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    seconds: float = 90,
    answers: Callable[[int], bool] = listens,
    **rights: Any,
) -> Iterator[subprocess.Popen]:
    """Run a server until the block ends; it must answer on `port` within `seconds`."""
    with running(command, log, environment, **rights) as process:
        _wait(process, port, log, seconds, answers)
        yield process


def _wait(process: subprocess.Popen, port: int, log: Path, seconds: float, answers: Callable[[int], bool]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if answers(port):
            return
        time.sleep(0.1)
    raise AssertionError(f"no server on port {port}: {log.read_text()[-2000:]}")


@contextmanager
def s3(folder: Path, open_requests: int | None = None) -> Iterator[tuple[str, subprocess.Popen]]:
    """An S3 server with small pages, its URL and process; after `open_requests` requests it asks for real credentials."""
    port = free_port()
    environment = {"MOTO_S3_DEFAULT_MAX_KEYS": "5"} | ({} if open_requests is None else {"INITIAL_NO_AUTH_ACTION_COUNT": str(open_requests)})
    with served([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, folder / f"s3-{port}.log", environment) as process:
        yield f"http://127.0.0.1:{port}", process


def s3_environment(endpoint: str, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """What points AWS's libraries to `endpoint`, and nowhere else."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nowhere/config",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere/credentials",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def mlflow_server(
    folder: Path, *, backend: str = "sqlite", artifacts: Path | str | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """MLflow's server and its URL: runs go to `backend`, a file in `folder` or an SQLAlchemy URI; files to `artifacts`, a folder or s3://bucket/prefix.

    With sqlite it takes 7 s to start on an idle machine: 6 are two processes that import MLflow one after the other. `environment` is the server's, for S3 for instance.
    """
    port = free_port()
    database = f"sqlite:///{folder / 'mlflow.db'}" if backend == "sqlite" else backend
    stores = ["--backend-store-uri", database, "--artifacts-destination", str(artifacts or folder / "artifacts")]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *stores]
    quick = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # else nine processes, and twice the time
    with served(command, port, folder / f"mlflow-{port}.log", quick | dict(environment or {}), 180, _healthy):
        yield f"http://127.0.0.1:{port}"


def _healthy(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
        return answer.status == 200
    return False


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """An empty PostgreSQL from Debian's packages, and its URI for SQLAlchemy. Starts in 2 s; its log goes to `folder`."""
    from infra.local.native import Postgres  # not at the top: an image with the tests has no infra

    with TemporaryDirectory(prefix="postgres-") as outside:  # pytest's folders cannot be entered by other users
        Path(outside).chmod(0o711)
        server = Postgres(Path(outside) / "data", free_port())
        server.make()
        log, rights = folder / f"postgres-{server.port}.log", {"user": server.user, "end": signal.SIGINT}  # at SIGTERM it waits for its clients
        with served([*server.command], server.port, log, answers=lambda _: server.answers(), **rights):
            server.set_password(SECRET)
            yield f"postgresql+psycopg2://mlflow:{SECRET}@127.0.0.1:{server.port}/postgres"


@dataclass(frozen=True)
class Gateway:
    """Ceph's S3 gateway, which knows its accounts, and lets each into its own buckets only."""

    url: str
    open_account: Callable[[str, str, str], None]

    def account(self, name: str) -> dict[str, str]:
        """Open an account: what points AWS's libraries to the gateway with its credentials."""
        key, secret = f"key-of-{name}", f"s3cr3t-of-{name}"
        self.open_account(name, key, secret)
        return s3_environment(self.url, key, secret)


@contextmanager
def ceph(folder: Path) -> Iterator[Gateway]:
    """Ceph from Debian's packages, all in memory: a monitor, a store and the S3 gateway. Starts in 2 s."""
    from infra.local.native import IN_MEMORY, Ceph

    server = Ceph(folder / "ceph", free_port())
    server.make(free_port(), IN_MEMORY.format(bytes=4 * 2**30))
    with served([*server.monitor_command], server.monitor, folder / "mon.log"):
        server.make_store()
        with (
            running([*server.store_command], folder / "osd.log"),
            served([*server.gateway_command], server.gateway, folder / "gateway.log"),
        ):
            yield Gateway(f"http://127.0.0.1:{server.gateway}", server.set_account)
