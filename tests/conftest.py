"""What all tests share: a quiet world of their own, and one whole chain."""

from __future__ import annotations

import logging
import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: several test processes share the cores
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a suite that was started in the background; what it starts would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from chains import OUTSIDE, Chain, enter
from diffstill.config import preset
from diffstill.run import run_chain

settings.register_profile("diffstill", deadline=None, max_examples=50)
settings.load_profile("diffstill")


@pytest.fixture(autouse=True)
def _own_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    monkeypatch.setenv("DIFFSTILL_WORK", str(tmp_path / "work"))
    for name in OUTSIDE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _own_level() -> Iterator[None]:
    """A command sets how much is said; the test after it must not hear more for that."""
    logger = logging.getLogger("diffstill")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every checkpoint and preview that is due is made, whatever share of the time that takes of tiny steps."""
    monkeypatch.setattr("diffstill.training.CHECKPOINT_SHARE", 1e9)
    monkeypatch.setattr("diffstill.stages.finetune.PREVIEW_SHARE", 1e9)


@pytest.fixture(scope="session")
def tiny_chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The whole chain of preset tiny, run once per test process: tests that use it belong to the group `chain`."""
    folder = tmp_path_factory.mktemp("chain")
    params = preset("tiny")
    with pytest.MonkeyPatch.context() as world:
        enter(world, folder)
        run_chain(params, folder / "artifacts")
    return Chain(params, folder / "artifacts")
