import csv
import json
import math
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from chains import contents
from diffstill.artifacts import new_artifact, open_artifact
from diffstill.config import FinetuneConfig
from diffstill.errors import DiffstillError
from diffstill.metrics import label_robust_score
from diffstill.scores import SCORES, gain, read_lines, read_runs
from experiments import CLASSES, RANDOM, STUDENT, all_lines, make_experiment, write_denoiser, write_sampled

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


@pytest.fixture
def made(tmp_path):
    return make_experiment(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One whole report that the reading tests share: its folder, and what the stage returned."""
    made = make_experiment(tmp_path_factory.mktemp("experiment"))
    made.judge(all_lines(made.images.digest))
    return made.report()


def test_metrics_json_holds_hand_computed_numbers(written):
    folder, flat = written
    cell = json.loads((folder / "metrics.json").read_text())[STUDENT]["distilled"]["ipc1"]
    values = [0.61, 0.63, 0.60, 0.64, 0.66, 0.62]
    mean = sum(values) / 6
    assert cell["test_mean"] == pytest.approx(0.626667, abs=1e-6)
    assert cell["test_std"] == pytest.approx(math.sqrt(sum((value - mean) ** 2 for value in values) / 5), abs=1e-6)
    assert (cell["val_mean"], cell["runs"]) == (pytest.approx(mean / 2, abs=1e-6), 6)
    assert cell["gain_over_random"] == pytest.approx(mean - 0.35, abs=1e-6)
    assert cell["label_robust_score_hard"] == pytest.approx(label_robust_score(mean, 0.35, 0.92), abs=1e-5)
    assert flat[f"{STUDENT}/distilled/ipc1/test_mean"] == cell["test_mean"]
    assert flat[f"{STUDENT}/full/all/test_mean"] == pytest.approx(0.92)


def test_stage_averages_student_seeds_before_the_interval(written):
    cell = json.loads((written[0] / "metrics.json").read_text())[STUDENT]["distilled"]["ipc1"]
    expected = gain([0.62, 0.62, 0.64], [0.32, 0.34, 0.39])
    assert (cell["gain_over_random_low"], cell["gain_over_random_high"]) == pytest.approx((expected.low / 100, expected.high / 100), abs=1e-6)


def test_all_runs_are_kept_as_they_were_scored(made):
    lines = all_lines(made.images.digest)
    made.judge(lines[:9], "scores-a")
    made.judge(lines[9:], "scores-b")
    folder, _ = made.report()
    kept = read_lines(folder / SCORES)
    assert kept == read_runs([open_artifact(path, "scores") for path in made.scores])
    assert sorted((run.model_dump() for run in kept), key=str) == sorted(lines, key=str)


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
    points, low, high = (100 * gains[f"gain_over_random{end}"] for end in ("", "_low", "_high"))
    assert f"+{points:.1f} [+{low:.1f}, +{high:.1f}]" in text
    assert f"{gains['label_robust_score_hard']:.1f}" in text


def test_best_small_set_of_a_column_is_bold_and_full_data_never(written):
    text = (written[0] / "report.html").read_text(encoding="utf-8")
    bold = [part.split("&")[0] for part in text.split('<strong class="mean">')[1:]]
    assert bold == ["62.7", "56.0"]


def test_verdict_names_a_clear_gain_and_an_unclear_one(written):
    text = Parsed((written[0] / "report.html").read_text(encoding="utf-8")).text
    assert "Distilled images beat the same number of random real images in 1 of 2 comparisons and show no difference in 1." in text
    assert "no difference shown." in text


def test_footnotes_say_which_interval_is_paired(written, tmp_path):
    told = "so the interval of distilled over untuned is that of the paired t-test"
    page = (written[0] / "report.html").read_text(encoding="utf-8")
    assert "the samples of Welch&#39;s t interval" in page
    assert told in page
    made = make_experiment(tmp_path)
    made.judge([line for line in all_lines(made.images.digest) if line["source"] != "untuned"])
    assert told not in (made.report()[0] / "report.html").read_text(encoding="utf-8")


def test_caption_names_the_protocol_and_what_was_repeated(written):
    text = Parsed((written[0] / "report.html").read_text(encoding="utf-8")).text
    assert "on 600 real test images at the last epoch" in text
    assert "Protocol short-20, 20 optimiser steps for every student." in text
    assert "Random real: 3 draws × 2 student seeds; untuned generator: 3 generation seeds × 2 student seeds; distilled: 3" in text
    assert "repeats the sampling only, from one fine-tune" in text
    assert "Hard labels." in text


def test_random_real_has_as_many_draws_as_it_likes(made):
    made.judge([line for line in all_lines(made.images.digest) if line["source"] != "random"])
    made.judge([made.line("random", 1, draw, seed, 0.3 + draw / 100 + seed / 50) for draw in range(10) for seed in (0, 1)], "scores-random")
    folder, _ = made.report()
    cell = json.loads((folder / "metrics.json").read_text())[STUDENT]["distilled"]["ipc1"]
    expected = gain([0.62, 0.62, 0.64], [0.31 + draw / 100 for draw in range(10)])
    assert (cell["gain_over_random_low"], cell["gain_over_random_high"]) == pytest.approx((expected.low / 100, expected.high / 100), abs=1e-6)
    assert "Random real: 10 draws × 2 student seeds; untuned generator: 3 generation seeds × 2" in (folder / "report.html").read_text()


def test_the_verdict_begins_with_what_makes_it_void_and_names_the_one_fine_tune(made):
    lines = [made.line(source, 1, seed, 0, 0.5 + seed / 100 + more) for source, more in (("random", 0), ("untuned", 0.02)) for seed in (0, 1, 2)]
    lines += [made.line("distilled", 1, seed, 0, 0.53 + seed / 90) for seed in (0, 1, 2)] + [made.line("full", None, None, 0, 0.52)]
    made.judge(lines)
    text = (made.report()[0] / "report.html").read_text(encoding="utf-8")
    assert '<section class="verdict unknown" aria-label="Verdict">\n<p>convnet-2 lies within noise of chance (50.0 %) even on full data' in text
    assert "they are of one fine-tune, and a claim about the method needs several." in text


def test_caption_tells_when_each_generation_was_fine_tuned(tmp_path):
    made = make_experiment(tmp_path, tunes=(0, 1, 2))
    made.judge(all_lines(made.images.digest))
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
    lines = all_lines(made.images.digest)
    made.judge(lines[:9], "scores-a")
    made.judge(lines[9:], "scores-b")
    first, _ = made.report("report-1")
    made.scores.reverse()
    second, _ = made.report("report-2")
    assert contents(first) == contents(second)


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


def test_budgets_in_epochs_are_listed_by_size(made):
    lines = [made.line("random", size, 0, 0, 0.5, steps=steps, protocol="minimax-224") for size, steps in ((1, 3000), (2, 2000))]
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


def test_scores_of_other_images_are_refused(made):
    made.judge([made.line("random", 1, 0, 0, 0.5, images_digest="aa")])
    with pytest.raises(DiffstillError, match="scores of images digest aa"):
        made.report()


def test_swapped_folders_are_refused(made):
    made.judge(all_lines(made.images.digest))
    made.paths["distilled"], made.paths["untuned"] = made.paths["untuned"], made.paths["distilled"]
    with pytest.raises(DiffstillError, match="sampled from source `untuned` where `distilled` is expected"):
        made.report()


def test_scores_of_another_distilled_set_are_refused(made):
    made.judge(all_lines(made.images.digest))
    shutil.rmtree(made.paths["distilled"])
    write_sampled(made.paths["distilled"], "distilled", made.opened("generator", "denoiser"), made.images, seeds=(5, 6, 7))
    with pytest.raises(DiffstillError, match="made from another `distilled`"):
        made.report()


def test_another_denoiser_is_refused(made):
    made.judge(all_lines(made.images.digest))
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
    write_sampled(made.paths["distilled"], "distilled", made.opened("generator", "denoiser"), made.images)
    made.judge([made.line("random", 1, 0, 0, 0.5)])
    with pytest.raises(DiffstillError, match=r"metrics\.csv: has no column loss_gen"):
        made.report()


def test_an_earlier_report_stays_when_a_new_one_is_refused(made):
    made.judge(all_lines(made.images.digest))
    folder, _ = made.report()
    before = (folder / "manifest.json").read_bytes()
    made.judge([made.line("random", 1, 0, 0, 0.5)], "scores-again")
    with pytest.raises(DiffstillError):
        made.report()
    assert (folder / "manifest.json").read_bytes() == before
