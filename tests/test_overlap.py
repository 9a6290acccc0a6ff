"""No output lies in an input, or holds one: writing the one would ruin the other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from chains import contents
from diffstill import cli
from diffstill.artifacts import new_artifact, open_artifact, refuse_overlap
from diffstill.config import Params, PretrainConfig, ReportConfig, preset
from diffstill.errors import DiffstillError
from diffstill.plan import STAGES
from diffstill.run import run_stage
from experiments import Experiment, all_lines, make_experiment
from pipelines import __main__ as pipelines
from pipelines.local import processes, run_local
from pipelines.settings import ShardsConfig, load_settings

RUINED = r"the output (is|lies inside|holds) the input `.*`.*; choose another place for the output"


@pytest.mark.parametrize(
    ("output", "given", "overlap"),
    [
        ("a", "a", True),
        ("a/b", "a", True),
        ("a", "a/b", True),
        ("x/../a/b", "a", True),
        ("link/b", "a", True),
        ("a/b", "link", True),
        ("ab", "a", False),
        ("a/b", "a/c", False),
        ("s3://bucket/a/b", "s3://bucket/a/", True),
        ("s3://bucket/a", "s3://bucket/a/", True),
        ("s3://bucket/ab", "s3://bucket/a", False),
        ("s3://other/a", "s3://bucket/a", False),
        ("a", "hf://owner/a@main", False),
    ],
)
def test_what_overlaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, given: str, overlap: bool) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("link").symlink_to("a")
    places = [place if "://" in place else Path(place) for place in (output, given)]
    if overlap:
        with pytest.raises(DiffstillError, match=RUINED):
            refuse_overlap(places[0], {"given": places[1]})
    else:
        refuse_overlap(places[0], {"given": places[1]})


def _taken() -> Iterator[tuple[str, str]]:
    for name, stage in STAGES.items():
        for given in (*stage.inputs, *stage.optional, *stage.many, *stage.outside, *(["parts"] if stage.sharded else [])):
            yield name, given


@pytest.mark.parametrize(("name", "given"), list(_taken()))
@pytest.mark.parametrize("where", ["same", "inside", "around"])
def test_no_stage_writes_into_what_it_reads(tmp_path: Path, name: str, given: str, where: str) -> None:
    stage, deep = STAGES[name], "val" if given == "data" else "deep"
    place = tmp_path / "linked" / deep
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    paths: dict[str, Any] = {one: tmp_path / one for one in stage.inputs}
    read = tmp_path / "linked" if given == "data" else place  # of which `prepare` reads train/, test/ and val/
    other = tmp_path / "other"
    paths[given] = [place, other] if given in (*stage.many, "parts") else read
    paths[stage.output] = {"same": tmp_path / "real" / deep, "inside": tmp_path / "real" / deep / "out", "around": tmp_path / "real"}[where]
    with pytest.raises(DiffstillError, match=RUINED):
        run_stage(name, preset("tiny").section(name), paths)
    assert not contents(tmp_path)


def test_nor_into_what_its_configuration_names(tmp_path: Path) -> None:
    config = PretrainConfig(source="folder", location=str(tmp_path / "weights"))
    with pytest.raises(DiffstillError, match=r"lies inside the input `weights` \(.*weights\)"):
        run_stage("pretrain", config, {"images": tmp_path / "images", "generator": tmp_path / "weights" / "generator"})


def test_nor_into_a_place_in_a_store_that_it_reads(tmp_path: Path) -> None:
    with pytest.raises(DiffstillError, match="lies inside the input `generator`"):
        run_stage("sample", Params().sample, {"generator": "s3://bucket/made", "distilled": "s3://bucket/made/distilled"})


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    made = make_experiment(tmp_path / "made", seeds=(0,))
    made.judge(all_lines(made.images.digest)[:1])
    made.summarise()
    return made


def test_no_artifact_is_written_into_its_input(experiment: Experiment) -> None:
    images = experiment.images
    with pytest.raises(DiffstillError, match=RUINED), new_artifact(images.folder / "out", "report", ReportConfig(), {"images": images}):
        pass
    assert open_artifact(images.folder, "images") == images


@pytest.mark.parametrize(
    "command",
    [
        ["merge", "--generator", "{made}/generator", "--denoiser", "{made}/denoiser", "--output", "{made}/denoiser/merged"],
        ["export", "{made}/distilled", "{made}/distilled/exported"],
        ["export", "{link}/distilled", "{made}/distilled/seed-0/exported"],
        ["download", "{made}/distilled", "--output", "{made}/distilled/downloaded"],
        ["compare", "{made}/distilled", "{other}/distilled", "--output", "{other}/distilled/compare.html"],
        ["reproduce", "{made}/distilled", "--folder", "{made}/distilled/again"],
        ["reproduce", "{made}/distilled", "--folder", "{other}/data/again", "--data", "{other}/data"],
    ],
    ids=" ".join,
)
def test_no_command_writes_into_what_it_reads(experiment: Experiment, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "link").symlink_to(experiment.root)
    shutil.copytree(experiment.root, tmp_path / "other")
    (tmp_path / "other" / "data").mkdir()
    before = contents(tmp_path)
    places = {"made": experiment.root, "link": tmp_path / "link", "other": tmp_path / "other"}
    done = CliRunner().invoke(cli.main, [part.format(**places) for part in command])
    assert done.exit_code == 2, done.output
    assert "which would be ruined" in done.output
    assert contents(tmp_path) == before


def test_compile_overwrites_no_settings(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    shutil.copyfile(pipelines.SETTINGS, settings)
    before = contents(tmp_path)
    done = CliRunner().invoke(pipelines.main, ["compile", "--settings", str(settings), "--allow-tag", "--output", str(settings)])
    assert done.exit_code == 2, done.output
    assert contents(tmp_path) == before


def test_nor_does_a_run_here_lie_in_its_data(tmp_path: Path) -> None:
    params = Params.model_validate({"prepare": {"source": "folder", "location": str(tmp_path)}, "publish": {"name": "pets"}})
    with pytest.raises(DiffstillError, match=r"lies inside the input `prepare\.location`"):
        run_local(params, load_settings(pipelines.SETTINGS), tmp_path / "out", executor=processes(), shards=ShardsConfig())
    assert not contents(tmp_path)


def test_an_output_may_lie_beside_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`location: .` in the folder that has train/."""
    draws = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(draws.integers(0, 255, (8, 8), dtype=np.uint8)).save(tmp_path / "train" / label / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    config = preset("tiny").prepare.model_copy(update={"source": "folder", "location": ".", "classes": None})
    assert run_stage("prepare", config, {"images": Path("artifacts/images")})["train_images"] == 8
