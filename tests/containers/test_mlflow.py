"""The image of MLflow's server: small rights, no torch, and a server in it that works, answers Prometheus and speaks to PostgreSQL and S3."""

import json
import re
import time
from collections.abc import Iterator

import pytest

import diffstill
from containers.conftest import USER, docker, in_container

SERVER = "mlflow server --host 127.0.0.1 --port 5000 --workers 2 --allowed-hosts 127.0.0.1:5000 --artifacts-destination /tmp/files --expose-prometheus /tmp/metrics"
"""On sqlite; the places of PostgreSQL and S3 would change their URIs and nothing else."""
ASK = """
import sys, urllib.error, urllib.request
for url in sys.argv[2:]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": sys.argv[1]}), timeout=20) as answer:
            print(answer.status, answer.read().decode())
    except urllib.error.URLError as error:
        print(getattr(error, "code", 0), error)
"""
LOG = """
import mlflow
mlflow.set_tracking_uri("http://127.0.0.1:5000")
with mlflow.start_run():
    mlflow.log_metric("accuracy", 0.5)
    mlflow.log_text("dear diary", "notes.txt")
    print(mlflow.artifacts.load_text(mlflow.get_artifact_uri("notes.txt")))
"""


@pytest.fixture(scope="module")
def server(mlflow_image) -> Iterator[str]:
    """A container in which the server runs, at its strictest: no network but its own loopback."""
    rights = ("--read-only", "--tmpfs=/tmp", "--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges")
    variables = ("--env=MLFLOW_BACKEND_STORE_URI=sqlite:////tmp/mlflow.db", "--env=MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false")
    container = docker("run", "--detach", *rights, *variables, mlflow_image, *SERVER.split()).stdout.strip()
    try:
        deadline = time.monotonic() + 120
        while not ask(container, "/health").startswith("200 OK"):
            assert time.monotonic() < deadline, docker("logs", container).stderr[-3000:]
            time.sleep(1)
        yield container
    finally:
        docker("rm", "--force", container)


def ask(container: str, *paths: str, host: str = "127.0.0.1:5000") -> str:
    """What the server answers, asked from inside."""
    urls = [f"http://127.0.0.1:5000{path}" for path in paths]
    return docker("exec", container, "python", "-c", ASK, host, *urls).stdout


def test_the_user_is_a_number_and_nothing_comes_before_the_command(mlflow_image):
    facts = json.loads(docker("image", "inspect", mlflow_image).stdout)[0]["Config"]
    assert facts["User"] == USER
    assert not facts.get("Entrypoint")
    labels = facts["Labels"]
    assert labels["org.opencontainers.image.version"] == diffstill.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["org.opencontainers.image.revision"])


def test_it_has_what_the_server_needs_in_the_pinned_versions_and_no_more(mlflow_image):
    told = in_container(mlflow_image, "pip", "list", "--format=json", "--disable-pip-version-check")
    versions = {one["name"].lower().replace("_", "-"): one["version"] for one in json.loads(told.stdout)}
    assert {"mlflow", "psycopg2-binary", "boto3", "prometheus-flask-exporter"} <= versions.keys()
    assert {"torch", "torchvision", "diffusers", "kfp", "dvc", "diffstill", "pytest"} & versions.keys() == set()
    assert in_container(mlflow_image, "python", "-c", "import psycopg2, boto3, prometheus_flask_exporter").returncode == 0
    assert in_container(mlflow_image, "sh", "-c", "command -v gcc git make").returncode != 0


def test_nothing_is_written_outside_tmp(server):
    changed = docker("diff", server).stdout.splitlines()
    assert [line for line in changed if not re.match(r"[AC] /tmp(/|$)", line)] == []
    assert docker("exec", server, "sh", "-c", "touch /opt/x /home/x", check=False).returncode != 0


def test_the_server_runs_as_its_user(server):
    uids = docker("exec", server, "sh", "-c", "cat /proc/1/status | grep ^Uid").stdout.split()[1:]
    assert set(uids) == {USER.split(":")[0]}


def test_it_keeps_runs_and_files(server):
    assert "dear diary" in docker("exec", server, "python", "-c", LOG).stdout


def test_it_answers_prometheus(server):
    """Both workers' requests together, whichever answers."""
    told = ask(server, *["/api/2.0/mlflow/experiments/get?experiment_id=0"] * 20, "/metrics")
    (counted,) = re.findall(r'^mlflow_http_request_total\{method="GET",status="200"\} ([0-9.]+)$', told, re.MULTILINE)
    assert float(counted) >= 20


def test_it_answers_to_its_own_names_alone(server):
    assert ask(server, "/api/2.0/mlflow/experiments/get?experiment_id=0").startswith("200 ")
    assert ask(server, "/api/2.0/mlflow/experiments/get?experiment_id=0", host="evil.example").startswith("403 ")
    assert ask(server, "/metrics", host="evil.example").startswith("403 ")
