"""Kubernetes objects as `kubectl kustomize` renders them, and what the API server would say of each: offline, with the schemas of Kubernetes and of the custom resources."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml

kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)  # it would read megabytes anew for each object
ROOT = Path(__file__).parents[1]
KUBERNETES = ROOT / "infra" / "kubernetes"
VERSIONS = ("1.32", "1.35", "1.36")
"""Of Kubernetes, that objects must be valid for."""
CLUSTER = sorted(path.parent for path in (KUBERNETES / "cluster").rglob("kustomization.yaml"))
"""Folders that a cluster has once, whatever the number of teams."""
OLDEST = (1, 30)
"""Of kubectl: its kustomize renders what we write."""

Object = dict[str, Any]


class Pod(NamedTuple):
    """A pod that an object makes."""

    owner: str
    kind: str
    namespace: str
    labels: Mapping[str, str]
    spec: Object

    @property
    def containers(self) -> list[Object]:
        """All of them, those that come first included."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@cache
def kubectl() -> str:
    """The program. Where there is none, or an old one, the test fails: nothing has been checked then."""
    found = shutil.which("kubectl")
    if not found:
        pytest.fail("kubectl is not installed, so that no overlay was rendered; install 1.30 or newer (https://kubernetes.io/docs/tasks/tools)")
    said = subprocess.run([found, "version", "--client", "--output=json"], capture_output=True, text=True, check=True).stdout
    version = json.loads(said)["clientVersion"]
    if (int(version["major"]), int(re.match(r"\d+", version["minor"])[0])) < OLDEST:
        pytest.fail(f"kubectl is {version['gitVersion']}, too old for these overlays; install 1.30 or newer (https://kubernetes.io/docs/tasks/tools)")
    return found


@cache
def text(folder: Path) -> str:
    """What `kubectl apply -k` would send."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    assert "# Warning" not in done.stderr, done.stderr
    return done.stdout


def rendered(folder: Path) -> list[Object]:
    """The objects, anew for each who asks."""
    made: list[Object] = json.loads(_as_json(folder))
    return made


def placed(folder: Path) -> list[Object]:
    """The objects and, where they make a namespace, all that `cluster/` has: as a cluster sees them."""
    objects = rendered(folder)
    alone = all(thing["kind"] != "Namespace" for thing in objects)
    return objects if alone else [*objects, *(thing for part in CLUSTER for thing in rendered(part))]


@cache
def _as_json(folder: Path) -> str:
    """Read once: YAML takes its time."""
    return json.dumps(list(yaml.load_all(text(folder), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))))


def name(thing: Object) -> str:
    """Like Deployment/mlflow."""
    return f"{thing['kind']}/{thing['metadata']['name']}"


def arguments(pod: Pod, container: Object) -> list[str]:
    """What it is started with, `$(VARIABLE)` put in as the kubelet does."""
    fields = {"metadata.namespace": pod.namespace}
    known = {
        each["name"]: each.get("value") or fields.get(each["valueFrom"].get("fieldRef", {}).get("fieldPath")) for each in container.get("env", [])
    }

    def put(found: re.Match[str]) -> str:
        return known.get(found[1]) or found[0]

    return [re.sub(r"\$\((\w+)\)", put, word) for word in container.get("args", [])]


def pods(objects: Iterable[Object]) -> Iterator[Pod]:
    """Every pod that the objects make, also those that a runtime of the Trainer makes in the namespace which is among them."""
    objects = list(objects)
    home = next((thing["metadata"]["name"] for thing in objects if thing["kind"] == "Namespace"), "diffstill")
    for thing in objects:
        for template in _templates(thing):
            labels = template.get("metadata", {}).get("labels", {})
            yield Pod(name(thing), thing["kind"], thing["metadata"].get("namespace", home), labels, template["spec"])


def _templates(thing: Object) -> Iterator[Object]:
    match thing["kind"]:
        case "Deployment" | "StatefulSet" | "DaemonSet" | "Job":
            yield thing["spec"]["template"]
        case "CronJob":
            yield thing["spec"]["jobTemplate"]["spec"]["template"]
        case "ClusterTrainingRuntime":
            for job in thing["spec"]["template"]["spec"]["replicatedJobs"]:
                yield job["template"]["spec"]["template"]
        case "Pod":
            yield thing


# --- schemas ------------------------------------------------------------------------------------------------------


def refused(thing: Object) -> list[str]:
    """What the API servers of all `VERSIONS` would refuse in it; nothing if it is valid."""
    return list(_refused(json.dumps(thing, sort_keys=True)))


@cache
def _refused(text: str) -> tuple[str, ...]:
    thing = json.loads(text)
    custom = definitions().get((thing["apiVersion"], thing["kind"]))
    said = [f"{name(thing)}: {error}" for error in (_core(thing) if custom is None else _custom(thing, custom))]
    if custom is not None:
        carrier = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": thing["metadata"]}
        templates = [{"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": each} for each in _templates(thing)]
        said += [f"{name(thing)}: {error}" for part in (carrier, *templates) for error in _core(part)]
    return tuple(said)


def _core(thing: Object) -> Iterator[str]:
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(thing, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{version}: {'.'.join(map(str, error.path))}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{version}: no schema is known for {thing['kind']} of {thing['apiVersion']}; add one to infra/kubernetes/crds"


def _custom(thing: Object, schema: Object) -> Iterator[str]:
    for error in jsonschema.Draft202012Validator(schema).iter_errors(thing):
        yield f"{'.'.join(map(str, error.path))}: {error.message}"


@cache
def definitions() -> Mapping[tuple[str, str], Object]:
    """The schemas of custom resources that are kept here, by version and kind."""
    found = {}
    for path in sorted((KUBERNETES / "crds").glob("*.yaml")):
        spec = yaml.safe_load(path.read_text())["spec"]
        for version in spec["versions"]:
            found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = _strict(version["schema"]["openAPIV3Schema"])
    return found


def _strict(schema: Object, at: str = "") -> Object:
    """A schema as the API server takes it with strict field validation: a field that it does not know is an error."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return {key: value for key, value in schema.items() if key == "type"}
    made = {key: value for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    if "items" in schema:
        made["items"] = _strict(schema["items"], f"{at}[]")
    if "properties" in schema:
        made["properties"] = {key: _strict(value, f"{at}.{key}") for key, value in schema["properties"].items()}
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _strict(schema["additionalProperties"], f"{at}.*")
    elif schema.get("type") == "object" and at != ".metadata":  # which is that of every object, and checked as such
        made["additionalProperties"] = False
    return made
