"""The containers of infra/kubernetes as processes: their very commands and variables, against a real PostgreSQL and a real S3 server."""

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import psycopg2
import pytest
from mlflow import MlflowClient

from manifests import KUBERNETES, arguments, pods, rendered
from servers import _healthy, free_port, postgres, served


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Where an empty database is."""
    with postgres(tmp_path_factory.mktemp("postgres")) as uri:
        yield urlsplit(uri)


@pytest.fixture(scope="module")
def cluster(database, gateway):
    """What a cluster puts in the place of names: of hosts in commands and variables, and of keys of secrets and config maps."""
    account = gateway.account("kubernetes")
    places = {
        "postgres:5432/mlflow": f"127.0.0.1:{database.port}{database.path}",
        'host="postgres", user="mlflow", dbname="mlflow"': f'host="127.0.0.1", port={database.port}, user="mlflow", dbname="{database.path[1:]}"',
    }
    keys = {
        "diffstill-postgres/password": database.password,
        "diffstill-s3/access-key": account["AWS_ACCESS_KEY_ID"],
        "diffstill-s3/secret-key": account["AWS_SECRET_ACCESS_KEY"],
        "diffstill-services/s3-endpoint": gateway.url,
    }
    return places, keys


def container(name):
    pairs = [(pod, each) for pod in pods(rendered(KUBERNETES / "overlays" / "kind")) for each in pod.containers if each["name"] == name]
    ((pod, found),) = pairs
    return found | {"args": arguments(pod, found)}


def command(container, cluster):
    """Its command and arguments, where hosts are those of this machine."""
    words = [*container["command"], *container["args"]]
    for name, here in cluster[0].items():
        words = [word.replace(name, here) for word in words]
    start = {"python": [sys.executable], "mlflow": [sys.executable, "-m", "mlflow"]}
    return [*start[words[0]], *words[1:]]


def environment(container, cluster):
    """Its variables, and nothing of ours but the way to programs."""
    places, keys = cluster
    found = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": tempfile.gettempdir(), "OMP_NUM_THREADS": "1"}
    for variable in container["env"]:
        named = variable.get("valueFrom", {})
        if named.get("fieldRef"):
            continue  # for its arguments alone
        source = named.get("secretKeyRef") or named.get("configMapKeyRef")
        found[variable["name"]] = keys[f"{source['name']}/{source['key']}"] if source else variable["value"]
    for name, here in places.items():
        found = {variable: value.replace(name, here) for variable, value in found.items()}
    return found


def test_replicas_that_start_at_once_make_one_schema(cluster, database):
    """Without the lock in Postgres all but one fail."""
    schema = container("schema")
    replicas = [
        subprocess.Popen(command(schema, cluster), env=environment(schema, cluster), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(3)
    ]
    said = [replica.communicate(timeout=200)[0] for replica in replicas]
    assert [replica.returncode for replica in replicas] == [0, 0, 0], said
    assert sum("Creating initial" in each for each in said) == 1
    with psycopg2.connect(host="127.0.0.1", port=database.port, user="mlflow", password=database.password, dbname=database.path[1:]) as client:
        cursor = client.cursor()
        cursor.execute("select count(*) from alembic_version")
        assert cursor.fetchone() == (1,)


def test_buckets_are_made_once(cluster):
    job = container("buckets")
    for _ in range(2):
        done = subprocess.run(command(job, cluster), env=environment(job, cluster), capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["bucket mlflow is there", "bucket diffstill is there"]


@pytest.fixture(scope="module")
def server(cluster, tmp_path_factory):
    """The server on its database, and where it is; only address, port and the folder of metrics are this machine's."""
    folder, port, given = tmp_path_factory.mktemp("server"), free_port(), container("mlflow")
    schema = container("schema")
    subprocess.run(command(schema, cluster), env=environment(schema, cluster), check=True, capture_output=True, timeout=200)
    job = container("buckets")
    subprocess.run(command(job, cluster), env=environment(job, cluster), check=True, capture_output=True, timeout=120)
    changed = {
        "--host=0.0.0.0": "--host=127.0.0.1",
        "--port=5000": f"--port={port}",
        "--expose-prometheus=/tmp/prometheus": f"--expose-prometheus={folder}",
    }
    words = [changed.get(word, word) for word in command(given, cluster)]
    assert set(changed.values()) <= set(words)
    with served(words, port, folder / "log", environment(given, cluster), 180, _healthy):
        yield port


def asked(port, path, host):
    """The status and what is said, to one who calls the server by that name."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


SEARCH = "/api/2.0/mlflow/experiments/search?max_results=1"


@pytest.mark.parametrize("host", ["mlflow.diffstill:5000", "mlflow:5000", "mlflow.diffstill.svc.cluster.local:5000", "localhost:5000"])
def test_the_server_answers_to_the_names_of_its_service(server, host):
    assert asked(server, SEARCH, host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "10.evil.example:5000", "192.168.evil.example"])
def test_the_server_answers_to_no_other_name(server, host):
    status, said = asked(server, SEARCH, host)
    assert status == 403
    assert "Invalid Host" in said


def test_files_go_to_the_bucket(server, cluster, gateway):
    client = MlflowClient(f"http://127.0.0.1:{server}")
    run = client.create_run("0").info.run_id
    client.log_text(run, "a card", "card.md")
    keys = cluster[1]
    session = boto3.Session(aws_access_key_id=keys["diffstill-s3/access-key"], aws_secret_access_key=keys["diffstill-s3/secret-key"])
    store = session.client("s3", endpoint_url=gateway.url, region_name="us-east-1")
    assert store.get_object(Bucket="mlflow", Key=f"artifacts/0/{run}/artifacts/card.md")["Body"].read() == b"a card"


def test_probes_and_prometheus_ask_by_the_address_of_the_pod(server):
    assert asked(server, "/health", "100.64.3.7:5000") == (200, "OK")
    status, said = asked(server, "/metrics", "10.244.0.17:5000")
    assert status == 200
    assert "mlflow_http_request" in said
