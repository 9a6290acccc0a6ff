"""Real servers for tests: processes of their own on loopback, gone when the block ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

KEY, SECRET = "testing", "s3cr3t-of-tests"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(command: list[str], port: int, log: Path, environment: Mapping[str, str] | None = None, seconds: float = 90) -> Iterator[subprocess.Popen]:
    """Run a server until the block ends; it must take connections on `port` within `seconds`."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | dict(environment or {}), cwd=log.parent)
    try:
        _wait(process, port, log, seconds)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(process: subprocess.Popen, port: int, log: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
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


def s3_environment(endpoint: str) -> dict[str, str]:
    """What points AWS's libraries to `endpoint`, and nowhere else."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nowhere/config",
        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere/credentials",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
