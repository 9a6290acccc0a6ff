"""Tracking, against a real MLflow on sqlite: one parent per chain, a nested run per stage, and clear words when it does not answer."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
from PIL import Image

from chains import Chain
from diffstill.artifacts import Artifact, Manifest, read_manifest
from diffstill.config import Params, load_params, preset
from diffstill.errors import DiffstillError, TransientError, without_secrets
from diffstill.run import run_stage
from diffstill.tracking import DESCRIPTION, _called, _dataset, open_chain, stage_run, tracking_uri
from servers import mlflow_server

TINY = preset("tiny")
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="session")
def database(tmp_path_factory):
    """A folder whose mlflow.db is there already: creating it takes seconds."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder


@pytest.fixture
def runs(database, monkeypatch, request):
    """Work in that folder with default tracking, in an experiment of one's own; a function that finds its runs, oldest first."""
    from mlflow import MlflowClient

    monkeypatch.chdir(database)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    client = MlflowClient(f"sqlite:///{database / 'mlflow.db'}")

    def find(**tags):
        experiment = client.get_experiment_by_name(request.node.name)
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        return [] if experiment is None else client.search_runs([experiment.experiment_id], query, order_by=["attribute.start_time ASC"])

    find.client = client
    return find


def stage(name: str, params: Params = TINY):
    return stage_run(name, params.section(name), params)


def parent_of(run) -> str:
    return run.data.tags["mlflow.parentRunId"]


# --- one parent per chain -----------------------------------------------------------------------------------------


def test_stages_of_one_chain_share_a_parent(runs):
    with stage("prepare"), stage("sample"):
        pass
    parents = [run for run in runs() if "diffstill.chain" in run.data.tags]
    nested = [run for run in runs() if "diffstill.stage" in run.data.tags]
    assert len(parents) == 1
    assert {parent_of(run) for run in nested} == {parents[0].info.run_id}
    assert sorted(run.info.run_name for run in nested) == ["prepare", "sample"]
    assert parents[0].data.tags["diffstill.dataset"] == "digits"
    assert parents[0].data.tags["diffstill.git_sha"] == "none"
    assert parents[0].info.run_name.startswith("digits IPC 2, redundancy, guidance 1.5 #")


def test_another_process_finds_the_parent(runs, database):
    with stage("prepare"):
        pass
    code = "from diffstill.config import preset; from diffstill.tracking import stage_run; p = preset('tiny')\nwith stage_run('encode', p.encode, p): pass"
    subprocess.run([sys.executable, "-c", code], cwd=database, check=True)
    nested = [run for run in runs() if "diffstill.stage" in run.data.tags]
    assert sorted(run.info.run_name for run in nested) == ["encode", "prepare"]
    assert len({parent_of(run) for run in nested}) == 1


def test_other_parameters_are_another_chain(runs):
    other = TINY.model_copy(update={"report": TINY.report.model_copy(update={"shown_per_class": 3})})
    with stage("prepare"), stage("prepare", other):
        pass
    assert len({parent_of(run) for run in runs(**{"diffstill.stage": "prepare"})}) == 2


def test_the_parent_keeps_all_parameters(runs):
    with stage("prepare"):
        pass
    parent = next(run for run in runs() if "diffstill.chain" in run.data.tags)
    from mlflow.artifacts import load_dict

    assert load_dict(f"{parent.info.artifact_uri}/params.json") == TINY.model_dump(mode="json")


def test_the_report_finishes_the_chain(runs):
    with stage("prepare"):
        pass
    assert [run.info.status for run in runs() if "diffstill.chain" in run.data.tags] == ["RUNNING"]
    with stage("report"):
        pass
    assert {run.info.status for run in runs()} == {"FINISHED"}
    with stage("publish") as run:
        run.open()
        assert "RUNNING" in {run.info.status for run in runs() if "diffstill.chain" in run.data.tags}
    assert {run.info.status for run in runs()} == {"FINISHED"}


def test_what_the_version_is_called_and_a_commit_make_no_other_chain(runs, monkeypatch):
    with stage("report"):
        pass
    renamed = TINY.model_copy(update={"publish": TINY.publish.model_copy(update={"name": "distilled-other", "gate": "off"})})
    monkeypatch.setattr("diffstill.tracking.git_sha", lambda: SHA)
    monkeypatch.setattr("diffstill.tracking.code_commit", lambda: SHA)
    with stage("publish", renamed):
        pass
    assert len({parent_of(run) for name in ("report", "publish") for run in runs(**{"diffstill.stage": name})}) == 1


def test_an_injected_run_is_the_parent_and_stays_open(runs, monkeypatch):
    outer = runs.client.create_run(runs.client.create_experiment("outer"))
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)
    with stage("report"):
        pass
    nested = runs.client.search_runs([outer.info.experiment_id], "tags.`diffstill.stage` = 'report'")
    assert [(parent_of(run), run.info.status) for run in nested] == [(outer.info.run_id, "FINISHED")]
    assert runs.client.get_run(outer.info.run_id).info.status == "RUNNING"
    assert runs() == []


# --- what a stage's run holds -------------------------------------------------------------------------------------


def test_a_real_stage_logs_its_knobs_metrics_and_pictures(runs, tiny_chain: Chain, tmp_path):
    paths = {"generator": tiny_chain.artifacts / "generator", "distilled": tmp_path / "distilled"}
    run_stage("sample", tiny_chain.params.sample, paths, params=tiny_chain.params, step="sample-untuned")
    (run,) = runs(**{"diffstill.stage": "sample-untuned"})
    assert run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in tiny_chain.params.sample.model_dump(mode="json").items()}
    assert run.data.metrics["images"] == 12
    assert run.data.metrics["seconds"] > 0
    assert run.data.metrics["peak_memory_mib"] > 50
    assert [file.path for file in runs.client.list_artifacts(run.info.run_id)] == ["seed-0.png", "seed-1.png"]


def test_the_report_of_a_chain_is_logged(runs, tiny_chain: Chain, tmp_path):
    """With its page and figures; every number of metrics.json has a name that MLflow takes."""
    from diffstill.plan import STAGES, score_names

    here = tiny_chain.artifacts
    paths = {name: here / name for name in STAGES["report"].inputs}
    scores = [here / name for name in score_names(tiny_chain.params.evaluate.students)]
    metrics = run_stage("report", tiny_chain.params.report, {**paths, "scores": scores, "report": tmp_path / "report"}, params=tiny_chain.params)
    (run,) = runs(**{"diffstill.stage": "report"})
    assert metrics.items() <= run.data.metrics.items()
    assert "report.html" in [file.path for file in runs.client.list_artifacts(run.info.run_id)]


def test_nested_knobs_and_long_values(runs):
    classes = tuple(f"class number {number}" for number in range(1000))
    params = TINY.model_copy(update={"prepare": TINY.prepare.model_copy(update={"classes": classes})})
    with stage("pretrain"), stage("prepare", params):
        pass
    (pretrain,), (prepare,) = runs(**{"diffstill.stage": "pretrain"}), runs(**{"diffstill.stage": "prepare"})
    assert pretrain.data.params["vae.channels"] == "[16, 16]"
    assert prepare.data.params["classes"].startswith("['class number 0', ")


def test_metrics_have_steps(runs):
    with stage("finetune") as run:
        for step in (1, 2):
            run.metrics({"seed-0/loss": 1 / step}, step)
    (logged,) = runs(**{"diffstill.stage": "finetune"})
    history = runs.client.get_metric_history(logged.info.run_id, "seed-0/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]


def test_pictures_have_steps(runs, tmp_path):
    """MLflow's page finds them by the names of the files, and shows them where a tag says that there are some."""
    pictures = {step: Image.new("L", (8, 8), step) for step in (0, 7)}
    with stage("finetune") as run:
        for step, picture in pictures.items():
            run.image("seed-0/preview", picture, step)
    (logged,) = runs(**{"diffstill.stage": "finetune"})
    assert logged.data.tags["mlflow.loggedImages"] == "True"
    paths = [file.path for file in runs.client.list_artifacts(logged.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(path.split("+timestamp+")[0] for path in paths) == ["images/seed-0~preview+step+0", "images/seed-0~preview+step+7"]
    for path in paths:
        with Image.open(runs.client.download_artifacts(logged.info.run_id, path, str(tmp_path))) as found:
            assert np.array_equal(found, pictures[int(path.split("+")[2])])


@pytest.mark.usefixtures("unhurried")
def test_fine_tuning_shows_what_it_draws(runs, tiny_chain: Chain, tmp_path):
    paths = {name: tiny_chain.artifacts / name for name in ("latents", "generator")}
    run_stage("finetune", tiny_chain.params.finetune, {**paths, "denoiser": tmp_path / "denoiser"}, params=tiny_chain.params)
    (run,) = runs(**{"diffstill.stage": "finetune"})
    pictures = [file.path for file in runs.client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == [0, 5, 10, 12]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_stage_is_marked_and_its_error_goes_on(error, runs):
    def fail():
        with stage("encode") as run:
            run.metrics({"images": 1.0}, 0)
            raise error

    with pytest.raises(error):
        fail()
    assert [run.info.status for run in runs(**{"diffstill.stage": "encode"})] == ["FAILED"]


def test_a_stage_that_refuses_its_input_leaves_nothing(runs):
    given = TINY.model_copy(update={"prepare": TINY.prepare.model_copy(update={"source": "folder", "location": "/no/such/folder"})})
    with pytest.raises(DiffstillError, match="/no/such/folder: is no folder"):
        run_stage("prepare", given.prepare, {"images": Path("images")}, params=given)
    assert runs() == []


def test_keys_of_the_users_own_are_no_names_of_parameters(runs):
    labels = {"a,b": "1", "ä": "2", "": "3"}
    params = TINY.model_copy(update={"pretrain": TINY.pretrain.model_copy(update={"labels": labels})})
    with stage("pretrain", params):
        pass
    (run,) = runs(**{"diffstill.stage": "pretrain"})
    assert run.data.params["labels"] == str(labels)
    assert run.data.params["vae.steps"] == str(TINY.pretrain.vae.steps)


# --- where the data come from -------------------------------------------------------------------------------------


def data_of(run) -> list:
    return [given.dataset for given in run.inputs.dataset_inputs]


def test_every_stage_with_images_says_which(runs, tiny_chain: Chain, tmp_path):
    """Made, taken, taken again and made anew: one data set on each run, and one on the chain's."""
    params, images = tiny_chain.params, tmp_path / "images"
    run_stage("prepare", params.prepare, {"images": images}, params=params)
    run_stage("prepare", params.prepare, {"images": images}, params=params)
    for name in ("first", "second"):
        run_stage(
            "encode", params.encode, {"images": images, "generator": tiny_chain.artifacts / "generator", "latents": tmp_path / name}, params=params
        )
    run_stage("sample", params.sample, {"generator": tiny_chain.artifacts / "generator", "distilled": tmp_path / "distilled"}, params=params)
    digest = read_manifest(images, "images").digest
    found = {run.info.run_id: data_of(run) for run in runs() if run.data.tags.get("diffstill.stage") != "sample"}
    assert len(found) == 1 + 4
    for (one,) in found.values():
        assert (one.name, one.digest, one.source_type) == ("digits", digest[:12], "local")
        assert json.loads(one.profile) == {
            "classes": 3, "test_images": 107, "train_images": 387, "val_images": 43, "side": 8, "sha256": digest
        }  # fmt: skip
    assert [data_of(run) for run in runs(**{"diffstill.stage": "sample"})] == [[]]
    (parent,) = [run for run in runs() if "diffstill.chain" in run.data.tags]
    assert parent.data.tags["diffstill.classes"] == "3"


def test_steps_at_the_same_time_may_say_the_same(runs, tiny_chain: Chain):
    images, errors = read_manifest(tiny_chain.artifacts / "images", "images"), []
    with ExitStack() as open_runs:
        steps = [open_runs.enter_context(stage("encode")) for _ in range(6)]
        for step in steps:
            step.open()
        together = Barrier(len(steps))

        def tell(step):
            together.wait()
            try:
                step.data(images)
            except DiffstillError as error:
                errors.append(error)

        threads = [Thread(target=tell, args=[step]) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert [len(data_of(run)) for run in runs()] == [1] * 7


@pytest.mark.parametrize(
    ("source", "location", "name", "kind", "where"),
    [
        ("digits", None, "digits", "local", {"uri": "sklearn.datasets.load_digits"}),
        ("fashion-mnist", "https://data.example/fashion", "fashion-mnist", "http", {"url": "https://data.example/fashion"}),
        ("folder", "/data/birds/", "birds", "local", {"uri": "/data/birds/"}),
        ("folder", "s3://bucket/sets/birds", "birds", "s3", {"uri": "s3://bucket/sets/birds"}),
        (
            "folder",
            "dvc+https://git.example/zoo.git?rev=0a1b&path=sets/birds&md5=00112233445566778899aabbccddeeff.dir",
            "birds",
            "external",
            {"url": "dvc+https://git.example/zoo.git?rev=0a1b&path=sets/birds&md5=00112233445566778899aabbccddeeff.dir"},
        ),
        ("folder", None, "folder", "local", {"uri": "folder"}),
        ("folder", ".", "folder", "local", {"uri": "."}),
    ],
)
def test_a_data_set_has_a_name_and_a_place(source, location, name, kind, where):
    facts = {"classes": ["a", "b"], "side": 8, "counts": {"train": {"a": 3, "b": 4}}}
    config = {"source": source, "location": location}
    images = Artifact(Path("images"), Manifest(kind="images", config=config, inputs={}, facts=facts, files={}))
    found = _dataset(images)
    assert _called(source, location) == found.name == name
    assert (found.source_type, json.loads(found.source)) == (kind, where)
    assert len(found.digest) <= 36
    assert json.loads(found.profile)["train_images"] == 7


# --- what a browser reads -----------------------------------------------------------------------------------------


def test_a_chain_is_found_by_what_it_is(runs):
    with stage("prepare"):
        pass
    known = {"dataset": "digits", "ipc": "2", "policy": "redundancy", "guidance": "1.5", "protocol": "short-20", "git_sha": "none"}
    (found,) = runs(**{f"diffstill.{name}": value for name, value in known.items()})
    assert "diffstill.chain" in found.data.tags
    assert runs(**{f"diffstill.{name}": value for name, value in (known | {"ipc": "3"}).items()}) == []


def test_a_chain_describes_itself_and_how_to_repeat_it(runs, database, tmp_path):
    changes = {"prepare": {"source": "folder", "location": str(database / "birds")}, "publish": {"name": "distilled-birds"}}
    folder = TINY.model_copy(update={name: TINY.section(name).model_copy(update=values) for name, values in changes.items()})
    open_chain(folder)
    (parent,) = runs()
    text = parent.data.tags[DESCRIPTION]
    for told in ("**birds**", "**2 images per class**", "redundancy", "convnet-2, protocol short-20", "with diffstill ", "`params.json`"):
        assert told in text
    for name in TINY.STAGES:
        assert f"\n- `{name}`: " in text
    assert str(database) not in text
    assert os.uname().nodename not in text
    assert load_params(Path(runs.client.download_artifacts(parent.info.run_id, "params.json", str(tmp_path)))) == folder


def test_a_stage_says_what_it_is(runs):
    for name in TINY.STAGES:
        with stage(name):
            pass
        (run,) = runs(**{"diffstill.stage": name})
        purpose = Params.model_fields[name].description
        assert run.data.tags[DESCRIPTION].lower() == f"{purpose.lower()}."
        assert run.data.tags[DESCRIPTION][0].isupper()


def test_an_experiment_is_described_once(runs, request):
    with stage("prepare"):
        pass
    experiment = runs.client.get_experiment_by_name(request.node.name)
    assert experiment.tags[DESCRIPTION].startswith("Small synthetic image sets")
    runs.client.set_experiment_tag(experiment.experiment_id, DESCRIPTION, "mine")
    with stage("encode"):
        pass
    assert runs.client.get_experiment_by_name(request.node.name).tags[DESCRIPTION] == "mine"


@pytest.mark.parametrize(
    ("code", "told", "commit"),
    [
        (SHA, f"with diffstill at commit `{SHA}`, `", SHA),
        (f"{SHA}-dirty", f"with diffstill at commit `{SHA}` (files differed from it), `", SHA),
        ("0.0.7", "with diffstill 0.0.7, `", None),
    ],
)
def test_the_commit_stands_where_mlflow_shows_it(code, told, commit, runs, monkeypatch):
    """That of diffstill; the project's stands in a tag of its own."""
    monkeypatch.setattr("diffstill.tracking.code_commit", lambda: code)
    monkeypatch.setattr("diffstill.tracking.git_sha", lambda: "f" * 40)
    with stage("prepare"):
        pass
    parent, step = sorted(runs(**{"diffstill.code": code, "diffstill.git_sha": "f" * 40}), key=lambda run: "diffstill.stage" in run.data.tags)
    assert told in parent.data.tags[DESCRIPTION]
    assert parent.data.tags.get("mlflow.source.git.commit") == step.data.tags.get("mlflow.source.git.commit") == commit


# --- a server, off, and out of reach ------------------------------------------------------------------------------


def test_a_server_gets_everything_and_its_credentials_are_not_printed(tiny_chain: Chain, tmp_path, monkeypatch, capfd):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", raising=False)
    with mlflow_server(tmp_path) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("//", "//me:s3cr3t@"))
        with stage("finetune") as run:
            run.data(read_manifest(tiny_chain.artifacts / "images", "images"))
            run.image("seed-0/preview", Image.new("RGB", (8, 8), "red"), 3)
        client = MlflowClient(url)
        found = client.search_runs([client.get_experiment_by_name("diffstill").experiment_id])
        assert [[one.name for one in data_of(run)] for run in found] == [["digits"], ["digits"]]
        assert len(client.list_artifacts(next(run.info.run_id for run in found if "diffstill.stage" in run.data.tags), "images")) == 2
    assert "s3cr3t" not in "".join(capfd.readouterr())


def test_none_switches_tracking_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with stage("sample") as run:
        assert run is None
    assert list(tmp_path.iterdir()) == []


def test_the_default_is_a_database_in_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert tracking_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert tracking_uri() == "https://mlflow.example"


def not_a_database(folder: Path) -> str:
    (folder / "notes.db").write_text("dear diary, " * 100)
    return f"sqlite:///{folder / 'notes.db'}"


@pytest.mark.parametrize(
    ("uri", "told", "kind"),
    [
        (
            lambda _: "http://user:s3cr3t@127.0.0.1:9/x?token=s3cr3t",
            "MLflow at http://***@127.0.0.1:9/x?*** refuses (API request to http://***@127.0.0.1:9/",
            TransientError,
        ),
        (lambda _: "carrier-pigeon://coop", "MLflow at carrier-pigeon://coop refuses (", DiffstillError),
        (not_a_database, "file is not a database", DiffstillError),
        (
            lambda _: "postgresql+nodriver://user:s3cr3t@127.0.0.1/runs",
            "MLflow at postgresql+nodriver://***@127.0.0.1/runs refuses (",
            DiffstillError,
        ),
    ],
    ids=["no server", "unknown scheme", "no database", "no driver"],
)
def test_a_tracker_that_does_not_answer_is_one_clear_message(uri, told, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri(tmp_path))
    started = time.monotonic()
    with pytest.raises(DiffstillError) as refusal, stage("sample"):
        pytest.fail("the stage must not start")
    assert time.monotonic() - started < 30
    assert type(refusal.value) is kind
    assert told in str(refusal.value)
    assert str(refusal.value).endswith("with MLFLOW_TRACKING_URI=none a chain runs without tracking")
    assert "s3cr3t" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("address", ["127.0.0.1:5000", "localhost:5000", "mlflow.example", "mlflow.db"])
def test_an_address_without_a_scheme_is_refused_with_the_right_one(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f" {address} ")
    with pytest.raises(DiffstillError, match=rf"^'{address}': .* no scheme; write http://{address} for a server"), stage("sample"):
        pytest.fail("the stage must not start")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"me:s3cr3t@{address}")
    with pytest.raises(DiffstillError, match=r"'\*\*\*@.*no scheme") as refused, stage("sample"):
        pytest.fail("the stage must not start")
    assert "s3cr3t" not in str(refused.value)


def test_an_empty_setting_is_none(runs, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", " ")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    with stage("sample"):
        pass
    assert runs.client.get_experiment_by_name("diffstill")


def test_a_deleted_experiment_says_how_it_comes_back(runs, database, request):
    with stage("prepare"):
        pass
    experiment = runs.client.get_experiment_by_name(request.node.name).experiment_id
    runs.client.delete_experiment(experiment)
    with (
        pytest.raises(DiffstillError, match=rf"{request.node.name}' at sqlite:.* was deleted; set MLFLOW_EXPERIMENT_NAME") as refused,
        stage("encode"),
    ):
        pytest.fail("the stage must not start")
    command = str(refused.value).partition("run: ")[2]
    assert command == f"MLFLOW_TRACKING_URI=sqlite:///{database}/mlflow.db mlflow experiments restore --experiment-id {experiment}"


def test_a_deleted_injected_run_says_how_it_comes_back(runs, request, monkeypatch):
    run_id = runs.client.create_run(runs.client.create_experiment(request.node.name)).info.run_id
    runs.client.delete_run(run_id)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with pytest.raises(DiffstillError, match=rf"{run_id}: that run was deleted; .* mlflow runs restore --run-id {run_id}"), stage("encode"):
        pytest.fail("the stage must not start")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ("UPDATE alembic_version SET version_num = '451aebb31d03'", r"an older version .* keep a copy of it, then run: mlflow db upgrade sqlite:///"),
        ("UPDATE alembic_version SET version_num = 'f00df00df00d'", r"a later version .* \(schema f00df00df00d\); install that version"),
        ("UPDATE alembic_version SET version_num = 'f00df00df00d'; DROP TABLE trace_tags", r"a later version .* \(schema f00df00df00d\)"),
    ],
)
def test_tables_of_another_mlflow_are_refused_with_the_remedy(spoil, told, database, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(database / "mlflow.db", tmp_path)
    shutil.copytree(database / "mlartifacts", tmp_path / "mlartifacts")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as tables:
        tables.executescript(spoil)
    with pytest.raises(DiffstillError, match=told) as refused, stage("sample"):
        pytest.fail("the stage must not start")
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("runs")
def test_an_injected_run_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef0123456789abcdef")
    with (
        pytest.raises(DiffstillError, match=r"id=0123456789abcdef0123456789abcdef not found.* mend MLFLOW_TRACKING_URI or MLFLOW_RUN_ID"),
        stage("sample"),
    ):
        pytest.fail("the stage must not start")


def test_a_tracker_lost_on_the_way_is_refused_too(runs):
    def lose():
        with stage("sample") as run:
            run.open()
            runs.client.delete_run(runs(**{"diffstill.stage": "sample"})[0].info.run_id)
            run.metrics({"images": 1.0}, 0)

    with pytest.raises(DiffstillError, match=r"MLflow at sqlite:.* refuses"):
        lose()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sqlite:////here/mlflow.db", "sqlite:////here/mlflow.db"),
        ("https://mlflow.example:5000/a@b", "https://***@b"),
        ("https://user:s3/cr@3t@host/x", "https://***@host/x"),
        ("get http://a:b@host/x?key=s3cr3t failed (why? nobody knows)", "get http://***@host/x?*** failed (why? nobody knows)"),
        ("none", "none"),
    ],
)
def test_without_secrets(text, shown):
    assert without_secrets(text) == shown
