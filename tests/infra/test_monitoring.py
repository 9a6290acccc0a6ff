"""The files for Prometheus and Grafana agree with each other, with what exporters serve, and with the handbook. tests/stack/test_monitoring.py runs them."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import jsonschema
import pytest
import yaml

from infra.monitoring.render import DASHBOARDS, SCHEMA_VERSION, rendered
from pipelines.nodes import labels

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "infra/monitoring"
HANDBOOK = (ROOT / "docs/operations.md").read_text()

PODS = "kube-state-metrics, docs/metrics/workload/pod-metrics.md at 96a6db8"
DCGM = "dcgm-exporter, etc/default-counters.csv at b54068a"
METRICS = {
    "up": "Prometheus itself",
    "ALERTS": "Prometheus itself",
    "mlflow_http_request_total": "MLflow 3.17 with --expose-prometheus: tests/stack/test_monitoring.py scrapes it",
    "mlflow_http_request_duration_seconds_bucket": "MLflow 3.17 with --expose-prometheus: tests/stack/test_monitoring.py scrapes it",
    "kube_pod_labels": PODS,
    "kube_pod_info": PODS,
    "kube_pod_start_time": PODS,
    "kube_pod_completion_time": PODS,
    "kube_pod_status_phase": PODS,
    "kube_pod_status_ready": PODS,
    "kube_pod_status_scheduled": PODS,
    "kube_pod_status_unschedulable": PODS,
    "kube_pod_container_status_restarts_total": PODS,
    "kube_pod_container_status_terminated_reason": PODS,
    "kube_pod_container_status_last_terminated_reason": PODS,
    "kube_pod_container_resource_requests": PODS,
    "kube_pod_spec_volumes_persistentvolumeclaims_info": PODS,
    "kubelet_volume_stats_available_bytes": "kubelet, /metrics; labels as in its tests of the volume stats collector",
    "kubelet_volume_stats_capacity_bytes": "kubelet, /metrics; labels as in its tests of the volume stats collector",
    "kueue_pending_workloads": "Kueue, pkg/metrics/metrics.go at e294b27",
    "kueue_admitted_active_workloads": "Kueue, site/content/en/docs/reference/metrics.md at 15e00ea",
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": "dcgm-exporter, deployment/templates/metrics-configmap.yaml at 00d6d34; not on every GPU",
    "DCGM_FI_DEV_GPU_UTIL": DCGM,
    "DCGM_FI_DEV_FB_USED": DCGM,
    "DCGM_FI_DEV_FB_FREE": DCGM,
    "DCGM_FI_DEV_POWER_USAGE": DCGM,
    "DCGM_FI_DEV_XID_ERRORS": DCGM,
}
"""Every series that is not recorded here: who serves it, and where its name was found."""
POD_LABELS = ("app.kubernetes.io/part-of", "app.kubernetes.io/name", "app.kubernetes.io/component", "pipeline/runid")
"""What kube-state-metrics must be allowed to show."""
WORDS = {"and", "or", "unless", "offset", "bool"}


@pytest.fixture(scope="module")
def groups():
    return yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]


@pytest.fixture(scope="module")
def rules(groups):
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def alerts(rules):
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


@pytest.fixture(scope="module")
def records(rules):
    return {rule["record"]: rule for rule in rules if "record" in rule}


@pytest.fixture(scope="module", params=[board.name for board in DASHBOARDS])
def board(request):
    return json.loads((MONITORING / "dashboards" / f"{request.param}.json").read_text())


def queries(board):
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def all_queries():
    return [query for path in (MONITORING / "dashboards").glob("*.json") for query in queries(json.loads(path.read_text()))]


def series(query):
    """The names of series in a query."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", "", re.sub(r'"[^"]*"', "", query))
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", "", bare)
    return set(re.findall(r"(?<![\w:$])[a-zA-Z_:][\w:]*(?!\s*\(|[\w:])", bare)) - WORDS


def heading_anchors(text):
    """The anchors that GitHub gives to headings."""
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def test_names_of_series_are_found():
    query = 'sum by (job, le) (rate(a_b{x="c", y=~"{d}"}[5m])) / on () group_left (e) f:g:h offset 1h > bool 0.5 and absent(up) or vector(0)'
    assert series(query) == {"a_b", "f:g:h", "up"}


def test_what_is_written_by_the_script_is_up_to_date():
    assert [str(path.relative_to(ROOT)) for path, text in rendered().items() if path.read_text() != text] == []
    assert {path.name for path in rendered()} >= {path.name for path in (MONITORING / "dashboards").iterdir()}


def test_the_operators_rules_are_the_rules(groups):
    rule = yaml.safe_load((MONITORING / "operator/prometheusrule.yaml").read_text())
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"] == {"groups": groups}


def test_every_series_has_an_exporter(rules, records):
    used = set().union(*(series(query) for query in [rule["expr"] for rule in rules] + all_queries()))
    assert used - set(records) == set(METRICS)


def test_every_recorded_series_is_used(rules, records):
    used = all_queries() + [rule["expr"] for rule in rules]
    assert [name for name in records if not any(name in series(query) for query in used)] == []


def test_rules_have_names_of_their_own(rules, alerts, records):
    assert len(alerts) + len(records) == len(rules)
    assert all(re.fullmatch(r"diffstill:[a-z_]+:[a-z0-9_]+", name) for name in records)
    assert all(re.fullmatch(r"Diffstill[A-Z][A-Za-z]+", name) for name in alerts)


def test_alerts_say_what_to_do(alerts):
    for name, alert in alerts.items():
        assert alert["labels"] == {"severity": alert["labels"]["severity"], "product": "diffstill"}
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}, name
        page, anchor = alert["annotations"]["runbook"].split("#")
        assert (page, anchor) == ("docs/operations.md", name.lower())
        assert anchor in heading_anchors(HANDBOOK), f"{page} has no heading {name}"


def test_the_handbook_has_no_other_alerts(alerts):
    assert set(re.findall(r"^#+ (Diffstill\w+)$", HANDBOOK, re.MULTILINE)) == set(alerts)


def test_retries_are_promised_with_the_policy_alone_that_makes_them(alerts):
    """Kubeflow Pipelines as it comes tries no failed task again."""
    texts = [*HANDBOOK.split("\n"), *(text for alert in alerts.values() for text in alert["annotations"].values())]
    texts += [panel.get("description", "") for path in (MONITORING / "dashboards").glob("*.json") for panel in json.loads(path.read_text())["panels"]]
    promises = [text for text in texts if re.search(r"tri(ed|es) again", text)]
    assert len(promises) >= 4
    assert [text for text in promises if "components/kubeflow-retries" not in text] == []


def test_the_handbook_allows_the_labels_that_the_rules_need(records):
    shown = set(re.findall(r"\blabel_(?!replace)\w+", " ".join(rule["expr"] for rule in records.values())))
    assert shown == {"label_" + re.sub(r"\W", "_", name) for name in POD_LABELS}
    assert HANDBOOK.count(f"pods=[{','.join(POD_LABELS)}]") == 2


def test_stages_carry_the_labels_that_the_rules_look_for(rules):
    carried = labels("finetune")
    assert carried == {"app.kubernetes.io/part-of": "diffstill", "app.kubernetes.io/name": "diffstill", "app.kubernetes.io/component": "finetune"}
    assert set(carried) == {name for name in POD_LABELS if name.startswith("app.")}
    chosen = {value for rule in rules for value in re.findall(r'(?:part_of|app)!?="([^"]*)"', rule["expr"])}
    assert chosen == {"diffstill"}


# --- dashboards -----------------------------------------------------------------------------------------------------


def test_a_dashboard_is_one_that_grafana_imports(board):
    assert board["uid"].removeprefix("diffstill-") in {"runs", "gpu", "services"}
    assert board["schemaVersion"] == SCHEMA_VERSION
    assert "id" not in board  # a number of the Grafana that it came from
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) > 5
    for panel in board["panels"]:
        assert panel["type"] in ("stat", "timeseries", "bargauge", "table")
        assert panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0


def test_a_dashboard_asks_the_chosen_source(board):
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert all(variable["datasource"] == chosen for name, variable in variables.items() if name != "datasource")
    for panel in board["panels"]:
        assert all(thing["datasource"] == chosen for thing in (panel, *panel["targets"]))


def test_a_dashboard_uses_its_variables_and_no_namespace_of_somebody(board):
    known = {variable["name"] for variable in board["templating"]["list"]} - {"datasource"}
    used = {name for query in queries(board) for name in re.findall(r"\$(?!__)(\w+)", query)}
    assert used == known
    values = [value for query in queries(board) for value in re.findall(r'namespace\s*=~?\s*"([^"]*)"', query)]
    assert values
    assert set(values) <= {"$namespace", "$namespace|"}


def test_panels_do_not_cover_each_other(board):
    cells = [
        (column, line)
        for place in (panel["gridPos"] for panel in board["panels"])
        for column in range(place["x"], place["x"] + place["w"])
        for line in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert all(0 <= column < 24 for column, _ in cells)
    lines = sorted({panel["gridPos"]["y"] for panel in board["panels"]})
    assert all(below - above <= 9 for above, below in pairwise(lines))


def test_dashboards_provide_what_the_handbook_promises():
    uids = [json.loads(path.read_text())["uid"] for path in (MONITORING / "dashboards").glob("*.json")]
    assert sorted(uids) == ["diffstill-gpu", "diffstill-runs", "diffstill-services"]


# --- how they are loaded --------------------------------------------------------------------------------------------


def test_the_local_scrape_configuration_serves_the_rules(rules):
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert [(MONITORING / name).resolve() for name in config["rule_files"]] == [MONITORING / "rules.yaml"]
    jobs = {name for rule in rules for name in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert jobs == {job["job_name"] for job in config["scrape_configs"]}


def test_grafana_finds_source_and_dashboards():
    folder = MONITORING / "grafana/provisioning"
    [source] = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://127.0.0.1:9090")
    [provider] = yaml.safe_load((folder / "dashboards/diffstill.yaml").read_text())["providers"]
    assert provider["type"] == "file"


@pytest.fixture
def objects():
    done = subprocess.run(["kubectl", "kustomize", MONITORING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {item["kind"]: item for item in yaml.safe_load_all(done.stdout)}


def test_one_command_loads_it_all_into_a_cluster(objects, groups):
    assert set(objects) == {"ServiceMonitor", "PrometheusRule", "ConfigMap"}
    for item in objects.values():
        assert item["metadata"]["namespace"] == "diffstill"
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "diffstill"
        assert item["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert objects["PrometheusRule"]["spec"]["groups"] == groups
    assert objects["ConfigMap"]["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert objects["ConfigMap"]["data"] == {path.name: path.read_text() for path in (MONITORING / "dashboards").glob("*.json")}


def refused(thing):
    """What the schema of the Prometheus operator says against an object."""
    [path] = (MONITORING / "crds").glob(f"*_{thing['kind'].lower()}s.yaml")
    [version] = yaml.safe_load(path.read_text())["spec"]["versions"]
    assert thing["apiVersion"] == f"monitoring.coreos.com/{version['name']}"
    return [error.message for error in jsonschema.Draft202012Validator(version["schema"]["openAPIV3Schema"]).iter_errors(thing)]


def test_the_operator_would_take_the_objects(objects):
    monitor, rule = objects["ServiceMonitor"], objects["PrometheusRule"]
    assert refused(monitor) == []
    assert refused(rule) == []
    assert refused(monitor | {"spec": {"endpoints": []}}) == ["'selector' is a required property"]
    rule["spec"]["groups"][0]["rules"][0]["four"] = "5m"
    assert refused(rule) == ["Additional properties are not allowed ('four' was unexpected)"]


def test_the_monitor_finds_mlflow_and_prometheus_may_ask_it(objects):
    done = subprocess.run(["kubectl", "kustomize", ROOT / "infra/kubernetes/base"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    base = {(item["kind"], item["metadata"]["name"]): item for item in yaml.safe_load_all(done.stdout)}
    service, policy = base["Service", "mlflow"], base["NetworkPolicy", "mlflow"]
    monitor = objects["ServiceMonitor"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["metadata"]["namespace"] == service["metadata"]["namespace"]
    assert {end["port"] for end in monitor["spec"]["endpoints"]} <= {port["name"] for port in service["spec"]["ports"]}
    [container] = base["Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"]
    assert any(word.startswith("--expose-prometheus=/") for word in container["args"])
    openings = [peer.get("namespaceSelector") for rule in policy["spec"]["ingress"] for peer in rule["from"] if "podSelector" not in peer]
    assert {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}} in openings
