"""The compiled pipeline: the committed copies are what the code compiles to, and no secret gets in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from components.images import LOCK, load_images
from diffstill.errors import DiffstillError
from pipelines.package import write_package
from pipelines.settings import load_settings

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden")
SETTINGS = ROOT / "pipelines" / "settings.yaml"
RENEW = "python -m pipelines compile --images-lock tests/pipelines/golden/images.lock --output tests/pipelines/golden/"


def compiled(folder: Path, *, kubernetes: bool = False, settings: Path = SETTINGS) -> Path:
    path = folder / "distill.yaml"
    write_package(load_settings(settings), load_images(GOLDEN / "images.lock"), path, kubernetes=kubernetes)
    return path


@pytest.mark.parametrize(("name", "kubernetes"), [("distill.yaml", False), ("distill.kubernetes.yaml", True)])
def test_the_committed_copy_is_what_the_code_compiles_to(tmp_path, name, kubernetes):
    flag = " --kubernetes" if kubernetes else ""
    assert compiled(tmp_path, kubernetes=kubernetes).read_text() == (GOLDEN / name).read_text(), f"renew it: {RENEW}{name}{flag}"


def test_another_process_compiles_the_same_bytes(tmp_path):
    command = [sys.executable, "-m", "pipelines", "compile", "--images-lock", str(GOLDEN / "images.lock"), "--output", str(tmp_path / "other.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env={"PATH": "", "PYTHONHASHSEED": "7"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "other.yaml").read_text() == (GOLDEN / "distill.yaml").read_text()


def test_a_package_without_caching_differs_in_nothing_else(tmp_path):
    path = tmp_path / "plain.yaml"
    write_package(load_settings(SETTINGS), load_images(GOLDEN / "images.lock"), path, caching=False)
    before, after = (json.dumps(list(yaml.safe_load_all(each.read_text())), sort_keys=True) for each in (GOLDEN / "distill.yaml", path))
    assert before.count('"cachingOptions": {"enableCache": true}') > 10
    assert after == before.replace('{"enableCache": true}', "{}")


def test_every_task_runs_in_an_image_by_digest():
    spec = next(yaml.safe_load_all((GOLDEN / "distill.yaml").read_text()))
    images = {name: each["container"]["image"] for name, each in spec["deploymentSpec"]["executors"].items() if "container" in each}
    assert len(images) > 10
    assert set(images.values()) == set(json.loads((GOLDEN / "images.lock").read_text()).values())


def test_manifests_hold_a_pipeline_and_its_version():
    kinds = [each["kind"] for each in yaml.safe_load_all((GOLDEN / "distill.kubernetes.yaml").read_text())]
    assert kinds == ["Pipeline", "PipelineVersion"]


def test_manifests_have_the_name_that_the_settings_give(tmp_path):
    """The longest that may be: the webhook makes a label of the version's."""
    values, name = yaml.safe_load(SETTINGS.read_text()), f"a{44 * '-'}z"
    values["cluster"]["pipeline"] = name
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    pipeline, version = yaml.safe_load_all(compiled(tmp_path, kubernetes=True, settings=tmp_path / "settings.yaml").read_text())
    assert pipeline["metadata"]["name"] == version["spec"]["pipelineName"] == name
    assert version["metadata"]["name"].startswith(f"{name}-")
    assert len(version["metadata"]["name"]) == 63


def test_no_secret_gets_into_what_is_compiled(tmp_path, monkeypatch):
    """Values planted wherever a careless compiler could find them; names of secrets are there, values, hosts and tokens are not."""
    planted = {
        "AWS_ACCESS_KEY_ID": "sentinel-key", "AWS_SECRET_ACCESS_KEY": "sentinel-secret", "AWS_ENDPOINT_URL": "http://sentinel-store:9000",
        "MLFLOW_TRACKING_URI": "http://sentinel-user:sentinel-word@sentinel-mlflow:5000", "KFP_HOST": "http://sentinel-kubeflow", "KFP_TOKEN": "sentinel-token",
    }  # fmt: skip
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    values = yaml.safe_load(SETTINGS.read_text())
    values["cluster"] |= {"host": "https://sentinel-host", "token_env": "KFP_TOKEN", "pipeline_root": "s3://sentinel-bucket/runs"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    for kubernetes in (False, True):
        text = compiled(tmp_path, kubernetes=kubernetes, settings=tmp_path / "settings.yaml").read_text()
        assert "AWS_SECRET_ACCESS_KEY" in text
        assert "diffstill-s3" in text
        assert "sentinel" not in text


def test_without_digests_nothing_is_compiled(tmp_path):
    command = [sys.executable, "-m", "pipelines", "compile", "--images-lock", str(tmp_path / "none.lock"), "--output", str(tmp_path / "out.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "which is no digest" in done.stderr
    assert "--allow-tag" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.yaml").exists()
    allowed = subprocess.run([*command, "--allow-tag"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert allowed.returncode == 0, allowed.stderr
    text = (tmp_path / "out.yaml").read_text()
    assert "diffstill:gpu" in text
    assert "enableCache: true" not in text, "a cache cannot tell when a tag has moved"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "is not JSON"),
        ("[1]", "not a mapping"),
        ('{"cpu": 1}', "not a mapping"),
        ('{"cpu": "a@sha256:12", "gpu": "b"}', "'a@sha256:12', which is no digest"),
    ],
)
def test_a_damaged_lock_is_refused(tmp_path, text, message):
    (tmp_path / "images.lock").write_text(text)
    with pytest.raises(DiffstillError, match=message):
        load_images(tmp_path / "images.lock")


def test_the_lock_lies_where_the_push_writes_it():
    assert LOCK == ROOT / "docker" / "images.lock"
