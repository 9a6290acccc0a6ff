"""A stage in several processes of this machine: what they make, and how they end. Real processes, gloo between them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from diffstill import launch
from diffstill.artifacts import open_artifact
from diffstill.config import preset
from diffstill.errors import DiffstillError, TransientError
from diffstill.launch import Work
from servers import free_port
from test_task import Handed, _logging_as_before, handed  # noqa: F401  (a fixture)


def finetuning(chain, denoiser: Path) -> Work:
    paths = {"latents": chain.artifacts / "latents", "generator": chain.artifacts / "generator", "denoiser": denoiser}
    return Work(stage="finetune", config=chain.params.finetune.canonical(), step="finetune", paths={name: str(path) for name, path in paths.items()})


@pytest.mark.slow
def test_two_ranks_make_what_one_makes(tiny_chain, tmp_path, monkeypatch):
    """The task finds two ranks, and hands on what the main one has measured; weights differ by rounding alone."""
    from diffstill.task import run_task

    monkeypatch.setenv("DIFFSTILL_RANKS", "2")
    out = handed(tmp_path, "denoiser", "metrics")
    run_task("finetune", tiny_chain.params.finetune.canonical(), **handed(tiny_chain.artifacts, "latents", "generator"), **out)
    made, alone = (open_artifact(folder, "denoiser") for folder in (tmp_path / "denoiser", tiny_chain.artifacts / "denoiser"))
    assert made.manifest.inputs == alone.manifest.inputs
    assert made.manifest.facts == alone.manifest.facts
    seed = tiny_chain.params.finetune.seeds[-1]
    lines = [json.loads((one.folder / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()[-1]) for one in (made, alone)]
    assert out["metrics"].logged | {"step": lines[0]["step"]} == lines[0]
    assert lines[0] == pytest.approx(lines[1], rel=1e-2)
    assert not list(tmp_path.glob(".denoiser*"))


@pytest.mark.slow
def test_nodes_find_each_other_as_kubeflow_trainer_tells_them(tiny_chain, tmp_path):
    """Two launchers of one rank each, as on two machines: the main node writes, and both end well."""
    work, port = finetuning(tiny_chain, tmp_path / "denoiser"), free_port()
    around = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "diffstill.launch", work.model_dump_json()]
    nodes = [
        subprocess.Popen(command, env=os.environ | around | {"PET_NODE_RANK": rank}, stderr=subprocess.PIPE, text=True, cwd=tmp_path) for rank in "01"
    ]
    said = [node.communicate(timeout=200)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert (
        open_artifact(tmp_path / "denoiser", "denoiser").manifest.inputs
        == open_artifact(tiny_chain.artifacts / "denoiser", "denoiser").manifest.inputs
    )
    assert "finetune done" in said[0]
    assert "finetune" not in said[1], "the main rank alone tells how it goes"


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """Ranks that do as told instead of a stage: real processes of the real launcher, with `run_stage` replaced in them."""

    def told(behaviour: str) -> Work:
        lines = [f"    {line}" for line in behaviour.splitlines()]
        text = "\n".join(["import os, time, signal, sys", "def behave(*_given, **_more):", *lines, "    return {'loss': 1.0}"])
        (tmp_path / "behaviour.py").write_text(text)
        hook = "import os\nif 'TORCHELASTIC_RUN_ID' in os.environ:\n    import diffstill.run, behaviour\n    diffstill.run.run_stage = behaviour.behave\n"
        (tmp_path / "sitecustomize.py").write_text(hook)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        return Work(stage="finetune", config=preset("tiny").finetune.canonical(), step="finetune", paths={"denoiser": str(tmp_path / "denoiser")})

    yield told
    assert not list(tmp_path.glob("diffstill-ranks-*")), "files of the launcher"


RANK_1 = "if os.environ['RANK'] == '1':\n    "
WAIT = "\ntime.sleep(100)"


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("behaviour", "kind", "message"),
    [
        (f"from diffstill.errors import DiffstillError\n{RANK_1}raise DiffstillError('`x` is 3: no'){WAIT}", DiffstillError, "^`x` is 3: no$"),
        (f"{RANK_1}os.kill(os.getpid(), signal.SIGKILL){WAIT}", TransientError, "^rank 1 was killed by SIGKILL; if it ran out of memory"),
        (f"{RANK_1}raise KeyError('lost'){WAIT}", RuntimeError, r"(?s)^rank 1 ended with exit code 1:.*behave.*KeyError: 'lost'"),
        (f"{RANK_1}sys.exit(7){WAIT}", RuntimeError, "rank 1 ended with exit code 7"),
    ],
)
def test_a_rank_that_fails_ends_the_others_and_is_named(ranks, capfd, behaviour, kind, message):
    work, started = ranks(behaviour), time.monotonic()
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(kind, match=message):
        launch.launch(work, 2)
    assert time.monotonic() - started < 60, "the other rank was waited for"
    assert not children()
    assert not re.search("Traceback|torch|SIGTERM|W1|E1", capfd.readouterr().err), "one message, which the caller prints"
    assert signal.getsignal(signal.SIGTERM) is handler


def failure(folder: Path, rank: int, exit_code: int, after: int, error: str = "") -> ProcessFailure:
    """A rank that has ended so many seconds after the start, with a file of its error as torch writes it, or without."""
    file = folder / f"{rank}.json"
    if error:
        file.write_text(json.dumps({"message": {"message": error, "extraInfo": {"py_callstack": f"Traceback of {error}", "timestamp": str(after)}}}))
    made = ProcessFailure(rank, 4711, exit_code, str(file))
    made.timestamp = after
    return made


LOST, REFUSED, BUG = "RuntimeError: connection closed by peer", "DiffstillError: diverged: lower it", "KeyError: 'x'"
AWAY = "TransientError: the store is away"


@pytest.mark.parametrize(
    ("ends", "kind", "message"),
    [
        ([(1, 9, LOST), (2, 10, REFUSED)], DiffstillError, "^diverged: lower it$"),
        ([(1, 9, LOST), (75, 10, AWAY)], TransientError, "^the store is away$"),
        ([(1, 9, LOST), (-9, 10)], TransientError, "^rank 1 was killed by SIGKILL"),
        ([(1, 10, BUG), (-9, 10 + launch.GRACE)], RuntimeError, "^rank 0 ended with exit code 1:\nTraceback of KeyError: 'x'$"),
        ([(-15, 10), (7, 10)], RuntimeError, "^rank 1 ended with exit code 7"),
        ([(1, 11, LOST), (1, 10, BUG)], RuntimeError, "^rank 1 ended with exit code 1"),
        ([(2, 9), (1, 10, BUG)], RuntimeError, "^rank 0 ended with exit code 2"),
    ],
    ids=["a refusal", "a service that is away", "a kill", "a kill by the launcher", "an end by the launcher", "the first bug", "no refusal of ours"],
)
def test_the_cause_is_told_and_not_what_it_brings_about(tmp_path, ends, kind, message):
    """A lost peer makes the others fail, perhaps in the same second or noticed before, and the launcher ends who is left."""
    failures = {rank: failure(tmp_path, rank, *end) for rank, end in enumerate(ends)}
    with pytest.raises(kind, match=message):
        raise launch._cause(ChildFailedError("finetune", failures))


DRIVER = """
import sys
from diffstill import launch
launch.GRACE = 2
with launch.one_message():
    print(launch.launch(launch.Work.model_validate_json(sys.argv[1]), 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stubborn", [False, True])
def test_a_pod_that_is_taken_away_ends_its_ranks_first(ranks, tmp_path, stubborn):
    ignoring = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    work = ranks(f"{ignoring}open(os.environ['TMPDIR'] + '/up-' + os.environ['RANK'], 'w').close(){WAIT}")
    with subprocess.Popen([sys.executable, "-c", DRIVER, work.model_dump_json()], stderr=subprocess.PIPE, text=True) as driver:
        while len(list(tmp_path.glob("up-*"))) < 2:
            assert driver.poll() is None
            time.sleep(0.05)
        started = psutil.Process(driver.pid).children(recursive=True)
        assert len(started) >= 2
        driver.send_signal(signal.SIGTERM)
        said = driver.communicate(timeout=30)[1]
    assert driver.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert not psutil.wait_procs(started, timeout=1)[1]


@pytest.mark.slow
def test_what_the_main_rank_measures_is_handed_on(ranks):
    assert launch.launch(
        ranks("time.sleep(float(os.environ['RANK']) / 3)\nreturn {'loss': float(os.environ['RANK']), 'ranks': int(os.environ['WORLD_SIZE'])}"), 3
    ) == {"loss": 0.0, "ranks": 3}


@pytest.mark.slow
def test_a_refusal_of_the_stage_is_one_message_and_exit_code_2(tiny_chain, tmp_path, monkeypatch, capfd):
    from diffstill.task import run_task

    monkeypatch.setenv("DIFFSTILL_RANKS", "2")
    given = handed(tiny_chain.artifacts, "generator") | {"latents": Handed(str(tmp_path / "none"))}
    with pytest.raises(SystemExit) as ended:
        run_task("finetune", tiny_chain.params.finetune.canonical(), **given, **handed(tmp_path, "denoiser", "metrics"))
    told = capfd.readouterr().err
    assert ended.value.code == 2
    assert re.findall("^error: .*", told, re.MULTILINE) == [
        f"error: {tmp_path / 'none'}: no artifact here; run the stage that makes it first (`diffstill run` or `dvc repro` runs them all)"
    ]
    assert "Traceback" not in told
    assert not (tmp_path / "denoiser").exists()


@pytest.mark.parametrize("asked", ["0", "-1", "two", "1.5"])
def test_a_number_of_ranks_that_is_none_is_refused(monkeypatch, asked):
    monkeypatch.setenv("DIFFSTILL_RANKS", asked)
    with pytest.raises(DiffstillError, match=f"DIFFSTILL_RANKS is '{asked}'"):
        launch.ranks_here()


@pytest.mark.parametrize(
    ("environment", "gpus", "ranks"),
    [
        ({}, 0, 1),
        ({}, 4, 4),
        ({"DIFFSTILL_DEVICE": "cuda"}, 4, 4),
        ({"DIFFSTILL_DEVICE": "cuda:1"}, 4, 1),
        ({"DIFFSTILL_DEVICE": "cpu"}, 4, 1),
        ({"DIFFSTILL_RANKS": "2"}, 4, 2),
        ({"DIFFSTILL_RANKS": "1"}, 4, 1),
    ],
)
def test_there_is_a_rank_per_gpu_unless_something_else_is_asked_for(monkeypatch, environment, gpus, ranks):
    monkeypatch.delenv("DIFFSTILL_RANKS", raising=False)
    monkeypatch.delenv("DIFFSTILL_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.ranks_here() == ranks
