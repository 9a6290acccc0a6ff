"""The chain: equal bytes for equal work, nothing computed twice, nothing stale."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from chains import Chain, contents
from diffstill.artifacts import ANCESTORS, MANIFEST, open_artifact
from diffstill.config import Params, preset, render_params
from diffstill.errors import DiffstillError
from diffstill.plan import STAGES, chain, score_names
from diffstill.record import ignore
from diffstill.run import Listener, _log_costs, _why, run_chain, run_stage

DISTILLED = {"sample", "sample-untuned", "evaluate@distilled-convnet-2", "evaluate@untuned-convnet-2", "report"}
"""What depends on how images are sampled: not the real baselines."""


@pytest.fixture
def copy(tiny_chain, tmp_path, monkeypatch, caplog) -> Chain:
    """A finished chain of one's own, in the current folder."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="diffstill")
    shutil.copytree(tiny_chain.artifacts, tmp_path / "artifacts")
    return Chain(tiny_chain.params, tmp_path / "artifacts")


def rerun(copy, caplog, params=None) -> set[str]:
    """Run the chain again; the steps that were not up to date."""
    caplog.clear()
    run_chain(params or copy.params, copy.artifacts)
    started = {match[1] for message in caplog.messages if (match := re.fullmatch(r"(\S+) \.\.\.", message))}
    current = {match[1] for message in caplog.messages if (match := re.fullmatch(r"(\S+) is up to date", message))}
    assert started | current == {step.name for step in chain(params or copy.params)}
    assert not started & current
    return started


def changed(params: Params, section: str, **knobs) -> Params:
    return params.model_copy(update={section: params.section(section).model_copy(update=knobs)})


# --- the whole chain ----------------------------------------------------------------------------------------------


def test_every_step_writes_a_verified_artifact(tiny_chain):
    for step in chain(tiny_chain.params):
        folder = step.output(tiny_chain.artifacts)
        made = open_artifact(folder, STAGES[step.stage].output)
        assert made.manifest.config == json.loads(tiny_chain.params.section(step.stage).canonical())
    assert not [path for path in tiny_chain.artifacts.rglob("*") if path.name.startswith(".")], "litter"


def test_manifests_name_no_time_place_or_machine(tiny_chain):
    for path in tiny_chain.artifacts.rglob(MANIFEST):
        text = path.read_text()
        assert str(tiny_chain.artifacts.parent) not in text
        assert os.uname().nodename not in text
        assert not re.search(r"seconds|20\d\d-\d\d|T\d\d:\d\d", text), path


def test_costs_go_to_a_side_log(tiny_chain):
    lines = [json.loads(line) for line in (tiny_chain.artifacts.parent / "work" / "costs.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step.name for step in chain(tiny_chain.params)]
    assert all(line["seconds"] > 0 and line["peak_memory_mib"] > 50 for line in lines)


def test_finished_work_leaves_no_checkpoints(tiny_chain):
    assert [name for name in contents(tiny_chain.artifacts.parent / "work") if not name.endswith(".lock")] == ["costs.jsonl"]


def test_another_process_in_another_folder_makes_the_same_bytes(tiny_chain, tmp_path):
    """By the command line, with another hash seed; and it ends with the table and the paths."""
    (tmp_path / "params.yaml").write_text(render_params(tiny_chain.params))
    command = [Path(sys.executable).with_name("diffstill"), "-q", "run", "--artifacts", "made"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(tmp_path / "made") == contents(tiny_chain.artifacts)
    for told in (
        "random real",
        "untuned generator",
        "distilled",
        "full data",
        "IPC 1",
        "IPC 2",
        "short-20",
        f"{tmp_path}/made/report/report.html",
        f"{tmp_path}/made/distilled/seed-0",
    ):
        assert told in done.stdout


# --- nothing twice, nothing stale ---------------------------------------------------------------------------------


def test_a_finished_chain_recomputes_nothing(copy, caplog):
    times = {path: path.stat().st_mtime_ns for path in copy.artifacts.rglob("*")}
    assert rerun(copy, caplog) == set()
    assert {path: path.stat().st_mtime_ns for path in copy.artifacts.rglob("*")} == times


def test_another_guidance_samples_and_judges_anew(copy, caplog):
    before = {step.name: contents(step.output(copy.artifacts)) for step in chain(copy.params)}
    params = changed(copy.params, "sample", guidance=2.5)
    assert rerun(copy, caplog, params) == DISTILLED
    after = {step.name: contents(step.output(copy.artifacts)) for step in chain(copy.params)}
    assert {name for name in before if before[name] != after[name]} == DISTILLED
    assert rerun(copy, caplog, params) == set()


@pytest.mark.parametrize("lost", ["images", "denoiser", "scores/real-convnet-2", "report"])
def test_a_lost_artifact_alone_is_made_again(lost, copy, caplog):
    """What follows from it is up to date, since it comes back with the same bytes."""
    before = contents(copy.artifacts)
    shutil.rmtree(copy.artifacts / lost)
    again = rerun(copy, caplog)
    assert [step.output(copy.artifacts) for step in chain(copy.params) if step.name in again] == [copy.artifacts / lost]
    assert contents(copy.artifacts) == before


def test_another_shown_number_makes_the_report_alone(copy, caplog):
    assert rerun(copy, caplog, changed(copy.params, "report", shown_per_class=1)) == {"report"}


def test_what_was_made_from_other_inputs_is_made_again(copy, caplog):
    """A denoiser from another chain, whole and of the same settings: it comes back, and what follows stays as it is."""
    manifest = copy.artifacts / "denoiser" / MANIFEST
    before = contents(copy.artifacts)
    written = json.loads(manifest.read_text())
    written["inputs"]["latents"] = "0" * 64
    manifest.write_text(json.dumps(written))
    assert rerun(copy, caplog) == {"finetune"}
    assert contents(copy.artifacts) == before


def test_what_keeps_no_lineage_is_made_again(copy, caplog):
    """An artifact of an earlier diffstill, whole but without the manifests of its inputs."""
    before, latents = contents(copy.artifacts), copy.artifacts / "latents"
    shutil.rmtree(latents / ANCESTORS)
    written = json.loads((latents / MANIFEST).read_text())
    written["files"] = {name: digest for name, digest in written["files"].items() if not name.startswith(ANCESTORS)}
    (latents / MANIFEST).write_text(json.dumps(written))
    assert rerun(copy, caplog) == {"encode"}
    assert contents(copy.artifacts) == before


def test_damage_in_a_finished_chain_is_refused_not_built_upon(copy):
    path = copy.artifacts / "latents" / "train-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = contents(copy.artifacts)
    with pytest.raises(DiffstillError, match=r"train-00000.safetensors: content differs from the digest"):
        run_chain(copy.params, copy.artifacts)
    assert contents(copy.artifacts) == before


# --- one stage ----------------------------------------------------------------------------------------------------


def test_missing_inputs_are_refused_before_the_stage_is_loaded(tiny_chain, tmp_path):
    here = tiny_chain.artifacts
    cases = [
        ("pretrain", {"images": tmp_path / "absent", "generator": tmp_path / "out"}),
        ("sample", {"generator": here / "generator", "denoiser": tmp_path / "absent", "distilled": tmp_path / "out"}),
        ("report", {name: here / name for name in STAGES["report"].inputs} | {"scores": [tmp_path / "absent"], "report": tmp_path / "out"}),
    ]
    for name, paths in cases:
        with pytest.raises(DiffstillError, match=r"absent: no artifact here; run the stage that makes it first"):
            run_stage(name, tiny_chain.params.section(name), paths)
        assert not (tmp_path / "out").exists()


def test_an_output_of_another_kind_is_refused_before_the_stage_starts(tiny_chain, caplog):
    caplog.set_level(logging.INFO, logger="diffstill")
    before = contents(tiny_chain.artifacts)
    with pytest.raises(DiffstillError, match="holds a `images` artifact; refusing to replace it by `distilled`"):
        run_stage("sample", tiny_chain.params.sample, {"generator": tiny_chain.artifacts / "generator", "distilled": tiny_chain.artifacts / "images"})
    assert caplog.messages == []
    assert contents(tiny_chain.artifacts) == before


def test_a_stage_returns_its_metrics_and_says_how_long_it_took(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="diffstill")
    metrics = run_stage("prepare", preset("tiny").prepare, {"images": tmp_path / "images"}, step="prepare@mine")
    assert metrics == {"train_images": 387.0, "val_images": 43.0, "test_images": 107.0, "rejected": 0.0, "left_out": 0.0}
    assert caplog.messages[0] == "prepare@mine ..."
    assert re.match(r"prepare@mine done in .* s, peak memory .* MiB: train_images 387, ", caplog.messages[-1])


@pytest.mark.parametrize(("seconds", "lines"), [(0.9, []), (4.0, ["count: 6 img in 4.0 s (2 img/s)"])])
def test_progress_away_from_a_terminal_is_one_line_for_long_work(seconds, lines, caplog, monkeypatch):
    clock = iter([10.0, 10.0 + seconds])
    monkeypatch.setattr("diffstill.run.time.monotonic", lambda: next(clock))
    caplog.set_level(logging.INFO, logger="diffstill")
    with Listener(None).progress("count", 10, "img", done=4) as bar:
        bar.update(6)
    assert caplog.messages == lines


def test_scores_by_source_and_student():
    assert score_names(["a", "b"]) == [
        "scores/distilled-a",
        "scores/distilled-b",
        "scores/untuned-a",
        "scores/untuned-b",
        "scores/real-a",
        "scores/real-b",
    ]


def test_nobody_needs_to_listen(tmp_path):
    ignore.metrics({"loss": 1.0}, 3)
    ignore.file(tmp_path)
    for record in (ignore, Listener(None)):
        record.image("preview", lambda: pytest.fail("nobody looks, so nobody draws"), 3)
    with ignore.progress("work", 3, "img") as bar:
        assert bar.update(2) is None


def test_a_folder_that_changed_outside_is_noticed(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    for name, shade in (("dark", 40), ("light", 200)):
        for number in range(4):
            path = tmp_path / "data" / "train" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), shade + number).save(path)
    params = changed(preset("tiny"), "prepare", source="folder", location="data", classes=None)
    step = chain(params)[0]
    run_stage("prepare", params.prepare, {"images": tmp_path / "images"})
    before = contents(tmp_path / "images")
    assert _why(step, params, tmp_path) == "`prepare.location`: other files than those it was made from"
    run_stage("prepare", params.prepare, {"images": tmp_path / "images"})
    assert contents(tmp_path / "images") == before
    Image.new("L", (8, 8), 90).save(tmp_path / "data" / "train" / "dark" / "9.png")
    run_stage("prepare", params.prepare, {"images": tmp_path / "images"})
    assert contents(tmp_path / "images") != before


def test_a_chain_reads_a_folder_again_only_where_its_files_have_changed(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="diffstill")
    for label, shade in (("dark", 20), ("light", 220)):
        for number in range(8):
            path = tmp_path / "data" / "train" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), shade + number).save(path)
    params = changed(preset("tiny"), "prepare", source="folder", location="data", classes=None)
    only = [step for step in chain(params) if step.stage == "prepare"]
    monkeypatch.setattr("diffstill.run.chain", lambda _: only)

    def again(params=params) -> bool:
        caplog.clear()
        run_chain(params, tmp_path / "artifacts")
        return "prepare ..." in caplog.messages

    assert [again(), again()] == [True, False]
    os.utime(tmp_path / "data" / "train" / "dark" / "3.png", (1, 1))
    assert [again(), again()] == [True, False]
    Image.new("L", (8, 8), 90).save(tmp_path / "data" / "train" / "dark" / "9.png")
    assert [again(), again()] == [True, False]
    assert [again(changed(params, "prepare", seed=4)), again(changed(params, "prepare", seed=4))] == [True, False]
    (tmp_path / "data").rename(tmp_path / "moved")
    assert again(changed(params, "prepare", seed=4, location="moved"))
    shutil.rmtree(tmp_path / "artifacts")
    run_stage("prepare", changed(params, "prepare", seed=5, location="moved").prepare, {"images": tmp_path / "artifacts" / "images"})
    assert again(changed(params, "prepare", seed=4, location="moved"))  # others have written there meanwhile


def test_a_chain_of_some_classes_is_refused_before_it_starts(tmp_path):
    with pytest.raises(DiffstillError, match=r"`sample.classes` is for `diffstill sample` alone"):
        run_chain(changed(preset("tiny"), "sample", classes=["1"]), tmp_path / "artifacts")
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("name", "metrics", "told"),
    [
        ("publish", {"version": 3.0, "bytes": 293518.0, "val_gain/ipc1": 2.776e-17, "val_gain/ipc10": -0.0123}, "version 3, bytes 293518, val_gain/ipc1 +0.0 points, val_gain/ipc10 -1.2 points"),
        ("evaluate-real@convnet-2", {"full_convnet-2": 0.9188}, "full_convnet-2 91.9 %"),
        ("pretrain", {"vae_loss": 0.00123456}, "vae_loss 0.001235"),
    ],
)  # fmt: skip
def test_numbers_are_told_as_people_read_them(tmp_path, monkeypatch, caplog, name, metrics, told):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, logger="diffstill")
    _log_costs(name, metrics, {"seconds": 1.0, "peak_memory_mib": 2.0})
    assert caplog.messages == [f"{name} done in 1.0 s, peak memory 2 MiB: {told}"]
