"""Real servers for the tests of this folder: Ceph's S3 gateway, and MLflow on sqlite and on PostgreSQL with its files in Ceph.

`make test-stack` has the packages and sets DIFFSTILL_STACK; only then are they collected. A server starts when it is first asked for.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from mlflow import MlflowClient

from servers import Gateway, ceph, mlflow_server, postgres

collect_ignore_glob = [] if "DIFFSTILL_STACK" in os.environ else ["test_*.py"]


@dataclass(frozen=True)
class Store:
    """A bucket, and the environment of an account that looks at it."""

    bucket: str
    environment: dict[str, str]

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}"

    def client(self) -> Any:
        """A client of boto3 with this account, whatever the environment."""
        around = self.environment
        credentials = {"aws_access_key_id": around["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": around["AWS_SECRET_ACCESS_KEY"]}
        return boto3.Session(**credentials).client("s3", endpoint_url=around["AWS_ENDPOINT_URL"], region_name=around["AWS_DEFAULT_REGION"])

    def names(self, prefix: str = "") -> list[str]:
        """What lies in the bucket."""
        return list(self.etags(prefix))

    def etags(self, prefix: str = "") -> dict[str, str]:
        """What lies in the bucket, with its MD5 if it was sent whole."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {item["Key"]: item["ETag"].strip('"') for page in pages for item in page.get("Contents", ())}


@dataclass(frozen=True)
class Mlflow:
    """An MLflow server: clients need its URL alone, since it keeps their files, below `prefix` in its store."""

    url: str
    backend: str
    store: Store
    prefix: str

    @property
    def environment(self) -> dict[str, str]:
        return {"MLFLOW_TRACKING_URI": self.url}

    def client(self) -> MlflowClient:
        return MlflowClient(self.url)


class Door(ThreadingTCPServer):
    """A way to a server that can be shut, at once or when some bytes have gone through: what is under way breaks off, and nobody gets in any more."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Visit)
        self.behind = urlsplit(url).hostname, urlsplit(url).port
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._left, self._lock = float("inf"), threading.Lock()

    def shut(self, after: int = 0) -> None:
        """Let so many bytes in, then nobody."""
        self._left = after

    def open(self) -> None:
        """Let everybody in."""
        self._left = float("inf")

    def lets_in(self, count: int) -> bool:
        """Whether so many bytes may go in."""
        with self._lock:
            self._left = max(0, self._left - count)
            return self._left > 0


class _Visit(BaseRequestHandler):
    """One connection through a door."""

    server: Door

    def handle(self) -> None:
        with suppress(ConnectionError), socket.create_connection(self.server.behind) as inside, selectors.DefaultSelector() as ready:
            for near, far in ((self.request, inside), (inside, self.request)):
                near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else every request waits 40 ms for an acknowledgement
                ready.register(near, selectors.EVENT_READ, far)
            while True:
                for key, _ in ready.select():
                    content = key.fileobj.recv(2**16)
                    if not content or not self.server.lets_in(len(content) if key.fileobj is self.request else 0):
                        return
                    key.data.sendall(content)


@contextmanager
def door(url: str) -> Iterator[Door]:
    """A door before the server at that URL."""
    with Door(url) as before:
        threading.Thread(target=before.serve_forever, args=(0.05,), daemon=True).start()
        yield before
        before.shutdown()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch) -> None:
    """Clients of MLflow try again as often as they do elsewhere, but at once."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")


@pytest.fixture(scope="session")
def _gateway(tmp_path_factory) -> Iterator[Gateway]:
    with ceph(tmp_path_factory.mktemp("ceph")) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def gateway_door(_gateway: Gateway) -> Iterator[Door]:
    """The door that all who use the gateway go through, MLflow's servers too."""
    with door(_gateway.url) as before:
        yield before


@pytest.fixture(scope="session")
def gateway(_gateway: Gateway, gateway_door: Door) -> Gateway:
    """Ceph's S3 gateway behind its door, without accounts."""
    return replace(_gateway, url=gateway_door.url)


@pytest.fixture(scope="session")
def ceph_store(gateway: Gateway) -> Store:
    """A bucket in Ceph, with the account that owns it."""
    store = Store("distilled", gateway.account("owner"))
    store.client().create_bucket(Bucket=store.bucket)
    return store


@pytest.fixture(scope="session")
def stranger(gateway: Gateway, ceph_store: Store) -> Store:
    """The same bucket, with a valid account that has no right there."""
    return replace(ceph_store, environment=gateway.account("stranger"))


@pytest.fixture(scope="session")
def sqlite_mlflow(ceph_store: Store, tmp_path_factory) -> Iterator[Mlflow]:
    """MLflow's server on sqlite, with its files in Ceph."""
    folder = tmp_path_factory.mktemp("mlflow")
    with _mlflow(folder, f"sqlite:///{folder}/mlflow.db", ceph_store, "mlflow-on-sqlite") as server:
        yield server


@pytest.fixture(scope="session")
def postgres_mlflow(ceph_store: Store, tmp_path_factory) -> Iterator[Mlflow]:
    """MLflow's server on PostgreSQL, with its files in Ceph."""
    folder = tmp_path_factory.mktemp("mlflow")
    with postgres(folder) as uri, _mlflow(folder, uri, ceph_store, "mlflow-on-postgres") as server:
        yield server


@contextmanager
def _mlflow(folder: Path, backend: str, store: Store, prefix: str) -> Iterator[Mlflow]:
    once = {"AWS_MAX_ATTEMPTS": "1"}  # else a store that is away costs the server half a minute per file
    with mlflow_server(folder, backend=backend, artifacts=f"{store.uri}/{prefix}", environment=store.environment | once) as url:
        yield Mlflow(url, backend, store, prefix)


@pytest.fixture(params=["sqlite_mlflow", "postgres_mlflow"])
def mlflow(request) -> Mlflow:
    """Either server: a test that asks for it runs against both."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def use(monkeypatch) -> Callable[..., None]:
    """Let this test, and what it starts, use servers: `use(ceph_store, mlflow)`."""

    def enter(*servers: Store | Mlflow) -> None:
        for server in servers:
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)

    return enter
