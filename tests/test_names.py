"""No name out of a manifest, a table, an archive or a store leads out of the folder that it is meant for."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import diffstill
from chains import contents
from diffstill.artifacts import MANIFEST, Artifact, ancestors, new_artifact, open_artifact, read_manifest
from diffstill.config import EncodeConfig, EvaluateConfig, FinetuneConfig, PretrainConfig, PublishConfig, ReportConfig, SampleConfig
from diffstill.errors import DiffstillError
from diffstill.merge import merge
from diffstill.names import is_inside, is_name
from diffstill.registry import cached
from diffstill.shards import Share
from diffstill.stages.encode import encode
from diffstill.stages.evaluate import evaluate
from diffstill.stages.finetune import finetune
from diffstill.stages.pretrain import pretrain
from diffstill.stages.publish import publish
from diffstill.stages.report import report
from diffstill.stages.sample import sample
from experiments import Experiment, all_lines, make_experiment

OUTSIDE = ["../../../pwned", "/tmp/pwned", "..", ".", "", "a/b", "a\0b", "x" * 256, 5]
PARTS = st.lists(st.sampled_from(["..", ".", "", "a", "~", "/", "\\", "\0", "b.png"]), max_size=5).map("/".join) | st.text(max_size=8)


@given(PARTS)
def test_what_is_a_name_stays_in_the_folder(name: str) -> None:
    root = Path("/some/where").resolve()
    if is_name(name):
        assert (root / name).parent == root
        assert Path(root / name).name == name
    if is_inside(name):
        assert np.all([part not in ("..", "") for part in name.split("/")])
        assert root in (root / name).parents


@pytest.mark.parametrize("name", ["cat", "cat & <dog>", '"q$u$ote"', "a,b", "-x", "a\\b", "é", "x" * 255, "..."])
def test_odd_names_are_names(name: str) -> None:
    assert is_name(name)


def doctor(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest; all its digests stay right."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names") / "a" / "b" / "c"
    made = make_experiment(root, seeds=(0,))
    made.judge(all_lines(made.images.digest)[:1])
    made.summarise()
    return root


@pytest.fixture
def experiment(template: Path, tmp_path: Path) -> Experiment:
    """With room above it, so that what leads out of its folders is seen."""
    shutil.copytree(template, tmp_path / "a" / "b" / "c")
    return Experiment(tmp_path / "a" / "b" / "c", [tmp_path / "a" / "b" / "c" / "scores"])


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("fact", ["classes", "students", "sources"])
def test_a_manifest_has_no_such_names(experiment: Experiment, fact: str, name: object) -> None:
    doctor(experiment.paths["images"], lambda manifest: manifest["facts"].update({fact: ["cat", name]}))
    with pytest.raises(DiffstillError, match=f"images/manifest.json: not a manifest of schema 1 .names .* in `{fact}`, which is no name of"):
        open_artifact(experiment.paths["images"], "images")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].update({"../../x": "0"}),
        lambda manifest: manifest["files"].update({"/etc/passwd": "0"}),
        lambda manifest: manifest["inputs"].update({"generator": "../../x"}),
        lambda manifest: manifest["inputs"].update({"../x": "0" * 64}),
        lambda manifest: manifest["facts"].update(seeds=["../0"]),
        lambda manifest: manifest["facts"].update(source="untuned/../../x"),
    ],
)
def test_nor_other_paths(experiment: Experiment, change: Callable[[dict[str, Any]], None]) -> None:
    doctor(experiment.paths["distilled"], change)
    for opened in (read_manifest, open_artifact):
        with pytest.raises(DiffstillError, match=r"manifest.json: not a manifest of schema 1 \(names .* in `"):
            opened(experiment.paths["distilled"], "distilled")


def test_nor_has_the_manifest_of_an_ancestor(experiment: Experiment) -> None:
    made = open_artifact(experiment.paths["distilled"], "distilled")
    path = made.folder / "ancestors" / f"{made.manifest.inputs['generator']}.json"
    path.write_text(path.read_text().replace('"cat & <dog>"', '"../../x"'))
    with pytest.raises(DiffstillError, match=r"names '../../x' in `classes`"):
        ancestors(made)


class Nowhere:
    """A registry that nothing may reach."""

    def publish(self, *_given: object) -> int:
        raise AssertionError


def _reported(made: Experiment, out: Path) -> None:
    given = {name: made.paths[name] for name in ("images", "denoiser", "distilled", "untuned")}
    report(ReportConfig(), **given, scores=made.scores, report=out)


DOORS: dict[str, tuple[str, Callable[[Experiment, Path], Any]]] = {
    "pretrain": ("images", lambda made, out: pretrain(PretrainConfig(), images=made.paths["images"], generator=out)),
    "encode": ("images", lambda made, out: encode(EncodeConfig(), images=made.paths["images"], generator=made.paths["generator"], latents=out)),
    "finetune": (
        "generator",
        lambda made, out: finetune(FinetuneConfig(), latents=made.paths["latents"], generator=made.paths["generator"], denoiser=out),
    ),
    "sample": ("generator", lambda made, out: sample(SampleConfig(), generator=made.paths["generator"], distilled=out)),
    "evaluate": (
        "distilled",
        lambda made, out: evaluate(EvaluateConfig(), images=made.paths["images"], distilled=made.paths["distilled"], scores=out),
    ),
    "report": ("untuned", _reported),
    "publish": (
        "distilled",
        lambda made, out: publish(
            PublishConfig(), distilled=made.paths["distilled"], report=made.root / "report", card=out, registry=Nowhere(), force=True
        ),
    ),
    "merge": ("generator", lambda made, out: merge(made.paths["generator"], made.paths["denoiser"], out)),
    "load": ("distilled", lambda made, _out: diffstill.load(str(made.paths["distilled"]))),
    "gather": ("distilled", lambda made, out: Share.of(None, [made.paths["distilled"]]).gather(out, "distilled", SampleConfig(), {})),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["../../../pwned", "{root}/pwned"])
def test_no_stage_goes_where_a_class_name_leads(experiment: Experiment, tmp_path: Path, door: str, name: str) -> None:
    which, use = DOORS[door]
    led = name.format(root=tmp_path)
    doctor(experiment.paths[which], lambda manifest: manifest["facts"].update(classes=[led, "b"]))
    before = contents(tmp_path)
    with pytest.raises(DiffstillError, match="which is no name of a file or folder"):
        use(experiment, experiment.root / "out")
    assert contents(tmp_path) == before
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("digest", ["../../../x", "/x", "0" * 63, "A" * 64])
def test_a_cache_folder_has_the_name_of_a_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digest: str) -> None:
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "a" / "b" / "cache"))
    with pytest.raises(DiffstillError, match="is said to have the SHA-256"):
        cached(digest, "distilled", "runs:/1/distilled", lambda folder: (folder / "x").touch())
    assert not list(tmp_path.iterdir())


def test_what_comes_from_a_store_is_checked_before_it_is_there(experiment: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    folder = experiment.paths["generator"]
    doctor(folder, lambda manifest: manifest["facts"].update(classes=["../../../pwned", "b"]))
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    with pytest.raises(DiffstillError, match="which is no name of a file or folder"):
        cached(digest, "generator", "s3://bucket/generator", lambda partial: shutil.copytree(folder, partial, dirs_exist_ok=True))
    assert not contents(tmp_path / "cache" / "generator" / digest)


@pytest.mark.parametrize("name", ["../x", "a/b"])
def test_no_artifact_is_written_with_such_names(tmp_path: Path, name: str) -> None:
    """A student is named by a table of scores."""
    refused = pytest.raises(DiffstillError, match=f"out: the manifest names '{name}' in `students`, which is no name")
    with refused, new_artifact(tmp_path / "out", "report", ReportConfig(), {}) as draft:
        draft.facts["students"] = [name]
    assert not list(tmp_path.iterdir())


def test_an_artifact_says_who_it_is_from(experiment: Experiment) -> None:
    """The check lets everything through that our own stages write."""
    for name, kind in (("images", "images"), ("distilled", "distilled"), ("denoiser", "denoiser"), ("scores", "scores"), ("report", "report")):
        assert isinstance(open_artifact(experiment.root / name, kind), Artifact)  # type: ignore[arg-type]
