"""`make images-push` against a real registry: what the lock names is what the registry holds, and it runs."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from containers.conftest import docker, in_container

PUSH = Path(__file__).parents[2] / "docker" / "push.py"
REVISION = "org.opencontainers.image.revision"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
REGISTRY = """\
version: 0.1
storage: {{filesystem: {{rootdirectory: {folder}}}}}
http: {{addr: "{address}"}}
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Address of an empty registry on loopback."""
    folder = tmp_path_factory.mktemp("registry")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "config.yml").write_text(REGISTRY.format(folder=folder / "storage", address=address))
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        wait_for(f"http://{address}/v2/", server)
        yield address
    finally:
        server.terminate()
        server.wait()


def wait_for(url, server, seconds=20.0):
    """Until `url` answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return requests.get(url, timeout=2).raise_for_status()
        except requests.ConnectionError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


def push(lock, *arguments):
    return subprocess.run([sys.executable, PUSH, "--lock", lock, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def small() -> Iterator[str]:
    """An image of no more than the base, since compressing all of `cpu` takes minutes; to a registry every image is the same."""
    recipe = f"FROM {os.environ['DIFFSTILL_BASE_IMAGE']}\nLABEL {REVISION}={'0123456789' * 4}-dirty\nLABEL now={time.time_ns()}\nUSER 10001:10001\n"
    docker("build", "--tag", "diffstill:small", "-", stdin=recipe)
    yield "small"
    docker("image", "rm", "diffstill:small")


def test_the_lock_names_what_the_registry_holds_and_it_runs(registry, small, tmp_path):
    repository, lock = f"{registry}/team/diffstill", tmp_path / "images.lock"
    lock.write_text("of another push")
    done = push(lock, "--registry", repository, "--allow-unpinned-base", small)
    assert done.returncode == 0, done.stderr
    references = json.loads(lock.read_text())
    assert list(references) == [small]
    assert list(tmp_path.iterdir()) == [lock], "litter"

    tag = "small-012345678901-dirty"
    answer = requests.get(f"http://{registry}/v2/team/diffstill/manifests/{tag}", headers={"Accept": MANIFEST}, timeout=10)
    assert references[small] == f"{repository}@{answer.headers['Docker-Content-Digest']}"

    docker("image", "rm", f"{repository}:{tag}")
    docker("pull", "--quiet", references[small])
    try:
        assert in_container(references[small], "python", "-c", "import os; print(os.getuid())").stdout == "10001\n"
    finally:
        docker("image", "rm", references[small])


@pytest.mark.parametrize(
    ("registry_name", "target", "told"),
    [
        ("", "cpu", "REGISTRY is ''; it must be host/name, lower case: say make images-push REGISTRY="),
        ("registry.example.org", "cpu", "REGISTRY is 'registry.example.org'; it must be host/name"),
        ("127.0.0.1:9/team", "absent", "No such image: diffstill:absent; build it first: make images"),
        ("127.0.0.1:9/team", "cpu", "connection refused; is 127.0.0.1:9/team reachable, and are you logged in"),
    ],
)
def test_what_cannot_be_pushed_is_one_message_and_leaves_the_lock(registry_name, target, told, tmp_path):
    lock = tmp_path / "images.lock"
    lock.write_text("as it was")
    done = push(lock, "--registry", registry_name, "--allow-unpinned-base", target)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert lock.read_text() == "as it was"
    for name in docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}", "127.0.0.1:9/team").stdout.split():
        docker("image", "rm", name)
