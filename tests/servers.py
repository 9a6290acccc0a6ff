"""Real servers for tests: processes of their own on loopback, gone when the block ends."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

KEY, SECRET = "testing", "s3cr3t-of-tests"

CEPH_SETTINGS = """[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{monitor}/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
paxos_propose_interval = 0.05
debug_rocksdb = 0
osd_crush_chooseleaf_type = 0
osd_objectstore = memstore
memstore_device_bytes = 4294967296
osd_class_load_list = *
osd_class_default_list = *
rgw_frontends = beast endpoint=127.0.0.1:{gateway}
keyring = {folder}/keyring
mon_data = {folder}/mon
osd_data = {folder}/osd
rgw_data = {folder}/gateway
crash_dir = {folder}
run_dir = {folder}
log_file =
log_to_stderr = true
admin_socket =
"""
CEPH_RIGHTS = {
    "mon.": 'caps mon = "allow *"',
    "client.admin": 'caps mon = "allow *"\ncaps osd = "allow *"',
    "osd.0": 'caps mon = "allow profile osd"\ncaps osd = "allow *"',
    "client.rgw": 'caps mon = "allow rw"\ncaps osd = "allow rwx"',
}


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


def called(*command: object, **options: Any) -> None:
    """Run a program that must succeed."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    assert done.returncode == 0, f"{command[0]} failed: {done.stdout[-2000:]}"


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
    binaries = max(Path("/usr/lib/postgresql").glob("*/bin"))
    rights: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}  # it refuses to run as root
    port = free_port()

    def ready(port: int) -> bool:  # it listens before it answers
        return subprocess.run([binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, check=False).returncode == 0

    with TemporaryDirectory(prefix="postgres-") as data:  # outside pytest's folders, which other users cannot enter
        if rights:
            shutil.chown(data, "postgres", "postgres")
        called(binaries / "initdb", "-D", data, "--auth=trust", "--username=mlflow", "--encoding=UTF8", "--locale=C", "--no-sync", cwd=data, **rights)
        command = [str(binaries / "postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", ""]
        log = folder / f"postgres-{port}.log"
        with served(command, port, log, answers=ready, end=signal.SIGINT, **rights):  # at SIGTERM it waits for its clients
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"


@dataclass(frozen=True)
class Gateway:
    """Ceph's S3 gateway, which knows its accounts, and lets each into its own buckets only."""

    url: str
    settings: Path

    def account(self, name: str) -> dict[str, str]:
        """Open an account: what points AWS's libraries to the gateway with its credentials."""
        key, secret = f"key-of-{name}", f"s3cr3t-of-{name}"
        person = (f"--uid={name}", f"--display-name={name}", f"--access-key={key}", f"--secret={secret}")
        called("radosgw-admin", "-c", self.settings, "user", "create", *person)
        return s3_environment(self.url, key, secret)


@contextmanager
def ceph(folder: Path) -> Iterator[Gateway]:
    """Ceph from Debian's packages, all in memory: a monitor, a store and the S3 gateway. Starts in 2 s."""
    monitor, port, cluster, store = free_port(), free_port(), uuid.uuid4(), uuid.uuid4()
    settings = _ceph_settings(folder, cluster, monitor, port)
    common = ["-c", str(settings)]
    called("monmaptool", "--create", "--fsid", cluster, "--addv", "a", f"[v2:127.0.0.1:{monitor}]", folder / "monmap")
    called("ceph-mon", "--mkfs", "-i", "a", "--monmap", folder / "monmap", *common)
    with served(["ceph-mon", "-f", "-i", "a", *common], monitor, folder / "mon.log"):
        called("ceph", *common, "--connect-timeout", 30, "osd", "new", store, 0)
        called("ceph-osd", "--mkfs", "-i", 0, "--osd-uuid", store, *common)
        with (
            running(["ceph-osd", "-f", "-i", "0", *common], folder / "osd.log"),
            served(["radosgw", "-f", "-n", "client.rgw", *common], port, folder / "gateway.log"),
        ):
            yield Gateway(f"http://127.0.0.1:{port}", settings)


def _ceph_settings(folder: Path, cluster: uuid.UUID, monitor: int, gateway: int) -> Path:
    """Write Ceph's settings and keys, and make its folders."""
    for name in ("mon", "osd", "gateway"):
        (folder / name).mkdir()
    key = subprocess.run(["ceph-authtool", "--gen-print-key"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    (folder / "keyring").write_text("".join(f"[{name}]\nkey = {key}\n{rights}\n" for name, rights in CEPH_RIGHTS.items()))
    (folder / "ceph.conf").write_text(CEPH_SETTINGS.format(fsid=cluster, folder=folder, monitor=monitor, gateway=gateway))
    return folder / "ceph.conf"
