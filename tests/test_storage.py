"""S3 over real sockets: what is uploaded, listed and downloaded, and clear words when the store refuses or goes away."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread

import boto3
import pytest

from chains import contents
from diffstill import storage
from diffstill.errors import DiffstillError, TransientError
from diffstill.storage import Encryption, Object, download, listing, probe, read, upload
from servers import KEY, SECRET, free_port, s3, s3_environment

FILES = {"train/a/1.txt": b"one", "train/b/2.txt": b"two", "big.bin": bytes(range(256)) * 40_000, "empty": b""}
WHOLE = {"empty": b"", "manifest.json": b"{}", "train/a/1.txt": b"one", "train/b/2.txt": b"two", "x/ü b+c%20.txt": b"odd name"}
MIB = 2**20


@cache
def connected(endpoint: str):
    """A client takes a fifth of a second to make."""
    return boto3.Session().client("s3")


def store():
    """The store that the environment leads to, without the package between."""
    return connected(os.environ["AWS_ENDPOINT_URL"])


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
    store().create_bucket(Bucket=name)
    return name


def put(bucket: str, files: dict[str, bytes]) -> None:
    for key, content in files.items():
        store().put_object(Bucket=bucket, Key=key, Body=content)


def refusal(call, *arguments, kind: type[DiffstillError] = DiffstillError) -> str:
    """The one message that a call is refused with; `TransientError` where the same may succeed later."""
    with pytest.raises(DiffstillError) as refused:
        call(*arguments)
    assert type(refused.value) is kind
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
        store().create_bucket(Bucket="dying")
        put("dying", FILES)
        told = refusal(download, "s3://dying", tmp_path / "out" / "got", After(lambda: (process.kill(), process.wait())), kind=TransientError)
    assert told.startswith("s3://dying: bucket 'dying' at http://127.0.0.1:")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".got.lock"]


def test_an_object_that_changes_on_the_way_leaves_nothing(bucket, tmp_path):
    put(bucket, FILES)
    told = refusal(download, f"s3://{bucket}", tmp_path / "got", After(lambda: put(bucket, {"train/a/1.txt": b"eno"})), kind=TransientError)
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


# --- upload ---------------------------------------------------------------------------------------------------------


def made(folder: Path, files: dict[str, bytes] = WHOLE) -> Path:
    """A folder of these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def keys(bucket: str) -> set[str]:
    pages = store().get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return {item["Key"] for page in pages for item in page.get("Contents", ())}


def unfinished(bucket: str) -> list[str]:
    return [begun["Key"] for begun in store().list_multipart_uploads(Bucket=bucket).get("Uploads", ())]


@pytest.fixture
def requests(monkeypatch):
    """Counts what is asked of the store, by name."""
    counted, real = Counter(), storage._connected

    def counting(session):
        client = real(session)
        client.meta.events.register("before-call.s3", lambda model, **_: counted.update([model.name]))
        return client

    monkeypatch.setattr(storage, "_connected", counting)
    return counted


@pytest.fixture
def in_order(monkeypatch):
    """One file at a time, by name."""
    monkeypatch.setattr(storage, "CONNECTIONS", 1)


@pytest.fixture
def parts(monkeypatch):
    """Files of 5 MiB and more are sent in parts."""
    monkeypatch.setattr(storage, "PART", 5 * MIB)


def test_what_is_uploaded_comes_back_and_is_sent_once(bucket, tmp_path):
    folder = made(tmp_path / "set")
    assert upload(folder, f"s3://{bucket}/sets/one") == sum(map(len, WHOLE.values()))
    assert upload(folder, f"s3://{bucket}/sets/one/") == 0
    download(f"s3://{bucket}/sets/one", tmp_path / "got")
    assert contents(tmp_path / "got") == contents(folder)
    assert keys(bucket) == {f"sets/one/{name}" for name in WHOLE}
    assert read(f"s3://{bucket}/sets/one/manifest.json") == b"{}"


@pytest.mark.usefixtures("bucket")
def test_many_small_files_take_one_request_each_beside_the_listings(bucket, tmp_path, requests):
    folder = made(tmp_path / "set", {f"{number}.png": bytes([number]) * 100 for number in range(24)} | {"manifest.json": b"{}"})
    upload(folder, f"s3://{bucket}")
    assert requests == {"PutObject": 25, "ListObjectsV2": 1 + 5 + 5, "ListMultipartUploads": 1}  # before, with all but the last, with the last
    requests.clear()
    upload(folder, f"s3://{bucket}")
    assert requests == {"PutObject": 1, "ListObjectsV2": 5 + 5, "ListMultipartUploads": 1}  # before, and with the last written anew


def test_the_last_file_is_sent_when_all_others_are_there(bucket, tmp_path):
    seen = []

    class Looking(After):
        def update(self, n=1):
            seen.append(keys(bucket))

    upload(made(tmp_path / "set"), f"s3://{bucket}", Looking(None), last="empty")
    assert [now for now in seen if "empty" in now] == [set(WHOLE)]


def test_progress_counts_the_bytes_that_are_sent(bucket, tmp_path, parts):
    put(bucket, {"train/a/1.txt": b"one"})
    files = WHOLE | {"large": bytes(6 * MIB)}
    seen = []

    class Watching(After):
        @contextmanager
        def progress(self, description, total, unit, done=0):
            seen.append((description, total, unit, done))
            yield self

        def update(self, n=1):
            seen.append(n)

    sent = upload(made(tmp_path / "set", files), f"s3://{bucket}", Watching(None))
    assert seen[0] == ("upload", sent + 3, "B", 3)
    assert sum(seen[1:]) == sent == sum(map(len, files.values())) - 3


def test_litter_of_file_browsers_and_folders_without_files_are_not_sent(bucket, tmp_path):
    folder = made(tmp_path / "set", WHOLE | {"train/.DS_Store": b"x"})
    (folder / "nothing" / "below").mkdir(parents=True)
    upload(folder, f"s3://{bucket}")
    assert keys(bucket) == set(WHOLE)


@pytest.mark.parametrize("content", [b"eno", b"longer"])
def test_an_object_of_other_content_is_refused_and_stays(content, bucket, tmp_path):
    put(bucket, {"set/train/a/1.txt": content})
    folder = made(tmp_path / "set")
    assert f"holds 'train/a/1.txt' with other content than {folder}/train/a/1.txt; upload to another" in refusal(upload, folder, f"s3://{bucket}/set")
    assert keys(bucket) == {"set/train/a/1.txt"}
    assert read(f"s3://{bucket}/set/train/a/1.txt") == content


def test_an_object_that_is_none_of_the_files_is_refused_and_stays(bucket, tmp_path):
    put(bucket, {"set/train/foreign.txt": b"x"})
    told = refusal(upload, made(tmp_path / "set"), f"s3://{bucket}/set")
    assert told == f"s3://{bucket}/set: holds 'train/foreign.txt', which is none of the files to upload; upload to another prefix, or remove it there"
    assert keys(bucket) == {"set/train/foreign.txt"}


def test_an_object_that_appears_on_the_way_keeps_the_set_unfinished(bucket, tmp_path):
    told = refusal(upload, made(tmp_path / "set"), f"s3://{bucket}", After(lambda: put(bucket, {"foreign": b"x"})))
    assert "holds 'foreign'" in told
    assert "manifest.json" not in keys(bucket)


@pytest.mark.parametrize("there_before", [{}, {"empty": b""}])
def test_an_object_that_goes_on_the_way_keeps_the_set_unfinished(there_before, bucket, tmp_path, in_order):
    put(bucket, there_before)

    def remove():
        store().delete_object(Bucket=bucket, Key="empty")

    assert "lost 'empty' after it was sent" in refusal(upload, made(tmp_path / "set"), f"s3://{bucket}", After(remove), kind=TransientError)
    assert "manifest.json" not in keys(bucket)


def test_what_a_probe_and_a_console_left_is_no_matter(bucket, tmp_path):
    put(bucket, {"set/.diffstill-probe-0": b"x", "set/": b"", "set/train/": b""})
    upload(made(tmp_path / "set"), f"s3://{bucket}/set")
    assert [item.name for item in listing(f"s3://{bucket}/set")] == sorted(WHOLE)


# --- upload in parts --------------------------------------------------------------------------------------------------


def test_large_files_are_sent_in_parts_and_known_again_by_their_etag(bucket, tmp_path, parts, requests):
    large = {"exact": bytes(5 * MIB), "large": os.urandom(11 * MIB)}
    folder = made(tmp_path / "set", large | {"manifest.json": b"{}"})
    assert upload(folder, f"s3://{bucket}") == 16 * MIB + 2
    assert {item.name: item.etag[-3:] for item in listing(f"s3://{bucket}") if item.name in large} == {"exact": '-1"', "large": '-3"'}
    assert upload(folder, f"s3://{bucket}") == 0
    assert (requests["UploadPart"], requests["GetObject"], requests["HeadObject"]) == (4, 0, 0)
    download(f"s3://{bucket}", tmp_path / "got")
    assert contents(tmp_path / "got") == contents(folder)


def test_large_files_that_others_cut_otherwise_are_read_back_once(bucket, tmp_path, parts, monkeypatch, requests):
    folder = made(tmp_path / "set", {"large": os.urandom(11 * MIB), "manifest.json": b"{}"})
    upload(folder, f"s3://{bucket}")
    store().delete_object(Bucket=bucket, Key="manifest.json")
    monkeypatch.setattr(storage, "PART", 6 * MIB)
    assert upload(folder, f"s3://{bucket}") == 2
    assert (requests["HeadObject"], requests["GetObject"]) == (1, 1)
    (folder / "large").write_bytes(os.urandom(11 * MIB))
    assert "holds 'large' with other content" in refusal(upload, folder, f"s3://{bucket}")


def test_unfinished_parts_are_freed_when_they_are_old_below_the_prefix_alone(bucket, tmp_path, monkeypatch):
    """Every upload in parts that moto is told of began in 2010."""
    client = store()
    for key in ("set/empty", "set/gone", "settings/empty"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    monkeypatch.setattr(storage, "ABANDONED", timedelta(days=36_525))
    upload(made(tmp_path / "set"), f"s3://{bucket}/set")
    assert unfinished(bucket) == ["set/empty", "set/gone", "settings/empty"]
    monkeypatch.undo()
    for name, value in s3_environment(client.meta.endpoint_url).items():
        monkeypatch.setenv(name, value)
    upload(tmp_path / "set", f"s3://{bucket}/set")
    assert unfinished(bucket) == ["settings/empty"]


# --- upload: what the store says of an object ---------------------------------------------------------------------------


@pytest.mark.parametrize("encryption", [Encryption("AES256"), Encryption("aws:kms"), Encryption("aws:kms", "key-1")])
def test_the_store_is_asked_to_encrypt(encryption, bucket, tmp_path, parts):
    upload(made(tmp_path / "set", {"large": bytes(5 * MIB), "manifest.json": b"{}"}), f"s3://{bucket}", encryption=encryption)
    for name in ("large", "manifest.json"):
        held = store().head_object(Bucket=bucket, Key=name)
        assert (held.get("ServerSideEncryption"), held.get("SSEKMSKeyId")) == (encryption.algorithm, encryption.key)


def test_a_key_without_kms_is_refused():
    assert "encryption 'AES256' takes no key" in refusal(Encryption, "AES256", "key-1")


@pytest.fixture
def sending(bucket, tmp_path):
    """An upload of one file, and the object as a store lists it whose ETags say nothing, as with KMS."""
    files = storage._files(made(tmp_path / "set", {"x": b"right"}), "")
    with storage._client(f"s3://{bucket}") as client:
        yield storage._Upload(client, None, None, f"s3://{bucket}", files, None), Object("x", 5, '"' + "0" * 32 + '"')


def test_where_the_etag_says_nothing_the_sha256_does(sending, requests):
    upload, listed = sending
    upload.client.meta.events.register("before-call.s3", lambda model, **_: requests.update([model.name]))
    upload._put(upload.files["x"], lambda n: None)
    assert upload._holds(listed)
    upload.client.put_object(**upload._address("x"), Body=b"wrong", ChecksumAlgorithm="SHA256")
    assert not upload._holds(listed)
    assert requests == {"PutObject": 2, "HeadObject": 2}


def test_checksums_are_no_trailers_which_old_stores_refuse(sending, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:9")  # over http boto3 uses none
    upload, seen = sending[0], []

    def stop(request, **_):
        seen.append({name.lower() for name in request.headers})
        raise DiffstillError("stopped")

    with storage._client(upload.uri) as client:
        client.meta.events.register("before-send.s3", stop)
        refusal(replace(upload, client=client)._put, upload.files["x"], lambda n: None)
        refusal(lambda: client.put_object(**upload._address("x"), Body=b"x"))
    assert ["x-amz-checksum-sha256" in names for names in seen] == [True, False]
    assert not {"x-amz-trailer", "transfer-encoding"} & set.union(*seen)


def test_where_the_store_says_nothing_at_all_the_object_is_read(sending):
    upload, listed = sending
    for content, held in {b"right": True, b"wrong": False}.items():
        upload.client.put_object(**upload._address("x"), Body=content)
        assert upload._holds(listed) == held


@pytest.mark.parametrize(
    ("held", "contradicts"),
    [
        ({"ETag": f'"{hashlib.md5(b"x").hexdigest()}"'}, False),
        ({"ETag": f'"{hashlib.md5(b"x").hexdigest().upper()}"', "ServerSideEncryption": "AES256"}, False),
        ({"ETag": f'"{hashlib.md5(b"y").hexdigest()}"'}, True),
        ({"ETag": f'"{hashlib.md5(b"y").hexdigest()}"', "ServerSideEncryption": "AES256"}, True),
        ({"ETag": f'"{hashlib.md5(b"y").hexdigest()}"', "ServerSideEncryption": "aws:kms"}, False),
        ({"ETag": f'"{hashlib.md5(b"y").hexdigest()}-2"'}, False),
        ({"ETag": '"0x8D4BCC2E4835CD0"'}, False),
    ],
)
def test_only_an_etag_that_is_an_md5_can_contradict(held, contradicts):
    assert storage._contradicts(held, hashlib.md5(b"x").hexdigest()) == contradicts


class Damaged(BaseHTTPRequestHandler):
    """A store that says it holds `right` and sends `wrong`."""

    protocol_version = "HTTP/1.1"
    etag = f'"{hashlib.md5(b"right").hexdigest()}"'

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("ETag", self.etag)
        self.send_header("Content-Length", "5")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(b"wrong")

    def log_message(self, *arguments):
        pass


@pytest.mark.usefixtures("bucket")
def test_damaged_bytes_are_refused(tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Damaged) as server:
        Thread(target=server.serve_forever).start()
        try:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            assert "s3://bucket/x: 'x' arrives with other bytes than its ETag says" in refusal(read, "s3://bucket/x")
            told = refusal(storage.transfer, "s3://bucket", [Object("x", 5, Damaged.etag)], tmp_path)
            assert "s3://bucket: 'x' arrives with other bytes than its ETag says" in told
        finally:
            server.shutdown()


def test_an_object_that_is_not_there(bucket, tmp_path):
    told = refusal(read, f"s3://{bucket}/set/manifest.json")
    assert told == f"s3://{bucket}/set/manifest.json: is not there; it was never uploaded, or its upload did not finish: upload it again"
    assert f"s3://{bucket}: names no object; write s3://<bucket>/<key>" in refusal(read, f"s3://{bucket}")


# --- what cannot be uploaded ------------------------------------------------------------------------------------------


def linked_file(folder):
    (folder / "link").symlink_to(folder / "empty")


def linked_folder(folder):
    (folder / "train" / "link").symlink_to(folder / "x")


def pipe(folder):
    os.mkfifo(folder / "pipe")


def long_name(folder):
    made(folder, {"/".join(["ü" * 100] * 6): b""})


def control_characters(folder):
    made(folder, {"two\nlines": b""})


def other_than_utf8(folder):
    (folder / os.fsdecode(b"\xff")).write_bytes(b"")


def name_of_a_probe(folder):
    made(folder, {"train/.diffstill-probe-1": b""})


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (linked_file, "link': is a link or another special file, which S3 cannot hold"),
        (linked_folder, "train/link': is a link or another special file"),
        (pipe, "pipe': is a link or another special file"),
        (long_name, "makes a key of more than 1024 bytes, which S3 cannot hold"),
        (control_characters, "two\\nlines': has a name of control characters"),
        (other_than_utf8, "\\udcff': has a name of control characters, other than UTF-8"),
        (name_of_a_probe, ".diffstill-probe-1': has a name of"),
        (lambda folder: (folder / "manifest.json").unlink(), "set: has no manifest.json, so it is not whole"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "set: cannot be read (No such file or directory)"),
    ],
)
def test_what_s3_cannot_hold_is_refused_before_anything_is_sent(spoil, why, tmp_path):
    spoil(made(tmp_path / "set"))
    assert why in refusal(upload, tmp_path / "set", "s3://bucket/x")


def rewrite(path):
    path.write_bytes(path.read_bytes()[::-1])  # of the same size


@pytest.mark.parametrize(("change", "why"), [(rewrite, "changed while it was uploaded"), (Path.unlink, "cannot be read (No such file")])
@pytest.mark.parametrize("name", ["x/ü b+c%20.txt", "large"])
def test_a_file_that_changes_on_the_way_is_refused_and_not_sent(name, change, why, bucket, tmp_path, in_order, parts):
    folder = made(tmp_path / "set", WHOLE | {"large": bytes(5 * MIB) + b"end"})
    told = refusal(upload, folder, f"s3://{bucket}", After(lambda: change(folder / name)))
    assert f"{folder / name}: {why}" in told
    assert not {name, "manifest.json"} & keys(bucket)
    assert unfinished(bucket) == []


# --- interrupted, and not alone ---------------------------------------------------------------------------------------


def test_a_killed_upload_goes_on(bucket, tmp_path):
    """It is killed between the parts of a large file, after small ones."""
    files = WHOLE | {"large": os.urandom(11 * MIB)}
    folder = made(tmp_path / "set", files)
    code = """
        import os, signal, sys
        from pathlib import Path
        from diffstill import storage
        from test_storage import After

        class Killing(After):
            def update(self, n=1):
                if n > 1000:
                    os.kill(os.getpid(), signal.SIGKILL)

        storage.CONNECTIONS, storage.PART = 1, 5 * 2**20
        storage.upload(Path(sys.argv[1]), sys.argv[2], Killing(None))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder), f"s3://{bucket}/set"]
    killed = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    assert killed.returncode == -signal.SIGKILL
    assert keys(bucket) == {"set/empty"}
    assert unfinished(bucket) == ["set/large"]
    assert "its upload did not finish" in refusal(read, f"s3://{bucket}/set/manifest.json")
    assert upload(folder, f"s3://{bucket}/set") == sum(map(len, files.values()))  # all but the empty one
    assert unfinished(bucket) == []
    download(f"s3://{bucket}/set", tmp_path / "got")
    assert contents(tmp_path / "got") == contents(folder)


def test_two_uploads_of_the_same_at_once_both_succeed(bucket, tmp_path, parts, monkeypatch):
    monkeypatch.setattr(storage, "ABANDONED", timedelta(days=36_525))  # to moto all parts are old
    files = WHOLE | {"large": bytes(6 * MIB)}
    folder, start = made(tmp_path / "set", files), Barrier(2)

    def at_once(_):
        start.wait()
        return upload(folder, f"s3://{bucket}/set")

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(at_once, range(2))) >= sum(map(len, files.values()))
    download(f"s3://{bucket}/set", tmp_path / "got")
    assert contents(tmp_path / "got") == contents(folder)
    assert unfinished(bucket) == []


def test_what_another_upload_has_sent_meanwhile_is_not_sent_over(bucket, tmp_path, in_order, parts):
    others = {"large": bytes(6 * MIB), "train/b/2.txt": b"two"}
    sent = upload(made(tmp_path / "set", WHOLE | others), f"s3://{bucket}", After(lambda: put(bucket, others)))
    assert sent == sum(map(len, WHOLE.values())) - len(b"two")
    assert not [item.etag for item in listing(f"s3://{bucket}") if "-" in item.etag]


def test_what_another_upload_has_sent_otherwise_meanwhile_is_refused_and_stays(bucket, tmp_path, in_order):
    told = refusal(upload, made(tmp_path / "set"), f"s3://{bucket}", After(lambda: put(bucket, {"train/a/1.txt": b"eno"})))
    assert "holds 'train/a/1.txt' with other content" in told
    assert read(f"s3://{bucket}/train/a/1.txt") == b"eno"
    assert "manifest.json" not in keys(bucket)


def test_a_store_that_dies_on_the_way_is_told_and_the_folder_stays(tmp_path, monkeypatch):
    folder = made(tmp_path / "set")
    before = contents(folder)
    with s3(tmp_path) as (url, process):
        for name, value in s3_environment(url).items():
            monkeypatch.setenv(name, value)
        store().create_bucket(Bucket="dying")
        told = refusal(upload, folder, "s3://dying", After(lambda: (process.kill(), process.wait())), kind=TransientError)
    assert told.startswith(f"s3://dying: bucket 'dying' at {url} refuses (")
    assert contents(folder) == before


# --- probe, and a store that refuses ------------------------------------------------------------------------------


def test_a_probe_leaves_nothing_behind(bucket):
    put(bucket, {"runs/kept": b"x"})
    probe(f"s3://{bucket}/runs")
    assert [item.name for item in listing(f"s3://{bucket}")] == ["runs/kept"]


@pytest.mark.parametrize("call", [probe, listing, read, upload])
def test_a_missing_bucket(call, bucket, endpoint, tmp_path):
    told = refusal(call, *([made(tmp_path / "set")] if call is upload else []), "s3://no-such-bucket/x")
    assert told == f"s3://no-such-bucket/x: bucket 'no-such-bucket' at {endpoint} refuses (NoSuchBucket); create the bucket or correct its name"


def test_credentials_that_are_not_known_and_credentials_that_may_not(tmp_path, monkeypatch):
    """moto asks for the credentials of an IAM user after the first requests: bucket, user and key."""
    with s3(tmp_path, open_requests=3) as (url, _):
        for name, value in s3_environment(url).items():
            monkeypatch.setenv(name, value)
        store().create_bucket(Bucket="guarded")
        iam = boto3.Session().client("iam")
        iam.create_user(UserName="reader")
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        assert "refuses (InvalidAccessKeyId); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in refusal(probe, "s3://guarded/x")
        assert "refuses (InvalidAccessKeyId); set AWS_ACCESS_KEY_ID" in refusal(upload, made(tmp_path / "set"), "s3://guarded/x")
        assert "refuses (InvalidAccessKeyId); set AWS_ACCESS_KEY_ID" in refusal(read, "s3://guarded/x/manifest.json")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        assert "refuses (AccessDenied); allow these credentials" in refusal(upload, tmp_path / "set", "s3://guarded/x")
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
    told = refusal(probe, "s3://bucket/x", kind=TransientError)
    assert time.monotonic() - started < 15
    assert "http://***@127.0.0.1:" in told
    assert "refuses (EndpointConnectionError); check AWS_ENDPOINT_URL, the network and the service" in told


@pytest.mark.usefixtures("bucket")
def test_an_endpoint_that_hangs_up(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr(storage, "TIMEOUTS", (0.5, 0.5))
        assert "refuses (ReadTimeoutError)" in refusal(listing, "s3://bucket/x", kind=TransientError)


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
