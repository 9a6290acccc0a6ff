"""What objects of ours must be, beside valid: each rule is a function from all objects of an overlay to complaints, none if it is kept."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from manifests import Object, Pod, name, pods

Objects = Sequence[Object]
Rule = Callable[[Objects], Iterator[str]]

WRITABLE: Mapping[str, str] = {}
"""Containers whose root file system is not read-only -> why. There is none."""
WITH_TOKEN = {"diffstill-pipeline": "Argo's executor and Kubeflow's launcher report to the API server, and a task may make a TrainJob"}
"""Service accounts whose token pods get -> why."""
LONG = ("Deployment", "StatefulSet", "DaemonSet")
SENSITIVE = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|API_KEY|CREDENTIAL")
IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")
PINNED = re.compile(r"[^\s:@]+(:\d+/[^\s:@]+)?(:(?P<tag>[\w][\w.-]*)|@sha256:[0-9a-f]{64})")


def by_kind(objects: Objects, kind: str) -> list[Object]:
    """The objects of a kind."""
    return [thing for thing in objects if thing["kind"] == kind]


def containers(objects: Objects) -> Iterator[tuple[str, Pod, Object]]:
    """A name for messages, the pod and the container."""
    for pod in pods(objects):
        for container in pod.containers:
            yield f"{pod.owner}/{container['name']}", pod, container


def _context(pod: Pod, container: Object, field: str) -> object:
    """A field of the security context: the container's, else the pod's."""
    own = container.get("securityContext", {})
    return own[field] if field in own else pod.spec.get("securityContext", {}).get(field)


def non_root(objects: Objects) -> Iterator[str]:
    for where, pod, container in containers(objects):
        if _context(pod, container, "runAsNonRoot") is not True or not _context(pod, container, "runAsUser"):
            yield f"{where} may run as root; set runAsNonRoot and a runAsUser above 0"


def no_capabilities(objects: Objects) -> Iterator[str]:
    for where, _pod, container in containers(objects):
        held = container.get("securityContext", {}).get("capabilities", {})
        if held.get("drop") != ["ALL"] or held.get("add"):
            yield f"{where} keeps capabilities; drop ALL"


def seccomp(objects: Objects) -> Iterator[str]:
    for where, pod, container in containers(objects):
        if _context(pod, container, "seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{where} has no seccomp profile; set RuntimeDefault"


def no_escalation(objects: Objects) -> Iterator[str]:
    for where, _pod, container in containers(objects):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
            yield f"{where} may gain privileges; set allowPrivilegeEscalation: false"


def no_host(objects: Objects) -> Iterator[str]:
    for pod in pods(objects):
        shared = [field for field in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(field)]
        shared += [f"volume {volume['name']}" for volume in pod.spec.get("volumes", []) if "hostPath" in volume]
        shared += [f"port {port['hostPort']}" for container in pod.containers for port in container.get("ports", []) if "hostPort" in port]
        if shared:
            yield f"{pod.owner} reaches into its node: {', '.join(shared)}"


def read_only_root(objects: Objects) -> Iterator[str]:
    for where, _pod, container in containers(objects):
        if container.get("securityContext", {}).get("readOnlyRootFilesystem") is not True and where not in WRITABLE:
            yield f"{where} may write to its root file system; mount an emptyDir where it must write"


def bounded(objects: Objects) -> Iterator[str]:
    for where, _pod, container in containers(objects):
        for kind in ("requests", "limits"):
            missing = {"cpu", "memory"} - set(container.get("resources", {}).get(kind, {}))
            if missing:
                yield f"{where} has no {kind} of {', '.join(sorted(missing))}"


def pinned(objects: Objects) -> Iterator[str]:
    for where, _pod, container in containers(objects):
        found = PINNED.fullmatch(container["image"])
        if not found or found["tag"] == "latest":
            yield f"{where} runs {container['image']}, which may be another tomorrow; name a version or a digest"


def no_literal_secret(objects: Objects) -> Iterator[str]:
    for thing in by_kind(objects, "Secret"):
        yield f"{name(thing)} is in the manifests; secrets are made from files that git does not hold"
    for thing in by_kind(objects, "ConfigMap"):
        for key, value in thing.get("data", {}).items():
            if SENSITIVE.search(key.upper().replace("-", "_")) or IN_URL.search(value):
                yield f"{name(thing)} holds what looks like a secret: {key}"
    for where, _pod, container in containers(objects):
        for variable in container.get("env", []):
            if "value" in variable and (SENSITIVE.search(variable["name"]) or IN_URL.search(variable["value"])):
                yield f"{where} gets {variable['name']} in plain text; take it from a secret"
        if any(IN_URL.search(word) for word in (*container.get("command", []), *container.get("args", []))):
            yield f"{where} has a password on its command line"


def probed(objects: Objects) -> Iterator[str]:
    for pod in pods(objects):
        for container in pod.spec["containers"] if pod.kind in LONG else ():
            missing = [probe for probe in ("startupProbe", "readinessProbe", "livenessProbe") if probe not in container]
            if missing:
                yield f"{pod.owner}/{container['name']} has no {', '.join(missing)}"


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels."""
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    meaning: Mapping[str, Callable[[Object], bool]] = {
        "Exists": lambda one: one["key"] in labels,
        "In": lambda one: labels.get(one["key"]) in one["values"],
    }
    return all(meaning[one["operator"]](one) for one in selector.get("matchExpressions", []))


def closed(objects: Objects) -> Iterator[str]:
    """A default that denies all, and for the pods of each object a policy that says what is open."""
    policies = by_kind(objects, "NetworkPolicy")
    for pod in pods(objects):
        own = [policy for policy in policies if policy["metadata"].get("namespace", "diffstill") == pod.namespace]
        deny = [
            policy["spec"] for policy in own if policy["spec"] == {"podSelector": {}, "policyTypes": policy["spec"]["policyTypes"]}
        ]  # no rule of either kind
        if not any({"Ingress", "Egress"} <= set(policy["policyTypes"]) for policy in deny):
            yield f"namespace {pod.namespace} of {pod.owner} has no policy that denies all traffic"
        if not any(policy["spec"]["podSelector"] and selects(policy["spec"]["podSelector"], pod.labels) for policy in own):
            yield f"no NetworkPolicy is for {pod.owner}"


def no_idle_token(objects: Objects) -> Iterator[str]:
    for account in by_kind(objects, "ServiceAccount"):
        if account["metadata"]["name"] not in WITH_TOKEN and account.get("automountServiceAccountToken") is not False:
            yield f"{name(account)} gives its token to every pod; set automountServiceAccountToken: false"
    for pod in pods(objects):
        if pod.spec.get("serviceAccountName") not in WITH_TOKEN and pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner} gets a token that it does not need; set automountServiceAccountToken: false"


def survives_drains(objects: Objects) -> Iterator[str]:
    budgets = by_kind(objects, "PodDisruptionBudget")
    for pod in pods(by_kind(objects, "Deployment")):
        if not any(selects(budget["spec"]["selector"], pod.labels) for budget in budgets):
            yield f"{pod.owner} has no PodDisruptionBudget"


def restricted(objects: Objects) -> Iterator[str]:
    for thing in by_kind(objects, "Namespace"):
        for mode in ("enforce", "warn", "audit"):
            if thing["metadata"].get("labels", {}).get(f"pod-security.kubernetes.io/{mode}") != "restricted":
                yield f"{name(thing)} does not {mode} restricted Pod Security"


def labelled(objects: Objects) -> Iterator[str]:
    for thing in objects:
        if thing["kind"] != "Namespace" and thing["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") != "diffstill":
            yield f"{name(thing)} lacks the label app.kubernetes.io/part-of: diffstill"
    for pod in pods(objects):
        if pod.labels.get("app.kubernetes.io/part-of") != "diffstill" or "app.kubernetes.io/name" not in pod.labels:
            yield f"pods of {pod.owner} lack a label app.kubernetes.io/part-of or /name"


def no_wildcard(objects: Objects) -> Iterator[str]:
    for thing in (*by_kind(objects, "Role"), *by_kind(objects, "ClusterRole")):
        for rule in thing["rules"]:
            if "*" in (*rule["apiGroups"], *rule["resources"], *rule["verbs"]):
                yield f"{name(thing)} allows with a wildcard"
            if "secrets" in rule["resources"] and not rule.get("resourceNames"):
                yield f"{name(thing)} allows every secret; name them"


def connected(objects: Objects) -> Iterator[str]:
    """A Service has pods with its port, a claim template or a claim stands behind each volume, and every class and account is there."""
    known = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    for service in by_kind(objects, "Service"):
        for port in service["spec"].get("ports", []):
            behind = [pod for pod in pods(objects) if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
            if not any(
                each.get("name") == port["targetPort"] for pod in behind for container in pod.containers for each in container.get("ports", [])
            ):
                yield f"{name(service)} leads to no port {port['targetPort']}"
    for pod in pods(objects):
        wanted = {"PriorityClass": pod.spec.get("priorityClassName"), "ServiceAccount": pod.spec.get("serviceAccountName")}
        wanted["RuntimeClass"] = pod.spec.get("runtimeClassName")
        for kind, wants in wanted.items():
            if wants and (kind, wants) not in known:
                yield f"{pod.owner} names {kind} {wants}, which is not there"


RULES: tuple[Rule, ...] = (
    non_root, no_capabilities, seccomp, no_escalation, no_host, read_only_root, bounded, pinned, no_literal_secret, probed, closed,
    no_idle_token, survives_drains, restricted, labelled, no_wildcard, connected,
)  # fmt: skip


def complaints(objects: Objects, rules: Sequence[Rule] = RULES) -> list[str]:
    """All that all rules have against the objects."""
    return [f"{rule.__name__}: {said}" for rule in rules for said in rule(objects)]


# --- who may talk to whom -------------------------------------------------------------------------------------------


def may_talk(objects: Objects, source: tuple[str, Mapping[str, str]], target: tuple[str, Mapping[str, str]], port: int) -> bool:
    """Whether TCP from a pod to a pod, each given as namespace and labels, passes the network policies of both."""
    return _lets(objects, source, target, port, "Egress") and _lets(objects, target, source, port, "Ingress")


def _lets(objects: Objects, one: tuple[str, Mapping[str, str]], other: tuple[str, Mapping[str, str]], port: int, way: str) -> bool:
    """Whether the policies for `one` let it talk with `other`: all is open where none selects it."""
    namespace, labels = one
    mine = [
        policy["spec"]
        for policy in by_kind(objects, "NetworkPolicy")
        if policy["metadata"].get("namespace", "diffstill") == namespace and selects(policy["spec"]["podSelector"], labels)
        and way in policy["spec"]["policyTypes"]
    ]  # fmt: skip
    rules = [rule for policy in mine for rule in policy.get(way.lower(), [])]
    return not mine or any(_opens(rule, namespace, other, port, "to" if way == "Egress" else "from") for rule in rules)


def _opens(rule: Object, namespace: str, other: tuple[str, Mapping[str, str]], port: int, side: str) -> bool:
    ports = rule.get("ports")
    if ports and not any(each["port"] == port and each.get("protocol", "TCP") == "TCP" for each in ports):
        return False
    return any(_is(peer, namespace, other) for peer in rule[side]) if side in rule else True


def _is(peer: Object, namespace: str, other: tuple[str, Mapping[str, str]]) -> bool:
    """Whether a peer of a policy means that pod; a block of addresses means none, since pods are known by labels here."""
    if "ipBlock" in peer:
        return False
    there = {"kubernetes.io/metadata.name": other[0]}
    in_place = selects(peer["namespaceSelector"], there) if "namespaceSelector" in peer else other[0] == namespace
    return in_place and selects(peer.get("podSelector", {}), other[1])
