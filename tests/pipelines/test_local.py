"""The whole pipeline under Kubeflow's own local runner, in processes: loops, branches, gathering, cache, failure, retry."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from filelock import FileLock
from kfp import dsl
from kfp.components import load_component_from_text
from kfp_server import KfpServer

from chains import contents
from diffstill.artifacts import WorkFolder, open_artifact
from diffstill.config import PublishConfig, load_params, preset, render_params
from diffstill.plan import chain
from diffstill.registry import KINDS, Registry
from pipelines.__main__ import main
from pipelines.distill import literal
from pipelines.local import _at_hand, _version, execute, processes
from pipelines.settings import TrainJobConfig, load_settings

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    """A folder with parameters, in which the pipeline runs as a user would run it."""

    folder: Path
    tracking: str = "none"

    def environment(self) -> dict[str, str]:
        own = {"MLFLOW_TRACKING_URI": self.tracking, "DIFFSTILL_WORK": str(self.folder / "work"), "PYTHONPATH": str(ROOT)}
        return os.environ | own | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}

    def command(self, *options: str) -> list[str]:
        return [sys.executable, "-m", "pipelines", "run-local", "--params", "params.yaml", "--output", "local", *options]

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*options), cwd=self.folder, env=self.environment(), capture_output=True, text=True, check=False)


def ran(told: str) -> set[str]:
    """The tasks that did work, by the names of kfp's log."""
    plain = re.sub(r"\x1b\[\d+m", "", told)
    finished, cached = (
        set(re.findall(pattern, plain, re.MULTILINE)) for pattern in (r"Task '([^']+)' finished with status", r"Task (\S+) cache hit")
    )
    assert finished
    return finished - cached


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "params.yaml").write_text(render_params(preset("tiny")))
    return Place(folder)


@pytest.fixture(scope="module")
def chain_artifacts(place):
    """What `diffstill run` makes of the same parameters."""
    folder = place.folder / "chain"
    folder.mkdir()
    command = [str(Path(sys.executable).with_name("diffstill")), "run", "--params", "../params.yaml"]
    done = subprocess.run(command, cwd=folder, env=place.environment() | {"MLFLOW_TRACKING_URI": "none"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return contents(folder / "artifacts")


@pytest.fixture(scope="module")
def two_shards(place):
    done = place.run("--shards", "2")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_two_shards_give_the_bytes_of_one_process(place, two_shards, chain_artifacts):
    assert contents(place.folder / "local" / "artifacts") == chain_artifacts
    assert "untuned generator" in two_shards, "the table at the end"
    assert "Executing task" in two_shards
    assert re.search(r"^diffstill: finetune done in", two_shards, re.MULTILINE), "what the tasks say"
    assert "executorInput" not in two_shards, "but not what kfp says to itself"
    assert "Got executor_input" in (place.folder / "local" / "run.log").read_text()


@pytest.mark.slow
def test_the_browser_gets_a_page_a_table_and_pictures(place, two_shards):
    runs = place.folder / "local" / "runs"
    page, summary = (next(runs.glob(f"*/report/{name}")).read_text() for name in ("page", "summary"))
    assert page == (place.folder / "local" / "artifacts" / "report" / "report.html").read_text()
    assert "| distilled " in summary
    assert any("data:image/png;base64," in path.read_text() for path in runs.glob("*/sample*/sheet"))


@pytest.mark.slow
def test_a_second_run_makes_nothing_anew(place, two_shards, chain_artifacts):
    done = place.run("--shards", "2")
    assert done.returncode == 0, done.stdout[-6000:]
    assert ran(done.stdout + done.stderr) == {"preflight"}
    assert contents(place.folder / "local" / "artifacts") == chain_artifacts


@pytest.fixture(scope="module")
def tracked(place):
    """The same folder, with a registry."""
    return replace(place, tracking=f"sqlite:///{place.folder / 'registry.db'}")


def publish(tracked, **section):
    """Run the pipeline with another section `publish`."""
    params = load_params(tracked.folder / "params.yaml")
    (tracked.folder / "publish.yaml").write_text(render_params(params.model_copy(update={"publish": PublishConfig(**section)})))
    return tracked.run("--shards", "2", "--publish", "--params", "publish.yaml")


@pytest.fixture
def registry(tracked, monkeypatch, tmp_path):
    """The registry, looked at from outside; no card stays beside the artifacts of other tests."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracked.tracking)
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path))
    yield Registry.here()
    shutil.rmtree(tracked.folder / "local" / "artifacts" / "card", ignore_errors=True)


@pytest.mark.slow
def test_publishing_twice_makes_one_version_of_what_was_laid_out(place, two_shards, tracked, registry):
    note = r"""It's a "trial" of \ ' and '', {{$}} and $(HOME)."""
    for _ in range(2):
        done = publish(tracked, gate="off", note=note)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert ran(done.stdout + done.stderr) == {"preflight", "publish"}
    (version,) = registry.search("distilled-digits")
    assert version.ref == "distilled-digits/1"
    assert note in version.card
    assert not {"image", "kfp_run_id"} & set(version.tags), "no cluster was there"
    for kind in KINDS:
        assert contents(registry.fetch(version, kind)) == contents(place.folder / "local" / "artifacts" / kind)


@pytest.mark.slow
def test_what_the_gate_refuses_is_told_and_registered_nowhere(place, two_shards, tracked, registry):
    before = contents(place.folder / "local" / "artifacts")
    done = publish(tracked, gate="val-gain", name="refused")
    told = done.stdout + done.stderr
    assert done.returncode == 2
    assert re.search(r"^error: .*a set of 2 images per class reaches .*the gain is not shown to be above zero", told, re.MULTILINE)
    assert "Traceback" not in told
    assert "error: the pipeline failed" in done.stderr
    assert registry.search("refused") == []
    assert contents(place.folder / "local" / "artifacts") == before


@pytest.mark.parametrize(("options", "said"), [((), "MLFLOW_TRACKING_URI is `none`"), (("--runner", "docker"), "have no network to a registry")])
def test_publishing_without_a_registry_is_refused_before_anything_starts(tmp_path, options, said):
    (tmp_path / "params.yaml").write_text(render_params(preset("tiny")))
    order = ["run-local", "--params", str(tmp_path / "params.yaml"), "--output", str(tmp_path / "local"), "--publish", *options]
    done = CliRunner().invoke(main, order)
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (tmp_path / "local").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", ["1", "3"])
def test_another_number_of_shards_gives_the_same_bytes(place, two_shards, chain_artifacts, count):
    """Only what the number of shards reaches runs again."""
    done = place.run("--shards", count)
    assert done.returncode == 0, done.stdout[-6000:]
    assert not {"prepare", "pretrain"} & ran(done.stdout + done.stderr)
    assert {"encode", "sample"} <= ran(done.stdout + done.stderr)
    assert contents(place.folder / "local" / "artifacts") == chain_artifacts


@pytest.mark.slow
def test_what_a_server_receives_makes_the_same_bytes(place, chain_artifacts, tmp_path, monkeypatch):
    """The real pipeline, submitted over a real socket, read back from the bytes that arrived, and run with the arguments that arrived."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KFP_TOKEN", "a-token")
    with KfpServer(token="a-token") as server:
        images = {name: f"registry.example/diffstill@sha256:{'0' * 63}{digit}" for name, digit in (("cpu", 1), ("gpu", 2))}
        (tmp_path / "images.lock").write_text(json.dumps(images))
        values = yaml.safe_load((ROOT / "pipelines" / "settings.yaml").read_text())
        values["cluster"] |= {"host": server.url, "token_env": "KFP_TOKEN"}
        values["infra"] |= {"secrets": {}, "config_maps": {}, "disk_gib": 0.1}  # and MLflow, because the run publishes
        values["infra"]["resources"] = {name: {} for name in values["infra"]["resources"]}
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "pipelines", "submit", "--params", "params.yaml", "--settings", str(tmp_path / "settings.yaml")]
        command += ["--images-lock", str(tmp_path / "images.lock"), "--allow-dirty"]
        environment = place.environment() | {"HOME": str(tmp_path), "KFP_TOKEN": "a-token"}
        sent = subprocess.run(command, cwd=place.folder, env=environment, capture_output=True, text=True, check=False)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        (received,), (run,) = server.packages.values(), server.runs.values()
    pipeline = load_component_from_text(received.decode())
    origin = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}", "DIFFSTILL_CHAIN": run.run_id}
    for name, value in {"DIFFSTILL_WORK": str(tmp_path / "work"), **origin}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    outputs = execute(pipeline, run.runtime_config.parameters, tmp_path / "local", processes(), cache=False)
    for name in ("images", "generator", "latents", "denoiser", "distilled", "untuned", "report"):
        made = {f"{name}/{path}": digest for path, digest in contents(Path(outputs[name].path)).items()}
        assert made == {path: digest for path, digest in chain_artifacts.items() if path.startswith(f"{name}/")}, name
    (version,) = Registry.here().search()
    assert (version.tags["image"], version.tags["kfp_run_id"]) == (images["cpu"], run.run_id)
    assert version.digest() == open_artifact(place.folder / "chain" / "artifacts" / "distilled", "distilled").digest


@pytest.mark.slow
def test_weights_are_taken_over_instead_of_trained(place, two_shards, tmp_path):
    """A DiTPipeline folder, which the stage reads; another one at the same place is not the one in the cache."""
    values = preset("tiny").plain()
    values["pretrain"] |= {"source": "folder", "location": str(place.folder / "local" / "artifacts" / "generator")}
    other = Place(tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
    done = other.run("--shards", "1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    imported = open_artifact(tmp_path / "local" / "artifacts" / "generator", "generator")
    assert imported.manifest.config["location"] == values["pretrain"]["location"]
    trained = place.folder / "local" / "artifacts" / "generator" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert (imported.folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == trained.read_bytes()
    assert open_artifact(tmp_path / "local" / "artifacts" / "report", "report").facts


def test_a_placeholder_in_a_parameter_reaches_the_task_as_it_is(tmp_path):
    """Kfp would put its own JSON, or nothing, in the place of it."""

    @dsl.component(base_image="python:3.11", install_kfp_package=False)
    def tell(config: str) -> str:
        return config

    @dsl.pipeline(name="telling")
    def telling(config: str) -> str:
        return tell(config=config).outputs["Output"]

    said = "{{$}} {{$.pipeline_job_name}} {{$.inputs.parameters['config']}} $(HOME) [[RunUUID]] /kfp-workspace {{$.workspace_path}}"
    made = execute(telling, {"config": literal(json.dumps({"note": said}))}, tmp_path, processes(), cache=False)
    assert json.loads(made["Output"]) == {"note": said}


def test_a_placeholder_in_metadata_or_a_path_reaches_the_next_task_as_it_is(tmp_path):
    """Of one without a point kfp would make an IndexError, of others JSON that is none."""
    said = "/data/{{$.x}} {{$}} {{$.pipeline_job_name}} {{$.inputs.parameters['config']}} /kfp-workspace"

    @dsl.component(base_image="python:3.11", install_kfp_package=False)
    def make(made: dsl.Output[dsl.Artifact], location: str):
        import json
        from pathlib import Path

        Path(made.path).write_text("here")
        made.metadata["location"] = json.loads(location)

    @dsl.component(base_image="python:3.11", install_kfp_package=False)
    def tell(made: dsl.Input[dsl.Artifact]) -> str:
        from pathlib import Path

        return made.metadata["location"] + " is " + Path(made.path).read_text()

    @dsl.pipeline(name="telling")
    def telling(location: str) -> str:
        return tell(made=make(location=location).outputs["made"]).outputs["Output"]

    made = execute(telling, {"location": literal(json.dumps(said))}, tmp_path / "o{{$.y}}", processes(), cache=False)
    assert made["Output"] == f"{said} is here"


def test_what_lies_at_a_place_is_told_apart_for_the_cache(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_text("one")
    before = _version(str(tmp_path / "weights"), None)
    assert _version(str(tmp_path / "weights"), None) == before
    (tmp_path / "weights" / "a").write_text("other")
    assert _version(str(tmp_path / "weights"), None) != before
    assert _version(None, None) == ""


@pytest.mark.slow
def test_a_failing_step_is_told_and_loses_nothing(place, two_shards, chain_artifacts):
    values = preset("tiny").plain()
    values["prepare"]["classes"] = ["0", "1", "eleven"]
    wanted = place.folder / "params.yaml"
    before = wanted.read_text()
    wanted.write_text(yaml.safe_dump(values))
    try:
        done = place.run("--shards", "2")
    finally:
        wanted.write_text(before)
    told = done.stdout + done.stderr
    assert done.returncode == 2
    assert "Traceback" not in told
    assert re.search(r"error: .*'eleven'", told), "what the task said"
    assert "error: the pipeline failed" in done.stderr, "and the last word"
    assert "status FAILURE" in told
    assert contents(place.folder / "local" / "artifacts") == chain_artifacts


@pytest.mark.slow
def test_a_retry_succeeds(place, chain_artifacts, tmp_path):
    """Fine-tuning finds its work folder taken; when that is released, the second try gets through."""
    from mlflow import MlflowClient

    params, made = load_params(place.folder / "params.yaml"), place.folder / "chain" / "artifacts"
    inputs = {"latents": open_artifact(made / "latents", "latents"), "generator": open_artifact(made / "generator", "generator")}
    shutil.copy(place.folder / "params.yaml", tmp_path)
    other = Place(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.MonkeyPatch.context() as world:
        world.setenv("DIFFSTILL_WORK", str(tmp_path / "work"))
        lock = WorkFolder("finetune", params.finetune, inputs).folder.with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    taken = FileLock(lock)
    told: list[str] = []
    with taken, subprocess.Popen(
        other.command("--shards", "1", "--retries", "1"), cwd=tmp_path, env=other.environment() | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            told.append(line)
            if "another diffstill is at work on this very step" in line:
                taken.release(force=True)
    text = "".join(told)
    assert "another diffstill is at work on this very step" in text
    assert process.returncode == 0, text[-6000:]
    assert contents(tmp_path / "local" / "artifacts") == chain_artifacts

    client = MlflowClient(other.tracking)
    runs = client.search_runs([client.get_experiment_by_name("diffstill").experiment_id])
    (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics, "the numbers of the report"
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {step.name for step in chain(preset("tiny"))}
    # what is refused before anything is done leaves no run
    assert [run.info.status for run in children if run.info.run_name == "finetune"] == ["FINISHED"]


def test_volumes_and_gpus_of_a_cluster_are_not_looked_for_here():
    settings = load_settings(ROOT / "pipelines" / "settings.yaml").infra
    assert settings.resources["finetune"].gpus
    here = _at_hand(settings.model_copy(update={"work_claim": "work", "cache_claim": "cache", "trainjob": TrainJobConfig(nodes=2)}), retries=0)
    assert (here.work_claim, here.cache_claim, here.trainjob) == (None, None, None)
    assert {each.gpus for each in here.resources.values()} == {0}
