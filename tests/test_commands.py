"""Real commands with standard output and standard error apart: what goes where, closed and narrow streams, Ctrl-C."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from diffstill.commands import Group
from diffstill.config import load_params, preset, render_params

BIN = Path(sys.executable).parent


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line as a user types it, with the commands of this environment."""
    variables = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "MLFLOW_TRACKING_URI": "none"} | environment
    return subprocess.run(["sh", "-c", line], cwd=cwd, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["digits", "tiny", "fashion-mnist"])
def test_a_preset_sent_to_its_own_file_is_whole(name, tmp_path):
    done = shell(f"diffstill preset {name} > params.yaml", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"wrote params.yaml (preset {name}); next: diffstill run\n")
    assert load_params(tmp_path / "params.yaml") == preset(name)
    assert (tmp_path / "params.yaml").read_text() == render_params(preset(name))


# --- closed and narrow streams --------------------------------------------------------------------------------------


def test_without_standard_error_a_stage_does_its_work_and_writes_into_no_file_of_the_user(tmp_path):
    (tmp_path / "params.yaml").write_text(render_params(preset("tiny")))
    done = shell("diffstill prepare --images images 2>&-", tmp_path, MLFLOW_TRACKING_URI="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "images" / "manifest.json").is_file()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_refusal_has_its_exit_code_where_all_streams_are_closed(tmp_path):
    done = shell("diffstill show --params absent.yaml <&- >&- 2>&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_terminal_of_ascii_gets_the_table_in_ascii(tiny_chain):
    done = shell("diffstill summary --artifacts artifacts", tiny_chain.artifacts.parent, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert " +- " in done.stdout


def test_what_no_encoding_has_is_spelled(tmp_path):
    """A name of bytes that are no text, and signs that ASCII lacks."""
    code = "from diffstill.commands import mend_streams; mend_streams(); print('a\\udcff \\u2212 \\u00d7 \\u2502 \\u00e9')"
    for encoding, told in (("ascii", "a\\udcff - x | \\xe9\n"), ("utf-8", "a\\udcff − × │ é\n")):
        done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True, check=True)
        assert done.stdout.decode() == told


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def interrupted(command: list[str], cwd: Path, when) -> tuple[int, str, str, float]:
    """Exit code, output and seconds of a command after Ctrl-C, which a terminal sends to the whole group of processes."""
    variables = os.environ | {"MLFLOW_TRACKING_URI": "none"}
    awake = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731  (a shell lets its background jobs ignore it)
    pipes = {"preexec_fn": awake, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=variables, start_new_session=True, **pipes) as process:
        deadline = time.monotonic() + 240
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        started = time.monotonic()
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err, time.monotonic() - started


def test_an_interrupted_chain_says_what_is_kept_and_goes_on(tmp_path):
    values = preset("tiny").model_dump(mode="json")
    values["pretrain"]["vae"]["steps"] = 100_000
    values["evaluate"]["baselines"] = ["random"]
    (tmp_path / "params.yaml").write_text(json.dumps(values))
    command = [str(BIN / "diffstill"), "run", "--device", "cpu"]

    def checkpointed() -> bool:
        return any(tmp_path.glob("work/pretrain-*/*.safetensors"))

    code, out, err, seconds = interrupted(command, tmp_path, checkpointed)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == (
        f"interrupted: all finished artifacts are kept, what pretrain has in {tmp_path / 'work'} is kept, and the same command goes on from there"
    )
    assert "Traceback" not in err
    assert seconds < 5  # 2, where no other tests run beside it


BUSY = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import click
from diffstill.commands import Group, keeping

@click.group(cls=Group)
def main(): pass

@main.command()
def thread():
    with keeping(lambda: "a thing is kept"), ThreadPoolExecutor() as pool:
        waiting = pool.submit(time.sleep, 30)
        Path("ready").touch()
        waiting.result()

@main.command()
def deaf():
    Path("ready").touch()
    for _ in range(30):
        try:
            time.sleep(1)
        except KeyboardInterrupt:
            pass

main()
"""


@pytest.mark.parametrize(
    ("command", "kept"), [("thread", "a thing is kept"), ("deaf", "what is finished is kept, and the same command goes on from there")]
)
def test_what_does_not_listen_is_ended_all_the_same(tmp_path, command, kept):
    code, out, err, seconds = interrupted([sys.executable, "-c", BUSY, command], tmp_path, (tmp_path / "ready").exists)
    assert (code, out, err) == (130, "", f"interrupted: {kept}\n")
    assert seconds < 2


def test_an_interruption_inside_a_program_is_told_once_and_leaves_no_trace():
    @click.group(cls=Group)
    def program() -> None:
        pass

    @program.command()
    def stop() -> None:
        raise KeyboardInterrupt

    before = signal.set_wakeup_fd(-1)
    for _ in range(2):
        ended = CliRunner().invoke(program, ["stop"])
        told = "interrupted: what is finished is kept, and the same command goes on from there\n"
        assert (ended.exit_code, ended.stdout, ended.stderr) == (130, "", told)
    assert signal.set_wakeup_fd(before) == -1
