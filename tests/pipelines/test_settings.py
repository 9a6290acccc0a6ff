"""What a cluster needs, checked before anything is sent to it."""

from pathlib import Path

import pytest
import yaml

from diffstill.errors import DiffstillError
from pipelines.settings import InfraConfig, load_settings

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "pipelines" / "settings.yaml"


def changed(folder: Path, path: str, value: object) -> Path:
    """The committed settings with one entry changed; None removes it."""
    values = yaml.safe_load(SETTINGS.read_text())
    *parents, last = path.split("/")
    place = values
    for name in parents:
        place = place[name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    (folder / "settings.yaml").write_text(yaml.safe_dump(values))
    return folder / "settings.yaml"


def test_the_committed_settings_are_whole():
    settings = load_settings(SETTINGS)
    assert set(settings.infra.resources) == set(InfraConfig.TASKS)
    assert "finetune" in settings.infra.on_gpu
    assert settings.infra.run_as_non_root
    assert settings.cluster.host is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("cluster/host", "https://user:word@kubeflow", "cluster.host"),
        ("cluster/host", "kubeflow:8080", "cluster.host"),
        ("cluster/token", "abc", "`cluster.token` is not a knob"),
        ("cluster/pipeline_root", "/mnt/runs", "cluster.pipeline_root"),
        ("infra/resources/finetune/memory", "64 GB", "infra.resources.finetune.memory"),
        ("infra/resources/finetune/gpus", 1.5, "infra.resources.finetune.gpus"),
        ("infra/resources/finetune", None, "lacks finetune; give one entry for each of prepare"),
        ("infra/resources/tune", {}, "has unknown tune"),
        ("infra/queue", "Not A Name", "infra.queue"),
        ("infra/secrets/diffstill-s3/key", "not a variable", "infra.secrets"),
        ("shards/encode", 31, "shards.encode"),
        ("shards/encode", 0, "shards.encode"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, path, value, message):
    with pytest.raises(DiffstillError, match=message) as caught:
        load_settings(changed(tmp_path, path, value))
    assert "settings.yaml" in str(caught.value)


def test_credentials_in_a_wrong_entry_are_not_shown(tmp_path):
    with pytest.raises(DiffstillError, match=r"cluster\.host") as caught:
        load_settings(changed(tmp_path, "cluster/host", "https://user:sentinel@kubeflow"))
    assert "sentinel" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DiffstillError, match=r"none.yaml: no such file; copy pipelines/settings.yaml"):
        load_settings(tmp_path / "none.yaml")
