"""Student runs: hand-computed cells, scipy's own t-test as reference for intervals, and what never shares a table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diffstill.artifacts import Artifact, new_artifact, open_artifact
from diffstill.config import EvaluateConfig
from diffstill.errors import DiffstillError
from diffstill.metrics import label_robust_score
from diffstill.scores import SCORES, Chance, Gain, Run, cautions, flat, gain, metrics, read_lines, read_runs, table, validations
from experiments import DISTILLED, RANDOM, STUDENT, UNTUNED, all_lines, line

OTHER = "resnet-10"
ACCURACY = st.floats(0.0, 1.0).map(lambda value: round(value, 3))


def runs_of(lines) -> list[Run]:
    return [Run.model_validate_json(json.dumps(one)) for one in lines]


def a_line(*run, **changes) -> dict:
    return line("d1", *run) | changes


@pytest.fixture(scope="module")
def cells():
    return {(cell.source, cell.images_per_class): cell for cell in table(runs_of(all_lines("d1")))}


# --- cells --------------------------------------------------------------------------------------------------------


def test_a_cell_holds_hand_computed_numbers(cells):
    cell, values = cells["distilled", 1], [0.61, 0.63, 0.60, 0.64, 0.66, 0.62]
    mean = sum(values) / 6
    sd = math.sqrt(sum((value - mean) ** 2 for value in values) / 5)
    assert (cell.test.mean, cell.test.sd, cell.test.runs) == (pytest.approx(mean), pytest.approx(sd), 6)
    assert (cell.lowest, cell.highest) == (0.60, 0.66)
    assert (cell.validation.mean, cell.validation.sd) == (pytest.approx(mean / 2), pytest.approx(sd / 2))
    assert (cell.best_test.mean, cell.best_step) == (pytest.approx(mean + 0.05), 15)
    assert cell.over_random.points == pytest.approx(100 * (mean - 0.35))
    assert cell.over_untuned.points == pytest.approx(100 * (mean - np.mean(UNTUNED[1])))
    assert cell.label_robust_score == pytest.approx(label_robust_score(mean, 0.35, 0.92))


def test_gains_and_scores_stand_where_they_mean_something(cells):
    assert cells["random", 1].over_random is None
    assert cells["random", 1].label_robust_score is None
    assert cells["untuned", 1].over_random is not None
    assert cells["untuned", 1].over_untuned is None
    full = cells["full", None]
    assert (full.over_random, full.over_untuned, full.label_robust_score, full.leads) == (None, None, None, False)


def test_a_score_takes_the_ceiling_of_its_own_student():
    accuracies = {STUDENT: (0.3, 0.5, 0.9), OTHER: (0.2, 0.6, 0.7)}
    lines = [
        a_line(source, size, seed, 0, value, student=student)
        for student, values in accuracies.items()
        for (source, size, seed), value in zip((("random", 1, 0), ("distilled", 1, 0), ("full", None, None)), values, strict=True)
    ]
    found = {cell.student: cell.label_robust_score for cell in table(runs_of(lines)) if cell.source == "distilled"}
    assert found == {student: pytest.approx(label_robust_score(ours, random, full)) for student, (random, ours, full) in accuracies.items()}


def test_one_small_set_of_a_column_leads(cells):
    assert [key for key, cell in cells.items() if cell.leads] == [("distilled", 1), ("distilled", 2)]


def test_without_rivals_nothing_is_compared():
    (cell,) = table(runs_of([a_line("distilled", 1, 0, 0, 0.5, accuracy_val=None)]))
    assert (cell.over_random, cell.over_untuned, cell.label_robust_score, cell.validation) == (None, None, None, None)
    assert (cell.test.sd, cell.leads) == (None, True)


def test_students_and_sizes_are_never_mixed():
    lines = [a_line("random", 1, 0, 0, 0.2, student=OTHER), a_line("random", 2, 0, 0, 0.3), a_line("distilled", 1, 0, 0, 0.5)]
    assert all(cell.over_random is None for cell in table(runs_of(lines)))


def test_metrics_are_a_tree_without_empty_leaves(cells):
    tree = metrics(list(cells.values()))
    assert set(tree[STUDENT]) == {"random", "untuned", "distilled", "full"}
    assert set(tree[STUDENT]["full"]["all"]) == {"test_mean", "test_std", "val_mean", "val_std", "runs"}
    over = cells["distilled", 2].over_random
    leaf = tree[STUDENT]["distilled"]["ipc2"]
    found = [leaf[f"gain_over_random{end}"] for end in ("", "_low", "_high")]
    assert found == pytest.approx([over.points / 100, over.low / 100, over.high / 100], abs=1e-6)
    assert flat(tree)[f"{STUDENT}/distilled/ipc2/test_mean"] == leaf["test_mean"]
    assert len(flat(tree)) == sum(len(leaf) for sizes in tree[STUDENT].values() for leaf in sizes.values())


# --- intervals ----------------------------------------------------------------------------------------------------

SEVERAL = st.lists(ACCURACY, min_size=2, max_size=6)


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's, here
@given(SEVERAL.filter(lambda values: len(set(values)) > 1), SEVERAL)
def test_the_interval_is_that_of_welch(values, base):
    expected = stats.ttest_ind(values, base, equal_var=False).confidence_interval(0.95)
    found = gain(values, base)
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert found.points == pytest.approx(100 * (np.mean(values) - np.mean(base)))
    verdict = "gain" if 100 * expected.low > 0 else "loss" if 100 * expected.high < 0 else "unclear"
    assert found.verdict == verdict


@given(st.lists(st.tuples(ACCURACY, ACCURACY), min_size=2, max_size=6).filter(lambda pairs: len({round(a - b, 3) for a, b in pairs}) > 1))
def test_the_paired_interval_is_that_of_the_differences(pairs):
    values, base = zip(*pairs, strict=True)
    differences = 100 * np.subtract(values, base)
    half = stats.t.ppf(0.975, len(pairs) - 1) * np.std(differences, ddof=1) / math.sqrt(len(pairs))
    found = gain(values, base, paired=True)
    assert (found.low, found.high) == pytest.approx((differences.mean() - half, differences.mean() + half))
    assert found.points == pytest.approx(differences.mean())


def simulated(alike: float, paired: bool, seeds: tuple[int, int], experiments: int = 300) -> tuple[float, float]:
    """Share of `experiments` whose interval holds the true gain of 3 points, and the mean half width; sd 2.5 points, correlation `alike`."""
    draws, held, widths = np.random.default_rng(0), 0, []
    for _ in range(experiments):
        common = draws.normal(0, math.sqrt(alike), max(seeds))
        ours, theirs = (mean + 0.025 * (common[:n] + draws.normal(0, math.sqrt(1 - alike), n)) for mean, n in zip((0.53, 0.5), seeds, strict=True))
        found = gain(list(ours), list(theirs), paired=paired)
        held += found.low < 3 < found.high
        widths.append((found.high - found.low) / 2)
    return held / experiments, float(np.mean(widths))


def test_both_intervals_hold_the_true_gain_in_95_of_100_experiments_and_the_paired_one_is_narrow():
    """Three seeds. Sets that share noise have correlated means: Welch's interval is then far too wide."""
    paired, narrow = simulated(0.97, True, (3, 3))
    unrelated, _ = simulated(0.0, True, (3, 3))
    apart, _ = simulated(0.0, False, (3, 10))
    wasteful, wide = simulated(0.97, False, (3, 3), 60)
    assert [paired, unrelated, apart] == pytest.approx([0.95] * 3, abs=0.025)
    assert wasteful > 0.99
    assert narrow < wide / 3


def test_sets_that_share_noise_are_paired_and_others_are_not(cells):
    means = {source: np.mean(found[1], axis=1) for source, found in (("random", RANDOM), ("untuned", UNTUNED), ("distilled", DISTILLED))}
    ours = cells["distilled", 1]
    low, high = stats.ttest_rel(means["distilled"], means["untuned"]).confidence_interval(0.95)
    assert (ours.over_untuned.low, ours.over_untuned.high, ours.over_untuned.paired) == (pytest.approx(100 * low), pytest.approx(100 * high), True)
    for cell in (ours, cells["untuned", 1]):
        low, high = stats.ttest_ind(means[cell.source], means["random"], equal_var=False).confidence_interval(0.95)
        assert (cell.over_random.low, cell.over_random.high, cell.over_random.paired) == (pytest.approx(100 * low), pytest.approx(100 * high), False)


def test_pairs_are_those_of_one_generation_seed_in_whatever_order_runs_come():
    ours = {0: 0.5, 3: 0.6, 7: 0.8}
    lines = [a_line("untuned", 1, seed, 0, value - 0.1 - seed / 1000) for seed, value in reversed(ours.items())]
    lines += [a_line("distilled", 1, seed, 0, value) for seed, value in ours.items()]
    (found,) = (cell.over_untuned for cell in table(runs_of(lines)) if cell.source == "distilled")
    low, high = stats.ttest_1samp([0.1, 0.103, 0.107], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((100 * low, 100 * high))
    other = [one | {"generation_seed": one["generation_seed"] + (one["source"] == "untuned")} for one in lines]
    (found,) = (cell.over_untuned for cell in table(runs_of(other)) if cell.source == "distilled")
    assert not found.paired


@given(SEVERAL.filter(lambda values: len(set(values)) > 1), SEVERAL)
def test_the_other_way_round_the_interval_is_mirrored(values, base):
    there, back = gain(values, base), gain(base, values)
    assert (there.points, there.low, there.high) == pytest.approx((-back.points, -back.high, -back.low))


def test_where_one_side_does_not_vary_the_interval_is_that_of_the_other():
    found = gain([0.5, 0.5], [0.4, 0.42, 0.47])
    half = 100 * stats.t.ppf(0.975, 2) * np.std([0.4, 0.42, 0.47], ddof=1) / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((7.0 - half, 7.0 + half))


@pytest.mark.parametrize(("values", "base"), [([0.5], [0.4, 0.3]), ([0.5, 0.6], [0.4]), ([0.5, 0.5], [0.4, 0.4])])
def test_no_interval_without_seeds_or_spread(values, base):
    found = gain(values, base)
    assert (found.low, found.high, found.verdict) == (None, None, "unknown")
    assert found.points == pytest.approx(100 * (np.mean(values) - np.mean(base)))


@pytest.mark.parametrize(("values", "base"), [([0.5], [0.4]), ([0.5, 0.6, 0.4], [0.4, 0.5, 0.3])])
def test_no_paired_interval_without_seeds_or_where_all_differences_are_equal(values, base):
    found = gain(values, base, paired=True)
    assert (found.points, found.low, found.high) == (pytest.approx(10), None, None)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 0.0), (0.0, 0.0)])
def test_an_interval_that_ends_at_zero_shows_nothing(low, high):
    assert Gain(0.5, low, high).verdict == "unclear"


# --- reading ------------------------------------------------------------------------------------------------------


def write(folder: Path, lines) -> Artifact:
    with new_artifact(folder, "scores", EvaluateConfig(), {}) as draft:
        (draft.folder / SCORES).write_text("".join(json.dumps(one) + "\n" for one in lines))
    return open_artifact(folder, "scores")


def test_runs_come_in_one_order_whatever_the_order_of_scores(tmp_path):
    lines = all_lines("d1")
    first, second = write(tmp_path / "a", lines[::-2]), write(tmp_path / "b", lines[-2::-2])
    runs = read_runs([first, second])
    assert runs == read_runs([second, first]) == runs_of(lines)


def test_no_run_is_refused(tmp_path):
    with pytest.raises(DiffstillError, match="a: no student run in the scores given"):
        read_runs([write(tmp_path / "a", [])])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([a_line("random", 1, 0, 0, 0.5), a_line("random", 1, 1, 0, 0.5, protocol="short-200")], "more than one protocol: short-20, short-200"),
        ([a_line("random", 1, 0, 0, 0.5), a_line("random", 1, 1, 0, 0.5, images_digest="d2")], "more than one images digest: d1, d2"),
        (
            [a_line("random", 1, 0, 0, 0.5), a_line("random", 1, 0, 0, 0.6)],
            "the run random, convnet-2, 1 images per class, generation seed 0, student seed 0 occurs twice",
        ),
        ([a_line("full", None, None, 0, 0.5)] * 2, "the run full, convnet-2, all images, generation seed None, student seed 0 occurs twice"),
        (
            [a_line("random", 1, 0, 0, 0.5), a_line("random", 1, 0, 1, 0.5), a_line("random", 1, 1, 0, 0.5)],
            "random, convnet-2, 1 images per class: generation seed 1 lacks student seed 1",
        ),
        (
            [a_line("random", 1, 0, 0, 0.5), a_line("random", 1, 0, 1, 0.5), a_line("distilled", 1, 0, 1, 0.5)],
            "convnet-2: random by student seeds 0, 1 but distilled by student seeds 1; .* give all the same `evaluate.student_seeds`",
        ),
        (
            [a_line("distilled", 1, 0, 0, 0.5), a_line("full", None, None, 0, 0.5), a_line("full", None, None, 1, 0.5)],
            "convnet-2: distilled by student seeds 0 but full by student seeds 0, 1",
        ),
    ],
    ids=["protocols", "images", "twice", "full twice", "gap", "other student seeds", "other ceiling"],
)
def test_what_shares_no_table_is_refused(tmp_path, lines, message):
    scores = [write(tmp_path / str(number), [one]) for number, one in enumerate(lines)]
    with pytest.raises(DiffstillError, match=message):
        read_runs(scores)


@pytest.mark.parametrize(
    ("changes", "knob"),
    [
        ({"labels": "soft"}, "labels"),
        ({"accuracy_test": 93.0}, "accuracy_test"),
        ({"accuracy_test": "0.5"}, "accuracy_test"),
        ({"accuracy_val": -0.1}, "accuracy_val"),
        ({"extra": 1}, "extra"),
        ({"source": "herding"}, "source"),
        ({"source": "full"}, "the line: Value error, images_per_class and generation_seed are null for `full`, and only for it"),
        ({"images_per_class": None}, "the line: Value error, images_per_class and generation_seed are null for `full`"),
        ({"images_per_class": 0}, "images_per_class"),
    ],
)
def test_a_line_that_breaks_the_contract_is_refused(tmp_path, changes, knob):
    write(tmp_path / "a", [a_line("random", 1, 0, 0, 0.5), a_line("random", 1, 1, 0, 0.5) | changes])
    with pytest.raises(DiffstillError, match=rf"a/scores\.jsonl, line 2: {knob}"):
        read_lines(tmp_path / "a" / SCORES)


@pytest.mark.parametrize("text", ["{", "", "null", "[1]"])
def test_a_line_that_is_no_run_is_refused(tmp_path, text):
    (tmp_path / SCORES).write_text(text + "\n")
    with pytest.raises(DiffstillError, match=r"scores\.jsonl, line 1: the line: "):
        read_lines(tmp_path / SCORES)


@pytest.mark.parametrize("kind", ["scores", "report"])
def test_absent_runs_are_refused_with_what_makes_them(tmp_path, kind):
    """A report of an earlier release has no scores.jsonl."""
    with pytest.raises(DiffstillError, match=rf"{kind}/scores\.jsonl: missing; make the artifact that it belongs to anew"):
        read_lines(tmp_path / kind / SCORES)


# --- val ----------------------------------------------------------------------------------------------------------


def means_on_val(values) -> list[float]:
    return [float(np.mean(seeds)) / 2 for seeds in values]


def test_validation_is_a_mean_per_generation_seed_and_its_gain_over_real_images():
    one, two = validations(runs_of(all_lines("d1")))
    assert (one.images_per_class, two.images_per_class) == (1, 2)
    assert (one.baseline, two.baseline) == ("random", "random")
    assert one.accuracies == pytest.approx((0.31, 0.31, 0.32))
    assert two.accuracies == pytest.approx(means_on_val(DISTILLED[2]))
    assert one.gain == gain(means_on_val(DISTILLED[1]), means_on_val(RANDOM[1]))
    assert (one.gain.verdict, two.gain.verdict) == ("gain", "unclear")


def test_students_and_their_seeds_are_averaged_before_generation_seeds_are_compared():
    accuracies = {(0, STUDENT): [0.2, 0.4], (0, OTHER): [0.6, 0.8], (1, STUDENT): [0.3, 0.3], (1, OTHER): [0.5, 0.7]}
    lines = [
        a_line(source, 1, seed, number, value + more, student=student)
        for source, more in (("random", 0.0), ("distilled", 0.1))
        for (seed, student), values in accuracies.items()
        for number, value in enumerate(values)
    ]
    (found,) = validations(runs_of(lines))
    assert found.accuracies == pytest.approx((0.6 / 2, 0.55 / 2))
    assert found.gain.points == pytest.approx(100 * 0.1 / 2)


def test_gains_of_test_and_val_are_apart():
    lines = [
        a_line(source, 1, seed, 0, 0.5, accuracy_val=value + seed / 100) for seed in (0, 1) for source, value in (("random", 0.1), ("distilled", 0.9))
    ]
    (found,) = validations(runs_of(lines))
    assert found.gain.points == pytest.approx(80)


@pytest.mark.parametrize("source", ["random", "distilled"])
def test_a_set_that_is_not_judged_on_val_whole_has_no_validation(source):
    lines = all_lines("d1")
    next(one for one in lines if one["source"] == source and one["images_per_class"] == 1)["accuracy_val"] = None
    assert [one.images_per_class for one in validations(runs_of(lines))] == [2]
    assert validations(runs_of([one | {"accuracy_val": None} for one in lines])) == []


def test_other_sizes_sources_and_students_are_no_baseline():
    """A gain over what another, weaker student learns from real images would be one of the student."""
    ours = [a_line("distilled", 1, seed, 0, 0.9 + seed / 100) for seed in (0, 1)]
    assert validations(runs_of(ours)) == []
    for changes in ({"images_per_class": 2}, {"source": "untuned"}, {"student": OTHER}, {"student_seed": 1}):
        real = [a_line("random", 1, seed, 0, 0.1 + seed / 100, **changes) for seed in (0, 1)]
        assert validations(runs_of([*ours, *real])) == [], changes
    both = [one | {"student": student} for student in (STUDENT, OTHER) for one in ours]
    real = [a_line("random", 1, seed, 0, 0.1 + seed / 100) for seed in (0, 1)]
    assert validations(runs_of([*both, *real])) == [], "one student of two was not judged on real images"
    real += [a_line("random", 1, 1, 0, 0.1, student=OTHER)]
    assert validations(runs_of([*both, *real])) == [], "one student of two was judged on one draw of two"
    assert validations(runs_of([*both, *real, a_line("random", 1, 0, 0, 0.1, student=OTHER)])) != []


# --- before any verdict -------------------------------------------------------------------------------------------

TENTH = Chance(0.1, 400)
"""Ten classes alike; the standard error of a guess is 1.5 points."""


def cell_of(source, means, size=1, **changes) -> list[dict]:
    """One run per seed, accuracy on val none."""
    if source == "full":
        return [a_line("full", None, None, seed, value, accuracy_val=None, **changes) for seed, value in enumerate(means)]
    return [a_line(source, size, seed, 0, value, accuracy_val=None, **changes) for seed, value in enumerate(means)]


def test_chance_is_what_the_best_constant_answer_scores():
    assert Chance.of({"counts": {"train": {"a": 9}, "test": {"a": 30, "b": 10}}}) == Chance(0.75, 40)
    assert Chance.of({"counts": {"test": dict.fromkeys("abcd", 25)}}) == Chance(0.25, 100)


@pytest.mark.parametrize(
    ("means", "explained"),
    [
        ([0.129], True),
        ([0.131], False),
        ([0.05], True),
        ([0.10, 0.20, 0.15], True),  # 5 points above, with an error of 2.9 over seeds and 1.5 of the images
        ([0.14, 0.16, 0.15], False),
    ],
)
def test_noise_of_chance_is_that_of_the_images_and_of_the_seeds(means, explained):
    assert TENTH.explains(runs_of(cell_of("random", means))) == explained
    assert TENTH.explains(runs_of(cell_of("full", means))) == explained


def test_guesses_are_taken_for_guesses_in_97_of_100_experiments():
    draws = np.random.default_rng(0).binomial(400, 0.1, 1000) / 400
    assert np.mean([TENTH.explains(runs_of(cell_of("random", [share]))) for share in draws]) == pytest.approx(0.977, abs=0.015)


def test_a_whole_experiment_needs_no_caution():
    assert cautions(runs_of(all_lines("d1")), TENTH) == []


def test_students_that_learn_nothing_from_all_images_are_told_first():
    lines = cell_of("random", [0.10, 0.5, 0.9]) + cell_of("distilled", [0.1, 0.11, 0.12]) + cell_of("full", [0.11])
    first, second = cautions(runs_of(lines), TENTH)
    assert first.startswith("convnet-2 lies within noise of chance (10.0 %) even on full data (11.0 %), so its figures mean nothing: train it longer")
    assert "`evaluate.protocol`" in first
    assert second.startswith("1 of 1 intervals is wider than 20 points")


def test_sizes_at_which_every_source_is_a_guess_are_told():
    blind = cell_of("random", [0.1, 0.11, 0.12], 1) + cell_of("distilled", [0.12, 0.11, 0.1], 1)
    seen = cell_of("random", [0.1, 0.11, 0.12], 5) + cell_of("distilled", [0.3, 0.31, 0.32], 5) + cell_of("full", [0.9])
    other = [one | {"student": OTHER, "accuracy_test": 0.5 + one["accuracy_test"]} for one in blind]
    (told,) = cautions(runs_of(blind + seen + other), TENTH)
    assert told.startswith("convnet-2, images per class 1: all sources lie within noise of chance (10.0 %)")
    assert "`evaluate.images_per_class`" in told


def test_an_interval_of_twenty_points_is_as_wide_as_may_be():
    base = [0.50, 0.51, 0.52]
    narrow = gain([0.6, 0.7, 0.8], base)
    scale = 20 / (narrow.high - narrow.low)
    for more, wide in ((0.999, False), (1.001, True)):
        base_now, ours = ([0.5 + scale * more * (value - 0.5) for value in values] for values in (base, [0.6, 0.7, 0.8]))
        assert bool(cautions(runs_of(cell_of("random", base_now) + cell_of("distilled", ours)), TENTH)) == wide


def test_the_widest_interval_is_named_val_included():
    lines = [
        one | {"accuracy_val": one["accuracy_test"] + (one["source"] == "distilled") * one["generation_seed"] / 6} for one in all_lines("d1")[:-2]
    ]
    (told,) = cautions(runs_of(lines), TENTH)
    assert told.startswith("2 of 8 intervals are wider than 20 points and say next to nothing (widest: val, 1 per class, ")
    assert "fresh, larger set of generation seeds (`sample.seeds`)" in told
