"""Write the dashboards from their short description below, and operator/prometheusrule.yaml from rules.yaml: `python infra/monitoring/render.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
OURS = 'namespace=~"$namespace"'
STAGES = f'app="diffstill", {OURS}, stage=~"$stage", run=~"$run"'
GPUS = f'{OURS}, stage=~"$stage", run=~"$run"'
SCHEMA_VERSION = 41
"""Of Grafana 12, which reads older ones, too."""
WIDTH = 24
"""Columns of a dashboard."""


@dataclass(frozen=True)
class Panel:
    """One panel: queries, each with the legend of its series."""

    title: str
    kind: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    columns: int = 12
    rows: int = 8
    about: str = ""


@dataclass(frozen=True)
class Dashboard:
    """One file in `dashboards`; `variables` are labels of recorded series to choose by."""

    name: str
    title: str
    about: str
    variables: tuple[str, ...]
    panels: tuple[Panel, ...]


def number(title: str, query: str, unit: str = "short", about: str = "") -> Panel:
    """A single number, six to a line."""
    return Panel(title, "stat", ((query, ""),), unit, columns=4, rows=4, about=about)


def curves(title: str, *queries: tuple[str, str], unit: str = "short", about: str = "") -> Panel:
    """Curves over time, two to a line."""
    return Panel(title, "timeseries", queries, unit, about=about)


def bars(title: str, *queries: tuple[str, str], unit: str = "short", about: str = "") -> Panel:
    """A bar per series at the end of the time range."""
    return Panel(title, "bargauge", queries, unit, about=about)


def table(title: str, query: str, unit: str = "short", about: str = "") -> Panel:
    """A line per series at the end of the time range."""
    return Panel(title, "table", ((query, ""),), unit, columns=24, rows=9, about=about)


def in_phase(phase: str) -> str:
    """The pods of stages that are in a phase now."""
    return f'diffstill:pod:phase{{{STAGES}, phase="{phase}"}}'


RUNS = Dashboard(
    "runs",
    "diffstill: runs",
    "Stages of the pipeline: what runs, waits and fails, and how long stages take",
    ("stage", "run"),
    (
        number("Running", f"count({in_phase('Running')}) or vector(0)"),
        number("Pending", f"count({in_phase('Pending')}) or vector(0)", about="With those that Kueue holds back."),
        number(
            "Failed attempts",
            f"count(max_over_time({in_phase('Failed')}[$__range])) or vector(0)",
            about="In the time range; tried again while retries are left, with infra/kubernetes/components/kubeflow-retries.",
        ),
        number("Longest running", f"max(diffstill:stage_seconds:running{{{STAGES}}})", "s"),
        number("Alerts", 'count(ALERTS{product="diffstill", alertstate="firing"}) or vector(0)'),
        number("Waiting in queues", 'sum(kueue_pending_workloads{cluster_queue=~"diffstill.*"}) or vector(0)'),
        curves("Pods of stages", (f"count by (phase) (diffstill:pod:phase{{{STAGES}}})", "{{phase}}")),
        curves("Running for", (f"diffstill:stage_seconds:running{{{STAGES}}}", "{{stage}}: {{pod}}"), unit="s"),
        bars(
            "Time of a stage",
            (f"quantile by (stage) (0.5, max_over_time(diffstill:stage_seconds:succeeded{{{STAGES}}}[$__range]))", "{{stage}}: median"),
            (f'max by (stage) (diffstill:stage_seconds:longest_14d{{{OURS}, stage=~"$stage"}})', "{{stage}}: longest in 14 days"),
            unit="s",
            about="Of pods that succeeded, from their start on a node to the end of their last container.",
        ),
        bars("Failed attempts by stage", (f"count by (stage) (max_over_time({in_phase('Failed')}[$__range]))", "{{stage}}")),
        table(
            "Stage times by run",
            f"max by (run, stage) (max_over_time(diffstill:stage_seconds:succeeded{{{STAGES}}}[$__range]))",
            "s",
            "The longest pod of each stage.",
        ),
        table("Alerts", 'ALERTS{product="diffstill"}'),
    ),
)

GPU = Dashboard(
    "gpu",
    "diffstill: GPUs",
    "What the GPUs do that stages hold, and what idles",
    ("stage", "run"),
    (
        number("GPUs held", f"count(diffstill:gpu_active:ratio{{{GPUS}}}) or vector(0)"),
        number(
            "of them idle",
            f"count(avg_over_time(diffstill:gpu_active:ratio{{{GPUS}}}[5m]) < 0.05) or vector(0)",
            about="Active for less than 5 % of the last 5 minutes.",
        ),
        number(
            "GPU hours", f"sum(sum_over_time((diffstill:gpu_active:ratio{{{GPUS}}} >= bool 0)[$__range:1m])) / 60", about="Held, in the time range."
        ),
        number(
            "of them idle",
            f"sum(sum_over_time((diffstill:gpu_active:ratio{{{GPUS}}} < bool 0.05)[$__range:1m])) / 60",
            about="Minutes below 5 %: held, paid for and not used.",
        ),
        number("Mean use", f"avg(avg_over_time(diffstill:gpu_active:ratio{{{GPUS}}}[$__range]))", "percentunit"),
        number("Power", f"sum(diffstill:gpu_power:watts{{{GPUS}}})", "watt"),
        curves(
            "Use",
            (f"diffstill:gpu_active:ratio{{{GPUS}}}", "{{stage}}: {{Hostname}}/{{gpu}}"),
            unit="percentunit",
            about="Share of time in which a kernel ran.",
        ),
        curves("Memory", (f"diffstill:gpu_memory:ratio{{{GPUS}}}", "{{stage}}: {{Hostname}}/{{gpu}}"), unit="percentunit"),
        curves("Power", (f"diffstill:gpu_power:watts{{{GPUS}}}", "{{stage}}: {{Hostname}}/{{gpu}}"), unit="watt"),
        bars(
            "GPU hours by stage",
            (f"sum by (stage) (sum_over_time((diffstill:gpu_active:ratio{{{GPUS}}} >= bool 0)[$__range:1m])) / 60", "{{stage}}: held"),
            (f"sum by (stage) (sum_over_time((diffstill:gpu_active:ratio{{{GPUS}}} < bool 0.05)[$__range:1m])) / 60", "{{stage}}: idle"),
        ),
        table(
            "Last XID of each GPU",
            "max by (Hostname, gpu, UUID) (DCGM_FI_DEV_XID_ERRORS) > 0",
            about="All GPUs of the cluster; kept by the exporter until it restarts.",
        ),
    ),
)

MLFLOW = 'job="mlflow", namespace=~"$namespace|"'
"""On one machine the target has no namespace."""
REQUESTS = f"mlflow_http_request_total{{{MLFLOW}}}"
BUCKETS = f"mlflow_http_request_duration_seconds_bucket{{{MLFLOW}}}"

SERVICES = Dashboard(
    "services",
    "diffstill: services",
    "MLflow's requests, the pods of MLflow, PostgreSQL and S3, and their volumes. Files that go through MLflow are not among its requests: it does not count them",
    (),
    (
        number("MLflow", 'min(up{job="mlflow"})', about="1 is up."),
        number("Requests a second", f"sum(rate({REQUESTS}[5m])) or vector(0)", "reqps"),
        number(
            "Errors",
            'max(diffstill:mlflow_errors:ratio_rate10m{namespace=~"$namespace|"}) or vector(0)',
            "percentunit",
            "Share of answers 5xx in 10 minutes.",
        ),
        number("95 % within", 'max(diffstill:mlflow_latency_seconds:p95_10m{namespace=~"$namespace|"})', "s"),
        number(
            "Services ready",
            f'count(diffstill:pod:phase{{app!="diffstill", {OURS}}} and on (namespace, pod, uid) kube_pod_status_ready{{condition="true"}} == 1) or vector(0)',
        ),
        number("Least free volume", f"min(diffstill:volume_free:ratio{{{OURS}}})", "percentunit"),
        curves("Requests by answer", (f"sum by (method, status) (rate({REQUESTS}[5m]))", "{{method}} {{status}}"), unit="reqps"),
        curves(
            "Time of a request",
            *((f"histogram_quantile({share}, sum by (le) (rate({BUCKETS}[5m])))", f"{100 * share:.0f} %") for share in (0.5, 0.95, 0.99)),
            unit="s",
        ),
        curves("Free in volumes", (f"diffstill:volume_free:ratio{{{OURS}}}", "{{persistentvolumeclaim}}"), unit="percentunit"),
        curves(
            "Restarts",
            (
                f'sum by (pod) (increase(kube_pod_container_status_restarts_total{{{OURS}}}[1h]) and on (namespace, pod, uid) diffstill:pod:phase{{app!="diffstill"}})',
                "{{pod}}",
            ),
            about="In the hour before.",
        ),
    ),
)
DASHBOARDS = (RUNS, GPU, SERVICES)


def placed(panels: tuple[Panel, ...]) -> Iterator[dict[str, Any]]:
    """Lay panels out in lines from left to right, and give them their ids."""
    x = y = height = 0
    for index, panel in enumerate(panels, start=1):
        if x + panel.columns > WIDTH:
            x, y, height = 0, y + height, 0
        yield drawn(panel, index) | {"gridPos": {"x": x, "y": y, "w": panel.columns, "h": panel.rows}}
        x, height = x + panel.columns, max(height, panel.rows)


def drawn(panel: Panel, index: int) -> dict[str, Any]:
    """A panel as Grafana wants it; all kinds but curves look at the end of the time range alone."""
    instant = panel.kind != "timeseries"
    targets = [
        {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": expression, "legendFormat": legend or "__auto"}
        | {"instant": instant, "range": not instant, "format": "table" if panel.kind == "table" else "time_series"}
        for number, (expression, legend) in enumerate(panel.queries)
    ]
    return {
        "id": index,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}} if panel.kind in ("stat", "bargauge") else {},
        "targets": targets,
    }


def choice(label: str) -> dict[str, Any]:
    """A variable: any values of a label of our pods."""
    query = f"label_values(diffstill:pod:phase, {label})"
    every = {"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return {"name": label, "type": "query", "datasource": SOURCE, "query": query, "definition": query, "refresh": 2, "sort": 1} | every


def grafana(dashboard: Dashboard) -> dict[str, Any]:
    """The file that Grafana imports."""
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": f"diffstill-{dashboard.name}",
        "title": dashboard.title,
        "description": dashboard.about,
        "tags": ["diffstill"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": True,
        "refresh": "1m",
        "time": {"from": "now-24h", "to": "now"},
        "links": [{"type": "dashboards", "tags": ["diffstill"], "title": "diffstill", "asDropdown": False, "includeVars": True, "keepTime": True}],
        "templating": {"list": [source, *map(choice, ("namespace", *dashboard.variables))]},
        "panels": list(placed(dashboard.panels)),
    }


def operators_rule(rules: str) -> str:
    """The rules as an object of the Prometheus operator."""
    head = "# Written by ../render.py from ../rules.yaml.\napiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: diffstill\nspec:\n"
    lines = rules[rules.index("groups:") :].splitlines()
    return head + "".join(f"  {line}\n" if line else "\n" for line in lines)


def rendered() -> dict[Path, str]:
    """All files that follow from others, with what belongs in them."""
    files = {HERE / "dashboards" / f"{each.name}.json": json.dumps(grafana(each), indent=1) + "\n" for each in DASHBOARDS}
    return files | {HERE / "operator" / "prometheusrule.yaml": operators_rule((HERE / "rules.yaml").read_text())}


if __name__ == "__main__":
    for path, text in rendered().items():
        path.write_text(text)
        print(f"wrote {path}", file=sys.stderr)
