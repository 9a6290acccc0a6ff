"""The whole pipeline in containers, as no root and with a read-only root, against `dvc repro` on this machine: equal bytes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from chains import contents
from diffstill.config import preset, render_params

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Here:
    """A folder that the user of the containers may write to, and the engine that runs them."""

    folder: Path
    image: str
    engine: str

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines", "run-local", "--params", "params.yaml", "--runner", "docker", "--image", self.image]
        environment = os.environ | {"DOCKER_HOST": self.engine, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": "none"}
        return subprocess.run(
            [*command, "--output", "local", *options], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def here(tmp_path_factory, image, engine) -> Here:
    folder = tmp_path_factory.mktemp("docker")
    (folder / "params.yaml").write_text(render_params(preset("tiny")))
    return Here(folder, image, engine)


@pytest.fixture(scope="module")
def by_dvc(tmp_path_factory) -> dict[str, str]:
    """What `dvc repro` makes on this machine."""
    folder = tmp_path_factory.mktemp("dvc")
    (folder / "src").symlink_to(ROOT / "src")
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "params.yaml").write_text(render_params(preset("tiny")))
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = os.environ | {"PATH": search, "DVC_NO_ANALYTICS": "1", "MLFLOW_TRACKING_URI": "none", "OMP_NUM_THREADS": "1"}
    for command in (["dvc", "init", "--quiet", "--no-scm"], ["dvc", "repro"]):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return contents(folder / "artifacts")


@pytest.mark.parametrize("options", [("--shards", "3"), ("--shards", "1", "--user", "4711")], ids=["3 shards", "1 shard, any user"])
def test_containers_and_dvc_make_the_same_bytes(here: Here, by_dvc: dict[str, str], options: tuple[str, ...]) -> None:
    done = here.run(*options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    made = contents(here.folder / "local" / "artifacts")
    assert made["distilled/manifest.json"] == by_dvc["distilled/manifest.json"]
    assert made == by_dvc


def test_the_tasks_ran_as_the_user_of_the_image_or_the_one_that_was_asked_for(here: Here) -> None:
    made = list((here.folder / "local" / "runs").glob("*/report/report/manifest.json"))
    assert made
    assert {path.stat().st_uid for path in made} == {10001, 4711}


def test_a_failing_container_is_told(here: Here) -> None:
    """kfp's own runner takes it for a good one now and then."""
    before = contents(here.folder / "local" / "artifacts")
    values = preset("tiny").plain()
    values["prepare"]["classes"] = ["0", "1", "eleven"]
    (here.folder / "params.yaml").write_text(yaml.safe_dump(values))
    done = here.run()
    assert done.returncode == 2
    assert re.search(r"error: .*'eleven'", done.stderr)
    assert "error: the pipeline failed" in done.stderr
    assert contents(here.folder / "local" / "artifacts") == before
