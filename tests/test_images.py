"""What `make images` and the scripts in docker/ say of an image, without an engine: one script stands for the program `docker`."""

import importlib
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

ROOT = Path(__file__).parents[1]
DIGEST = "sha256:" + "0123456789abcdef" * 4
BASE = "python:3.11-slim-bookworm"
ENGINE = """\
#!/bin/bash
# run: the command itself. pull, push, tag: as told. image inspect: facts by what was asked.
case "$1 $2" in
    "run --rm") shift 4; exec "$@" ;;
    "pull "*|"push "*|"tag "*) [[ ! $OFFLINE ]] || { echo "dial tcp: no such host" >&2; exit 1; } ;;
    "image inspect") case "$*" in
        *RepoDigests*) echo "$DIGESTS" ;;
        *base.digest*) echo "$BASE_DIGEST" ;;
        *revision*) echo 0123456789012345678901234567890123456789 ;;
        *) echo '[{"Id": "sha256:77", "Config": {"Labels": {"org.opencontainers.image.version": "9.8"}}}]' ;;
    esac ;;
    *) echo "what is $*?" >&2; exit 1 ;;
esac
"""

DPKG = """\
#!/bin/sh
printf 'libc6\\t2.36-9\\tarm64\\tinstalled\\nlibc6\\t2.36-9\\tamd64\\tinstalled\\n'
printf 'nano\\t7.2-1\\tamd64\\tconfig-files\\nbash\\t5.2.15-2+b7\\tamd64\\tinstalled\\n'
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call one of the scripts with that engine."""
    engine = tmp_path / "docker"
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    monkeypatch.syspath_prepend(ROOT / "docker")
    monkeypatch.setattr(importlib.import_module("push"), "DOCKER", str(engine))
    dpkg = tmp_path / "dpkg-query"
    dpkg.write_text(DPKG)
    dpkg.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}")

    def run(script, *words, **environment):
        return CliRunner(env=environment).invoke(importlib.import_module(script).main, list(map(str, words)))

    yield run
    for script in ("base", "push", "sbom"):
        sys.modules.pop(script, None)


def test_the_base_is_written_down_with_its_digest(call, tmp_path):
    lock = tmp_path / "base.lock"
    done = call("base", "--lock", lock, DIGESTS=json.dumps([f"python@{DIGEST}"]))
    assert (done.exit_code, lock.read_text()) == (0, f"{BASE}@{DIGEST}\n"), done.stderr


@pytest.mark.parametrize(
    ("environment", "told"),
    [({"OFFLINE": "yes"}, "no such host; is its registry reachable?"), ({"DIGESTS": "[]"}, "has no digest, as an image has")],
)
def test_a_digest_that_cannot_be_known_is_not_written(call, tmp_path, environment, told):
    lock = tmp_path / "base.lock"
    lock.write_text("as it was")
    done = call("base", "--lock", lock, **environment)
    assert (done.exit_code, lock.read_text(), done.stderr.count("\n")) == (2, "as it was", 1)
    assert told in done.stderr


@pytest.mark.parametrize("digest", ["", "latest", "sha256:12"])
def test_an_image_on_a_base_without_digest_is_not_pushed_unasked(call, tmp_path, digest):
    lock, place = tmp_path / "images.lock", "registry.example/me/diffstill"
    done = call("push", "--lock", lock, "--registry", place, "cpu", BASE_DIGEST=digest)
    assert (done.exit_code, lock.exists()) == (2, False)
    assert "pin it and build anew: make images-base images" in done.stderr
    pushed = {"DIGESTS": json.dumps([f"{place}@{DIGEST}"])}
    assert call("push", "--lock", lock, "--registry", place, "--allow-unpinned-base", "cpu", **pushed).exit_code == 0
    lock.unlink()
    assert call("push", "--lock", lock, "--registry", place, "cpu", BASE_DIGEST=DIGEST, **pushed).exit_code == 0
    assert json.loads(lock.read_text()) == {"cpu": f"{place}@{DIGEST}"}


def test_a_bill_lists_every_package_of_python_and_of_debian(call, tmp_path):
    done = call("sbom", "--output", tmp_path / "bills", "cpu")
    assert done.exit_code == 0, done.stderr
    text = (tmp_path / "bills" / "cpu.cdx.json").read_text()
    assert not JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    bill = json.loads(text)
    image = bill["metadata"]["component"]
    assert (image["name"], image["version"], image["type"], image["bom-ref"]) == ("diffstill:cpu", "9.8", "container", "image@sha256:77")
    packages = {each["purl"]: each for each in bill["components"]}
    assert [purl for purl in packages if "pkg:deb/" in purl] == [
        "pkg:deb/debian/bash@5.2.15-2%2Bb7?arch=amd64",
        "pkg:deb/debian/libc6@2.36-9?arch=amd64",
        "pkg:deb/debian/libc6@2.36-9?arch=arm64",
    ]
    click = packages[f"pkg:pypi/click@{metadata.version('click')}"]
    assert click["licenses"] == [{"license": {"id": "BSD-3-Clause"}}]
    assert {"pkg:pypi/torch", "pkg:pypi/kfp"} <= {purl.partition("@")[0] for purl in packages}


def made(*words):
    return subprocess.run(["make", "--dry-run", "images", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_a_build_says_whether_its_base_is_pinned_and_what_it_is():
    loose, pinned = made(f"BASE={BASE}"), made(f"BASE={BASE}@{DIGEST}")
    assert f"warning: base image {BASE} is not pinned" in loose
    assert "warning" not in pinned
    assert f"--build-arg BASE_IMAGE={BASE}@{DIGEST} " in pinned
    for name, value in {"base.name": BASE, "base.digest": DIGEST}.items():
        assert f"--label org.opencontainers.image.{name}={value} " in pinned
    assert "--label org.opencontainers.image.base.digest= " in loose
    for name in ("version", "revision", "source", "created"):
        assert f"--label org.opencontainers.image.{name}=" in loose


def test_credentials_in_the_remote_are_no_label():
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("SOURCE = "))
    script = recipe.partition("| ")[2].partition("),unknown")[0]
    told = subprocess.run(["sh", "-c", script], input="https://me:hunter2@git.example/a.git\n", capture_output=True, text=True, check=True)
    assert told.stdout == "https://git.example/a.git\n"
