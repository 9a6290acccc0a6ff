"""A small server that speaks the part of Kubeflow Pipelines' v2beta1 API that the client uses, in memory, over real sockets.

Every request body must be what kfp_server_api's models can hold, and every answer is made of them: a wrong field name fails on either side.
Runs are played from a script, a step each time they are asked for, as a workflow engine shows them: drivers, executors, retries.
"""

import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml

from pipelines import client

SENTINEL = "t0ken-that-nobody-may-see"
"""Stands for the bearer token: found anywhere but in the header, it is a leak."""
CREATED = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
API = api.ApiClient()


@dataclass(frozen=True)
class Request:
    """What the server has received."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)


@dataclass
class Fault:
    """An answer in place of the right one, so many times, to requests whose path holds `path`."""

    status: int
    body: str = ""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    path: str = ""
    method: str = ""
    times: int = 1000


class Refused(Exception):  # noqa: N818  (what the server does)
    """A request that the real server would not take either."""

    def __init__(self, status: int, message: str, *, plain: bool = False) -> None:
        super().__init__(message)
        self.status, self.plain = status, plain


@dataclass
class KfpServer:
    """The state of the server, open to the tests."""

    token: str | None = None
    certificate: tuple[str, str] | None = None
    multi_user: bool = False
    healthz_more: Mapping[str, object] = field(default_factory=lambda: {"tag_name": "2.17.0", "commit_sha": "4711"})
    """What it says of itself beside what its API has a model for."""
    fault: Fault | None = None
    script: Sequence[Mapping[str, str]] = ({"train": "SUCCEEDED"},)
    final: str = "SUCCEEDED"
    errors: Mapping[str, str] = field(default_factory=dict)
    attempts: Mapping[str, int] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    names_pods: bool = True
    requests: list[Request] = field(default_factory=list)
    experiments: dict[str, api.V2beta1Experiment] = field(default_factory=dict)
    pipelines: dict[str, api.V2beta1Pipeline] = field(default_factory=dict)
    versions: dict[str, api.V2beta1PipelineVersion] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)
    runs: dict[str, api.V2beta1Run] = field(default_factory=dict)
    recurring: dict[str, api.V2beta1RecurringRun] = field(default_factory=dict)
    polls: dict[str, int] = field(default_factory=dict)
    silent: str = ""
    """Requests whose path holds this get no answer while the server is up."""
    waiting: threading.Event = field(default_factory=threading.Event)

    def __enter__(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        if self.certificate:
            secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            secure.load_cert_chain(*self.certificate)
            self._http.socket = secure.wrap_socket(self._http.socket, server_side=True)
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self.waiting.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://127.0.0.1:{self._http.server_address[1]}"

    def sent(self, method: str, path: str) -> list[Request]:
        return [request for request in self.requests if request.method == method and re.fullmatch(path, request.path)]

    def answer(self, request: Request):
        """A model, or text; raises `Refused`."""
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            raise Refused(401, "Request header error: there is no user identity header.")
        for method, pattern, allowed, action in ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and method == request.method:
                if unknown := set(request.query) - set(allowed):
                    raise Refused(400, f"unknown query parameters {unknown}")
                return action(self, request, *found.groups())
        raise Refused(404, f"no route for {request.method} {request.path}")

    # --- what is asked ---

    def healthz(self, _request):
        return {**API.sanitize_for_serialization(api.V2beta1GetHealthzResponse(multi_user=self.multi_user)), **self.healthz_more}

    def list_experiments(self, request):
        self._check_namespace(request)
        return api.V2beta1ListExperimentsResponse(experiments=_filtered(self.experiments, request) or None)

    def create_experiment(self, request):
        made = _strict(request, "V2beta1Experiment")
        made.experiment_id = _new_id()
        self.experiments[made.experiment_id] = made
        return made

    def list_pipelines(self, request):
        self._check_namespace(request)
        return api.V2beta1ListPipelinesResponse(pipelines=_filtered(self.pipelines, request) or None)

    def create_pipeline(self, request):
        made = _strict(request, "V2beta1Pipeline")
        made.pipeline_id = _new_id()
        self.pipelines[made.pipeline_id] = made
        return made

    def upload_version(self, request):
        package = _uploaded(request)
        pipeline_id, name = request.query["pipelineid"], request.query["name"]
        if pipeline_id not in self.pipelines:
            raise Refused(404, f"Pipeline {pipeline_id} not found")
        if any(one.display_name == name for one in self.versions.values()):
            raise Refused(409, f"version {name} exists already")
        spec, *platforms = yaml.load_all(package, Loader=yaml.CSafeLoader)
        stored = {"pipeline_spec": spec, "platform_spec": platforms[0]} if platforms else spec
        made = api.V2beta1PipelineVersion(
            pipeline_id=pipeline_id, pipeline_version_id=_new_id(), display_name=name, name=name, pipeline_spec=stored, created_at=CREATED
        )
        self.versions[made.pipeline_version_id], self.packages[made.pipeline_version_id] = made, package
        return made

    def list_versions(self, request, pipeline_id):
        found = [one for one in _filtered(self.versions, request) if one.pipeline_id == pipeline_id]
        return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=found or None)

    def get_version(self, _request, _pipeline_id, version_id):
        return _one(self.versions, version_id)

    def create_run(self, request):
        made = _strict(request, "V2beta1Run")
        self._check_reference(made)
        made.run_id, made.created_at, made.state = _new_id(), CREATED, "PENDING"
        self.runs[made.run_id], self.polls[made.run_id] = made, 0
        return made

    def get_run(self, _request, run_id):
        run, step = _one(self.runs, run_id), self.polls.get(run_id, 0)
        self.polls[run_id] = step + 1
        if run.state in ("CANCELING", "CANCELED"):
            run.state = "CANCELED"
        else:
            run.state = self.final if step >= len(self.script) - 1 else "RUNNING"
        scene = self.script[min(step, len(self.script) - 1)]
        run.run_details = api.V2beta1RunDetails(task_details=self._nodes(run_id, scene))
        if run.state == "FAILED":
            run.error = api.GoogleRpcStatus(code=13, message="the workflow failed")
        return run

    def terminate(self, _request, run_id):
        _one(self.runs, run_id).state = "CANCELING"
        return {}

    def create_recurring(self, request):
        made = _strict(request, "V2beta1RecurringRun")
        self._check_reference(made)
        made.recurring_run_id = _new_id()
        self.recurring[made.recurring_run_id] = made
        return made

    def list_recurring(self, request):
        """Two on a page, so that the client must turn it."""
        found = [one for one in self.recurring.values() if one.experiment_id == request.query["experiment_id"]]
        start = int(request.query.get("page_token") or 0)
        more = str(start + 2) if len(found) > start + 2 else ""
        return api.V2beta1ListRecurringRunsResponse(recurring_runs=found[start : start + 2] or None, next_page_token=more)

    def disable_recurring(self, _request, recurring_id):
        _one(self.recurring, recurring_id).mode = api.RecurringRunMode.DISABLE
        return {}

    def delete_recurring(self, _request, recurring_id):
        _one(self.recurring, recurring_id)
        del self.recurring[recurring_id]
        return {}

    def pod_log(self, request):
        if self.multi_user and not request.query.get("podnamespace"):
            raise Refused(422, "podnamespace argument is required")
        if request.query["podname"] not in self.logs or request.query["runid"] not in self.runs:
            raise Refused(500, "Could not get main container logs: Error: pod not found", plain=True)
        return self.logs[request.query["podname"]]

    # --- what it checks and makes ---

    def _check_namespace(self, request):
        if request.query.get("namespace") and not self.multi_user:
            raise Refused(400, "In single-user mode, listing cannot filter by namespace.")

    def _check_reference(self, made):
        if made.experiment_id not in self.experiments or made.pipeline_version_reference.pipeline_version_id not in self.versions:
            raise Refused(404, "experiment or pipeline version not found")

    def _nodes(self, run_id, scene):
        """The nodes of the workflow: names of pods hold their template, ids of nodes do not; both end in the same number."""
        nodes = [self._node(run_id, "flow-x7k2p", "flow-x7k2p", "RUNNING", [])]
        for place, (entry, state) in enumerate(scene.items(), 1):
            task = entry.partition("#")[0]  # two of one name, as in a loop, are told apart by what follows #
            nodes.append(self._node(run_id, f"{task}-driver", f"flow-x7k2p-system-container-driver-{place}1", "SUCCEEDED", [f"flow-x7k2p-{place}2"]))
            idle = state in ("PENDING", "SKIPPED")
            nodes.append(self._node(run_id, task, f"flow-x7k2p-{place}2", state, [] if idle else [f"flow-x7k2p-{place}3"]))
            if idle:
                continue
            tries = self.attempts.get(task, 1)
            children = [f"flow-x7k2p-{place}4{number}" for number in range(tries)] if tries > 1 else [f"flow-x7k2p-{place + 1}1"]
            nodes.append(self._node(run_id, "executor", f"flow-x7k2p-system-container-impl-{place}3", state, children))
            for number in range(tries if tries > 1 else 0):
                pod, ended = f"flow-x7k2p-system-container-impl-{place}4{number}", state if number == tries - 1 else "FAILED"
                nodes.append(self._node(run_id, f"executor({number})", pod, ended, []))
        return nodes

    def _node(self, run_id, name, pod, state, children):
        message = self.errors.get(name) if state == "FAILED" else None
        return api.V2beta1PipelineTaskDetail(
            run_id=run_id,
            task_id=_new_id(),
            display_name=name,
            pod_name=pod if self.names_pods else None,
            state=state,
            error=api.GoogleRpcStatus(code=13, message=message) if message else None,
            child_tasks=[api.PipelineTaskDetailChildTask(pod_name=child) for child in children],
        )


@contextmanager
def lonely_server(world, home: Path):
    """A server that asks for the token, which is in the environment; a home without settings of kfp, and no waiting between looks at a run."""
    world.setattr(client, "POLL_SECONDS", 0.01)
    world.setenv("HOME", str(home))
    world.setenv("KFP_TOKEN", SENTINEL)
    for name in ("KFP_HOST", "KF_PIPELINES_ENDPOINT", "KF_PIPELINES_UI_ENDPOINT"):
        world.delenv(name, raising=False)
    with KfpServer(token=SENTINEL) as server:
        yield server


V = "/apis/v2beta1"
ID = "([^/:]+)"
LISTING = ("page_token", "page_size", "sort_by", "filter", "namespace")
ROUTES: list[tuple[str, str, Sequence[str], Callable]] = [
    ("GET", f"{V}/healthz", (), KfpServer.healthz),
    ("GET", f"{V}/experiments", LISTING, KfpServer.list_experiments),
    ("POST", f"{V}/experiments", (), KfpServer.create_experiment),
    ("GET", f"{V}/pipelines", LISTING, KfpServer.list_pipelines),
    ("POST", f"{V}/pipelines", (), KfpServer.create_pipeline),
    ("POST", f"{V}/pipelines/upload_version", ("name", "display_name", "pipelineid", "description", "tags"), KfpServer.upload_version),
    ("GET", f"{V}/pipelines/{ID}/versions", LISTING[:-1], KfpServer.list_versions),
    ("GET", f"{V}/pipelines/{ID}/versions/{ID}", (), KfpServer.get_version),
    ("POST", f"{V}/runs", ("experiment_id",), KfpServer.create_run),
    ("GET", f"{V}/runs/{ID}", ("experiment_id",), KfpServer.get_run),
    ("POST", f"{V}/runs/{ID}:terminate", ("experiment_id",), KfpServer.terminate),
    ("POST", f"{V}/recurringruns", (), KfpServer.create_recurring),
    ("GET", f"{V}/recurringruns", (*LISTING, "experiment_id"), KfpServer.list_recurring),
    ("POST", f"{V}/recurringruns/{ID}:disable", (), KfpServer.disable_recurring),
    ("DELETE", f"{V}/recurringruns/{ID}", (), KfpServer.delete_recurring),
    ("GET", "/k8s/pod/logs", ("podname", "runid", "podnamespace", "createdat"), KfpServer.pod_log),
]


def _new_id() -> str:
    return str(uuid.uuid4())


def _one(things, key):
    if key not in things:
        raise Refused(404, f"{key} not found")
    return things[key]


def _filtered(things, request):
    """By display name, the one filter that is used."""
    wanted = json.loads(request.query["filter"])["predicates"] if request.query.get("filter") else []
    for predicate in wanted:
        if predicate["operation"] not in (1, "EQUALS") or predicate["key"] != "display_name":
            raise Refused(400, f"filter {predicate} is not known here")
    return [one for one in things.values() if all(one.display_name == predicate["stringValue"] for predicate in wanted)]


def _strict(request, model):
    """The body as a model; what the model cannot hold is an error, as in the real gateway."""
    body = request.json()
    made = API.deserialize(SimpleNamespace(data=request.body), model)
    if _loose(held := API.sanitize_for_serialization(made)) != _loose(body):
        raise Refused(400, f"{model} holds {held}, received was {body}")
    return made


def _loose(value):
    """The gateway takes long integers as numbers and as text."""
    if isinstance(value, dict):
        return {name: _loose(held) for name, held in value.items()}
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _uploaded(request) -> bytes:
    message = message_from_bytes(b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n" + request.body)
    parts = [part for part in message.get_payload() if part.get_param("name", header="content-disposition") == "uploadfile"]
    if len(parts) != 1 or not str(parts[0].get_filename()).endswith((".yaml", ".yml")):
        raise Refused(400, "one YAML file is expected as `uploadfile`")
    return parts[0].get_payload(decode=True)


def _handler(server: KfpServer):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_given):
            pass

        def _serve(self):
            parts = urlsplit(self.path)
            length = int(self.headers.get("content-length") or 0)
            request = Request(
                self.command,
                parts.path,
                {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=False).items()},
                {name.lower(): value for name, value in self.headers.items()},
                self.rfile.read(length),
            )
            server.requests.append(request)
            if server.silent and server.silent in parts.path:
                server.waiting.wait()
            fault = server.fault
            if fault and fault.times > 0 and fault.path in parts.path and fault.method in ("", self.command):
                fault.times -= 1
                self._reply(fault.status, fault.content_type, fault.body, fault.headers)
                return
            try:
                answer = server.answer(request)
            except Refused as refused:
                body = {"error": str(refused), "code": refused.status, "message": str(refused), "details": []}
                self._reply(refused.status, *(("text/plain", str(refused)) if refused.plain else ("application/json", json.dumps(body))), {})
                return
            if isinstance(answer, str):
                self._reply(200, "text/plain; charset=utf-8", answer, {})
            else:
                self._reply(200, "application/json", json.dumps(API.sanitize_for_serialization(answer)), {})

        do_GET = do_POST = do_DELETE = _serve  # noqa: N815  (http.server's names)

        def _reply(self, status, content_type, body, headers):
            data = body.encode()
            self.send_response(status)
            for name, value in {"content-type": content_type, "content-length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    return Handler
