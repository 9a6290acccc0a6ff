"""The whole life of a version as a user has it, on the command line, against real servers.

Metadata lie in sqlite or in PostgreSQL behind MLflow's server. Files lie in Ceph: behind MLflow's server too, so that clients need no credentials,
or where `publish.store` says.
"""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import md5, sha256
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from ruamel.yaml import YAML

import diffstill
from chains import Chain, contents
from chains import enter as enter_empty_world
from diffstill.artifacts import Kind, open_artifact, read_manifest
from diffstill.cli import main
from diffstill.config import Params, PublishConfig, render_params
from diffstill.errors import DiffstillError
from diffstill.pictures import read_png
from diffstill.registry import KINDS, Reference, Registry, Version
from diffstill.run import run_chain
from experiments import all_lines, make_experiment
from stack.conftest import Mlflow, Store, door

pytestmark = pytest.mark.xdist_group("chain")

SECRETS = ("s3cr3t", "key-of-owner", "key-of-stranger", "no-secret")
ALIASES = ("best-ipc1", "best-ipc2", "newest")


@dataclass(frozen=True)
class Shop:
    """A registered model on a server, whose files lie in `place`, and the folder in which its users stand."""

    name: str
    mlflow: Mlflow
    bucket: Store
    place: str
    folder: Path

    @property
    def store(self) -> str | None:
        """As `publish.store` has it."""
        return f"{self.bucket.uri}/stores/{self.name}" if self.place == "s3" else None

    def enter(self, world: pytest.MonkeyPatch) -> None:
        """Be its user, who has credentials of the store only where they are needed."""
        enter_empty_world(world, self.folder)
        for name, value in {**self.bucket.environment, **self.mlflow.environment}.items():
            world.setenv(name, value)
        world.setenv("MLFLOW_EXPERIMENT_NAME", self.name)
        world.setenv("DIFFSTILL_CACHE", str(self.folder / "cache"))
        if self.place == "mlflow":
            for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                world.delenv(name)

    def words(self, chain: Chain, **changes: Any) -> list[str]:
        """The command that publishes the set of a chain."""
        settings = {"name": self.name, "gate": "off", "store": self.store} | changes
        text = render_params(chain.params.model_copy(update={"publish": PublishConfig(**settings)}))
        params = self.folder / f"{sha256(text.encode()).hexdigest()[:8]}.yaml"
        params.write_text(text, encoding="utf-8")
        inputs = [f"--{kind}={chain.artifacts / kind}" for kind in ("distilled", "report")]
        return ["publish", f"--params={params}", *inputs, f"--card={self.folder / 'cards' / chain.artifacts.parent.name}"]

    def versions(self) -> list[Version]:
        return Registry.here().search(self.name)

    def version(self, number: int = 1) -> Version:
        return Registry.here().resolve(Reference(self.name, number=number))

    def aliases(self) -> dict[str, int]:
        return {alias: version.number for version in self.versions() for alias in version.aliases}

    def runs(self) -> list:
        """All runs of `publish`, the earliest first."""
        client = self.mlflow.client()
        found = client.get_experiment_by_name(self.name)
        return (
            client.search_runs([found.experiment_id], "tags.`diffstill.stage` = 'publish'", order_by=["attributes.start_time ASC"]) if found else []
        )

    def objects(self) -> dict[str, str]:
        """MD5 of all that the bucket has from its publishers but `params.json` of their chains, by its place there."""
        found = self.mlflow.client().get_experiment_by_name(self.name)
        areas = [f"{self.mlflow.prefix}/{found.experiment_id}/"] * bool(found) + [f"stores/{self.name}/"]
        return {key: etag for area in areas for key, etag in self.bucket.etags(area).items() if not key.endswith("/params.json")}

    def area(self, version: Version, kind: Kind) -> str:
        """Where in the bucket an artifact of a version must lie."""
        if self.place == "s3" and kind != "card":
            return f"stores/{self.name}/{kind}/{version.digest(kind)}/"
        return f"{self.run_area(version)}{kind}/"

    def run_area(self, version: Version) -> str:
        run = self.mlflow.client().get_run(version.run_id).info
        return f"{self.mlflow.prefix}/{run.experiment_id}/{run.run_id}/artifacts/"

    def expected_objects(self, version: Version, folders: Mapping[str, Path]) -> dict[str, str]:
        """What must be in the bucket for a version made from these folders."""
        files = {f"{self.run_area(version)}report.html": folders["report"] / "report.html"}
        for kind, folder in folders.items():
            files |= {f"{self.area(version, kind)}{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}
        return {key: md5(path.read_bytes()).hexdigest() for key, path in files.items()}


def say(*words: str) -> str:
    """What a command prints on standard output."""
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def refusal(*words: str) -> str:
    """The one line that a command refuses with, after warnings of figures that say little, and nothing else."""
    done = CliRunner().invoke(main, ["--quiet", *words])
    assert isinstance(done.exception, SystemExit), (done.output, done.exception)
    *cautions, message = done.output.splitlines()
    assert all("wider than 20 points" in line or "chance" in line for line in cautions)
    assert (done.exit_code, message.startswith("error: ")) == (2, True), done.output
    assert not [secret for secret in SECRETS if secret in done.output]
    return message


def folders(chain: Chain, shop: Shop) -> dict[str, Path]:
    """What a version of the chain is made of."""
    return {kind: chain.artifacts / kind for kind in ("distilled", "report")} | {"card": shop.folder / "cards" / chain.artifacts.parent.name}


@pytest.fixture(scope="session")
def tuned_chain(tiny_chain, tmp_path_factory) -> Chain:
    """The same chain with other guidance: another set from the same weights."""
    folder = tmp_path_factory.mktemp("tuned")
    params = tiny_chain.params.model_copy(update={"sample": tiny_chain.params.sample.model_copy(update={"guidance": 2.5})})
    for path in tiny_chain.artifacts.rglob("*"):
        if path.is_file():
            (folder / "artifacts" / path.relative_to(tiny_chain.artifacts)).parent.mkdir(parents=True, exist_ok=True)
            (folder / "artifacts" / path.relative_to(tiny_chain.artifacts)).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as world:
        enter_empty_world(world, folder)
        run_chain(params, folder / "artifacts")
    return Chain(params, folder / "artifacts")


@pytest.fixture(scope="module", params=[(backend, place) for backend in ("sqlite", "postgres") for place in ("mlflow", "s3")], ids="-".join)
def shop(request, ceph_store, tiny_chain, tuned_chain, tmp_path_factory) -> Shop:
    """A shop with two versions, on every server with either store. Read only."""
    backend, place = request.param
    shop = Shop(f"life-{backend}-{place}", request.getfixturevalue(f"{backend}_mlflow"), ceph_store, place, tmp_path_factory.mktemp("life"))
    with pytest.MonkeyPatch.context() as world:
        shop.enter(world)
        say(*shop.words(tiny_chain))
        say(*shop.words(tuned_chain))
    return shop


@pytest.fixture
def customer(shop, monkeypatch) -> Shop:
    """The shop, and a test that stands in it."""
    shop.enter(monkeypatch)
    return shop


# --- published ------------------------------------------------------------------------------------------------------


def test_versions_are_listed_with_what_they_are(customer, tiny_chain, tuned_chain):
    told = json.loads(say("search", f"name={customer.name}", "--json"))
    assert [one["ref"] for one in told] == [f"{customer.name}/1", f"{customer.name}/2"]
    for one, chain, guidance in zip(told, (tiny_chain, tuned_chain), (f"{tiny_chain.params.sample.guidance:g}", "2.5"), strict=True):
        for kind, tag in (("distilled", "sha256"), ("report", "report_sha256"), ("card", "card_sha256")):
            assert one["tags"][tag] == open_artifact(folders(chain, customer)[kind], kind).digest
        assert (one["tags"]["guidance"], one["tags"]["dataset"], one["tags"]["ipc"], one["tags"]["classes"]) == (guidance, "digits", "2", "3")
    assert [alias for one in told for alias in one["aliases"]] == list(ALIASES)
    assert customer.aliases() == {"newest": 2, "best-ipc1": 1, "best-ipc2": 1}


def test_the_terminal_shows_them_and_finds_by_tag(customer):
    def lines(*words: str) -> list[list[str]]:
        return [line.split() for line in say(*words).splitlines() if line.startswith(f"{customer.name}/")]

    assert [(line[0], line[1]) for line in lines("list")] == [(f"{customer.name}/1", "best-ipc1"), (f"{customer.name}/2", "newest")]
    assert [line[0] for line in lines("search", f"name={customer.name}", "guidance=2.5")] == [f"{customer.name}/2"]
    assert say("search", f"name={customer.name}", "guidance=9") == ""


def test_the_bucket_holds_the_files_of_the_versions_and_no_others(customer, tiny_chain, tuned_chain):
    first, second = customer.versions()
    expected = customer.expected_objects(first, folders(tiny_chain, customer)) | customer.expected_objects(second, folders(tuned_chain, customer))
    assert customer.objects() == expected
    for version in (first, second):
        for kind in KINDS:
            assert f"{customer.area(version, kind)}manifest.json" in expected


def test_published_again_it_is_the_same_version_and_one_run_has_the_files(customer, tiny_chain):
    before, runs = customer.objects(), len(customer.runs())
    aliases = customer.aliases()
    done = CliRunner().invoke(main, customer.words(tiny_chain))
    assert (done.exit_code, f"is there already as {customer.name}/1 at {customer.mlflow.url}/#/models/" in done.output) == (0, True)
    assert customer.objects() == before
    assert (len(customer.versions()), customer.aliases()) == (2, aliases)
    client = customer.mlflow.client()
    assert [bool(client.list_artifacts(run.info.run_id)) for run in customer.runs()] == [True, True] + [False] * (runs - 1)
    assert {run.info.status for run in customer.runs()} == {"FINISHED"}


def test_the_card_is_printed_and_its_pictures_show_in_mlflow(customer, tiny_chain):
    text = (folders(tiny_chain, customer)["card"] / "card.md").read_text(encoding="utf-8")
    assert say("card", f"{customer.name}/1").rstrip() == text.rstrip()
    shown = re.findall(r"\]\((get-artifact\?[^)]+)\)", customer.version().card)
    pictures = sorted((folders(tiny_chain, customer)["card"] / "sheets").glob("*.png"))
    served = [urllib.request.urlopen(f"{customer.mlflow.url}/{url}", timeout=60).read() for url in shown]
    assert served == [path.read_bytes() for path in pictures]


def test_downloaded_it_has_the_same_bytes(customer, tiny_chain, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    assert say("download", f"{customer.name}/1", "--all", f"--output={tmp_path / 'here'}") == f"{tmp_path / 'here' / 'distilled'}\n"
    for kind, folder in folders(tiny_chain, customer).items():
        assert contents(tmp_path / "here" / kind) == contents(folder)


def test_loaded_it_has_the_same_pixels(customer, tiny_chain, tuned_chain):
    refs = {"": tuned_chain, "@newest": tuned_chain, "/1": tiny_chain}
    if customer.place == "s3":
        refs |= {f"{customer.version().tags['files/distilled']}": tiny_chain}
    for ref, chain in refs.items():
        loaded = diffstill.load(ref if ref.startswith("s3:") else customer.name + ref, seed=1)
        classes = read_manifest(chain.artifacts / "images", "images").facts["classes"]
        expected = [read_png(chain.artifacts / f"distilled/seed-1/{name}/{number:05d}.png") for name in classes for number in (0, 1)]
        pixels, labels = loaded.tensors()
        np.testing.assert_array_equal(pixels.numpy(), np.stack(expected))
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_the_lineage_names_every_artifact_of_the_chain(customer, tiny_chain):
    places = {name: name for name in ("images", "generator", "latents", "denoiser", "distilled", "untuned", "report")}
    places |= {f"scores/{source}-convnet-2": f"scores/{source}-convnet-2" for source in ("distilled", "untuned", "real")}
    digests = {name: sha256((tiny_chain.artifacts / place / "manifest.json").read_bytes()).hexdigest() for name, place in places.items()}
    told = json.loads(say("lineage", f"{customer.name}/1", "--json"))
    assert {one["name"]: one["digest"] for one in told["artifacts"]} == digests
    assert told["data"] == {"source": "digits"}
    assert (told["ref"], told["tags"]) == (f"{customer.name}/1", customer.version().tags)
    lines = [line.split() for line in say("lineage", f"{customer.name}/1").splitlines()[1:]]
    assert {line[0]: line[1] for line in lines if len(line) > 1 and re.fullmatch("[0-9a-f]{64}", line[1])} == digests


def test_two_versions_are_compared(customer, tiny_chain, tmp_path):
    told = say("compare", f"{customer.name}/1", f"{customer.name}/2", f"--output={tmp_path / 'both.html'}")
    assert "sample.guidance" in told
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    for shown in (f"{customer.name}/1", f"{customer.name}/2", *(version.tags["sha256"][:8] for version in customer.versions())):
        assert shown in page
    assert "byte for byte" in say("compare", f"{customer.name}/1", str(tiny_chain.artifacts), f"--output={tmp_path / 'same.html'}")


def test_a_deprecated_version_warns_and_gives_its_aliases_back(customer):
    before = customer.aliases()
    ended = CliRunner().invoke(main, ["deprecate", customer.name, "--reason=wrong labels, see 7"])
    assert ended.stderr.startswith(f"{customer.name}/2 is deprecated; aliases: ")
    try:
        assert customer.aliases() == {"newest": 1, "best-ipc1": 1, "best-ipc2": 1}
        assert "deprecated: wrong labels, see 7" in say("search", f"name={customer.name}", "guidance=2.5")
        done = CliRunner().invoke(main, ["card", f"{customer.name}/2"])
        assert (done.exit_code, f"{customer.name}/2 is deprecated: wrong labels, see 7" in done.stderr) == (0, True)
    finally:
        say("deprecate", f"{customer.name}/2", "--undo")
    assert customer.aliases() == before
    assert "deprecated" not in customer.version(2).tags


# --- once is enough: what does not depend on the servers -------------------------------------------------------------

once = pytest.mark.parametrize("shop", [("postgres", "s3")], indirect=True, ids=["postgres-s3"])


@once
@pytest.mark.parametrize("form", ["imagefolder", "parquet", "webdataset", "huggingface"])
def test_an_export_of_a_version_is_that_of_the_chain(customer, form, tiny_chain, tmp_path):
    say("export", f"{customer.name}/1", str(tmp_path / "version"), f"--format={form}")
    say("export", str(tiny_chain.artifacts), str(tmp_path / "chain"), f"--format={form}")
    expected, found = contents(tmp_path / "chain"), contents(tmp_path / "version")
    if form == "huggingface":  # the version has a card
        assert expected.pop("README.md") != found.pop("README.md")
        assert "in place of 387 real training images" in (tmp_path / "version" / "README.md").read_text(encoding="utf-8")
    assert expected == found != {}


@once
def test_it_is_made_anew_from_what_the_registry_knows(customer, tiny_chain, tmp_path):
    told = say("reproduce", f"{customer.name}/1", f"--folder={tmp_path / 'anew'}", "--device=cpu")
    assert told.startswith(f"{customer.name}/1 is reproduced: every digest is the same\n")
    assert contents(tmp_path / "anew" / "artifacts" / "distilled") == contents(tiny_chain.artifacts / "distilled")


DVC = {
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    "DVC_NO_ANALYTICS": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{role}_{what}": f"{what.lower()}@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def call(folder: Path, command: str) -> str:
    done = subprocess.run(command, shell=True, cwd=folder, env=os.environ | DVC, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@once
def test_promoted_it_comes_back_from_the_remote_of_a_clone(customer, tiny_chain, tmp_path, monkeypatch):
    project = tmp_path / "project"
    project.mkdir()
    for command in (
        "git init -q -b main",
        "dvc init -q",
        f"dvc remote add -q -d store {customer.bucket.uri}/dvc",
        f"dvc remote modify -q store endpointurl {customer.bucket.environment['AWS_ENDPOINT_URL']}",
        "git add .dvc && git commit -qm start",
    ):
        call(project, command)
    monkeypatch.chdir(project)
    told = say("promote", f"{customer.name}/1").splitlines()
    assert told[0].startswith(f"{customer.name}/1 is under DVC as distilled/{customer.name}-v1 (md5 ")
    for command in told[1:]:
        call(project, command)
    pushed = customer.bucket.names("dvc/")
    assert pushed

    call(tmp_path, f"git clone -q {project} clone")
    call(tmp_path / "clone", "dvc pull -q")
    there = tmp_path / "clone" / "distilled" / f"{customer.name}-v1"
    for kind, folder in folders(tiny_chain, customer).items():
        assert contents(there / kind) == contents(folder)
    meta = YAML(typ="safe").load(there.with_suffix(".dvc"))["meta"]
    assert (meta["ref"], meta["sha256"]) == (f"{customer.name}/1", customer.version().tags["sha256"])


# --- loading what is altered, gone or out of reach -------------------------------------------------------------------

on_both = pytest.mark.parametrize("shop", [("sqlite", "s3"), ("postgres", "mlflow")], indirect=True, ids=["sqlite-s3", "postgres-mlflow"])
in_s3 = pytest.mark.parametrize("shop", [("sqlite", "s3")], indirect=True, ids=["sqlite-s3"])


@pytest.fixture
def cache(customer, tmp_path, monkeypatch) -> Path:
    """An empty cache for this test."""
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refused_to_load(shop: Shop, cache: Path) -> str:
    """What a download is refused with; it leaves nothing."""
    told = refusal("download", f"{shop.name}/1", f"--output={cache.parent / 'here'}")
    assert not (cache.parent / "here").exists()
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    return told


@contextmanager
def object_with(store: Store, key: str, content: bytes | None) -> Iterator[None]:
    """Other content of an object for a while; None deletes it."""
    client, place = store.client(), {"Bucket": store.bucket, "Key": key}
    original = client.get_object(**place)["Body"].read()
    client.delete_object(**place)
    if content is not None:
        client.put_object(**place, Body=content)
    yield
    client.put_object(**place, Body=original)


@on_both
@pytest.mark.parametrize("name", ["seed-0/1/00001.png", "manifest.json"])
@pytest.mark.parametrize("damage", ["altered", "deleted"])
def test_what_was_changed_in_the_bucket_is_named_and_never_loaded(customer, cache, name, damage, tiny_chain):
    version, content = customer.version(), (tiny_chain.artifacts / "distilled" / name).read_bytes()
    with object_with(customer.bucket, f"{customer.area(version, 'distilled')}{name}", content[:-2] + b"x\n" if damage == "altered" else None):
        told = refused_to_load(customer, cache)
        with pytest.raises(DiffstillError, match=re.escape(name)):
            diffstill.load(f"{customer.name}/1")
    assert version.tags["files/distilled"] in told
    assert name in told
    say("download", f"{customer.name}/1", f"--output={cache.parent / 'here'}")
    assert contents(cache.parent / "here" / "distilled") == contents(tiny_chain.artifacts / "distilled")


def wrong_secret(store: Store, stranger: Store) -> dict[str, str]:
    return store.environment | {"AWS_SECRET_ACCESS_KEY": "no-secret"}


def wrong_key(store: Store, stranger: Store) -> dict[str, str]:
    return store.environment | {"AWS_ACCESS_KEY_ID": "nobody"}


def no_permission(store: Store, stranger: Store) -> dict[str, str]:
    return stranger.environment


REFUSED = [(wrong_secret, "SignatureDoesNotMatch"), (wrong_key, "InvalidAccessKeyId"), (no_permission, "AccessDenied")]


@in_s3
@pytest.mark.parametrize(("someone", "code"), REFUSED)
def test_who_may_not_read_is_told_so(customer, cache, someone, code, stranger, use):
    use(Store(customer.bucket.bucket, someone(customer.bucket, stranger)))
    assert f"bucket 'distilled' at {customer.bucket.environment['AWS_ENDPOINT_URL']} refuses ({code}); " in refused_to_load(customer, cache)


@on_both
def test_files_out_of_reach_are_one_message(customer, cache, gateway_door):
    gateway_door.shut()
    try:
        told = refused_to_load(customer, cache)
    finally:
        gateway_door.open()
    assert (customer.bucket.environment["AWS_ENDPOINT_URL"] if customer.place == "s3" else customer.mlflow.url) in told
    say("download", f"{customer.name}/1", f"--output={cache.parent / 'here'}")


# --- publishing against the odds ------------------------------------------------------------------------------------


@pytest.fixture(params=[("sqlite", "s3"), ("postgres", "mlflow")], ids="-".join)
def stall(request, ceph_store, tmp_path, monkeypatch) -> Shop:
    """A shop without versions, and a test that stands in it."""
    backend, place = request.param
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    stall = Shop(name, request.getfixturevalue(f"{backend}_mlflow"), ceph_store, place, tmp_path / "stall")
    stall.enter(monkeypatch)
    return stall


@contextmanager
def untouched(chain: Chain) -> Iterator[None]:
    """The artifacts of the chain are the same afterwards."""
    before = contents(chain.artifacts)
    yield
    assert contents(chain.artifacts) == before


def assert_published_once(shop: Shop, chain: Chain) -> None:
    """There is one version with all aliases, and nothing that does not belong to it: neither objects nor runs with files."""
    (version,) = shop.versions()
    assert version.aliases == ALIASES
    assert shop.objects() == shop.expected_objects(version, folders(chain, shop))
    client = shop.mlflow.client()
    assert [run.info.run_id for run in shop.runs() if client.list_artifacts(run.info.run_id)] == [version.run_id]
    assert client.get_run(version.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("stall", [("sqlite", "s3")], indirect=True, ids="-".join)
def test_who_may_not_write_is_told_so_and_publishes_later(stall, stranger, use, tiny_chain):
    with untouched(tiny_chain):
        for someone, code in REFUSED:
            use(Store(stall.bucket.bucket, someone(stall.bucket, stranger)))
            assert f"bucket 'distilled' at {stall.bucket.environment['AWS_ENDPOINT_URL']} refuses ({code}); " in refusal(*stall.words(tiny_chain))
        use(stall.bucket)
        told = refusal(*stall.words(tiny_chain, store="s3://nowhere/sets"))
        assert "bucket 'nowhere'" in told
        assert told.endswith("refuses (NoSuchBucket); create the bucket or correct its name")
        assert stall.versions() == []
        say(*stall.words(tiny_chain))
    assert_published_once(stall, tiny_chain)


@pytest.mark.parametrize("after", [0, 50_000], ids=["at-once", "halfway"])
@pytest.mark.parametrize("server", ["gateway", "mlflow"])
def test_a_server_that_goes_away_is_one_message_and_the_next_time_it_is_published(stall, server, after, gateway_door, tiny_chain, monkeypatch):
    with door(stall.mlflow.url) as mlflow_door, untouched(tiny_chain):
        way = gateway_door if server == "gateway" else mlflow_door
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_door.url)
        way.shut(after)
        try:
            told = refusal(*stall.words(tiny_chain))
        finally:
            way.open()
        assert way.url in told or mlflow_door.url in told
        assert stall.versions() == []
        say(*stall.words(tiny_chain))
    assert_published_once(stall, tiny_chain)


def publisher(words: list[str], method: str, at: Callable[[], object]) -> BaseProcess:
    """A process that publishes, and before its first call of a method of MLflow's client does something else."""

    def publish() -> None:
        real = getattr(MlflowClient, method)

        def called_first(*arguments, **options):
            setattr(MlflowClient, method, real)
            at()
            return real(*arguments, **options)

        setattr(MlflowClient, method, called_first)
        main(words)

    process = get_context("fork").Process(target=publish)
    process.start()
    return process


@pytest.mark.parametrize("before", ["create_model_version", "set_registered_model_alias"], ids=["registration", "aliases"])
def test_after_a_kill_the_next_one_finishes_the_work(stall, before, tiny_chain):
    """It uploads nothing again, as everything was there."""
    killed = publisher(stall.words(tiny_chain), before, lambda: os.kill(os.getpid(), signal.SIGKILL))
    killed.join(100)
    assert killed.exitcode == -signal.SIGKILL
    assert [version.aliases for version in stall.versions()] == ([] if before == "create_model_version" else [()])
    stored = stall.objects()
    say(*stall.words(tiny_chain))
    assert_published_once(stall, tiny_chain)
    assert stall.objects() == stored


def together(method: str, *publishers: list[str]) -> None:
    """Publish in processes of their own, which wait for each other at a method."""
    meeting = get_context("fork").Barrier(len(publishers))
    started = [publisher(words, method, lambda: meeting.wait(100)) for words in publishers]
    for one in started:
        one.join(200)
    assert [one.exitcode for one in started] == [0] * len(publishers)


def test_two_who_publish_the_same_at_once_make_one_version(stall, tiny_chain):
    together("create_model_version", stall.words(tiny_chain), stall.words(tiny_chain))
    (version,) = stall.versions()
    assert version.aliases == ALIASES
    assert stall.expected_objects(version, folders(tiny_chain, stall)).items() <= stall.objects().items()


def test_two_who_publish_other_sets_at_once_make_two_versions(stall, tiny_chain, tuned_chain):
    together("set_registered_model_alias", stall.words(tiny_chain), stall.words(tuned_chain))
    chains = {open_artifact(chain.artifacts / "distilled", "distilled").digest: chain for chain in (tiny_chain, tuned_chain)}
    versions = stall.versions()
    assert [version.number for version in versions] == [1, 2]
    expected = [stall.expected_objects(version, folders(chains[version.tags["sha256"]], stall)) for version in versions]
    assert stall.objects() == expected[0] | expected[1]
    assert stall.aliases() == {"newest": 2, "best-ipc1": 1, "best-ipc2": 1}


# --- limits of a database -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stall", [("postgres", "mlflow")], indirect=True, ids="-".join)
def test_a_long_card_is_cut_for_the_database_and_whole_among_the_files(stall, tmp_path):
    """PostgreSQL refuses a character too many, where sqlite takes any number."""
    names = [f"{number:02d} {'长い名前 ' * 15}é & <tag> 😀" for number in range(20)]
    made = make_experiment(tmp_path / "made", classes=names, seeds=(0,), per_class=1)
    made.judge(all_lines(made.images.digest))
    made.summarise()
    chain = Chain(Params(), made.root)
    say(*stall.words(chain, note="注" * 1000, licence="CC BY 4.0"))
    (version,) = stall.versions()
    card = (folders(chain, stall)["card"] / "card.md").read_text(encoding="utf-8")
    assert 4500 < len(version.card) <= 5000 < len(card)
    assert "注" * 1000 in version.card
    assert say("card", stall.name).rstrip() == card.rstrip()
    assert diffstill.load(stall.name).classes == names
