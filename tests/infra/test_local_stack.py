"""compose.yaml and its settings: what can be seen without a Docker engine. The processes in place of the containers are tested in tests/stack/test_stack.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffstill.errors import DiffstillError
from infra.local.compose import ComposeStack
from infra.local.settings import BUCKETS, EXAMPLE, FILE, SECRETS, fresh_settings, read_settings, settings_at, write_settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "infra" / "local" / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(TEXT)
SERVICES = COMPOSE["services"]
LASTING = sorted(name for name, service in SERVICES.items() if service["restart"] != "no")

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


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("S3_PORT=80", r"S3_PORT is '80'; give a port from 1024 to 65535"),
        ("S3_PORT=", r"S3_PORT is ''; give a port"),
        ("S3_PORT=5000", r"two ports are equal"),
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


def test_the_commands_answer_without_a_stack(tmp_path):
    def say(*words: str) -> subprocess.CompletedProcess[str]:
        place = (f"--state={tmp_path / 'state'}", f"--settings={tmp_path / '.env'}")
        return subprocess.run([sys.executable, "-m", "infra.local", *place, *words], cwd=ROOT, capture_output=True, text=True, check=False)

    done = say("status")
    assert (done.returncode, done.stdout.count("down"), done.stderr) == (1, 5, "")
    assert say("down").returncode == 0
    done = say("backup", str(tmp_path / "copy"))
    assert (done.returncode, done.stderr) == (
        2,
        "error: not running: postgres, ceph-mon, ceph-osd, radosgw, mlflow; bring the stack up first: make stack\n",
    )
    assert not (tmp_path / "copy").exists()
