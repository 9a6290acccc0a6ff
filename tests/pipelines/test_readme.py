"""The README of a component says what its signature says, and its command is one that diffstill knows."""

import re
import shlex
from pathlib import Path

import pytest

from diffstill.cli import main
from pipelines.readme import readmes
from pipelines.settings import load_settings

ROOT = Path(__file__).parents[2]
TEXTS = readmes(load_settings(ROOT / "pipelines" / "settings.yaml").infra)


@pytest.mark.parametrize("path", TEXTS, ids=[path.parent.name for path in TEXTS])
def test_the_committed_readme_is_up_to_date(path):
    assert path.read_text() == TEXTS[path], "renew it: python -m pipelines readme"


@pytest.mark.parametrize("path", TEXTS, ids=[path.parent.name for path in TEXTS])
def test_its_command_is_understood(path):
    command = TEXTS[path].split("```")[1].replace("\\\n", " ")
    program, name, *arguments = shlex.split(re.split("diffstill:[cg]pu", command)[1])
    assert program == "diffstill"
    assert main.commands[name].make_context(name, arguments) is not None
