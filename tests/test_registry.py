"""Versions in MLflow, against real registries: sqlite in this process, and a server of its own with S3 beside it."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image
from scipy import stats

import diffstill
from chains import contents
from diffstill import storage
from diffstill.artifacts import Artifact, Manifest, open_artifact
from diffstill.cli import main
from diffstill.config import Params, PublishConfig, render_params
from diffstill.environment import is_commit
from diffstill.errors import DiffstillError, GateError
from diffstill.lineage import Lineage
from diffstill.loading import DistilledSet
from diffstill.pictures import read_png
from diffstill.registry import CONTENT, DEPRECATED, DESCRIPTION_LIMIT, FORMS, MARK, Reference, Registry, Version, _description, bring, elect, find
from diffstill.run import run_stage
from diffstill.stages.publish import Release, publish
from experiments import Experiment, all_lines, make_experiment
from servers import free_port, mlflow_server, s3, s3_environment

BETTER = 0.2
"""Added to the accuracy of distilled runs, it makes a gain beyond doubt."""

# --- a world with a registry --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """A folder whose mlflow.db is there already: creating it takes seconds."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder


@dataclass(frozen=True)
class Shop:
    """A registered model of the test's own, and folders to work in."""

    name: str
    root: Path
    client: MlflowClient

    def made(self, folder: str = "one", more: float = BETTER, seeds=(0,), **wanted) -> Experiment:
        """An experiment with a report; equal arguments give equal bytes."""
        made = make_experiment(self.root / folder, seeds=seeds, **wanted)
        made.judge(all_lines(made.images.digest, more))
        made.summarise()
        return made

    def publish(self, made: Experiment, card: str = "card", force: bool = False, **config) -> int:
        """Publish it as `diffstill publish` does: the number of the version."""
        paths = {"distilled": made.paths["distilled"], "report": made.root / "report", "card": made.root / card}
        return int(run_stage("publish", PublishConfig(name=self.name, **config), paths, force=force)["version"])

    def versions(self) -> list[Version]:
        return Registry.here().search(self.name)

    def version(self, number: int) -> Version:
        return Registry.here().resolve(Reference(self.name, number=number))

    def aliases(self) -> dict[str, int]:
        return {alias: int(number) for alias, number in self.client.get_registered_model(self.name).aliases.items()}

    def runs(self) -> list:
        """The runs of `publish`, earliest first."""
        experiment = self.client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
        return self.client.search_runs([experiment.experiment_id], "tags.`diffstill.stage` = 'publish'", order_by=["attributes.start_time ASC"])

    def stored(self, run_id: str) -> Path:
        """Where the files of a run lie, in a registry of this process."""
        return Path(unquote(urlsplit(self.client.get_run(run_id).info.artifact_uri).path))


def open_shop(world: pytest.MonkeyPatch, uri: str, name: str, folder: Path) -> Shop:
    """Work in `folder` with that registry, in an experiment of one's own."""
    world.setenv("MLFLOW_TRACKING_URI", uri)
    world.setenv("MLFLOW_EXPERIMENT_NAME", name)
    world.setenv("DIFFSTILL_CACHE", str(folder / "cache"))
    world.chdir(folder)
    client = MlflowClient(uri)
    if client.get_experiment_by_name(name) is None:
        client.create_experiment(name, artifact_location=(folder / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None)
    return Shop(name, folder, client)


@pytest.fixture
def shop(database, monkeypatch, tmp_path, request) -> Shop:
    """A registered model that the test may fill, and a folder to work in."""
    return open_shop(monkeypatch, f"sqlite:///{database / 'mlflow.db'}", called(request), tmp_path)


def called(request) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


@pytest.fixture(scope="module")
def first(database, tmp_path_factory) -> Experiment:
    """What is published as version 1 of `read-only`."""
    with pytest.MonkeyPatch.context() as world:
        shop = open_shop(world, f"sqlite:///{database / 'mlflow.db'}", "read-only", tmp_path_factory.mktemp("read-only"))
        made = shop.made(seeds=(0, 1), channels=3)
        assert shop.publish(made, licence="CC BY 4.0") == 1
    return made


@pytest.fixture
def reader(first, database, monkeypatch, tmp_path) -> Shop:
    """The model `read-only`, which many tests read, with an empty cache of the test's own."""
    return open_shop(monkeypatch, f"sqlite:///{database / 'mlflow.db'}", "read-only", tmp_path)


def opened(made: Experiment) -> dict[str, Artifact]:
    return {kind: open_artifact(made.root / kind, kind) for kind in ("distilled", "report", "card")}


# --- references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distilled-digits", Reference("distilled-digits", "newest")),
        ("distilled-digits@best-ipc10", Reference("distilled-digits", "best-ipc10")),
        ("distilled-digits/12", Reference("distilled-digits", number=12)),
        ("models:/My digits_v2.1/3", Reference("My digits_v2.1", number=3)),
        ("models:/a@b.c-d_e", Reference("a", "b.c-d_e")),
        ("7", Reference("7", "newest")),
    ],
)
def test_a_reference_is_read(text, expected):
    assert Reference.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "a/b", "a/", "a@", "a@b@c", "a@b/3", "a/-1", "models:/", "models:/a/latest", "a'b", "a\n", "dvc+https://h/r?rev=1", "x:y"]
)
def test_a_malformed_reference_is_refused_with_all_forms(text):
    with pytest.raises(DiffstillError) as refusal:
        Reference.parse(text)
    assert FORMS in str(refusal.value)


def test_a_malformed_reference_shows_no_secret():
    with pytest.raises(DiffstillError) as refusal:
        Reference.parse("https://me:sentinel@host/a?token=sentinel")
    assert "sentinel" not in str(refusal.value)


@given(st.from_regex(r"\A[A-Za-z0-9]([A-Za-z0-9._ -]{0,30}[A-Za-z0-9_-])?\Z"), st.integers(1, 10**6))
def test_every_name_that_can_be_published_can_be_referred_to(name, number):
    assert PublishConfig(name=name).name == name
    assert Reference.parse(f"{name}/{number}") == Reference(name, number=number)


# --- aliases, as a function of the versions -----------------------------------------------------------------------


def a_version(
    number: int, seeds=(), size: int = 10, field: str = "a", deprecated: bool = False, content: str | None = None, drawn: str = ""
) -> Version:
    tags = {MARK: "0", CONTENT: content or str(number), "images_sha256": field, "protocol": "p", "students": "s", "student_seeds": "0"}
    tags |= {"seeds": drawn} if drawn else {}
    tags |= {f"val_seeds/ipc{size}": json.dumps(list(seeds))} if seeds else {}
    return Version("m", number, tags | ({DEPRECATED: "why"} if deprecated else {}), (), "", datetime.now(UTC), "")


SEEDS = st.lists(st.integers(0, 20).map(lambda value: value / 20), min_size=0, max_size=4)


@st.composite
def histories(draw) -> list[Version]:
    numbers = sorted(draw(st.sets(st.integers(1, 30), max_size=6)))
    return [
        a_version(number, draw(SEEDS), draw(st.sampled_from([1, 10])), draw(st.sampled_from("ab")), draw(st.integers(0, 4)) == 0)
        for number in numbers
    ]


@given(histories(), st.randoms())
def test_the_order_of_the_listing_does_not_matter(versions, shuffler):
    expected = elect(versions)
    shuffler.shuffle(versions)
    assert elect(versions) == expected


@given(histories())
def test_deprecated_versions_hold_nothing_and_hinder_nobody(versions):
    standing = [one for one in versions if DEPRECATED not in one.tags]
    found = elect(versions)
    assert found == elect(standing)
    assert found.get("newest") == max((one.number for one in standing), default=None)
    assert {name for name in found if name != "newest"} == {f"best-ipc{size}" for one in standing for size in one.validations()}


def is_gain(ours: list[float], base: list[float]) -> bool:
    """As scipy has it."""
    if min(len(ours), len(base)) < 2 or len({*ours}) == len({*base}) == 1:
        return False
    return bool(stats.ttest_ind(ours, base, equal_var=False).confidence_interval(0.95).low > 1e-12)


@given(histories())
def test_the_best_moves_to_a_comparable_version_beyond_noise_and_only_then(versions):
    standing = [one for one in versions if DEPRECATED not in one.tags]
    known = {one.number: one for one in standing}
    for count, last in enumerate(standing):
        before, after = elect(standing[:count]), elect(standing[: count + 1])
        for size, accuracies in last.validations().items():
            holder = known.get(before.get(f"best-ipc{size}", 0))
            takes = holder is None or (holder.field == last.field and is_gain(accuracies, holder.validations()[size]))
            assert after.pop(f"best-ipc{size}") == (last.number if takes else holder.number)
            before.pop(f"best-ipc{size}", None)
        assert after | {"newest": 0} == before | {"newest": 0}, "other sizes stay"


def test_versions_that_share_noise_are_paired():
    """All seeds are better by about a point, among seeds that are ten points apart."""
    holder, better = (0.70, 0.80, 0.90), (0.71, 0.811, 0.909)
    assert elect([a_version(1, holder, drawn="0, 1, 2"), a_version(2, better, drawn="0, 1, 2")])["best-ipc10"] == 2
    assert elect([a_version(1, holder, drawn="0, 1, 2"), a_version(2, better, drawn="3, 4, 5")])["best-ipc10"] == 1
    assert elect([a_version(1, holder), a_version(2, better)])["best-ipc10"] == 1, "who knows which seeds"


@pytest.mark.parametrize("field", ["images_sha256", "protocol", "students", "student_seeds"])
def test_versions_judged_by_other_measures_are_not_compared(field):
    first, second = a_version(1, (0.1, 0.11, 0.12)), a_version(2, (0.9, 0.91, 0.92))
    assert elect([first, second])["best-ipc10"] == 2
    assert elect([first, replace(second, tags={**second.tags, field: "other"})])["best-ipc10"] == 1


def test_a_repeated_content_never_holds_an_alias():
    """It is there for a moment when two publish the same: an alias on it would dangle."""
    first, again = a_version(1, (0.1, 0.11, 0.12), content="c"), a_version(2, (0.1, 0.11, 0.12), content="c")
    assert elect([first, again]) == elect([first]) == {"newest": 1, "best-ipc10": 1}


def test_without_versions_there_are_no_aliases():
    assert elect([]) == elect([a_version(1, deprecated=True)]) == {}


# --- publishing ---------------------------------------------------------------------------------------------------


def test_a_version_says_what_it_is_and_its_run_holds_the_files(reader, first):
    (version,), artifacts = reader.versions(), opened(first)
    assert (version.ref, version.aliases) == ("read-only/1", ("best-ipc1", "best-ipc2", "newest"))
    assert {kind: version.digest(kind) for kind in artifacts} == {kind: artifact.digest for kind, artifact in artifacts.items()}
    assert version.validations() == {1: [0.408, 0.41, 0.422], 2: [0.373, 0.385, 0.382]}
    assert (version.tags["ipc"], version.tags["licence"], version.tags["git_sha"]) == ("2", "CC BY 4.0", "none")
    assert is_commit(version.tags["code"]) or version.tags["code"] == diffstill.__version__
    assert version.tags[MARK] == diffstill.__version__
    (run,) = reader.runs()
    assert (version.run_id, run.info.status) == (run.info.run_id, "FINISHED")
    for kind, artifact in artifacts.items():
        assert contents(reader.stored(run.info.run_id) / kind) == contents(artifact.folder)
        assert version.tags[f"files/{kind}"] == f"runs:/{run.info.run_id}/{kind}"
    assert (reader.stored(run.info.run_id) / "report.html").read_bytes() == (first.root / "report" / "report.html").read_bytes()


def test_the_model_and_the_version_describe_themselves(reader, first):
    version = reader.version(1)
    card = (first.root / "card" / "card.md").read_text(encoding="utf-8")
    assert version.card == card.replace("](sheets/", f"](get-artifact?run_uuid={version.run_id}&path=card/sheets/")
    assert version.card.count("get-artifact?run_uuid=") == 2
    model = reader.client.get_registered_model("read-only")
    assert model.tags == {"dataset": "digits", MARK: diffstill.__version__}
    assert model.description.startswith("Distilled image sets of digits")
    assert reader.client.get_run(version.run_id).data.tags["mlflow.note.content"] == version.card


def test_published_again_it_is_the_same_version(shop):
    made = shop.made()
    assert (shop.publish(made), shop.publish(made), shop.publish(shop.made("copy"))) == (1, 1, 1)
    assert len(shop.versions()) == 1
    assert [len(shop.client.list_artifacts(run.info.run_id)) > 0 for run in shop.runs()] == [True, False, False]


def test_published_again_with_another_card_it_says_that_the_first_one_stays(shop, caplog):
    made = shop.made()
    assert shop.publish(made) == shop.publish(made, card="same") == 1
    assert not caplog.messages
    assert shop.publish(made, card="other", note="read me") == 1
    assert [record.levelname for record in caplog.records if "stay as they were published" in record.message] == ["WARNING"]
    assert "read me" not in shop.version(1).card


def test_another_set_and_another_report_are_other_versions_with_tags_to_find_them(shop):
    assert shop.publish(shop.made()) == 1
    assert shop.publish(shop.made("other", draw=1, policy="fifo")) == 2
    assert shop.publish(shop.made("better", more=0.3)) == 3, "the same set, judged differently"
    assert shop.aliases() == {"newest": 3, "best-ipc1": 3, "best-ipc2": 3}
    assert shop.publish(shop.made("worse", more=0.1), force=True) == 4
    assert shop.aliases() == {"newest": 4, "best-ipc1": 3, "best-ipc2": 3}
    search = Registry.here().search
    assert [version.number for version in search(shop.name, {"memory_policy": "redundancy"})] == [1, 3, 4]
    assert [version.number for version in search(shop.name, {"memory_policy": "fifo", "ipc": "3"})] == []
    assert [version.ref for version in search(tags={"memory_policy": "fifo"})] == [f"{shop.name}/2"]


def test_a_set_below_the_gate_is_refused_by_the_command_and_nothing_is_registered(shop):
    made = shop.made(more=0.0)
    params = shop.root / "params.yaml"
    params.write_text(render_params(Params(publish=PublishConfig(name=shop.name))))
    arguments = ["publish", "--params", str(params), *(f"--{kind}={made.root / kind}" for kind in ("distilled", "report", "card"))]
    refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, GateError.exit_code) == (3, 3)
    assert "error: a set of 2 images per class reaches 28.0 % on val, +0.5 points" in refused.output
    assert not (made.root / "card").exists()
    assert shop.name not in [model.name for model in shop.client.search_registered_models()]
    assert CliRunner().invoke(main, [*arguments, "--force"]).exit_code == 0
    assert [version.number for version in shop.versions()] == [1]


def test_nothing_is_published_without_a_registry(shop, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    with pytest.raises(DiffstillError, match="versions are kept by MLflow, and MLFLOW_TRACKING_URI is `none`"):
        shop.publish(shop.made())


class Asked:
    """A registry that keeps what it is asked to publish."""

    def publish(self, release: Release, record) -> int:
        self.release = release
        return 1


def test_a_description_fits_every_database_whatever_the_classes_are(tmp_path):
    made, asked = make_experiment(tmp_path, classes=[f"{number:03d} {'long name ' * 15}é" for number in range(100)], per_class=1, seeds=(0,)), Asked()
    made.judge(all_lines(made.images.digest))
    paths = {"distilled": made.paths["distilled"], "report": made.summarise(), "card": tmp_path / "card"}
    publish(PublishConfig(note="n" * 1000), **paths, registry=asked, force=True)
    card, found = (tmp_path / "card" / "card.md").read_text(encoding="utf-8"), _description(asked.release, "r")
    assert len(card) > 5000
    assert 4000 < len(found) <= DESCRIPTION_LIMIT
    assert found.endswith("is `card/card.md` among the artifacts of the source run.)\n")
    kept = found.replace("get-artifact?run_uuid=r&path=card/", "").rpartition("\n\n(The rest")[0]
    assert card.startswith(kept + "\n"), "cut at the end of a line"


@pytest.mark.parametrize("before", range(4300, 5100, 100))
def test_a_description_is_not_cut_inside_its_code(tmp_path, before):
    """The rest of it would be code."""
    (tmp_path / "card.md").write_text("a line...\n" * (before // 10) + "```python\n" + "code\n\n" * 60 + "```\n" + "more\n" * 200)
    card = Artifact(tmp_path, Manifest(kind="card", config={}, inputs={}, facts={}, files={}))
    found = _description(Release("m", PublishConfig(), {"card": card}, {}, Lineage(())), "r")
    assert 4100 < len(found) <= DESCRIPTION_LIMIT == 5000
    assert found.count("```") % 2 == 0
    assert found.endswith("of the source run.)\n")


# --- several at once ----------------------------------------------------------------------------------------------


def together(*work: Callable[[], int]) -> list[int]:
    """What each of them gives, or the first error that is not that of waiting for another."""
    with ThreadPoolExecutor(len(work)) as pool:
        started = [pool.submit(one) for one in work]
        errors = [error for future in started if (error := future.exception(timeout=200))]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in started]


@contextmanager
def meeting(method: str, count: int = 2, call: int = 1) -> Iterator[None]:
    """Let no thread make its `call`th call of this method of MLflow's client before `count` of them are about to."""
    barrier, real, calls = threading.Barrier(count, timeout=100), getattr(MlflowClient, method), threading.local()

    def wrapped(*arguments, **options):
        calls.made = getattr(calls, "made", 0) + 1
        if calls.made == call:
            barrier.wait()
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as world:
        world.setattr(MlflowClient, method, wrapped)
        yield


@pytest.mark.parametrize(("method", "call"), [("create_registered_model", 1), ("search_runs", 2), ("create_model_version", 1)])
def test_two_who_publish_the_same_make_one_version(shop, method, call):
    """However they meet on the way."""
    made, copy = shop.made(), shop.made("copy")
    shop.publish(shop.made("earlier", draw=7))
    with meeting(method, call=call):
        first, second = together(lambda: shop.publish(made), lambda: shop.publish(copy))
    assert first == second
    earlier, version = shop.versions()
    assert (earlier.number, version.number) == (1, first)
    assert shop.aliases() == {"newest": first, "best-ipc1": 1, "best-ipc2": 1}
    for kind, artifact in opened(made).items():
        assert version.tags[f"files/{kind}"] == f"runs:/{version.run_id}/{kind}", "the version's run is the one that holds its files"
        assert contents(Registry.here().fetch(version, kind)) == contents(artifact.folder)
    assert {run.info.status for run in shop.runs()} == {"FINISHED"}


def test_those_who_publish_different_sets_make_versions_of_their_own(shop):
    sets = [shop.made(str(number), draw=number) for number in range(3)]
    with meeting("create_model_version", 3):
        numbers = together(*(lambda made=made: shop.publish(made) for made in sets))
    assert sorted(numbers) == [1, 2, 3]
    for number, made in zip(numbers, sets, strict=True):
        version = shop.version(number)
        for kind, artifact in opened(made).items():
            assert version.digest(kind) == artifact.digest
            assert contents(Registry.here().fetch(version, kind)) == contents(artifact.folder)
    assert shop.aliases() == {"newest": 3, "best-ipc1": 1, "best-ipc2": 1}


# --- killed -------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from mlflow import MlflowClient
MlflowClient.create_model_version = lambda *_arguments, **_options: os.kill(os.getpid(), signal.SIGKILL)
from diffstill.cli import main
main(sys.argv[1:])
"""


def test_after_a_kill_the_next_publisher_goes_on_with_the_files_that_arrived(shop):
    """Killed when all was uploaded and nothing registered; then two files are made what a kill in their middle leaves."""
    made = shop.made()
    params = shop.root / "params.yaml"
    params.write_text(render_params(Params(publish=PublishConfig(name=shop.name))))
    arguments = ["publish", "--params", str(params), *(f"--{kind}={made.root / kind}" for kind in ("distilled", "report", "card"))]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (run,) = shop.runs()
    assert (run.info.status, shop.versions()) == ("RUNNING", [])
    stored = shop.stored(run.info.run_id)
    half, lost = (stored / "distilled" / "seed-0").rglob("00001.png")
    half.write_bytes(half.read_bytes()[:10])
    lost.unlink()
    before = {path: path.stat().st_mtime_ns for path in stored.rglob("*") if path.is_file() and path.name != "report.html"}

    assert shop.publish(made) == 1
    (version,) = shop.versions()
    assert version.run_id == run.info.run_id
    assert {path for path, stamp in before.items() if path.stat().st_mtime_ns != stamp} == {half}, "what had arrived is not sent again"
    assert [(one.info.status, bool(shop.client.list_artifacts(one.info.run_id))) for one in shop.runs()] == [("FINISHED", True), ("FINISHED", False)]
    for kind, artifact in opened(made).items():
        assert contents(Registry.here().fetch(version, kind)) == contents(artifact.folder)


class Interrupted(BaseException):
    """Like a kill, but in this process."""


def fail_to_register(shop: Shop, made: Experiment, **config) -> str:
    """Publish until nothing but the registration is left: the run that has the files."""
    with pytest.MonkeyPatch.context() as world:
        world.setattr(MlflowClient, "create_model_version", lambda *_arguments, **_options: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            shop.publish(made, **config)
    assert shop.versions() == []
    return shop.runs()[-1].info.run_id


def test_another_card_does_not_mix_with_that_of_a_killed_publisher(shop):
    """Cards that differ in a letter have files of equal sizes."""
    made = shop.made()
    fail_to_register(shop, made, note="abc")
    shop.publish(made, note="xyz")
    (version,) = shop.versions()
    assert "xyz" in version.card
    assert "\nxyz\n" in (Registry.here().fetch(version, "card") / "card.md").read_text()


def test_a_failed_run_that_is_finished_by_another_is_finished(shop):
    made = shop.made()
    run_id = fail_to_register(shop, made)
    assert shop.client.get_run(run_id).info.status == "FAILED"
    shop.publish(made)
    assert shop.versions()[0].run_id == run_id
    assert shop.client.get_run(run_id).info.status == "FINISHED"


def test_a_version_that_was_deleted_is_uploaded_anew(shop):
    """Its files may be why it was deleted."""
    made = shop.made()
    shop.publish(made)
    (version,) = shop.versions()
    next((shop.stored(version.run_id) / "distilled").rglob("00000.png")).write_bytes(b"tampered")
    shop.client.delete_model_version(shop.name, "1")
    shop.publish(made)
    (again,) = shop.versions()
    assert again.run_id != version.run_id
    assert contents(Registry.here().fetch(again)) == contents(made.paths["distilled"])


# --- finding ------------------------------------------------------------------------------------------------------


def test_what_is_not_there_is_refused_with_what_is(reader):
    with pytest.raises(DiffstillError, match=r"'distilled-flowers': no distilled set of that name at sqlite:///.*; there are .*read-only"):
        find("distilled-flowers")
    for ref, message in (
        ("@stable", "has no alias 'stable'; it has the versions 1 and the aliases best-ipc1, best-ipc2, newest"),
        ("/7", "has no version 7; it has the versions 1 and the aliases best-ipc1, best-ipc2, newest"),
        ("/0", "has no version 0"),
    ):
        with pytest.raises(DiffstillError, match=f"read-only: {message}"):
            find(f"read-only{ref}")


def test_models_and_versions_of_others_are_left_alone(shop):
    shop.client.create_registered_model("someone's model")
    shop.client.create_model_version("someone's model", "runs:/x/model")
    shop.client.create_registered_model(shop.name)
    shop.client.create_model_version(shop.name, "runs:/x/model")
    shop.client.set_registered_model_alias(shop.name, "champion", "1")
    shop.client.set_registered_model_alias(shop.name, "best-ipc-of-mine", "1")
    assert shop.publish(shop.made()) == 2
    assert [version.number for version in shop.versions()] == [2]
    assert shop.aliases() == {"champion": 1, "best-ipc-of-mine": 1, "newest": 2, "best-ipc1": 2, "best-ipc2": 2}
    assert "someone's model" not in Registry.here().names()
    with pytest.raises(DiffstillError, match="has no version 1; it has the versions 2"):
        find(f"{shop.name}/1")


def test_deprecating_moves_the_aliases_and_restoring_brings_them_back(shop, caplog):
    shop.publish(shop.made())
    shop.publish(shop.made("other", draw=1, more=0.3))
    shop.client.set_registered_model_alias(shop.name, "stable", "2")
    both = {"newest": 2, "best-ipc1": 2, "best-ipc2": 2, "stable": 2}
    assert shop.aliases() == both
    registry = Registry.here()
    registry.deprecate(shop.version(2), "mislabelled: see issue 7\nand 8")
    assert shop.aliases() == {"newest": 1, "best-ipc1": 1, "best-ipc2": 1, "stable": 2}, "an alias of others stays"
    assert shop.version(2).tags[DEPRECATED] == "mislabelled: see issue 7\nand 8"
    find(f"{shop.name}/2")
    assert caplog.messages[-1].startswith(f"{shop.name}/2 is deprecated: mislabelled")
    registry.deprecate(shop.version(1), "this too")
    assert shop.aliases() == {"stable": 2}
    with pytest.raises(DiffstillError, match=r"has no alias 'newest'; it has the versions 1 \(deprecated\), 2 \(deprecated\) and the aliases stable"):
        find(shop.name)
    registry.restore(shop.version(1))
    registry.restore(shop.version(2))
    assert shop.aliases() == both
    registry.restore(shop.version(2))
    assert shop.aliases() == both


# --- fetching -----------------------------------------------------------------------------------------------------


def test_what_is_in_the_cache_is_not_downloaded_again(shop):
    made = shop.made()
    shop.publish(made)
    (version,) = shop.versions()
    fetched = {kind: Registry.here().fetch(version, kind) for kind in ("distilled", "report", "card")}
    for path in shop.stored(version.run_id).rglob("*.*"):
        path.unlink()
    for kind, folder in fetched.items():
        assert contents(folder) == contents(made.root / kind)
        assert Registry.here().fetch(version, kind) == folder == shop.root / "cache" / kind / version.digest(kind)
    assert [path.name for path in (shop.root / "cache" / "distilled").iterdir() if not path.name.startswith(".")] == [version.digest()]


@pytest.fixture
def stored(reader, first):
    """The files of `read-only/1` in the store, put back afterwards."""
    folder = reader.stored(reader.version(1).run_id) / "distilled"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(first.paths["distilled"], folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), r"seed-0/.*00000\.png: content differs"),
        (Path.unlink, r"seed-0/.*00000\.png: listed in the manifest but missing"),
        (lambda path: path.with_name("more.png").write_bytes(b"x"), r"seed-0/.*more\.png: not listed"),
    ],
    ids=["changed", "deleted", "added"],
)
def test_files_that_were_tampered_with_in_the_store_never_enter_the_cache(reader, stored, damage, message):
    version = reader.version(1)
    damage(next((stored / "seed-0").rglob("00000.png")))
    with pytest.raises(DiffstillError, match=message) as refusal:
        Registry.here().fetch(version)
    told = str(refusal.value)
    assert told.startswith(f"runs:/{version.run_id}/distilled/")
    assert "it was changed there; restore it, or delete the version" in told
    assert str(reader.root) not in told, "no path of a folder that is gone"
    assert not [path for path in (reader.root / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_a_whole_set_of_another_digest_is_refused(reader, stored):
    """Someone has put a valid artifact in the place of another."""
    version, other = reader.version(1), reader.made("other", draw=1)
    shutil.rmtree(stored)
    shutil.copytree(other.paths["distilled"], stored)
    found = other.opened("distilled")["distilled"].digest
    with pytest.raises(DiffstillError, match=rf"runs:/{version.run_id}/distilled: is {found}, not {version.digest()}; it was changed there"):
        Registry.here().fetch(version)
    assert not (reader.root / "cache" / "distilled" / version.digest()).exists()


def test_files_that_are_gone_are_one_message(reader, stored):
    version = reader.version(1)
    shutil.rmtree(stored)
    with pytest.raises(
        DiffstillError, match=rf"runs:/{version.run_id}/distilled: cannot be downloaded from sqlite:.*see that the server still has these files"
    ):
        Registry.here().fetch(version)
    assert not (reader.root / "cache" / "distilled" / version.digest()).exists()


def test_a_cache_that_was_tampered_with_is_never_loaded(reader, first):
    folder = find("read-only").folder()
    path = next((folder / "seed-0").rglob("00000.png"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    for use in (lambda: diffstill.load("read-only"), lambda: find("read-only").folder()):
        with pytest.raises(
            DiffstillError, match=r"00000\.png: content differs from the digest in its manifest; it was changed in the cache"
        ) as refusal:
            use()
        assert f"remove {folder}, and it is downloaded anew" in str(refusal.value)
    shutil.rmtree(folder)
    assert contents(find("read-only").folder()) == contents(first.paths["distilled"])


def test_what_a_version_has_not_is_refused(reader):
    with pytest.raises(DiffstillError, match="read-only/1: comes without a `generator`; a version has distilled, report, card"):
        bring("models:/read-only", "generator")
    with pytest.raises(DiffstillError, match="comes without a `images`"):
        find("read-only").folder("images")


@pytest.mark.parametrize("ref", ["read-only", "read-only@newest", "read-only/1", "models:/read-only@best-ipc2"])
def test_what_is_loaded_is_what_was_published(reader, first, ref):
    loaded = diffstill.load(ref, seed=1)
    assert_equal_pixels(loaded, first, seed=1)
    assert loaded.card == reader.version(1).card
    assert find(ref).lineage() == find(str(first.root)).lineage()


def assert_equal_pixels(loaded: DistilledSet, made: Experiment, seed: int) -> None:
    pixels, labels = loaded.tensors()
    folder, classes = made.paths["distilled"] / f"seed-{seed}", made.images.facts["classes"]
    expected = [read_png(folder / name / f"{number:05d}.png") for name in classes for number in (0, 1)]
    np.testing.assert_array_equal(pixels.numpy(), np.stack(expected))
    assert labels.tolist() == [label for label in range(len(classes)) for _ in (0, 1)]


# --- any reference ------------------------------------------------------------------------------------------------


def test_a_folder_is_found_alone_and_in_its_chain(shop, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    made = shop.made()
    report = made.root / "report"
    for ref in (str(made.root), str(made.paths["distilled"]), "one", "./one/distilled"):
        found = find(ref)
        assert found.version is None
        assert found.folder().resolve() == made.paths["distilled"]
        assert found.folder("report").resolve() == report
        assert [one.name for one in found.lineage().artifacts][-1] == "report"
        with pytest.raises(DiffstillError, match="comes without a `card`"):
            found.folder("card")
    untuned = find(str(made.paths["untuned"]))
    assert set(untuned.folders) == {"distilled"}, "the report beside it is on another set"
    assert [one.name for one in untuned.lineage().artifacts] == ["images", "generator", "untuned"]


def test_a_folder_goes_before_a_version_of_its_name(reader):
    made = reader.made("read-only", draw=1)
    assert find("read-only").digest == open_artifact(made.paths["distilled"], "distilled").digest
    assert find("models:/read-only").digest == reader.version(1).digest()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("./nowhere", r"\./nowhere: no such folder; write "),
        ("/nowhere/at/all", "/nowhere/at/all: no such folder"),
        ("artifacts/nowhere", "'artifacts/nowhere' is no reference to a distilled set and no folder; write "),
        ("S3://bucket/x", "is no reference"),
        ("s3://", "no S3 location"),
        ("s3://b", "no S3 location"),
        ("empty", "empty: has no manifest.json, so it is no artifact"),
        ("", "is no reference to a distilled set"),
    ],
)
def test_a_reference_to_nothing_is_refused(ref, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffstillError, match=message) as refusal:
        find(ref)
    assert "\n" not in str(refusal.value)


def test_versions_need_a_registry(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    with pytest.raises(DiffstillError, match="MLFLOW_TRACKING_URI is `none`; set it to your server"):
        find("distilled-digits")


def test_a_server_that_is_down_is_one_message_soon_and_without_credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:sentinel@127.0.0.1:{free_port()}")
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with pytest.raises(DiffstillError, match=r"MLflow at http://\*\*\*@127\.0\.0\.1") as refusal:
        find("distilled-digits")
    assert time.monotonic() - started < 30
    assert "sentinel" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


# --- files in S3 --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An S3 server: what points to it."""
    with s3(tmp_path_factory.mktemp("s3")) as (url, _):
        yield s3_environment(url)


@pytest.fixture
def bucket(store, monkeypatch, request):
    """A bucket of the test's own."""
    import boto3

    for name, value in store.items():
        monkeypatch.setenv(name, value)
    name = f"b-{abs(hash(request.node.name))}"
    client = boto3.client("s3")
    client.create_bucket(Bucket=name)
    yield boto3.resource("s3").Bucket(name)
    client.close()


def test_files_in_s3_are_published_and_loaded(shop, bucket):
    made, uri = shop.made(), f"s3://{bucket.name}/sets"
    shop.publish(made, store=f"{uri}/", encryption="AES256")
    (version,), artifacts = shop.versions(), opened(made)
    for kind in ("distilled", "report"):
        where = f"{uri}/{kind}/{artifacts[kind].digest}"
        assert version.tags[f"files/{kind}"] == where
        assert {one.name for one in storage.listing(where)} == set(contents(artifacts[kind].folder))
    assert {one.Object().server_side_encryption for one in bucket.objects.all()} == {"AES256"}
    assert {one.path for one in shop.client.list_artifacts(version.run_id)} == {"card", "report.html"}, "people browse these in MLflow"
    assert_equal_pixels(diffstill.load(shop.name), made, seed=0)
    for kind, artifact in artifacts.items():
        assert contents(find(shop.name).folder(kind)) == contents(artifact.folder)


def test_an_s3_prefix_is_a_reference_of_its_own(shop, bucket, monkeypatch):
    made = shop.made()
    storage.upload(made.paths["distilled"], f"s3://{bucket.name}/set")
    storage.upload(made.paths["generator"], f"s3://{bucket.name}/generator")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    found = find(f"s3://{bucket.name}/set/")
    assert (found.version, found.digest) == (None, made.opened("distilled")["distilled"].digest)
    assert_equal_pixels(diffstill.load(f"s3://{bucket.name}/set"), made, seed=0)
    assert contents(bring(f"s3://{bucket.name}/generator", "generator")) == contents(made.paths["generator"])
    with pytest.raises(DiffstillError, match="comes without a `report`"):
        found.folder("report")
    with pytest.raises(DiffstillError, match=rf"s3://{bucket.name}/generator: holds a `generator` artifact where `distilled` is expected"):
        find(f"s3://{bucket.name}/generator")
    with pytest.raises(DiffstillError, match=rf"s3://{bucket.name}/none/manifest\.json: is not there"):
        find(f"s3://{bucket.name}/none")


def test_a_killed_upload_to_s3_goes_on_and_nothing_is_sent_twice(shop, bucket):
    made, where = shop.made(), {"store": f"s3://{bucket.name}/sets"}
    fail_to_register(shop, made, **where)
    lost = next(one for one in bucket.objects.all() if one.key.endswith("manifest.json") and "/distilled/" in one.key)
    lost.delete()
    before = {one.key: one.last_modified for one in bucket.objects.all()}
    time.sleep(1.1)  # the resolution of the store's clock
    shop.publish(made, **where)
    after = {one.key: one.last_modified for one in bucket.objects.all()}
    whole = next(key for key in before if key.endswith("manifest.json") and "/report/" in key)
    assert {key for key, stamp in after.items() if before.get(key) != stamp} == {lost.key, whole}, "what is whole is made young by its manifest"
    assert contents(find(shop.name).folder()) == contents(made.paths["distilled"])


def test_objects_that_were_tampered_with_never_enter_the_cache(shop, bucket):
    shop.publish(shop.made(), store=f"s3://{bucket.name}/sets")
    (version,) = shop.versions()
    target = next(one for one in bucket.objects.all() if one.key.endswith("00000.png")).Object()
    for damage, told in ((lambda: target.put(Body=b"tampered"), "content differs"), (target.delete, "listed in the manifest but missing")):
        damage()
        with pytest.raises(DiffstillError, match=rf"s3://{bucket.name}/sets/distilled/{version.digest()}/seed-0/.*00000\.png: {told}"):
            find(shop.name).folder()
        assert not list((shop.root / "cache").rglob("*.png"))


def test_a_store_that_refuses_registers_nothing(shop, bucket):
    with pytest.raises(DiffstillError, match=r"bucket 'no-such-bucket' at http://127.* refuses \(NoSuchBucket\); create the bucket"):
        shop.publish(shop.made(), store="s3://no-such-bucket/sets")
    assert shop.versions() == []
    assert shop.publish(shop.made(), store=f"s3://{bucket.name}/sets") == 1


# --- a server -----------------------------------------------------------------------------------------------------

ODD = ("cat & <dog>", "50% + more", "ünï cödé", "a;b,c", "it's", "x (y)")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with mlflow_server(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture
def remote(server, monkeypatch, tmp_path, request) -> Shop:
    """Like `shop`, at a server."""
    return open_shop(monkeypatch, server, called(request), tmp_path)


def test_a_server_keeps_and_gives_back_whatever_classes_are_called(remote, server, caplog):
    caplog.set_level(logging.INFO, logger="diffstill")
    made = remote.made(classes=ODD)
    assert (remote.publish(made), remote.publish(made)) == (1, 1)
    (version,) = remote.versions()
    page = f"{server}/#/models/{remote.name}/versions/1"
    told = [message.partition("?")[0] for message in caplog.messages if page in message]
    assert told == [f"registered {remote.name}/1 at {page}", f"is there already as {remote.name}/1 at {page}"]
    assert_equal_pixels(diffstill.load(remote.name), made, seed=0)
    for kind, artifact in opened(made).items():
        assert contents(Registry.here().fetch(version, kind)) == contents(artifact.folder)
    sheets = re.findall(r"\]\((get-artifact[^)]*)\)", version.card)
    assert len(sheets) == len(ODD)
    for name, link in zip(ODD, sheets, strict=True):
        with urllib.request.urlopen(f"{server}/{link}", timeout=30) as answer, Image.open(answer) as sheet:
            first = read_png(made.paths["distilled"] / "seed-0" / name / "00000.png")[0]
            np.testing.assert_array_equal(np.asarray(sheet)[2:50:6, 2:50:6], first)


def test_names_that_a_server_does_not_keep_are_refused_and_s3_keeps_them(remote, bucket):
    made = remote.made(classes=("a#b", "a?b", "%41"))
    with pytest.raises(DiffstillError, match=r"distilled/seed-0/%41/00000\.png: did not arrive whole .* set `publish\.store` to an S3 prefix"):
        remote.publish(made)
    assert remote.versions() == []
    assert remote.publish(made, store=f"s3://{bucket.name}/sets") == 1
    assert_equal_pixels(diffstill.load(remote.name), made, seed=0)
    assert contents(find(remote.name).folder("card")) == contents(made.root / "card")


def test_two_who_publish_the_same_at_a_server_make_one_version(remote):
    made, copy, other = remote.made(), remote.made("copy"), remote.made("other", draw=1)
    with meeting("create_model_version", 3):
        first, second, third = together(lambda: remote.publish(made), lambda: remote.publish(copy), lambda: remote.publish(other))
    assert first == second != third
    assert {version.number for version in remote.versions()} == {first, third}
    assert remote.aliases() == {"newest": max(first, third), "best-ipc1": min(first, third), "best-ipc2": min(first, third)}
    for number, published in ((first, made), (third, other)):
        assert contents(find(f"{remote.name}/{number}").folder()) == contents(published.paths["distilled"])


def test_files_that_the_server_has_lost_are_one_message(remote, tmp_path_factory):
    remote.publish(remote.made())
    (version,) = remote.versions()
    (stored,) = tmp_path_factory.getbasetemp().glob(f"server0/artifacts/*/{version.run_id}/artifacts/distilled")
    shutil.rmtree(stored)
    with pytest.raises(
        DiffstillError, match=rf"runs:/{version.run_id}/distilled: cannot be downloaded from http://127.*see that the server still has these files"
    ):
        find(remote.name).folder()
