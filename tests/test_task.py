"""What a component does with what Kubeflow hands it."""

import json
import logging
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from chains import contents
from diffstill import launch, task
from diffstill.artifacts import open_artifact
from diffstill.config import preset
from diffstill.errors import DiffstillError, GateError, TransientError
from diffstill.task import run_preflight, run_task


@dataclass
class Handed:
    """An artifact or metrics as Kubeflow's executor hands them over."""

    path: str
    logged: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def log_metric(self, metric: str, value: float) -> None:
        self.logged[metric] = value


@pytest.fixture(autouse=True)
def _logging_as_before():
    """A task logs to the standard error of its moment."""
    root, own = logging.getLogger(), logging.getLogger("diffstill")
    before = root.handlers[:], root.level, own.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])


def handed(folder: Path, *names: str) -> dict[str, Handed]:
    return {name: Handed(str(folder / name)) for name in names}


def test_a_stage_runs_with_its_section_and_logs_what_it_measured(tiny_chain, tmp_path):
    out = handed(tmp_path, "images", "metrics")
    run_task("prepare", tiny_chain.params.prepare.canonical(), **out)
    assert contents(tmp_path / "images") == contents(tiny_chain.artifacts / "images")
    assert out["metrics"].logged["train_images"] > 100
    assert json.loads((tmp_path / "metrics").read_text()) == out["metrics"].logged


def test_a_schedule_whose_runs_cannot_be_told_apart_is_refused(tmp_path, capsys):
    """Its first run would fill the cache for all others."""
    with pytest.raises(SystemExit) as ended:
        run_task("prepare", "{}", data_version="[[CurrentTime]]", **handed(tmp_path, "images", "metrics"))
    assert ended.value.code == 2
    assert "the data version is '[[CurrentTime]]'" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


def test_options_that_are_empty_are_not_given(tiny_chain, tmp_path):
    out = handed(tmp_path, "distilled", "metrics", "sheet")
    given = handed(tiny_chain.artifacts, "generator", "denoiser")
    run_task("sample", tiny_chain.params.sample.canonical(), **out, **given, parts=None, shard="", step="")
    assert contents(tmp_path / "distilled") == contents(tiny_chain.artifacts / "distilled")
    page = (tmp_path / "sheet").read_text()
    assert re.findall(r"<p>(seed-\d)", page) == ["seed-0", "seed-1"]
    assert page.count("data:image/png;base64,iVBOR") == 2


def test_shards_are_made_and_gathered(tiny_chain, tmp_path):
    config, given = tiny_chain.params.encode.canonical(), handed(tiny_chain.artifacts, "images", "generator")
    parts = [Handed(str(tmp_path / f"part-{index}")) for index in range(2)]
    for index, part in enumerate(parts):
        run_task("encode", config, **given, latents=part, metrics=Handed(str(tmp_path / "m")), shard=f"{index}/2", parts=None)
    run_task("encode", config, **given, **handed(tmp_path, "latents", "metrics"), parts=parts, shard="")
    assert contents(tmp_path / "latents") == contents(tiny_chain.artifacts / "latents")


def test_the_report_comes_with_a_page_and_a_table(tiny_chain, tmp_path):
    given = handed(tiny_chain.artifacts, "images", "denoiser", "distilled", "untuned")
    scores = [Handed(str(path)) for path in sorted((tiny_chain.artifacts / "scores").iterdir())]
    run_task("report", tiny_chain.params.report.canonical(), **given, scores=scores, **handed(tmp_path, "report", "page", "summary", "metrics"))
    assert (tmp_path / "page").read_bytes() == (tmp_path / "report" / "report.html").read_bytes()
    assert "| source" in (tmp_path / "summary").read_text()
    assert contents(tmp_path / "report") == contents(tiny_chain.artifacts / "report")


def test_an_artifact_tells_the_pages_what_it_is(tiny_chain, tmp_path):
    """Kind, digest, counts, images per class and the data at the beginning, without opening it."""
    out = handed(tmp_path, "images", "metrics", "distilled")
    run_task("prepare", tiny_chain.params.prepare.canonical(), images=out["images"], metrics=out["metrics"])
    made = open_artifact(tmp_path / "images", "images")
    counts = {f"{split}_images": sum(found.values()) for split, found in made.facts["counts"].items()}
    assert out["images"].metadata == {
        "kind": "images", "digest": made.digest, "source": "digits", "side": 8, "channels": 1, "classes": 3, **counts, "data_source": "digits",
    }  # fmt: skip
    given = handed(tiny_chain.artifacts, "generator", "denoiser")
    run_task("sample", tiny_chain.params.sample.canonical(), distilled=out["distilled"], metrics=out["metrics"], **given)
    shown = out["distilled"].metadata
    assert (shown["kind"], shown["source"], shown["images_per_class"], shown["seeds"]) == ("distilled", "distilled", 2, 2)
    assert (shown["digest"], shown["data_source"]) == (open_artifact(tiny_chain.artifacts / "distilled", "distilled").digest, "digits")
    assert "gpu_hours" not in shown, "no GPU was there"


def test_the_revision_of_data_in_dvc_is_shown_with_all_that_descends_from_them(tiny_chain):
    made = open_artifact(tiny_chain.artifacts / "images", "images")
    location = f"dvc+https://example.org/data.git?rev={'a' * 40}&path=images&md5={'b' * 32}.dir"
    config = made.manifest.config | {"source": "folder", "location": location}
    shown = task._described(replace(made, manifest=made.manifest.model_copy(update={"config": config})))
    assert (shown["data_revision"], shown["data_md5"]) == ("a" * 40, f"{'b' * 32}.dir")


def test_no_placeholder_of_kubeflow_or_kubernetes_stands_in_metadata(tiny_chain):
    """Every later task is handed them as JSON, in which some of those that hand it on would look for their own."""
    made = open_artifact(tiny_chain.artifacts / "images", "images")
    config = made.manifest.config | {"source": "folder", "location": "/data/{{$.x}} $(HOME)/a b"}
    shown = task._described(replace(made, manifest=made.manifest.model_copy(update={"config": config})))
    assert shown["data_location"] == "/data/%7B%7B$.x}} %24%28HOME)/a b"


def test_hours_of_gpus_are_told_by_task_and_change_no_byte(tiny_chain, tmp_path, monkeypatch):
    """They travel beside the artifacts; of the same task, through two inputs, they count once."""
    monkeypatch.setattr(task, "gpus_held", lambda device: 4)
    out = handed(tmp_path, "distilled", "metrics")
    generator, denoiser = handed(tiny_chain.artifacts, "generator", "denoiser").values()
    generator.metadata["gpu_hours"] = json.dumps({"pretrain": 2.0})
    denoiser.metadata["gpu_hours"] = json.dumps({"pretrain": 2.0, "encode 0/2": 0.5, "finetune": 3.25})
    run_task("sample", tiny_chain.params.sample.canonical(), **out, generator=generator, denoiser=denoiser, shard="0/1")
    spent = json.loads(out["distilled"].metadata["gpu_hours"])
    assert spent == {"pretrain": 2.0, "encode 0/2": 0.5, "finetune": 3.25, "sample 0/1": out["metrics"].logged["gpu_hours"]}
    assert 0 < spent["sample 0/1"] < 1
    assert "gpu_hours" not in json.loads((tmp_path / "metrics").read_text())

    monkeypatch.undo()
    given = handed(tiny_chain.artifacts, "images", "denoiser", "distilled", "untuned")
    given["distilled"].metadata, given["denoiser"].metadata = out["distilled"].metadata, denoiser.metadata
    scores = [Handed(str(path)) for path in sorted((tiny_chain.artifacts / "scores").iterdir())]
    pages = handed(tmp_path, "report", "summary", "metrics")
    run_task("report", tiny_chain.params.report.canonical(), **given, scores=scores, **pages)
    said = (tmp_path / "summary").read_text()
    assert "| pretrain | 2.00 |" in said
    assert re.search(r"^Hours of GPUs: 5\.7[5-9]$", said, re.MULTILINE)
    assert contents(tmp_path / "report") == contents(tiny_chain.artifacts / "report")


@pytest.fixture
def tracked(monkeypatch, tmp_path):
    """A registry of one's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)


def test_the_gate_ends_a_task_with_3_and_without_it_the_card_is_shown(tiny_chain, tmp_path, tracked, capsys):
    given, out = handed(tiny_chain.artifacts, "distilled", "report"), handed(tmp_path, "card", "summary", "metrics")
    with pytest.raises(SystemExit) as ended:
        run_task("publish", '{"gate": "val-gain"}', **given, **out)
    assert ended.value.code == 3
    assert "the gain is not shown to be above zero" in capsys.readouterr().err
    assert not (tmp_path / "card").exists()

    run_task("publish", '{"gate": "off"}', **given, **out)
    assert out["metrics"].logged["version"] == 1
    card, shown = (tmp_path / "card" / "card.md").read_text(), (tmp_path / "summary").read_text()
    pictures = [line for line in card.splitlines() if line not in shown.splitlines()]
    assert pictures == [f"![{name}](sheets/{name}.png)" for name in tiny_chain.params.prepare.classes]
    assert "| distilled |" in shown


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"side": 4}', "`side` is 4"),
        ('{"sides": 8}', "`sides` is not a knob"),
        ('{"location": "/nowhere/at/all", "source": "folder"}', "error: /nowhere/at/all: is no folder"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(tmp_path, capsys, config, message):
    with pytest.raises(SystemExit) as ended:
        run_task("prepare", config, **handed(tmp_path, "images", "metrics"))
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in told
    assert told.count("error: ") == 1
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(("error", "code"), [(DiffstillError("too little"), 2), (GateError("not shown"), 3)])
def test_a_pod_leaves_its_refusal_for_kubernetes(tmp_path, monkeypatch, error, code):
    """Kubeflow's launcher makes 1 of every exit code, so that a policy of retries can only know a refusal by this."""
    last_words = tmp_path / "termination-log"
    last_words.touch()
    monkeypatch.setattr(launch, "TERMINATION_LOG", last_words)
    with pytest.raises(SystemExit) as end, launch.one_message():
        raise error
    assert end.value.code == code
    assert last_words.read_text() == f"diffstill refuses (exit code {code}): {error}"


@pytest.mark.parametrize(
    ("error", "ends", "code"),
    [(RuntimeError("out of memory"), RuntimeError, None), (TransientError("the store is away"), SystemExit, 75)],
    ids=["a bug", "a service that is away"],
)
def test_what_may_go_well_again_is_no_refusal(tmp_path, monkeypatch, error, ends, code):
    last_words = tmp_path / "termination-log"
    last_words.touch()
    monkeypatch.setattr(launch, "TERMINATION_LOG", last_words)
    with pytest.raises(ends) as end, launch.one_message():
        raise error
    assert getattr(end.value, "code", None) == code
    assert last_words.read_text() == ""


def test_elsewhere_no_last_words_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TERMINATION_LOG", tmp_path / "termination-log")
    with pytest.raises(SystemExit), launch.one_message():
        raise DiffstillError("too little")
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_missing_is_an_error_and_not_a_day_on_the_cpu(tiny_chain, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFSTILL_DEVICE", "cuda:7")
    with pytest.raises(SystemExit):
        run_task(
            "encode",
            tiny_chain.params.encode.canonical(),
            **handed(tiny_chain.artifacts, "images", "generator"),
            **handed(tmp_path, "latents", "metrics"),
        )
    assert "'cuda:7' is not here" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(tmp_path):
    with pytest.raises(TypeError):
        run_task("prepare", "{}", **handed(tmp_path, "images", "metrics"), nonsense="x")


def test_the_preflight_names_all_that_is_missing(monkeypatch, capsys):
    monkeypatch.setenv("PRESENT", "sentinel-value")
    needs = {"environment": ["PRESENT", "ABSENT_KEY"], "disk_gib": 1e9}
    with pytest.raises(SystemExit) as ended:
        run_preflight(json.dumps(needs), preset("tiny").canonical())
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert "ABSENT_KEY" in told.err
    assert "disk" in told.err
    assert "sentinel-value" not in told.out + told.err


@pytest.mark.parametrize(("needs", "message"), [('{"gpu": 1}', "gpu"), ("no json", "Invalid JSON"), ('{"disk_gib": -1}', "disk_gib")])
def test_malformed_needs_are_named(needs, message, capsys):
    with pytest.raises(SystemExit):
        run_preflight(needs, preset("tiny").canonical())
    assert message in capsys.readouterr().err


def test_the_preflight_opens_the_run_in_mlflow(monkeypatch, tmp_path, tracked):
    from mlflow import MlflowClient

    monkeypatch.setenv("DIFFSTILL_CHAIN", "run-4711")
    run_preflight("{}", preset("tiny").canonical())
    out = handed(tmp_path, "images", "metrics")
    run_task("prepare", preset("tiny").prepare.canonical(), **out)
    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("diffstill").experiment_id])
    parent = next(run for run in runs if run.data.tags.get("diffstill.chain") == "run-4711")
    assert [artifact.path for artifact in client.list_artifacts(parent.info.run_id)] == ["params.json"]
    assert [run.info.run_name for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id] == ["prepare"]
