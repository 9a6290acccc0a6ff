"""`python -m pipelines` against a server that speaks the real interface: submit, watch, logs, cancel, fetch and schedule."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
import yaml
from click.testing import CliRunner
from kfp_server import SENTINEL, Fault, lonely_server

from chains import contents
from components.images import TAGGED, load_images
from diffstill.artifacts import new_artifact, open_artifact
from diffstill.config import Params, preset, render_params
from diffstill.errors import DiffstillError
from hub import hub
from pipelines.__main__ import SETTINGS, main
from pipelines.client import Cluster
from pipelines.package import write_package
from pipelines.settings import load_settings
from pipelines.submission import pinned, prepare
from servers import free_port, s3, s3_environment

IMAGES = {name: f"registry.example.org/diffstill@sha256:{number * 64}" for name, number in (("cpu", "1"), ("gpu", "2"))}
POD = "flow-x7k2p-system-container-impl-{}3"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with lonely_server(monkeypatch, tmp_path / "home") as running:
        yield running


@pytest.fixture
def project(server, tmp_path, monkeypatch):
    """A clean git checkout with parameters, settings that name the server, and images by digest."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    settings = yaml.safe_load(SETTINGS.read_text())
    settings["cluster"] |= {"host": server.url, "token_env": "KFP_TOKEN", "pipeline_root": "s3://bucket/runs"}
    settings["infra"]["service_account"] = "runner"
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    (folder / "params.yaml").write_text(render_params(preset("tiny")))
    (folder / "images.lock").write_text(json.dumps(IMAGES))
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "start")
    return folder


def git(*arguments):
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def call(*arguments):
    """Run a command, in a thread of its own: kfp looks at the source of every caller of every setting of a task, and pytest's are many."""
    with ThreadPoolExecutor(1) as alone:
        done = alone.submit(CliRunner().invoke, main, [str(argument) for argument in arguments], prog_name="python -m pipelines").result()
    assert SENTINEL not in done.output
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def on(command, *arguments):
    return call(*command.split(), *arguments, "--settings", "settings.yaml")


def submit(*arguments):
    return on("submit", "--images-lock", "images.lock", *arguments)


def refused(done):
    """The one message of a command that has been refused."""
    assert done.exit_code == 2, done.output
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.output
    return done.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "distill.yaml"
    with ThreadPoolExecutor(1) as alone:
        alone.submit(write_package, load_settings(SETTINGS), TAGGED, path).result()
    return path


@pytest.fixture
def run_id(project, package):
    return Cluster.connect(load_settings(project / "settings.yaml").cluster).submit(package, {}, "trial")


# --- submit -------------------------------------------------------------------------------------------------------


def test_a_submitted_run_is_watched_to_its_end(project, server):
    server.script = [{"prepare": "RUNNING"}, {"prepare": "SUCCEEDED", "finetune": "RUNNING"}, {"prepare": "SUCCEEDED", "finetune": "SUCCEEDED"}]
    done = submit("--wait", "--name", "trial")
    assert done.exit_code == 0, done.output
    (run,) = server.runs.values()
    assert done.stdout.splitlines() == [
        f"run   {run.run_id}",
        f"page  {server.url}/#/runs/details/{run.run_id}",
        "running    prepare",
        "succeeded  prepare",
        "running    finetune",
        "succeeded  finetune",
        f"run {run.run_id} succeeded",
    ]
    assert (run.display_name, run.service_account, run.runtime_config.pipeline_root) == ("trial", "runner", "s3://bucket/runs")
    assert json.loads(run.runtime_config.parameters["params"]) == preset("tiny").plain()
    assert not any(SENTINEL in str([request.path, request.query, request.body]) for request in server.requests)


def test_a_failed_run_ends_with_1_and_the_message_of_its_task(project, server):
    server.script, server.final = [{"prepare": "SUCCEEDED", "finetune": "FAILED"}], "FAILED"
    server.logs[POD.format(2)] = "loading\nDiffstillError: latents: damaged\n"
    done = submit("--wait")
    assert done.exit_code == 1
    assert "failed: the workflow failed" in done.stdout
    assert done.stderr == "finetune failed:\n    loading\n    DiffstillError: latents: damaged\n"


def test_following_prints_what_the_tasks_say(project, server):
    server.script = [{"prepare": "RUNNING"}, {"prepare": "SUCCEEDED", "report": "RUNNING"}, {"prepare": "SUCCEEDED", "report": "SUCCEEDED"}]
    server.logs |= {POD.format(1): "read 90 images\n", POD.format(2): "78.1 %"}
    done = submit("--follow")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[2:] == [
        "running    prepare",
        "prepare: read 90 images",
        "succeeded  prepare",
        "running    report",
        "succeeded  report",
        "report: 78.1 %",
        f"run {next(iter(server.runs))} succeeded",
    ]


def test_waiting_has_an_end_but_the_run_goes_on(project, server):
    server.final = "RUNNING"
    message = refused(submit("--wait", "--timeout", "0.001"))
    assert "still running after 0.001 minutes and goes on" in message
    assert not server.sent("POST", ".*:terminate")


def test_a_dry_run_prints_what_would_be_sent_and_sends_nothing(project, server):
    done = submit("--dry-run", "--experiment", "trials")
    told = json.loads(done.stdout)
    assert server.requests == []
    assert told["cluster"]["experiment"] == "trials"
    assert told["cluster"]["token_env"] == "KFP_TOKEN"
    assert told["arguments"]["prepare"] == preset("tiny").prepare.plain()
    assert (told["images"], told["caching"], told["service_account"]) == (IMAGES, True, "runner")
    submit()
    (version,) = server.versions.values()
    assert version.display_name == told["version"]


def test_a_submitted_run_publishes_unless_told(project, server):
    asked, silent = (json.loads(submit("--dry-run", *options).stdout)["arguments"] for options in ((), ("--no-publish",)))
    assert asked["publish"] == preset("tiny").publish.plain()
    assert silent["publish"] == ""
    assert on("schedule create", "--images-lock", "images.lock", "--every", "3600", "--no-publish").exit_code == 0
    (recurring,) = server.recurring.values()
    assert recurring.runtime_config.parameters["publish"] == ""


def test_a_dry_run_needs_no_cluster(project):
    settings = yaml.safe_load(Path("settings.yaml").read_text())
    settings["cluster"] |= {"host": None, "token_env": None}
    Path("settings.yaml").write_text(yaml.safe_dump(settings))
    assert json.loads(submit("--dry-run", "--allow-dirty").stdout)["cluster"]["host"] is None
    assert "s3cret" not in refused(submit("--dry-run", "--allow-dirty", "--host", "https://ada:s3cret@example.org"))
    assert "no host of Kubeflow Pipelines is given" in refused(submit("--allow-dirty"))


def test_weights_on_the_hub_are_pinned_and_those_of_this_machine_refused(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    values = preset("tiny").plain()
    values["pretrain"] |= {"source": "folder", "location": "hf://someone/DiT@main", "autoencoder": "hf://someone/DiT@v1"}
    with hub(tmp_path, "someone/DiT", {"main": "a" * 40, "v1": "b" * 40}) as (url, _):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        found = pinned(Params.model_validate_json(json.dumps(values)), allow_unpushed=False).pretrain
    assert (found.location, found.autoencoder) == (f"hf://someone/DiT@{'a' * 40}", f"hf://someone/DiT@{'b' * 40}")
    settings = load_settings(SETTINGS)
    wrong = [("location", "models/dit", "path of this machine"), ("autoencoder", "models/vae", "path of this machine")]
    for name, place, said in [*wrong, ("location", "s3://models/DiT.pt", "names a file, .* give 's3://models'")]:
        values["pretrain"] |= {"location": "s3://models/dit", "autoencoder": None, name: place}
        with pytest.raises(DiffstillError, match=rf"`pretrain.{name}` '{place}' .*{said}"):
            prepare(
                Params.model_validate_json(json.dumps(values)), settings, load_images(allow_tag=True), name=None, caching=True, publish=False,
                allow_unpushed=True,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"params.yaml": ("steps: 12 ", "steps: -12 ")}, "steps"),
        ({"params.yaml": ("classes:     ", "classes: [1] ")}, "sample.classes"),
        ({"settings.yaml": ("pipeline_root: s3:", "pipeline_root: ftp:")}, "pipeline_root"),
        ({"images.lock": ("@sha256:" + "1" * 64, ":latest")}, "--allow-tag"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_sent(project, server, change, said):
    for name, (old, new) in change.items():
        text = (project / name).read_text()
        assert old in text, text
        (project / name).write_text(text.replace(old, new))
    git("commit", "--all", "--message", "a mistake")
    assert said in refused(submit())
    assert server.requests == []


def test_code_that_git_does_not_hold_is_refused_unless_told(project, server):
    (project / "params.yaml").write_text((project / "params.yaml").read_text() + "# changed\n")
    assert "--allow-dirty" in refused(submit())
    assert server.requests == []
    assert submit("--allow-dirty").exit_code == 0
    assert len(server.runs) == 1


def test_a_folder_without_git_is_refused_unless_told(project, server):
    (project / ".git").rename(project.parent / "git")
    assert "no git checkout" in refused(submit())
    assert server.requests == []


def locate(project, location, pretrain=None):
    params = preset("folder")
    params = params.model_copy(
        update={
            "prepare": params.prepare.model_copy(update={"location": location}),
            "pretrain": params.pretrain.model_copy(update=pretrain or {}),
            "publish": params.publish.model_copy(update={"name": "distilled-pets"}),
        }
    )
    (project / "params.yaml").write_text(render_params(params))
    git("commit", "--all", "--message", "data")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A DVC repository with a folder of images and an empty remote; how to push."""
    folder = tmp_path / "data"
    (folder / "images/cat").mkdir(parents=True)
    (folder / "images/cat/1.png").write_bytes(b"a cat")

    def dvc(*arguments):
        subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, check=True, capture_output=True)

    with monkeypatch.context() as world:
        world.chdir(folder)
        git("init", "--quiet", "--initial-branch", "main")
        dvc("init", "--quiet")
        dvc("remote", "add", "--default", "store", str(tmp_path / "store"))
        dvc("add", "--quiet", "images")
        git("add", ".")
        git("commit", "--quiet", "--message", "images")
    return folder, lambda: dvc("push", "--quiet")


def test_data_is_pinned_and_must_have_been_pushed_unless_told(project, server, data):
    folder, push = data
    locate(project, f"dvc+file://{folder}?rev=main&path=images")
    assert "dvc push" in refused(submit())
    assert server.requests == []
    assert submit("--allow-unpushed").exit_code == 0
    push()
    assert submit().exit_code == 0
    sent = [json.loads(run.runtime_config.parameters["prepare"])["location"] for run in server.runs.values()]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    assert sent[0] == sent[1]
    assert f"rev={commit}" in sent[0]
    assert "md5=" in sent[0]


def test_data_on_this_machine_alone_is_refused(project, server):
    locate(project, "data/images")
    assert "a path of this machine" in refused(submit())
    assert server.requests == []


def test_images_by_tag_are_never_cached(project, server):
    submit()
    (project / "images.lock").write_text(json.dumps({"cpu": "diffstill:cpu", "gpu": "diffstill:gpu"}))
    done = submit("--allow-dirty", "--allow-tag")
    assert done.exit_code == 0
    assert "caching is off" in done.stderr
    digest, tag = (package.decode() for package in server.packages.values())
    assert "enableCache: true" in digest
    assert "enableCache" not in tag
    assert "diffstill:gpu" in tag


def test_without_cache_every_task_runs_anew(project, server):
    assert "caching is off" not in submit("--no-cache").stderr
    (package,) = server.packages.values()
    assert b"enableCache" not in package


def test_refused_credentials_end_in_one_message(project, server):
    server.fault = Fault(401, json.dumps({"message": f"token {SENTINEL} is expired"}))
    assert "refuses (401, token *** is expired)" in refused(submit())


def test_a_host_that_does_not_answer_ends_in_one_message(project):
    port = free_port()
    assert f"http://127.0.0.1:{port}: does not answer" in refused(submit("--host", f"http://127.0.0.1:{port}"))


def test_no_secret_is_in_what_is_sent(project, server, monkeypatch):
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "s3ntinel")
    submit("--wait")
    assert server.packages
    assert not any(b"s3ntinel" in request.body for request in server.requests)
    assert not any(str(project).encode() in request.body for request in server.requests)


# --- watch, logs, cancel ------------------------------------------------------------------------------------------


def test_a_run_can_be_watched_again(server, run_id):
    server.script, server.final = [{"train": "FAILED"}], "FAILED"
    server.errors = {"train": "out of memory"}
    done = on("watch", run_id)
    assert done.exit_code == 1
    assert "train failed:\n    out of memory" in done.stderr
    assert "has no run nobody" in refused(on("watch", "nobody"))


def test_ctrl_c_ends_the_watching_and_not_the_run(project, server, run_id):
    server.final = "RUNNING"
    command = [sys.executable, "-m", "pipelines", "watch", run_id, "--settings", "settings.yaml"]
    environment = os.environ | {"PYTHONPATH": str(SETTINGS.parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as watching:
        assert watching.stdout.readline() == "succeeded  train\n"
        time.sleep(0.2)
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert f"python -m pipelines cancel {run_id}" in said
    assert "Traceback" not in said
    assert server.runs[run_id].state == "RUNNING"


def test_logs_are_those_of_the_pods_of_all_tasks_or_of_one(server, run_id):
    server.script = [{"prepare": "SUCCEEDED", "finetune": "RUNNING", "report": "PENDING"}]
    server.attempts = {"finetune": 2}
    server.logs = {POD.format(1): "read\n", "flow-x7k2p-system-container-impl-240": "killed", "flow-x7k2p-system-container-impl-241": "step 1\nste"}
    assert on("logs", run_id).stdout.splitlines() == ["prepare: read", "finetune: killed", "finetune: step 1", "finetune: ste"]
    assert on("logs", run_id, "--task", "prepare").stdout == "prepare: read\n"
    asked = server.sent("GET", "/k8s/pod/logs")[0]
    assert dict(asked.query) == {"podname": POD.format(1), "runid": run_id, "createdat": "2026-11-20"}


def test_logs_can_be_followed(server, run_id):
    server.script = [{}, {"prepare": "RUNNING"}, {"prepare": "SUCCEEDED"}]
    server.logs = {POD.format(1): "read"}
    assert on("logs", run_id, "--follow", "--task", "prepare").stdout == "prepare: read\n"
    assert server.polls[run_id] == 3


def test_a_task_without_a_pod_is_no_riddle(server, run_id):
    server.script = [{"prepare": "SKIPPED", "report": "PENDING"}]
    assert "has no log (prepare skipped); a task has no pod before its turn" in refused(on("logs", run_id, "--task", "prepare"))
    assert "has no task 'finetune'; it has prepare, report" in refused(on("logs", run_id, "--task", "finetune"))


def test_a_pod_that_has_been_removed_is_named(server, run_id):
    assert f"train: {server.url}: fails with log of pod {POD.format(1)}, which may have been removed" in on("logs", run_id).stdout


def test_cancelling_twice_is_cancelling_once(server, run_id):
    server.final = "RUNNING"
    assert on("cancel", run_id).stderr == f"run {run_id} is being stopped\n"
    assert on("cancel", run_id).stderr == f"run {run_id} is canceled already\n"
    assert len(server.sent("POST", ".*:terminate")) == 1
    assert "has no run nobody" in refused(on("cancel", "nobody"))


# --- fetch --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with s3(tmp_path_factory.mktemp("s3")) as (endpoint, _process):
        yield endpoint


@pytest.fixture
def bucket(store, monkeypatch):
    for name, value in s3_environment(store).items():
        monkeypatch.setenv(name, value)
    made = boto3.resource("s3").Bucket("bucket")
    made.create()
    yield made
    made.objects.delete()
    made.delete()


@pytest.fixture
def made(tmp_path):
    """Artifacts as a chain makes them, by their place in its layout, and a shard of one."""
    params, root = preset("tiny"), tmp_path / "made"
    facts = {
        "images": ("images", {}),
        "distilled": ("distilled", {"source": "distilled"}),
        "untuned": ("distilled", {"source": "untuned"}),
        "part": ("distilled", {"source": "distilled", "shard": "0/2"}),
        "scores/distilled-convnet-2": ("scores", {"sources": ["distilled"], "students": ["convnet-2"]}),
        "scores/real-convnet-2": ("scores", {"sources": ["full", "random"], "students": ["convnet-2"]}),
        "report": ("report", {}),
        "card": ("card", {}),
    }
    for place, (kind, said) in facts.items():
        with new_artifact(root / place, kind, params.prepare, {}) as draft:
            (draft.folder / "sub").mkdir()
            (draft.folder / "sub/data.txt").write_text(place)
            draft.facts |= said
    return root


@pytest.fixture
def outputs(bucket, made, run_id):
    """The artifacts where a cluster keeps those of the run: <pipeline>/<run>/<task>/<execution>/<output>/; how to put more."""
    tasks = {
        "part": "sample",
        "distilled": "sample-3",
        "untuned": "sample-4",
        "scores/real-convnet-2": "evaluate",
        "scores/distilled-convnet-2": "evaluate-2",
    }

    def put(place):
        name = {"part": "distilled", "untuned": "distilled"}.get(place, place.partition("/")[0])
        for path in (made / place).rglob("*.*"):
            key = f"runs/diffstill-distill/{run_id}/{tasks.get(place, name)}/6f1c/{name}/{path.relative_to(made / place)}"
            bucket.upload_file(str(path), key)
        bucket.put_object(Key=f"runs/diffstill-distill/{run_id}/{tasks.get(place, name)}/6f1c/metrics", Body=b"{}")

    for place in ("images", "distilled", "untuned", "part", "scores/distilled-convnet-2", "scores/real-convnet-2", "report"):
        put(place)
    return put


def test_the_card_is_fetched_where_the_run_made_one(project, outputs, run_id):
    assert "has no card; wait" in refused(on("fetch", run_id, "--output", "artifacts", "--only", "card"))
    outputs("card")
    assert on("fetch", run_id, "--output", "artifacts", "--only", "card").stderr == "fetched artifacts/card\n"
    assert open_artifact(project / "artifacts/card", "card").manifest.kind == "card"


def test_a_run_is_fetched_as_the_chain_lays_it_out(project, outputs, made, run_id):
    done = on("fetch", run_id, "--output", "artifacts")
    assert done.exit_code == 0, done.output
    expected = {name: digest for name, digest in contents(made).items() if not name.startswith(("part", "card"))}
    assert contents(project / "artifacts") == expected
    assert "fetched artifacts/report" in done.stderr
    assert on("fetch", run_id, "--output", "artifacts", "--only", "report").stderr == "artifacts is up to date\n"


def test_data_in_a_bucket_has_a_version_that_changes_with_it(project, server, bucket, monkeypatch):
    """The cache of the cluster knows a task by its arguments: other data below the same prefix must be another argument."""

    def version(of="data_version"):
        return json.loads(submit("--dry-run").stdout)["arguments"][of]

    locate(project, "s3://bucket/data", pretrain={"source": "folder", "location": "s3://bucket/weights", "autoencoder": None})
    bucket.put_object(Key="weights/model_index.json", Body=b"{}")
    bucket.put_object(Key="data/train/a/1.png", Body=b"one")
    first = version()
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert version() == first
    bucket.put_object(Key="data/train/a/1.png", Body=b"two")
    assert (second := version()) != first
    weights = version("weights_version")
    bucket.put_object(Key="weights/model_index.json", Body=b"[]")
    assert version("weights_version") != weights, "which were imported anew each time before the stage fetched them"
    assert version() == second, "and the data have not changed"

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = submit("--dry-run")
    assert "cannot list the data from here" in done.stderr
    assert json.loads(done.stdout)["arguments"]["data_version"] != version(), "read anew each time"
    assert server.requests == []


def test_some_artifacts_can_be_fetched(project, outputs, run_id):
    assert on("fetch", run_id, "--output", "artifacts", "--only", "report,untuned").exit_code == 0
    assert sorted(path.name for path in (project / "artifacts").iterdir()) == ["report", "untuned"]
    assert open_artifact(project / "artifacts/untuned", "distilled").facts["source"] == "untuned"
    assert "--only reports: no artifact of a run" in refused(on("fetch", run_id, "--output", "artifacts", "--only", "reports"))


def test_a_damaged_artifact_is_refused_and_nothing_appears(project, outputs, bucket, run_id):
    bucket.put_object(Key=f"runs/diffstill-distill/{run_id}/report/6f1c/report/sub/data.txt", Body=b"flipped")
    assert "content differs from the digest" in refused(on("fetch", run_id, "--output", "artifacts", "--only", "images,report"))
    assert contents(project / "artifacts") == {}


def test_what_is_there_is_not_replaced_by_something_else(project, outputs, run_id):
    (project / "artifacts/report").mkdir(parents=True)
    (project / "artifacts/report/mine.txt").write_text("mine")
    assert "is there already and differs" in refused(on("fetch", run_id, "--output", "artifacts", "--only", "images,report"))
    assert list(contents(project / "artifacts")) == ["report/mine.txt"]


def test_what_a_run_has_not_made_is_named(outputs, run_id):
    assert "has no denoiser; wait until the run has finished" in refused(on("fetch", run_id, "--output", "artifacts", "--only", "report,denoiser"))


def test_a_run_that_has_left_nothing_is_told(bucket, run_id):
    assert f"s3://bucket/runs/diffstill-distill/{run_id}: holds no object" in refused(on("fetch", run_id, "--output", "artifacts"))


def test_where_outputs_are_must_be_known(project, server, run_id):
    server.runs[run_id].runtime_config.pipeline_root = None
    settings = Path("settings.yaml").read_text()
    Path("settings.yaml").write_text(settings.replace("pipeline_root: s3://bucket/runs", "pipeline_root: null"))
    assert "set `cluster.pipeline_root`" in refused(on("fetch", run_id, "--output", "artifacts"))


# --- schedule -----------------------------------------------------------------------------------------------------


def test_a_schedule_lives_until_it_is_deleted(project, server):
    create = ("schedule create", "--images-lock", "images.lock", "--name", "weekly")
    made = on(*create, "--cron", "0 0 3 * * 1")
    assert made.exit_code == 0, made.output
    schedule = made.stdout.split()[1]
    assert on("schedule list").stdout == f"{schedule}  on   0 0 3 * * 1  weekly\n"
    assert on("schedule disable", schedule).exit_code == 0
    assert on("schedule list").stdout == f"{schedule}  off  0 0 3 * * 1  weekly\n"
    assert on("schedule delete", schedule).exit_code == 0
    assert on("schedule list").stdout == ""
    assert "has no schedule" in refused(on("schedule delete", schedule))
    assert on(*create, "--every", "3600").exit_code == 0
    assert [one.trigger.periodic_schedule.interval_second for one in server.recurring.values()] == ["3600"]


def test_a_schedule_takes_data_and_weights_as_they_are_when_it_runs(project, server, bucket):
    locate(project, "s3://bucket/data", pretrain={"source": "folder", "location": "s3://bucket/weights"})
    assert on("schedule create", "--images-lock", "images.lock", "--every", "3600").exit_code == 0
    (recurring,) = server.recurring.values()
    versions = [recurring.runtime_config.parameters[name] for name in ("data_version", "weights_version")]
    assert versions == ["[[CurrentTime]]", "[[CurrentTime]]"]


def test_a_schedule_records_the_weights_that_it_runs(tmp_path, monkeypatch):
    """Pinned when it is made, unlike the data; `params` is what the run in MLflow tells of it."""
    (tmp_path / "config.json").write_text("{}")
    values = preset("tiny").plain()
    values["prepare"] |= {"source": "folder", "location": "https://example.org/data.tar", "classes": None}
    values["pretrain"] |= {"source": "folder", "location": "hf://someone/DiT@main"}
    values["publish"]["name"] = "distilled-flowers"
    params, images = Params.model_validate_json(json.dumps(values)), load_images(allow_tag=True)
    with hub(tmp_path, "someone/DiT", {"main": "a" * 40}) as (url, _):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        order = prepare(params, load_settings(SETTINGS), images, name=None, caching=True, publish=False, allow_unpushed=True)
    sent = order.repeating().arguments
    recorded = Params.model_validate_json(sent["params"])
    assert type(recorded.pretrain).model_validate_json(sent["pretrain"]) == recorded.pretrain
    assert type(recorded.prepare).model_validate_json(sent["prepare"]) == recorded.prepare == params.prepare
    assert recorded.pretrain.location == f"hf://someone/DiT@{'a' * 40}"


@pytest.mark.parametrize(
    ("when", "said"),
    [(("--cron", "0 3 * * 1"), "does not have six fields"), ((), "either --cron or --every"), (("--cron", "0 0 3 * * 1", "--every", "60"), "either")],
)
def test_a_schedule_says_when(project, server, when, said):
    assert said in refused(on("schedule create", "--images-lock", "images.lock", *when))
    assert server.requests == []


def test_the_help_names_every_command():
    shown = call("--help").stdout
    assert all(name in shown for name in ("submit", "watch", "logs", "cancel", "fetch", "schedule"))
