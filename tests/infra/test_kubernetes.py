"""Everything in infra/kubernetes: it renders, it is valid for two versions of Kubernetes, it keeps our policies, and the settings beside it fit."""

import copy
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity
from mlflow.server.security_utils import is_allowed_host_header

import manifests
from components.images import TAGGED, load_images
from diffstill.launch import REFUSAL
from manifests import CLUSTER, KUBERNETES, ROOT, VERSIONS, arguments, name, placed, pods, refused, rendered
from pipelines.nodes import labels, order
from pipelines.package import write_package
from pipelines.settings import load_settings
from policies import RULES, STRANGERS, by_kind, complaints, has_room, may_talk

OVERLAYS = sorted(path.parent.name for path in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))
OURS = [one for one in OVERLAYS if one != "mine"]
"""Without one's own, which is held to what is valid and to the policies, too."""
COMPONENTS = sorted(path.parent.name for path in (KUBERNETES / "components").glob("*/kustomization.yaml"))
FOR_KUBEFLOW = "kubeflow-retries"
"""A component that goes with Kubeflow's own manifests, and not with ours."""
SETTINGS = sorted(str(path.relative_to(KUBERNETES / "overlays")) for path in (KUBERNETES / "overlays").glob("*/settings*.yaml"))


def overlay(name):
    """An overlay on a cluster."""
    return placed(KUBERNETES / "overlays" / name)


@pytest.fixture(scope="session")
def secrets(tmp_path_factory):
    """The secrets as somebody makes them who copies the examples and fills them in."""
    folder = tmp_path_factory.mktemp("secrets")
    shutil.copy(KUBERNETES / "secrets" / "kustomization.yaml", folder)
    for example in (KUBERNETES / "secrets").glob("*.env.example"):
        (folder / example.stem).write_text(
            "".join(f"{line}sentinel\n" if line.endswith("=") else f"{line}\n" for line in example.read_text().split("\n")[:-1])
        )
    return rendered(folder)


def made_of(folder, resources, components=(), namespace="diffstill", transformers=("names",)):
    """An overlay of one's own, as the README writes one down."""
    up = Path(os.path.relpath(KUBERNETES, folder))
    parts = {
        "namespace": namespace,
        "transformers": [str(up / one) for one in transformers],
        "resources": [str(up / one) for one in resources],
        "components": [str(up / "components" / one) for one in components],
    }
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(head | parts))
    return rendered(folder)


def together(folder):
    """All components in one overlay, on a cluster."""
    made_of(folder, ["base"], [one for one in COMPONENTS if one != FOR_KUBEFLOW])
    return placed(folder)


# --- it renders, and is valid -------------------------------------------------------------------------------------


def test_the_overlays_are_those_that_are_described():
    assert OURS == ["aws", "gpu", "kind", "kueue", "multinode", "standalone"]
    described = (KUBERNETES / "README.md").read_text()
    shared = [str(folder.relative_to(KUBERNETES)) for folder in CLUSTER]
    for folder in (*(f"overlays/{one}" for one in OURS), *(f"components/{one}" for one in COMPONENTS), *shared):
        assert f"`{folder}`" in described, folder


def test_objects_are_validated_for_the_versions_that_are_promised():
    page = (KUBERNETES / "README.md").read_text()
    assert f"Written for Kubernetes {VERSIONS[0]} to {VERSIONS[-1]}," in page
    assert f"validates each object for Kubernetes {', '.join(VERSIONS[:-1])} and {VERSIONS[-1]}," in page
    assert set(re.findall(r"Kubernetes (\d+\.\d+)\.\d+ with", page)) <= set(VERSIONS), "what was tried is promised, too"


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{one}" for one in OVERLAYS), "external-secrets"])
def test_every_object_is_valid(folder):
    objects = placed(KUBERNETES / folder)
    assert len(objects) > 1
    assert [error for thing in objects for error in refused(thing)] == []
    assert len({(thing["apiVersion"], name(thing), thing["metadata"].get("namespace")) for thing in objects}) == len(objects)


def test_all_components_go_together(tmp_path):
    objects = together(tmp_path)
    assert [error for thing in objects for error in refused(thing)] == []
    assert complaints(objects) == []
    assert {"ClusterQueue", "ClusterTrainingRuntime", "RuntimeClass"} <= {thing["kind"] for thing in objects}
    assert by_kind(objects, "StatefulSet") == [], "the database is Amazon's"


def test_a_queue_takes_the_gpus_out_of_the_quota_in_any_order_of_the_components(tmp_path):
    orders = (["gpu", "kueue"], ["kueue", "gpu"], ["kueue"])
    made = []
    for at, listed in enumerate(orders):
        made_of(tmp_path / str(at), ["base"], listed)
        made.append(placed(tmp_path / str(at)))
        assert complaints(made[-1]) == [], listed
    assert made[0] == made[1] == made[2]
    assert [error for thing in made[1] for error in refused(thing)] == []


def test_secrets_come_from_files_that_git_ignores(secrets):
    assert {name(thing): set(thing["data"]) for thing in secrets} == {
        "Secret/diffstill-s3": {"access-key", "secret-key"},
        "Secret/diffstill-postgres": {"password"},
    }
    assert [error for thing in secrets for error in refused(thing)] == []
    assert (KUBERNETES / "secrets" / ".gitignore").read_text() == "*.env\n"
    examples = "".join(path.read_text() for path in (KUBERNETES / "secrets").glob("*.example"))
    assert all(line.startswith("#") or line.endswith("=") for line in examples.splitlines()), "examples hold no values"


def test_external_secrets_make_the_same_secrets(secrets):
    made = rendered(KUBERNETES / "external-secrets")
    keys = {thing["spec"]["target"]["name"]: {entry["secretKey"] for entry in thing["spec"]["data"]} for thing in made}
    assert keys == {thing["metadata"]["name"]: set(thing["data"]) for thing in secrets}


def put(thing, path, value):
    """A copy of an object with one entry set; steps of the path are names or numbers."""
    changed = copy.deepcopy(thing)
    *steps, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    reduce(lambda at, step: at[step], steps, changed)[last] = value
    return changed


@pytest.mark.parametrize(
    ("folder", "which", "path", "value", "said"),
    [
        ("base", "Deployment/mlflow", "spec/replica", 2, "replica"),
        ("base", "Deployment/mlflow", "spec/replicas", "two", "'two' is not of type"),
        ("base", "NetworkPolicy/mlflow", "spec/ingress/0/form", [], "form"),
        ("base", "ResourceQuota/diffstill", "spec/hard", ["cpu"], "is not of type"),
        ("base", "PodDisruptionBudget/mlflow", "apiVersion", "policy/v1beta1", "no schema is known"),
        ("overlays/kueue", "ClusterQueue/diffstill", "spec/cohort", "all", "'cohort' was unexpected"),
        ("overlays/kueue", "ClusterQueue/diffstill", "spec/preemption/withinClusterQueue", "Always", "'Always' is not one of"),
        ("overlays/kueue", "ClusterQueue/diffstill", "spec/resourceGroups/0/flavors/0/resources/0/nominalQuota", "64 cores", "does not match"),
        ("overlays/kueue", "ResourceFlavor/diffstill-gpu", "spec/nodelabels", {}, "'nodelabels' was unexpected"),
        ("overlays/kueue", "LocalQueue/diffstill-gpu", "spec/clusterQueue", "Not A Name", "does not match"),
        ("overlays/kueue", "WorkloadPriorityClass/diffstill-gpu", "value", "high", "'high' is not of type"),
        ("overlays/kueue", "LocalQueue/diffstill-gpu", "metadata/label", {}, "label"),
        ("external-secrets", "ExternalSecret/diffstill-s3", "spec/data/0/remoteref", {}, "'remoteref' was unexpected"),
        ("external-secrets", "ExternalSecret/diffstill-s3", "apiVersion", "external-secrets.io/v1beta1", "no schema is known"),
        ("overlays/multinode", "ClusterTrainingRuntime/diffstill-torch", "spec/mlPolicy/nodes", 2, "'nodes' was unexpected"),
        ("overlays/multinode", "ClusterTrainingRuntime/diffstill-torch", "spec/mlPolicy/torch/numProcPerNode", 4, "'numProcPerNode' was unexpected"),
        (
            "overlays/multinode",
            "ClusterTrainingRuntime/diffstill-torch",
            "spec/template/spec/replicatedJobs/0/template/spec/template/spec/containers/0/images",
            "x",
            "images",
        ),
    ],
)
def test_an_object_that_is_wrong_is_refused(folder, which, path, value, said):
    thing = next(one for one in placed(KUBERNETES / folder) if name(one) == which)
    assert refused(thing) == []
    found = refused(put(thing, path, value))
    assert found
    assert all(said in error for error in found), found


@pytest.mark.parametrize("program", [None, "v1.29.7"])
def test_without_a_kubectl_that_can_render_nothing_passes(tmp_path, monkeypatch, program):
    if program:
        said = json.dumps({"clientVersion": {"major": "1", "minor": "29+", "gitVersion": program}})
        (tmp_path / "kubectl").write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if program else str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda _name: str(tmp_path / "kubectl") if program else None)
    with pytest.raises(pytest.fail.Exception, match=r"install 1\.30 or newer"):
        manifests.kubectl.__wrapped__()


def test_every_schema_names_its_source():
    listed = (KUBERNETES / "crds" / "SOURCES.md").read_text()
    files = {path.name for path in (KUBERNETES / "crds").glob("*.yaml")}
    assert {line.split("|")[1].strip() for line in listed.splitlines() if line.startswith("| ") and ".yaml" in line} == files


def test_the_schema_of_the_runtime_is_that_of_the_package():
    path = KUBERNETES / "crds" / "trainer.py"
    spec = importlib.util.spec_from_file_location("trainer", path)
    trainer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    assert trainer.text() == trainer.FILE.read_text(), f"python {path.relative_to(ROOT)} writes it anew"


@pytest.mark.parametrize("overlay", ["gpu", "multinode"])
def test_manifests_of_the_pipeline_are_valid(overlay, tmp_path):
    """What `python -m pipelines compile --kubernetes` writes."""
    settings = load_settings(KUBERNETES / "overlays" / overlay / "settings.yaml")
    write_package(settings, load_images(ROOT / "tests" / "pipelines" / "golden" / "images.lock"), tmp_path / "p.yaml", kubernetes=True)
    made = list(yaml.safe_load_all((tmp_path / "p.yaml").read_text()))
    assert [thing["kind"] for thing in made] == ["Pipeline", "PipelineVersion"]
    assert [error for thing in made for error in refused(thing)] == []
    assert {thing["metadata"].get("namespace") for thing in made} == {"diffstill"}
    assert "'pipelinename' was unexpected" in refused(put(made[1], "spec/pipelinename", "x"))[0]


# --- retries ------------------------------------------------------------------------------------------------------

STOCK = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: workflow-controller-configmap}
data:
  artifactRepository: |
    archiveLogs: true
  workflowDefaults: |
    spec:
      ttlStrategy:
        secondsAfterCompletion: 3600
      templateDefaults:
        retryStrategy:
          limit: '2'
          retryPolicy: OnError
"""
"""Kubeflow Pipelines 2.17.0, manifests/kustomize/third-party/argo/base/workflow-controller-configmap-patch.yaml, in part."""


@pytest.fixture
def defaults(tmp_path_factory):
    """What Argo puts into workflows, with the component."""
    folder = tmp_path_factory.mktemp("kubeflow")
    (folder / "stock.yaml").write_text(STOCK)
    component = os.path.relpath(KUBERNETES / "components" / FOR_KUBEFLOW, folder)
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(head | {"resources": ["stock.yaml"], "components": [component]}))
    (made,) = rendered(folder)
    (stock,) = list(yaml.safe_load_all(STOCK))
    assert refused(made) == []
    assert made["data"] | {"workflowDefaults": stock["data"]["workflowDefaults"]} == stock["data"], "nothing else of Kubeflow's is touched"
    return yaml.safe_load(made["data"]["workflowDefaults"]), yaml.safe_load(stock["data"]["workflowDefaults"])


def test_the_policy_of_retries_is_all_that_changes(defaults):
    made, stock = defaults
    strategy = made["spec"]["templateDefaults"].pop("retryStrategy")
    assert made["spec"] | {"templateDefaults": stock["spec"]["templateDefaults"]} == stock["spec"]
    assert strategy.pop("expression")
    assert strategy == stock["spec"]["templateDefaults"]["retryStrategy"] | {"retryPolicy": "Always"}


@pytest.mark.parametrize(
    ("attempt", "again"),
    [
        ({"exitCode": "1", "status": "Failed", "message": "main: Error (exit code 1)"}, True),
        ({"exitCode": "137", "status": "Failed", "message": "main: OOMKilled (exit code 137)"}, True),
        ({"exitCode": "143", "status": "Failed", "message": "main: Error (exit code 143)"}, True),
        ({"exitCode": "-1", "status": "Failed", "message": "The node was low on resource: ephemeral-storage."}, True),
        ({"exitCode": "-1", "status": "Failed", "message": "Pod was terminated in response to imminent node shutdown."}, True),
        ({"exitCode": "-1", "status": "Error", "message": "pod deleted"}, True),
        ({"exitCode": "1", "status": "Failed", "message": f"main: Error (exit code 1): {REFUSAL} (exit code 2): too little"}, False),
        ({"exitCode": "1", "status": "Failed", "message": f"main: Error (exit code 1): {REFUSAL} (exit code 3): not shown"}, False),
        ({"exitCode": "2", "status": "Failed", "message": "main: Error (exit code 2)"}, False),
        ({"exitCode": "3", "status": "Failed", "message": "main: Error (exit code 3)"}, False),
        ({"exitCode": "-1", "status": "Failed", "message": ""}, False),  # a graph, one of whose tasks failed
        ({"exitCode": "-1", "status": "Error", "message": ""}, False),
    ],
)
def test_what_may_go_better_is_tried_again_and_no_refusal(defaults, attempt, again):
    """Argo's language is read as Python, which says the same but for `contains`."""
    expression = defaults[0]["spec"]["templateDefaults"]["retryStrategy"]["expression"]
    as_python = re.sub(r"(\S+) contains (\"[^\"]*\")", r"\2 in \1", expression)
    assert as_python != expression
    assert eval(as_python, {"lastRetry": SimpleNamespace(**attempt)}) is again


# --- policies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{one}" for one in OVERLAYS), "external-secrets"])
def test_policies_are_kept(folder):
    assert complaints(placed(KUBERNETES / folder)) == []


def pod_of(thing):
    """The pod spec that an object holds, itself and not a copy."""
    return next(pods([thing])).spec


def spoil(which, change):
    """A change to one object among all."""
    return lambda objects: change(next(thing for thing in objects if name(thing) == which))


def drop(which):
    """All but one object."""

    def change(objects):
        objects[:] = [thing for thing in objects if name(thing) != which]

    return change


def env(thing, **variable):
    pod_of(thing)["containers"][0]["env"].append(variable)


def argument(which, *words):
    """One more on the command line of the first container."""
    return spoil(which, lambda it: pod_of(it)["containers"][0].setdefault("args", []).extend(words))


def hosts_of(thing, change):
    """What MLflow answers to."""
    args = pod_of(thing)["containers"][0]["args"]
    (at,) = [number for number, word in enumerate(args) if word.startswith("--allowed-hosts=")]
    args[at] = f"--allowed-hosts={change(args[at].partition('=')[2])}"


def probe_path(thing, probe, path):
    pod_of(thing)["containers"][0][probe]["httpGet"]["path"] = path


def lets(way, side, peer, ports=({"protocol": "TCP", "port": 443},)):
    """One more opening of MLflow's policy."""
    return spoil("NetworkPolicy/mlflow", lambda it: it["spec"][way].append({side: [peer], "ports": list(ports)}))


def budget(**spec):
    """The budget of MLflow, with other numbers."""

    def change(it):
        it["spec"] = {"selector": it["spec"]["selector"], **spec}

    return spoil("PodDisruptionBudget/mlflow", change)


SPOILED = [
    ("non_root", spoil("Deployment/mlflow", lambda it: pod_of(it)["securityContext"].update(runAsNonRoot=False))),
    ("non_root", spoil("StatefulSet/postgres", lambda it: pod_of(it)["securityContext"].update(runAsUser=0))),
    ("non_root", spoil("Job/buckets", lambda it: pod_of(it)["containers"][0]["securityContext"].update(runAsUser=0))),
    ("no_capabilities", spoil("Deployment/mlflow", lambda it: pod_of(it)["initContainers"][0]["securityContext"].pop("capabilities"))),
    ("no_capabilities", spoil("StatefulSet/s3", lambda it: pod_of(it)["containers"][0]["securityContext"]["capabilities"].update(add=["NET_ADMIN"]))),
    ("seccomp", spoil("StatefulSet/s3", lambda it: pod_of(it)["securityContext"].pop("seccompProfile"))),
    ("seccomp", spoil("StatefulSet/s3", lambda it: pod_of(it)["containers"][0]["securityContext"].update(seccompProfile={"type": "Unconfined"}))),
    ("no_escalation", spoil("Job/buckets", lambda it: pod_of(it)["containers"][0]["securityContext"].pop("allowPrivilegeEscalation"))),
    ("no_escalation", spoil("Job/buckets", lambda it: pod_of(it)["containers"][0]["securityContext"].update(privileged=True))),
    ("no_host", spoil("Deployment/mlflow", lambda it: pod_of(it).update(hostNetwork=True))),
    ("no_host", spoil("Deployment/mlflow", lambda it: pod_of(it)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}))),
    ("no_host", spoil("Deployment/mlflow", lambda it: pod_of(it)["containers"][0]["ports"][0].update(hostPort=5000))),
    ("read_only_root", spoil("StatefulSet/postgres", lambda it: pod_of(it)["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"))),
    ("bounded", spoil("Deployment/mlflow", lambda it: pod_of(it)["containers"][0].pop("resources"))),
    ("bounded", spoil("Deployment/mlflow", lambda it: pod_of(it)["initContainers"][0]["resources"]["limits"].pop("memory"))),
    ("pinned", spoil("StatefulSet/postgres", lambda it: pod_of(it)["containers"][0].update(image="postgres:latest"))),
    ("pinned", spoil("StatefulSet/postgres", lambda it: pod_of(it)["containers"][0].update(image="registry:5000/postgres"))),
    ("no_literal_secret", spoil("Deployment/mlflow", lambda it: env(it, name="PGPASSWORD", value="hunter2"))),
    ("no_literal_secret", spoil("Deployment/mlflow", lambda it: env(it, name="STORE", value="postgresql://mlflow:hunter2@postgres/mlflow"))),
    ("no_literal_secret", spoil("Deployment/mlflow", lambda it: pod_of(it)["containers"][0]["args"].append("--store=https://me:hunter2@host"))),
    ("no_literal_secret", spoil("ConfigMap/diffstill-services", lambda it: it["data"].update({"secret-key": "hunter2"}))),
    ("no_literal_secret", spoil("ConfigMap/diffstill-services", lambda it: it.update(kind="Secret"))),
    ("no_literal_secret", argument("Deployment/mlflow", "--dsn=host=postgres password=hunter2")),
    ("no_literal_secret", argument("Job/buckets", 'aws_secret_access_key="hunter2"')),
    ("no_literal_secret", argument("Job/buckets", "client = boto3.client('s3', aws_secret_access_key = 'hunter2')")),
    ("no_literal_secret", argument("StatefulSet/postgres", "--password", "hunter2")),
    ("no_literal_secret", spoil("Deployment/mlflow", lambda it: env(it, name="DSN", value="host=postgres password=hunter2"))),
    ("no_literal_secret", spoil("ConfigMap/diffstill-services", lambda it: it["data"].update(more="token: hunter2"))),
    (
        "no_literal_secret",
        spoil(
            "StatefulSet/postgres",
            lambda it: pod_of(it)["containers"][0]["livenessProbe"]["exec"]["command"].append("PGPASSWORD=hunter2"),
        ),
    ),
    ("probed", spoil("StatefulSet/s3", lambda it: pod_of(it)["containers"][0].pop("livenessProbe"))),
    ("probed", spoil("Deployment/mlflow", lambda it: pod_of(it)["containers"][0]["startupProbe"].update(failureThreshold=11))),
    ("probed", spoil("StatefulSet/s3", lambda it: pod_of(it)["containers"][0]["startupProbe"].pop("failureThreshold"))),
    *(
        ("mlflow_probed_where_it_answers", spoil("Deployment/mlflow", lambda it, probe=probe, path=path: probe_path(it, probe, path)))
        for probe, path in (("startupProbe", "/"), ("readinessProbe", "/healthz"), ("livenessProbe", "/metrics"))
    ),
    *(
        ("known_by_name", spoil("Deployment/mlflow", lambda it, change=change: hosts_of(it, change)))
        for change in (
            lambda hosts: f"{hosts},*",
            lambda hosts: f"{hosts}, *",
            lambda hosts: f"10.*,{hosts}",
            lambda _hosts: "",
            lambda hosts: f"{hosts},172.*:5000",
            lambda hosts: f"{hosts},mlflow*",
            lambda hosts: f"{hosts},*:5000",
        )
    ),
    ("known_by_name", spoil("Deployment/mlflow", lambda it: pod_of(it)["containers"][0].update(args=["--host=0.0.0.0"]))),
    ("known_by_name", argument("Deployment/mlflow", "--allowed-hosts", "*")),
    ("known_by_name", argument("Deployment/mlflow", "--disable-security-middleware")),
    ("known_by_name", spoil("Deployment/mlflow", lambda it: env(it, name="MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", value="true"))),
    ("no_literal_secret", argument("StatefulSet/postgres", "exec postgres --password hunter2")),
    *(("narrow", lets("ingress", "from", peer)) for peer in ({"ipBlock": {"cidr": "10.0.0.0/8"}}, {"namespaceSelector": {}}, {})),
    *(
        ("narrow", lets("egress", "to", {"ipBlock": block}))
        for block in (
            {"cidr": "0.0.0.0/0"},
            {"cidr": "128.0.0.0/1"},
            {"cidr": "169.254.0.0/16", "except": ["169.254.1.0/24"]},
            {"cidr": "0.0.0.0/0", "except": ["169.254.169.253/32"]},
            {"cidr": "::/0"},
        )
    ),
    ("narrow", lets("egress", "to", {"ipBlock": {"cidr": "10.0.0.0/16"}}, [])),
    ("narrow", lets("egress", "to", {"ipBlock": {"cidr": "10.0.0.0/16"}}, [{"protocol": "TCP"}])),
    ("narrow", lets("egress", "to", {"ipBlock": {"cidr": "10.0.0.0/16"}}, [{"protocol": "TCP", "port": 1, "endPort": 65535}])),
    ("narrow", spoil("NetworkPolicy/mlflow", lambda it: it["spec"]["egress"][0].pop("to"))),
    *(
        ("bound_to_us", spoil(binding, lambda it, group=group: it["subjects"].append({"kind": "Group", "name": group})))
        for binding in ("RoleBinding/diffstill-trainjob", "ClusterRoleBinding/diffstill-trainjob.diffstill")
        for group in ("system:authenticated", "system:unauthenticated")
    ),
    ("bound_to_us", spoil("RoleBinding/diffstill-pipeline", lambda it: it["subjects"][0].update(name="default"))),
    ("bound_to_us", spoil("ClusterRoleBinding/diffstill-trainjob.diffstill", lambda it: it["subjects"][0].update(namespace="team-b"))),
    ("bound_to_us", spoil("RoleBinding/diffstill-pipeline", lambda it: it["roleRef"].update(kind="ClusterRole", name="cluster-admin"))),
    ("closed", drop("NetworkPolicy/default-deny")),
    ("closed", spoil("NetworkPolicy/default-deny", lambda it: it["spec"].update(policyTypes=["Ingress"]))),
    ("closed", spoil("NetworkPolicy/default-deny", lambda it: it["spec"].update(ingress=[{}]))),
    ("closed", drop("NetworkPolicy/buckets")),
    ("closed", spoil("Deployment/mlflow", lambda it: it["spec"]["template"]["metadata"]["labels"].update({"app.kubernetes.io/name": "other"}))),
    ("no_idle_token", spoil("ServiceAccount/mlflow", lambda it: it.pop("automountServiceAccountToken"))),
    ("no_idle_token", spoil("Job/buckets", lambda it: pod_of(it).pop("automountServiceAccountToken"))),
    ("survives_drains", drop("PodDisruptionBudget/mlflow")),
    *(
        ("survives_drains", budget(**spec))
        for spec in ({"maxUnavailable": 0}, {"maxUnavailable": "0%"}, {"minAvailable": 1}, {"minAvailable": "50%"}, {"minAvailable": "100%"})
    ),
    (
        "survives_drains",
        lambda objects: objects.append(put(next(it for it in objects if it["kind"] == "PodDisruptionBudget"), "metadata/name", "two")),
    ),
    *(
        ("has_room", spoil("ResourceQuota/diffstill", lambda it, short=short: it["spec"]["hard"].update(short)))
        for short in (
            {"pods": "4"},
            {"requests.cpu": "100m"},
            {"limits.memory": "2Gi"},
            {"requests.storage": "20Gi"},
            {"persistentvolumeclaims": "3"},
        )
    ),
    ("restricted", spoil("Namespace/diffstill", lambda it: it["metadata"]["labels"].update({"pod-security.kubernetes.io/enforce": "baseline"}))),
    ("labelled", spoil("Service/mlflow", lambda it: it["metadata"].pop("labels"))),
    ("labelled", spoil("Job/buckets", lambda it: it["spec"]["template"]["metadata"]["labels"].pop("app.kubernetes.io/name"))),
    ("no_wildcard", spoil("Role/diffstill-pipeline", lambda it: it["rules"][2].update(verbs=["*"]))),
    ("no_wildcard", spoil("Role/diffstill-pipeline", lambda it: it["rules"][1].pop("resourceNames"))),
    ("connected", spoil("Service/mlflow", lambda it: it["spec"]["selector"].update({"app.kubernetes.io/name": "other"}))),
    ("connected", spoil("Service/s3", lambda it: it["spec"]["ports"][0].update(targetPort="http"))),
    ("connected", drop("PriorityClass/diffstill-services")),
    ("connected", drop("ServiceAccount/postgres")),
]
SPOILED_QUEUES = [
    drop("ClusterQueue/diffstill"),
    spoil("LocalQueue/diffstill-gpu", lambda it: it["spec"].update(clusterQueue="other")),
    spoil("Namespace/diffstill", lambda it: it["metadata"]["labels"].pop("diffstill/queue")),
    *(
        spoil("ResourceQuota/diffstill", lambda it, more=more: it["spec"]["hard"].update(more))
        for more in ({"requests.nvidia.com/gpu": "8"}, {"limits.nvidia.com/gpu": "64"}, {"limits.memory": "1Ti"}, {"requests.cpu": "128"})
    ),
]


@pytest.mark.parametrize(
    ("folder", "rule", "change"),
    [*(("kind", rule, change) for rule, change in SPOILED), *(("kueue", "queued", change) for change in SPOILED_QUEUES)],
)
def test_an_object_that_breaks_a_policy_is_reported(folder, rule, change):
    objects = overlay(folder)
    change(objects)
    assert rule in {said.partition(":")[0] for said in complaints(objects)}


def test_every_policy_was_seen_to_complain():
    assert {*(rule for rule, _change in SPOILED), "queued"} == {rule.__name__ for rule in RULES}


def test_what_pods_read_is_there(secrets, tmp_path):
    """Keys of secrets and config maps, by name."""
    for objects in (*(overlay(one) for one in OVERLAYS), together(tmp_path)):
        there = {
            (thing["kind"], thing["metadata"]["name"]): thing["data"] for thing in (*objects, *secrets) if thing["kind"] in ("Secret", "ConfigMap")
        }
        for pod in pods(objects):
            for variable in (each for container in pod.containers for each in container.get("env", [])):
                for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                    if wanted := variable.get("valueFrom", {}).get(field):
                        assert wanted["key"] in there[kind, wanted["name"]], f"{pod.owner}: {variable['name']}"


def test_the_server_is_called_by_names_that_it_answers_to():
    objects = overlay("kind")
    for services in (objects, overlay("standalone")):
        uri = next(thing["data"]["mlflow-uri"] for thing in by_kind(services, "ConfigMap"))
        assert uri.removeprefix("http://") in hosts(objects)
    assert {"mlflow", "mlflow.diffstill.svc.cluster.local:5000", "localhost:*"} <= set(hosts(objects))


def hosts(objects):
    """What MLflow answers to, as its own function takes it."""
    (pod,) = pods(by_kind(objects, "Deployment"))
    (found,) = [word for word in arguments(pod, pod.spec["containers"][0]) if word.startswith("--allowed-hosts=")]
    return found.partition("=")[2].split(",")


@pytest.mark.parametrize(
    "host", ["10.244.0.7:5000", "10.0.0.1:5000", "172.17.0.10:5000", "192.168.1.2:5000", "localhost:8000", "mlflow.diffstill:5000"]
)
def test_prometheus_and_people_are_let_in(host):
    assert is_allowed_host_header(hosts(overlay("kind")), host)


@pytest.mark.parametrize("host", [*STRANGERS, "10.evil5.example.:5000", "10.244.0.7:50001", "10.evil.example:15000", "8.8.8.8:5000"])
def test_a_name_that_a_stranger_leads_to_the_server_is_refused(host):
    """DNS rebinding: a page in somebody's browser talks to MLflow under a name of its own."""
    assert not is_allowed_host_header(hosts(overlay("kind")), host)


@pytest.mark.parametrize(
    ("access", "secret", "empty"),
    [
        ("key", "hunter2", None),
        ("", "hunter2", "access-key"),
        ("key", "", "secret-key"),
        (" ", "hunter2", "access-key"),
        ("", "", "access-key, secret-key"),
    ],
)
def test_an_s3_server_without_keys_does_not_start(access, secret, empty):
    """SeaweedFS lets everybody in where it is given none."""
    (pod,) = [pod for pod in pods(overlay("kind")) if pod.owner == "StatefulSet/s3"]
    (check,), (server,) = pod.spec["initContainers"], pod.spec["containers"]
    wanted = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    assert check["env"] == [variable for variable in server["env"] if variable["name"] in wanted]
    assert check["command"] == ["python", "-c"]
    given = dict(zip(wanted, (access, secret), strict=True))
    done = subprocess.run([sys.executable, "-I", "-c", *check["args"]], env=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if empty is None else 1), done.stderr
    told = f"empty in secret diffstill-s3: {empty}; write them into infra/kubernetes/secrets/s3.env, then kubectl apply -k infra/kubernetes/secrets\n"
    assert done.stderr == ("" if empty is None else told)


def test_the_services_are_those_of_the_local_stack():
    """One set of images and of SeaweedFS's options: what is tried with Compose holds here."""
    compose = yaml.safe_load((ROOT / "infra" / "local" / "compose.yaml").read_text())["services"]
    here = {container["name"]: container for pod in pods(overlay("kind")) for container in pod.containers}
    assert {one: here[one]["image"] for one in ("postgres", "s3", "mlflow", "buckets")} == {
        one: compose[one]["image"] for one in ("postgres", "s3", "mlflow", "buckets")
    }
    assert [*here["s3"]["command"], *here["s3"]["args"]] == [*compose["s3"]["entrypoint"], *compose["s3"]["command"]]
    users = {pod.labels["app.kubernetes.io/name"]: pod.spec["securityContext"] for pod in pods(overlay("kind"))}
    for one in ("postgres", "s3"):
        assert compose[one]["user"] == f"{users[one]['runAsUser']}:{users[one]['runAsGroup']}"


# --- the network --------------------------------------------------------------------------------------------------

HERE, KUBEFLOW = "diffstill", "kubeflow"
MLFLOW, POSTGRES, S3 = ((HERE, {"app.kubernetes.io/name": one}) for one in ("mlflow", "postgres", "s3"))
DRIVER = (HERE, {"workflows.argoproj.io/workflow": "flow"})
TASK = (HERE, labels("evaluate") | DRIVER[1])
THERE = (KUBEFLOW, labels("evaluate") | DRIVER[1])
NODE = (HERE, labels("finetune") | {"jobset.sigs.k8s.io/jobset-name": "finetune-0"})
STRANGER = ("elsewhere", {"app": "web"})
KFP = (KUBEFLOW, {"app": "ml-pipeline"})


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (TASK, MLFLOW, 5000), (NODE, MLFLOW, 5000), (THERE, MLFLOW, 5000), (TASK, S3, 8333), (NODE, S3, 8333), (THERE, S3, 8333),
        (MLFLOW, POSTGRES, 5432), (MLFLOW, S3, 8333), ((HERE, {"app.kubernetes.io/name": "buckets"}), S3, 8333),
        (TASK, KFP, 8887), (DRIVER, KFP, 8887), (DRIVER, (KUBEFLOW, {"app": "metadata-grpc"}), 8080), (DRIVER, (KUBEFLOW, {"app": "seaweedfs"}), 8333),
        (NODE, NODE, 29500), (NODE, NODE, 45123),
        (("monitoring", {"app": "prometheus"}), MLFLOW, 5000), (("ingress-nginx", {}), MLFLOW, 5000),
        (TASK, ("istio-system", {"app": "istiod"}), 15012), (POSTGRES, ("istio-system", {"app": "istiod"}), 15012),
    ],
)  # fmt: skip
def test_who_must_talk_can(source, target, port):
    objects = [*overlay("kind"), *overlay("standalone")]
    assert may_talk(objects, source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (TASK, POSTGRES, 5432), (DRIVER, POSTGRES, 5432), (STRANGER, POSTGRES, 5432), (S3, POSTGRES, 5432), (THERE, POSTGRES, 5432),
        (STRANGER, MLFLOW, 5000), (DRIVER, MLFLOW, 5000), ((KUBEFLOW, DRIVER[1]), MLFLOW, 5000), (TASK, MLFLOW, 22),
        (STRANGER, S3, 8333), (MLFLOW, S3, 8888), (TASK, S3, 9333), (("monitoring", {}), POSTGRES, 5432), (("monitoring", {}), S3, 8333),
        (POSTGRES, MLFLOW, 5000), (S3, MLFLOW, 5000), (POSTGRES, STRANGER, 80), (MLFLOW, STRANGER, 80), (TASK, STRANGER, 80),
        (TASK, ("istio-system", {}), 80), (TASK, ("kube-system", {"app": "other"}), 53),
        (STRANGER, TASK, 80), (TASK, TASK, 29500), (STRANGER, NODE, 29500), (TASK, NODE, 29500), (KFP, TASK, 80),
    ],
)  # fmt: skip
def test_who_need_not_talk_cannot(source, target, port):
    assert not may_talk([*overlay("kind"), *overlay("standalone")], source, target, port)


# --- settings of the pipeline -------------------------------------------------------------------------------------


def test_every_overlay_that_runs_are_sent_to_has_settings():
    sent_to = [one for one in OURS if one != "standalone"]
    assert {f"{one}/settings.yaml" for one in sent_to} | {"gpu/settings-spot.yaml"} == {one for one in SETTINGS if not one.startswith("mine/")}


@pytest.mark.parametrize("file", SETTINGS)
def test_the_settings_of_an_overlay_name_what_is_there(file, secrets, tmp_path):
    path = KUBERNETES / "overlays" / file
    objects, settings = [*placed(path.parent), *secrets], load_settings(path)
    write_package(settings, TAGGED, tmp_path / "distill.yaml", caching=False)
    infra = settings.infra
    data = {(thing["kind"], thing["metadata"]["name"]): set(thing["data"]) for thing in objects if "data" in thing}
    for kind, sources in (("Secret", infra.secrets), ("ConfigMap", infra.config_maps)):
        for source, keys in sources.items():
            assert set(keys) <= data[kind, source], source
    runtime = infra.trainjob.runtime if infra.trainjob else None
    claims = {infra.work_claim, infra.cache_claim}
    wanted = {("ServiceAccount", infra.service_account), ("LocalQueue", infra.queue), ("WorkloadPriorityClass", infra.priority)}
    wanted |= {("ClusterTrainingRuntime", runtime), *(("PersistentVolumeClaim", claim) for claim in claims)}
    there = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    assert {(kind, one) for kind, one in wanted if one} <= there
    assert settings.cluster.namespace in (None, "diffstill")
    quota = next(thing["spec"]["hard"] for thing in by_kind(objects, "ResourceQuota"))
    assert list(has_room(objects, one_run(settings))) == []
    assert {"requests.cpu", "limits.memory", "pods", "requests.storage"} <= set(quota)
    assert ("requests.nvidia.com/gpu" in quota) == (not infra.queue and any(each.gpus for each in infra.resources.values()))


def one_run(settings):
    """The most of each that tasks of a run take at once: shards and nodes are beside each other, stages one after the other."""
    infra, most = settings.infra, {}
    copies = {"encode": settings.shards.encode, "sample": settings.shards.sample, "finetune": infra.trainjob.nodes if infra.trainjob else 1}
    for task, each in infra.resources.items():
        amounts = {"pods": 1, "requests.cpu": each.cpu, "limits.cpu": each.cpu, "requests.memory": each.memory, "limits.memory": each.memory}
        for what, much in (amounts | {"requests.nvidia.com/gpu": each.gpus}).items():
            most[what] = max(most.get(what, 0), copies.get(task, 1) * parse_quantity(much or 0))
    return most


@pytest.mark.parametrize(
    ("what", "much"), [("requests.nvidia.com/gpu", "7"), ("requests.cpu", "64"), ("limits.cpu", "65"), ("limits.memory", "512Gi"), ("pods", "5")]
)
def test_a_quota_without_room_for_a_run_is_seen(what, much):
    objects = overlay("multinode")
    run = one_run(load_settings(KUBERNETES / "overlays" / "multinode" / "settings.yaml"))
    assert list(has_room(objects, run)) == []
    by_kind(objects, "ResourceQuota")[0]["spec"]["hard"][what] = much
    (said,) = has_room(objects, run)
    assert said.startswith(f"ResourceQuota/diffstill allows {much} of {what}, but ")


def test_gpu_tasks_go_where_the_runtime_class_sends_pods():
    (gpu,) = by_kind(overlay("gpu"), "RuntimeClass")
    for one in (one for one in SETTINGS if not one.startswith(("kind/", "mine/"))):
        for task, resources in load_settings(KUBERNETES / "overlays" / one).infra.resources.items():
            tolerated = [each.model_dump(exclude_none=True) for each in resources.tolerations]
            if resources.gpus and "spot" in one:  # the label and the taint of spot nodes beside
                ((label, _value),) = resources.node_selector.items() - gpu["scheduling"]["nodeSelector"].items()
                assert tolerated == [*gpu["scheduling"]["tolerations"], {"key": label, "operator": "Exists", "effect": "NoSchedule"}], task
            elif resources.gpus:
                assert resources.node_selector == gpu["scheduling"]["nodeSelector"], (one, task)
                assert tolerated == gpu["scheduling"]["tolerations"], (one, task)


def test_a_task_on_spot_nodes_goes_on_where_it_was_and_is_tried_more_often():
    usual, spot = (load_settings(KUBERNETES / "overlays" / "gpu" / file).infra for file in ("settings.yaml", "settings-spot.yaml"))
    assert spot.work_claim
    apart = ("retries", "timeout_minutes", "node_selector", "tolerations")
    for task, resources in spot.resources.items():
        before = usual.resources[task]
        assert resources.model_copy(update={name: getattr(before, name) for name in apart}) == before, task
        assert (resources.retries > before.retries) == bool(resources.gpus), task
        assert resources.timeout_minutes or not resources.gpus, "a window of retries needs it"


def test_the_queue_holds_a_run_and_names_its_flavor():
    objects = overlay("kueue")
    (queue,), (flavor,) = by_kind(objects, "ClusterQueue"), by_kind(objects, "ResourceFlavor")
    (group,) = queue["spec"]["resourceGroups"]
    assert [each["name"] for each in group["flavors"]] == [flavor["metadata"]["name"]]
    held = {each["name"]: parse_quantity(each["nominalQuota"]) for each in group["flavors"][0]["resources"]}
    run = one_run(load_settings(KUBERNETES / "overlays" / "kueue" / "settings.yaml"))
    assert {what: run[f"requests.{what}"] <= much for what, much in held.items()} == dict.fromkeys(group["coveredResources"], True)


# --- a second team ------------------------------------------------------------------------------------------------

FIRST = re.compile(r"(?<![\w.-])(?:[a-z0-9-]+\.diffstill(?:[.:/,]|$)|diffstill\.svc\b)")
"""A host in the namespace of the first team, or an object's name with it."""


def traces(thing, at=""):
    """Places in an object, or a part of one, that lead to the namespace of the first team."""
    match thing:
        case {"key": "kubernetes.io/metadata.name", "values": values}:
            yield from (f"{at}.values" for value in values if value == "diffstill")
        case dict():
            for key, value in thing.items():
                inner = f"{at}.{key}"
                if key in ("namespace", "kubernetes.io/metadata.name") and value == "diffstill":
                    yield inner
                yield from traces(value, inner)
        case list():
            for number, value in enumerate(thing):
                yield from traces(value, f"{at}[{number}]")
        case str() if FIRST.search(thing):
            yield at


def space(thing):
    """The name of an object and, where it has one, its namespace."""
    return thing["apiVersion"], name(thing), thing["metadata"].get("namespace")


@pytest.mark.parametrize("parts", [*(f"overlays/{one}" for one in OURS if one != "standalone"), "base"])
def test_a_second_team_has_a_namespace_of_its_own(parts, tmp_path):
    first, second = rendered(KUBERNETES / parts), made_of(tmp_path, [parts], namespace="team-b")
    assert [f"{name(thing)}{at}" for thing in second for at in traces(thing)] == []
    assert {space(thing) for thing in first} & {space(thing) for thing in second} == set(), "one would overwrite the other's"
    assert {thing["metadata"].get("namespace") for thing in second} == {None, "team-b"}
    assert {name(thing) for thing in second if "namespace" not in thing["metadata"]} == {
        "Namespace/team-b",
        "ClusterRoleBinding/diffstill-trainjob.team-b",
    }
    assert {"mlflow.team-b:5000", "mlflow.team-b.svc.cluster.local:5000"} <= set(hosts(second))
    assert [error for thing in second for error in refused(thing)] == []
    assert complaints(placed(tmp_path)) == []


def test_an_overlay_that_forgets_what_the_namespace_does_not_reach_is_seen(tmp_path):
    made_of(tmp_path, ["base"], namespace="team-b", transformers=())
    (said,) = complaints(placed(tmp_path))
    assert "diffstill-pipeline of namespace diffstill; is names/ among the transformers" in said


def test_secrets_and_monitoring_follow_the_namespace(tmp_path):
    second = made_of(tmp_path, ["base", "external-secrets", "../monitoring"], namespace="team-b")
    assert [f"{name(thing)}{at}" for thing in second for at in traces(thing)] == []
    assert {"ExternalSecret", "ServiceMonitor"} <= {thing["kind"] for thing in second}
    assert {thing["metadata"].get("namespace") for thing in second} == {None, "team-b"}


def test_what_the_cluster_has_once_is_the_same_for_all():
    """No overlay repeats it, and it names no team."""
    shared = [thing for part in CLUSTER for thing in rendered(part)]
    assert [f"{name(thing)}{at}" for thing in shared for at in traces(thing)] == []
    for one in OURS:
        assert {space(thing) for thing in shared} & {space(thing) for thing in rendered(KUBERNETES / "overlays" / one)} == set()


@pytest.mark.parametrize(
    ("which", "path", "value"),
    [
        ("ConfigMap/diffstill-services", "data/mlflow-uri", "http://mlflow.diffstill:5000"),
        ("ConfigMap/diffstill-services", "data/s3-endpoint", "http://s3.diffstill:8333"),
        ("Deployment/mlflow", "spec/template/spec/containers/0/args/4", "--allowed-hosts=mlflow,mlflow.diffstill.svc:5000"),
        ("NetworkPolicy/mlflow", "spec/ingress/0/from/1/namespaceSelector/matchLabels", {"kubernetes.io/metadata.name": "diffstill"}),
        (
            "NetworkPolicy/mlflow",
            "spec/ingress/0/from/1/namespaceSelector",
            {"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["kubeflow", "diffstill"]}]},
        ),
        ("RoleBinding/diffstill-pipeline", "subjects/0/namespace", "diffstill"),
        ("ClusterRoleBinding/diffstill-trainjob.team-b", "metadata/name", "diffstill-trainjob.diffstill"),
    ],
)
def test_a_trace_of_the_first_team_is_seen(which, path, value, tmp_path):
    thing = next(one for one in made_of(tmp_path, ["base"], namespace="team-b") if name(one) == which)
    assert list(traces(thing)) == []
    assert len(list(traces(put(thing, path, value)))) == 1


def test_a_node_of_a_trainjob_keeps_the_policies():
    """The pod of the runtime with what the settings patch into it: lists are merged by name and by path, as the Trainer applies them."""
    objects = overlay("multinode")
    (runtime,) = by_kind(objects, "ClusterTrainingRuntime")
    infra = load_settings(KUBERNETES / "overlays" / "multinode" / "settings.yaml").infra
    job = order(infra, infra.trainjob, "registry.example/diffstill@sha256:" + "0" * 64).job
    (patch,) = job["spec"]["runtimePatches"]
    template = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    pod = next(manifests._templates(runtime))
    pod["metadata"]["labels"] |= template["metadata"]["labels"]
    volumes = {one["name"]: one for one in (*pod["spec"]["volumes"], *template["spec"]["volumes"])}
    (container,), (patched,) = pod["spec"]["containers"], template["spec"]["containers"]
    mounts = {one["mountPath"]: one for one in (*container["volumeMounts"], *patched["volumeMounts"])}
    pod["spec"] |= {key: value for key, value in template["spec"].items() if key != "containers"} | {"volumes": list(volumes.values())}
    container |= {"image": job["spec"]["trainer"]["image"], "securityContext": patched["securityContext"], "volumeMounts": list(mounts.values())}
    pod["spec"]["securityContext"]["fsGroup"] = 10001
    assert complaints(objects) == []
    assert refused(runtime) == []
    assert {one["name"] for one in mounts.values()} == set(volumes)
    assert set(mounts) == {"/tmp", "/dev/shm", "/var/diffstill", "/var/diffstill-cache"}
    assert volumes["shared-memory"]["emptyDir"]["sizeLimit"] == "64Gi", "the settings' and not the runtime's"
