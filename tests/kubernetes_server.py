"""A small server that speaks the part of the Kubernetes API that a TrainJob needs, over real sockets, with a Trainer behind it.

What it takes must be what the SDK's models of the API can hold, and what the Trainer's webhooks let through. A TrainJob is
played from a script, a scene each time it is asked for; or its nodes really run, as processes with the command, the
variables and the secrets of the manifest and with what Kubeflow Trainer tells them of each other.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml
from kubeflow_trainer_api import models

from servers import free_port

NAMESPACE, RUNTIME, TOKEN = "team", "torch-distributed", "t0ken-that-nobody-may-see"
TRAINER = "/apis/trainer.kubeflow.org/v1alpha1"
CREATED = "2026-11-20T12:00:00Z"
LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
SUBDOMAIN = rf"{LABEL}(\.{LABEL})*"


@dataclass(frozen=True)
class Scene:
    """What is seen of a TrainJob at one moment."""

    phases: Sequence[str] = ("Running", "Running")
    logs: Mapping[int, str] = field(default_factory=dict)
    state: str = ""
    message: str = ""
    codes: Mapping[int, int] = field(default_factory=dict)
    """With which the containers of nodes have ended."""
    attempt: int = 0
    """Another one has other pods."""


@dataclass
class Fault:
    """An answer in place of the right one, so many times; status 0 hangs up."""

    status: int
    times: int
    method: str = ""
    path: str = ""
    message: str = "for a moment"
    served: bool = False
    """Whether the request does its work all the same, and only the answer is lost."""


class Refused(Exception):  # noqa: N818  (what the server does)
    """What the real server would not take either."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class KubernetesServer:
    """The state of the cluster, open to the tests."""

    script: Sequence[Scene] = (Scene(), Scene(state="Complete", phases=("Succeeded", "Succeeded")))
    folder: Path | None = None
    """Where the nodes run, if they do."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Values by `<secret or config map>/<key>`."""
    lingers: int = 0
    """Times that a TrainJob is seen after its deletion."""
    fault: Fault | None = None
    requests: list[tuple[str, str]] = field(default_factory=list)
    rights: set[tuple[str, str, str]] = field(default_factory=set)
    """Group, resource and verb of all that was asked for."""
    received: list[dict] = field(default_factory=list)
    jobs: dict[str, dict] = field(default_factory=dict)
    polls: int = 0
    nodes: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self):
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_error):
        self._end_nodes()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def kubeconfig(self, path: Path) -> Path:
        address = f"http://127.0.0.1:{self._http.server_address[1]}"
        context = {"name": "here", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}
        held = {"clusters": [{"name": "here", "cluster": {"server": address}}], "users": [{"name": "me", "user": {"token": TOKEN}}]}
        path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", "current-context": "here", "contexts": [context], **held}))
        return path

    def sent(self, method: str) -> list[str]:
        """Paths of the requests."""
        return [path for used, path in self.requests if used == method]

    # --- what is asked ---

    def create(self, body):
        _check(body)
        name = body["metadata"]["name"]
        if name in self.jobs:
            raise Refused(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        self.received.append(body)
        self.jobs[name] = body | {"metadata": body["metadata"] | {"namespace": NAMESPACE, "creationTimestamp": CREATED}}
        self.polls = 0
        if self.folder:
            self._start_nodes(body["spec"]["trainer"])
        return self.jobs[name]

    def get(self, name):
        job = self._one(name)
        if job["metadata"].get("deletionTimestamp"):
            self.lingers -= 1
            if self.lingers < 0:
                del self.jobs[name]
                raise Refused(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
        self.polls += 1
        scene = self.scene()
        told = {"type": scene.state, "status": "True", "reason": f"Jobs{scene.state}", "message": scene.message, "lastTransitionTime": CREATED}
        return job | ({"status": {"conditions": [told]}} if scene.state else {})

    def delete(self, name):
        job = self._one(name)
        self._end_nodes()
        if self.lingers:
            job["metadata"]["deletionTimestamp"] = CREATED
        else:
            del self.jobs[name]
        return {"kind": "Status", "status": "Success"}

    def pods(self, query):
        name = re.search("jobset-name=([^,]+)", query["labelSelector"])[1]
        if name not in self.jobs:
            return {"kind": "PodList", "items": []}
        scene = self.scene()
        return {
            "kind": "PodList",
            "items": [_pod(name, number, phase, scene.attempt, scene.codes.get(number)) for number, phase in enumerate(scene.phases)],
        }

    def log(self, pod, query):
        if query.get("container") != "node":
            raise Refused(400, f"container {query.get('container')} is not valid for pod {pod}")
        return self.scene().logs.get(int(re.search("-node-0-([0-9]+)-", pod)[1]), "")

    def runtime(self, name):
        if name != RUNTIME:
            raise Refused(404, f'clustertrainingruntimes.trainer.kubeflow.org "{name}" not found')
        container = {"name": "node", "image": "pytorch/pytorch:2.10.0"}
        pods = {"template": {"spec": {"containers": [container]}}}
        step = {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}, "spec": pods}
        spec = {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": {"replicatedJobs": [{"name": "node", "template": step}]}}}
        return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "ClusterTrainingRuntime", "spec": spec} | {
            "metadata": {"name": name, "labels": {"trainer.kubeflow.org/framework": "torch"}}
        }

    def answer(self, method, path, query, body):
        self.rights.add(right(method, path))
        for verb, pattern, action in ROUTES:
            if method == verb and (found := re.fullmatch(pattern, path)):
                return action(self, *found.groups(), query, body)
        raise Refused(403, f"{path} is forbidden")

    # --- what it plays ---

    def scene(self) -> Scene:
        """That of this moment."""
        if not self.nodes:
            return self.script[min(max(self.polls, 1), len(self.script)) - 1]
        codes = [node.poll() for node in self.nodes]
        phases = ["Running" if code is None else "Failed" if code else "Succeeded" for code in codes]
        state = "Failed" if any(codes) else "Running" if None in codes else "Complete"
        if state == "Failed":
            self._end_nodes(forget=False)
        logs = {number: (self.folder / f"node-{number}.log").read_text() for number in range(len(self.nodes))}
        return Scene(phases, logs, "" if state == "Running" else state, "jobset failed", dict(enumerate(codes)))

    def _start_nodes(self, trainer):
        port = str(free_port())
        for number in range(trainer["numNodes"]):
            told = {"PET_NNODES": trainer["numNodes"], "PET_NPROC_PER_NODE": trainer["numProcPerNode"], "PET_NODE_RANK": number}
            told |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port, "OMP_NUM_THREADS": 1, "PATH": os.environ["PATH"]}
            told |= {"HOME": self.folder, "DIFFSTILL_CACHE": self.folder / f"cache-{number}", "DIFFSTILL_WORK": self.folder / f"work-{number}"}
            told |= {"MLFLOW_TRACKING_URI": "none"} | {one["name"]: self._value(one) for one in trainer["env"]}
            command = [sys.executable if word == "python" else word for word in (*trainer["command"], *trainer["args"])]
            with (self.folder / f"node-{number}.log").open("w") as log:
                environment = {name: str(value) for name, value in told.items()}
                started = subprocess.Popen(command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
            self.nodes.append(started)

    def _value(self, variable):
        if "value" in variable:
            return variable["value"]
        named = variable["valueFrom"].get("secretKeyRef") or variable["valueFrom"]["configMapKeyRef"]
        return self.secrets[f"{named['name']}/{named['key']}"]

    def _end_nodes(self, *, forget=True):
        for node in self.nodes:
            if node.poll() is None:
                node.send_signal(signal.SIGTERM)
                node.wait(30)
        if forget:
            self.nodes = []

    def _one(self, name):
        if name not in self.jobs:
            raise Refused(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
        return self.jobs[name]


def _check(body):
    """What the CRD and the webhooks of Trainer 2.3 ask for."""
    made = models.TrainerV1alpha1TrainJob.from_dict(body)
    if made.to_dict() != body:
        raise Refused(400, f"strict decoding error: {made.to_dict()} is held, {body} was sent")
    if not re.fullmatch("[a-z]([-a-z0-9]{0,61}[a-z0-9])?", body["metadata"]["name"]):
        raise Refused(422, "metadata.name must match RFC 1035 DNS label format")
    if body["spec"]["runtimeRef"]["name"] != RUNTIME:
        raise Refused(403, 'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: specified runtime must be created')
    if errors := [*_jobset_errors(body["spec"]), *_torch_errors(body["spec"]["trainer"])]:
        raise Refused(403, f'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: {"; ".join(errors)}')


def _jobset_errors(spec):
    """Trainer 2.3.0, pkg/runtime/framework/plugins/jobset/jobset.go, `Validate`, for a runtime whose one job `node` has one container `node`.

    What it says of initializers and of changes to a TrainJob is told by other tests: we send neither.
    """
    patches = spec.get("runtimePatches", [])
    managers = [patch["manager"] for patch in patches]
    if len(set(managers)) < len(managers):
        yield f"spec.runtimePatches: Duplicate value: {managers}"
    for patch in patches:
        domain, slash, path = patch["manager"].partition("/")  # IsDomainPrefixedPath of k8s.io/apimachinery/pkg/api/validation
        if not slash or not re.fullmatch(SUBDOMAIN, domain) or not re.fullmatch(r"[A-Za-z0-9/\-._~%!$&'()*+,;=:]+", path):
            yield f'spec.runtimePatches.manager: "{patch["manager"]}" must be a domain-prefixed path (such as "acme.io/foo")'
        for job in patch.get("trainingRuntimeSpec", {}).get("template", {}).get("spec", {}).get("replicatedJobs", []):
            pod = job.get("template", {}).get("spec", {}).get("template", {}).get("spec", {})
            if job["name"] != "node":
                yield "must not have replicatedJob that doesn't exist in the runtime job template"
            for container in (*pod.get("initContainers", []), *pod.get("containers", [])):
                if container["name"] != "node":
                    yield f"must not have container that doesn't exist in the runtime job {job['name']}"
                elif container.get("env"):
                    yield "must not have envs for the dataset-initializer, model-initializer, node containers"


def _torch_errors(trainer):
    """Trainer 2.3.0, pkg/runtime/framework/plugins/torch/torch.go, `Validate`; and that a list of variables has each name once."""
    names = [variable["name"] for variable in trainer["env"]]
    if reserved := {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"} & set(names):
        yield f"spec.trainer.env: must not have reserved envs, invalid envs configured: {sorted(reserved)}"
    if len(set(names)) < len(names):
        yield f"spec.trainer.env: Duplicate value: {names}"


def _pod(job, number, phase, attempt, code):
    labels = {"jobset.sigs.k8s.io/jobset-name": job, "jobset.sigs.k8s.io/replicatedjob-name": "node"}
    labels |= {"batch.kubernetes.io/job-completion-index": str(number)}
    spec = {"containers": [{"name": "node", "image": "x", "resources": {"limits": {"cpu": "4", "memory": "8Gi"}}}]}
    metadata = {"name": f"{job}-node-0-{number}-abc{attempt}", "namespace": NAMESPACE, "labels": labels, "creationTimestamp": CREATED}
    state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
    status = {"name": "node", "image": "x", "imageID": "x", "ready": code is None, "restartCount": 0, "state": state}
    return {"metadata": metadata, "spec": spec, "status": {"phase": phase, "containerStatuses": [status]}}


JOBS = f"{TRAINER}/namespaces/{NAMESPACE}/trainjobs"
ROUTES = [
    ("POST", JOBS, lambda server, _query, body: server.create(body)),
    ("GET", f"{JOBS}/([^/]+)", lambda server, name, _query, _body: server.get(name)),
    ("DELETE", f"{JOBS}/([^/]+)", lambda server, name, _query, _body: server.delete(name)),
    (
        "GET",
        f"{TRAINER}/namespaces/{NAMESPACE}/trainingruntimes/([^/]+)",
        lambda _server, name, _query, _body: _none(name),
    ),
    (
        "GET",
        f"{TRAINER}/clustertrainingruntimes/([^/]+)",
        lambda server, name, _query, _body: server.runtime(name),
    ),
    ("GET", f"/api/v1/namespaces/{NAMESPACE}/pods", lambda server, query, _body: server.pods(query)),
    ("GET", f"/api/v1/namespaces/{NAMESPACE}/pods/([^/]+)/log", lambda server, pod, query, _body: server.log(pod, query)),
]


VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
RESOURCE = re.compile(r"/(?:api|apis/(?P<group>[^/]+))/[^/]+(?:/namespaces/[^/]+)?/(?P<resource>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<part>[^/]+))?)?")


def right(method, path):
    """Group, resource and verb of a request, as RBAC sees it; whether this server knows it or not."""
    found = RESOURCE.fullmatch(path)
    assert found, f"{method} {path} is no request for a resource"
    resource = "/".join(part for part in (found["resource"], found["part"]) if part)
    return found["group"] or "", resource, VERBS.get(method) or ("get" if found["name"] else "list")


def _none(name):
    raise Refused(404, f'trainingruntimes.trainer.kubeflow.org "{name}" not found')


def _handler(server: KubernetesServer):
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_given):
            pass

        def _serve(self):
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            body = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or "null")
            with lock:
                server.requests.append((self.command, parts.path))
                fault = server.fault
                struck = fault and fault.times > 0 and fault.method in ("", self.command) and fault.path in parts.path
                if struck:
                    fault.times -= 1
                try:
                    if self.headers.get("authorization") != f"Bearer {TOKEN}":
                        raise Refused(401, "Unauthorized")
                    answer = 200, server.answer(self.command, parts.path, query, body) if not struck or fault.served else None
                except Refused as refused:
                    answer = refused.status, _status(refused.status, str(refused))
            if struck and fault.status == 0:
                self.close_connection = True
                return
            self._reply(*((fault.status, _status(fault.status, fault.message)) if struck else answer))

        do_GET = do_POST = do_DELETE = _serve  # noqa: N815  (http.server's names)

        def _reply(self, status, body):
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "text/plain" if isinstance(body, str) else "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _status(code, message):
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}
