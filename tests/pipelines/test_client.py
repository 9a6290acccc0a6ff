"""The client against a server that speaks the real interface: what is sent, what comes back, and what can go wrong on the way."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from kfp import compiler, components, dsl, local
from kfp_server import SENTINEL, Fault, KfpServer, lonely_server

from diffstill.artifacts import file_digest
from diffstill.errors import DiffstillError
from pipelines import client, connection
from pipelines.client import Cluster, Watcher
from pipelines.settings import ClusterConfig
from servers import free_port


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def double(number: int, words: dsl.Output[dsl.Dataset]) -> int:
    from pathlib import Path

    Path(words.path).write_text(f"twice {number}")
    return 2 * number


def compiled(path: Path, first: int = 1) -> Path:
    @dsl.pipeline(name="doubling")
    def doubling(number: int = first) -> int:
        once = double(number=number)
        with dsl.ParallelFor([1, 2]) as item:
            double(number=item)
        return double(number=once.outputs["Output"]).outputs["Output"]

    compiler.Compiler().compile(doubling, str(path))
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("package") / "doubling.yaml")


@pytest.fixture
def server(monkeypatch, tmp_path):
    with lonely_server(monkeypatch, tmp_path / "home") as running:
        yield running


@pytest.fixture
def config(server):
    return ClusterConfig(host=server.url, token_env="KFP_TOKEN", pipeline_root="s3://bucket/runs")


@pytest.fixture
def cluster(config):
    return Cluster.connect(config)


@pytest.fixture
def started(cluster, package):
    """The id of a run that has been submitted."""
    return cluster.submit(package, {"number": "5"}, "trial")


def refusal(config: ClusterConfig) -> str:
    with pytest.raises(DiffstillError) as error:
        Cluster.connect(config)
    return str(error.value)


# --- what is sent -------------------------------------------------------------------------------------------------


def test_a_run_names_its_version_arguments_root_and_account(server, cluster, package):
    run_id = cluster.submit(package, {"number": "5", "students": ["a", "b"]}, "trial", "runner")
    run = server.runs[run_id]
    version = server.versions[run.pipeline_version_reference.pipeline_version_id]
    assert version.display_name == file_digest(package)
    assert server.packages[version.pipeline_version_id] == package.read_bytes()
    assert server.pipelines[version.pipeline_id].display_name == "diffstill-distill"
    assert server.experiments[run.experiment_id].display_name == "diffstill"
    assert run.runtime_config.parameters == {"number": "5", "students": ["a", "b"]}
    assert run.runtime_config.pipeline_root == "s3://bucket/runs"
    assert (run.display_name, run.service_account) == ("trial", "runner")
    assert cluster.url(run_id) == f"{server.url}/#/runs/details/{run_id}"


def test_equal_packages_are_uploaded_once_and_others_become_versions_of_the_same_pipeline(server, cluster, package, tmp_path):
    other = compiled(tmp_path / "other.yaml", first=2)
    for sent in (package, other, package):
        cluster.submit(sent, {}, "trial")
    assert len(server.sent("POST", ".*/upload_version")) == len(server.versions) == 2
    assert len(server.pipelines) == len(server.experiments) == 1
    assert len(server.runs) == 3


def test_the_server_can_run_what_it_was_sent(server, cluster, package, tmp_path):
    cluster.submit(package, {}, "trial")
    (received,) = server.packages.values()
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"), raise_on_error=True)
    done = components.load_component_from_text(received.decode())(number=5)
    assert done.outputs["Output"] == 20
    assert sorted(path.read_text() for path in (tmp_path / "root").rglob("words")) == ["twice 1", "twice 10", "twice 2", "twice 5"]


def test_on_an_installation_for_many_everything_goes_to_the_namespace(server, config, package):
    server.multi_user = True
    assert "--namespace" in refusal(config)
    Cluster.connect(config.model_copy(update={"namespace": "ada"})).submit(package, {}, "trial")
    assert [one.namespace for one in (*server.experiments.values(), *server.pipelines.values())] == ["ada", "ada"]


def test_the_home_folder_is_neither_read_nor_written(server, config, tmp_path, package, monkeypatch):
    context = tmp_path / "home/.config/kfp/context.json"
    context.parent.mkdir(parents=True)
    context.write_text(json.dumps({"namespace": "elsewhere", "client_authentication_cookie": "stale"}))
    monkeypatch.setattr(connection.kfp.Client, "_LOCAL_KFP_CONTEXT", str(context))
    server.multi_user = True
    Cluster.connect(config.model_copy(update={"namespace": "ada"})).submit(package, {}, "trial")
    assert "elsewhere" in context.read_text()
    assert {one.namespace for one in server.experiments.values()} == {"ada"}
    assert not any("cookie" in request.headers for request in server.requests)


def test_nothing_but_our_own_words_is_printed(cluster, package, capfd):
    cluster.submit(package, {}, "trial")
    assert capfd.readouterr() == ("", "")


# --- what can go wrong --------------------------------------------------------------------------------------------


def test_the_token_is_in_the_header_of_every_request_and_nowhere_else(server, cluster, started, capfd, caplog):
    run = cluster.run(started)
    server.logs[run.tasks[0].pods[0]] = f"I was given {SENTINEL}"
    said = cluster.log(run, run.tasks[0].pods[0])
    server.fault = Fault(400, json.dumps({"message": f"bad header Bearer {SENTINEL}"}), headers={"x-seen": SENTINEL}, path="/runs")
    with pytest.raises(DiffstillError, match="bad header Bearer") as error:
        cluster.cancel(started)
    assert all(request.headers["authorization"] == f"Bearer {SENTINEL}" for request in server.requests)
    assert not any(SENTINEL in str([request.path, request.query, request.body]) for request in server.requests)
    printed = capfd.readouterr()
    assert SENTINEL not in f"{said}{error.value}{error.value.__cause__}{printed.out}{printed.err}{caplog.text}{cluster}"


@pytest.mark.parametrize(("status", "said"), [(401, "refuses (401"), (403, "refuses (403")])
def test_refused_credentials_are_named(server, config, status, said):
    server.fault = Fault(status, '{"message": "no access to namespace"}')
    message = refusal(config)
    assert said in message
    assert "no access to namespace" in message
    assert "cluster.token_env" in message
    assert len(server.requests) == 1


def test_a_wrong_token_is_refused(config, monkeypatch):
    monkeypatch.setenv("KFP_TOKEN", "another")
    message = refusal(config)
    assert "refuses (401" in message
    assert "another" not in message


@pytest.mark.parametrize(
    "fault",
    [
        Fault(200, "<html>Log in</html>", "text/html"),
        Fault(302, headers={"location": "/dex/auth?state=s3cret"}),
        Fault(200, "OK", "text/plain"),
    ],
)
def test_a_login_page_is_no_answer(server, config, fault):
    server.fault = fault
    message = refusal(config)
    assert "perhaps a login" in message
    assert "s3cret" not in message
    assert len(server.requests) == 1


def test_a_login_page_in_place_of_a_log_is_no_log(server, cluster, started):
    run = cluster.run(started)
    server.fault = Fault(200, "<html>Log in</html>", "text/html", path="/k8s")
    with pytest.raises(DiffstillError, match="perhaps a login"):
        cluster.log(run, run.tasks[0].pods[0])


def test_a_server_in_trouble_is_asked_again(server, cluster, started):
    server.fault = Fault(503, times=2, path="/runs")
    assert cluster.run(started).state == "SUCCEEDED"
    server.fault = Fault(503, '{"message": "database is down"}', path="/runs")
    asked = len(server.requests)
    with pytest.raises(DiffstillError, match=r"fails with run .* \(503, database is down\); look into the logs of its API server"):
        cluster.run(started)
    assert len(server.requests) == asked + 4


def test_watching_outlives_an_outage_but_not_for_ever(server, cluster, started, monkeypatch):
    server.script = [{"train": "RUNNING"}] * 2 + [{"train": "SUCCEEDED"}]
    states = []
    for run in cluster.polls(started):
        states.append(run.state)
        server.fault = Fault(500, path="/runs", times=2)
    assert states == ["RUNNING"] * 2 + ["SUCCEEDED"]
    server.fault, server.final = None, "RUNNING"
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.05)
    watching = cluster.polls(started)
    next(watching)
    server.fault = Fault(500, path="/runs")
    with pytest.raises(DiffstillError, match="fails with run"):
        list(watching)


@pytest.mark.parametrize("told", [{"tag_name": "2.16.1"}, {"apiServerTagName": "v2.5.0"}, {"tag_name": "1.8.22"}])
def test_a_server_that_would_read_the_pipeline_otherwise_is_refused(server, config, package, told):
    server.healthz_more = told
    cluster = Cluster.connect(config)
    with pytest.raises(DiffstillError, match=rf"is Kubeflow Pipelines {next(iter(told.values()))}, the pipeline needs 2.17 or later"):
        cluster.submit(package, {}, "trial")
    with pytest.raises(DiffstillError, match=r"needs 2\.17 or later"):
        cluster.schedule(package, {}, "trial", 3600)
    assert [request.method for request in server.requests] == ["GET"], "nothing was sent"
    assert cluster.schedules() == [], "but what runs there can be looked at"


@pytest.mark.parametrize("told", [{"tag_name": "2.17.0"}, {"apiServerTagName": "2.18.0-rc.1"}, {"tag_name": "unknown"}, {}])
def test_a_server_that_is_new_or_does_not_say_is_taken(server, config, package, told, caplog):
    server.healthz_more = told
    Cluster.connect(config).submit(package, {}, "trial")
    assert ("does not say its version" in caplog.text) == (told.get("tag_name", "") == "unknown" or not told)


def test_a_run_is_never_started_twice(server, cluster, package):
    server.fault = Fault(503, method="POST", path="/runs")
    with pytest.raises(DiffstillError, match="fails \\(503"):
        cluster.submit(package, {}, "trial")
    assert len(server.sent("POST", ".*/runs")) == 1


def test_a_host_that_does_not_answer_is_named(config):
    host = f"http://127.0.0.1:{free_port()}"
    message = refusal(config.model_copy(update={"host": host}))
    assert message.startswith(f"{host}: does not answer (NewConnectionError)")
    assert "port forward" in message


def test_a_host_that_hangs_is_given_up(server, config, monkeypatch):
    monkeypatch.setattr(connection, "TIMEOUT", (0.1, 0.1))
    server.silent = "healthz"
    assert "does not answer (ReadTimeoutError)" in refusal(config)


def test_a_certificate_is_trusted_only_if_its_authority_is_named(config, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", str(key), "-out", str(certificate), *subject]
    subprocess.run(made, check=True, capture_output=True)
    with KfpServer(certificate=(str(certificate), str(key))) as secure:
        there = config.model_copy(update={"host": secure.url})
        message = refusal(there)
        assert "shows no certificate that can be trusted" in message
        assert "cluster.ca_certificate" in message
        assert not secure.requests
        Cluster.connect(there.model_copy(update={"ca_certificate": str(certificate)}))
        assert [request.path for request in secure.requests] == ["/apis/v2beta1/healthz"]
        assert "no such file" in refusal(there.model_copy(update={"ca_certificate": str(tmp_path / "missing.pem")}))


@pytest.mark.parametrize("host", ["https://ada:s3cret@example.org", "ftp://example.org", "https://example.org?token=s3cret", "kubeflow", "http://"])
def test_a_host_is_a_plain_url(server, config, monkeypatch, host):
    monkeypatch.setenv("KFP_HOST", host)
    message = refusal(config.model_copy(update={"host": None}))
    assert "is not the plain URL of an installation" in message
    assert "s3cret" not in message


def test_the_host_may_come_from_the_environment(server, config, monkeypatch):
    nowhere = config.model_copy(update={"host": None})
    assert "KFP_HOST" in refusal(nowhere)
    monkeypatch.setenv("KFP_HOST", server.url)
    assert Cluster.connect(nowhere).schedules() == []


@pytest.mark.parametrize(("token", "said"), [("", "is not set"), ("two\nlines", "holds no single line"), ("a b", "holds no single line")])
def test_a_token_is_one_line_in_the_environment(server, config, monkeypatch, token, said):
    monkeypatch.setenv("KFP_TOKEN", token)
    message = refusal(config)
    assert f"KFP_TOKEN, which `cluster.token_env` names, {said}" in message
    assert not server.requests
    assert not token or token not in message


def test_a_run_that_is_not_there_is_named(cluster):
    for ask in (cluster.run, cluster.cancel, cluster.outputs):
        with pytest.raises(DiffstillError, match="has no run nobody"):
            ask("nobody")
    with pytest.raises(DiffstillError, match="has no schedule nothing"):
        cluster.delete_schedule("nothing")


# --- tasks and their pods -----------------------------------------------------------------------------------------


def test_tasks_are_told_from_the_scaffold_of_the_workflow(server, cluster, started):
    server.script = [
        {"prepare": "SUCCEEDED", "for-loop-1": "RUNNING", "condition-branches-2": "SUCCEEDED", "finetune": "RUNNING", "report": "PENDING"}
    ]
    server.final = "RUNNING"
    tasks = {task.name: task for task in cluster.run(started).tasks}
    assert list(tasks) == ["prepare", "finetune", "report"]
    assert tasks["prepare"].pods == ("flow-x7k2p-system-container-impl-13",)
    assert tasks["report"].pods == ()


def test_a_retried_task_has_a_pod_for_each_attempt(server, cluster, started):
    server.attempts = {"train": 3}
    (task,) = cluster.run(started).tasks
    assert task.pods == tuple(f"flow-x7k2p-system-container-impl-14{number}" for number in range(3))


def test_a_server_that_names_no_pods_is_asked_by_node(server, cluster, started):
    server.names_pods = False
    tasks = cluster.run(started).tasks
    assert [task.pods for task in tasks if task.name == "train"] == [("flow-x7k2p-13",)]


def test_a_failed_task_tells_why_by_its_message_or_the_end_of_its_log(server, cluster, started):
    server.script, server.final = [{"train": "FAILED", "draw": "FAILED", "rate": "FAILED"}], "FAILED"
    server.errors = {"draw": "out of memory"}
    server.logs["flow-x7k2p-system-container-impl-13"] = "".join(f"line {number}\n" for number in range(30))
    why = dict(cluster.failures(cluster.run(started)))
    assert why["train"].splitlines() == [f"line {number}" for number in range(15, 30)]
    assert why["draw"] == "out of memory"
    assert "may have been removed" in why["rate"]


def test_only_what_is_new_is_told(server, cluster, started):
    server.script = [
        {"rate#1": "RUNNING", "rate#2": "RUNNING"},
        {"rate#1": "RUNNING", "rate#2": "SUCCEEDED"},
        {"rate#1": "SUCCEEDED", "rate#2": "SUCCEEDED"},
    ]
    watcher = Watcher(cluster)
    told = [watcher.changes(run) for run in cluster.polls(started)]
    assert told == [[("rate", "RUNNING")] * 2, [("rate", "SUCCEEDED")], [("rate", "SUCCEEDED")]]


def test_lines_are_read_once_and_whole(server, cluster, started):
    server.script, server.final = [{"train": "RUNNING"}], "RUNNING"
    watcher, pod = Watcher(cluster), "flow-x7k2p-system-container-impl-13"
    run = cluster.run(started)
    assert list(watcher.lines(run)) == []
    server.logs[pod] = "one\ntw"
    assert list(watcher.lines(run)) == [("train", "one")]
    server.logs[pod] = "one\ntwo\nthree"
    assert list(watcher.lines(run)) == [("train", "two")]
    assert list(watcher.lines(replace(run, state="SUCCEEDED"))) == [("train", "three")]
    assert list(watcher.lines(run, "other")) == []


# --- schedules ----------------------------------------------------------------------------------------------------


def test_schedules_are_made_listed_stopped_and_forgotten(server, cluster, package):
    made = [cluster.schedule(package, {"number": "5"}, f"trial {when}", when, "runner") for when in ("0 0 3 * * 1", 3600, 7200)]
    first = server.recurring[made[0]]
    assert (first.max_concurrency, first.no_catchup, first.service_account) == ("1", True, "runner")
    assert first.runtime_config.pipeline_root == "s3://bucket/runs"
    assert [(one.id, one.when, one.enabled) for one in cluster.schedules()] == [
        (made[0], "0 0 3 * * 1", True),
        (made[1], "every 3600 s", True),
        (made[2], "every 7200 s", True),
    ]
    cluster.disable_schedule(made[1])
    cluster.delete_schedule(made[2])
    assert [(one.id, one.enabled) for one in cluster.schedules()] == [(made[0], True), (made[1], False)]
