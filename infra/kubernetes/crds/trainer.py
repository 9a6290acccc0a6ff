"""Write the schema of a training runtime from Kubeflow's own models: `python infra/kubernetes/crds/trainer.py`; a test holds the file to it.

Pods, volume claims and metadata are left open: they are objects of Kubernetes, which has schemas of its own.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1ClusterTrainingRuntime

FILE = Path(__file__).with_name("trainer.kubeflow.org_clustertrainingruntimes.yaml")
OPEN = ("IoK8sApiCoreV1PodTemplateSpec", "IoK8sApiCoreV1PersistentVolumeClaim", "IoK8sApimachineryPkgApisMetaV1ObjectMeta")
KEPT = ("type", "enum", "pattern", "minimum", "maximum", "maxItems", "minItems", "required", "format")


def definition() -> dict[str, Any]:
    """The custom resource definition."""
    schema = TrainerV1alpha1ClusterTrainingRuntime.model_json_schema(by_alias=True)
    shape = _plain(schema, schema["$defs"])
    versions = [{"name": "v1alpha1", "served": True, "storage": True, "schema": {"openAPIV3Schema": shape}}]
    names = {"kind": "ClusterTrainingRuntime", "plural": "clustertrainingruntimes"}
    spec = {"group": "trainer.kubeflow.org", "names": names, "scope": "Cluster", "versions": versions}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "clustertrainingruntimes.trainer.kubeflow.org"},
        "spec": spec,
    }


def _plain(schema: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Without references, titles and null, which Kubernetes' schemas know not."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True} if name in OPEN else _plain(named[name], named)
    given = [one for one in schema.get("anyOf", []) if one.get("type") != "null"]
    if len(given) == 1:
        return _plain(given[0], named)
    if given or not set(schema) & {"type", "properties"}:
        return {"x-kubernetes-preserve-unknown-fields": True}
    found = {name: schema[name] for name in KEPT if name in schema}
    if "properties" in schema:
        found["properties"] = {name: _plain(one, named) for name, one in schema["properties"].items()}
    elif schema["type"] == "object" and not isinstance(schema.get("additionalProperties"), dict):
        found["x-kubernetes-preserve-unknown-fields"] = True
    elif schema["type"] == "object":
        found["additionalProperties"] = _plain(schema["additionalProperties"], named)
    if "items" in schema:
        found["items"] = _plain(schema["items"], named)
    return found


def text() -> str:
    """The file."""
    source = f"# Written by trainer.py from the package kubeflow_trainer_api {version('kubeflow_trainer_api')} (Apache-2.0).\n"
    return source + yaml.safe_dump(definition(), sort_keys=False, width=140)


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
