"""Fine-tuning on several nodes: the TrainJob of Kubeflow Trainer v2 that the task's pod creates and follows, as the settings want it.

What a run adds to it (its name, its command) is not known here: see `diffstill.trainjob`.
"""

from collections.abc import Iterable
from typing import Any

from diffstill.trainjob import API, NODE, Order
from pipelines.settings import InfraConfig, Resources, TrainJobConfig

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
SHARED_MEMORY = "/dev/shm"  # noqa: S108  (inside the container)
WORK = "/var/diffstill"
"""Where the persistent volume for checkpoints is mounted."""
CACHE = "/var/diffstill-cache"
"""Where that for downloads is."""
SHARED = "/var/diffstill-shared"
"""Where that for the inputs and the output of a TrainJob is."""
CONFINED = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
"""What a container may do: nothing but compute."""
MANAGER = "diffstill/pipelines"
"""Who patches the runtime; Trainer's webhook takes nothing but a path below a domain."""
MESH = {"sidecar.istio.io/inject": "false"}
"""Ranks talk to each other on ports of their own choice, which a service mesh does not let through."""


def labels(name: str) -> dict[str, str]:
    """By which network policies, alerts and dashboards know pods of the task `name`."""
    return {"app.kubernetes.io/part-of": "diffstill", "app.kubernetes.io/name": "diffstill", "app.kubernetes.io/component": name}


def queued(infra: InfraConfig, resources: Resources) -> dict[str, str]:
    """By which Kueue knows GPU pods."""
    asked = {QUEUE_LABEL: infra.queue, PRIORITY_LABEL: infra.priority} if resources.gpus else {}
    return {label: value for label, value in asked.items() if value}


def variables(infra: InfraConfig) -> dict[str, str]:
    """Where a process finds the volumes that are mounted."""
    found = {"DIFFSTILL_WORK": WORK} if infra.work_claim else {}
    return found | ({"DIFFSTILL_CACHE": f"{CACHE}/diffstill", "HF_HOME": f"{CACHE}/huggingface"} if infra.cache_claim else {})


def order(infra: InfraConfig, nodes: TrainJobConfig, image: str) -> Order:
    """What the task's pod is told: each node gets what `infra.resources.finetune` says, in `image`."""
    resources = infra.resources["finetune"]
    template = {"metadata": {"annotations": MESH, "labels": labels("finetune")}, "spec": _pod(infra, nodes, resources)}
    replicated = {"name": NODE, "template": {"spec": {"template": template}}}
    patch = {"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}}}
    job = {
        "apiVersion": API,
        "kind": "TrainJob",
        "metadata": {"labels": queued(infra, resources)},
        "spec": {
            "runtimeRef": {"name": nodes.runtime},
            "trainer": {
                "image": image,
                "env": _environment(infra, resources),
                "numNodes": nodes.nodes,
                "numProcPerNode": resources.gpus or 1,
                "resourcesPerNode": _amounts(resources),
            },
            "runtimePatches": [patch],
            **({"activeDeadlineSeconds": 60 * resources.timeout_minutes} if resources.timeout_minutes else {}),
        },
    }
    return Order(job=job, shared=SHARED if nodes.claim else None, keep_failed=nodes.keep_failed, gpus=nodes.nodes * resources.gpus)


def _amounts(resources: Resources) -> dict[str, dict[str, str]]:
    asked = {"cpu": resources.cpu, "memory": resources.memory, resources.gpu_type: str(resources.gpus or "")}
    amounts = {name: amount for name, amount in asked.items() if amount}
    return {"requests": amounts, "limits": amounts}


def _environment(infra: InfraConfig, resources: Resources) -> list[dict[str, Any]]:
    """As other tasks have it: secrets and addresses by name."""
    plain = {"DIFFSTILL_DEVICE": "cuda" if resources.gpus else "cpu", **variables(infra)}
    named = [
        {"name": variable, "valueFrom": {kind: {"name": source, "key": key}}}
        for kind, sources in (("secretKeyRef", infra.secrets), ("configMapKeyRef", infra.config_maps))
        for source, keys in sources.items()
        for key, variable in keys.items()
    ]
    return [{"name": name, "value": value} for name, value in plain.items()] + named


def _pod(infra: InfraConfig, nodes: TrainJobConfig, resources: Resources) -> dict[str, Any]:
    """What the pod of a node has beside what the runtime gives it; with a user, what restricted Pod Security asks for."""
    identity: dict[str, Any] = {"runAsNonRoot": infra.run_as_non_root, "seccompProfile": {"type": "RuntimeDefault"}}
    if infra.run_as_user is not None:
        identity |= {"runAsUser": infra.run_as_user, "runAsGroup": infra.run_as_user}
    volumes = list(_volumes(infra, nodes, resources))
    mounts = [{"name": volume["name"], "mountPath": path} for path, volume in volumes]
    found = {
        "serviceAccountName": infra.service_account,
        "imagePullSecrets": [{"name": name} for name in infra.image_pull_secrets],
        "securityContext": identity,
        "nodeSelector": dict(resources.node_selector),
        "tolerations": [toleration.model_dump(exclude_none=True) for toleration in resources.tolerations],
        "volumes": [volume for _, volume in volumes],
        "containers": [{"name": NODE, "securityContext": CONFINED, "volumeMounts": mounts}],
    }
    return {name: value for name, value in found.items() if value}


def _volumes(infra: InfraConfig, nodes: TrainJobConfig, resources: Resources) -> Iterable[tuple[str, dict[str, Any]]]:
    """Where a volume is mounted, and the volume; all that the image writes lies under /tmp."""
    yield "/tmp", {"name": "scratch", "emptyDir": {}}  # noqa: S108  (inside the container)
    if resources.shared_memory:
        yield SHARED_MEMORY, {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": resources.shared_memory}}
    for path, name, claim in ((WORK, "work", infra.work_claim), (CACHE, "cache", infra.cache_claim), (SHARED, "shared", nodes.claim)):
        if claim:
            yield path, {"name": name, "persistentVolumeClaim": {"claimName": claim}}
