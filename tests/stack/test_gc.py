"""Garbage in a real store, with versions in PostgreSQL behind MLflow's server: what is removed, what stays, and what is published afterwards."""

import json
import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest

import diffstill
from chains import Chain, contents
from diffstill import gc, storage
from diffstill.artifacts import open_artifact
from diffstill.config import Params
from experiments import all_lines, make_experiment
from stack.conftest import Store, door
from stack.test_versions import Shop, refusal, say

pytestmark = pytest.mark.xdist_group("chain")


def a_chain(folder: Path, draw: int) -> Chain:
    """A set with its report, another one for another `draw`."""
    made = make_experiment(folder / f"made-{draw}", seeds=(0,), draw=draw)
    made.judge(all_lines(made.images.digest))
    made.summarise()
    return Chain(Params(), made.root)


@dataclass(frozen=True)
class Attic:
    """A shop with one version, and what has piled up beside it."""

    shop: Shop
    chains: tuple[Chain, ...]

    @property
    def store(self) -> str:
        return f"{self.shop.bucket.uri}/stores/{self.shop.name}"

    def place(self, number: int, kind: str = "distilled") -> str:
        return f"{self.store}/{kind}/{open_artifact(self.chains[number].artifacts / kind, kind).digest}"

    def objects(self) -> dict[str, str]:
        return self.shop.bucket.etags(f"stores/{self.shop.name}/")

    def outcomes(self, *words: str) -> dict[str, str]:
        found = json.loads(say("gc", "--store", self.store, "--json", *words))["garbage"]
        return {one["place"]: one["outcome"] for one in found}


@pytest.fixture
def attic(postgres_mlflow, ceph_store, tmp_path, monkeypatch, request) -> Attic:
    """Version 1; version 2, which was deleted in MLflow; a set that was never registered; one whose upload was cut off; and what is not ours."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    shop = Shop(name, postgres_mlflow, ceph_store, "s3", tmp_path / "attic")
    shop.enter(monkeypatch)
    attic = Attic(shop, tuple(a_chain(tmp_path, draw) for draw in range(4)))
    for chain in attic.chains[:2]:
        say(*shop.words(chain))
    postgres_mlflow.client().delete_model_version(name, "2")
    for number in (2, 3):
        storage.upload(attic.chains[number].artifacts / "distilled", attic.place(number))
    owner, place = ceph_store.client(), {"Bucket": ceph_store.bucket}
    owner.delete_object(**place, Key=f"{attic.place(3).removeprefix(ceph_store.uri + '/')}/manifest.json")
    for key in ("notes.txt", "distilled/notes.txt", f"other/{'0' * 64}/manifest.json"):
        owner.put_object(**place, Key=f"stores/{name}/{key}", Body=b"mine")
    for key in (f"distilled/{'1' * 64}/large", "other/large"):
        begun = owner.create_multipart_upload(**place, Key=f"stores/{name}/{key}")
        owner.upload_part(**place, Key=f"stores/{name}/{key}", UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * 1000)
    time.sleep(2)  # all of it is older than no time at all
    return attic


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Whatever is idle for a second is old."""
    monkeypatch.setattr(gc, "idle_time", lambda _: timedelta())


def piled_up(attic: Attic) -> set[str]:
    return {attic.place(1), attic.place(1, "report"), attic.place(2), attic.place(3), f"{attic.store}/distilled/{'1' * 64}/large"}


@pytest.mark.usefixtures("at_once")
def test_what_no_version_names_goes_and_the_version_loads(attic, tmp_path, monkeypatch):
    before = attic.objects()
    assert attic.outcomes() == dict.fromkeys(piled_up(attic), "would go")
    assert attic.objects() == before
    assert attic.outcomes("--delete") == dict.fromkeys(piled_up(attic), "removed")
    gone = tuple(place.removeprefix(f"{attic.shop.bucket.uri}/") + "/" for place in piled_up(attic))
    assert attic.objects() == {key: etag for key, etag in before.items() if not key.startswith(gone)}
    begun = attic.shop.bucket.client().list_multipart_uploads(Bucket=attic.shop.bucket.bucket, Prefix=f"stores/{attic.shop.name}/")
    assert [one["Key"] for one in begun["Uploads"]] == [f"stores/{attic.shop.name}/other/large"]
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "empty"))
    assert len(diffstill.load(f"{attic.shop.name}/1")) == 4
    say(*attic.shop.words(attic.chains[1]))
    assert contents(diffstill.load(f"{attic.shop.name}/3").artifact.folder) == contents(attic.chains[1].artifacts / "distilled")
    assert attic.outcomes() == {}


def test_what_is_young_stays_and_so_does_all_while_a_server_is_away(attic, at_once, stranger, use, monkeypatch):
    before = attic.objects()
    with door(attic.shop.mlflow.url) as way:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", way.url)
        way.shut()
        assert way.url in refusal("gc", "--store", attic.store, "--delete")
        way.open()
    use(attic.shop.mlflow, stranger)
    assert "refuses (AccessDenied)" in refusal("gc", "--store", attic.store, "--delete")
    use(attic.shop.bucket)
    monkeypatch.undo()
    attic.shop.enter(monkeypatch)
    assert attic.outcomes("--delete", "--older-than", "1h") == {}
    assert attic.objects() == before


@pytest.mark.usefixtures("at_once")
def test_a_removal_that_is_killed_is_finished_by_who_publishes_the_same(attic, monkeypatch):
    """The publisher waits until the removal must be dead."""
    monkeypatch.setattr(storage, "LEASE", timedelta(seconds=3))

    def die() -> None:
        real, deleted = storage._Removal._delete, []

        def dying(self, name):
            deleted.append(name)
            if len(deleted) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, name)

        storage._Removal._delete, storage.CONNECTIONS = dying, 1
        storage.remove(attic.place(1), lambda names, age: None)

    process = get_context("fork").Process(target=die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert f"{attic.place(1).removeprefix(attic.shop.bucket.uri + '/')}/manifest.json" not in attic.objects()
    say(*attic.shop.words(attic.chains[1]))
    assert contents(diffstill.load(f"{attic.shop.name}/3").artifact.folder) == contents(attic.chains[1].artifacts / "distilled")
    assert attic.place(1) not in attic.outcomes("--delete")


@pytest.mark.usefixtures("at_once")
def test_a_bucket_that_keeps_versions_keeps_what_was_removed(gateway, tmp_path, use):
    """A removal leaves delete markers; what is published again lies over them, and the bucket's own rules free the space."""
    shelf = Store("versioned", gateway.account("archivist"))
    client = shelf.client()
    client.create_bucket(Bucket=shelf.bucket)
    client.put_bucket_versioning(Bucket=shelf.bucket, VersioningConfiguration={"Status": "Enabled"})
    use(shelf)
    chain = a_chain(tmp_path, 0)
    place = f"{shelf.uri}/sets/distilled/{open_artifact(chain.artifacts / 'distilled', 'distilled').digest}"
    storage.upload(chain.artifacts / "distilled", place)
    before = set(shelf.names())
    assert storage.remove(place, lambda names, age: None) is None
    assert shelf.names() == []
    markers = client.list_object_versions(Bucket=shelf.bucket)["DeleteMarkers"]
    assert before < {one["Key"] for one in markers if one["IsLatest"]}
    storage.upload(chain.artifacts / "distilled", place)
    assert set(shelf.names()) == before
    storage.download(place, tmp_path / "got")
    assert contents(tmp_path / "got") == contents(chain.artifacts / "distilled")
