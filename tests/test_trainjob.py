"""A stage on the nodes of a TrainJob: how the pod of the task makes it, follows it, and takes it along when it ends."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
import yaml

from chains import Chain
from diffstill import storage, trainjob
from diffstill.artifacts import open_artifact
from diffstill.errors import DiffstillError, TransientError
from diffstill.launch import Work
from diffstill.trainjob import RIGHTS, Order, train
from kubernetes_server import RUNTIME, TOKEN, Fault, KubernetesServer, Scene
from pipelines.nodes import SHARED, order
from pipelines.settings import InfraConfig, Settings
from servers import KEY, SECRET, free_port, s3, s3_environment
from test_task import _logging_as_before, handed  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]
DONE = Scene(("Succeeded", "Succeeded"), {0: "one\ntwo\n"}, "Complete")


def infra(**trainjob_settings) -> InfraConfig:
    values = yaml.safe_load((ROOT / "pipelines" / "settings.yaml").read_text())
    values["infra"]["trainjob"] = {"nodes": 2, **trainjob_settings}
    values["infra"]["resources"]["finetune"] |= {"gpus": 0, "shared_memory": None}
    return Settings.model_validate_json(json.dumps(values)).infra


def ordered(shared: Path | None = None, **trainjob_settings) -> Order:
    found = infra(**trainjob_settings)
    made = order(found, found.trainjob, "registry/diffstill@sha256:1")
    return made.model_copy(update={"shared": str(shared) if shared else None})


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster that this process finds by its kubeconfig, and no waiting."""
    monkeypatch.setattr(trainjob, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(trainjob, "PAUSES", (0.01,) * 5)
    monkeypatch.setattr(trainjob, "FAREWELL", (0.01,) * 2)
    with KubernetesServer() as server:
        path = server.kubeconfig(tmp_path / "kubeconfig")
        monkeypatch.setenv("KUBECONFIG", str(path))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(path))
        yield server


@pytest.fixture
def work(tiny_chain: Chain, tmp_path):
    paths = {"latents": tiny_chain.artifacts / "latents", "generator": tiny_chain.artifacts / "generator", "denoiser": tmp_path / "denoiser"}
    return Work(
        stage="finetune", config=tiny_chain.params.finetune.canonical(), step="finetune", paths={name: str(path) for name, path in paths.items()}
    )


@pytest.fixture
def shared(tiny_chain: Chain, tmp_path, work):
    """A volume on which the nodes have put their output, whatever the TrainJob is called."""
    folder = tmp_path / "shared"
    shutil.copytree(tiny_chain.artifacts / "denoiser", folder / name_of(work) / "denoiser")
    return folder


URI = "s3://store/runs/denoiser"


def uris(work: Work) -> dict[str, str]:
    return {name: f"s3://store/runs/{name}" for name in work.paths}


def name_of(work: Work) -> str:
    import hashlib

    return f"finetune-{hashlib.sha256(uris(work)['denoiser'].encode()).hexdigest()[:16]}"


def run(work: Work, order: Order) -> dict[str, float]:
    return train(work, order, "denoiser", uris(work))


# --- all of it ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_nodes_fine_tune_what_lies_in_the_store(cluster, tiny_chain, tmp_path, monkeypatch, capfd):
    """Launcher, API, two nodes with the manifest's command and secrets, S3: the artifact is where Kubeflow takes it, and so are the metrics."""
    from diffstill.task import run_task

    cluster.folder = tmp_path / "nodes"
    cluster.folder.mkdir()
    with s3(tmp_path) as (url, _):
        for name, value in (s3_environment(url) | {"DIFFSTILL_CACHE": str(tmp_path / "cache"), "DIFFSTILL_CHAIN": "run-4711"}).items():
            monkeypatch.setenv(name, value)
        cluster.secrets = {"diffstill-s3/access-key": KEY, "diffstill-s3/secret-key": SECRET}
        cluster.secrets |= {"diffstill-services/mlflow-uri": "none", "diffstill-services/s3-endpoint": url}
        monkeypatch.setenv("DIFFSTILL_TRAINJOB", ordered().model_dump_json())
        boto3.Session().client("s3").create_bucket(Bucket="store")
        given, out = handed(tiny_chain.artifacts, "latents", "generator"), handed(tmp_path, "denoiser", "metrics")
        for name, one in given.items():
            storage.upload(Path(one.path), f"s3://store/runs/{name}")
        for name, one in {**given, **out}.items():
            one.uri = f"minio://store/runs/{name}"
        run_task("finetune", tiny_chain.params.finetune.canonical(), **given, **out)
        assert {item.name for item in storage.listing("s3://store/runs/denoiser")} >= {"manifest.json"}
    made, alone = (open_artifact(folder, "denoiser") for folder in (tmp_path / "denoiser", tiny_chain.artifacts / "denoiser"))
    assert made.manifest.inputs == alone.manifest.inputs
    assert out["metrics"].logged["loss"] == pytest.approx(
        json.loads((alone.folder / "seed-0" / "metrics.jsonl").read_text().splitlines()[-1])["loss"], rel=1e-2
    )
    told = capfd.readouterr()
    assert "diffstill: finetune done" in told.err, "what the main rank says"
    assert SECRET not in told.out + told.err
    assert not cluster.sent("DELETE"), "it may be looked at, and a retry finds it"
    assert {"name": "DIFFSTILL_CHAIN", "value": "run-4711"} in cluster.received[0]["spec"]["trainer"]["env"]


@pytest.mark.slow
def test_what_nodes_refuse_is_the_one_message(cluster, tiny_chain, work, tmp_path, caplog):
    """A real refusal on real nodes, by a volume that all see."""
    cluster.folder = tmp_path / "nodes"
    cluster.folder.mkdir()
    cluster.secrets = dict.fromkeys(("diffstill-s3/access-key", "diffstill-s3/secret-key", "diffstill-services/s3-endpoint"), "x")
    cluster.secrets |= {"diffstill-services/mlflow-uri": "none"}
    shutil.copytree(tiny_chain.artifacts / "denoiser", tmp_path / "shared" / name_of(work) / "latents")
    with pytest.raises(DiffstillError, match=rf"^TrainJob {name_of(work)} failed: .*latents: holds a `denoiser` artifact where") as caught:
        run(work, ordered(tmp_path / "shared"))
    assert not isinstance(caught.value, TransientError)
    assert cluster.jobs == {}
    assert not (tmp_path / "denoiser").exists()


def in_processes(given):
    import subprocess

    subprocess.run(given["command"], env=given["environment"], check=True)


@pytest.mark.slow
def test_the_local_backend_of_the_sdk_runs_the_command_of_a_node(work, tmp_path):
    """It knows functions only, and no containers: one that starts what a node would, with two ranks."""
    from kubeflow.trainer import CustomTrainer, LocalProcessBackendConfig, TrainerClient

    client = TrainerClient(LocalProcessBackendConfig())
    runtime = client.get_runtime(RUNTIME)
    runtime.trainer.framework = "python"  # with "torch" it would install torch once more
    told = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "diffstill.launch", work.model_dump_json()]
    trainer = CustomTrainer(in_processes, {"command": command, "environment": dict(os.environ) | told}, env={"PATH": os.environ["PATH"]})
    job = client.train(runtime=runtime, trainer=trainer)
    ended = client.wait_for_job_status(job, status={"Complete", "Failed"}, timeout=200, polling_interval=1)
    said = list(client.get_job_logs(job))
    assert ended.status == "Complete", said
    assert any("finetune done" in line for line in said)
    assert trainjob._last_metrics(tmp_path / "denoiser", "denoiser")["loss"] > 0


# --- the object ---------------------------------------------------------------------------------------------------


def test_the_trainjob_asks_for_what_the_settings_say(cluster, work, shared):
    run(work, ordered(shared, claim="artifacts"))
    job = cluster.received[0]
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"] == {"name": RUNTIME}
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("registry/diffstill@sha256:1", 2, 1)
    assert trainer["resourcesPerNode"]["limits"] == {"cpu": "4", "memory": "32Gi"}
    assert trainer["command"] == ["python", "-m", "diffstill.launch"]
    sent = Work.model_validate_json(trainer["args"][0])
    assert sent.paths == {name: str(shared / name_of(work) / name) for name in work.paths}
    assert (sent.stage, sent.config, sent.step) == (work.stage, work.config, work.step)


def test_kubernetes_deletes_it_with_the_pod_of_the_task(cluster, work, shared, monkeypatch):
    """Where that was killed, and had no time to do it."""
    monkeypatch.setenv("KFP_POD_NAME", "flow-x7k2p")
    monkeypatch.setenv("KFP_POD_UID", "0b1c")
    run(work, ordered(shared))
    assert cluster.received[0]["metadata"]["ownerReferences"] == [{"apiVersion": "v1", "kind": "Pod", "name": "flow-x7k2p", "uid": "0b1c"}]


def test_artifacts_reach_nodes_by_a_volume_that_is_left_clean(cluster, work, shared, tiny_chain, tmp_path):
    seen = []
    create = cluster.create

    def watched(body):
        seen.extend(open_artifact(shared / name_of(work) / kind, kind).digest for kind in ("latents", "generator"))
        return create(body)

    cluster.create = watched
    measured = run(work, ordered(shared, claim="artifacts"))
    assert seen == [open_artifact(tiny_chain.artifacts / kind, kind).digest for kind in ("latents", "generator")]
    assert open_artifact(tmp_path / "denoiser", "denoiser").digest == open_artifact(tiny_chain.artifacts / "denoiser", "denoiser").digest
    assert set(measured) == {"loss", "loss_real", "loss_gen", "memory_real", "memory_gen"}
    assert not (shared / name_of(work)).exists()


def test_hours_of_gpus_are_those_of_all_nodes_once_they_run(cluster, work, shared, monkeypatch):
    """A TrainJob may wait in a queue for days, on nobody's GPU."""
    clock = SimpleNamespace(monotonic=lambda: 3600.0 * cluster.polls, sleep=lambda _: None)
    monkeypatch.setattr(trainjob, "time", clock)  # an hour from look to look
    cluster.script = [Scene(("Pending", "Pending"))] * 3 + [Scene(), Scene(), DONE]
    measured = run(work, ordered(shared).model_copy(update={"gpus": 16}))
    assert measured["gpu_hours"] == 2 * 16


def test_nodes_that_leave_nothing_are_no_success(cluster, work, tmp_path):
    with pytest.raises(DiffstillError, match=r"shared/finetune-[0-9a-f]+/denoiser"):
        run(work, ordered(tmp_path / "shared"))
    assert not (tmp_path / "denoiser").exists()


# --- following it -------------------------------------------------------------------------------------------------


def test_what_the_main_node_says_is_printed_once(cluster, work, shared, capfd):
    """Also after a preemption, which gives the node another pod with a log of its own."""
    cluster.script = [
        Scene(("Pending", "Pending")),
        Scene(logs={0: "one\n", 1: "not told\n"}),
        Scene(logs={0: "one\ntwo\n"}),
        Scene(logs={0: "again\n"}, attempt=1),
        Scene(("Succeeded", "Succeeded"), {0: "again\nend\n"}, "Complete", attempt=1),
    ]
    run(work, ordered(shared))
    assert [line for line in capfd.readouterr().err.splitlines() if line in ("one", "two", "again", "end", "not told")] == [
        "one",
        "two",
        "again",
        "end",
    ]


@pytest.mark.parametrize(
    ("scene", "kind", "message"),
    [
        (
            Scene(("Failed", "Running"), {0: "x\nerror: `finetune.batch_size` is 3\nlast\n"}, "Failed", codes={0: 2}),
            DiffstillError,
            "failed: `finetune.batch_size` is 3$",
        ),
        (
            Scene(("Running", "Failed"), {0: "connection lost", 1: "error: rank 1 was killed by SIGKILL\n"}, "Failed", codes={1: 75}),
            TransientError,
            "failed: rank 1 was killed by SIGKILL$",
        ),
        (
            Scene(("Failed", "Failed"), {0: "Traceback\nKeyError: 'x'\n\n"}, "Failed", codes={0: 1, 1: 137}),
            TransientError,
            "failed: node-0 ends with: KeyError: 'x'$",
        ),
        (Scene((), {}, "Failed", "node-0 was evicted"), TransientError, "failed: JobsFailed, node-0 was evicted$"),
    ],
)
def test_a_trainjob_that_fails_says_why_and_is_deleted(cluster, work, shared, scene, kind, message):
    """Final is what a node refuses; the rest may end otherwise on other nodes."""
    cluster.script = [Scene(), scene]
    with pytest.raises(DiffstillError, match=message) as caught:
        run(work, ordered(shared))
    assert type(caught.value) is kind
    assert cluster.jobs == {}


def test_a_trainjob_that_has_failed_is_kept_on_request(cluster, work, shared, caplog):
    caplog.set_level(logging.INFO, logger="diffstill")
    cluster.script = [Scene((), {}, "Failed")]
    with pytest.raises(DiffstillError):
        run(work, ordered(shared, keep_failed=True))
    assert list(cluster.jobs) == [name_of(work)]
    assert f"kubectl delete trainjob {name_of(work)}" in caplog.text


@pytest.mark.parametrize("state", ["", "Complete"])
def test_a_pod_that_starts_again_goes_on_with_what_it_finds(cluster, work, shared, state):
    made = ordered(shared)
    cluster.script = [Scene(state=state), DONE]
    cluster.jobs[name_of(work)] = json.loads(json.dumps(made.job)) | {
        "metadata": {"name": name_of(work), "namespace": "team", "creationTimestamp": "2026-11-20T12:00:00Z"}
    }
    assert run(work, made)["loss"] > 0
    assert cluster.received == []
    assert not cluster.sent("DELETE")


def test_one_that_has_failed_before_is_replaced_when_it_is_gone(cluster, work, shared):
    made, cluster.lingers = ordered(shared), 2
    cluster.jobs[name_of(work)] = json.loads(json.dumps(made.job)) | {
        "metadata": {"name": name_of(work), "namespace": "team", "creationTimestamp": "2026-11-20T12:00:00Z"}
    }
    create, scripts = cluster.create, iter([[Scene(state="Failed")], [DONE]])
    cluster.script = next(scripts)

    def renewed(body):
        answer = create(body)
        cluster.script = next(scripts)
        return answer

    cluster.create = renewed
    assert run(work, made)["loss"] > 0
    assert len(cluster.received) == 1
    assert len(cluster.sent("DELETE")) == 1
    version = ("", "configmaps", "get")  # the SDK's look at the version of the Trainer, in its namespace; refused here, and without harm
    assert [path for _method, path in cluster.requests if "/configmaps/" in path] == [
        "/api/v1/namespaces/kubeflow-system/configmaps/kubeflow-trainer-public"
    ]
    assert cluster.rights - {version} == {(right.group, right.resource, verb) for right in RIGHTS for verb in right.verbs}, "no more and no less"


# --- an API that is not well --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 429, 500, 503])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "trainjobs"), ("GET", "trainjobs/"), ("GET", "pods"), ("GET", "clustertrainingruntimes"), ("GET", "/log")]
)
def test_an_api_that_stumbles_is_asked_again(cluster, work, shared, status, method, path):
    cluster.fault = Fault(status, 2, method, path)
    assert run(work, ordered(shared))["loss"] > 0
    assert cluster.fault.times == 0
    assert not cluster.sent("DELETE")


@pytest.mark.parametrize("status", [0, 504])
def test_a_trainjob_whose_creation_was_not_confirmed_is_not_made_twice(cluster, work, shared, status):
    cluster.fault = Fault(status, 1, "POST", "trainjobs", served=True)
    assert run(work, ordered(shared))["loss"] > 0
    assert len(cluster.received) == 1


def test_an_api_that_stays_away_is_one_message_and_the_trainjob_is_deleted_if_it_can_be(cluster, work, shared, caplog):
    cluster.fault = Fault(503, 1000, "GET", message="etcd is away")
    with pytest.raises(TransientError, match=r"^Kubernetes does not answer .etcd is away.; see to its API server"):
        run(work, ordered(shared))
    assert cluster.jobs == {}
    cluster.fault = Fault(503, 1000, message="etcd is away")
    with pytest.raises(DiffstillError, match="etcd is away"):
        run(work, ordered(shared))
    assert "may still hold GPUs" in caplog.text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            Fault(403, 99, "POST", message='User "x" cannot create resource "trainjobs"'),
            r"403, User .* cannot create .*; allow .*diffstill.trainjob.RIGHTS",
        ),
        (Fault(401, 99, "POST", message=f"Unauthorized {TOKEN}"[:12]), "401, Unauthorized.*RIGHTS"),
        (Fault(404, 99, "POST", message="the server could not find the requested resource"), "404, .*see that Kubeflow Trainer v2"),
        (Fault(422, 99, "POST", message="spec.trainer: Invalid"), "422, spec.trainer: Invalid.; change `infra.trainjob`"),
        (
            Fault(404, 99, "GET", "clustertrainingruntimes", 'clustertrainingruntimes "gone" not found'),
            "404, .*gone.*see that Kubeflow Trainer v2 and the runtime",
        ),
    ],
)
def test_what_kubernetes_refuses_is_one_message_at_once(cluster, work, shared, fault, message):
    cluster.fault = fault
    with pytest.raises(DiffstillError, match=message) as caught:
        run(work, ordered(shared))
    assert fault.times == 98, "asked again"
    assert TOKEN not in str(caught.value)
    assert cluster.jobs == {}


def test_a_trainjob_that_somebody_deletes_ends_the_task(cluster, work, shared):
    cluster.script = [Scene()]
    scene = cluster.scene

    def gone():
        cluster.jobs.clear()
        return scene()

    cluster.scene = gone
    with pytest.raises(DiffstillError, match=r"404, trainjobs.*not found.*nobody else deletes"):
        run(work, ordered(shared))


def test_artifacts_that_nodes_cannot_read_are_refused_before_anything_is_made(cluster, work):
    with pytest.raises(
        DiffstillError, match=r"`latents` lies at 'gs://bucket/latents', which nodes cannot read; keep artifacts in S3, or set `infra.trainjob.claim`"
    ):
        train(work, ordered(), "denoiser", {name: f"gs://bucket/{name}" for name in work.paths})
    assert cluster.requests == []


def test_without_a_cluster_it_is_one_message(work, shared, monkeypatch, tmp_path):
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(DiffstillError, match="no Kubernetes cluster is known here"):
        run(work, ordered(shared))


# --- the end of the pod -------------------------------------------------------------------------------------------

DRIVER = """
import json, sys
from diffstill import trainjob
from diffstill.launch import Work, one_message
trainjob.POLL_SECONDS = 0.05
work, order, uris = json.loads(sys.stdin.read())
with one_message():
    trainjob.train(Work.model_validate(work), trainjob.Order.model_validate(order), "denoiser", uris)
"""


@pytest.mark.parametrize(("number", "stumbles", "keep"), [(signal.SIGTERM, 0, False), (signal.SIGTERM, 1, True), (signal.SIGINT, 0, False)])
def test_a_pod_that_is_cancelled_takes_its_trainjob_along(cluster, work, shared, number, stumbles, keep):
    """Also one that would be kept had it failed, and if the API stumbles."""
    cluster.script = [Scene()]
    given = json.dumps([work.model_dump(), ordered(shared, keep_failed=keep).model_dump(), uris(work)])
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as pod:
        pod.stdin.write(given)
        pod.stdin.close()
        while not cluster.polls:
            assert pod.poll() is None, pod.stderr.read()
            time.sleep(0.05)
        cluster.fault = Fault(503, stumbles, "DELETE")
        pod.send_signal(number)
        said = pod.stderr.read()
        pod.wait(30)
    assert pod.returncode in (128 + number, -number)
    assert cluster.jobs == {}, said
    assert len(cluster.sent("DELETE")) == 1 + stumbles
    assert number == signal.SIGINT or "Traceback" not in said


def test_the_volume_is_where_the_settings_mount_it():
    found = infra(claim="artifacts")
    assert order(found, found.trainjob, "x").shared == SHARED
    assert order(infra(), infra().trainjob, "x").shared is None
