"""The servers are what they claim, and what we build on them works there: Ceph checks credentials, MLflow keeps runs in its database and files in Ceph."""

import sqlite3
import time
from contextlib import closing

import psutil
import psycopg2
import pytest
from botocore.exceptions import ClientError

from chains import contents
from diffstill.config import preset
from diffstill.errors import DiffstillError
from diffstill.storage import download, listing, probe
from diffstill.tracking import stage_run
from servers import ceph, mlflow_server, postgres, running
from stack.conftest import Mlflow, Store

TINY = preset("tiny")
FILES = {"train/a/1.txt": b"one", "big.bin": bytes(range(256)) * 40_000, "empty": b""}  # big enough for several parts
WRONG = {"key": {"AWS_ACCESS_KEY_ID": "nobody"}, "secret": {"AWS_SECRET_ACCESS_KEY": "no-secret"}}


def refusal(call, *arguments) -> str:
    """The one message that a call is refused with."""
    with pytest.raises(DiffstillError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- Ceph's gateway -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "code"), [("key", "InvalidAccessKeyId"), ("secret", "SignatureDoesNotMatch")])
def test_the_gateway_refuses_wrong_credentials(wrong, code, ceph_store):
    someone = Store(ceph_store.bucket, ceph_store.environment | WRONG[wrong])
    with pytest.raises(ClientError) as refused:
        someone.names()
    assert refused.value.response["Error"]["Code"] == code


def test_the_gateway_keeps_strangers_out_of_a_bucket_but_not_out_of_their_own(ceph_store, stranger):
    with pytest.raises(ClientError) as refused:
        stranger.names()
    assert refused.value.response["Error"]["Code"] == "AccessDenied"
    stranger.client().create_bucket(Bucket="strange")
    assert Store("strange", stranger.environment).names() == []
    with pytest.raises(ClientError, match="AccessDenied"):
        Store("strange", ceph_store.environment).names()


def test_what_is_put_there_is_listed_and_downloaded(ceph_store, use, tmp_path):
    use(ceph_store)
    for name, content in FILES.items():
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "here" / name).write_bytes(content)
        ceph_store.client().upload_file(tmp_path / "here" / name, ceph_store.bucket, f"files/{name}")
    assert [(item.name, item.size) for item in listing(f"{ceph_store.uri}/files")] == [(name, len(FILES[name])) for name in sorted(FILES)]
    download(f"{ceph_store.uri}/files", tmp_path / "there")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def test_a_probe_passes_and_leaves_nothing(ceph_store, use):
    use(ceph_store)
    probe(f"{ceph_store.uri}/probed")
    assert ceph_store.names("probed") == []


@pytest.mark.parametrize("call", [listing, probe])
@pytest.mark.parametrize(("wrong", "code"), [("key", "InvalidAccessKeyId"), ("secret", "SignatureDoesNotMatch")])
def test_wrong_credentials_are_one_message_without_them(wrong, code, call, ceph_store, use):
    use(Store(ceph_store.bucket, ceph_store.environment | WRONG[wrong]))
    told = refusal(call, ceph_store.uri)
    assert f"bucket 'distilled' at {ceph_store.environment['AWS_ENDPOINT_URL']} refuses ({code})" in told
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in told
    for secret in ("key-of-owner", "s3cr3t-of-owner", "nobody", "no-secret"):
        assert secret not in told


@pytest.mark.parametrize("call", [listing, probe])
def test_a_missing_bucket_is_one_message(call, ceph_store, use):
    use(ceph_store)
    assert refusal(call, "s3://nowhere/data").endswith("refuses (NoSuchBucket); create the bucket or correct its name")


@pytest.mark.parametrize("call", [listing, probe])
def test_no_permission_is_one_message(call, stranger, use):
    use(stranger)
    assert refusal(call, stranger.uri).endswith("refuses (AccessDenied); allow these credentials to list, read, write and delete there")


def test_a_refused_download_leaves_nothing(stranger, use, tmp_path):
    use(stranger)
    assert "(AccessDenied)" in refusal(download, stranger.uri, tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


# --- MLflow's servers -----------------------------------------------------------------------------------------------


def ask(server: Mlflow, query: str) -> list[tuple]:
    """Ask the database behind a server, past the server."""
    if server.backend.startswith("sqlite"):
        database = sqlite3.connect(f"file:{server.backend.removeprefix('sqlite:///')}?mode=ro", uri=True)
    else:
        database = psycopg2.connect(server.backend.replace("+psycopg2", ""))
    with closing(database), closing(database.cursor()) as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def test_runs_lie_in_the_database(mlflow):
    client = mlflow.client()
    run = client.create_run(client.create_experiment("rows"), run_name="a row").info.run_id
    client.log_metric(run, "accuracy", 0.75)
    assert ask(mlflow, f"SELECT name FROM runs WHERE run_uuid = '{run}'") == [("a row",)]
    assert ask(mlflow, f"SELECT value FROM metrics WHERE run_uuid = '{run}' AND key = 'accuracy'") == [(0.75,)]


def test_postgres_is_postgres(postgres_mlflow):
    [(version,)] = ask(postgres_mlflow, "SELECT version()")
    assert version.startswith("PostgreSQL ")


def test_files_go_through_the_server_into_the_bucket(mlflow, ceph_store, use, tmp_path):
    use(mlflow, Store(ceph_store.bucket, ceph_store.environment | WRONG["secret"]))  # so the client cannot have put them there itself
    client = mlflow.client()
    run = client.create_run(client.create_experiment("files")).info
    (tmp_path / "notes.txt").write_text("dear diary")
    client.log_artifact(run.run_id, str(tmp_path / "notes.txt"), "diary")
    key = f"{mlflow.prefix}/{run.experiment_id}/{run.run_id}/artifacts/diary/notes.txt"
    assert ceph_store.names(f"{mlflow.prefix}/{run.experiment_id}/") == [key]
    assert ceph_store.client().get_object(Bucket=ceph_store.bucket, Key=key)["Body"].read() == b"dear diary"
    assert client.list_artifacts(run.run_id, "diary")[0].path == "diary/notes.txt"


def test_stages_log_there(mlflow, ceph_store, use, monkeypatch, tmp_path):
    use(mlflow)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "stages")
    (tmp_path / "sheet.png").write_bytes(b"pixels")
    with stage_run("sample", TINY.section("sample"), TINY) as run:
        run.metrics({"images": 20}, step=1)
        run.file(tmp_path / "sheet.png")
    client = mlflow.client()
    experiment = client.get_experiment_by_name("stages").experiment_id
    [stage] = client.search_runs([experiment], "tags.`diffstill.stage` = 'sample'")
    assert (stage.info.status, stage.data.metrics) == ("FINISHED", {"images": 20.0})
    assert stage.data.params["images_per_class"] == str(TINY.sample.images_per_class)
    assert client.get_run(stage.data.tags["mlflow.parentRunId"]).data.tags["diffstill.dataset"] == "digits"
    assert f"{mlflow.prefix}/{experiment}/{stage.info.run_id}/artifacts/sheet.png" in ceph_store.names(mlflow.prefix)


def test_a_server_without_right_to_its_store_is_one_message(stranger, use, tmp_path):
    with mlflow_server(tmp_path, artifacts=stranger.uri, environment=stranger.environment) as url:
        use(Mlflow(url, "sqlite", stranger, ""))
        (tmp_path / "sheet.png").write_bytes(b"pixels")
        with pytest.raises(DiffstillError) as refused, stage_run("sample", TINY.section("sample"), None) as run:
            run.file(tmp_path / "sheet.png")
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"MLflow at {url} refuses (")
    assert "s3cr3t" not in str(refused.value)


# --- their end ------------------------------------------------------------------------------------------------------


def descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.mark.parametrize(("server", "processes"), [(postgres, 5), (ceph, 3), (mlflow_server, 2)])
def test_no_process_survives(server, processes, tmp_path):
    before = descendants()
    with server(tmp_path):
        started = descendants() - before
        assert len(started) >= processes
    assert psutil.wait_procs(started, timeout=5)[1] == []


def test_no_process_survives_a_failing_start(tmp_path, monkeypatch):
    (tmp_path / "radosgw").write_text("#!/bin/sh\necho no gateway today\nexit 1\n")
    (tmp_path / "radosgw").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "ceph").mkdir()
    before = descendants()
    with pytest.raises(AssertionError, match="no gateway today"), ceph(tmp_path / "ceph"):
        pass
    assert descendants() == before


def test_children_end_although_their_parent_was_killed(tmp_path):
    before = descendants()
    with running(["sh", "-c", "sleep 1000 & exec sleep 1000"], tmp_path / "log") as parent:
        while len(started := descendants() - before) < 2:
            time.sleep(0.01)
        parent.kill()
    assert psutil.wait_procs(started, timeout=5)[1] == []


def test_postgres_does_not_wait_for_its_clients(tmp_path):
    with postgres(tmp_path) as uri:
        client = psycopg2.connect(uri.replace("+psycopg2", ""))
        start = time.monotonic()
    assert time.monotonic() - start < 10
    client.close()
