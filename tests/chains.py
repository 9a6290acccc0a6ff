"""A chain that tests look at, the world in which it runs, and what folders hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffstill.config import Params

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


def flip(path: Path) -> None:
    """Change one bit of a file, as a failing disk does."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def enter(world: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in `folder`, without tracking and without settings from outside."""
    folder.mkdir(parents=True, exist_ok=True)
    world.chdir(folder)
    world.setenv("MLFLOW_TRACKING_URI", "none")
    world.setenv("DIFFSTILL_WORK", str(folder / "work"))
    for name in OUTSIDE:
        world.delenv(name, raising=False)
