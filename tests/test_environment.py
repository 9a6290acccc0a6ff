"""What a version says of the machine that published it."""

import getpass
import json
import os
import socket
import subprocess
from pathlib import Path

import numpy
import pytest
import torch

from diffstill import __version__
from diffstill.environment import code_commit, environment, git_sha, rank_here
from diffstill.errors import DiffstillError


def test_it_names_packages_and_processor():
    found = environment()
    assert (found["torch"], found["numpy"]) == (torch.__version__, numpy.__version__)
    assert found["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["processor"]
    assert ("gpu" in found) == torch.cuda.is_available()


def test_it_is_the_same_each_time_and_fits_a_tag():
    told = json.dumps(environment(), sort_keys=True)
    assert told == json.dumps(environment(), sort_keys=True)
    assert len(told) < 5000


def test_it_names_no_host_and_no_user():
    values = set(environment().values())
    assert not values & {socket.gethostname(), getpass.getuser()}


def test_ranks_are_known_only_where_torchrun_says_all_of_it(monkeypatch):
    said = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert rank_here() == (1, 2)
    monkeypatch.setenv("WORLD_SIZE", "x")
    with pytest.raises(DiffstillError, match="RANK and WORLD_SIZE are '1' and 'x', no numbers"):
        rank_here()
    for name, value in said.items():
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv(name)
        assert rank_here() == (0, 1)  # a scheduler that sets some of them for purposes of its own
        monkeypatch.setenv(name, value)


# --- commits ------------------------------------------------------------------------------------------------------


def repository(folder: Path, *files: str) -> str:
    """Make a repository of these files, written now; its commit."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1")
    for arguments in (["init", "-q"], ["add", *files], ["commit", "-qm", "a"], ["rev-parse", "HEAD"]):
        done = subprocess.run([*git, *arguments], cwd=folder, check=True, env=os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}, capture_output=True)
    return done.stdout.decode().strip()


def test_the_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_sha() == "none"
    commit = repository(tmp_path, "a")
    assert git_sha() == commit
    (tmp_path / "untracked").write_text("1")
    assert git_sha() == commit
    (tmp_path / "a").write_text("2")
    assert git_sha() == f"{commit}-dirty"


def test_the_code_has_a_commit_of_its_own(tmp_path, monkeypatch):
    """That of the checkout that it runs from, which is not that of the project around the environment it may be installed in."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("DIFFSTILL_REVISION", raising=False)
    project, package = tmp_path / "project", tmp_path / "project" / ".venv" / "diffstill"
    commit, own = repository(tmp_path / "checkout", "src/diffstill/environment.py", "other"), repository(project, "params.yaml")
    package.mkdir(parents=True)
    monkeypatch.chdir(project)
    for place, told in ((package, __version__), (tmp_path / "checkout" / "src" / "diffstill", commit)):
        monkeypatch.setattr("diffstill.environment.__file__", str(place / "environment.py"))
        assert (code_commit(), git_sha()) == (told, own)
    (tmp_path / "checkout" / "other").write_text("2")
    assert code_commit() == commit
    (tmp_path / "checkout" / "src" / "diffstill" / "environment.py").write_text("2")
    assert code_commit() == f"{commit}-dirty"


@pytest.mark.parametrize(("revision", "told"), [("b" * 40, "b" * 40), ("unknown", __version__), ("", __version__)])
def test_in_an_image_the_code_is_what_the_image_was_built_from(revision, told, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr("diffstill.environment.__file__", str(tmp_path / "environment.py"))
    monkeypatch.setenv("DIFFSTILL_REVISION", revision)
    assert code_commit() == told
