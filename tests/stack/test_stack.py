"""The stack of infra/local as a user has it: brought up by its command, worked with, looked at, backed up, lost, restored, its passwords changed.

The tests are one story in this order, on a stack with ports and a folder of its own.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import boto3
import numpy as np
import psutil
import psycopg2
import pytest
import requests
import yaml
from botocore.exceptions import ClientError
from click.testing import CliRunner
from PIL import Image

import diffstill
from chains import contents
from chains import enter as enter_empty_world
from diffstill.artifacts import open_artifact
from diffstill.cli import main
from diffstill.config import PublishConfig, preset, render_params
from infra.local.backup import refuse_damaged
from infra.local.native import ROLES
from infra.local.processes import Processes, surroundings
from infra.local.settings import SECRETS, Settings, fresh_settings, read_settings, write_settings
from servers import free_port, listens

ROOT = Path(__file__).parents[2]
NAME = "distilled-digits"
CHROMIUM = "chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"


@dataclass(frozen=True)
class Place:
    """Where the stack of this file is, and who uses it."""

    folder: Path

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def settings(self) -> Settings:
        return read_settings(self.folder / "env")

    @property
    def ports(self) -> list[int]:
        return [getattr(self.settings, f"{role}_port") for role in ("mlflow", "s3", "postgres", "ceph")]

    @property
    def words(self) -> list[str]:
        return [sys.executable, "-m", "infra.local", f"--state={self.state}", f"--settings={self.folder / 'env'}"]

    def say(self, *words: str, code: int = 0, **environment: str) -> str:
        """What a command prints, which ends with that exit code."""
        done = subprocess.run([*self.words, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        assert not [secret for secret in secrets(self.settings) if secret in done.stdout + done.stderr and words != ("env",)]
        return done.stdout + done.stderr if code in (0, 1) else done.stderr

    def refusal(self, *words: str, **environment: str) -> str:
        """The one line that a command refuses with."""
        (line,) = self.say(*words, code=2, **environment).splitlines()
        assert line.startswith("error: ")
        return line

    def pids(self) -> dict[str, int | None]:
        found = {role: Processes(self.state).find(role) for role in ROLES}
        return {role: process and process.pid for role, process in found.items()}

    def processes(self) -> list[psutil.Process]:
        """All that have to do with the state folder, or come from what has."""
        roots = [one for one in psutil.process_iter() if str(self.state) in " ".join(command_line(one)) and "infra.local" not in command_line(one)]
        return list({*roots, *(child for root in roots for child in root.children(recursive=True))})

    def environment(self) -> dict[str, str]:
        """What `env` exports."""
        return dict(re.fullmatch("export ([A-Z_]+)=(.*)", line).groups() for line in self.say("env").splitlines())

    def client(self, **changes: str):
        around = self.settings.s3_environment | changes
        keys = {"aws_access_key_id": around["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": around["AWS_SECRET_ACCESS_KEY"]}
        return boto3.Session(**keys).client("s3", endpoint_url=around["AWS_ENDPOINT_URL"], region_name="us-east-1")

    def objects(self) -> dict[str, str]:
        """ETags of all that lies in the buckets."""
        client, found = self.client(), {}
        for bucket in ("mlflow", "diffstill"):
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
                found |= {f"{bucket}/{item['Key']}": item["ETag"] for item in page.get("Contents", ())}
        return found

    def enter(self, world: pytest.MonkeyPatch, **changes: str) -> None:
        """Be a user of the stack, in a folder of theirs, with what `env` exports."""
        enter_empty_world(world, self.folder / "work")
        for name, value in (self.environment() | changes).items():
            world.setenv(name, value)
        world.setenv("DIFFSTILL_CACHE", mkdtemp(dir=self.folder))

    def diffstill(self, *words: str) -> str:
        """What a command of diffstill prints for such a user."""
        with pytest.MonkeyPatch.context() as world:
            self.enter(world)
            done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output


def secrets(settings: Settings) -> tuple[str, ...]:
    return tuple(getattr(settings, name) for name in SECRETS)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with TemporaryDirectory(prefix="diffstill-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # for the user postgres
        ports = {f"{role}_port": free_port() for role in ("mlflow", "s3", "postgres", "ceph")}
        (folder / "env").write_text("".join(f"{name.upper()}=\n" for name in (*SECRETS, *ports)))
        write_settings(replace(fresh_settings(), **ports), folder / "env")
        place = Place(folder)
        yield place
        place.say("down")


@pytest.fixture
def load(place, monkeypatch):
    """Load the published set as such a user, with nothing cached."""

    def loaded(**changes: str):
        place.enter(monkeypatch, **changes)
        return diffstill.load(f"{NAME}/1")

    return loaded


# --- containers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def compose(tmp_path):
    """Debian's Compose looks at compose.yaml; it is too old to know the name of a project, and starts nothing here."""
    text = (ROOT / "infra/local/compose.yaml").read_text()
    (tmp_path / "compose.yaml").write_text(text.replace("name: diffstill\n", ""))

    def say(settings: Path) -> subprocess.CompletedProcess[str]:
        command = ["docker-compose", f"--file={tmp_path / 'compose.yaml'}", f"--env-file={settings}", "config"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return say


def test_compose_takes_its_file_and_fills_in_the_settings(place, compose):
    done = compose(place.folder / "env")
    assert done.returncode == 0, done.stderr
    services, settings = yaml.safe_load(done.stdout)["services"], place.settings
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"] == services["mlflow"]["environment"]["PGPASSWORD"] == settings.postgres_password
    assert services["mlflow"]["ports"] == [f"127.0.0.1:{settings.mlflow_port}:5000/tcp"]
    assert services["s3"]["environment"] == {"AWS_ACCESS_KEY_ID": settings.s3_access_key, "AWS_SECRET_ACCESS_KEY": settings.s3_secret_key}
    assert {name for name, service in services.items() if service["read_only"]} == {"postgres", "s3", "buckets", "mlflow"}


@pytest.mark.parametrize("name", SECRETS)
def test_compose_refuses_to_start_without_a_password(place, compose, tmp_path, name):
    (tmp_path / "env").write_text(re.sub(f"^{name.upper()}=.*$", f"{name.upper()}=", (place.folder / "env").read_text(), flags=re.MULTILINE))
    done = compose(tmp_path / "env")
    assert done.returncode != 0
    assert "set it in infra/local/.env as infra/local/.env.example shows, or say make stack" in done.stderr


# --- up -------------------------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_named_with_its_packages(place):
    told = place.refusal("up", "--engine=native", PATH="/nowhere")
    assert "not installed: ceph-mon ceph-osd radosgw; on Debian and Ubuntu: apt-get install --no-install-recommends ceph-mon ceph-osd radosgw" in told


def test_without_an_engine_for_containers_processes_are_taken_with_a_line_that_says_why(place):
    """As far as the first process: a port is taken."""
    with socket.create_server(("127.0.0.1", place.settings.postgres_port)):
        done = subprocess.run(
            [*place.words, "up"], cwd=ROOT, env=os.environ | {"DOCKER_HOST": "unix:///nowhere"}, capture_output=True, text=True, check=False
        )
    assert done.stderr.startswith("no containers here: no Docker engine answers (")
    assert done.stderr.splitlines()[0].endswith("; taking processes of this machine")
    assert (done.returncode, f"port {place.settings.postgres_port} of postgres is taken by another program" in done.stderr) == (2, True)


def test_a_killed_start_is_no_obstacle_to_the_next(place):
    """Killed when Ceph's monitor runs and its store is not yet made."""
    starting = subprocess.Popen([*place.words, "up", "--engine=native"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with starting, closing(starting.stdout):
        while not (place.state / "ceph-mon.pid").exists():
            assert starting.poll() is None, starting.stdout.read()
            time.sleep(0.01)
        starting.send_signal(signal.SIGKILL)
    assert not (place.state / "ceph" / "whole").exists()
    told = place.say("up", "--engine=native")
    assert f"MLflow     {place.settings.mlflow_url}\n" in told
    assert f"S3         {place.settings.s3_url}, " in told
    assert f"-m infra.local --state {place.state} --settings {place.folder / 'env'} down" in told
    assert place.say("status").split() == [word for role in ROLES for word in (role, "runs")]


def test_up_twice_is_harmless(place):
    before = place.pids()
    place.say("up")
    assert place.pids() == before
    assert None not in before.values()


def test_a_killed_mlflow_leaves_no_server_behind(place):
    """Its first process is killed; the one that answers goes on."""
    before = place.pids()
    os.kill(before["mlflow"], signal.SIGKILL)
    assert listens(place.settings.mlflow_port)
    assert "mlflow    down" in place.say("status", code=1)
    place.say("up")
    after = place.pids()
    assert after.pop("mlflow") not in (None, before.pop("mlflow"))
    assert after == before
    os.kill(place.pids()["mlflow"], signal.SIGKILL)
    place.say("down")
    assert place.processes() == []
    assert [port for port in place.ports if listens(port)] == []
    place.say("up")


def test_a_taken_port_is_one_message_and_what_ran_goes_on(place):
    before, pids = place.settings, place.pids()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        write_settings(replace(before, mlflow_port=port), place.folder / "env")
        told = place.refusal("up")
    write_settings(before, place.folder / "env")
    assert told == f"error: port {port} of mlflow is taken by another program; end that, or set MLFLOW_PORT to a free port"
    assert place.pids() == pids


def test_two_at_once_are_refused(place):
    from filelock import FileLock

    with FileLock(place.state / "lock"):
        assert "another command is at work on this stack" in place.refusal("up")


# --- its doors ------------------------------------------------------------------------------------------------------


def test_nothing_listens_but_on_loopback(place):
    doors = {(process.name(), door.laddr.ip) for process in place.processes() for door in process.net_connections("inet") if door.status == "LISTEN"}
    assert {ip for _, ip in doors} == {"127.0.0.1"}
    assert len({name for name, _ in doors}) >= 5


def test_no_password_is_on_a_command_line_or_open_to_others(place):
    lines = [" ".join(command_line(process)) for process in place.processes()]
    assert len(lines) >= 7
    assert not [line for line in lines for secret in secrets(place.settings) if secret in line]
    assert (place.folder / "env").stat().st_mode & 0o777 == 0o600
    for name in ("postgres", "ceph"):
        assert (place.state / name).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("change", "code"), [({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId"), ({"AWS_SECRET_ACCESS_KEY": "no-secret"}, "SignatureDoesNotMatch")]
)
def test_wrong_credentials_of_s3_are_refused(place, change, code):
    with pytest.raises(ClientError) as refused:
        place.client(**change).list_objects_v2(Bucket="diffstill")
    assert refused.value.response["Error"]["Code"] == code
    assert place.client().list_objects_v2(Bucket="diffstill")["KeyCount"] == 0
    assert [bucket["Name"] for bucket in place.client().list_buckets()["Buckets"]] == ["diffstill", "mlflow"]


def test_who_gives_no_credentials_to_s3_is_refused(place):
    assert answer(f"{place.settings.s3_url}/diffstill") == 403


def answer(url: str, **headers: str) -> int:
    """The status that a server answers with."""
    with requests.get(url, headers=headers, timeout=10, stream=True) as answered:  # MLflow's refusal breaks off in its text
        return answered.status_code


def connect(place: Place, password: str):
    return psycopg2.connect(host="127.0.0.1", port=place.settings.postgres_port, user="mlflow", dbname="mlflow", password=password)


@pytest.mark.parametrize(("password", "told"), [("wrong", "password authentication failed"), ("", "no password supplied")])
def test_a_wrong_password_of_the_database_is_refused(place, password, told):
    with pytest.raises(psycopg2.OperationalError, match=told):
        connect(place, password)
    with closing(connect(place, place.settings.postgres_password)) as database, closing(database.cursor()) as cursor:
        cursor.execute("SELECT name FROM experiments")
        assert cursor.fetchall() == [("Default",)]


def test_mlflow_answers_to_no_foreign_name(place):
    url = f"{place.settings.mlflow_url}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert [answer(url), answer(url, Host="evil.example")] == [200, 403]


# --- work with it ---------------------------------------------------------------------------------------------------


def test_a_chain_runs_against_it_and_is_published(place):
    params = preset("tiny").model_copy(update={"publish": PublishConfig(gate="off", store="s3://diffstill/sets")})
    (place.folder / "work").mkdir()
    (place.folder / "work" / "params.yaml").write_text(render_params(params))
    place.diffstill("run")
    told = place.diffstill("publish")
    assert f"{place.settings.mlflow_url}/#/models/{NAME}/versions/1" in told
    assert f"{NAME}/1" in place.diffstill("list")
    digest = open_artifact(place.folder / "work" / "artifacts" / "distilled", "distilled").digest
    stored = place.objects()
    assert f"diffstill/sets/distilled/{digest}/manifest.json" in stored
    assert [key for key in stored if key.startswith("mlflow/artifacts/") and key.endswith("/card.md")]


def test_mlflow_counts_its_requests_for_prometheus(place):
    text = requests.get(f"{place.settings.mlflow_url}/metrics", timeout=10).text
    counted = re.findall(r'^mlflow_http_request_total\{.*status="200".*\} ([0-9.]+)$', text, re.MULTILINE)
    assert sum(map(float, counted)) > 10


def test_its_page_shows_the_version(place, tmp_path):
    """In a browser. The picture goes to build/stack-version.png, too."""
    page = f"{place.settings.mlflow_url}/#/models/{NAME}/versions/1"
    browse = [*CHROMIUM.split(), f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1600", "--virtual-time-budget=30000"]
    shown = subprocess.run([*browse, "--dump-dom", page], capture_output=True, text=True, timeout=100, check=True).stdout
    text = re.sub(r"<[^>]+>", " ", shown)
    assert NAME in text
    assert "Version 1" in text
    assert "best-ipc2" in text
    subprocess.run([*browse, f"--screenshot={tmp_path / 'version.png'}", page], capture_output=True, timeout=100, check=True)
    pixels = np.asarray(Image.open(tmp_path / "version.png").convert("RGB"))
    assert pixels.shape == (1600, 1400, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    assert (np.abs(pixels.astype(int) - pixels[0, 0]).max(axis=2) > 30).mean() > 0.01
    (ROOT / "build").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "version.png", ROOT / "build" / "stack-version.png")


def test_down_leaves_no_process_and_no_port_and_up_finds_the_data(place, load):
    digest, objects = load().digest, place.objects()
    place.say("down")
    assert place.processes() == []
    assert [port for port in place.ports if listens(port)] == []
    assert place.say("status", code=1).split() == [word for role in ROLES for word in (role, "down")]
    place.say("down")
    place.say("up")
    assert place.objects() == objects
    assert load().digest == digest


# --- lose it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(place) -> Path:
    """A backup of the stack with one version."""
    folder = place.folder / "backups" / "first"
    told = place.say("backup", str(folder))
    assert re.fullmatch(rf"{folder}: \d+ files, \d+\.\d MiB\n", told)
    return folder


def test_a_backup_holds_every_object_and_what_sha256sum_can_check(place, saved):
    there = {name for name in contents(saved) if not name.startswith(("database.dump", "SHA256SUMS"))}
    assert there == place.objects().keys()
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")
    assert saved.stat().st_mode & 0o777 == 0o700


KUBECTL = """#!/bin/sh
case "$*" in
    *"exec postgres-0 -- "*) while [ "$1" != -- ]; do shift; done; shift; exec "$@" ;;
    *"get secret diffstill-s3 -o jsonpath={.data.access-key}") printf %s "$KEY" | base64 ;;
    *"get secret diffstill-s3 -o jsonpath={.data.secret-key}") printf %s "$SECRET" | base64 ;;
    *"port-forward service/s3 8333") ;;
    *) exit 9 ;;
esac
"""


def test_the_commands_for_a_cluster_make_such_a_backup(place, saved, tmp_path):
    """Those of docs/operations.md, with this stack in the place of the cluster."""
    text = (ROOT / "docs" / "operations.md").read_text().partition("**On a cluster** (these were not run on one")[2].split("```")[1]
    (tmp_path / "kubectl").write_text(KUBECTL)
    (tmp_path / "kubectl").chmod(0o755)
    settings = place.settings
    around = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(settings.postgres_port),
        "PGPASSWORD": settings.postgres_password,
    }
    around |= {"KEY": settings.s3_access_key, "SECRET": settings.s3_secret_key}
    script = "set -euo pipefail\n" + text.replace("http://127.0.0.1:8333", settings.s3_url)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=surroundings() | around, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refuse_damaged(tmp_path / "backup")
    ours, theirs = contents(saved), contents(tmp_path / "backup")
    assert theirs.keys() == ours.keys()
    assert {name for name in ours if theirs[name] != ours[name]} <= {"database.dump", "SHA256SUMS"}


def test_a_backup_replaces_nothing(place, saved):
    before = contents(saved)
    assert f"{saved}: exists already" in place.refusal("backup", str(saved))
    assert contents(saved) == before


def test_a_killed_backup_is_none(place, saved):
    """Killed while rclone works."""
    folder = place.folder / "backups" / "killed"
    writing = subprocess.Popen(
        [*place.words, "backup", str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not (folder.parent / ".killed.partial" / "mlflow").exists():
        assert writing.poll() is None
        time.sleep(0.01)
    os.killpg(writing.pid, signal.SIGKILL)
    writing.wait()
    assert not folder.exists()
    assert "has no SHA256SUMS, so it is no whole backup" in place.refusal("restore", str(folder.parent / ".killed.partial"))
    place.say("backup", str(folder))
    assert contents(folder).keys() == contents(saved).keys()


@pytest.mark.parametrize("damage", ["changed", "missing", "foreign"])
def test_a_damaged_backup_is_named(place, saved, tmp_path, damage):
    shutil.copytree(saved, tmp_path / "copy")
    victim = next(path for path in sorted((tmp_path / "copy" / "diffstill").rglob("*.png")))
    if damage == "changed":
        victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    elif damage == "missing":
        victim.unlink()
    else:
        victim = victim.with_name("foreign.png")
        victim.write_bytes(b"pixels")
    told = place.refusal("restore", str(tmp_path / "copy"))
    state = {"changed": "was changed", "missing": "is missing", "foreign": "is no file of this backup"}[damage]
    assert f"{victim.relative_to(tmp_path / 'copy')} {state}; restore from another backup" in told


def test_a_restore_into_a_stack_with_runs_is_refused(place, saved, load):
    objects = place.objects()
    assert re.search(r"MLflow's database holds \d+ runs and models; restore into an empty stack", place.refusal("restore", str(saved)))
    assert place.objects() == objects
    assert load().classes == ["0", "1", "2"]


def test_wiped_and_restored_everything_is_as_before(place, saved, load):
    before, objects, listed = load(), place.objects(), place.diffstill("search", f"name={NAME}", "--json")
    place.say("down", "--delete-data")
    shutil.rmtree(place.state)
    assert "not running: " in place.refusal("restore", str(saved))
    place.say("up", "--engine=native")
    assert place.objects() == {}
    place.client().put_object(Bucket="diffstill", Key="of/another", Body=b"stack")
    assert "the bucket diffstill holds 'of/another', which is not in " in place.refusal("restore", str(saved))
    place.client().delete_object(Bucket="diffstill", Key="of/another")
    assert place.say("restore", str(saved)) == f"{saved} is restored\n"
    assert place.objects() == objects
    assert place.diffstill("search", f"name={NAME}", "--json") == listed
    after = load()
    assert after.digest == before.digest == open_artifact(place.folder / "work" / "artifacts" / "distilled", "distilled").digest
    assert all(np.array_equal(one, other) for one, other in zip(after.tensors(), before.tensors(), strict=True))
    assert f"{NAME}/1" in place.diffstill("publish")  # published again it is the same version
    assert place.diffstill("search", f"name={NAME}", "--json") == listed


# --- passwords and the end ------------------------------------------------------------------------------------------


def test_rotated_the_new_passwords_open_and_the_old_ones_do_not(place, load):
    old, digest = place.settings, load().digest
    told = place.say("rotate")
    new = place.settings
    assert str(place.folder / "env") in told
    assert not [secret for secret in secrets(new) if secret in told or secret in secrets(old)]
    assert (new.mlflow_port, new.s3_port) == (old.mlflow_port, old.s3_port)
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        connect(place, old.postgres_password)
    connect(place, new.postgres_password).close()
    with pytest.raises(diffstill.errors.DiffstillError, match="InvalidAccessKeyId"):
        load(**old.s3_environment)
    assert load().digest == digest
    assert f"{NAME}/1" in place.diffstill("list")


def test_after_a_killed_rotation_up_makes_it_whole(place, load):
    """The passwords are in the file, and nobody knows them yet."""
    write_settings(place.settings.rotated(), place.folder / "env")
    place.say("up")
    connect(place, place.settings.postgres_password).close()
    assert load().classes == ["0", "1", "2"]


def test_at_last_nothing_is_left(place):
    place.say("down", "--delete-data")
    assert place.processes() == []
    assert [port for port in place.ports if listens(port)] == []
    assert not (place.state / "postgres").exists()
    assert not (place.state / "ceph").exists()
