"""compose.yaml and its settings: what can be seen without a Docker engine. The processes in place of the containers are tested in tests/stack/test_stack.py."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

import pytest
import yaml
from click.testing import CliRunner

from diffstill.errors import DiffstillError
from infra.local.__main__ import Place, main
from infra.local.backup import back_up
from infra.local.compose import ComposeStack
from infra.local.native import NativeStack
from infra.local.processes import Processes, Role, claim, listens, until
from infra.local.settings import BUCKETS, EXAMPLE, FILE, SECRETS, Settings, fresh_settings, read_settings, settings_at, write_settings
from servers import free_port

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "infra" / "local" / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
LASTING = sorted(name for name, service in SERVICES.items() if service["restart"] != "no")

outlives = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Servers outlive the object that has started them, which warns of it."""
in_each = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)


def test_there_are_the_roles_of_the_stack():
    assert LASTING == ["mlflow", "postgres", "s3"]
    assert SERVICES.keys() - set(LASTING) == {"buckets"}


@in_each
def test_images_are_pinned_by_a_version(service):
    name, _, tag = service["image"].rpartition(":")
    assert name
    assert re.fullmatch(r"\d+(\.\d+)+", tag) or (service["image"] == "diffstill:mlflow" and service["build"]["target"] == "mlflow")


def test_the_image_that_is_built_is_a_target_of_the_dockerfile():
    build = SERVICES["mlflow"]["build"]
    folder = (ROOT / "infra" / "local" / build["context"]).resolve()
    assert folder == ROOT
    assert re.search(rf"^FROM \S+ AS {build['target']}$", (folder / build["dockerfile"]).read_text(), re.MULTILINE)


@in_each
def test_rights_are_small(service):
    assert (service["read_only"], service["cap_drop"], service["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices", "userns_mode"} & service.keys()
    assert "/tmp" in service["tmpfs"]
    user = service.get("user", "10001:10001" if service["image"] == "diffstill:mlflow" else "0")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


@in_each
def test_ports_are_open_to_this_machine_alone(service):
    assert all(re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z0-9]+_PORT:-\d+\}:\d+", port) for port in service.get("ports", []))


def test_the_database_has_no_port():
    assert [name for name in SERVICES if SERVICES[name].get("ports")] == ["s3", "mlflow"]


@pytest.mark.parametrize("name", LASTING)
def test_health_is_checked(name):
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert {"interval", "timeout", "retries", "start_period"} <= check.keys()
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_nothing_starts_before_what_it_needs():
    needs = {name: {one: how["condition"] for one, how in service.get("depends_on", {}).items()} for name, service in SERVICES.items()}
    assert needs == {
        "postgres": {},
        "s3": {},
        "buckets": {"s3": "service_healthy"},
        "mlflow": {"postgres": "service_healthy", "s3": "service_healthy", "buckets": "service_completed_successfully"},
    }


def test_data_lie_in_volumes():
    mounted = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert mounted == COMPOSE["volumes"].keys() == {"postgres", "s3"}


def test_of_the_s3_server_the_gateway_alone_can_be_reached_and_it_wants_credentials():
    flags = SERVICES["s3"]["command"]
    assert {"-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0", "-s3.autoCreateBucket=false"} <= set(flags)
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= SERVICES["s3"]["environment"].keys()


def test_buckets_are_those_of_the_native_stack():
    assert all(f'"{bucket}"' in SERVICES["buckets"]["command"][-1] for bucket in BUCKETS)


def test_every_variable_is_in_the_example_and_every_line_of_the_example_is_used():
    used = set(re.findall(r"\$\{([A-Z0-9_]+)", TEXT))
    assert used == set(re.findall(r"^([A-Z0-9_]+)=", EXAMPLE.read_text(), re.MULTILINE))


def test_a_missing_password_ends_compose_with_what_to_do():
    given = re.findall(r"\$\{(\w+):\?([^}]+)\}", TEXT)
    assert {name for name, _ in given} == {name.upper() for name in SECRETS}
    assert all(told == "set it in infra/local/.env as infra/local/.env.example shows, or say make stack" for _, told in given)


def test_no_secret_is_written_down():
    for service in SERVICES.values():
        for name, value in service["environment"].items():
            assert not re.search("PASSWORD|SECRET|ACCESS_KEY", name) or str(value).startswith("${"), name
        assert not re.search(r"://[^/\s]*:[^/\s]*@|PASSWORD|SECRET", " ".join(service.get("command", [])))
    assert all(value == "" for name, value in re.findall(r"^(\w+)=(.*)$", EXAMPLE.read_text(), re.MULTILINE) if name.lower() in SECRETS)


def test_git_never_takes_the_passwords():
    done = subprocess.run(["git", "check-ignore", "--quiet", str(FILE)], cwd=ROOT, check=False)
    assert done.returncode == 0
    done = subprocess.run(["git", "check-ignore", "--quiet", str(EXAMPLE)], cwd=ROOT, check=False)
    assert done.returncode == 1


def test_the_mlflow_server_is_told_the_same_in_both(tmp_path):
    """Their options and variables, but for places, ports and numbers."""
    from infra.local.native import mlflow_role

    native = mlflow_role(fresh_settings(), tmp_path)
    named = {word for word in native.command if word.startswith("--")}
    assert named == {word.partition("=")[0] for word in SERVICES["mlflow"]["command"] if word.startswith("--")}
    assert native.environment.keys() == SERVICES["mlflow"]["environment"].keys()


# --- the settings file ----------------------------------------------------------------------------------------------


def test_it_is_made_with_random_passwords_for_its_owner_alone(tmp_path):
    made, other = settings_at(tmp_path / ".env"), settings_at(tmp_path / "other")
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600
    assert read_settings(tmp_path / ".env") == made == settings_at(tmp_path / ".env")
    assert all(len(getattr(made, name)) >= 20 and getattr(made, name) != getattr(other, name) for name in SECRETS)
    assert (made.mlflow_port, made.s3_port) == (5000, 8333)


def test_new_passwords_leave_other_lines_as_they_are(tmp_path):
    old = settings_at(tmp_path / ".env")
    (tmp_path / ".env").write_text((tmp_path / ".env").read_text().replace("S3_PORT=8333", "S3_PORT=9999\n# mine\nOTHER=1"))
    (tmp_path / ".env").chmod(0o644)
    write_settings(read_settings(tmp_path / ".env").rotated(), tmp_path / ".env")
    new, text = read_settings(tmp_path / ".env"), (tmp_path / ".env").read_text()
    assert new.s3_port == 9999
    assert "\n# mine\nOTHER=1\n" in text
    assert not [name for name in SECRETS if getattr(old, name) in text]
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


def test_indented_lines_get_the_new_passwords(tmp_path):
    old = settings_at(tmp_path / ".env")
    (tmp_path / ".env").write_text((tmp_path / ".env").read_text().replace("POSTGRES_", " \tPOSTGRES_"))
    write_settings(old.rotated(), tmp_path / ".env")
    assert read_settings(tmp_path / ".env").postgres_password != old.postgres_password


def test_a_value_without_a_line_is_refused_and_the_file_stays(tmp_path):
    old = settings_at(tmp_path / ".env")
    text = (tmp_path / ".env").read_text()
    with pytest.raises(DiffstillError, match=r"/\.env: a value has no line of its own to be written to; give each a line NAME=$"):
        write_settings(replace(old, ceph_port=6000), tmp_path / ".env")
    assert (tmp_path / ".env").read_text() == text


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("S3_PORT=80", r"S3_PORT is '80'; give a port from 1024 to 65535"),
        ("S3_PORT=", r"S3_PORT is ''; give a port"),
        ("S3_PORT=5000", r"two ports are equal: MLFLOW_PORT and S3_PORT are 5000; give each role its own"),
        ("S3_PORT=55432", r"two ports are equal: S3_PORT and POSTGRES_PORT are 55432"),
        ("S3_SECRET_KEY=", r"S3_SECRET_KEY not set; fill in a password each"),
        ("S3_SECRET_KEY=a$b", r"line 12: not NAME=value with a value of letters, digits, - and _"),
        ("some words", r"line 12: not NAME=value"),
    ],
)
def test_what_is_wrong_with_it_is_one_message_without_passwords(tmp_path, line, told):
    settings_at(tmp_path / ".env")
    (tmp_path / ".env").write_text("\n".join((tmp_path / ".env").read_text().splitlines()[:11]) + f"\n{line}\n")
    with pytest.raises(DiffstillError, match=told) as refused:
        read_settings(tmp_path / ".env")
    assert str(refused.value).startswith(f"{tmp_path / '.env'}")
    assert "a$b" not in str(refused.value)


# --- the choice of an engine ----------------------------------------------------------------------------------------


def docker(folder: Path, script: str) -> str:
    """A program in place of Docker's client, of which this machine may have none."""
    program = folder / "docker"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no engine today >&2; exit 1", "no Docker engine answers (no engine today)"),
        ('[ "$1" = version ] || { echo unknown command >&2; exit 1; }', "docker has no compose (unknown command)"),
        ('case "$*" in *pull*) echo no such host >&2; exit 1;; esac', "images cannot be pulled (no such host)"),
        ('case "$*" in *" build "*) exit 1;; esac', "the image of MLflow's server cannot be built (exit code 1)"),
        ("exit 0", None),
    ],
)
def test_why_containers_cannot_run_is_told(tmp_path, monkeypatch, script, reason):
    monkeypatch.setattr("infra.local.compose.DOCKER", docker(tmp_path, script))
    assert ComposeStack(tmp_path / ".env", settings_at(tmp_path / ".env")).obstacle() == reason


def test_a_docker_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("infra.local.compose.DOCKER", str(tmp_path / "docker"))
    assert ComposeStack(tmp_path / ".env", settings_at(tmp_path / ".env")).obstacle().startswith("no Docker engine answers (")


def test_passwords_of_the_shell_do_not_replace_those_of_the_file(tmp_path, monkeypatch):
    """Compose would take them first."""
    monkeypatch.setattr("infra.local.compose.DOCKER", docker(tmp_path, 'echo "$POSTGRES_PASSWORD:$*"'))
    monkeypatch.setenv("POSTGRES_PASSWORD", "of-the-shell")
    stack = ComposeStack(tmp_path / ".env", settings_at(tmp_path / ".env"))
    told = stack.database("pg_dump", "--format=custom", "mlflow")
    assert (
        told
        == f":compose --file {ROOT / 'infra/local/compose.yaml'} --env-file {tmp_path / '.env'} exec -T postgres pg_dump -U mlflow --format=custom mlflow\n"
    )


@pytest.fixture
def say(tmp_path):
    """The command with a state folder and a settings file that are not there yet."""

    def said(*words: str, state: str = "state", user: str | None = None) -> subprocess.CompletedProcess[str]:
        place = (f"--state={tmp_path / state}", f"--settings={tmp_path / '.env'}")
        return subprocess.run([sys.executable, "-m", "infra.local", *place, *words], cwd=ROOT, capture_output=True, text=True, check=False)

    return said


def test_the_commands_answer_without_a_stack_and_make_nothing(tmp_path, say):
    done = say("status")
    assert (done.returncode, done.stdout.count("down"), done.stderr) == (1, 5, "")
    assert say("down").returncode == 0
    assert say("down", "--delete-data").returncode == 0
    for words in (("backup", str(tmp_path / "copy")), ("restore", str(tmp_path)), ("env",), ("rotate",)):
        done = say(*words)
        told = f"error: {tmp_path / '.env'}: no such settings file; bring the stack up first, which makes it: make stack\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    assert list(tmp_path.iterdir()) == []


def test_a_backup_of_a_stack_that_is_down_is_refused(tmp_path, say):
    settings_at(tmp_path / ".env")
    done = say("backup", str(tmp_path / "copy"))
    told = "error: not running: postgres, ceph-mon, ceph-osd, radosgw, mlflow; bring the stack up first: make stack\n"
    assert (done.returncode, done.stderr) == (2, told)
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("words", [("up", "--engine=native"), ("down",), ("down", "--delete-data")])
@pytest.mark.parametrize("name", ["postgres", "ceph", "thesis"])
def test_a_folder_with_what_is_not_ours_is_left_alone(tmp_path, say, words, name):
    mine = tmp_path / "state" / name / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    done = say(*words)
    told = f"error: {tmp_path / 'state'}: holds what is not of this stack (it has no .diffstill-stack); name an empty or a new folder with --state\n"
    assert (done.returncode, done.stderr) == (2, told)
    assert mine.read_text() == "years of work"
    assert [path.name for path in (tmp_path / "state").iterdir()] == [name]


@pytest.mark.parametrize("variable", ["POSTGRES_PORT", "S3_PORT", "MLFLOW_PORT", "CEPH_PORT"])
def test_a_taken_port_is_told_before_anything_is_deleted_or_made(tmp_path, variable, monkeypatch):
    """A killed start has left a database that the next would make anew. The programs may be missing: none of them gets to run."""
    monkeypatch.setattr("infra.local.native.refuse_missing_programs", lambda: None)
    claim(tmp_path / "state")
    half = tmp_path / "state" / "postgres"
    half.mkdir()
    (half / "half").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = {f"{role}_port": free_port() for role in ("mlflow", "s3", "postgres", "ceph")} | {variable.lower(): taken.getsockname()[1]}
        with pytest.raises(DiffstillError, match=rf"is taken by another program; end that, or set {variable} to a free port"):
            NativeStack(tmp_path / "state", replace(fresh_settings(), **ports)).up()
    assert [path.name for path in half.iterdir()] == ["half"]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [".diffstill-stack", "lock", "postgres"]


def test_an_impossible_folder_is_one_message(tmp_path, say):
    (tmp_path / "file").touch()
    for words in (("up", "--engine=native"), ("up", "--engine=compose")):
        done = say(*words, state="file/state")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"error: {tmp_path / 'file/state'}: Not a directory; choose another folder" in done.stderr


def test_settings_that_are_no_text_are_one_message(tmp_path, say):
    (tmp_path / ".env").write_bytes(b"POSTGRES_PASSWORD=\xff\n")
    for words in (("up", "--engine=native"), ("status",), ("env",), ("rotate",)):
        done = say(*words)
        assert (done.returncode, done.stderr) == (2, f"error: {tmp_path / '.env'}: not UTF-8; write it anew as .env.example of infra/local shows\n")


# --- servers --------------------------------------------------------------------------------------------------------

SERVER = """
import socket, subprocess, sys, time
door = socket.create_server(("127.0.0.1", int(sys.argv[1])))
door.set_inheritable(True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], close_fds=False)
time.sleep(1000)
"""


@pytest.fixture
def role():
    """A server whose child has its door, too, as MLflow's."""
    port = free_port()
    return Role("server", (sys.executable, "-c", SERVER, str(port)), lambda: listens(port), {"SERVER_PORT": port}, {"SECRET": "s"})


@pytest.fixture
def servers(tmp_path, role):
    servers = Processes(tmp_path)
    yield servers
    servers.stop(role.name)


def orphaned(servers: Processes, role: Role) -> int:
    """The process id of a role whose first process was killed; its child has its port."""
    servers.start(role)
    wait_for(lambda: len(servers.family(role.name)) == 2)
    leader = servers.find(role.name)
    leader.kill()
    wait_for(lambda: servers.find(role.name) is None)
    assert listens(next(iter(role.ports.values())))
    return leader.pid


def wait_for(true) -> None:
    assert until(true)


@outlives
def test_what_a_killed_server_has_left_is_ended_with_it(servers, role):
    orphaned(servers, role)
    servers.stop(role.name)
    assert not listens(next(iter(role.ports.values())))
    assert servers.family(role.name) == []


@outlives
def test_what_a_killed_server_has_left_does_not_keep_its_port(servers, role):
    old = orphaned(servers, role)
    servers.start(role)
    assert servers.find(role.name).pid != old
    assert len({os.getsid(one.pid) for one in servers.family(role.name)}) == 1


@outlives
@pytest.mark.parametrize("what", ["its age", "its folder"])
def test_a_process_that_is_not_ours_is_not_ended(servers, role, tmp_path, what):
    """The number of a dead one went to another, which is older than ours was, or works elsewhere."""
    folder = tmp_path if what == "its age" else tmp_path.parent
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], cwd=folder, start_new_session=True) as other:
        record = {"pid": other.pid, "created": time.time() + (1000 if what == "its age" else -1000), "end": signal.SIGTERM, "ports": []}
        (tmp_path / "server.pid").write_text(json.dumps(record))
        assert servers.family(role.name) == []
        servers.stop(role.name)
        assert other.poll() is None
        other.kill()


@outlives
def test_what_servers_print_and_write_is_for_their_owner_alone(servers, role):
    (servers.folder / "server.log").touch(mode=0o644)
    servers.start(replace(role, command=(*role.command[:2], f"open('made', 'w').close()\n{SERVER}", role.command[-1])))
    assert {path.name: path.stat().st_mode & 0o777 for path in servers.folder.iterdir()} == {"server.log": 0o600, "server.pid": 0o600, "made": 0o600}


@outlives
def test_the_server_is_named_that_another_waits_for_in_vain(servers, role, tmp_path, monkeypatch):
    servers.start(role)
    monkeypatch.setattr("infra.local.processes.ROOM", 2**60)
    waits = Role("gateway", (sys.executable, "-c", "import time; time.sleep(1000)"), lambda: False, needs=(role.name,))
    servers.log(role.name).write_text("bdev: No space left on device\nend of dump\n")
    timer = threading.Timer(1, servers.find(role.name).kill)
    timer.start()
    with pytest.raises(
        DiffstillError, match=rf"^server does not start: .*No space left on device \(more in {tmp_path}/server.log; \d+ MiB are free there\)$"
    ):
        servers.start(waits)
    servers.stop("gateway")


# --- backups --------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """What a backup takes for a stack that runs. Its database is empty; rclone is a program in its place."""

    settings: Settings = field(default_factory=fresh_settings)

    def status(self) -> dict[str, bool]:
        return {"mlflow": True}

    def database(self, *words: str, stdout: IO[bytes], stdin: int = 0) -> str:
        stdout.write(b"dump")
        return ""


@pytest.mark.parametrize(
    ("script", "told"),
    [('touch "$3/a\nb"', r"'diffstill/a\nb': a line break in the name of an object"), ("echo no disk >&2; exit 1", "rclone failed: no disk")],
)
def test_a_failed_backup_leaves_nothing(tmp_path, monkeypatch, script, told):
    """In particular one with a name that its sums cannot hold, which a restore would refuse."""
    (tmp_path / "rclone").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "rclone").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(DiffstillError) as refused:
        back_up(Running(), tmp_path / "backups" / "first")
    assert told in str(refused.value)
    assert list((tmp_path / "backups").iterdir()) == []


def test_a_backup_below_a_file_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Place, "stack", lambda *_: Running())
    settings_at(tmp_path / ".env")
    done = CliRunner().invoke(main, [f"--settings={tmp_path / '.env'}", "backup", str(tmp_path / "file" / "copy")])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(f"error: {tmp_path / 'file'}")
    assert "choose another folder" in done.output
