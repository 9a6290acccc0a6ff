"""What all tests share: a quiet world of their own, and one whole chain."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: several test processes share the cores

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from diffstill.config import Params, preset
from diffstill.run import run_chain

settings.register_profile("diffstill", deadline=None, max_examples=50)
settings.load_profile("diffstill")

OUTSIDE = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "DIFFSTILL_CACHE")
"""Settings of the machine that no test may see."""


@dataclass(frozen=True)
class Chain:
    """A finished chain: its parameters and the folder of its artifacts. Read only: copy the folder to change it."""

    params: Params
    artifacts: Path


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under `folder`, by its path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def enter(world: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in `folder`, without tracking and without settings from outside."""
    folder.mkdir(parents=True, exist_ok=True)
    world.chdir(folder)
    world.setenv("MLFLOW_TRACKING_URI", "none")
    world.setenv("DIFFSTILL_WORK", str(folder / "work"))
    for name in OUTSIDE:
        world.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    monkeypatch.setenv("DIFFSTILL_WORK", str(tmp_path / "work"))
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The whole chain of preset tiny, run once per test process: tests that use it belong to the group `chain`."""
    folder = tmp_path_factory.mktemp("chain")
    params = preset("tiny")
    with pytest.MonkeyPatch.context() as world:
        enter(world, folder)
        run_chain(params, folder / "artifacts")
    return Chain(params, folder / "artifacts")
