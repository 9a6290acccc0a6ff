"""Where a task runs and what it gets there: the settings put onto tasks of the pipeline."""

from collections.abc import Mapping
from dataclasses import dataclass

from kfp import kubernetes
from kfp.dsl import PipelineTask

from components.images import Images
from pipelines.nodes import CACHE, SHARED, SHARED_MEMORY, WORK, labels, order, queued, variables
from pipelines.settings import InfraConfig, Resources, TrainJobConfig

RUN_LABEL = "metadata.labels['pipeline/runid']"
WAITING = 30 * 86400
"""Seconds that an attempt may wait for a node or a place in the queue, or work where it has no timeout."""
NEVER_CACHED = ("preflight", "publish")
"""Tasks whose effect is outside: what they have done once may be gone."""


@dataclass(frozen=True)
class Placement:
    """Puts tasks where `infra` says."""

    infra: InfraConfig
    images: Images
    caching: bool = True

    def __call__(self, task: PipelineTask, name: str, shown: str | None = None) -> PipelineTask:
        """Give `task` the image, resources and secrets of the task `name`; the preflight stands where fine-tuning will.

        `shown` is its name in the graph, where that is not `name`.
        """
        task.set_display_name(shown or name)
        task.set_caching_options(self.caching and name not in NEVER_CACHED)
        resources = self.infra.resources["finetune" if name == "preflight" else name]
        task.set_container_image(self.images.gpu if resources.gpus else self.images.cpu)
        if name == "finetune" and self.infra.trainjob:
            resources = self._launcher(task, self.infra.trainjob)
        _amounts(task, resources)
        _node(task, resources)
        for label, value in (labels(name) | queued(self.infra, resources)).items():
            kubernetes.add_pod_label(task, label, value)
        self._identity(task)
        self._environment(task, resources)
        if name == "publish" and self.images.by_digest:
            task.set_env_variable("DIFFSTILL_IMAGE", task.container_spec.image)  # for a tag of the version
        if resources.timeout_minutes:  # the launcher of a TrainJob waits in the queue with it, whose own time begins when it is admitted
            queueing = WAITING if name == "finetune" and self.infra.trainjob and self.infra.queue else 0
            kubernetes.set_timeout(task, 60 * resources.timeout_minutes + queueing)
        if retries(name, resources):
            _retry(task, resources)
        return task

    def _launcher(self, task: PipelineTask, nodes: TrainJobConfig) -> Resources:
        """What a pod gets that only makes a TrainJob and follows it, in the image of its nodes, which the cache knows a task by."""
        task.set_env_variable("DIFFSTILL_TRAINJOB", order(self.infra, nodes, task.container_spec.image).model_dump_json())
        if nodes.claim:
            kubernetes.mount_pvc(task, nodes.claim, SHARED)
        small = {name: getattr(self.infra.resources["gather"], name) for name in ("cpu", "memory", "node_selector", "tolerations")}
        return self.infra.resources["finetune"].model_copy(update={"gpus": 0, "shared_memory": None, **small})

    def _identity(self, task: PipelineTask) -> None:
        user = {"run_as_user": self.infra.run_as_user, "run_as_group": self.infra.run_as_user} if self.infra.run_as_user is not None else {}
        kubernetes.set_security_context(task, **user, run_as_non_root=self.infra.run_as_non_root)
        if self.infra.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, list(self.infra.image_pull_secrets))

    def _environment(self, task: PipelineTask, resources: Resources) -> None:
        """The device, so that a GPU that is missing is an error and not a day on the CPU; secrets and addresses by name, the id of the run, and the volumes for checkpoints and downloads."""
        for secret, keys in self.infra.secrets.items():
            kubernetes.use_secret_as_env(task, secret, _plain(keys))
        for config_map, keys in self.infra.config_maps.items():
            kubernetes.use_config_map_as_env(task, config_map, _plain(keys))
        if resources.gpus:
            task.set_env_variable("DIFFSTILL_DEVICE", "cuda")
        kubernetes.use_field_path_as_env(task, "DIFFSTILL_CHAIN", RUN_LABEL)
        for claim, path in ((self.infra.work_claim, WORK), (self.infra.cache_claim, CACHE)):
            if claim:
                kubernetes.mount_pvc(task, claim, path)
        for variable, value in variables(self.infra).items():
            task.set_env_variable(variable, value)


def retries(name: str, resources: Resources) -> int:
    """How often the task `name` asks to be tried again; the preflight never does, whose answer would be the same."""
    return 0 if name == "preflight" else resources.retries


def _amounts(task: PipelineTask, resources: Resources) -> None:
    if resources.gpus:
        task.set_accelerator_type(resources.gpu_type).set_accelerator_limit(resources.gpus)
    if resources.cpu:
        task.set_cpu_request(resources.cpu).set_cpu_limit(resources.cpu)
    if resources.memory:
        task.set_memory_request(resources.memory).set_memory_limit(resources.memory)
    if resources.shared_memory:
        kubernetes.empty_dir_mount(task, "shared-memory", SHARED_MEMORY, medium="Memory", size_limit=resources.shared_memory)


def _retry(task: PipelineTask, resources: Resources) -> None:
    """Let all attempts have their time.

    Argo bounds the whole of them by one window, which opens when the first begins to wait for a node, and ends the last
    attempt with it. It knows no longest pause.
    """
    doubling = resources.retry_seconds * 2 ** (resources.retries - 1) <= resources.retry_max_seconds
    pauses = resources.retry_seconds * (2**resources.retries - 1 if doubling else resources.retries)
    window = (resources.retries + 1) * (WAITING + 60 * (resources.timeout_minutes or 0)) + pauses
    task.set_retry(resources.retries, f"{resources.retry_seconds}s", 2.0 if doubling else 1.0, f"{window}s")


def _node(task: PipelineTask, resources: Resources) -> None:
    for label, value in resources.node_selector.items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in resources.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))


def _plain(keys: Mapping[str, str]) -> dict[str, str]:
    return dict(keys)
