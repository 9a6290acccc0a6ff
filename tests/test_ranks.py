"""Fine-tuning in several processes: the same losses, memories and weights as in one, whatever their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chains import Chain
from diffstill.artifacts import open_artifact
from diffstill.config import Params, render_params
from diffstill.errors import DiffstillError
from diffstill.ranks import Ranks, joined

CONFIG = {"batch_size": 12, "steps": 12, "capacity_real": 3, "capacity_gen": 2, "lambda_real": 0.7, "lambda_gen": 1.3, "checkpoint_every": 4}


@dataclass(frozen=True)
class Run:
    """A fine-tune in its own folder."""

    done: subprocess.CompletedProcess[str]
    denoiser: Path

    def trace(self) -> list[dict[str, float]]:
        """Every step's metrics."""
        return [json.loads(line) for line in (self.denoiser / "seed-0" / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> dict[str, torch.Tensor]:
        """What was trained."""
        return load_file(self.denoiser / "seed-0" / "delta.safetensors")


def tune(chain: Chain, folder: Path, ranks: int, *extra: str, script: str = "", **changes: object) -> Run:
    """Fine-tune with `ranks` processes, as a user would."""
    folder.mkdir(exist_ok=True)
    values = chain.params.model_dump(mode="json")
    values["finetune"] |= CONFIG | changes
    (folder / "params.yaml").write_text(render_params(Params.model_validate_json(json.dumps(values))))
    launched = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    stage = [script] if script else ["-m", "diffstill"]
    inputs = [f"--{name}={chain.artifacts / name}" for name in ("latents", "generator")]
    command = [sys.executable, *launched, *stage, "finetune", *inputs, "--denoiser=denoiser", "--device=cpu", *extra]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "DIFFSTILL_WORK": "work"},
    )
    return Run(done, folder / "denoiser")


@pytest.fixture(scope="module")
def alone(tiny_chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = tune(tiny_chain, tmp_path_factory.mktemp("alone"), 1)
    assert run.done.returncode == 0, run.done.stderr
    return run


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_more_processes_give_the_same_run(tiny_chain: Chain, alone: Run, tmp_path: Path, count: int) -> None:
    run = tune(tiny_chain, tmp_path, count)
    assert run.done.returncode == 0, run.done.stderr
    for ours, theirs in zip(run.trace(), alone.trace(), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)
    assert alone.trace()[-1]["loss_real"] > 0 < alone.trace()[-1]["memory_gen"]
    mine, others = run.weights(), alone.weights()
    assert mine.keys() == others.keys()
    for name, weight in others.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=2e-5)
    assert open_artifact(run.denoiser, "denoiser").manifest.config == open_artifact(alone.denoiser, "denoiser").manifest.config
    assert run.done.stderr.count("finetune done in") == 1  # one process speaks
    assert not list(tmp_path.glob("work/finetune-*/*"))


@pytest.mark.slow
def test_what_cannot_be_cut_is_refused(tiny_chain: Chain, tmp_path: Path) -> None:
    run = tune(tiny_chain, tmp_path, 2, batch_size=9)
    assert run.done.returncode != 0
    assert "a batch of 9 cannot be cut evenly over 2 processes; use a multiple of 2" in run.done.stderr
    assert not run.denoiser.exists()


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2])
def test_a_killed_run_goes_on_with_as_many_processes(tiny_chain: Chain, alone: Run, tmp_path: Path, before: int) -> None:
    """Killed after its second checkpoint; gone on with in two, which share what the first of them reads, or made again."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from diffstill import artifacts\n"
        "save, saved = artifacts.WorkFolder.save, []\n"
        "def dying(self, name, arrays):\n"
        "    save(self, name, arrays); saved.append(name)\n"
        "    if len(saved) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "artifacts.WorkFolder.save = dying\n"
        "from diffstill.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    first = tune(tiny_chain, tmp_path, before, script=str(script))
    assert first.done.returncode in (-9, 1)
    assert list(tmp_path.glob("work/finetune-*/*.safetensors"))
    assert not first.denoiser.exists()
    run = tune(tiny_chain, tmp_path, 2)
    assert run.done.returncode == 0, run.done.stderr
    assert ("another number of processes; made again" in run.done.stderr) == (before == 1)
    for name, weight in alone.weights().items():
        torch.testing.assert_close(run.weights()[name], weight, rtol=1e-3, atol=2e-5)
    assert run.trace()[-1] == pytest.approx(alone.trace()[-1], abs=1e-5, rel=1e-5)


def test_only_fine_tuning_runs_in_several_processes(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffstill.run import run_stage

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DiffstillError, match=r"`prepare` runs in one process, but torchrun has started 2"):
        run_stage("prepare", tiny_chain.params.prepare, {"images": tmp_path / "images"})


def test_alone_nothing_is_sent() -> None:
    with joined("cpu") as ranks:
        assert (ranks.main, ranks.rows(6)) == (True, slice(0, 6))
        rows = torch.randn(3, 2, requires_grad=True)
        assert ranks.gather(rows) is rows
        assert ranks.wrap(torch.nn.Linear(2, 2)) is None
        assert ranks.share(None) is None


def test_rows_are_cut_in_the_order_of_the_ranks() -> None:
    assert [Ranks(index, 3, "cpu").rows(6) for index in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    with pytest.raises(DiffstillError, match="cannot be cut evenly"):
        Ranks(0, 4, "cpu").rows(6)
