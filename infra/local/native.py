"""The stack as processes of this machine: PostgreSQL, Ceph's RADOS Gateway as the S3 server, and MLflow's server, on loopback alone.

Everything lies in one folder. What the settings say is made so whenever the stack is brought up, passwords too.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from diffstill.errors import DiffstillError
from infra.local.processes import PATIENCE, Processes, Role, as_user, called, claim, is_occupied, listens, surroundings
from infra.local.settings import BUCKETS, Settings

ROLES = ("postgres", "ceph-mon", "ceph-osd", "radosgw", "mlflow")
"""In the order of their start."""
DISK = 32 * 2**30
"""Bytes that the buckets may hold: a sparse file, which takes what is in it."""
ACCOUNT = "diffstill"

CEPH_SETTINGS = """[global]
fsid = {cluster}
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
{disk}
osd_class_load_list = *
osd_class_default_list = *
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
IN_MEMORY = "osd_objectstore = memstore\nmemstore_device_bytes = {bytes}"
ON_DISK = "osd_objectstore = bluestore\nbluestore_block_size = {bytes}\nosd_memory_target = 939524096"  # the least that Ceph takes
CEPH_RIGHTS = {
    "mon.": 'caps mon = "allow *"',
    "client.admin": 'caps mon = "allow *"\ncaps osd = "allow *"',
    "osd.0": 'caps mon = "allow profile osd"\ncaps osd = "allow *"',
    "client.rgw": 'caps mon = "allow rw"\ncaps osd = "allow rwx"',
}


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def postgres_program(name: str) -> str | None:
    """Where a program of PostgreSQL is; Debian keeps those of the server out of the path."""
    return next(map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)), None) or shutil.which(name)


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL whose role `mlflow` needs its password over TCP. Its owner, user of the operating system, needs none over a socket in `folder`."""

    folder: Path
    port: int

    @property
    def user(self) -> str | None:
        """Who runs it, if it is not us: it refuses to run as root."""
        return "postgres" if os.geteuid() == 0 else None

    @property
    def command(self) -> tuple[str, ...]:
        """Run it in the foreground."""
        return (postgres_program("postgres") or "postgres", "-D", str(self.folder), "-h", "127.0.0.1", "-p", str(self.port), "-k", str(self.folder))

    def make(self) -> None:
        """Make the folder of an empty one."""
        self.folder.mkdir(mode=0o700)
        if self.user:
            shutil.chown(self.folder, self.user, self.user)
        socket = self.folder / f".s.PGSQL.{self.port}"
        if len(os.fsencode(socket)) > 107:
            raise DiffstillError(
                f"{self.folder}: {len(os.fsencode(socket))} bytes make a path of a socket, which may have 107; choose a shorter folder"
            )
        options = ("--username=mlflow", "--encoding=UTF8", "--locale=C", "--auth-local=peer", "--auth-host=scram-sha-256")
        self._called("initdb", "-D", self.folder, *options)
        (self.folder / "pg_hba.conf").write_text("local all all peer map=owner\nhost all all 127.0.0.1/32 scram-sha-256\n", encoding="utf-8")
        (self.folder / "pg_ident.conf").write_text(f"owner {self.user or pwd.getpwuid(os.geteuid()).pw_name} mlflow\n", encoding="utf-8")

    def answers(self) -> bool:
        """Whether it takes queries: it listens before that."""
        ready = (postgres_program("pg_isready") or "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port))
        return subprocess.run(ready, check=False).returncode == 0

    def set_password(self, password: str) -> None:
        """From now on; sessions that are open stay."""
        self.query(f"ALTER ROLE mlflow PASSWORD '{password}'")

    def make_database(self) -> None:
        """Make the database `mlflow` if it is not there."""
        if not self.query("SELECT 1 FROM pg_database WHERE datname = 'mlflow'"):
            self.query("CREATE DATABASE mlflow")

    def query(self, statement: str, database: str = "postgres") -> str:
        """What psql prints, asked as its owner; the statement goes through a pipe, where no other user sees it."""
        where = ("-h", self.folder, "-p", self.port, "-U", "mlflow", "-d", database)
        return self._called("psql", *where, "-qAt", "-v", "ON_ERROR_STOP=1", given=statement).strip()

    def _called(self, program: str, *words: object, given: str | None = None) -> str:
        where = {"cwd": self.folder, "env": surroundings()}
        return called(postgres_program(program) or program, *words, given=given, **where, **as_user(self.user))


# --- Ceph -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceph:
    """A Ceph of one monitor, one store and the S3 gateway, which knows its accounts and lets each into its own buckets alone."""

    folder: Path
    gateway: int

    @property
    def settings(self) -> Path:
        """What all its programs are told."""
        return self.folder / "ceph.conf"

    @property
    def monitor(self) -> int:
        """Its port, the same for all its life."""
        return int(re.findall(r"v2:127\.0\.0\.1:(\d+)", self.settings.read_text(encoding="utf-8"))[0])

    def make(self, monitor: int, disk: str) -> None:
        """Make the folder of an empty one with the monitor at that port, and data `IN_MEMORY` or `ON_DISK`."""
        cluster = uuid.uuid4()
        for name in ("mon", "osd", "gateway"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o700)
        key = called("ceph-authtool", "--gen-print-key").strip()
        (self.folder / "keyring").write_text("".join(f"[{name}]\nkey = {key}\n{rights}\n" for name, rights in CEPH_RIGHTS.items()), encoding="utf-8")
        self.settings.write_text(CEPH_SETTINGS.format(cluster=cluster, monitor=monitor, folder=self.folder, disk=disk), encoding="utf-8")
        places = self.folder / "monmap"
        called("monmaptool", "--create", "--fsid", cluster, "--addv", "a", f"[v2:127.0.0.1:{monitor}]", places)
        called("ceph-mon", "--mkfs", "-i", "a", "--monmap", places, "-c", self.settings)

    def make_store(self) -> None:
        """Make the store, while the monitor runs."""
        store = uuid.uuid4()
        called("ceph", "-c", self.settings, "--connect-timeout", 30, "osd", "new", store, 0)
        called("ceph-osd", "--mkfs", "-i", 0, "--osd-uuid", store, "-c", self.settings)

    @property
    def monitor_command(self) -> tuple[str, ...]:
        """Run the monitor in the foreground."""
        return ("ceph-mon", "-f", "-i", "a", "-c", str(self.settings))

    @property
    def store_command(self) -> tuple[str, ...]:
        """Run the store in the foreground."""
        return ("ceph-osd", "-f", "-i", "0", "-c", str(self.settings))

    @property
    def gateway_command(self) -> tuple[str, ...]:
        """Run the S3 gateway in the foreground."""
        front = f"beast endpoint=127.0.0.1:{self.gateway}"
        return ("radosgw", "-f", "-n", "client.rgw", "-c", str(self.settings), "--rgw-frontends", front)

    def set_account(self, name: str, key: str, secret: str) -> None:
        """See that the account exists and has this key and no other. The secret goes through a pipe, where no other user sees it."""
        if name not in json.loads(self._administer("user", "list")):
            self._administer("user", "create", f"--uid={name}", f"--display-name={name}")
        account = json.loads(self._administer("metadata", "get", f"user:{name}"))
        if [(one["access_key"], one["secret_key"]) for one in account["data"]["keys"]] != [(key, secret)]:
            account["data"]["keys"] = [{"user": name, "access_key": key, "secret_key": secret}]
            self._administer("metadata", "put", f"user:{name}", given=json.dumps(account))

    def _administer(self, *words: str, given: str | None = None) -> str:
        return called("radosgw-admin", "-c", self.settings, *words, given=given, timeout=PATIENCE)


# --- the stack --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NativeStack:
    """The five processes, whose state lies in `folder`."""

    folder: Path
    settings: Settings
    disk: str = ON_DISK.format(bytes=DISK)
    name = "native"

    @property
    def processes(self) -> Processes:
        """Their records and logs."""
        return Processes(self.folder)

    @property
    def postgres(self) -> Postgres:
        """The database."""
        return Postgres(self.folder / "postgres", self.settings.postgres_port)

    @property
    def ceph(self) -> Ceph:
        """The S3 server."""
        return Ceph(self.folder / "ceph", self.settings.s3_port)

    def up(self) -> None:
        """Bring it up as the settings say; what runs so already is left alone, and what was started is ended if anything fails."""
        refuse_missing_programs()
        with self._alone():
            before = {role for role in ROLES if self.processes.find(role)}
            try:
                for role, ports in self._ports.items():
                    self.processes.refuse_taken(role, ports)
                self._bring_up()
            except BaseException:
                self._stop(*(role for role in ROLES if role not in before))
                raise

    def down(self, *, delete_data: bool = False) -> None:
        """End all processes; the data stay, unless they are to be deleted."""
        if not is_occupied(self.folder):
            return
        with self._alone():
            self._stop(*ROLES)
            if delete_data:
                for name in ("postgres", "ceph"):
                    self._delete(name)

    def status(self) -> dict[str, bool]:
        """Which roles run."""
        return {role: self.processes.find(role) is not None for role in ROLES}

    def database(self, program: str, *words: str, stdin: IO[bytes] | int = subprocess.DEVNULL, stdout: IO[bytes] | int = subprocess.PIPE) -> str:
        """What a program of PostgreSQL prints that is run as the user of its database, for backups."""
        where = ("-h", "127.0.0.1", "-p", self.settings.postgres_port, "-U", "mlflow", "-w")
        environment = surroundings() | {"PGPASSWORD": self.settings.postgres_password}
        return called(postgres_program(program) or program, *where, *words, stdin=stdin, stdout=stdout, env=environment)

    @contextmanager
    def without_mlflow(self) -> Iterator[None]:
        """MLflow's server is down meanwhile, so that nobody writes through it."""
        with self._alone():
            self._stop("mlflow")
            try:
                yield
            finally:
                self._start_mlflow()

    @property
    def _ports(self) -> dict[str, dict[str, int]]:
        """Those of each role, by the names of their settings."""
        ceph, settings = self.ceph, self.settings
        return {
            "postgres": {"POSTGRES_PORT": settings.postgres_port},
            "ceph-mon": {"CEPH_PORT": ceph.monitor if (ceph.folder / "whole").exists() else settings.ceph_port},
            "radosgw": {"S3_PORT": settings.s3_port},
            "mlflow": {"MLFLOW_PORT": settings.mlflow_port},
        }

    def _bring_up(self) -> None:
        self._start_postgres()
        self._start_ceph()
        make_buckets(self.settings.s3_environment)
        self._start_mlflow()

    def _start_postgres(self) -> None:
        postgres, ports = self.postgres, self._ports["postgres"]
        with self._made_once("postgres", "postgres") as fresh:
            if fresh:
                self._refuse_closed_folder(postgres.user)
                postgres.make()
        self.processes.start(Role("postgres", postgres.command, postgres.answers, ports, user=postgres.user, end=signal.SIGINT))
        postgres.set_password(self.settings.postgres_password)
        postgres.make_database()

    def _start_ceph(self) -> None:
        ceph, settings = self.ceph, self.settings
        with self._made_once("ceph", "radosgw", "ceph-osd", "ceph-mon") as fresh:
            if fresh:
                ceph.make(settings.ceph_port, self.disk)
            monitor = ceph.monitor
            self.processes.start(Role("ceph-mon", ceph.monitor_command, lambda: listens(monitor), {"CEPH_PORT": monitor}))
            if fresh:
                ceph.make_store()
        self.processes.start(Role("ceph-osd", ceph.store_command, lambda: True))  # it has no port of its own; the gateway waits for it
        needs = ("ceph-mon", "ceph-osd")
        self.processes.start(Role("radosgw", ceph.gateway_command, lambda: listens(settings.s3_port), self._ports["radosgw"], needs=needs))
        ceph.set_account(ACCOUNT, settings.s3_access_key, settings.s3_secret_key)

    def _start_mlflow(self) -> None:
        self.processes.start(mlflow_role(self.settings, self.folder / "metrics"))

    @contextmanager
    def _made_once(self, name: str, *roles: str) -> Iterator[bool]:
        """Whether the folder has to be made: a killed attempt is cleared away, and what was made is marked at the end."""
        folder = self.folder / name
        if (folder / "whole").exists():
            yield False
            return
        self._stop(*roles)
        self._delete(name)
        yield True
        (folder / "whole").touch()

    def _delete(self, name: str) -> None:
        if (self.folder / name).exists():
            shutil.rmtree(self.folder / name)

    def _refuse_closed_folder(self, user: str | None) -> None:
        if user and subprocess.run(["test", "-x", self.folder], check=False, **as_user(user)).returncode:
            raise DiffstillError(f"{self.folder}: user {user}, who runs PostgreSQL for root, may not enter; name another folder with --state")

    def _stop(self, *roles: str) -> None:
        for role in reversed(ROLES):
            if role in roles:
                self.processes.stop(role)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        claim(self.folder)
        try:
            with FileLock(self.folder / "lock", timeout=0, mode=0o600):
                yield
        except Timeout as error:
            raise DiffstillError(f"{self.folder}: another command is at work on this stack; wait for its end") from error


def mlflow_role(settings: Settings, metrics: Path) -> Role:
    """MLflow's server: runs and versions in PostgreSQL, files in the bucket `mlflow` behind it, so that clients need its URL alone."""
    port = settings.mlflow_port
    places = (
        "--backend-store-uri",
        f"postgresql+psycopg2://mlflow@127.0.0.1:{settings.postgres_port}/mlflow",
        "--artifacts-destination",
        "s3://mlflow/artifacts",
    )
    doors = ("--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--allowed-hosts", f"127.0.0.1:{port},localhost:{port}")
    command = (sys.executable, "-m", "mlflow", "server", *doors, *places, "--expose-prometheus", str(metrics))
    environment = {
        "PGPASSWORD": settings.postgres_password,  # so that no command line and no URI holds it
        "MLFLOW_S3_ENDPOINT_URL": settings.s3_url,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # else nine processes and four times the memory
        **{name: value for name, value in settings.s3_environment.items() if name != "AWS_ENDPOINT_URL"},
    }

    def healthy() -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{settings.mlflow_url}/health", timeout=10) as answer:  # noqa: S310  (http, as written above)
            return bool(answer.status == 200)
        return False

    return Role("mlflow", command, healthy, {"MLFLOW_PORT": port}, environment, scratch=metrics)


def make_buckets(environment: Mapping[str, str]) -> None:
    """Make the buckets that are not there."""
    import boto3

    keys = {"aws_access_key_id": environment["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": environment["AWS_SECRET_ACCESS_KEY"]}
    client = boto3.Session(**keys).client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], region_name=environment["AWS_DEFAULT_REGION"])
    there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in BUCKETS:
        if bucket not in there:
            client.create_bucket(Bucket=bucket)


def refuse_missing_programs() -> None:
    """Raise `DiffstillError` naming the packages that bring what is not installed."""
    found: dict[str, Callable[[], str | None]] = {
        "ceph-mon": lambda: shutil.which("ceph-mon"),
        "ceph-osd": lambda: shutil.which("ceph-osd"),
        "radosgw": lambda: shutil.which("radosgw"),
        "postgresql": lambda: postgres_program("initdb") and postgres_program("psql"),
    }
    if missing := [package for package, program in found.items() if not program()]:
        packages = " ".join(missing)
        raise DiffstillError(f"not installed: {packages}; on Debian and Ubuntu: apt-get install --no-install-recommends {packages}; or take Docker")
