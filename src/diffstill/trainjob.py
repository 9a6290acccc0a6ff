"""A stage on several nodes: a TrainJob of Kubeflow Trainer v2, made and followed by the pod of the task, and gone with it.

The pod has the artifacts as folders; the nodes see them in the S3 store where Kubeflow keeps them, or on a volume that
all mount. Kubeflow's SDK is the client. Its `train` cannot give nodes the keys of a secret, so the object is ours.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict

from diffstill.artifacts import Kind, open_artifact, refuse_foreign
from diffstill.errors import DiffstillError, GateError, TransientError, without_secrets
from diffstill.launch import Work
from diffstill.registry import bring
from diffstill.run import Listener
from diffstill.storage import appear, probe

if TYPE_CHECKING:
    from kubeflow.trainer import TrainerClient
    from kubeflow.trainer.types.types import Step, TrainJob

log = logging.getLogger("diffstill")
GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
API = f"{GROUP}/{VERSION}"
NODE = "node"
"""What runtimes call the pods that train, and the container in them."""
MAIN = f"{NODE}-0"
"""The node of the main rank, as the SDK calls it."""
POLL_SECONDS = 5.0
PAUSES: tuple[float, ...] = (1, 2, 5, 10, 20, 30, 60, 60, 60)
"""Seconds between questions to an API that does not answer: an upgrade of the control plane takes some minutes."""
FAREWELL: tuple[float, ...] = (1, 2, 4)
"""The same where the pod is about to be killed."""
PASSING = (408, 429)
"""HTTP: too slow, too many requests."""
WAIT = (5, 30)
"""Seconds to connect, and to the next byte."""


class Right(NamedTuple):
    """What the service account of the pipeline must be allowed, in RBAC's words."""

    group: str
    resource: str
    verbs: tuple[str, ...]


RIGHTS = (
    Right(GROUP, PLURAL, ("create", "get", "delete")),
    Right(GROUP, "trainingruntimes", ("get",)),
    Right(GROUP, "clustertrainingruntimes", ("get",)),
    Right("", "pods", ("list",)),
    Right("", "pods/log", ("get",)),
)


class Order(BaseModel):
    """What the settings want: the TrainJob without its name and command, and where a volume that its nodes share is mounted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job: dict[str, Any]
    shared: str | None = None
    keep_failed: bool = False
    gpus: int = 0
    """Of all nodes."""


def train(work: Work, order: Order, output: Kind, uris: Mapping[str, str]) -> dict[str, float]:
    """Do `work`, whose paths are folders here, on the nodes of a TrainJob; `output` names the artifact that it makes. Returns its last metrics, and `gpu_hours`.

    `uris` are the same artifacts in Kubeflow's store. A killed pod that is started again goes on with the TrainJob that it finds.
    Raises `DiffstillError` if a node refuses or the TrainJob cannot be made, `TransientError` if it fails or cannot be watched; it is deleted then, as when this process is told to end.
    """
    made = Path(work.paths[output])
    refuse_foreign(made, output)
    name = f"{work.stage}-{hashlib.sha256(uris[output].encode()).hexdigest()[:16]}"
    places = _on_volume(Path(order.shared) / name, work, output) if order.shared else _in_store(uris, output)
    job = _Job(name, _completed(order.job, name, work.model_copy(update={"paths": places})))
    with _ending_with_us(job, keep_failed=order.keep_failed):
        job.create()
        job.follow()
    found = bring(places[output], output, Listener()) if "://" in places[output] else open_artifact(Path(places[output]), output).folder
    shutil.copytree(found, made, dirs_exist_ok=True)
    measured = _last_metrics(made, output)
    if gpus := order.gpus:
        measured["gpu_hours"] = gpus * job.seconds / 3600
    if order.shared:
        shutil.rmtree(Path(order.shared) / name)
    return measured


def _in_store(uris: Mapping[str, str], output: str) -> dict[str, str]:
    """Where the nodes find the artifacts and put theirs: the very place in the store where Kubeflow keeps it."""
    places = {name: re.sub("^minio://", "s3://", uri) for name, uri in uris.items()}
    for name, place in places.items():
        if not place.startswith("s3://"):
            raise DiffstillError(
                f"`{name}` lies at {without_secrets(place)!r}, which nodes cannot read; keep artifacts in S3, or set `infra.trainjob.claim`"
            )
    probe(places[output])
    return places


def _on_volume(folder: Path, work: Work, output: str) -> dict[str, str]:
    """The same on a volume: inputs are copied there, once and whole."""
    for name, place in work.paths.items():
        if name != output:
            appear(folder / name, partial(shutil.copytree, place, dirs_exist_ok=True))
    return {name: str(folder / name) for name in work.paths}


def _completed(job: Mapping[str, Any], name: str, work: Work) -> dict[str, Any]:
    """The TrainJob with its name, the command that every node runs, the run that it belongs to, and this pod, with which Kubernetes deletes it.

    Kubeflow Pipelines tells a pod its name.
    """
    whole = copy.deepcopy(dict(job))
    whole["metadata"]["name"] = name
    trainer = whole["spec"]["trainer"]
    trainer["command"] = ["python", "-m", "diffstill.launch"]
    trainer["args"] = [work.model_dump_json()]
    if chain := os.environ.get("DIFFSTILL_CHAIN"):
        trainer["env"] = [*trainer["env"], {"name": "DIFFSTILL_CHAIN", "value": chain}]
    if uid := os.environ.get("KFP_POD_UID"):
        whole["metadata"]["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": os.environ["KFP_POD_NAME"], "uid": uid}]
    return whole


def _last_metrics(made: Path, kind: Kind) -> dict[str, float]:
    """What fine-tuning has returned on the main rank, from the artifact."""
    artifact = open_artifact(made, kind)
    lines = (made / f"seed-{artifact.facts['seeds'][-1]}" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {name: value for name, value in json.loads(lines[-1]).items() if name != "step"}


@contextmanager
def _ending_with_us(job: _Job, *, keep_failed: bool) -> Iterator[None]:
    """Delete the TrainJob if the block does not end well: it holds GPUs that nobody would wait for."""

    def stop(number: int, _frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if keep_failed and job.failed:
            log.info("TrainJob %s is kept; `kubectl delete trainjob %s` removes it", job.name, job.name)
        else:
            job.part()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Job:
    """A TrainJob in the namespace of this pod."""

    name: str
    manifest: Mapping[str, Any]
    _heard: dict[str, int] = field(default_factory=dict)
    """Lines that were printed, by pod: after a preemption there is another."""
    seconds: float = 0.0
    """That its nodes ran, not counting a queue before them."""
    failed: bool = False
    """Whether it has ended, and not well."""

    @cached_property
    def client(self) -> TrainerClient:
        """Kubeflow's, of the cluster that this pod is in, or that KUBECONFIG names."""
        return _asked(_connected)

    @property
    def place(self) -> tuple[str, str, str, str]:
        """Where the API has it."""
        return GROUP, VERSION, self.client.backend.namespace, PLURAL

    @property
    def api(self) -> Any:
        """The SDK's own client of custom objects, for what the SDK itself does not offer: secrets, conditions, conflicts."""
        return self.client.backend.custom_api

    def create(self) -> None:
        """Make it; one that an earlier attempt of this task has left is followed, or replaced if it has failed."""
        log.info("TrainJob %s in namespace %s ...", self.name, self.place[2])
        while _asked(lambda: self.api.create_namespaced_custom_object(*self.place, self.manifest, _request_timeout=WAIT), unless=409) is None:
            left = self._found()
            if left and not left["metadata"].get("deletionTimestamp"):
                if not _condition(left, "Failed"):
                    log.info("it is there already, from an earlier attempt")
                    return
                self.delete()
            time.sleep(POLL_SECONDS)

    def follow(self) -> None:
        """Print what the main rank says until all is done. Raises `DiffstillError` with what a node refuses, `TransientError` if it fails otherwise."""
        before, running = "", 0.0
        while True:
            now: TrainJob = _asked(lambda: self.client.get_job(self.name))
            nodes = ", ".join(f"{step.name} {step.status}" for step in now.steps)
            if running or any(step.status == "Running" for step in now.steps):
                running = running or time.monotonic()
                self.seconds = time.monotonic() - running
            if nodes != before:
                log.info("TrainJob %s: %s", now.status.lower(), before := nodes)
            self._print_news(now)
            if now.status == "Complete":
                return
            if now.status == "Failed":
                self.failed = True
                raise (DiffstillError if self._refused() else TransientError)(self._reason(now))
            time.sleep(POLL_SECONDS)

    def delete(self, pauses: Sequence[float] | None = None) -> None:
        """Remove it with all its pods, if it is there."""
        _asked(lambda: self.client.delete_job(self.name) or True, unless=404, pauses=pauses)

    def part(self) -> None:
        """Remove it before this process ends, which it does for another reason."""
        try:
            self.delete(FAREWELL)
            log.info("TrainJob %s is deleted", self.name)
        except DiffstillError as error:
            log.warning("TrainJob %s may still hold GPUs: %s; `kubectl delete trainjob %s` removes it", self.name, error, self.name)

    def _found(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = _asked(
            lambda: self.api.get_namespaced_custom_object(*self.place, self.name, _request_timeout=WAIT), unless=404
        )
        return found

    def _print_news(self, now: TrainJob) -> None:
        """The lines of the main rank's node that were not there before."""
        for step in now.steps:
            if step.name == MAIN:
                lines = self._lines(step)
                for line in lines[self._heard.get(step.pod_name, 0) :]:
                    print(line, file=sys.stderr, flush=True)
                self._heard[step.pod_name] = max(len(lines), self._heard.get(step.pod_name, 0))

    def _lines(self, node: Step) -> list[str]:
        """All that a node has said; nothing where that cannot be had now: logs are no reason to fail."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        read: Any = self.client.backend.core_api.read_namespaced_pod_log
        try:
            return str(read(node.pod_name, self.place[2], container=NODE, _request_timeout=WAIT)).splitlines()
        except (ApiException, HTTPError):
            return []

    def _refused(self) -> bool:
        """Whether a node ended with the exit code of a refusal."""
        ask: Any = self.client.backend.core_api.list_namespaced_pod
        pods = _asked(lambda: ask(self.place[2], label_selector=f"jobset.sigs.k8s.io/jobset-name={self.name}", _request_timeout=WAIT))
        ended = [one.state.terminated for pod in pods.items for one in pod.status.container_statuses or () if one.name == NODE and one.state]
        return any(end.exit_code in (DiffstillError.exit_code, GateError.exit_code) for end in ended if end)

    def _reason(self, now: TrainJob) -> str:
        """Why it has failed: what a node says of its error, else the last words of one that failed, else the cluster's."""
        broken = sorted((step for step in now.steps if step.status == "Failed"), key=lambda step: step.name != MAIN)
        said = {step.name: [line for line in self._lines(step) if line.strip()] for step in broken}
        errors = [line.removeprefix("error: ") for lines in said.values() for line in lines if line.startswith("error: ")]
        words = errors or [f"{name} ends with: {lines[-1]}" for name, lines in said.items() if lines]
        stated = _condition(self._found() or {}, "Failed")
        return f"TrainJob {self.name} failed: {words[0] if words else stated or 'no node says why'}"


def _condition(job: Mapping[str, Any], kind: str) -> str:
    """Reason and message of a condition that holds; empty if it does not."""
    conditions = job.get("status", {}).get("conditions", [])
    holds = [one for one in conditions if one["type"] == kind and one["status"] == "True"]
    return f"{holds[0].get('reason', kind)}, {holds[0].get('message', '')}" if holds else ""


def _connected() -> TrainerClient:
    try:
        from kubeflow.trainer import TrainerClient
        from kubernetes.config import ConfigException
    except ImportError as error:
        raise DiffstillError("a TrainJob needs Kubeflow's SDK, which is not installed; pip install 'diffstill[trainer]'") from error
    logging.getLogger("kubeflow").setLevel(logging.ERROR)  # each time that a runtime is not one of the namespace's own
    try:
        return TrainerClient()
    except ConfigException as error:
        raise DiffstillError(f"no Kubernetes cluster is known here ({error}); fine-tune in a pod, or set KUBECONFIG") from error


def _asked(ask: Callable[[], Any], *, unless: int = 0, pauses: Sequence[float] | None = None) -> Any:
    """What the API answers, None for status `unless`; an API that is not there for a moment is asked again.

    Raises `DiffstillError` with its own words if it refuses, `TransientError` if it stays away.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    for pause in (*(pauses or PAUSES), None):
        try:
            return ask()
        except (ApiException, HTTPError, RuntimeError, OSError) as error:
            cause = _root(error)
            status = cause.status if isinstance(cause, ApiException) else None
            if unless and status == unless:
                return None
            if not isinstance(cause, (ApiException, HTTPError, OSError, multiprocessing.TimeoutError)):
                raise
            if pause is None or not _passes(status):
                raise (TransientError if _passes(status) else DiffstillError)(_refusal(status, _words(cause))) from None
        time.sleep(pause)
    raise AssertionError("the last pause is None")


def _root(error: BaseException) -> BaseException:
    """What the SDK hides behind its own errors."""
    return _root(error.__cause__) if error.__cause__ else error


def _words(error: BaseException) -> str:
    """The API's own, of at most 300 characters; without the headers, which its errors print."""
    body = getattr(error, "body", None)
    try:
        said = str(json.loads(body)["message"]) if body else str(getattr(error, "reason", None) or error)
    except (ValueError, KeyError, TypeError):
        said = str(getattr(error, "reason", None) or "")
    return without_secrets(" ".join(said.split()))[:300]


def _passes(status: int | None) -> bool:
    """Whether the same request may succeed later; an answer that did not come has no status."""
    return not status or status in PASSING or status >= 500


def _refusal(status: int | None, words: str) -> str:
    advice = {
        401: "allow the service account of the pipeline what `diffstill.trainjob.RIGHTS` lists",
        403: "allow the service account of the pipeline what `diffstill.trainjob.RIGHTS` lists",
        404: "see that Kubeflow Trainer v2 and the runtime that `infra.trainjob.runtime` names are installed, and that nobody else deletes the TrainJob",
    }
    if status is None or _passes(status):
        return f"Kubernetes does not answer ({words}); see to its API server, then try again"
    return f"Kubernetes refuses ({status}, {words}); {advice.get(status, 'change `infra.trainjob` or `infra.resources.finetune`')}"
