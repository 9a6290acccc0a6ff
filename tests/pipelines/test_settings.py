"""What a cluster needs, checked before anything is sent to it."""

from pathlib import Path

import pytest
import yaml

from diffstill.errors import DiffstillError
from pipelines.settings import InfraConfig, TrainJobConfig, load_settings

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
    assert settings.infra.resources["finetune"].gpus == 1
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
        ("infra/priority", "gpu-runs", "`infra.priority` is 'gpu-runs', but `infra.queue` is null"),
        ("infra/config_maps/other", {"key": "HF_HOME"}, "HF_HOME is given twice, or is one that a task needs"),
        ("infra/config_maps/other", {"key": "DIFFSTILL_CACHE"}, "DIFFSTILL_CACHE is given twice, or is one that a task needs"),
        ("infra/run_as_user", 0, "is root, which `infra.run_as_non_root` forbids"),
        ("infra/secrets/other", {"key": "AWS_ACCESS_KEY_ID"}, "AWS_ACCESS_KEY_ID is given twice"),
        ("infra/secrets/other", {"key": "DIFFSTILL_CHAIN"}, "DIFFSTILL_CHAIN is given twice, or is one that a task needs"),
        ("infra/resources/finetune/tolerations", [{"operator": "Equal", "key": "a"}], "goes with a `key` and a `value`"),
        ("infra/config_maps/other", {"key": "DIFFSTILL_IMAGE"}, "DIFFSTILL_IMAGE is given twice, or is one that a task needs"),
        ("infra/resources/publish", None, "lacks publish"),
        ("infra/config_maps/other", {"key": "DIFFSTILL_RANKS"}, "DIFFSTILL_RANKS is given twice, or is one that a task needs"),
        ("infra/resources/finetune", {"gpus": 2}, "`gpus` is 2, whose processes talk through shared memory, but `shared_memory` is null"),
        ("infra/resources/report", {"node_selector": {"Bad Key!": "x"}}, "infra.resources.report.node_selector"),
        ("infra/resources/report", {"node_selector": {f"example.org/{64 * 'k'}": "x"}}, "infra.resources.report.node_selector"),
        ("infra/resources/report", {"gpu_type": "gpu type!"}, "infra.resources.report.gpu_type"),
        ("infra/resources/report", {"gpu_type": "gpu"}, "infra.resources.report.gpu_type"),
        ("infra/resources/report", {"tolerations": [{"key": "Bad Key!"}]}, "infra.resources.report.tolerations"),
        ("infra/resources/report", {"tolerations": [{"key": "a", "operator": "Equal", "value": "b c"}]}, "infra.resources.report.tolerations"),
        ("infra/secrets/diffstill-s3", {"bad key!": "ANOTHER"}, "infra.secrets.diffstill-s3"),
        ("infra/config_maps/other", {"bad key!": "ANOTHER"}, "infra.config_maps.other"),
        ("infra/resources/report", {"retry_seconds": 600, "retry_max_seconds": 60}, "`retry_seconds` is 600, but `retry_max_seconds` is 60"),
        ("cluster/pipeline", "My Pipeline", "cluster.pipeline"),
        ("cluster/pipeline", "team.distill", "cluster.pipeline"),
        ("cluster/pipeline", 47 * "p", "cluster.pipeline"),
        ("infra/trainjob", {}, "infra.trainjob.nodes"),
        ("infra/trainjob", {"nodes": 0}, "infra.trainjob.nodes"),
        ("infra/trainjob", {"nodes": 2, "claim": "Not A Name"}, "infra.trainjob.claim"),
        ("shards/encode", 31, "shards.encode"),
        ("shards/encode", 0, "shards.encode"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, path, value, message):
    with pytest.raises(DiffstillError, match=message) as caught:
        load_settings(changed(tmp_path, path, value))
    assert "settings.yaml" in str(caught.value)


def test_nodes_need_an_amount_that_the_sdk_can_read(tmp_path):
    path = changed(tmp_path, "infra/trainjob", {"nodes": 2})
    assert load_settings(path).infra.trainjob == TrainJobConfig(nodes=2)
    values = yaml.safe_load(path.read_text())
    values["infra"]["resources"]["finetune"]["cpu"] = None
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(DiffstillError, match=r"`infra.trainjob` is set, but `infra.resources.finetune.cpu` is null"):
        load_settings(path)


def test_credentials_in_a_wrong_entry_are_not_shown(tmp_path):
    with pytest.raises(DiffstillError, match=r"cluster\.host") as caught:
        load_settings(changed(tmp_path, "cluster/host", "https://user:sentinel@kubeflow"))
    assert "sentinel" not in str(caught.value)


@pytest.mark.parametrize("path", ["cluster/token_env", "infra/secrets/diffstill-s3/key"])
def test_a_secret_in_place_of_a_name_is_not_shown(tmp_path, path):
    with pytest.raises(DiffstillError) as caught:
        load_settings(changed(tmp_path, path, "eyJsentinel.sentinel"))
    assert path.split("/")[1] in str(caught.value)
    assert "sentinel" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DiffstillError, match=r"none.yaml: no such file; copy pipelines/settings.yaml"):
        load_settings(tmp_path / "none.yaml")
