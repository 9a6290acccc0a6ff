"""What is removed and what never is: a store with versions in a real registry, a cache, and work folders, through the command line where that can be.

Moto's server runs with a clock of its own, so that objects are as old as a test wants them.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from hashlib import sha256
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread, current_thread

import boto3
import pytest
from click.testing import CliRunner
from filelock import FileLock
from mlflow import MlflowClient

import diffstill
from chains import Chain, contents
from diffstill import gc, registry, storage
from diffstill.artifacts import WorkFolder, cache_folder, new_artifact, open_artifact, read_manifest, work_root
from diffstill.cli import main
from diffstill.config import FinetuneConfig, Params, PublishConfig, SampleConfig, render_params
from diffstill.errors import DiffstillError
from diffstill.registry import CONTENT, MARK, Registry
from diffstill.run import run_stage
from experiments import all_lines, make_experiment
from servers import free_port, s3_environment, served

DAY = timedelta(days=1)
WEEK, LONG_AGO = 7 * DAY, 30 * DAY
MOTO = """
import sys
from datetime import timedelta
from pathlib import Path
from moto.s3 import models
from moto.server import main
now, back = models.utcnow, Path(sys.argv.pop())
models.utcnow = lambda: now() - timedelta(seconds=float(back.read_text()))
main()
"""
"""Its clock is late by the seconds in a file: what is stored now looks old."""


@dataclass(frozen=True)
class Bucket:
    """A bucket of the test's own, and the server's clock."""

    name: str
    back: Path

    @property
    def store(self) -> str:
        return f"s3://{self.name}/sets"

    @contextmanager
    def earlier(self, how_much: timedelta = LONG_AGO) -> Iterator[None]:
        """What is stored in the block was stored so long ago."""
        self.back.write_text(str(how_much.total_seconds()))
        yield
        self.back.write_text("0")

    def put(self, *keys: str, content: bytes = b"x") -> None:
        for key in keys:
            client().put_object(Bucket=self.name, Key=key, Body=content)

    def objects(self, prefix: str = "") -> dict[str, tuple[str, str]]:
        """ETag and time of all objects."""
        pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return {item["Key"]: (item["ETag"], str(item["LastModified"])) for page in pages for item in page.get("Contents", ())}

    def below(self, digest: str) -> set[str]:
        """What there is of a set or a report."""
        return {key.partition(f"{digest}/")[2] for kind in ("distilled", "report") for key in self.objects(f"sets/{kind}/{digest}/")}

    def parts(self) -> list[str]:
        return [begun["Key"] for begun in client().list_multipart_uploads(Bucket=self.name).get("Uploads", ())]


@cache
def connected(endpoint: str):
    return boto3.Session().client("s3")


def client():
    """The store that the environment leads to, without the package between."""
    return connected(os.environ["AWS_ENDPOINT_URL"])


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    folder, port = tmp_path_factory.mktemp("s3"), free_port()
    (folder / "back").write_text("0")
    command = [sys.executable, "-c", MOTO, "-H", "127.0.0.1", "-p", str(port), str(folder / "back")]
    with served(command, port, folder / "s3.log", {"MOTO_S3_DEFAULT_MAX_KEYS": "50"}):
        yield f"http://127.0.0.1:{port}", folder / "back"


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """A registry that is there already: creating it takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    MlflowClient(uri).search_experiments()
    return uri


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in, with a cache of its own."""
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def bucket(server, database, monkeypatch) -> Bucket:
    endpoint, back = server
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", (name := f"b-{uuid.uuid4().hex}"))
    client().create_bucket(Bucket=name)
    return Bucket(name, back)


def a_set(folder: Path, text: str, kind="distilled") -> tuple[Path, str]:
    """A small artifact and its digest."""
    with new_artifact(folder / f"{kind}-{text}", kind, SampleConfig(), {}) as draft:
        (draft.folder / "a").mkdir()
        for name in ("a/1.txt", "a/2.txt", "b.txt"):
            (draft.folder / name).write_text(f"{name} {text} {folder.name}")  # of one bucket: all share a registry
    return folder / f"{kind}-{text}", read_manifest(folder / f"{kind}-{text}", kind).digest


def stored(bucket: Bucket, folder: Path, text: str, kind="distilled") -> tuple[str, str]:
    """One in the store: where, and its digest."""
    made, digest = a_set(folder / bucket.name, text, kind)
    for path in made.rglob("*.*"):
        bucket.put(f"sets/{kind}/{digest}/{path.relative_to(made).as_posix()}", content=path.read_bytes())
    return f"{bucket.store}/{kind}/{digest}", digest


def register(name: str, **tags: str) -> int:
    """A version with these tags; `distilled` says where its set lies, and under which digest."""
    client = MlflowClient()
    with suppress(Exception):
        client.create_registered_model(name)
    if place := tags.pop("distilled", None):
        tags |= {"files/distilled": place, "sha256": place.rpartition("/")[2], MARK: "0", CONTENT: place}
    return int(client.create_model_version(name, tags.pop("source", "runs:/x/y"), tags=tags, description=tags.pop("description", None)).version)


def say(*words: object, code: int = 0) -> str:
    """What `diffstill gc` prints; with a code that is not 0 its one message."""
    done = CliRunner().invoke(main, ["gc", *map(str, words)])
    assert (done.exit_code, isinstance(done.exception, SystemExit | None)) == (code, True), (done.output, done.exception)
    if code:
        assert done.stderr.count("error: ") == 1
        return done.stderr
    return done.stdout


def outcomes(*words: object) -> dict[str, str]:
    """What came of each thing that was found."""
    return {one["place"]: one["outcome"] for one in json.loads(say(*words, "--json"))["garbage"]}


# --- the store: what goes and what stays --------------------------------------------------------------------------

REFERENCES = {
    "none": {},
    "version": {"distilled": "{place}"},
    "deprecated": {"distilled": "{place}", "deprecated": "why"},
    "of others": {"their-set": "see {place}/"},
    "digest alone": {"checksum": "SHA256:{digest}"},
    "source": {"source": "{place}"},
    "in capitals": {"sum": "{DIGEST}"},
    "description": {"description": "made from {place}."},
}
FOREIGN = (
    "notes.txt",
    "sets/notes.txt",
    "sets/distilled/notes.txt",
    "sets/distilled/abc/manifest.json",
    "sets/card/{}/x",
    "sets/reports/{}/x",
    "sets2/distilled/{}/x",
)


def is_whole(bucket: Bucket, place: str) -> bool:
    """Whether the artifact that its name says is there, to the byte."""
    prefix = place.removeprefix(f"s3://{bucket.name}/")
    held = {name: client().get_object(Bucket=bucket.name, Key=f"{prefix}/{name}")["Body"].read() for name in bucket.below(place.rpartition("/")[2])}
    held = {name: content for name, content in held.items() if not name.startswith(storage._REMOVAL)}  # no file, to anybody
    manifest = held.pop("manifest.json")
    digests = {name: sha256(content).hexdigest() for name, content in held.items()}
    return (sha256(manifest).hexdigest(), digests) == (place.rpartition("/")[2], json.loads(manifest)["files"])


def test_whatever_is_there_only_what_nobody_names_and_is_old_and_ours_goes(bucket, tmp_path):
    """Every mix of kind, age, state and reference: what must stay stays to the byte, what may go is gone, and a look changes nothing."""
    may_go, whole = {}, []
    cells = list(product(("distilled", "report"), ("old", "young"), ("whole", "cut off"), REFERENCES))
    for kind, age, state, reference in cells:
        with bucket.earlier(LONG_AGO if age == "old" else DAY):
            place, digest = stored(bucket, tmp_path, f"{age} {state} {reference}", kind)
            if state == "cut off":
                client().delete_object(Bucket=bucket.name, Key=f"sets/{kind}/{digest}/manifest.json")
        if tags := REFERENCES[reference]:
            register(f"m-{bucket.name}", **{name: text.format(place=place, digest=digest, DIGEST=digest.upper()) for name, text in tags.items()})
        if age == "old" and not tags:
            may_go[place] = state
        whole += [place] if (state, reference) == ("whole", "version") else []
    with bucket.earlier():
        bucket.put(*(name.format("0" * 64) for name in FOREIGN))
    before = bucket.objects()

    asked = outcomes("--store", bucket.store)
    assert asked == dict.fromkeys(may_go, "would go")
    assert bucket.objects() == before
    assert outcomes("--store", f"{bucket.store}/", "--delete") == dict.fromkeys(may_go, "removed")
    gone = tuple(place.removeprefix(f"s3://{bucket.name}/") + "/" for place in may_go)
    assert bucket.objects() == {key: known for key, known in before.items() if not key.startswith(gone)}
    assert len(gone) == 4
    assert [is_whole(bucket, place) for place in whole] == [True] * 4
    assert outcomes("--store", bucket.store, "--delete") == {}


def test_a_version_that_was_deleted_in_mlflow_frees_what_no_other_has(bucket, tmp_path):
    with bucket.earlier():
        (shared, one), (own, other) = stored(bucket, tmp_path, "shared"), stored(bucket, tmp_path, "own", "report")
    name = f"m-{bucket.name}"
    register(name, distilled=shared)
    register(name, distilled=shared, report_sha256=other)
    assert outcomes("--store", bucket.store) == {}
    MlflowClient().delete_model_version(name, "2")
    assert outcomes("--store", bucket.store, "--delete") == {own: "removed"}
    assert (len(bucket.below(one)), bucket.below(other)) == (4, set())


def test_what_lies_beside_the_files_of_a_set_keeps_it(bucket, tmp_path):
    """Somebody has put a note there; and a manifest of another set lies where its name does not say."""
    register(f"m-{bucket.name}", checksum=a_set(tmp_path / bucket.name, "named")[1])
    with bucket.earlier():
        stored(bucket, tmp_path, "named")
        _, digest = stored(bucket, tmp_path, "noted")
        bucket.put(f"sets/distilled/{digest}/note.txt", f"sets/distilled/{digest}/odd//name")
        for content in (b"{}", Path(tmp_path / bucket.name / "distilled-named" / "manifest.json").read_bytes()):
            bucket.put(f"sets/distilled/{sha256(content + b'?').hexdigest()}/manifest.json", content=content)
    before = bucket.objects()
    assert outcomes("--store", bucket.store, "--delete") == {}
    assert bucket.objects() == before
    told = say("--store", bucket.store)
    assert "kept: 1 entry named by a version, 3 entries not made by `diffstill publish` alone\n" in told


def test_parts_of_uploads_that_were_cut_off_are_freed(bucket, tmp_path):
    """Those of a set that a version names, too; others are not ours. Every upload in parts that moto is told of began in 2010."""
    with bucket.earlier():
        place, digest = stored(bucket, tmp_path, "named")
    register(f"m-{bucket.name}", distilled=place)
    keys = [f"sets/distilled/{digest}/large", f"sets/report/{'1' * 64}/large", "sets/distilled/large", "other/large"]
    for key in keys:
        begun = client().create_multipart_upload(Bucket=bucket.name, Key=key)
        client().upload_part(Bucket=bucket.name, Key=key, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * 10)
    found = json.loads(say("--store", bucket.store, "--json"))["garbage"]
    assert [(one["kind"], one["place"], one["bytes"]) for one in found] == [("parts", f"s3://{bucket.name}/{key}", 10) for key in keys[:2]]
    assert set(outcomes("--store", bucket.store, "--delete").values()) == {"removed"}
    assert sorted(bucket.parts()) == sorted(keys[2:])
    assert len(bucket.below(digest)) == 4


def test_a_published_version_loads_after_everything_else_is_gone(bucket, tmp_path, monkeypatch):
    """Through `publish` and `load`, as users have it: what is published again after its version was deleted is whole, and young."""
    made = make_experiment(tmp_path / "made", seeds=(0,))
    made.judge(all_lines(made.images.digest))
    made.summarise()
    config = PublishConfig(name=f"m-{bucket.name}", store=bucket.store)
    Path("params.yaml").write_text(render_params(Params(publish=config)))

    def publish() -> int:
        paths = {"distilled": made.paths["distilled"], "report": made.root / "report", "card": made.root / "card"}
        return int(run_stage("publish", config, paths, force=True)["version"])

    with bucket.earlier():
        assert publish() == 1
        orphan, _ = stored(bucket, tmp_path, "orphan")
    assert outcomes("--delete") == {orphan: "removed"}
    assert len(diffstill.load(f"{config.name}/1")) == 4
    MlflowClient().delete_model_version(config.name, "1")
    assert publish() == 2
    assert outcomes("--delete") == {}
    MlflowClient().delete_model_version(config.name, "2")
    assert "kept: 2 entries not idle long enough" in say("--store", bucket.store), "it was published again a moment ago, though its files are old"
    assert publish() == 3
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "other"))
    assert len(diffstill.load(f"{config.name}/3")) == 4


# --- the store: when nothing may go -------------------------------------------------------------------------------


@pytest.fixture
def orphan(bucket, tmp_path) -> str:
    """An old set that no version names, beside one that a version does."""
    with bucket.earlier():
        named, (place, _) = stored(bucket, tmp_path, "named")[0], stored(bucket, tmp_path, "orphan")
    register(f"m-{bucket.name}", distilled=named)
    return place


@contextmanager
def untouched(bucket: Bucket) -> Iterator[None]:
    before = bucket.objects()
    yield
    assert bucket.objects() == before


def test_a_registry_that_does_not_answer_keeps_everything(bucket, orphan, monkeypatch):
    good = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    with untouched(bucket):
        gone = f"http://me:secret@127.0.0.1:{free_port()}"
        told = say("--store", bucket.store, "--delete", "--registry", gone, code=2)
        assert "MLflow at http://***@127.0.0.1:" in told
        assert "secret" not in told
        monkeypatch.setenv("MLFLOW_TRACKING_URI", gone)
        say("--store", bucket.store, "--delete", code=2)
        say("--store", bucket.store, "--delete", "--registry", good, code=2)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
        assert "what may go from a store is what no version names" in say("--store", bucket.store, "--delete", code=2)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert "no such database, so it knows no version" in say("--store", bucket.store, "--delete", code=2)
        assert not Path("mlflow.db").exists()


def test_a_registry_that_dies_on_the_way_keeps_the_rest(bucket, orphan, tmp_path, monkeypatch):
    with bucket.earlier():
        stored(bucket, tmp_path, "another")
    real, calls = MlflowClient.search_model_versions, []

    def dying(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:  # the look at all, one before the first removal, one before the second
            raise MlflowException("gone")
        return real(*arguments, **options)

    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(MlflowClient, "search_model_versions", dying)
    done = CliRunner().invoke(main, ["gc", "--store", bucket.store, "--delete"])
    assert (done.exit_code, done.stderr.count("error: ")) == (2, 1)
    assert (done.stdout.count(": removed"), done.stdout.count(": stays")) == (1, 1)
    assert "removed 1 distilled set of 2 distilled sets, " in done.stdout
    assert not [key for key in bucket.objects() if storage._REMOVAL in key], "no sign is left"


def test_another_registry_with_versions_in_the_store_keeps_them(bucket, orphan, tmp_path, monkeypatch):
    mine, theirs = os.environ["MLFLOW_TRACKING_URI"], f"sqlite:///{tmp_path}/theirs.db"
    shutil.copy(mine.removeprefix("sqlite:///"), theirs.removeprefix("sqlite:///"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)
    register("theirs", distilled=orphan)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mine)
    assert outcomes("--store", bucket.store) == {orphan: "would go"}
    told = say("--store", bucket.store, "--registry", theirs)
    assert f"versions: looked up at {theirs}, {mine} and nowhere else; if another MLflow" in told
    with untouched(bucket):
        assert outcomes("--store", bucket.store, "--registry", theirs, "--delete") == {}
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", theirs)
        assert [one for one in outcomes("--store", bucket.store) if one == orphan] == [], "publishing goes there, so gc looks there"


def test_a_registry_that_names_nothing_of_the_store_is_doubted(bucket, tmp_path, monkeypatch):
    with bucket.earlier():
        place, _ = stored(bucket, tmp_path, "orphan")
    uri = os.environ["MLFLOW_TRACKING_URI"]
    with untouched(bucket):
        assert f"in doubt: no version at {uri} names anything in {bucket.store}: is it the MLflow" in say("--store", bucket.store)
        assert "If it is, and all of them were deleted, name it with --registry; nothing was removed" in say(
            "--store", bucket.store, "--delete", code=2
        )
    assert outcomes("--store", bucket.store, "--delete", "--registry", uri) == {place: "removed"}


def test_of_many_pages_no_version_is_missed_when_one_is_deleted_meanwhile(bucket, monkeypatch):
    """MLflow cuts pages by position: what follows a deleted one would slip from a page that is to be read into one that was."""
    monkeypatch.setattr(registry, "PAGE", 2)
    name, digests = f"m-{bucket.name}", [sha256(str(number).encode()).hexdigest() for number in range(7)]
    for digest in digests:
        register(name, sum=digest)
    real, pages = MlflowClient.search_model_versions, []

    def deleting(self, *arguments, **options):
        page = real(self, *arguments, **options)
        if len(pages) < 1:
            self.delete_model_version(name, "1")
        pages.append(page)
        return page

    monkeypatch.setattr(MlflowClient, "search_model_versions", deleting)
    assert set(digests[1:]) <= Registry.here().digests()
    assert len(pages) > 8, "it was read more than once"


@pytest.mark.parametrize("text", ["0d", "0h", "7", "7 d", "-1d", "week", "", "1m"])
def test_a_time_that_is_none_or_too_short_is_refused(text):
    assert f"--older-than {text!r}: give days or hours" in say("--cache", "--older-than", text, code=2)


def test_a_store_that_is_none_and_a_registry_without_a_store_are_refused(bucket):
    assert "no S3 location" in say("--store", "/tmp/x", code=2)
    assert "refuses (NoSuchBucket)" in say("--store", "s3://no-such-bucket/x", code=2)
    assert "give the store with --store, too" in say("--cache", "--registry", "sqlite:///x.db", code=2)
    assert "nowhere.yaml" in say("--params", "nowhere.yaml", code=2)


# --- the store: not alone, and killed -----------------------------------------------------------------------------


def test_a_version_that_is_registered_between_the_look_and_the_removal_keeps_its_set(bucket, orphan):
    survey = gc.in_store(bucket.store, gc.registries(), WEEK)
    assert [one.place for one in survey.garbage] == [orphan]
    register("late", distilled=orphan)
    with untouched(bucket):
        assert [outcome for _, outcome in gc.sweep(survey)] == ["is named by a version by now"]


def test_what_is_uploaded_again_between_the_look_and_the_removal_stays(bucket, orphan, tmp_path):
    survey = gc.in_store(bucket.store, gc.registries(), WEEK)
    assert storage.upload(tmp_path / bucket.name / "distilled-orphan", orphan) == 0
    with untouched(bucket):
        assert [outcome for _, outcome in gc.sweep(survey)] == ["was written to meanwhile"]


class Stop(BaseException):
    """Like a kill, but in this process."""


@contextmanager
def at_request(number: int, act, monkeypatch) -> Iterator[list[int]]:
    """Call `act` before the `number`th request of this thread to the store, in another thread; yields a list that is as long as there are requests."""
    mine, real, counted = current_thread(), storage._connected, []

    def counting(session):
        made = real(session)
        if current_thread() is mine:
            made.meta.events.register("before-call.s3", count)
        return made

    def count(**_):
        counted.append(1)
        if len(counted) == number:
            act()

    with monkeypatch.context() as world:
        world.setattr(storage, "_connected", counting)
        yield counted


STATES = {"whole": (), "without its manifest": ("manifest.json",), "one file of it": ("manifest.json", "a/1.txt", "a/2.txt")}


def prepared(bucket: Bucket, tmp_path: Path, state: str, text: str = "orphan") -> tuple[str, Path]:
    """A set that nobody names, as an earlier publisher or removal left it long ago."""
    with bucket.earlier():
        place, digest = stored(bucket, tmp_path, text)
        for name in STATES[state]:
            client().delete_object(Bucket=bucket.name, Key=f"sets/distilled/{digest}/{name}")
    return place, tmp_path / bucket.name / f"distilled-{text}"


def removed(place: str) -> str | None:
    """What a removal comes to for which nobody is registered."""
    return storage.remove(place, lambda names, age: "young" if age <= WEEK else None)


def uploaded(folder: Path, place: str) -> bool:
    """Whether an upload succeeds."""
    try:
        storage.upload(folder, place)
    except DiffstillError:
        return False
    return True


@pytest.mark.parametrize(("state", "requests"), list(zip(STATES, (4, 4, 7), strict=True)))
def test_a_removal_anywhere_within_an_upload_never_leaves_it_believing_in_what_is_gone(state, requests, bucket, tmp_path, monkeypatch):
    """At each of its requests; an upload that fails is told so, and the next one is whole."""
    monkeypatch.setattr(storage, "CONNECTIONS", 1)
    spared = []
    for number in range(1, requests + 1):
        place, folder = prepared(bucket, tmp_path, state, f"{number}")

        def in_between(place=place) -> None:
            remover = Thread(target=lambda: spared.append(removed(place)))
            remover.start()
            remover.join(60)

        with at_request(number, in_between, monkeypatch) as seen:
            done = uploaded(folder, place)
        assert len(seen) >= number
        assert done or uploaded(folder, place)
        assert is_whole(bucket, place)
    assert {None, "young"} == set(spared)


@pytest.mark.parametrize(("state", "requests"), list(zip(STATES, (10, 8, 6), strict=True)))
def test_an_upload_anywhere_within_a_removal_waits_or_stops_it(state, requests, bucket, tmp_path, monkeypatch):
    """It begins at each request of the removal, and goes on until it has finished or waits; then the removal goes on."""
    turn, results, outcomes = Event(), [], []
    monkeypatch.setattr(storage, "CONNECTIONS", 1)
    monkeypatch.setattr(storage, "PAUSE", 0.05)
    monkeypatch.setattr(storage.log, "info", lambda *_: turn.set())  # it says that it waits
    for number in range(1, requests + 1):
        place, folder = prepared(bucket, tmp_path, state, f"{number}")
        turn.clear()

        def publish(folder=folder, place=place) -> None:
            results.append(uploaded(folder, place))
            turn.set()

        publisher = Thread(target=publish)

        def let_in(publisher=publisher) -> None:
            publisher.start()
            assert turn.wait(60)

        with at_request(number, let_in, monkeypatch) as seen:
            outcomes.append(removed(place))
        publisher.join(60)
        assert (len(results), len(seen) >= number) == (number, True)
        assert results[-1] or uploaded(folder, place)
        assert is_whole(bucket, place)
        assert not [name for name in bucket.below(place.rpartition("/")[2]) if name.startswith(storage._REMOVAL)]
    assert {None, "young"} == set(outcomes)


def killed_removing(place: str, after: int) -> None:
    """A removal in a process of its own, killed before one of its deletions."""

    def die() -> None:
        real, deleted = storage._Removal._delete, []

        def dying(self, name):
            deleted.append(name)
            if len(deleted) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, name)

        storage._Removal._delete, storage.CONNECTIONS = dying, 1
        removed(place)

    process = get_context("fork").Process(target=die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("after", [0, 1, 2])
def test_after_a_kill_the_next_upload_is_whole(after, bucket, tmp_path, monkeypatch):
    """It waits until the removal must be dead. What is left until then is not whole to anybody."""
    monkeypatch.setattr(storage, "LEASE", timedelta(seconds=2))
    monkeypatch.setattr(storage, "PAUSE", 0.2)
    place, folder = prepared(bucket, tmp_path, "whole")
    killed_removing(place, after)
    left = bucket.below(place.rpartition("/")[2])
    assert len([name for name in left if name.startswith(storage._REMOVAL)]) == 1
    assert ("manifest.json" in left) == (after == 0)
    assert uploaded(folder, place)
    assert is_whole(bucket, place)


def test_after_a_kill_the_next_removal_takes_the_rest(bucket, orphan, monkeypatch):
    killed_removing(orphan, 2)
    assert outcomes("--store", bucket.store, "--delete") == {orphan: "spared, it is being removed by another `diffstill gc`"}
    monkeypatch.setattr(storage, "LEASE", timedelta(seconds=1))
    time.sleep(2.1)
    assert outcomes("--store", bucket.store, "--delete") == {orphan: "removed"}
    assert bucket.below(orphan.rpartition("/")[2]) == set()


def test_a_removal_that_was_held_up_stops(bucket, orphan, monkeypatch):
    """A machine that slept meanwhile: others take its removal for dead, and may be uploading."""
    now, real = time.time, storage._Removal.look
    late = [0.0]

    def slow(self):
        late[0] = storage.LEASE.total_seconds()
        return real(self)

    monkeypatch.setattr(storage._Removal, "look", slow)
    monkeypatch.setattr(storage.time, "time", lambda: now() + late[0])
    with untouched(bucket), pytest.raises(DiffstillError, match="its removal was held up"):
        removed(orphan)


def test_at_every_moment_of_a_removal_what_has_a_manifest_has_all_files(bucket, orphan, monkeypatch):
    digest = orphan.rpartition("/")[2]
    seen, real = [], storage._Removal._delete

    def looking(self, name):
        real(self, name)
        seen.append(bucket.below(digest))

    monkeypatch.setattr(storage._Removal, "_delete", looking)
    assert removed(orphan) is None
    assert len(seen) == 4
    assert not [names for names in seen if "manifest.json" in names]
    assert bucket.below(digest) == set()


# --- the cache ----------------------------------------------------------------------------------------------------


def aged(*paths: Path, by: timedelta = LONG_AGO) -> None:
    """Make files and folders, with all in them, as old as that."""
    then = time.time() - by.total_seconds()
    for path in paths:
        for one in (*path.rglob("*"), path):
            os.utime(one, (then, then), follow_symlinks=False)


def shape(folder: Path) -> dict[Path, tuple[int, int]]:
    """Sizes and times of everything: what `contents` tells, without reading, which would make it look used."""
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


def filled(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"x" * 1000)
    return folder


CACHED = [
    "distilled/" + "a" * 64, "s3/" + "b" * 64, "dvc/" + "c" * 32 + ".dir", "archives/" + "d" * 16, "hub/models--me--net", "fashion-mnist",
    "report/." + "e" * 64 + ".partial", "archives/.unpacking.abc", "card/." + "f" * 64 + ".removing",
]  # fmt: skip
OTHERS = ["distilled/mine", "notes", "hub/version.txt.d", "s3/" + "B" * 64, "distilled/.hidden"]


def test_downloads_that_nobody_used_go_and_all_else_stays(here):
    cache = cache_folder()
    for name in (*CACHED, *OTHERS, "distilled/" + "9" * 64):
        filled(cache / name)
    (cache / "distilled" / ("8" * 64)).symlink_to(filled(here / "elsewhere"))
    aged(*(cache / name for name in (*CACHED, *OTHERS)), here / "elsewhere")
    before = shape(cache)
    expected = {str(cache / name) for name in CACHED}
    assert outcomes("--cache") == dict.fromkeys(expected, "would go")
    assert shape(cache) == before
    told = say("--cache")
    assert (
        f"dry run: would remove {len(CACHED)} downloads, 9.0 kB; nothing was changed, --delete removes them\nkept: 1 entry not idle long enough\n"
        in told
    )
    assert outcomes("--cache", "--delete") == dict.fromkeys(expected, "removed")
    assert {path.relative_to(cache).parent.as_posix() for path in cache.rglob("file")} == {*OTHERS, "distilled/" + "9" * 64}
    assert (here / "elsewhere" / "file").is_file()


def test_a_file_that_was_read_lately_keeps_its_entry(here):
    entry = filled(cache_folder() / "archives" / ("d" * 16))
    aged(entry)
    os.utime(entry / "file", (time.time(), (entry / "file").stat().st_mtime))
    assert outcomes("--cache", "--delete") == {}


def test_an_entry_that_is_gone_comes_again_and_one_that_is_used_is_young(bucket, tmp_path):
    with bucket.earlier():
        place, _ = stored(bucket, tmp_path, "named")
    register(name := f"m-{bucket.name}", distilled=place)
    (version,) = Registry.here().search(name)
    folder = Registry.here().fetch(version)
    aged(folder)
    assert Registry.here().fetch(version) == folder
    assert outcomes("--cache", "--delete") == {}, "it was fetched a moment ago"
    aged(folder)
    assert outcomes("--cache", "--delete") == {str(folder): "removed"}
    assert list(folder.parent.iterdir()) == []
    assert contents(Registry.here().fetch(version)) == contents(tmp_path / bucket.name / "distilled-named")


def test_an_entry_that_is_used_between_the_look_and_the_removal_stays(bucket, tmp_path):
    folder = cache_folder() / "distilled" / ("a" * 64)
    aged(filled(folder))
    survey = gc.in_cache(WEEK)
    storage.appear(folder, lambda _: None)
    assert [outcome for _, outcome in gc.sweep(survey)] == ["was used meanwhile"]
    aged(folder)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        assert [outcome for _, outcome in gc.sweep(survey)] == ["is used by a process by now"]
        assert "1 entry in use by a process" in say("--cache")
    assert [outcome for _, outcome in gc.sweep(survey)] == [None]
    assert [outcome for _, outcome in gc.sweep(survey)] == ["is gone already"]


# --- work ---------------------------------------------------------------------------------------------------------


def work(stage: str, number: int) -> Path:
    return filled(work_root() / f"{stage}-{number:016x}")


HOLD = "import sys; from filelock import FileLock\nwith FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"


def test_work_that_nobody_goes_on_with_goes_and_what_a_process_works_on_stays(here):
    idle, held, young, other = work("finetune", 1), work("finetune", 2), work("encode", 3), filled(work_root() / "mine")
    outgoing, mine = filled(work_root() / "outgoing" / ("1" * 16)), filled(work_root() / "outgoing" / "mine")
    notes = [work_root() / "costs.jsonl", filled(work_root() / "outside") / "file"]
    notes[0].write_text("{}\n")
    aged(idle, held, other, outgoing, mine, work_root() / "outside")
    with subprocess.Popen([sys.executable, "-c", HOLD, held.with_suffix(".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        before = shape(work_root())
        assert outcomes("--work") == {str(idle): "would go", str(outgoing): "would go"}
        assert shape(work_root()) == before
        assert "kept: 1 entry in use by a process, 1 entry not idle long enough\n" in say("--work")
        assert set(outcomes("--work", "--delete").values()) == {"removed"}
        process.stdin.close()
        process.wait(30)
    assert sorted(path.name for path in work_root().iterdir() if path.is_dir()) == sorted([held.name, young.name, "mine", "outgoing", "outside"])
    assert all(note.is_file() for note in (*notes, mine / "file"))
    assert outcomes("--work", "--delete") == {str(held): "removed"}
    assert not list(work_root().glob("*.lock"))


def test_a_stage_that_starts_between_the_look_and_the_removal_keeps_its_work():
    stage = WorkFolder("finetune", FinetuneConfig(), {})
    with stage:
        stage.append("metrics", {"step": 1})
    aged(stage.folder)
    survey = gc.in_work(WEEK, None, Path("artifacts"))
    with stage:
        assert [outcome for _, outcome in gc.sweep(survey)] == ["is used by a process by now"]
    assert stage.lines("metrics") == [{"step": 1}]
    aged(stage.folder)
    assert [outcome for _, outcome in gc.sweep(survey)] == [None]
    with stage:
        assert stage.lines("metrics") == []


def test_the_work_of_a_chain_is_known_by_its_settings(tiny_chain: Chain):
    """Every stage that keeps work has left its lock in the work folder of the chain."""
    locks = {lock.stem for lock in (tiny_chain.artifacts.parent / "work").glob("*.lock")}
    found = gc.current_work(tiny_chain.params, tiny_chain.artifacts)
    assert {name for name in locks if not name.startswith("prepare-")} == found
    assert {name.partition("-")[0] for name in found} == {"pretrain", "encode", "finetune", "evaluate"}


def test_work_of_the_present_settings_stays_however_old(tiny_chain: Chain, here):
    Path("params.yaml").write_text(render_params(tiny_chain.params))
    (here / "artifacts").symlink_to(tiny_chain.artifacts)
    (current,) = (name for name in gc.current_work(tiny_chain.params, tiny_chain.artifacts) if name.startswith("finetune-"))
    kept, other = filled(work_root() / current), work("finetune", 1)
    aged(kept, other)
    assert outcomes("--work") == {str(other): "would go"}
    assert "1 entry where a step of this chain would go on" in say("--work")
    changed = tiny_chain.params.model_copy(update={"finetune": tiny_chain.params.finetune.model_copy(update={"learning_rate": 0.5})})
    Path("params.yaml").write_text(render_params(changed))
    assert outcomes("--work", "--delete") == dict.fromkeys(map(str, (kept, other)), "removed")


def test_drafts_of_killed_stages_go_and_artifacts_never(here):
    """Also the earlier artifact that stepped aside for a later one, unless a kill has left it as the last copy."""
    for name in ("images", "scores/real-convnet-2"):
        with new_artifact(here / "artifacts" / name, name.partition("/")[0], SampleConfig(), {}) as draft:
            (draft.folder / "x").write_text("x")
    drafts = [filled(here / "artifacts" / name) for name in (".denoiser.ab_cd123", "scores/.real-convnet-2.abcdefgh", ".images.old.abcdefgh")]
    others = [filled(here / "artifacts" / name) for name in (".latents.old.abcdefgh", ".git", ".my.notebook", "notes.abcdefgh")]
    aged(here / "artifacts")
    before = shape(here / "artifacts")
    with FileLock(work_root() / f"finetune-{'1' * 16}.lock"):
        assert outcomes("--work") == {}
        assert "3 entries in use by a process" in say("--work")
    drafts = [path.relative_to(here) for path in drafts]
    assert outcomes("--work") == dict.fromkeys(map(str, drafts), "would go")
    assert shape(here / "artifacts") == before
    assert outcomes("--work", "--delete") == dict.fromkeys(map(str, drafts), "removed")
    assert all((folder / "file").is_file() for folder in others)
    assert open_artifact(here / "artifacts" / "images", "images")


KILLED = """
import os, signal, sys
from pathlib import Path
from diffstill.artifacts import new_artifact
from diffstill.config import SampleConfig
with new_artifact(Path(sys.argv[1]), "images", SampleConfig(), {}) as draft:
    (draft.folder / "x").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_draft_is_known_by_the_name_that_it_has(here):
    assert subprocess.run([sys.executable, "-c", KILLED, "artifacts/images"], check=False).returncode == -signal.SIGKILL
    (draft,) = (here / "artifacts").iterdir()
    assert re.fullmatch(r"\.images\..{8}", draft.name)
    aged(draft)
    assert outcomes("--work", "--delete") == {str(Path("artifacts", draft.name)): "removed"}


def test_locks_of_finished_work_go_unless_they_are_held(here):
    locks = [work_root() / f"{stage}-{'1' * 16}.lock" for stage in ("encode", "finetune")]
    work_root().mkdir(parents=True)
    for lock in (*locks, work_root() / "mine.lock"):
        lock.touch()
    aged(*locks, work_root() / "mine.lock")
    with FileLock(locks[0]):
        assert outcomes("--work", "--delete") == {f"{work_root()}/*.lock": "removed"}
    assert sorted(path.name for path in work_root().iterdir()) == [locks[0].name, "mine.lock"]


# --- everything ---------------------------------------------------------------------------------------------------


def test_without_a_choice_it_looks_at_the_store_of_the_parameters_the_cache_and_the_work(bucket, orphan, here):
    Path("params.yaml").write_text(render_params(Params(publish=PublishConfig(store=bucket.store))))
    entry, left = filled(cache_folder() / "report" / ("a" * 64)), work("pretrain", 1)
    aged(entry, left)
    assert outcomes() == dict.fromkeys([orphan, str(entry), str(left)], "would go")
    assert outcomes("--cache") == {str(entry): "would go"}
    assert outcomes("--work") == {str(left): "would go"}
    assert outcomes("--store", bucket.store) == {orphan: "would go"}
    assert set(outcomes("--older-than", "31d").values()) == set()
    told = say().splitlines()
    assert told[0].split() == ["what", "files", "size", "idle", "why"]
    assert re.fullmatch(rf"{orphan} +4 +\d+ bytes +30 d +no version names it *", told[1])


def test_where_there_is_nothing_it_says_so(here):
    assert (
        say("--cache", "--work")
        == "dry run: would remove nothing, 0 bytes; nothing was changed, --delete removes them\nkept: nothing else was found\n"
    )
    assert list(here.iterdir()) == []
