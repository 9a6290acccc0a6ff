"""What objects of ours must be, beside valid: each rule is a function from all objects of an overlay to complaints, none if it is kept."""

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from math import ceil

from kubernetes.utils.quantity import parse_quantity

from manifests import Object, Pod, arguments, name, pods

Objects = Sequence[Object]
Rule = Callable[[Objects], Iterator[str]]

WRITABLE: Mapping[str, str] = {}
"""Containers whose root file system is not read-only -> why. There is none."""
WITH_TOKEN = {"diffstill-pipeline": "Argo's executor and Kubeflow's launcher report to the API server, and a task may make a TrainJob"}
"""Service accounts whose token pods get -> why."""
LONG = ("Deployment", "StatefulSet", "DaemonSet")
SENSITIVE = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN|ACCESS_KEY|API_KEY|CREDENTIAL")
IN_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")
SECRET_WORD = r"(?:password|passwd|secret|token|access[-_]?key|api[-_]?key|credential)[\w-]*"
ASSIGNED = re.compile(rf"""{SECRET_WORD}["']?[ \t]*[=:][ \t]*["']?(?!\$[({{\w]|os\.environ)[^\s"'=]""", re.IGNORECASE)
"""A word for a secret, and a value behind it that is no variable."""
FLAG = re.compile(rf"--?[\w-]*{SECRET_WORD}", re.IGNORECASE)
METADATA = tuple(map(ipaddress.ip_address, ("169.254.169.254", "fd00:ec2::254")))
"""Where clouds hand out the credentials of a node."""
STRANGERS = (
    "evil.example", "evil.example:5000", "10.evil.example", "10.evil.example:5000", "172.16.evil.example:5000", "192.168.evil.example:5000",
    "10.0.0.1.evil.example:5000", "10.1.xn--p1ai:5000", "mlflow.evil.example:5000", "mlflow.diffstill.evil.example:5000",
    "localhost.evil.example:5000", "127.0.0.1.evil.example:5000",
)  # fmt: skip
"""Names that anybody may register and lead to a private address."""
HOSTS_AROUND = re.compile(r"--allowed-hosts$|--disable-security-middleware|MLFLOW_SERVER_(ALLOWED_HOSTS|DISABLE_SECURITY_MIDDLEWARE)=")
"""What would overrule the list of hosts."""
SLOWEST_START = 60
"""Seconds that a service is given at least."""
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


def _literal(words: Sequence[str]) -> bool:
    """Whether a command holds a secret: in a URL, behind a word for it, or as the word after its option."""
    pairs = pairwise(" ".join(words).split())
    after = any(FLAG.fullmatch(word) and not value.startswith(("-", "$", '"$')) for word, value in pairs)
    return after or any(IN_URL.search(word) or ASSIGNED.search(word) for word in words)


def _commands(container: Object) -> Iterator[Sequence[str]]:
    """What is run in a container: its own command, and those of probes and hooks."""
    yield [*container.get("command", []), *container.get("args", [])]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        yield container.get(probe, {}).get("exec", {}).get("command", [])
    for hook in container.get("lifecycle", {}).values():
        yield hook.get("exec", {}).get("command", [])


def no_literal_secret(objects: Objects) -> Iterator[str]:
    for thing in by_kind(objects, "Secret"):
        yield f"{name(thing)} is in the manifests; secrets are made from files that git does not hold"
    for thing in by_kind(objects, "ConfigMap"):
        for key, value in thing.get("data", {}).items():
            if SENSITIVE.search(key.upper().replace("-", "_")) or _literal([value]):
                yield f"{name(thing)} holds what looks like a secret: {key}"
    for where, _pod, container in containers(objects):
        for variable in container.get("env", []):
            if "value" in variable and (SENSITIVE.search(variable["name"]) or _literal([variable["value"]])):
                yield f"{where} gets {variable['name']} in plain text; take it from a secret"
        if any(_literal(words) for words in _commands(container)):
            yield f"{where} has a password on its command line"


def probed(objects: Objects) -> Iterator[str]:
    for pod in pods(objects):
        for container in pod.spec["containers"] if pod.kind in LONG else ():
            missing = [probe for probe in ("startupProbe", "readinessProbe", "livenessProbe") if probe not in container]
            if missing:
                yield f"{pod.owner}/{container['name']} has no {', '.join(missing)}"
            start = container.get("startupProbe", {})
            given = start.get("initialDelaySeconds", 0) + start.get("periodSeconds", 10) * start.get("failureThreshold", 3)
            if start and given < SLOWEST_START:
                yield f"{pod.owner}/{container['name']} is killed if it has not started after {given} s; give it {SLOWEST_START} or more"


def _serves_mlflow(container: Object) -> bool:
    return [*container.get("command", []), *container.get("args", [])][:2] == ["mlflow", "server"]


def mlflow_probed_where_it_answers(objects: Objects) -> Iterator[str]:
    """Elsewhere than on /health it asks for a name that it knows, and a probe comes by address."""
    for where, pod, container in containers(objects):
        for probe in ("startupProbe", "readinessProbe", "livenessProbe") if pod.kind in LONG and _serves_mlflow(container) else ():
            if container.get(probe, {}).get("httpGet", {}).get("path") != "/health":
                yield f"{where} has a {probe} that does not ask for /health"


def known_by_name(objects: Objects) -> Iterator[str]:
    """No page of a stranger, whose name leads to an address of the cluster, may talk to MLflow (DNS rebinding)."""
    from mlflow.server.security_utils import is_allowed_host_header  # seconds

    for where, pod, container in containers(objects):
        if _serves_mlflow(container):
            words = [*arguments(pod, container), *(f"{variable['name']}={variable.get('value')}" for variable in container.get("env", []))]
            found = [word.partition("=")[2] for word in words if word.startswith("--allowed-hosts=")]
            hosts = [host.strip() for host in ",".join(found).split(",")]
            answers = [host for host in STRANGERS if is_allowed_host_header(hosts, host)]
            if answers or len(found) != 1 or not any(found):
                yield f"{where} answers to {', '.join(answers) or 'names that are not listed'}; name the hosts in one --allowed-hosts="
            if around := [word for word in words if HOSTS_AROUND.match(word)]:
                yield f"{where} has {around[0]}, which goes around that list"


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


def _reaches_metadata(block: Object) -> bool:
    """Whether a block of addresses holds the cloud's metadata service, and does not except it."""
    held = [address for address in METADATA if address in ipaddress.ip_network(block["cidr"], strict=False)]
    excepted = [ipaddress.ip_network(each, strict=False) for each in block.get("except", [])]
    return not all(any(address in each for each in excepted) for address in held)


def narrow(objects: Objects) -> Iterator[str]:
    """Who is let in has a label or a namespace; who goes out to addresses has ports, and not the cloud's metadata service."""
    for policy in by_kind(objects, "NetworkPolicy"):
        for side, way in (("from", "ingress"), ("to", "egress")):
            for rule in policy["spec"].get(way, []):
                peers, ports = rule.get(side, []), rule.get("ports", [])
                if not peers or any(not peer or (peer.get("namespaceSelector") == {} and not peer.get("podSelector")) for peer in peers):
                    yield f"{name(policy)} opens {way} for everybody; name peers"
                blocks = [peer["ipBlock"] for peer in peers if "ipBlock" in peer]
                if blocks and way == "ingress":
                    yield f"{name(policy)} lets addresses in: {blocks[0]['cidr']}; name pods or namespaces"
                elif blocks and (not ports or any("port" not in port or "endPort" in port for port in ports)):
                    yield f"{name(policy)} lets out to {blocks[0]['cidr']} by any port; name ports"
                for block in blocks:
                    if way == "egress" and _reaches_metadata(block):
                        yield f"{name(policy)} lets out to the metadata service of the cloud within {block['cidr']}; except it"


def bound_to_us(objects: Objects) -> Iterator[str]:
    """Each binding gives one role of ours to one account of ours."""
    known = {(thing["kind"], thing["metadata"]["name"]) for thing in objects}
    homes = {(one["metadata"]["name"], one["metadata"].get("namespace")) for one in by_kind(objects, "ServiceAccount")}
    for binding in (*by_kind(objects, "RoleBinding"), *by_kind(objects, "ClusterRoleBinding")):
        subjects = [(subject["kind"], subject["name"]) for subject in binding.get("subjects", [])]
        if len(subjects) != 1 or subjects[0][0] != "ServiceAccount" or subjects[0] not in known:
            yield f"{name(binding)} gives rights to {subjects}; name one service account of these manifests"
        elif (home := binding["subjects"][0].get("namespace")) and (subjects[0][1], home) not in homes:
            yield f"{name(binding)} gives rights to {subjects[0][1]} of namespace {home}; is names/ among the transformers of the overlay?"
        if (binding["roleRef"]["kind"], binding["roleRef"]["name"]) not in known:
            yield f"{name(binding)} gives {binding['roleRef']['name']}, which is not in these manifests"


def no_idle_token(objects: Objects) -> Iterator[str]:
    for account in by_kind(objects, "ServiceAccount"):
        if account["metadata"]["name"] not in WITH_TOKEN and account.get("automountServiceAccountToken") is not False:
            yield f"{name(account)} gives its token to every pod; set automountServiceAccountToken: false"
    for pod in pods(objects):
        if pod.spec.get("serviceAccountName") not in WITH_TOKEN and pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner} gets a token that it does not need; set automountServiceAccountToken: false"


def _replicas(objects: Objects, pod: Pod) -> int:
    return next(int(thing["spec"].get("replicas", 1)) for thing in objects if name(thing) == pod.owner)


def _may_be_missing(budget: Object, replicas: int) -> int:
    """How many of the pods may be evicted at once; a share of them is rounded up, as Kubernetes does."""

    def number(value: int | str) -> int:
        return ceil(replicas * int(value.rstrip("%")) / 100) if isinstance(value, str) else value

    spec = budget["spec"]
    return number(spec["maxUnavailable"]) if "maxUnavailable" in spec else replicas - number(spec.get("minAvailable", 1))


def survives_drains(objects: Objects) -> Iterator[str]:
    for pod in (pod for pod in pods(objects) if pod.kind in ("Deployment", "StatefulSet")):
        budgets = [budget for budget in by_kind(objects, "PodDisruptionBudget") if selects(budget["spec"]["selector"], pod.labels)]
        if pod.kind == "Deployment" and not budgets:
            yield f"{pod.owner} has no PodDisruptionBudget"
        if len(budgets) > 1 or any(_may_be_missing(budget, _replicas(objects, pod)) < 1 for budget in budgets):
            yield f"{pod.owner} cannot be evicted: {', '.join(map(name, budgets))} blocks every drain of a node"


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


def queued(objects: Objects) -> Iterator[str]:
    """A queue is the quota for GPUs: a ResourceQuota counts the pods that wait in it, too, and none could preempt.

    Of all else the namespace has room for the services and twice the queue: for what runs and for what waits.
    """
    queues = {thing["metadata"]["name"]: thing["spec"] for thing in by_kind(objects, "ClusterQueue")}
    for local in by_kind(objects, "LocalQueue"):
        if not (queue := queues.get(local["spec"]["clusterQueue"])):
            yield f"{name(local)} leads to ClusterQueue {local['spec']['clusterQueue']}, which is not there"
            continue
        mine = [thing for thing in objects if thing["metadata"].get("namespace") == local["metadata"].get("namespace")]
        for space in by_kind(objects, "Namespace"):
            if not selects(queue["namespaceSelector"], space["metadata"]["labels"]):
                yield f"{name(local)} leads to a ClusterQueue that {name(space)} is not let into"
        held = {each["name"]: each["nominalQuota"] for group in queue["resourceGroups"] for each in group["flavors"][0]["resources"]}
        for quota in by_kind(mine, "ResourceQuota"):
            hard, services = quota["spec"]["hard"], taken(mine)
            if gpus := [what for what in hard if "gpu" in what]:
                yield f"{name(quota)} counts {gpus[0]}, as {name(local)} does; leave it to the queue"
            for what in (f"{side}.{one}" for side in ("requests", "limits") for one in ("cpu", "memory")):
                wanted = services[what] + 2 * parse_quantity(held[what.partition(".")[2]])
                if wanted > parse_quantity(hard[what]):
                    yield f"{name(quota)} allows {hard[what]} of {what}, but {wanted} are needed for the services and twice the queue"


def _amounts(container: Object) -> Iterator[tuple[str, Decimal]]:
    """What a container takes from a quota."""
    for side in ("requests", "limits"):
        for what, much in container.get("resources", {}).get(side, {}).items():
            if side == "requests" or what in ("cpu", "memory"):  # of other resources, quotas count requests alone
                yield f"{side}.{what}", parse_quantity(much)


def taken(objects: Objects) -> dict[str, Decimal]:
    """What services and jobs take from the quota of their namespace, with one more pod of each Deployment, as while it is renewed."""
    total: dict[str, Decimal] = {}

    def add(what: str, much: Decimal) -> None:
        total[what] = total.get(what, Decimal(0)) + much

    for pod in (pod for pod in pods(objects) if pod.kind in (*LONG, "Job")):
        copies = (_replicas(objects, pod) if pod.kind in LONG else 1) + (pod.kind == "Deployment")
        add("pods", Decimal(copies))
        alone = [dict(_amounts(container)) for container in pod.spec.get("initContainers", [])]
        beside = [dict(_amounts(container)) for container in pod.spec["containers"]]
        for what in {what for amounts in (*alone, *beside) for what in amounts}:
            largest = max([sum((amounts.get(what, Decimal(0)) for amounts in beside), Decimal(0)), *(each.get(what, Decimal(0)) for each in alone)])
            add(what, copies * largest)
    templates = [claim for thing in by_kind(objects, "StatefulSet") for claim in thing["spec"].get("volumeClaimTemplates", [])]
    for claim in (*by_kind(objects, "PersistentVolumeClaim"), *templates):
        add("persistentvolumeclaims", Decimal(1))
        add("requests.storage", parse_quantity(claim["spec"]["resources"]["requests"]["storage"]))
    return total


def has_room(objects: Objects, run: Mapping[str, Decimal] | None = None) -> Iterator[str]:
    """The quota holds the services and, if one is given, a run beside them."""
    for quota in by_kind(objects, "ResourceQuota"):
        services = taken([thing for thing in objects if thing["metadata"].get("namespace") == quota["metadata"].get("namespace")])
        for what in sorted({*services, *(run or {})}):
            wanted, there = services.get(what, Decimal(0)) + (run or {}).get(what, Decimal(0)), quota["spec"]["hard"].get(what)
            if there is not None and wanted > parse_quantity(there):
                yield f"{name(quota)} allows {there} of {what}, but {wanted} are needed"


RULES: tuple[Rule, ...] = (
    non_root, no_capabilities, seccomp, no_escalation, no_host, read_only_root, bounded, pinned, no_literal_secret, probed,
    mlflow_probed_where_it_answers, known_by_name, closed, narrow, bound_to_us, no_idle_token, survives_drains, restricted, labelled,
    no_wildcard, connected, has_room, queued,
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
