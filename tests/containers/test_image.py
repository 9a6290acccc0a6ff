"""The images: small rights, nothing left lying about, and the package works in them as it does outside."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import diffstill
from chains import contents
from containers.conftest import USER, docker, in_container
from diffstill.config import render_params

SMOKE = ("diffusion", "memory", "metrics", "networks", "artifacts", "html", "run")
"""Test files that run inside the image: the maths, the networks, the files, the page, a whole tiny chain."""
TESTS = "/opt/diffstill-tests"


@pytest.fixture(scope="module")
def facts(image) -> dict:
    return json.loads(docker("image", "inspect", image).stdout)[0]["Config"]


@pytest.fixture(scope="module")
def files(image) -> set[str]:
    """All paths in the image."""
    container = docker("create", "--network=none", image, "true").stdout.strip()
    try:
        with subprocess.Popen([os.environ.get("DOCKER", "docker"), "export", container], stdout=subprocess.PIPE) as export:
            listing = subprocess.run(["tar", "-t"], stdin=export.stdout, capture_output=True, text=True, check=True).stdout
    finally:
        docker("rm", container)
    return {path.rstrip("/") for path in listing.splitlines()}


def test_the_user_is_a_number_and_nothing_comes_before_the_command(facts):
    assert facts["User"] == USER
    assert not facts.get("Entrypoint")


def test_labels_tell_what_it_is(facts):
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in facts["Labels"].items()}
    made = {"source", "version", "revision", "created", "base.name", "base.digest"}
    assert {"title", "description", "licenses"} | made <= set(labels)
    assert (labels["title"], labels["licenses"], labels["version"]) == ("diffstill", "Apache-2.0", diffstill.__version__)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["revision"])


def test_all_that_is_written_lies_under_tmp(facts):
    environment = dict(pair.split("=", 1) for pair in facts["Env"])
    places = {name: value for name, value in environment.items() if re.search(r"HOME|CACHE|CONFIG|WORK|DIR$", name)}
    assert len(places) >= 10
    assert {name: value for name, value in places.items() if not re.match(r"/tmp($|/)", value)} == {}


def test_no_compiler_no_cache_no_checkout_no_tests(files):
    assert "opt/diffstill/bin/diffstill" in files
    assert [path for path in files if re.search(r"(^|/)s?bin/(gcc|cc|g\+\+|clang|ld|make|git)$", path)] == []
    assert {path.rpartition("/")[2] for path in files} & {".git", ".dvc", ".venv", ".env", "dvc.lock", "constraints.txt"} == set()
    assert [path for path in files if re.match(r"(root|home|tmp|mnt)/", path) and not re.match(r"root/\.(bashrc|profile|wget-hsts)$", path)] == []
    assert [path for path in files if re.search(r"(^|/)test_(run|artifacts)\.py$|\.egg-link$|__editable__", path)] == []


def test_modules_are_compiled_since_a_read_only_root_cannot_keep_them(files):
    package = "opt/diffstill/lib/python3.11/site-packages/diffstill"
    sources = {path for path in files if re.fullmatch(rf"{package}/(\w+/)?\w+\.py", path)}
    assert len(sources) > 15
    compiled = {re.sub(r"(\w+)\.py$", r"__pycache__/\1.cpython-311.pyc", path) for path in sources}
    assert compiled - files == set()


def test_no_secret_in_the_settings_or_in_the_steps_that_made_it(image, facts):
    steps = docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", image).stdout
    assert "COPY" in steps
    assert not re.search(r"secret|token|password|credential|://[^/\s]*@", steps + " ".join(facts["Env"]), re.IGNORECASE)


def test_only_the_allowed_files_enter_a_build(test_image):
    done = in_container(test_image, "sh", "-c", f"cd {TESTS} && ls -A . && find . -name '*.pyc' -o -name '*.db'")
    assert set(done.stdout.split()) == {"dvc.yaml", "params.yaml", "pyproject.toml", "tests"}


@pytest.mark.parametrize(("command", "told"), [("--help", "Distil a labelled image set"), ("doctor", "current folder writable ok")])
def test_the_command_line_answers(command, told, image):
    done = in_container(image, "diffstill", command)
    assert (done.returncode, done.stderr) == (0, "")
    assert told in " ".join(done.stdout.split())


def test_the_executor_of_kubeflow_loads(image):
    """As a component's command starts it: without kfp's dependencies."""
    done = in_container(image, "python", "-m", "kfp.dsl.executor_main", "--help", options=("--env", "_KFP_RUNTIME=true"))
    assert done.returncode == 0, done.stderr
    assert "--executor_input" in done.stdout


def test_another_user_number_works_too(image):
    """A cluster may choose one of its own."""
    done = in_container(image, "diffstill", "doctor", options=("--user", "23456:0"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_pass_inside(test_image):
    files = [f"{TESTS}/tests/test_{name}.py" for name in SMOKE]
    call = f"python -m pytest -q -p no:cacheprovider -c {TESTS}/pyproject.toml --rootdir {TESTS} -n 2 --dist loadgroup".split()
    done = in_container(test_image, *call, *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    last = done.stdout.splitlines()[-1]
    print(last)
    outcome = re.match(r"(\d+) passed(, \d+ warnings?)? in ", last)
    assert outcome, last
    assert int(outcome[1]) >= 120


def test_a_chain_inside_makes_the_bytes_of_one_outside(image, tiny_chain, tmp_path):
    (tmp_path / "params.yaml").write_text(render_params(tiny_chain.params))
    made = tmp_path / "made"
    made.mkdir()
    os.chown(made, *map(int, USER.split(":")))
    mounts = ("--volume", f"{tmp_path}/params.yaml:/params.yaml:ro", "--volume", f"{made}:/made")
    done = in_container(image, "diffstill", "-q", "run", "--params", "/params.yaml", "--artifacts", "/made/artifacts", options=mounts)
    assert done.returncode == 0, done.stderr
    assert contents(made / "artifacts") == contents(tiny_chain.artifacts)
    assert {path.stat().st_uid for path in Path(made).rglob("*")} == {10001}
