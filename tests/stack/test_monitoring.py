"""Rules, scrape configuration and dashboards in Prometheus itself: promtool's checks, series that make every alert fire or just not, and a server that scrapes MLflow."""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from servers import free_port, mlflow_server, served

MONITORING = Path(__file__).parents[2] / "infra/monitoring"
RULES = MONITORING / "rules.yaml"
LENGTH = 150
"""Minutes that series last."""
Series = dict[str, str]


def for_good(value: float) -> str:
    """The same value in each minute, as promtool writes it."""
    return f"{value}+0x{LENGTH}"


def counted(step: float) -> str:
    """A counter that grows by so much in each minute."""
    return f"0+{step}x{LENGTH}"


def change(before: object, minute: int, after: float) -> str:
    """One value until a minute, and another from then on; `_` is none."""
    return f"_x{minute} {for_good(after)}" if before == "_" else f"{before}+0x{minute - 1} {for_good(after)}"


def labels(**values: str) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in values.items()) + "}"


def named(pod: str) -> dict[str, str]:
    """How kube-state-metrics names a pod."""
    return {"namespace": "team", "pod": pod, "uid": f"uid-{pod}", "job": "kube-state-metrics"}


def pod(
    name: str,
    phase: str = "Running",
    app: str = "diffstill",
    stage: str = "finetune",
    of: str = "diffstill",
    then: tuple[int, str] | None = None,
    **series: str,
) -> Series:
    """What kube-state-metrics shows of a pod that is in a phase, and in another from a minute on; `series` are more of its gauges."""
    ours = {"part_of": of, "name": app} | ({"component": stage} if stage else {})
    shown = {f"label_app_kubernetes_io_{key}": value for key, value in ours.items()} | {"label_pipeline_runid": "run-1"}
    phases = {phase: change(1, then[0], 0), then[1]: change(0, then[0], 1)} if then else {phase: for_good(1)}
    return (
        {f"kube_pod_labels{labels(**named(name), **shown)}": for_good(1)}
        | {f"kube_pod_status_phase{labels(**named(name), phase=each)}": values for each, values in phases.items()}
        | {f"{gauge}{labels(**named(name))}": values for gauge, values in series.items()}
    )


def service(ready: str, phase: str = "Running") -> Series:
    gauges = {"true": ready, "unknown": for_good(0)}
    return pod("postgres-0", phase, app="postgres", stage="") | {
        f"kube_pod_status_ready{labels(**named('postgres-0'), condition=condition)}": values for condition, values in gauges.items()
    }


def volume(free: float, mounted_by: str = "postgres-0") -> Series:
    """A claim with so many bytes of 100 free."""
    claim = {"namespace": "team", "persistentvolumeclaim": "data"}
    return pod("postgres-0", app="postgres", stage="") | {
        f"kubelet_volume_stats_available_bytes{labels(**claim)}": for_good(free),
        f"kubelet_volume_stats_capacity_bytes{labels(**claim)}": for_good(100),
        f"kube_pod_spec_volumes_persistentvolumeclaims_info{labels(**named(mounted_by), persistentvolumeclaim='data', volume='v')}": for_good(1),
    }


LAST = "kube_pod_container_status_last_terminated_reason"


def killed(reason: str, gauge: str = "kube_pod_container_status_terminated_reason", minute: int = 10) -> Series:
    """A container that ends in a minute for a reason."""
    return {f"{gauge}{labels(**named('train'), container='main', reason=reason)}": change("_", minute, 1)}


def gpu(name: str, values: str, pod: str | None = "train", honoured: bool = False, number: int = 0) -> Series:
    """A series of dcgm-exporter on the GPU that a pod holds, as scrapes label it that honour its labels, or do not."""
    card = {"Hostname": "node-1", "gpu": f"{number}", "UUID": f"GPU-{number}", "modelName": "H100"}
    exporter = {"namespace": "gpu-operator", "pod": "nvidia-dcgm-exporter-abcde"}
    holder = {"namespace": "team", "pod": pod} if honoured else {"exported_namespace": "team", "exported_pod": pod} if pod else {}
    return {f"{name}{labels(**card, **(exporter | holder))}": values}


def queue(name: str, waiting: int, running: int) -> Series:
    return {
        f"kueue_pending_workloads{labels(cluster_queue=name, status='inadmissible')}": for_good(waiting),
        f"kueue_admitted_active_workloads{labels(cluster_queue=name)}": for_good(running),
    }


def target(up: int, job: str = "mlflow") -> Series:
    return {f"up{labels(job=job, instance=f'{job}:5000')}": for_good(up)}


def answers(good: float, bad: float, status: int = 500, job: str = "mlflow") -> Series:
    """Requests to MLflow in a minute, by their status."""
    return {
        f"mlflow_http_request_total{labels(job=job, method='GET', status=f'{code}')}": counted(each) for code, each in ((200, good), (status, bad))
    }


def latencies(quick: float, job: str = "mlflow") -> Series:
    """100 requests a minute, so many of them within 5 s and the others within 10 s."""
    spread = {"2.5": quick / 2, "5.0": quick, "7.5": (quick + 100) / 2, "10.0": 100, "+Inf": 100}
    return {f"mlflow_http_request_duration_seconds_bucket{labels(job=job, le=edge)}": counted(count) for edge, count in spread.items()}


def time_of(seconds: float, name: str = "earlier") -> Series:
    """A pod that succeeded after so many seconds."""
    return pod(name, "Succeeded", kube_pod_start_time=for_good(100), kube_pod_completion_time=for_good(100 + seconds))


TRAIN = pod("train", kube_pod_start_time=for_good(0))
GPU_ASKED = {
    f"kube_pod_container_resource_requests{labels(**named('train'), container='main', resource='nvidia_com_gpu', unit='integer')}": for_good(4)
}
CPU_ASKED = {f"kube_pod_container_resource_requests{labels(**named('train'), container='main', resource='cpu', unit='core')}": for_good(4)}
TRAIN_UNREADY = {f"kube_pod_status_ready{labels(**named('train'), condition='true')}": for_good(0)}
UNSCHEDULABLE = {"kube_pod_status_unschedulable": for_good(1)}
SCHEDULED = {f"kube_pod_status_scheduled{labels(**named('train'), condition='true')}": for_good(1)}
GATED = {f"kube_pod_status_scheduled{labels(**named('train'), condition='false')}": for_good(1)}
BUSY = TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", for_good(90))
SOMEBODY = {'kube_pod_info{namespace="other", pod="web"}': for_good(1)}
XID = "DCGM_FI_DEV_XID_ERRORS"


@dataclass(frozen=True)
class Case:
    """Series that make an alert fire from a minute on and not before, which labels it then has, and series that never do."""

    alert: str
    minute: int
    fires: tuple[Series, ...]
    quiet: tuple[Series, ...]
    labels: str = ""
    over: int | None = None


CASES = (
    Case("DiffstillPodsUnseen", 15, (SOMEBODY,), (SOMEBODY | TRAIN, target(1))),
    Case(
        "DiffstillServiceUnready",
        10,
        (
            service(for_good(0)),
            service(for_good(0.49)),
            service("0 0 1 " * (LENGTH // 3)),
        ),  # 0.49: not a value of the gauge, but it tells thresholds apart
        (service("1 1 0 " * (LENGTH // 3)), service(for_good(0.5)), service(for_good(0), "Succeeded"), TRAIN | TRAIN_UNREADY),
        'app="postgres", pod="postgres-0"',
    ),
    Case("DiffstillServiceUnready", 48, (service(change(1, 30, 0)),), ()),
    Case("DiffstillVolumeFilling", 15, (volume(14.9), volume(5)), (volume(15), volume(4.9), volume(14, "somebody")), 'persistentvolumeclaim="data"'),
    Case("DiffstillVolumeFull", 5, (volume(4.9),), (volume(5), volume(1, "somebody")), 'persistentvolumeclaim="data"'),
    Case(
        "DiffstillStageFailed",
        70,
        (pod("train", then=(70, "Failed")), pod("train", then=(70, "Failed")) | killed("Error", minute=70)),
        (
            pod("train", then=(70, "Succeeded")),
            pod("train", then=(70, "Failed")) | killed("OOMKilled", minute=70),
            pod("job", then=(70, "Failed"), app="s3"),
        ),
        'stage="finetune", run="run-1", pod="train"',
        over=130,
    ),
    Case(
        "DiffstillOutOfMemory",
        70,
        (
            pod("train", then=(70, "Failed")) | killed("OOMKilled", minute=70),
            pod("train", app="mlflow", stage="") | killed("OOMKilled", LAST, 70),
            TRAIN | killed("Error", minute=5) | killed("Error", LAST, 5) | killed("OOMKilled", LAST, 70),
        ),
        (pod("train", then=(10, "Failed")) | killed("Error"), TRAIN | killed("Error", LAST), killed("OOMKilled")),
        'pod="train"',
        over=130,
    ),
    Case(
        "DiffstillStagePending",
        30,
        (pod("train", "Pending", **UNSCHEDULABLE), pod("train", "Pending") | SCHEDULED),
        (
            pod("train", "Pending", kube_pod_status_unschedulable=for_good(0)) | GATED,
            TRAIN | SCHEDULED,
            pod("s3-0", "Pending", app="s3", **UNSCHEDULABLE),
        ),
        'stage="finetune"',
    ),
    Case("DiffstillStageSlow", 39, (time_of(1000) | TRAIN,), (TRAIN, time_of(5000) | TRAIN), 'stage="finetune", run="run-1"'),
    Case("DiffstillStageSlow", 36, (time_of(60) | TRAIN,), (time_of(60) | pod("train", "Pending", kube_pod_start_time=for_good(0)),)),
    Case(
        "DiffstillQueueStuck",
        30,
        (queue("diffstill", 1, 0),),
        (queue("diffstill", 1, 1), queue("diffstill", 0, 0), queue("others", 1, 0)),
        'cluster_queue="diffstill"',
    ),
    Case(
        "DiffstillGpuIdle",
        15,
        (
            TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", for_good(4.9)),
            TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", for_good(4.9), honoured=True),
            TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", for_good(90)) | gpu("DCGM_FI_PROF_GR_ENGINE_ACTIVE", for_good(0.049)),
        ),
        (
            TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", for_good(5)),
            TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", f"{'0 ' * 9}100 " * (LENGTH // 10)),
            TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", for_good(0), "somebody"),
            TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", for_good(0), None),
        ),
        'namespace="team", pod="train", stage="finetune", run="run-1", Hostname="node-1", gpu="0"',
    ),
    Case("DiffstillGpuIdle", 30, (TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", change(90, 10, 0)),), ()),
    Case(
        "DiffstillGpuMemoryFull",
        10,
        (TRAIN | gpu("DCGM_FI_DEV_FB_USED", for_good(98)) | gpu("DCGM_FI_DEV_FB_FREE", for_good(2)),),
        (TRAIN | gpu("DCGM_FI_DEV_FB_USED", for_good(97)) | gpu("DCGM_FI_DEV_FB_FREE", for_good(3)),),
        'stage="finetune", gpu="0"',
    ),
    Case(
        "DiffstillGpuError",
        10,
        (
            BUSY | gpu(XID, change(0, 10, 79)),
            BUSY | gpu(XID, change(31, 10, 79)),
            TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", "90+0x9") | gpu(XID, "0+0x9") | gpu(XID, change("_", 10, 79), None),  # the pod is gone with the GPU
        ),
        (
            *(BUSY | gpu(XID, change(0, 10, code)) for code in (13, 31, 43, 45, 68, 109)),
            gpu(XID, change(0, 10, 79), "somebody"),
            TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", "90+0x5") | gpu(XID, change(0, 72, 79), None),
        ),
        'Hostname="node-1", gpu="0"',
        over=70,
    ),
    Case(
        "DiffstillGpuUnseen",
        15,
        (TRAIN | GPU_ASKED,),
        (BUSY | GPU_ASKED, TRAIN | CPU_ASKED, pod("train", "Succeeded") | GPU_ASKED, pod("train", app="others") | GPU_ASKED),
        'stage="finetune"',
    ),
    Case("DiffstillMLflowDown", 5, (target(0), target(1, "other")), (target(1) | target(0, "other"),)),
    Case(
        "DiffstillMLflowErrors", 6, (answers(94.9, 5.1),), (answers(95.1, 4.9), answers(94, 6, 404), answers(95.1, 4.9) | answers(0, 90, job="other"))
    ),
    Case("DiffstillMLflowErrors", 15, (answers(0, 0.51, 503),), (answers(0, 0.49, 503), answers(7, 0.45))),
    Case("DiffstillMLflowSlow", 16, (latencies(94.9),), (latencies(95.1),)),
)

ONE_POD = {"namespace": "team", "pod": "train", "uid": "uid-train", "app": "diffstill", "stage": "finetune", "run": "run-1"}
ONE_GPU = {"namespace": "team", "pod": "train", "stage": "finetune", "run": "run-1", "Hostname": "node-1", "gpu": "0", "UUID": "GPU-0"}
EARLIER = ONE_POD | {"pod": "earlier", "uid": "uid-earlier", "phase": "Succeeded"}
TIMES = {"kube_pod_start_time": for_good(0), "kube_pod_completion_time": for_good(500)}
OTHERS = pod("s3-0", app="s3", stage="", **TIMES) | pod("job", "Succeeded", app="s3", stage="", **TIMES) | pod("web", of="shop", **TIMES)
ENDED = pod("done", "Succeeded")
HALF_DONE = {f"kube_pod_completion_time{labels(**named('train'))}": for_good(500)}  # one of its containers has ended


def used(name: str, mine: float) -> Series:
    """A series of the GPU of our pod, of one that a service holds, of one whose pod has ended, and of one that nobody holds."""
    others = (gpu(name, for_good(1), holder, number=number) for number, holder in enumerate(("s3-0", "done", None), start=1))
    return gpu(name, for_good(mine)) | {key: values for series in others for key, values in series.items()}


RECORDS = {
    "diffstill:pod:phase": (TRAIN | SOMEBODY | pod("web", of="shop"), ONE_POD | {"phase": "Running"}, 1),
    "diffstill:stage_seconds:running": (TRAIN | time_of(60) | OTHERS, ONE_POD | {"phase": "Running"}, 600),
    "diffstill:stage_seconds:succeeded": (TRAIN | HALF_DONE | time_of(60) | OTHERS, EARLIER, 60),
    "diffstill:stage_seconds:longest_14d": (time_of(60) | time_of(90, "another") | TRAIN, {"namespace": "team", "stage": "finetune"}, 90),
    "diffstill:volume_free:ratio": (volume(25), {"namespace": "team", "persistentvolumeclaim": "data"}, 0.25),
    "diffstill:gpu_active:ratio": (TRAIN | OTHERS | ENDED | used("DCGM_FI_DEV_GPU_UTIL", 90), ONE_GPU, 0.9),
    "diffstill:gpu_memory:ratio": (TRAIN | OTHERS | ENDED | used("DCGM_FI_DEV_FB_USED", 30) | used("DCGM_FI_DEV_FB_FREE", 10), ONE_GPU, 0.75),
    "diffstill:gpu_power:watts": (TRAIN | OTHERS | ENDED | used("DCGM_FI_DEV_POWER_USAGE", 350), ONE_GPU, 350),
    "diffstill:mlflow_errors:ratio_rate10m": (answers(75, 25) | answers(1, 1, job="other"), {"job": "mlflow"}, 0.25),
    "diffstill:mlflow_latency_seconds:p95_10m": (latencies(90) | latencies(10, "other"), {"job": "mlflow"}, 7.5),
}
"""Each recorded series, what it comes from, and the one sample that it has in minute 10."""


def promtool(*words: object) -> None:
    """Run promtool, which must be content."""
    done = subprocess.run(["promtool", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, f"promtool failed: {done.stdout}"


def prove(folder: Path, *tests: tuple[Series, list[dict[str, Any]]]) -> None:
    """Have promtool evaluate the rules on series, and compare what expressions give."""
    told = [
        {"interval": "1m", "input_series": [{"series": name, "values": values} for name, values in series.items()], "promql_expr_test": expected}
        for series, expected in tests
    ]
    order = [
        group["name"] for group in yaml.safe_load(RULES.read_text())["groups"]
    ]  # else by chance, and what one group takes from another is a minute late
    (folder / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": [str(RULES)], "group_eval_order": order, "evaluation_interval": "1m", "tests": told})
    )
    promtool("test", "rules", folder / "test.yaml")


def firing(case: Case, minute: int, yes: bool) -> dict[str, Any]:
    chosen = f'alertname="{case.alert}", alertstate="firing"' + (f", {case.labels}" if case.labels else "")
    return {"expr": f"count(ALERTS{{{chosen}}})", "eval_time": f"{minute}m", "exp_samples": [{"labels": "{}", "value": 1}] if yes else []}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_an_alert_fires_when_it_should(case, tmp_path):
    ends = [firing(case, case.over, False)] if case.over else []
    expected = [firing(case, case.minute - 1, False), firing(case, case.minute, True), firing(case, case.minute + 5, True), *ends]
    prove(tmp_path, *((series, expected) for series in case.fires))


@pytest.mark.parametrize("case", [case for case in CASES if case.quiet], ids=lambda case: case.alert)
def test_an_alert_does_not_fire_just_below(case, tmp_path):
    ever = f'count_over_time(ALERTS{{alertname="{case.alert}", alertstate="firing"}}[{LENGTH}m])'
    never = [{"expr": ever, "eval_time": f"{case.minute + 65}m", "exp_samples": []}]
    prove(tmp_path, *((series, never) for series in case.quiet))


@pytest.mark.parametrize("name", RECORDS)
def test_a_series_is_recorded(name, tmp_path):
    series, found, value = RECORDS[name]
    prove(tmp_path, (series, [{"expr": f"round({name}, 0.001)", "eval_time": "10m", "exp_samples": [{"labels": labels(**found), "value": value}]}]))


def test_every_rule_is_tried():
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert {case.alert for case in CASES} == {rule["alert"] for rule in rules if "alert" in rule}
    assert set(RECORDS) == {rule["record"] for rule in rules if "record" in rule}


def test_promtool_fails_where_an_expectation_does(tmp_path):
    with pytest.raises(AssertionError, match="promtool failed"):
        prove(tmp_path, (target(1), [firing(Case("DiffstillMLflowDown", 5, (), ()), 5, True)]))


# --- the files as promtool sees them --------------------------------------------------------------------------------


def test_rules_are_taken():
    promtool("check", "rules", RULES)


def test_the_scrape_configuration_is_taken():
    promtool("check", "config", MONITORING / "prometheus.yml")


def queries(board: str) -> dict[str, list[str]]:
    """The queries of a dashboard by the title of their panel, with everything chosen in its variables."""
    panels = json.loads((MONITORING / "dashboards" / f"{board}.json").read_text())["panels"]
    found: dict[str, list[str]] = {}
    for panel in panels:
        texts = [re.sub(r"\$\w+", ".*", target["expr"].replace("$__range", "1h")) for target in panel["targets"]]
        found.setdefault(panel["title"], []).extend(texts)
    return found


@pytest.mark.parametrize("board", ["runs", "gpu", "services"])
def test_queries_of_a_dashboard_are_promql(board, tmp_path):
    texts = [text for panel in queries(board).values() for text in panel]
    rules = [{"record": f"query:{index}", "expr": text} for index, text in enumerate(texts)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": board, "rules": rules}]}))
    assert len(rules) > 10
    promtool("check", "rules", tmp_path / "rules.yaml")


PANELS = {
    ("gpu", "GPUs held"): 1,
    ("gpu", "GPU hours"): 0.5,
    ("gpu", "Mean use"): 0.9,
    ("runs", "Running"): 1,
    ("runs", "Failed attempts"): 0,
    ("runs", "Longest running"): 1740,
    ("services", "Least free volume"): 0.25,
}
"""What some single numbers show half an hour into a run."""


def test_numbers_of_dashboards_are_right(tmp_path):
    shown = [
        {"expr": queries(board)[title][0], "eval_time": "29m", "exp_samples": [{"labels": "{}", "value": value}]}
        for (board, title), value in PANELS.items()
    ]
    prove(tmp_path, (BUSY | volume(25), shown))


def test_idle_gpu_hours_are_counted(tmp_path):
    idle = TRAIN | gpu("DCGM_FI_DEV_GPU_UTIL", change(90, 15, 0))
    held, unused = queries("gpu")["GPU hours by stage"]
    samples = (
        {"expr": text, "eval_time": "29m", "exp_samples": [{"labels": '{stage="finetune"}', "value": hours}]}
        for text, hours in ((held, 0.5), (unused, 0.25))
    )
    prove(tmp_path, (idle, list(samples)))


# --- a server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prometheus:
    url: str

    def get(self, path: str, **values: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(values)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        return [float(sample["value"][1]) for sample in self.get("query", query=query)["result"]]

    def alert(self, name: str) -> dict[str, Any] | None:
        return next((alert for alert in self.get("alerts")["alerts"] if alert["labels"]["alertname"] == name), None)


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """Prometheus with the configuration of the local stack, but for the place of MLflow and for its patience."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    places = (f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{port}")
    with served(["prometheus", *places], port, folder / "prometheus.log", answers=_ready):
        yield Prometheus(f"http://127.0.0.1:{port}")


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def eventually(found: Callable[[], Any], seconds: float = 30) -> Any:
    """What a question gives as soon as it gives something."""
    deadline = time.monotonic() + seconds
    while not (answer := found()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return answer


def status(url: str, host: str | None = None, **options: Any) -> int:
    request = urllib.request.Request(url, headers={"Host": host} if host else {}, **options)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code


def requests_counted(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        return sum(float(line.split()[-1]) for line in answer.read().decode().splitlines() if line.startswith("mlflow_http_request_total{"))


@pytest.fixture(scope="module")
def watched_environment(tmp_path_factory):
    return {"MLFLOW_EXPOSE_PROMETHEUS": str(tmp_path_factory.mktemp("metrics")), "MLFLOW_SERVER_ALLOWED_HOSTS": "127.0.0.1:*"}


def test_prometheus_watches_mlflow(watched_environment, tmp_path):
    with ExitStack() as server:
        url = server.enter_context(mlflow_server(tmp_path, environment=watched_environment))
        assert status(f"{url}/metrics") == 200
        assert status(f"{url}/metrics", "10.1.2.3:5000") == 403  # a pod's address must be among the allowed hosts
        with prometheus(tmp_path, url.removeprefix("http://")) as watch:
            client = MlflowClient(url)
            assert eventually(lambda: watch.values('up{job="mlflow"}') == [1])
            for number in range(20):
                client.create_experiment(f"watched-{number}")
            before = requests_counted(url)
            assert before >= 20
            assert status(f"{url}/api/2.0/mlflow-artifacts/artifacts/file", data=b"bytes", method="PUT") == 200
            assert requests_counted(url) == before  # not counted, as the handbook says
            assert eventually(lambda: watch.values('sum(mlflow_http_request_total{method="POST", status="200"})') == [20])
            client.create_experiment("once-more")  # a rate needs a rise between two looks, and the first may have seen all twenty

            groups = watch.get("rules")["groups"]
            assert [rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")] == []
            eventually(lambda: watch.values("diffstill:mlflow_latency_seconds:p95_10m > 0"))
            for title in ("MLflow", "Requests a second", "95 % within", "Requests by answer", "Time of a request"):
                for query in queries("services")[title]:
                    assert eventually(lambda query=query: any(value > 0 for value in watch.values(query))), f"{title}: {query}"
            assert watch.alert("DiffstillMLflowDown") is None

            server.close()
            down = eventually(lambda: watch.alert("DiffstillMLflowDown"))
            assert down["state"] in ("pending", "firing")
            assert down["annotations"]["summary"] == f"MLflow at {url.removeprefix('http://')} does not answer"
