"""The real `dvc repro` on preset tiny: it makes the chain, makes nothing twice, and makes again what a knob reaches."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from chains import contents
from diffstill.config import load_params, preset, render_params
from diffstill.plan import chain

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[1]
STEPS = [step.name for step in chain(preset("tiny"))]


@dataclass(frozen=True)
class Project:
    """A folder as `make demo` sets it up, and the names of the stages that the first `dvc repro` ran."""

    folder: Path
    first: list[str]

    def call(self, *command: str) -> str:
        search = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        quiet = {"PATH": search, "DVC_NO_ANALYTICS": "1", "CI": "1", "MLFLOW_TRACKING_URI": "none", "DIFFSTILL_WORK": str(self.folder / "work")}
        done = subprocess.run(command, cwd=self.folder, env=os.environ | quiet, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def repro(self) -> list[str]:
        """`dvc repro`; the names of the stages that ran. The others did not change."""
        told = self.call("dvc", "repro")
        ran = re.findall(r"^Running stage '(.+)':$", told, re.MULTILINE)
        assert ran + re.findall(r"^Stage '(.+)' didn't change, skipping$", told, re.MULTILINE) == sorted(
            STEPS, key=lambda name: (name not in ran, STEPS.index(name))
        )
        return ran


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    checkout, folder = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dvc")
    shutil.copytree(ROOT / "src", checkout / "src")
    (folder / "src").symlink_to(checkout / "src")
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "params.yaml").write_text(render_params(preset("tiny")))
    Project(folder, []).call("dvc", "init", "--quiet", "--no-scm")
    return Project(folder, Project(folder, []).repro())


@pytest.mark.slow
def test_the_first_time_everything_runs_in_the_order_of_the_chain(project):
    assert project.first == STEPS


@pytest.mark.slow
def test_dvc_and_run_make_the_same(project):
    told = project.call("diffstill", "run")
    assert re.findall(r"^(\S+) is up to date$", told, re.MULTILINE) == STEPS
    assert "untuned generator" in told


@pytest.mark.slow
def test_the_second_time_nothing_runs(project):
    lock, made = (project.folder / "dvc.lock").read_bytes(), contents(project.folder / "artifacts")
    assert project.repro() == []
    assert (project.folder / "dvc.lock").read_bytes() == lock
    assert contents(project.folder / "artifacts") == made


@pytest.mark.slow
def test_another_guidance_runs_what_it_reaches_and_no_more(project):
    params = project.folder / "params.yaml"
    params.write_text(re.sub(r"guidance: [0-9.]+", "guidance: 2.5", params.read_text()))
    assert project.repro() == ["sample", "sample-untuned", "evaluate@distilled-convnet-2", "evaluate@untuned-convnet-2", "report"]
    assert project.repro() == []


def test_the_committed_lock_agrees_with_the_code_and_the_parameters(tmp_path):
    """Without its data: `dvc repro` would run nothing, so dvc.lock is that of this very code and these knobs."""
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    project = Project(tmp_path, [])
    project.call("dvc", "init", "--quiet", "--no-scm")
    told = project.call("dvc", "repro", "--dry", "--allow-missing")
    assert "Running stage" not in told, f"run `make lock` and commit dvc.lock\n{told}"
    assert told.count("didn't change, skipping") == len(chain(load_params(ROOT / "params.yaml")))
