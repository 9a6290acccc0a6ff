"""S3 over real sockets: what is listed and downloaded, and clear words when the store refuses or goes away."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from chains import contents
from diffstill import storage
from diffstill.errors import DiffstillError
from diffstill.storage import download, listing, probe
from servers import KEY, SECRET, free_port, s3, s3_environment

FILES = {"train/a/1.txt": b"one", "train/b/2.txt": b"two", "big.bin": bytes(range(256)) * 40_000, "empty": b""}


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with s3(tmp_path_factory.mktemp("s3")) as (url, _):
        yield url


@pytest.fixture
def bucket(endpoint, monkeypatch):
    """A bucket of one's own, and the environment that leads there."""
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    name = f"b-{uuid.uuid4().hex}"
    boto3.Session().client("s3").create_bucket(Bucket=name)
    return name


def put(bucket: str, files: dict[str, bytes]) -> None:
    client = boto3.Session().client("s3")
    for key, content in files.items():
        client.put_object(Bucket=bucket, Key=key, Body=content)


def refusal(call, *arguments) -> str:
    """The one message that a call is refused with."""
    with pytest.raises(DiffstillError) as refused:
        call(*arguments)
    told = str(refused.value)
    assert "\n" not in told
    assert SECRET not in told
    return told


# --- list and download ----------------------------------------------------------------------------------------------


def test_a_prefix_is_downloaded_as_a_folder(bucket, tmp_path):
    put(bucket, {f"data/{name}": content for name, content in FILES.items()} | {"data/": b"", "database/other": b"x"})
    got = download(f"s3://{bucket}/data", tmp_path / "got")
    assert {path.relative_to(tmp_path / "got").as_posix(): path.read_bytes() for path in (tmp_path / "got").rglob("*") if path.is_file()} == FILES
    assert [item.name for item in got] == sorted(FILES)
    assert [(item.name, item.size) for item in listing(f"s3://{bucket}/data/")] == [(name, len(FILES[name])) for name in sorted(FILES)]


def test_a_whole_bucket_of_more_than_a_page_and_a_batch(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BATCH", 4)
    put(bucket, {str(number): str(number).encode() for number in range(17)})
    assert len(download(f"s3://{bucket}", tmp_path / "got")) == 17
    assert (tmp_path / "got" / "16").read_bytes() == b"16"


def test_progress_counts_bytes(bucket, tmp_path):
    put(bucket, FILES)
    seen = []

    class Watching:
        @contextmanager
        def progress(self, description, total, unit, done=0):
            seen.append((description, total, unit))
            yield self

        def update(self, n=1):
            seen.append(n)

    download(f"s3://{bucket}", tmp_path / "got", Watching())
    assert seen[0] == ("download", sum(map(len, FILES.values())), "B")
    assert sum(seen[1:]) == seen[0][1]


def test_a_folder_that_is_there_is_left_alone(bucket, tmp_path):
    put(bucket, FILES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("dear diary")
    assert "exists already; remove it or choose another folder" in refusal(download, f"s3://{bucket}", tmp_path / "mine")
    assert list(contents(tmp_path / "mine")) == ["notes"]


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a//b", "a/./b"])
def test_names_that_are_no_paths_below_the_folder_are_refused(name, bucket, tmp_path):
    put(bucket, {f"data/{name}": b"x"})
    assert f"the object {name!r} cannot be a file" in refusal(download, f"s3://{bucket}/data", tmp_path / "got")
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_is_the_folder_of_another_is_refused(bucket, tmp_path):
    put(bucket, {"a": b"x", "a/b": b"y"})
    assert "the object 'a/b' cannot be a file beside the others" in refusal(download, f"s3://{bucket}", tmp_path / "got")


def test_an_empty_prefix_is_refused(bucket):
    put(bucket, {"database/other": b"x"})
    assert refusal(listing, f"s3://{bucket}/data") == f"s3://{bucket}/data: holds no object; correct the prefix, or upload the data there"


@pytest.mark.parametrize("uri", ["s3://", "s3:///data", "s3://Bucket/data", "http://host/data", f"s3://{KEY}:{SECRET}@bucket/data"])
def test_what_is_no_s3_location_is_refused(uri):
    assert "no S3 location; write s3://<bucket>/<prefix>" in refusal(listing, uri)


# --- interrupted ------------------------------------------------------------------------------------------------


class After:
    """A record that calls `act` when the first object is there."""

    def __init__(self, act):
        self.act = act

    @contextmanager
    def progress(self, description, total, unit, done=0):
        yield self

    def update(self, n=1):
        act, self.act = self.act, lambda: None
        act()


def test_a_store_that_dies_on_the_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "BATCH", 1)
    with s3(tmp_path) as (url, process):
        for name, value in s3_environment(url).items():
            monkeypatch.setenv(name, value)
        boto3.Session().client("s3").create_bucket(Bucket="dying")
        put("dying", FILES)
        told = refusal(download, "s3://dying", tmp_path / "out" / "got", After(lambda: (process.kill(), process.wait())))
    assert told.startswith("s3://dying: bucket 'dying' at http://127.0.0.1:")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".got.lock"]


def test_an_object_that_changes_on_the_way_leaves_nothing(bucket, tmp_path):
    put(bucket, FILES)
    told = refusal(download, f"s3://{bucket}", tmp_path / "got", After(lambda: put(bucket, {"train/a/1.txt": b"eno"})))
    assert "changed while it was downloaded; try again" in told
    assert not (tmp_path / "got").exists()


def test_a_killed_download_leaves_nothing_and_the_next_one_succeeds(bucket, tmp_path):
    put(bucket, FILES)
    code = """
        import os, signal, sys
        from pathlib import Path
        from diffstill.storage import download
        from test_storage import After
        download(sys.argv[1], Path(sys.argv[2]), After(lambda: os.kill(os.getpid(), signal.SIGKILL)))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), f"s3://{bucket}", str(tmp_path / "got")]
    killed = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "got").exists()
    download(f"s3://{bucket}", tmp_path / "got")
    assert sorted(contents(tmp_path / "got")) == sorted(FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".got.lock", "got"]


# --- probe, and a store that refuses ------------------------------------------------------------------------------


def test_a_probe_leaves_nothing_behind(bucket):
    put(bucket, {"runs/kept": b"x"})
    probe(f"s3://{bucket}/runs")
    assert [item.name for item in listing(f"s3://{bucket}")] == ["runs/kept"]


@pytest.mark.parametrize("call", [probe, listing])
def test_a_missing_bucket(call, bucket, endpoint):
    told = refusal(call, "s3://no-such-bucket/x")
    assert told == f"s3://no-such-bucket/x: bucket 'no-such-bucket' at {endpoint} refuses (NoSuchBucket); create the bucket or correct its name"


def test_credentials_that_are_not_known_and_credentials_that_may_not(tmp_path, monkeypatch):
    """moto asks for the credentials of an IAM user after the first requests: bucket, user and key."""
    with s3(tmp_path, open_requests=3) as (url, _):
        for name, value in s3_environment(url).items():
            monkeypatch.setenv(name, value)
        boto3.Session().client("s3").create_bucket(Bucket="guarded")
        iam = boto3.Session().client("iam")
        iam.create_user(UserName="reader")
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        assert "refuses (InvalidAccessKeyId); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refusal(probe, "s3://guarded/x")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        told = refusal(probe, "s3://guarded/x")
        assert f"bucket 'guarded' at {url} refuses (AccessDenied); allow these credentials to list, read, write and delete there" in told
        assert key["AccessKeyId"] not in told
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        assert "refuses (SignatureDoesNotMatch)" in refusal(probe, "s3://guarded/x")


@pytest.mark.usefixtures("bucket")
def test_no_credentials_at_all(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "refuses (NoCredentialsError); set AWS_ACCESS_KEY_ID" in refusal(probe, "s3://bucket/x")


@pytest.mark.usefixtures("bucket")
def test_an_endpoint_that_is_not_there_is_told_quickly(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:{free_port()}")
    started = time.monotonic()
    told = refusal(probe, "s3://bucket/x")
    assert time.monotonic() - started < 15
    assert "http://***@127.0.0.1:" in told
    assert "refuses (EndpointConnectionError); check AWS_ENDPOINT_URL, the network and the service" in told


@pytest.mark.usefixtures("bucket")
def test_an_endpoint_that_hangs_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr(storage, "TIMEOUTS", (0.5, 0.5))
        assert "refuses (ReadTimeoutError)" in refusal(listing, "s3://bucket/x")


@pytest.mark.usefixtures("bucket")
def test_an_endpoint_that_is_no_url(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "minio:9000")
    assert refusal(probe, "s3://bucket/x") == "AWS_ENDPOINT_URL is 'minio:9000', which is no URL; write http(s)://<host>:<port>"


@pytest.mark.usefixtures("bucket")
def test_a_profile_that_is_not_there(monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "refuses (ProfileNotFound); correct or unset AWS_PROFILE" in refusal(probe, "s3://bucket/x")


def test_without_boto3_installed_there_is_one_clear_message(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert refusal(probe, "s3://bucket/x") == "s3://bucket/x: S3 needs boto3, which is not installed; pip install 'diffstill[s3]'"
