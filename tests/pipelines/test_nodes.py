"""The TrainJob that the settings describe: each node has what a task of the pipeline has."""

import json
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api import models

from pipelines.nodes import order
from pipelines.settings import Settings

ROOT = Path(__file__).parents[2]
IMAGE = "registry/diffstill@sha256:1"


def made(**changes):
    """The order under settings that use every knob, or with some changed."""
    values = yaml.safe_load((ROOT / "pipelines" / "settings.yaml").read_text())
    infra = values["infra"]
    infra |= {
        "image_pull_secrets": ["registry"],
        "queue": "gpu-queue",
        "work_claim": "checkpoints",
        "cache_claim": "downloads",
        "priority": "gpu-runs",
        "run_as_user": 4711,
        "service_account": "trainer",
    }
    infra |= {"trainjob": {"nodes": 3, "runtime": "torch-here", "claim": "artifacts", "keep_failed": True}}
    infra["resources"]["finetune"] = {
        "gpus": 4, "gpu_type": "example.com/gpu", "cpu": "16", "memory": "64Gi", "shared_memory": "16Gi", "timeout_minutes": 10,
        "node_selector": {"pool": "a100"}, "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
    }  # fmt: skip
    infra |= changes
    settings = Settings.model_validate_json(json.dumps(values))
    return order(settings.infra, settings.infra.trainjob, IMAGE)


def pod(order):
    (patch,) = order.job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == "node"
    return node["template"]["spec"]["template"]


@pytest.mark.parametrize(
    "changes",
    [{}, {"queue": None, "priority": None, "work_claim": None, "run_as_user": None, "secrets": {}, "config_maps": {}}, {"trainjob": {"nodes": 1}}],
)
def test_it_is_an_object_of_the_api(changes):
    job = made(**changes).job
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job


def test_each_node_has_what_fine_tuning_asks_for():
    job = made().job
    trainer = job["spec"]["trainer"]
    amounts = {"cpu": "16", "memory": "64Gi", "example.com/gpu": "4"}
    assert trainer["resourcesPerNode"] == {"requests": amounts, "limits": amounts}
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (3, 4, IMAGE)
    assert job["spec"]["runtimeRef"] == {"name": "torch-here"}
    assert job["spec"]["activeDeadlineSeconds"] == 600
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpu-queue", "kueue.x-k8s.io/priority-class": "gpu-runs"}


def test_secrets_go_by_name():
    environment = {one["name"]: one.get("value") or one["valueFrom"] for one in made().job["spec"]["trainer"]["env"]}
    assert environment == {
        "DIFFSTILL_DEVICE": "cuda",
        "DIFFSTILL_WORK": "/var/diffstill",
        "DIFFSTILL_CACHE": "/var/diffstill-cache/diffstill",
        "HF_HOME": "/var/diffstill-cache/huggingface",
        "AWS_ACCESS_KEY_ID": {"secretKeyRef": {"name": "diffstill-s3", "key": "access-key"}},
        "AWS_SECRET_ACCESS_KEY": {"secretKeyRef": {"name": "diffstill-s3", "key": "secret-key"}},
        "MLFLOW_TRACKING_URI": {"configMapKeyRef": {"name": "diffstill-services", "key": "mlflow-uri"}},
        "AWS_ENDPOINT_URL": {"configMapKeyRef": {"name": "diffstill-services", "key": "s3-endpoint"}},
    }


def test_its_pods_are_like_those_of_tasks():
    found = pod(made())
    assert found["metadata"]["annotations"] == {"sidecar.istio.io/inject": "false"}
    assert found["metadata"]["labels"] == {
        "app.kubernetes.io/part-of": "diffstill",
        "app.kubernetes.io/name": "diffstill",
        "app.kubernetes.io/component": "finetune",
    }
    spec = found["spec"]
    assert spec["serviceAccountName"] == "trainer"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["securityContext"] == {"runAsNonRoot": True, "runAsUser": 4711, "runAsGroup": 4711, "seccompProfile": {"type": "RuntimeDefault"}}
    assert spec["nodeSelector"] == {"pool": "a100"}
    assert spec["tolerations"] == [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}]
    assert spec["volumes"] == [
        {"name": "scratch", "emptyDir": {}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
        {"name": "work", "persistentVolumeClaim": {"claimName": "checkpoints"}},
        {"name": "cache", "persistentVolumeClaim": {"claimName": "downloads"}},
        {"name": "shared", "persistentVolumeClaim": {"claimName": "artifacts"}},
    ]
    mounts = [
        {"name": "scratch", "mountPath": "/tmp"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "work", "mountPath": "/var/diffstill"},
        {"name": "cache", "mountPath": "/var/diffstill-cache"},
        {"name": "shared", "mountPath": "/var/diffstill-shared"},
    ]
    confined = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert spec["containers"] == [{"name": "node", "securityContext": confined, "volumeMounts": mounts}]


def test_what_is_not_asked_for_is_not_there():
    bare = made(queue=None, priority=None, work_claim=None, cache_claim=None, image_pull_secrets=[], service_account=None, trainjob={"nodes": 2})
    assert bare.job["metadata"]["labels"] == {}
    assert set(pod(bare)["spec"]) == {"securityContext", "nodeSelector", "tolerations", "volumes", "containers"}
    assert [volume["name"] for volume in pod(bare)["spec"]["volumes"]] == ["scratch", "shared-memory"]
    assert (bare.shared, bare.keep_failed, made().shared, made().keep_failed) == (None, False, "/var/diffstill-shared", True)
