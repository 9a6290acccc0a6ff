"""The pipeline against dvc.yaml and `diffstill run`: the same stages, from the same sections, over the same artifacts; and placed as told."""

import inspect
import json
import re
import typing
from pathlib import Path

import pytest
import yaml

from components.images import TAGGED, load_images
from diffstill.config import Params, preset
from diffstill.errors import DiffstillError
from diffstill.plan import STAGES, chain
from diffstill.trainjob import Order
from pipelines.client import SCAFFOLD
from pipelines.distill import arguments, literal
from pipelines.package import write_package
from pipelines.settings import MAX_ITERATIONS, InfraConfig, Settings, ShardsConfig, load_settings

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden")
STUDENT = "a-student"


def component(name):
    return getattr(__import__(f"components.{name}.component", fromlist=[name]), name)


# --- components against stages ------------------------------------------------------------------------------------


def test_every_stage_is_a_component_and_no_other_is():
    assert {path.parent.name for path in (ROOT / "components").glob("*/component.py")} == {*STAGES, "preflight"}


@pytest.mark.parametrize("name", STAGES)
def test_a_component_has_the_interface_of_its_stage(name):
    stage, spec = STAGES[name], component(name).component_spec
    artifacts = {item for item, each in spec.inputs.items() if each.type != "String"}
    many = {"distilled_scores", "untuned_scores", "real_scores"} if name == "report" else set()
    assert artifacts == {*stage.inputs, *stage.optional, *many} | ({"parts"} if stage.sharded else set())
    assert {item for item in artifacts if spec.inputs[item].optional} == artifacts - set(stage.inputs) - many
    texts = {item for item, each in spec.inputs.items() if each.type == "String"}
    assert texts - {"step", "data_version"} == {"config", *stage.options} | ({"shard"} if stage.sharded else set())
    assert spec.outputs["metrics"].type.startswith("system.Metrics")
    assert set(spec.outputs) - {"metrics", "sheet", "page", "summary"} == {stage.output}


@pytest.mark.parametrize("name", [*STAGES, "preflight"])
def test_a_component_is_one_import_and_one_call_with_every_argument(name):
    function = component(name).python_func
    body = inspect.getsource(function).rpartition('"""')[2]
    assert len(re.findall(r"^    \w", body, re.MULTILINE)) == 2
    assert body.count("import") == 1
    for parameter in typing.get_type_hints(function):
        if parameter != "return":
            assert re.search(rf"\b{parameter}\b", body), parameter
            assert re.search(rf"^    +{parameter}: \w", str(function.__doc__), re.MULTILINE), f"{parameter} is not explained"


# --- the pipeline against the chain -------------------------------------------------------------------------------


class Graph:
    """The compiled pipeline, its tasks by the name that the UI shows, and where their inputs come from."""

    def __init__(self, text: str) -> None:
        self.spec, self.platform = yaml.safe_load_all(text)
        self.tasks: dict[str, dict[str, typing.Any]] = {}
        self._walk(self.spec["root"], {}, [])

    def _walk(self, dag: dict[str, typing.Any], outer: dict[str, str], path: list[str], condition: str = "") -> None:
        """Visit a part of the pipeline; `outer` says what its own inputs are."""
        made: dict[tuple[str, str], str] = {}
        pending = dict(dag["dag"]["tasks"])
        while pending:
            for key, task in list(pending.items()):
                if set(task.get("dependentTasks", [])) & set(pending):
                    continue
                inputs = {
                    name: self._source(given, outer, made)
                    for kind in ("artifacts", "parameters")
                    for name, given in task.get("inputs", {}).get(kind, {}).items()
                }
                component = self.spec["components"][task["componentRef"]["name"]]
                if "dag" in component:
                    asked = task.get("triggerPolicy", {}).get("condition", condition)
                    made |= {(key, name): source for name, source in self._walk_part(component, inputs, [*path, key], asked).items()}
                else:
                    shown = task["taskInfo"]["name"]
                    executor = component["executorLabel"]
                    after = set(task.get("dependentTasks", []))
                    self.tasks[shown] = {
                        "after": after,
                        "inputs": inputs,
                        "executor": executor,
                        "path": path,
                        "condition": condition,
                        "cached": task.get("cachingOptions", {}),
                        "retry": task.get("retryPolicy"),
                    }
                    made |= {(key, name): f"{shown}.{name}" for name in component.get("outputDefinitions", {}).get("artifacts", {})}
                del pending[key]
        self._made = made

    def _walk_part(self, component: dict[str, typing.Any], inputs: dict[str, str], path: list[str], condition: str) -> dict[str, str]:
        loop = {"pipelinechannel--" + name: value for name, value in inputs.items()}
        self._walk(component, {**inputs, **loop}, path, condition)
        made = self._made
        outputs = component["dag"].get("outputs", {}).get("artifacts", {})
        return {
            name: " or ".join(made[each["producerSubtask"], each["outputArtifactKey"]] for each in spec["artifactSelectors"])
            for name, spec in outputs.items()
        }

    @staticmethod
    def _source(given: dict[str, typing.Any], outer: dict[str, str], made: dict[tuple[str, str], str]) -> str:
        if "taskOutputArtifact" in given:
            where = given["taskOutputArtifact"]
            return made[where["producerTask"], where["outputArtifactKey"]]
        if "componentInputArtifact" in given or "componentInputParameter" in given:
            name = given.get("componentInputArtifact") or given["componentInputParameter"]
            return outer.get(name, name)
        return str(given["runtimeValue"]["constant"])


@pytest.fixture(scope="module")
def graph():
    return Graph((GOLDEN / "distill.yaml").read_text())


KFP_ONLY = {"preflight", "encode-shard", "sample-shard", "sample-untuned-shard"}


def test_the_pipeline_has_the_steps_of_the_chain(graph):
    steps = {re.sub(r"@(distilled|untuned)-.*", r"-\1", step.name).partition("@")[0] for step in chain(preset("tiny"))}
    assert set(graph.tasks) - KFP_ONLY == steps | {"publish"}


def test_every_task_takes_the_section_of_its_stage(graph):
    for shown, task in graph.tasks.items():
        if shown == "preflight":
            continue
        stage = re.split("-", shown)[0]
        assert re.match(rf"exec-{stage}(-\d+)?$", task["executor"]), shown
        config = task["inputs"]["config"].rpartition("pipelinechannel--")[2]
        assert config == stage, shown


def test_artifacts_flow_as_in_the_chain(graph):
    """For each step of the chain: every input is what the step that writes that folder gives."""
    makes = {"images": "prepare.images", "generator": "pretrain.generator", "latents": "encode.latents"}
    makes |= {"denoiser": "finetune.denoiser", "distilled": "sample.distilled", "untuned": "sample-untuned.distilled"}
    for step in chain(preset("tiny")):
        shown = re.sub(r"@(distilled|untuned)-.*", r"-\1", step.name).partition("@")[0]
        given = {name: makes[where] for name, where in step.paths.items() if isinstance(where, str) and name != STAGES[step.stage].output}
        parts = {"parts": f"{shown}-shard.{STAGES[step.stage].output}"} if STAGES[step.stage].sharded else {}
        found = {
            name: source
            for name, source in graph.tasks[shown]["inputs"].items()
            if "." in source and "{{" not in source and not name.endswith("_scores")
        }
        assert found == given | parts, shown
        if parts:  # a shard takes what the whole does, but for the parts
            shard = graph.tasks[f"{shown}-shard"]["inputs"]
            assert {name: source for name, source in shard.items() if "." in source and "{{" not in source} == given
            assert f"{step.stage}_shards" in shard["shard"]
    scores = {name: source for name, source in graph.tasks["report"]["inputs"].items() if name.endswith("_scores")}
    assert scores == {
        "distilled_scores": "evaluate-distilled.scores",
        "untuned_scores": "evaluate-untuned.scores",
        "real_scores": "evaluate-real.scores",
    }


def test_runs_in_mlflow_have_the_names_of_the_steps(graph):
    def step(shown):
        return re.sub(r"\{\{.*\}\}", STUDENT, graph.tasks[shown]["inputs"]["step"])

    values = preset("tiny").plain() | {}
    values["evaluate"]["students"] = [STUDENT]
    names = {each.name for each in chain(Params.model_validate_json(json.dumps(values))) if each.stage == "evaluate" or each.name == "sample-untuned"}
    assert {step(shown) for shown in ("evaluate-real", "evaluate-distilled", "evaluate-untuned", "sample-untuned")} == names


def test_loops_are_one_level_deep_and_nothing_is_imported(graph):
    for shown, task in graph.tasks.items():
        assert len([part for part in task["path"] if part.startswith("for-loop")]) <= 1, shown
    assert all("container" in executor for executor in graph.spec["deploymentSpec"]["executors"].values()), "importers have none"


def test_loops_and_branches_have_names(graph):
    """That the page of a run shows, unlike those of tasks; the client tells them from tasks by these."""
    parts = [(key, task["taskInfo"]["name"]) for key, task in graph.spec["root"]["dag"]["tasks"].items() if key.startswith(("for-loop", "condition"))]
    assert len({name for _, name in parts}) == len(parts) == 5
    assert not any(key == name for key, name in parts)
    assert all(SCAFFOLD.fullmatch(name) for _, name in parts)
    assert not any(SCAFFOLD.fullmatch(shown) for shown in graph.tasks)


def test_weights_and_data_are_told_apart_for_the_cache(graph):
    versions = {shown: task["inputs"].get("data_version") for shown, task in graph.tasks.items()}
    assert {shown: version for shown, version in versions.items() if version} == {"prepare": "data_version", "pretrain": "weights_version"}


def test_nothing_starts_before_the_preflight(graph):
    assert graph.tasks["prepare"]["after"] == {"preflight"}
    roots = [shown for shown, task in graph.tasks.items() if not task["after"] and not any("." in source for source in task["inputs"].values())]
    assert roots == ["preflight"]


def test_publishing_comes_last_and_only_where_it_is_asked_for(graph):
    publish = graph.tasks["publish"]
    assert publish["inputs"] == {"config": "publish", "distilled": "sample.distilled", "report": "report.report"}
    assert publish["condition"] == "inputs.parameter_values['pipelinechannel--publish'] != ''"
    assert [shown for shown, task in graph.tasks.items() if "publish" in task["condition"]] == ["publish"]
    assert not any(source.startswith("publish.") for task in graph.tasks.values() for source in task["inputs"].values())


def test_what_has_its_effect_outside_is_never_cached(graph):
    assert {shown for shown, task in graph.tasks.items() if not task["cached"].get("enableCache")} == {"preflight", "publish"}


# --- arguments ----------------------------------------------------------------------------------------------------


def test_arguments_are_texts_that_give_the_sections_back():
    params, settings = preset("fashion-mnist"), load_settings(ROOT / "pipelines" / "settings.yaml")
    given = arguments(params, settings, ShardsConfig(encode=2, sample=3), publish=True)
    for name in Params.STAGES:
        assert type(params.section(name)).model_validate_json(given[name]) == params.section(name)
    assert Params.model_validate_json(given["params"]) == params
    assert given["students"] == ["convnet-3"]
    assert (given["encode_shards"], given["sample_shards"]) == (["0/2", "1/2"], ["0/3", "1/3", "2/3"])
    assert (given["weights_version"], given["data_version"]) == ("", "")
    needs = json.loads(given["needs"])
    assert (needs["gpus"], needs["shared_memory_gib"], needs["mlflow"]) == (1, 8.0, True)
    assert needs["environment"] == ["AWS_ACCESS_KEY_ID", "AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI"]
    assert (needs["disk_gib"], needs["store"]) == (10.0, None)


ODD = r"""{{$}} {{{$.inputs.parameters['config']}}} {{workflow.name}} [[RunUUID]] [["[[CurrentTime.2006]]"]] $(AWS_SECRET_ACCESS_KEY) $$ \u0024 \{{ /kfp-workspace \/kfp-workspace"""
PLACEHOLDER = re.compile(r"\{\{|\$|\[\[[A-Z]|/kfp-workspace")


def test_nothing_in_parameters_is_taken_for_a_placeholder():
    """Whatever a text holds, it reaches the stage as it was written."""
    values = preset("tiny").plain()
    values["publish"]["note"] = ODD
    params = Params.model_validate_json(json.dumps(values))
    given = arguments(params, load_settings(ROOT / "pipelines" / "settings.yaml"), ShardsConfig(), publish=True)
    assert not any(PLACEHOLDER.search(value) for value in given.values() if isinstance(value, str))
    assert Params.model_validate_json(given["params"]) == params
    assert type(params.publish).model_validate_json(given["publish"]).note == ODD


@pytest.mark.parametrize("text", ['[["a"], ["b"]]', '{"a": {"b": {}}}', "[[[1]]]", '"[[a]]"'])
def test_what_is_no_placeholder_stays_readable(text):
    assert literal(text) == text


def test_a_student_that_would_be_a_placeholder_is_refused():
    params = preset("tiny")
    params = params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"students": ("{{$}}",)})})
    with pytest.raises(DiffstillError, match=r"`evaluate.students` names '\{\{\$\}\}'"):
        arguments(params, None, ShardsConfig())


def test_the_preflight_looks_at_the_services_that_the_run_will_use():
    params, settings = preset("tiny"), load_settings(ROOT / "pipelines" / "settings.yaml")
    stored = params.model_copy(update={"publish": params.publish.model_copy(update={"store": "s3://versions/sets"})})
    infra = settings.infra.model_copy(update={"config_maps": {}})
    rooted = Settings(cluster=settings.cluster.model_copy(update={"pipeline_root": "s3://bucket/runs"}), infra=infra)
    watched = rooted.model_copy(update={"infra": infra.model_copy(update={"store": "s3://watched/here"})})

    def needs(params, settings, publish):
        return json.loads(arguments(params, settings, ShardsConfig(), publish=publish)["needs"])

    found = {(one["store"], one["mlflow"]) for one in (needs(params, rooted, True), needs(stored, rooted, True), needs(stored, watched, True))}
    assert found == {("s3://bucket/runs", True), ("s3://versions/sets", True), ("s3://watched/here", True)}
    unpublished = needs(stored, rooted, False)
    assert (unpublished["store"], unpublished["mlflow"]) == ("s3://bucket/runs", False)
    assert (needs(params, None, True), needs(params, None, False)) == ({"mlflow": True}, {})


def test_a_run_that_does_not_publish_differs_in_what_it_asks_for_alone():
    params = preset("tiny")
    asked, silent = (arguments(params, None, ShardsConfig(), publish=publish) for publish in (True, False))
    assert {name for name in asked if asked[name] != silent[name]} == {"publish", "needs"}
    assert silent["publish"] == ""


def test_the_preflight_asks_for_no_more_than_its_pod_gets():
    """It stands where fine-tuning will: what another stage has more is not there."""
    values = yaml.safe_load((ROOT / "pipelines" / "settings.yaml").read_text())
    values["infra"]["resources"] |= {"pretrain": {"gpus": 2, "shared_memory": "64Gi"}, "finetune": {"gpus": 1, "shared_memory": "1Gi"}}
    needs = json.loads(arguments(preset("tiny"), Settings.model_validate_json(json.dumps(values)), ShardsConfig())["needs"])
    assert (needs["gpus"], needs["shared_memory_gib"]) == (1, 1.0)


def test_what_a_pipeline_cannot_do_is_refused():
    values = preset("tiny").plain()
    values["sample"]["classes"] = ["1"]
    with pytest.raises(DiffstillError, match=r"`sample.classes` is for `diffstill sample` alone"):
        arguments(Params.model_validate_json(json.dumps(values)), None, ShardsConfig())
    values["sample"]["classes"] = None
    values["evaluate"]["students"] = [f"network-{number}" for number in range(MAX_ITERATIONS + 1)]
    with pytest.raises(DiffstillError, match="lists 31 networks, a loop of the pipeline takes 30"):
        arguments(Params.model_validate_json(json.dumps(values)), None, ShardsConfig())


# --- placement ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """The pipeline under settings that use every knob."""
    values = yaml.safe_load((ROOT / "pipelines" / "settings.yaml").read_text())
    values["infra"] |= {"image_pull_secrets": ["registry"], "queue": "gpu-queue", "work_claim": "checkpoints", "run_as_user": 4711}
    values["infra"] |= {"cache_claim": "downloads", "priority": "gpu-runs"}
    values["infra"]["secrets"]["mlflow"] = {"token": "MLFLOW_TRACKING_TOKEN"}
    values["infra"]["config_maps"]["proxy"] = {"address": "HTTPS_PROXY"}
    values["infra"]["resources"]["finetune"] = {
        "gpus": 4, "gpu_type": "example.com/gpu", "cpu": "16", "memory": "64Gi", "shared_memory": "16Gi", "timeout_minutes": 10,
        "node_selector": {"pool": "a100"}, "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
        "retries": 5, "retry_seconds": 7, "retry_max_seconds": 70,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("placed") / "distill.yaml"
    write_package(Settings.model_validate_json(json.dumps(values)), load_images(GOLDEN / "images.lock"), path)
    return Graph(path.read_text())


def pod(graph, shown):
    """What the container of a task asks for, and what its pod does."""
    executor = graph.tasks[shown]["executor"]
    return graph.spec["deploymentSpec"]["executors"][executor]["container"], graph.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][
        executor
    ]


def named(component):
    return {"app.kubernetes.io/part-of": "diffstill", "app.kubernetes.io/name": "diffstill", "app.kubernetes.io/component": component}


def test_a_task_gets_what_its_settings_say(placed):
    container, kubernetes = pod(placed, "finetune")
    assert container["resources"]["accelerator"]["resourceType"] == "example.com/gpu"
    assert container["resources"]["accelerator"]["resourceCount"] == "4"
    assert (container["resources"]["resourceCpuLimit"], container["resources"]["resourceMemoryLimit"]) == ("16", "64Gi")
    assert container["image"].endswith("2"), "the gpu image"
    assert kubernetes["nodeSelector"]["labels"] == {"pool": "a100"}
    assert kubernetes["tolerations"] == [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}]
    assert kubernetes["podMetadata"]["labels"] == named("finetune") | {
        "kueue.x-k8s.io/queue-name": "gpu-queue",
        "kueue.x-k8s.io/priority-class": "gpu-runs",
    }
    assert kubernetes["activeDeadlineSeconds"] == "600"
    assert [(each["mountPath"], each["medium"], each["sizeLimit"]) for each in kubernetes["emptyDirMounts"]] == [("/dev/shm", "Memory", "16Gi")]
    assert kubernetes["securityContext"] == {"runAsUser": "4711", "runAsGroup": "4711", "runAsNonRoot": True}
    assert placed.tasks["finetune"]["retry"] == {
        "maxRetryCount": 5,
        "backoffDuration": "7s",
        "backoffFactor": 1.0,
        "backoffMaxDuration": f"{6 * (2_592_000 + 600) + 35}s",
    }


def test_a_task_without_a_gpu_waits_in_no_queue(placed):
    container, kubernetes = pod(placed, "report")
    assert container["image"].endswith("1"), "the cpu image"
    assert "accelerator" not in container["resources"]
    assert kubernetes["podMetadata"]["labels"] == named("report")


def test_pods_are_labelled_by_the_entry_of_the_settings_that_they_follow(placed):
    """Network policies, alerts and dashboards know them by that."""
    component = "app.kubernetes.io/component"
    seen = {shown: pod(placed, shown)[1]["podMetadata"]["labels"][component] for shown in placed.tasks}
    assert set(seen.values()) == {*InfraConfig.TASKS, "preflight"}
    assert (seen["preflight"], seen["encode-shard"], seen["encode"], seen["evaluate-real"]) == ("preflight", "encode", "gather", "evaluate")
    assert all(pod(placed, shown)[1]["podMetadata"]["labels"].items() >= named(name).items() for shown, name in seen.items())


def test_the_preflight_stands_where_fine_tuning_will(placed):
    container, kubernetes = pod(placed, "preflight")
    assert container["resources"]["accelerator"]["resourceCount"] == "4"
    assert kubernetes["nodeSelector"] == pod(placed, "finetune")[1]["nodeSelector"]
    assert placed.tasks["preflight"]["retry"] is None


def test_every_task_finds_secrets_addresses_checkpoints_and_its_run(placed):
    for shown in placed.tasks:
        container, kubernetes = pod(placed, shown)
        assert [each["secretName"] for each in kubernetes["secretAsEnv"]] == ["diffstill-s3", "mlflow"]
        assert [each["configMapName"] for each in kubernetes["configMapAsEnv"]] == ["diffstill-services", "proxy"]
        assert kubernetes["imagePullSecret"][0]["secretName"] == "registry"
        assert {each["name"] for each in kubernetes["fieldPathAsEnv"]} == {"DIFFSTILL_CHAIN"}
        assert [(each["constant"], each["mountPath"]) for each in kubernetes["pvcMount"]] == [
            ("checkpoints", "/var/diffstill"),
            ("downloads", "/var/diffstill-cache"),
        ]
        places = {"DIFFSTILL_CACHE": "/var/diffstill-cache/diffstill", "HF_HOME": "/var/diffstill-cache/huggingface"}
        device = {"DIFFSTILL_DEVICE": "cuda"} if "accelerator" in container["resources"] else {}
        origin = {"DIFFSTILL_IMAGE": container["image"]} if shown == "publish" else {}
        assert {each["name"]: each["value"] for each in container["env"]} == {
            "DIFFSTILL_WORK": "/var/diffstill",
            **places,
            **device,
            **origin,
        }


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The pipeline with fine-tuning on several nodes."""
    values = yaml.safe_load((ROOT / "pipelines" / "settings.yaml").read_text())
    values["infra"] |= {"queue": "gpu-queue", "work_claim": "checkpoints", "trainjob": {"nodes": 2, "claim": "artifacts"}}
    path = tmp_path_factory.mktemp("launched") / "distill.yaml"
    write_package(Settings.model_validate_json(json.dumps(values)), load_images(GOLDEN / "images.lock"), path)
    return Graph(path.read_text())


def test_with_a_trainjob_the_task_is_a_small_pod_that_knows_what_to_make(launched):
    container, kubernetes = pod(launched, "finetune")
    assert container["image"] == load_images(GOLDEN / "images.lock").gpu, "the cache knows the task by the image of its nodes"
    assert "accelerator" not in container["resources"]
    assert (container["resources"]["resourceCpuLimit"], container["resources"]["resourceMemoryLimit"]) == ("1", "4Gi")
    assert kubernetes["podMetadata"]["labels"] == named("finetune"), "it waits in no queue"
    assert "emptyDirMounts" not in kubernetes
    assert kubernetes["activeDeadlineSeconds"] == str(1440 * 60 + 30 * 86400), "it waits in the queue with its TrainJob"
    assert [mount["mountPath"] for mount in kubernetes["pvcMount"]] == ["/var/diffstill-shared", "/var/diffstill"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert set(environment) == {"DIFFSTILL_TRAINJOB", "DIFFSTILL_WORK"}
    order = Order.model_validate_json(environment["DIFFSTILL_TRAINJOB"])
    assert order.shared == "/var/diffstill-shared"
    assert order.job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpu-queue"}
    assert order.job["spec"]["trainer"]["image"] == container["image"]


def test_with_a_trainjob_the_preflight_stands_where_its_nodes_will(launched, graph):
    assert pod(launched, "preflight")[0]["resources"] == pod(graph, "preflight")[0]["resources"]
    assert launched.tasks["finetune"]["inputs"] == graph.tasks["finetune"]["inputs"]
    assert launched.tasks["finetune"]["retry"] == graph.tasks["finetune"]["retry"]


def test_a_version_names_no_image_that_could_be_another_tomorrow(tmp_path):
    write_package(load_settings(ROOT / "pipelines" / "settings.yaml"), TAGGED, tmp_path / "distill.yaml")
    assert "DIFFSTILL_IMAGE" not in (tmp_path / "distill.yaml").read_text()
