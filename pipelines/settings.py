"""What a run on a cluster needs beside the science: where the cluster is, what each task gets, which secrets by name.

No secret value stands here: only names of Kubernetes secrets and of environment variables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from diffstill.config import Params, Section, read_yaml

MAX_ITERATIONS = 30
"""Every iteration costs two pods, and loops much longer than this are known to bring the backend down."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
"""The name of a Kubernetes object."""
Label = Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$", max_length=63)]
"""The value of a Kubernetes label."""
_DOMAIN, _WORD = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/", r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[str, Field(pattern=rf"^({_DOMAIN})?{_WORD}$")]
"""The key of a Kubernetes label or taint, like pool or example.org/pool."""
ResourceName = Annotated[str, Field(pattern=rf"^{_DOMAIN}{_WORD}$")]
"""A resource of nodes that is none of Kubernetes' own, like nvidia.com/gpu."""
LabelName = Annotated[Name, Field(max_length=63)]
"""The name of an object that a label names, too."""
Key = Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]
"""A key in a secret or config map."""
Variable = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$", max_length=64)]
"""The name of an environment variable; upper case, so that a pasted secret is not taken for one."""
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
"""An amount as Kubernetes writes it, like 500m or 64Gi."""
OWN = tuple(f"DIFFSTILL_{name}" for name in ("CACHE", "CHAIN", "DEVICE", "IMAGE", "RANKS", "TRAINJOB", "WORK"))
TORCHRUN = tuple(f"PET_{name}" for name in ("NNODES", "NPROC_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"))
"""Trainer's own, and refused in a TrainJob."""
RESERVED = ("PATH", "HOME", "PYTHONPATH", "HF_HOME", "KFP_POD_NAME", "KFP_POD_UID", *OWN, *TORCHRUN)
Shards = Annotated[int, Field(ge=1, le=MAX_ITERATIONS)]


class ClusterConfig(Section):
    """Where Kubeflow Pipelines is, and under which names it keeps what we send."""

    host: Annotated[str, Field(pattern=r"^https?://[^@?#\s]+$")] | None = Field(
        None, description="URL of Kubeflow Pipelines, without credentials; null = the environment variable KFP_HOST"
    )
    namespace: Name | None = Field(None, description="namespace of your profile, on a multi-user installation")
    experiment: str = Field("diffstill", description="experiment that the runs are listed under")
    pipeline: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=46)] = Field(
        "diffstill-distill", description="name under which the pipeline is uploaded, at most 46 characters; its versions are named by content"
    )
    token_env: Variable | None = Field(None, description="name of the environment variable that holds a bearer token; null = no token")
    ca_certificate: str | None = Field(None, description="file with the certificate authority of the host; null = the system's")
    pipeline_root: Annotated[str, Field(pattern=r"^(s3|minio|gs)://[^@\s]+$")] | None = Field(
        None, description="bucket and prefix for all outputs, like s3://bucket/runs; null = what the installation is set to"
    )


class Toleration(Section):
    """A taint that pods of a task may stand."""

    key: LabelKey | None = Field(None, description="key of the taint; null = all")
    operator: Literal["Equal", "Exists"] = Field("Exists", description="Exists, or Equal to `value`")
    value: Label | None = Field(None, description="value of the taint, with operator Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="effect of the taint; null = all")

    @model_validator(mode="after")
    def _as_kubernetes_wants_it(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None) or (self.operator == "Equal" and self.key is None):
            raise ValueError("`operator: Equal` goes with a `key` and a `value`, `operator: Exists` without a `value`; mend the toleration")
        return self


class Resources(Section):
    """What the pod of one task gets."""

    gpus: Annotated[int, Field(ge=0, le=16)] = Field(0, description="number of GPUs; with any, the task runs in the gpu image")
    gpu_type: ResourceName = Field("nvidia.com/gpu", description="resource name of the GPU")
    cpu: Quantity | None = Field(None, description="CPU request and limit; null = the namespace's default")
    memory: Quantity | None = Field(None, description="memory request and limit; null = the namespace's default")
    shared_memory: Quantity | None = Field(None, description="size of /dev/shm; null = the container runtime's 64 MiB")
    node_selector: Mapping[LabelKey, Label] = Field({}, description="labels that the node must have")
    tolerations: tuple[Toleration, ...] = Field((), description="taints that the node may have")
    timeout_minutes: Annotated[int, Field(ge=1)] | None = Field(None, description="the task fails after this time; null = never")
    retries: Annotated[int, Field(ge=0, le=20)] = Field(2, description="times that a failed task is tried again; on a cluster with kubeflow-retries")
    retry_seconds: Annotated[int, Field(ge=0)] = Field(30, description="pause before the first retry, doubled before each further one")
    retry_max_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        600, description="longest pause before a retry; where doubling would pass it, all pauses are alike"
    )

    @model_validator(mode="after")
    def _room_to_talk(self) -> Self:
        if self.gpus > 1 and self.shared_memory is None:
            raise ValueError(
                f"`gpus` is {self.gpus}, whose processes talk through shared memory, but `shared_memory` is null, which leaves them 64 MiB; set it, like 16Gi"
            )
        return self

    @model_validator(mode="after")
    def _pauses_within_bounds(self) -> Self:
        if self.retry_seconds > self.retry_max_seconds:
            raise ValueError(
                f"`retry_seconds` is {self.retry_seconds}, but `retry_max_seconds` is {self.retry_max_seconds}, and no pause is longer; change one of them"
            )
        return self


class TrainJobConfig(Section):
    """Several nodes for fine-tuning, by a TrainJob of Kubeflow Trainer v2; each gets what `resources.finetune` says."""

    nodes: Annotated[int, Field(ge=1, le=64)] = Field(description="number of nodes")
    runtime: Name = Field("torch-distributed", description="ClusterTrainingRuntime that starts them")
    claim: Name | None = Field(
        None, description="persistent volume claim (ReadWriteMany) by which artifacts reach the nodes; null = the S3 store where Kubeflow keeps them"
    )
    keep_failed: bool = Field(False, description="leave a TrainJob that has failed for a look at it")


class InfraConfig(Section):
    """What all pods share, and what each task gets."""

    TASKS: ClassVar[tuple[str, ...]] = (*Params.STAGES, "gather")

    service_account: Name | None = Field(None, description="service account of the pods; null = the installation's default")
    image_pull_secrets: tuple[Name, ...] = Field((), description="secrets with which images are pulled")
    queue: LabelName | None = Field(None, description="Kueue queue that GPU pods wait in (label kueue.x-k8s.io/queue-name); null = none")
    priority: LabelName | None = Field(
        None, description="Kueue's WorkloadPriorityClass of GPU pods (label kueue.x-k8s.io/priority-class), with a queue; null = that of the pods"
    )
    run_as_non_root: bool = Field(True, description="refuse to start a container as root")
    run_as_user: Annotated[int, Field(ge=0)] | None = Field(10001, description="numeric user of the containers, as in the image")
    secrets: Mapping[Name, Mapping[Key, Variable]] = Field(
        {}, description="secret -> {key: environment variable}: credentials for S3 and MLflow, by name only"
    )
    config_maps: Mapping[Name, Mapping[Key, Variable]] = Field(
        {}, description="config map -> {key: environment variable}: MLFLOW_TRACKING_URI, AWS_ENDPOINT_URL and the like"
    )
    work_claim: Name | None = Field(
        None, description="persistent volume claim for checkpoints, so that a preempted task goes on; null = a retry begins anew"
    )
    cache_claim: Name | None = Field(
        None, description="persistent volume claim for weights of the hub and downloaded artifacts; null = each pod fetches them anew"
    )
    store: Annotated[str, Field(pattern=r"^s3://[^@\s]+$")] | None = Field(
        None, description="bucket and prefix that the preflight must be able to use; null = publish.store where the run publishes, else pipeline_root"
    )
    trainjob: TrainJobConfig | None = Field(None, description="fine-tune on several nodes; null = in the pod of the task, on all its GPUs")
    disk_gib: Annotated[float, Field(ge=0)] = Field(10.0, description="free space that the preflight must find on the GPU node")
    resources: Mapping[str, Resources] = Field(description="what each task gets: one entry per stage, and `gather`, which joins shards")

    @model_validator(mode="after")
    def _every_task(self) -> Self:
        if set(self.resources) != set(self.TASKS):
            missing, unknown = sorted(set(self.TASKS) - set(self.resources)), sorted(set(self.resources) - set(self.TASKS))
            said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
            raise ValueError(f"`infra.resources` {' and '.join(said)}; give one entry for each of {', '.join(self.TASKS)}")
        return self

    @model_validator(mode="after")
    def _can_start(self) -> Self:
        if self.run_as_non_root and self.run_as_user == 0:
            raise ValueError("`infra.run_as_user` 0 is root, which `infra.run_as_non_root` forbids; change one of them")
        if self.priority and not self.queue:
            raise ValueError(f"`infra.priority` is {self.priority!r}, but `infra.queue` is null, and only Kueue reads it; set the queue, too")
        times = Counter(self.variables)
        wrong = [name for name in times if times[name] > 1 or name in RESERVED]
        if wrong:
            raise ValueError(
                f"variable {wrong[0]} is given twice, or is one that a task needs for itself; give each of `infra.secrets` and `infra.config_maps` another"
            )
        if self.trainjob and self.resources["finetune"].cpu is None:
            raise ValueError(
                "`infra.trainjob` is set, but `infra.resources.finetune.cpu` is null; Kubeflow's SDK follows no pods without: set it, like '8'"
            )
        return self

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that pods get from secrets and config maps."""
        return tuple(variable for source in (self.secrets, self.config_maps) for keys in source.values() for variable in keys.values())


class ShardsConfig(Section):
    """How many pods share a stage; the number changes no byte of the result on CPU."""

    encode: Shards = Field(1, description="pods that encode images")
    sample: Shards = Field(1, description="pods that draw images")


class Settings(Section):
    """The whole of `pipelines/settings.yaml`."""

    cluster: ClusterConfig = Field(ClusterConfig(), description="where Kubeflow Pipelines is")
    infra: InfraConfig = Field(description="what the pods get")
    shards: ShardsConfig = Field(ShardsConfig(), description="how the work is cut")


def load_settings(path: Path) -> Settings:
    """Read the settings. Raises `DiffstillError` naming every wrong entry, its value and the rule."""
    return read_yaml(path, Settings, "copy pipelines/settings.yaml of the repository and change it")
