"""Images and an engine for the tests of this folder; `make test-containers` builds and starts them, and only then are they collected."""

from __future__ import annotations

import os
import subprocess

import pytest

collect_ignore_glob = [] if "DIFFSTILL_IMAGE" in os.environ else ["test_*.py"]

USER = "10001:10001"
"""Who runs in a container."""


def docker(*arguments: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Call the client that the images were built with."""
    return subprocess.run([os.environ.get("DOCKER", "docker"), *arguments], input=stdin, capture_output=True, text=True, check=check)


def in_container(image: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run `command` as a cluster would at its strictest: the image's own user, a read-only root, nothing to write to but /tmp, no network."""
    return docker("run", "--rm", "--read-only", "--tmpfs", "/tmp", "--network=none", *options, image, *command, check=False)


@pytest.fixture(scope="session")
def image() -> str:
    """Name of the image `cpu`."""
    return os.environ["DIFFSTILL_IMAGE"]


@pytest.fixture(scope="session")
def mlflow_image() -> str:
    """Name of the image `mlflow`."""
    return os.environ["DIFFSTILL_MLFLOW_IMAGE"]


@pytest.fixture(scope="session")
def test_image() -> str:
    """Name of the image `test`: `cpu` and the tests."""
    return os.environ["DIFFSTILL_TEST_IMAGE"]


@pytest.fixture(scope="session")
def engine() -> str:
    """Address of the Docker engine, as DOCKER_HOST takes it."""
    return os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
