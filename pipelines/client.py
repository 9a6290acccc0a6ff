"""What is asked of Kubeflow Pipelines, and only here: run a package, watch it, read its logs, stop it, run it on a schedule."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import kfp_server_api as api

from diffstill.artifacts import file_digest
from diffstill.errors import DiffstillError, without_secrets
from pipelines.connection import Connection, connect
from pipelines.settings import ClusterConfig

Arguments = Mapping[str, str | list[str]]

POLL_SECONDS = 5.0
PATIENCE_SECONDS = 300.0
TAIL = 15
"""Lines of its log that are shown of a failed task."""
FINISHED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
SCAFFOLD = re.compile(r"root|executor(\(\d+\))?|.*-driver|(for-loop|each|condition|if|exit-handler)-.*|iteration.*")
"""Nodes of the workflow that are no tasks of the pipeline."""
EXECUTOR = re.compile(r"executor(\(\d+\))?")
"""The node that runs the container of a task, and its further attempts."""


@dataclass(frozen=True)
class Task:
    """One task of a run: its state, the message it failed with, and its pods (none while it waits, or if the cache has served it)."""

    name: str
    state: str
    error: str
    pods: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What the server says of a run."""

    id: str
    state: str
    error: str
    created: datetime | None
    tasks: tuple[Task, ...]

    @property
    def finished(self) -> bool:
        """Whether nothing will happen any more."""
        return self.state in FINISHED

    def named(self, name: str | None) -> list[Task]:
        """The tasks of that name, several if it stands in a loop; None means all."""
        return [task for task in self.tasks if name in (None, task.name)]


@dataclass(frozen=True)
class Schedule:
    """A recurring run."""

    id: str
    name: str
    when: str
    enabled: bool


@dataclass(frozen=True)
class Cluster:
    """An installation of Kubeflow Pipelines, as one user of it sees it."""

    config: ClusterConfig
    _server: Connection

    @classmethod
    def connect(cls, config: ClusterConfig) -> Self:
        """Raises `DiffstillError` without a host or token, and if the host does not answer, refuses, or needs a namespace."""
        return cls(config, connect(config))

    def url(self, run_id: str) -> str:
        """The page of a run."""
        return f"{self._server.host}/#/runs/details/{run_id}"

    def submit(self, package: Path, arguments: Arguments, name: str, service_account: str | None = None) -> str:
        """Start a run of the package, uploaded unless the server has these very bytes; the run's id."""
        order = self._order(package, arguments, service_account)
        with self._server.answering():
            return str(self._server.client.run_pipeline(job_name=name, **order).run_id)

    def schedule(self, package: Path, arguments: Arguments, name: str, when: str | int, service_account: str | None = None) -> str:
        """Run the package again and again, at times (a cron expression) or every so many seconds; the schedule's id.

        One run at a time, and what was missed is not caught up: it would give the same once more.
        """
        trigger = {"cron_expression": when} if isinstance(when, str) else {"interval_second": when}
        order = self._order(package, arguments, service_account)
        with self._server.answering():
            made = self._server.client.create_recurring_run(job_name=name, max_concurrency=1, no_catchup=True, **trigger, **order)
        return str(made.recurring_run_id)

    def schedules(self) -> list[Schedule]:
        """All schedules of the experiment."""
        with self._server.answering():
            found = self._server.client.list_experiments(namespace=self.config.namespace, filter=_named(self.config.experiment)).experiments or ()
            listed = [made for one in found for made in self._recurring(one.experiment_id)]
        return [Schedule(made.recurring_run_id, made.display_name, _when(made.trigger), made.mode == api.RecurringRunMode.ENABLE) for made in listed]

    def disable_schedule(self, schedule_id: str) -> None:
        """Start no more runs; the schedule stays."""
        with self._server.answering(f"schedule {schedule_id}"):
            self._server.client.disable_recurring_run(schedule_id)

    def delete_schedule(self, schedule_id: str) -> None:
        """Forget a schedule; its runs stay."""
        with self._server.answering(f"schedule {schedule_id}"):
            self._server.client.delete_recurring_run(schedule_id)

    def run(self, run_id: str) -> Run:
        """The run as it is now. Raises `DiffstillError` if there is none."""
        found = self._get(run_id)
        details = (found.run_details.task_details or ()) if found.run_details else ()
        return Run(run_id, _state(found), self._said(found.error), found.created_at, tuple(self._tasks(details)))

    def polls(self, run_id: str, minutes: float | None = None) -> Iterator[Run]:
        """The run every few seconds, until it has finished. Raises `DiffstillError` after so many minutes; the run goes on.

        A server that has answered once may fail for some minutes: runs last for hours, and longer than its pods.
        """
        deadline = time.monotonic() + 60 * (float("inf") if minutes is None else minutes)
        run = self.run(run_id)
        while not run.finished:
            yield run
            if time.monotonic() > deadline:
                raise DiffstillError(f"run {run_id} is still {run.state.lower()} after {minutes:g} minutes and goes on; wait longer, or cancel it")
            run = self._later(run_id)
        yield run

    def log(self, run: Run, pod: str) -> str:
        """What a pod of the run has said so far. It comes from the user interface, so that the host must be that and not the bare API server."""
        query = {"podname": pod, "runid": run.id, "podnamespace": self.config.namespace, "createdat": run.created and f"{run.created:%Y-%m-%d}"}
        with self._server.answering(f"log of pod {pod}, which may have been removed"):
            answer = self._server.client.runs.api_client.call_api(
                "/k8s/pod/logs",
                "GET",
                query_params=[(name, value) for name, value in query.items() if value],
                auth_settings=["Bearer"],
                _preload_content=False,
                _return_http_data_only=True,
            )
            return self._server.clean(answer.data.decode(errors="replace"))

    def failures(self, run: Run) -> list[tuple[str, str]]:
        """The failed tasks and why: the server's message, or the end of the log."""
        return [(task.name, task.error or self._last_words(run, task)) for task in run.tasks if task.state == "FAILED"]

    def cancel(self, run_id: str) -> tuple[str, bool]:
        """Stop a run, unless it has finished or is being stopped; the state it was found in, and whether it is stopped now."""
        state = self.run(run_id).state
        running = state not in (*FINISHED, "CANCELING")
        if running:
            with self._server.answering(f"run {run_id}"):
                self._server.client.terminate_run(run_id)
        return state, running

    def outputs(self, run_id: str) -> str:
        """Where the run keeps its outputs, as `s3://bucket/prefix`. Raises `DiffstillError` if neither the run nor the settings tell."""
        found = self._get(run_id)
        root = (found.runtime_config and found.runtime_config.pipeline_root) or self.config.pipeline_root or ""
        if not re.match(r"(s3|minio)://", root):
            where = f"lie at {without_secrets(root)!r}" if root else "lie where the installation keeps them"
            raise DiffstillError(f"run {run_id}: its outputs {where}; set `cluster.pipeline_root` to that place, as s3://bucket/prefix")
        name = self._spec(found)["pipelineInfo"]["name"]
        return f"s3://{root.split('://')[1].split('?')[0].rstrip('/')}/{name}/{run_id}"

    def _later(self, run_id: str) -> Run:
        heard = time.monotonic()
        while True:
            time.sleep(POLL_SECONDS)
            try:
                return self.run(run_id)
            except DiffstillError:
                if time.monotonic() > heard + PATIENCE_SECONDS:
                    raise

    def _order(self, package: Path, arguments: Arguments, service_account: str | None) -> dict[str, Any]:
        """What runs and schedules have in common: which version of the pipeline, with what, where."""
        self._server.refuse_old()
        with self._server.answering():
            pipeline_id = self._pipeline()
            version_id = self._version(pipeline_id, package)
            experiment = self._server.client.create_experiment(self.config.experiment, namespace=self.config.namespace)
        return {
            "experiment_id": experiment.experiment_id,
            "pipeline_id": pipeline_id,
            "version_id": version_id,
            "params": dict(arguments),
            "pipeline_root": self.config.pipeline_root,
            "service_account": service_account,
        }

    def _pipeline(self) -> str:
        """The id of our pipeline, which is made without a version: an upload would name its first version after the pipeline."""
        name, namespace = self.config.pipeline, self.config.namespace
        found = self._server.client.list_pipelines(namespace=namespace, filter=_named(name)).pipelines
        if found:
            return str(found[0].pipeline_id)
        wanted = api.V2beta1Pipeline(name=name, display_name=name, namespace=namespace)
        return str(self._server.client.pipelines.pipeline_service_create_pipeline(wanted).pipeline_id)

    def _version(self, pipeline_id: str, package: Path) -> str:
        name = file_digest(package)
        found = self._server.client.list_pipeline_versions(pipeline_id, filter=_named(name)).pipeline_versions
        made = found[0] if found else self._server.client.upload_pipeline_version(str(package), name, pipeline_id=pipeline_id)
        return str(made.pipeline_version_id)

    def _recurring(self, experiment_id: str) -> Iterator[api.V2beta1RecurringRun]:
        page: str | None = ""
        while page is not None:
            answer = self._server.client.list_recurring_runs(page_token=page, page_size=100, experiment_id=experiment_id)
            yield from answer.recurring_runs or ()
            page = answer.next_page_token or None

    def _get(self, run_id: str) -> api.V2beta1Run:
        with self._server.answering(f"run {run_id}"):
            return self._server.client.get_run(run_id)

    def _spec(self, run: api.V2beta1Run) -> dict[str, Any]:
        """The pipeline that the run is of, as the server keeps it, which may have changed its name."""
        found, reference = run.pipeline_spec, run.pipeline_version_reference
        if not found:
            with self._server.answering(f"version {reference.pipeline_version_id} of the pipeline"):
                found = self._server.client.get_pipeline_version(reference.pipeline_id, reference.pipeline_version_id).pipeline_spec
        return dict(found.get("pipeline_spec", found))

    def _tasks(self, details: Sequence[api.V2beta1PipelineTaskDetail]) -> Iterator[Task]:
        """The tasks among the nodes of the workflow, and the drivers that failed, because then there is no task."""
        nodes = {_number(one.pod_name): one for one in details if one.pod_name}
        for one in details:
            if one.display_name.endswith("-driver") and one.state == "FAILED":
                yield Task(one.display_name, one.state, self._said(one.error), (one.pod_name,) if one.pod_name else ())
            elif not SCAFFOLD.fullmatch(one.display_name) and one.display_name != one.pod_name:  # the workflow itself bears its own name
                yield Task(one.display_name, _state(one), self._said(one.error), tuple(_pods(one, nodes)))

    def _last_words(self, run: Run, task: Task) -> str:
        try:
            lines = self.log(run, task.pods[-1]).splitlines() if task.pods else []
        except DiffstillError as error:
            return str(error)
        return "\n".join(lines[-TAIL:]) or "it left no message and no log"

    def _said(self, error: api.GoogleRpcStatus | None) -> str:
        return self._server.clean(error.message) if error and error.message else ""


@dataclass
class Watcher:
    """What is new of a run since it was last looked at."""

    cluster: Cluster
    _states: Counter[tuple[str, str]] = field(default_factory=Counter)
    _read: dict[str, int] = field(default_factory=dict)

    def changes(self, run: Run) -> list[tuple[str, str]]:
        """The tasks that are in another state, and that state."""
        now = Counter((task.name, task.state) for task in run.tasks)
        new, self._states = now - self._states, now
        return list(new.elements())

    @property
    def heard(self) -> bool:
        """Whether there was a pod to listen to."""
        return bool(self._read)

    def lines(self, run: Run, name: str | None = None, *, rest: bool = False) -> Iterator[tuple[str, str]]:
        """What tasks have said, a line at a time. A log that cannot be had, or a line that is not whole, is left for later, unless with `rest`."""
        for task in run.named(name):
            over = rest or run.finished or task.state in FINISHED
            for pod in task.pods:
                try:
                    text = self.cluster.log(run, pod)
                except DiffstillError as error:
                    text = f"{error}" if over else ""
                yield from ((task.name, line) for line in self._unread(pod, text, over))

    def _unread(self, pod: str, text: str, over: bool) -> list[str]:
        end = len(text) if over else text.rfind("\n") + 1
        start = min(self._read.get(pod, 0), end)
        self._read[pod] = max(start, end)
        return text[start:end].splitlines()


def _state(one: api.V2beta1Run | api.V2beta1PipelineTaskDetail) -> str:
    return "PENDING" if one.state in (None, "RUNTIME_STATE_UNSPECIFIED") else str(one.state)


def _named(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})


def _when(trigger: api.V2beta1Trigger) -> str:
    return str(trigger.cron_schedule.cron) if trigger.cron_schedule else f"every {trigger.periodic_schedule.interval_second} s"


def _number(pod_name: str) -> str:
    """What the name of a pod and the id of its node in the workflow both end in."""
    return pod_name.rpartition("-")[2]


def _pods(task: api.V2beta1PipelineTaskDetail, nodes: Mapping[str, api.V2beta1PipelineTaskDetail]) -> Iterator[str]:
    """The pods of a task, oldest attempt first. Children are given by node id, which is not always the name of the pod."""
    for child in task.child_tasks or ():
        node = nodes.get(_number(child.pod_name))
        if node and EXECUTOR.fullmatch(node.display_name) and node.state != "SKIPPED":
            yield from list(_pods(node, nodes)) or [node.pod_name]
        elif not nodes:  # a server that names no pods
            yield child.pod_name
