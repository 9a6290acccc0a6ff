"""The README of a component says what its signature says, and its command is one that diffstill knows."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from diffstill.cli import main
from pipelines.connection import OLDEST
from pipelines.readme import readmes
from pipelines.settings import load_settings

ROOT = Path(__file__).parents[2]
TEXTS = readmes(load_settings(ROOT / "pipelines" / "settings.yaml").infra)


@pytest.mark.parametrize("path", TEXTS, ids=[path.parent.name for path in TEXTS])
def test_the_committed_readme_is_up_to_date(path):
    assert path.read_text() == TEXTS[path], "renew it: python -m pipelines readme"


def test_retries_are_those_that_the_pipeline_asks_for():
    spec = yaml.safe_load((Path(__file__).with_name("golden") / "distill.yaml").read_text().split("---")[0])
    dags = [spec["root"]["dag"], *(each["dag"] for each in spec["components"].values() if "dag" in each)]
    asked = {}
    for task in (task for dag in dags for task in dag["tasks"].values()):
        name = re.sub(r"^comp-|-\d+$", "", task["componentRef"]["name"])
        asked.setdefault(name, set()).add(task.get("retryPolicy", {}).get("maxRetryCount", 0))
    said = {path.parent.name: {int(found) for found in re.findall(r"up to (\d+) times", text)} or {0} for path, text in TEXTS.items()}
    assert said == {name: asked[name] for name in said}
    assert all(("components/kubeflow-retries" in text) == ("tried again" in text) for text in TEXTS.values())


@pytest.mark.parametrize("path", TEXTS, ids=[path.parent.name for path in TEXTS])
def test_its_metadata_are_as_the_catalogue_of_components_asks(path):
    """Source of the convention: kubeflow/pipelines-components, scripts/validate_metadata/metadata_schema.json."""
    found = yaml.safe_load(path.with_name("metadata.yaml").read_text())
    assert set(found) == {"name", "stability", "dependencies", "tags", "lastVerified"}
    assert found["name"] == path.parent.name
    assert found["stability"] in ("alpha", "beta", "stable")
    assert set(found["dependencies"]) <= {"kubeflow", "external_services"}
    needed = [one for each in found["dependencies"].values() for one in each]
    assert all(re.fullmatch(r"(==|>=|<=|~=)?\d+\.\d+\.\d+", one["version"]) for one in needed)
    assert {"name": "Pipelines", "version": ">={}.{}.0".format(*OLDEST)} in found["dependencies"]["kubeflow"]
    assert all(isinstance(tag, str) for tag in found["tags"])
    assert found["lastVerified"].tzinfo, "a time that everybody reads alike"


@pytest.mark.parametrize("path", TEXTS, ids=[path.parent.name for path in TEXTS])
def test_its_command_is_understood(path):
    command = TEXTS[path].split("```")[1].replace("\\\n", " ")
    program, name, *arguments = shlex.split(re.split("diffstill:[cg]pu", command)[1])
    assert program == "diffstill"
    assert main.commands[name].make_context(name, arguments) is not None
