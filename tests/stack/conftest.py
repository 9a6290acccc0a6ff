"""Real servers for the tests of this folder: Ceph's S3 gateway, and MLflow on sqlite and on PostgreSQL with its files in Ceph.

`make test-stack` has the packages and sets DIFFSTILL_STACK; only then are they collected. A server starts when it is first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]


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


@pytest.fixture(scope="session")
def gateway(tmp_path_factory) -> Iterator[Gateway]:
    """Ceph's S3 gateway, without accounts."""
    with ceph(tmp_path_factory.mktemp("ceph")) as gateway:
        yield gateway


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
    with mlflow_server(folder, backend=backend, artifacts=f"{store.uri}/{prefix}", environment=store.environment) as url:
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
