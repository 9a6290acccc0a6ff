import csv
import hashlib
import itertools
import json
import math
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from diffstill.artifacts import Artifact, new_artifact, open_artifact, read_manifest, write_shards
from diffstill.config import EvaluateConfig, FinetuneConfig, PrepareConfig, ReportConfig, SampleConfig
from diffstill.errors import DiffstillError
from diffstill.metrics import label_robust_score
from diffstill.stages.report import gain, report

STUDENT = "convnet-2"
CLASSES = ("cat & <dog>", '"q$u$ote"')
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Parsed(HTMLParser):
    """Tags with their attributes, the text, and whether every element closes in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts, self.ids = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "elements left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@dataclass
class Experiment:
    """Paths of the artifacts of one tiny experiment; `scores` can be written more than once."""

    root: Path
    paths: dict = field(default_factory=dict)
    scores: list = field(default_factory=list)

    @property
    def images(self) -> Artifact:
        return read_manifest(self.paths["images"], "images")

    def judge(self, lines, name="scores", inputs=("images", "distilled")):
        folder = self.root / name
        opened = {key: read_manifest(self.paths[key], "images" if key == "images" else "distilled") for key in inputs}
        with new_artifact(folder, "scores", EvaluateConfig(), opened) as draft:
            (draft.folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.scores.append(folder)
        return folder

    def line(self, source, size, generation_seed, student_seed, accuracy, **changes):
        line = {
            "source": source,
            "student": STUDENT,
            "images_per_class": size,
            "generation_seed": generation_seed,
            "student_seed": student_seed,
            "protocol": "short-20",
            "steps": 20,
            "train_images": 2 * (size or 6),
            "accuracy_test": accuracy,
            "accuracy_val": accuracy / 2,
            "best_test": min(1.0, accuracy + 0.05),
            "best_step": 15,
            "labels": "hard",
            "images_digest": self.images.digest,
        }
        return line | changes

    def report(self, name="report", config=None):
        out = self.root / name
        flat = report(config or ReportConfig(shown_per_class=2), **self.paths, scores=self.scores, report=out)
        return out, flat


def write_images(folder, classes=CLASSES, side=8, channels=1, per_class=6):
    draws = np.random.default_rng(0)
    with new_artifact(folder, "images", PrepareConfig(), {}) as draft:
        for split, count in (("train", per_class), ("val", 2), ("test", 3)):
            labels = np.repeat(np.arange(len(classes)), count)
            pixels = draws.integers(0, 256, (len(labels), channels, side, side), dtype=np.uint8)
            write_shards(draft.folder, split, {"pixels": pixels, "labels": labels.astype(np.int64)}, 4096)
        counts = {split: dict.fromkeys(classes, count) for split, count in (("train", per_class), ("val", 2), ("test", 3))}
        draft.facts |= {"source": "digits", "classes": list(classes), "side": side, "channels": channels, "flip": False, "counts": counts}


def write_denoiser(folder, policy="redundancy", seeds=(0,)):
    columns = "step,loss,loss_real,loss_gen,memory_real,memory_gen"
    with new_artifact(folder, "denoiser", FinetuneConfig(policy=policy, seeds=tuple(seeds)), {}) as draft:
        for seed in seeds:
            (draft.folder / f"seed-{seed}").mkdir()
            rows = [f"{step},{1 / step},{0.9 - step / 100},{0.2 + step / 100},{min(64, step)},{min(64, step)}" for step in range(1, 31)]
            (draft.folder / f"seed-{seed}" / "metrics.csv").write_text("\n".join([columns, *rows]) + "\n")
        draft.facts |= {"seeds": list(seeds), "policy": policy, "capacity_real": 64, "capacity_gen": 64, "steps": 30, "lambda_real": 0.002}
        draft.facts |= {"lambda_gen": 0.008, "update": "step", "trainable": "difffit", "parameters": 123456, "trained_parameters": 1234}


def write_sampled(folder, source, inputs, images, seeds=(0, 1, 2), per_class=2):
    facts = images.facts
    draws = np.random.default_rng(len(source))
    with new_artifact(folder, "distilled", SampleConfig(seeds=tuple(seeds), images_per_class=per_class), inputs) as draft:
        for seed, name, number in itertools.product(seeds, facts["classes"], range(per_class)):
            path = draft.folder / f"seed-{seed}" / name / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (facts["side"], facts["side"]) if facts["channels"] == 1 else (facts["side"], facts["side"], 3)
            Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8)).save(path)
        draft.facts |= {"source": source, "seeds": list(seeds), "images_per_class": per_class, "classes": facts["classes"], "side": facts["side"]}
        draft.facts |= {"channels": facts["channels"], "guidance": 3.0, "sampler": "ddim", "steps": 25, "images_digest": images.digest}


def make_experiment(root, classes=CLASSES, policy="redundancy", tunes=(0,), side=8, channels=1):
    made = Experiment(root, {name: root / name for name in ("images", "denoiser", "distilled", "untuned")})
    write_images(made.paths["images"], classes, side, channels)
    write_denoiser(made.paths["denoiser"], policy, tunes)
    write_sampled(made.paths["untuned"], "untuned", {}, made.images)
    write_sampled(made.paths["distilled"], "distilled", {"denoiser": read_manifest(made.paths["denoiser"], "denoiser")}, made.images)
    return made


RANDOM = {1: [[0.30, 0.34], [0.36, 0.32], [0.40, 0.38]], 2: [[0.50, 0.54], [0.56, 0.52], [0.60, 0.58]]}
UNTUNED = {1: [[0.42, 0.40], [0.36, 0.38], [0.39, 0.41]], 2: [[0.55, 0.57], [0.50, 0.52], [0.56, 0.58]]}
DISTILLED = {1: [[0.61, 0.63], [0.60, 0.64], [0.66, 0.62]], 2: [[0.57, 0.53], [0.56, 0.58], [0.52, 0.60]]}
FULL = [0.90, 0.94]


def all_lines(made):
    lines = [
        made.line(source, size, generation, student, accuracy)
        for source, sizes in (("random", RANDOM), ("untuned", UNTUNED), ("distilled", DISTILLED))
        for size, seeds in sizes.items()
        for generation, students in enumerate(seeds)
        for student, accuracy in enumerate(students)
    ]
    return lines + [made.line("full", None, None, student, accuracy) for student, accuracy in enumerate(FULL)]


@pytest.fixture
def made(tmp_path):
    return make_experiment(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One whole report that the reading tests share: its folder, and what the stage returned."""
    made = make_experiment(tmp_path_factory.mktemp("experiment"))
    made.judge(all_lines(made))
    return made.report()


def test_metrics_json_holds_hand_computed_numbers(written):
    folder, flat = written
    cell = json.loads((folder / "metrics.json").read_text())[STUDENT]["distilled"]["ipc1"]
    values = [0.61, 0.63, 0.60, 0.64, 0.66, 0.62]
    mean = sum(values) / 6
    assert cell["test_mean"] == pytest.approx(0.626667, abs=1e-6)
    assert cell["test_std"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 5), abs=1e-6)
    assert (cell["val_mean"], cell["runs"]) == (pytest.approx(mean / 2, abs=1e-6), 6)
    assert cell["gain_over_random"] == pytest.approx(100 * (mean - 0.35), abs=1e-4)
    assert cell["label_robust_score_hard"] == pytest.approx(label_robust_score(mean, 0.35, 0.92), abs=1e-5)
    assert flat[f"{STUDENT}/distilled/ipc1/test_mean"] == cell["test_mean"]
    assert flat[f"{STUDENT}/full/all/test_mean"] == pytest.approx(0.92)


@pytest.mark.parametrize(("values", "base"), [([0.62, 0.62, 0.64], [0.32, 0.34, 0.39]), ([0.5, 0.7], [0.6, 0.61, 0.59, 0.64])])
def test_interval_is_that_of_welch(values, base):
    expected = stats.ttest_ind(values, base, equal_var=False).confidence_interval(0.95)
    found = gain(values, base)
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert found.points == pytest.approx(100 * (np.mean(values) - np.mean(base)))


def test_interval_where_one_side_does_not_vary_is_that_of_the_other():
    found = gain([0.5, 0.5], [0.4, 0.42, 0.47])
    half = 100 * stats.t.ppf(0.975, 2) * np.std([0.4, 0.42, 0.47], ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((7.0 - half, 7.0 + half))


def test_stage_averages_student_seeds_before_the_interval(written):
    cell = json.loads((written[0] / "metrics.json").read_text())[STUDENT]["distilled"]["ipc1"]
    expected = gain([0.62, 0.62, 0.64], [0.32, 0.34, 0.39])
    assert (cell["gain_over_random_low"], cell["gain_over_random_high"]) == pytest.approx((expected.low, expected.high), abs=1e-5)


@pytest.mark.parametrize(("values", "base"), [([0.5], [0.4, 0.3]), ([0.5, 0.6], [0.4]), ([0.5, 0.5], [0.4, 0.4])])
def test_no_interval_without_seeds_or_spread(values, base):
    found = gain(values, base)
    assert (found.low, found.high, found.verdict) == (None, None, "unknown")
    assert found.points == pytest.approx(100 * (np.mean(values) - np.mean(base)))


def test_accuracy_csv_is_a_long_table(written):
    with (written[0] / "accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == ["random", "random", "untuned", "untuned", "distilled", "distilled", "full"]
    assert rows[0] == {
        "source": "random",
        "student": STUDENT,
        "images_per_class": "1",
        "mean": "0.35",
        "sd": str(round(float(np.std(RANDOM[1], ddof=1)), 6)),
        "runs": "6",
        "protocol": "short-20",
    }
    assert rows[-1]["images_per_class"] == ""


def test_page_is_whole_and_self_contained(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    parsed = Parsed(text)
    addresses = [value for _, attributes in parsed.tags for name, value in attributes.items() if name in ("src", "href", "srcset", "data")]
    assert addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in parsed.tags}
    assert "@import" not in text
    assert "url(http" not in text
    assert len(parsed.ids) == len(set(parsed.ids)), "ids of two figures clash"


def test_pictures_and_tables_are_accessible(written):
    parsed = Parsed((written[0] / "report.html").read_text(encoding="utf-8"))
    assert all(attributes.get("alt") for tag, attributes in parsed.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in parsed.tags if tag == "svg")
    assert all(attributes.get("scope") in {"col", "colgroup", "row"} for tag, attributes in parsed.tags if tag == "th")
    assert ("html", {"lang": "en"}) in parsed.tags


def test_class_names_are_shown_literally(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    assert "<dog>" not in text
    parsed = Parsed(text)
    assert all(name in parsed.text for name in CLASSES)
    assert any(f"of class {CLASSES[0]}: Distilled" in attributes.get("alt", "") for tag, attributes in parsed.tags if tag == "img")


def test_page_prints_the_numbers_of_metrics_json(written):
    text = Parsed((written[0] / "report.html").read_text(encoding="utf-8")).text.replace("\xa0", " ")
    tree = json.loads((written[0] / "metrics.json").read_text())
    for sizes in tree[STUDENT].values():
        for cell in sizes.values():
            assert f"{100 * cell['test_mean']:.1f} ± {100 * cell['test_std']:.1f} {cell['runs']} runs" in text
    gains = tree[STUDENT]["distilled"]["ipc1"]
    assert f"+{gains['gain_over_random']:.1f} [+{gains['gain_over_random_low']:.1f}, +{gains['gain_over_random_high']:.1f}]" in text
    assert f"{gains['label_robust_score_hard']:.1f}" in text


def test_best_small_set_of_a_column_is_bold_and_full_data_never(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    bold = [part.split("&")[0] for part in text.split('<strong class="mean">')[1:]]
    assert bold == ["62.7", "56.0"]


def test_verdict_names_a_clear_gain_and_an_unclear_one(written):
    text = Parsed((written[0] / "report.html").read_text(encoding="utf-8")).text
    assert "Distilled images beat the same number of random real images in 1 of 2 comparisons and show no difference in 1." in text
    assert "no difference shown." in text


def test_caption_names_the_protocol_and_what_was_repeated(written):
    text = Parsed((written[0] / "report.html").read_text(encoding="utf-8")).text
    assert "on 6 real test images at the last epoch" in text
    assert "Protocol short-20, 20 optimiser steps for every student." in text
    assert "3 generation seeds × 2 student seeds" in text
    assert "repeats the sampling only, from one fine-tune" in text
    assert "Hard labels." in text


def test_caption_tells_when_each_generation_was_fine_tuned(tmp_path):
    made = make_experiment(tmp_path, tunes=(0, 1, 2))
    made.judge(all_lines(made))
    folder, _ = made.report()
    assert "Each distilled generation seed repeats fine-tuning and sampling." in (folder / "report.html").read_text(encoding="utf-8")


def test_figures_are_pictures_and_the_artifact_is_whole(written):
    folder, _ = written
    for name in ("accuracy_vs_ipc.png", "memory_terms.png", "loss.png", "grid.png"):
        with Image.open(folder / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 2, f"{name} is blank"
            assert image.info.keys() <= {"dpi"}
    assert set(open_artifact(folder, "report").manifest.inputs) == {"images", "denoiser", "distilled", "untuned", "scores-000"}


def test_equal_inputs_give_equal_bytes_in_any_order_of_scores(made):
    lines = all_lines(made)
    made.judge(lines[:9], "scores-a")
    made.judge(lines[9:], "scores-b")
    first, _ = made.report("report-1")
    made.scores.reverse()
    second, _ = made.report("report-2")
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in first.iterdir()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in second.iterdir()
    }


def test_without_ceiling_and_baselines_scores_are_left_out(made):
    made.judge([made.line("distilled", 1, 0, 0, 0.5)])
    folder, _ = made.report()
    cell = json.loads((folder / "metrics.json").read_text())[STUDENT]["distilled"]["ipc1"]
    assert cell == {"test_mean": 0.5, "val_mean": 0.25, "runs": 1}
    assert "so there is no verdict" in (folder / "report.html").read_text(encoding="utf-8")


def test_one_generation_seed_supports_no_claim(made):
    made.judge([made.line(source, 1, 0, seed, 0.4 + seed / 10) for source in ("random", "distilled") for seed in (0, 1)])
    folder, _ = made.report()
    text = Parsed((folder / "report.html").read_text(encoding="utf-8")).text
    assert "too few generation seeds for an interval, so no claim" in text
    assert "supports no claim" in text


def test_full_data_alone_and_without_memories(tmp_path):
    made = make_experiment(tmp_path, policy="none")
    made.judge([made.line("full", None, None, 0, 0.9)])
    folder, flat = made.report()
    assert flat[f"{STUDENT}/full/all/test_mean"] == 0.9
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Without memories" in text
    assert "Memory fill</text>" not in text


def test_literature_budgets_are_listed_by_size(made):
    lines = [made.line("random", size, 0, 0, 0.5, steps=steps, protocol="literature") for size, steps in ((1, 3000), (2, 2000))]
    made.judge(lines)
    folder, _ = made.report()
    assert "optimiser steps by images per class 1: 3\u202f000; 2: 2\u202f000" in (folder / "report.html").read_text(encoding="utf-8")


def test_grid_holds_the_pixels_of_the_artifacts(tmp_path):
    made = make_experiment(tmp_path, side=16, channels=3)
    made.judge([made.line("random", 1, 0, 0, 0.5)])
    made.report()
    with Image.open(tmp_path / "report" / "grid.png") as image:
        grid = np.asarray(image.convert("RGB"))
    with Image.open(tmp_path / "distilled" / "seed-0" / CLASSES[0] / "00000.png") as image:
        expected = np.asarray(image.resize((48, 48), Image.Resampling.NEAREST))
    windows = np.lib.stride_tricks.sliding_window_view(grid, (48, 48, 3))[:, :, 0]
    corners = np.argwhere((windows[:, :, 0, 0] == expected[0, 0]).all(-1))
    assert any((windows[y, x] == expected).all() for y, x in corners)


def test_no_scores_are_refused(made):
    with pytest.raises(DiffstillError, match="no scores were given"):
        made.report()


def test_empty_scores_are_refused(made):
    made.judge([])
    with pytest.raises(DiffstillError, match="no student run"):
        made.report()


def test_two_protocols_are_refused(made):
    made.judge([made.line("random", 1, 0, 0, 0.5), made.line("distilled", 1, 0, 0, 0.5, protocol="short-200")])
    with pytest.raises(DiffstillError, match=r"more than one protocol: short-20, short-200"):
        made.report()


def test_two_images_digests_are_refused(made):
    made.judge([made.line("random", 1, 0, 0, 0.5, images_digest="aa"), made.line("distilled", 1, 0, 0, 0.5, images_digest="bb")])
    with pytest.raises(DiffstillError, match="more than one images digest: aa, bb"):
        made.report()


def test_scores_of_other_images_are_refused(made):
    made.judge([made.line("random", 1, 0, 0, 0.5, images_digest="aa")])
    with pytest.raises(DiffstillError, match="scores of images digest aa"):
        made.report()


def test_a_repeated_run_is_refused(made):
    made.judge([made.line("random", 1, 0, 0, 0.5)], "scores-a")
    made.judge([made.line("random", 1, 0, 0, 0.6)], "scores-b")
    with pytest.raises(DiffstillError, match=r"random, convnet-2, 1 images per class, generation seed 0, student seed 0 occurs twice"):
        made.report()


def test_a_missing_run_is_refused(made):
    made.judge([made.line("random", 1, 0, 0, 0.5), made.line("random", 1, 0, 1, 0.5), made.line("random", 1, 1, 0, 0.5)])
    with pytest.raises(DiffstillError, match="generation seed 1 lacks student seed 1"):
        made.report()


@pytest.mark.parametrize(
    ("changes", "knob"),
    [({"labels": "soft"}, "labels"), ({"accuracy_test": 93.0}, "accuracy_test"), ({"extra": 1}, "extra"), ({"source": "herding"}, "source")],
)
def test_a_line_that_breaks_the_contract_is_refused(made, changes, knob):
    made.judge([made.line("random", 1, 0, 0, 0.5), made.line("random", 1, 1, 0, 0.5) | changes])
    with pytest.raises(DiffstillError, match=rf"scores\.jsonl, line 2: {knob}"):
        made.report()


def test_full_data_with_a_size_is_refused(made):
    made.judge([made.line("full", 1, 0, 0, 0.5)])
    with pytest.raises(DiffstillError, match="null for `full`"):
        made.report()


def test_swapped_folders_are_refused(made):
    made.judge(all_lines(made))
    made.paths["distilled"], made.paths["untuned"] = made.paths["untuned"], made.paths["distilled"]
    with pytest.raises(DiffstillError, match="sampled from source `untuned` where `distilled` is expected"):
        made.report()


def test_scores_of_another_distilled_set_are_refused(made):
    made.judge(all_lines(made))
    shutil.rmtree(made.paths["distilled"])
    write_sampled(made.paths["distilled"], "distilled", {"denoiser": read_manifest(made.paths["denoiser"], "denoiser")}, made.images, seeds=(5, 6, 7))
    with pytest.raises(DiffstillError, match="made from another `distilled`"):
        made.report()


def test_another_denoiser_is_refused(made):
    made.judge(all_lines(made))
    shutil.rmtree(made.paths["denoiser"])
    write_denoiser(made.paths["denoiser"], policy="fifo")
    with pytest.raises(DiffstillError, match="sampled from another denoiser"):
        made.report()


def test_a_damaged_curve_is_refused(tmp_path):
    made = make_experiment(tmp_path)
    shutil.rmtree(made.paths["denoiser"])
    with new_artifact(made.paths["denoiser"], "denoiser", FinetuneConfig(), {}) as draft:
        (draft.folder / "seed-0").mkdir()
        (draft.folder / "seed-0" / "metrics.csv").write_text("step,loss\n1,2\n")
        draft.facts |= {"seeds": [0], "policy": "none", "capacity_real": 1, "capacity_gen": 1, "steps": 1, "trainable": "all", "parameters": 1}
        draft.facts |= {"trained_parameters": 1, "update": "step", "lambda_real": 0.0, "lambda_gen": 0.0}
    shutil.rmtree(made.paths["distilled"])
    write_sampled(made.paths["distilled"], "distilled", {"denoiser": read_manifest(made.paths["denoiser"], "denoiser")}, made.images)
    made.judge([made.line("random", 1, 0, 0, 0.5)])
    with pytest.raises(DiffstillError, match=r"metrics\.csv: has no column loss_gen"):
        made.report()


def test_an_earlier_report_stays_when_a_new_one_is_refused(made):
    made.judge(all_lines(made))
    folder, _ = made.report()
    before = (folder / "manifest.json").read_bytes()
    made.judge([made.line("random", 1, 0, 0, 0.5)], "scores-again")
    with pytest.raises(DiffstillError):
        made.report()
    assert (folder / "manifest.json").read_bytes() == before
