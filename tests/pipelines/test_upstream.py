"""What is sent to a cluster against the rules of those who will read it: a table of rules, each with the file that has it.

No cluster is needed to break them, and no schema knows them: a webhook, a controller or the backend does.
"""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import kubernetes_server
from components.images import load_images
from diffstill.config import Params, preset
from diffstill.launch import Work
from diffstill.trainjob import RIGHTS, _completed
from pipelines.nodes import order
from pipelines.package import write_package
from pipelines.settings import Settings, load_settings
from pipelines.submission import prepare

ROOT = Path(__file__).parents[2]
LOCK = Path(__file__).with_name("golden") / "images.lock"
ARGO, KFP, TRAINER, KUBERNETES = "argo-workflows v4.0.5", "pipelines 2.17.0", "trainer v2.3.0", "kubernetes v1.36"
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")


@dataclass(frozen=True)
class Sent:
    """What one submission, one schedule and one `kubectl apply` send."""

    settings: Settings
    spec: dict[str, Any]
    platform: dict[str, Any]
    manifests: dict[str, Any]
    changed: dict[str, Any]
    """Manifests under other settings."""
    arguments: dict[str, Any]
    trainjob: dict[str, Any]

    def tasks(self):
        """Every task with the component that it runs, loops and branches included."""
        for part in (self.spec["root"], *self.spec["components"].values()):
            for task in part.get("dag", {}).get("tasks", {}).values():
                yield task, self.spec["components"][task["componentRef"]["name"]]

    def pods(self):
        return self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def settings(**changes):
    """Settings that use every knob."""
    values = yaml.safe_load((ROOT / "pipelines" / "settings.yaml").read_text())
    values["infra"] |= {"queue": "gpu-queue", "priority": "gpu-runs", "service_account": "runner", "work_claim": "checkpoints"}
    values["infra"]["trainjob"] = {"nodes": 2}
    spot = {"gpus": 1, "retries": 12, "retry_seconds": 60, "timeout_minutes": 300, "node_selector": {"pool": "spot"}}
    values["infra"]["resources"] |= {"sample": spot, **changes}
    return Settings.model_validate_json(json.dumps(values))


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("sent"), load_images(LOCK)
    given, other = settings(), settings(report={"cpu": "2"})

    def compiled(settings, name, **how):
        with ThreadPoolExecutor(1) as alone:  # kfp looks at the source of every caller, and pytest's are many
            alone.submit(write_package, settings, images, folder / name, **how).result()
        return list(yaml.load_all((folder / name).read_text(), Loader=yaml.CSafeLoader))

    spec, platform = compiled(given, "package.yaml")
    first, second = ({each["kind"]: each for each in compiled(one, "manifests.yaml", kubernetes=True)} for one in (given, other))
    values = preset("tiny").plain()
    values["prepare"] |= {"source": "folder", "location": "https://example.org/data.tar", "classes": None}
    values["publish"] |= {"name": "distilled-flowers", "note": "{{$}} $(HOME) [[RunUUID]]"}
    run = prepare(Params.model_validate_json(json.dumps(values)), given, images, name=None, caching=True, publish=True, allow_unpushed=True)
    work = Work(stage="finetune", config="{}", step="finetune", paths={})
    job = _completed(order(given.infra, given.infra.trainjob, images.gpu).job, f"finetune-{16 * 'f'}", work)
    return Sent(given, spec, platform, first, second, dict(run.repeating().arguments), job)


# --- the rules ----------------------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def retries_last_as_long_as_all_attempts(sent):
    """`maxDuration` counts from the start of the first attempt, and what is left of it is the deadline of the last."""
    timeouts = {name: int(pod["activeDeadlineSeconds"]) for name, pod in sent.pods().items() if "activeDeadlineSeconds" in pod}
    assert timeouts
    seen = 0
    for task, component in sent.tasks():
        if retry := task.get("retryPolicy"):
            number, factor = retry["maxRetryCount"], retry["backoffFactor"]
            pauses = sum(seconds(retry["backoffDuration"]) * factor**attempt for attempt in range(number))
            longest = timeouts.get(component["executorLabel"], 86400)
            assert seconds(retry["backoffMaxDuration"]) >= (number + 1) * longest + pauses, task["taskInfo"]
            seen += 1
    assert seen > 10


def retries_grow_by_a_whole_number(sent):
    """Argo reads `factor` as an integer."""
    factors = {task["retryPolicy"]["backoffFactor"] for task, _ in sent.tasks() if "retryPolicy" in task}
    assert {1.0, 2.0} >= factors
    assert all(factor.is_integer() for factor in factors)


def pauses_are_as_long_as_the_settings_allow(sent):
    for task, _ in sent.tasks():
        if retry := task.get("retryPolicy"):
            assert seconds(retry["backoffDuration"]) * retry["backoffFactor"] ** (retry["maxRetryCount"] - 1) <= 600


def macros_are_those_that_a_run_fills_in(sent):
    """`NewRunParameterFormatter` disables ScheduledTime and Index."""
    used = re.findall(r"\[\[[A-Z].*?\]\]", json.dumps(sent.arguments))
    assert used
    assert all(re.fullmatch(r"\[\[(RunUUID|CurrentTime(\..*)?)\]\]", macro) for macro in used)


def the_webhook_takes_the_trainjob(sent):
    kubernetes_server._check(sent.trainjob | {"spec": sent.trainjob["spec"] | {"runtimeRef": {"name": kubernetes_server.RUNTIME}}})


def a_trainjob_is_named_like_its_pods_services(sent):
    assert re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name := sent.trainjob["metadata"]["name"])
    assert len(f"{name}-node-0-{sent.trainjob['spec']['trainer']['numNodes'] - 1}-abcde") <= 63


def a_trainjob_is_never_changed(_sent):
    """What patches a runtime may be changed while the TrainJob is suspended alone."""
    assert {verb for right in RIGHTS if right.resource == "trainjobs" for verb in right.verbs} == {"create", "get", "delete"}


def a_trainjob_waits_as_long_as_it_may(sent):
    """Its own deadline begins anew when a queue admits it; that of the pod that follows it does not."""
    (launcher,) = (pod for name, pod in sent.pods().items() if "finetune" in name)
    assert int(launcher["activeDeadlineSeconds"]) > sent.trainjob["spec"]["activeDeadlineSeconds"] + 7 * 86400


def a_version_is_never_changed(sent):
    names = [found["PipelineVersion"]["metadata"]["name"] for found in (sent.manifests, sent.changed)]
    specs = [found["PipelineVersion"]["spec"]["pipelineSpec"] for found in (sent.manifests, sent.changed)]
    assert specs[0] != specs[1]
    assert names[0] != names[1]


def versions_belong_to_the_pipeline_beside_them(sent):
    assert sent.manifests["PipelineVersion"]["spec"]["pipelineName"] == sent.manifests["Pipeline"]["metadata"]["name"]


def names_are_such_as_the_api_takes(sent):
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]{0,127}", sent.spec["pipelineInfo"]["name"])
    for manifest in sent.manifests.values():
        assert re.fullmatch(kubernetes_server.SUBDOMAIN, manifest["metadata"]["name"])
        assert len(manifest["metadata"]["name"]) <= 63, "the webhook makes a label of it"


def no_parameter_holds_a_placeholder(sent):
    """The driver resolves them in every value."""
    texts = [value for name, value in sent.arguments.items() if isinstance(value, str) and not name.endswith("_version")]
    assert any("RunUUID" in text for text in texts)
    assert not any(re.search(r"\{\{|\$|\[\[[A-Z]", text) for text in texts)


def nothing_is_imported(sent):
    """Its launcher opens the store with the SDK's own session, whatever endpoint the pods have."""
    assert all("importer" not in executor for executor in sent.spec["deploymentSpec"]["executors"].values())


def labels_are_short(sent):
    found = [pod["podMetadata"]["labels"] for pod in sent.pods().values() if "podMetadata" in pod]
    found += [sent.trainjob["metadata"]["labels"]]
    found += [pod["nodeSelector"]["labels"] for pod in sent.pods().values() if "nodeSelector" in pod]
    assert len(found) > 10
    for label, value in (pair for labels in found for pair in labels.items()):
        prefix, _, name = label.rpartition("/")
        assert len(name) <= 63
        assert len(prefix) <= 253
        assert len(value) <= 63
        assert LABEL_VALUE.fullmatch(value), value


RULES: list[tuple[str, str, Callable[[Sent], None]]] = [
    (ARGO, "workflow/controller/operator.go", retries_last_as_long_as_all_attempts),
    (ARGO, "workflow/controller/operator.go", retries_grow_by_a_whole_number),
    (ARGO, "workflow/controller/operator.go", pauses_are_as_long_as_the_settings_allow),
    (KFP, "backend/src/common/util/parameter_formatter.go", macros_are_those_that_a_run_fills_in),
    (TRAINER, "pkg/runtime/framework/plugins/jobset/jobset.go, plugins/torch/torch.go", the_webhook_takes_the_trainjob),
    (TRAINER, "pkg/runtime/framework/plugins/jobset/jobset.go", a_trainjob_is_never_changed),
    (TRAINER, "pkg/apis/trainer/v1alpha1/trainjob_types.go", a_trainjob_waits_as_long_as_it_may),
    (TRAINER, "pkg/webhooks/trainjob_webhook.go", a_trainjob_is_named_like_its_pods_services),
    (KFP, "backend/src/apiserver/webhook/pipelineversion_webhook.go", a_version_is_never_changed),
    (KFP, "backend/src/apiserver/webhook/pipelineversion_webhook.go", versions_belong_to_the_pipeline_beside_them),
    (KFP, "backend/src/apiserver/common/util.go", names_are_such_as_the_api_takes),
    (KFP, "backend/src/v2/driver/driver.go", no_parameter_holds_a_placeholder),
    (KFP, "backend/src/v2/component/importer_launcher.go", nothing_is_imported),
    (KUBERNETES, "staging/src/k8s.io/apimachinery/pkg/util/validation/validation.go", labels_are_short),
]


@pytest.mark.parametrize(("tag", "file", "rule"), RULES, ids=[rule.__name__ for _, _, rule in RULES])
def test_what_is_sent_keeps_the_rule(sent, tag, file, rule):
    rule(sent)


# --- and that the rules refuse ------------------------------------------------------------------------------------


def patched(job, change):
    job = json.loads(json.dumps(job))
    change(job["spec"])
    job["spec"]["runtimeRef"] = {"name": kubernetes_server.RUNTIME}
    return job


def node(spec):
    return spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda spec: spec["runtimePatches"][0].update(manager="diffstill"), "domain-prefixed path"),
        (lambda spec: spec["runtimePatches"][0].update(manager="Diffstill/pipelines"), "domain-prefixed path"),
        (lambda spec: spec["runtimePatches"].append(spec["runtimePatches"][0]), "Duplicate value"),
        (lambda spec: node(spec).update(name="worker"), "must not have replicatedJob"),
        (lambda spec: node(spec)["template"]["spec"]["template"]["spec"]["containers"][0].update(name="main"), "must not have container"),
        (lambda spec: node(spec)["template"]["spec"]["template"]["spec"].update(initContainers=[{"name": "first"}]), "must not have container"),
        (lambda spec: node(spec)["template"]["spec"]["template"]["spec"]["containers"][0].update(env=[{"name": "A", "value": "b"}]), "envs"),
        (lambda spec: spec["trainer"]["env"].append({"name": "PET_NODE_RANK", "value": "0"}), "reserved envs"),
    ],
)
def test_the_webhook_in_tests_refuses_what_trainer_refuses(sent, change, said):
    with pytest.raises(kubernetes_server.Refused, match=said):
        kubernetes_server._check(patched(sent.trainjob, change))


def test_a_label_that_kubernetes_would_not_take_is_refused_with_the_settings(tmp_path):
    for path, value in (("queue", "q" * 64), ("priority", "p" * 64)):
        values = yaml.safe_load((ROOT / "pipelines" / "settings.yaml").read_text())
        values["infra"] |= {"queue": "gpus", path: value}
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
        with pytest.raises(Exception, match=rf"infra\.{path}"):
            load_settings(tmp_path / "settings.yaml")
