"""What a command loads before it has anything to do: seconds that a user waits each time."""

import os
import subprocess
import sys

import pytest

from diffstill.config import preset, render_params

HEAVY = {"torch", "scipy", "sklearn", "matplotlib", "mlflow", "huggingface_hub", "diffusers", "timm", "boto3", "dvc", "kfp", "pandas"}
ARRAYS = {"numpy", "PIL", "safetensors", "rich", "requests"}
"""Lighter, and of no use to a text of help."""


def loaded(*arguments, cwd) -> set[str]:
    """The packages that a command imports, as the interpreter itself lists them."""
    command = [sys.executable, "-X", "importtime", "-m", "diffstill", *arguments]
    done = subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True, check=True)
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "params.yaml").write_text(render_params(preset("tiny")))
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("--version",),
        ("run", "--help"),
        ("finetune", "--help"),
        ("show",),
        ("preset", "tiny", "--output", "new.yaml"),
        ("completion", "bash"),
    ],
    ids=" ".join,
)
def test_nothing_that_computes_is_loaded_to_tell_of_it(command, folder):
    packages = loaded(*command, cwd=folder)
    assert "click" in packages, "the list of packages is empty or unreadable"
    assert not packages & (HEAVY | ARRAYS)


def test_a_plan_needs_nothing_that_computes(folder):
    assert not loaded("plan", cwd=folder) & HEAVY


def test_a_chain_with_nothing_to_do_needs_no_torch(tiny_chain, folder):
    """Its table alone takes statistics."""
    assert not loaded("run", "--artifacts", tiny_chain.artifacts, cwd=folder) & (HEAVY - {"scipy"})
