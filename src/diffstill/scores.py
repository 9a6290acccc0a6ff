"""Student runs: read and checked, gathered into the cells of a table, compared with intervals over generation seeds.

Accuracies are fractions between 0 and 1, gains are in points. Figures compare only within one data set, protocol and student.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from scipy import stats

from diffstill.artifacts import Artifact
from diffstill.errors import DiffstillError
from diffstill.metrics import Summary, label_robust_score, summary

Source = Literal["random", "untuned", "distilled", "full"]
SCORES = "scores.jsonl"
"""The file of runs, one JSON object a line, in `scores` and `report` artifacts."""
SOURCE_NAMES: Mapping[Source, str] = {"random": "random real", "untuned": "untuned generator", "distilled": "distilled", "full": "full data"}
REAL: tuple[Source, ...] = ("random",)
"""Real images of the same number: what a distilled set must beat."""
Column = tuple[Source, str, int | None]
"""What the runs of one cell of a table share: source, student, images per class."""
GENERATED: tuple[Source, ...] = ("untuned", "distilled")
"""Sets drawn from a generator: image k of a class and generation seed begins from the same noise in all of them."""
WIDE = 20.0
"""Points from end to end of a 95 % interval above which it says next to nothing."""
Split = Literal["accuracy_val", "accuracy_test"]
Accuracy = Field(ge=0.0, le=1.0)


@dataclass(frozen=True)
class Gain:
    """Accuracy above another source in points, with its 95 % interval; `low` and `high` are None where fewer than two seeds or no spread allow none.

    The interval is Welch's, or that of a paired t-test where both sources are `paired` by generation seed.
    """

    points: float
    low: float | None
    high: float | None
    paired: bool = False

    @property
    def fractions(self) -> dict[str, float | None]:
        """The gain and the ends of its interval as accuracies are counted, between -1 and 1, without the noise of rounding."""
        ends = {"": self.points, "_low": self.low, "_high": self.high}
        return {name: None if value is None else round(value / 100, 6) + 0.0 for name, value in ends.items()}

    @property
    def verdict(self) -> Literal["gain", "loss", "unclear", "unknown"]:
        """Whether the interval is clear of zero, and on which side; unknown without an interval."""
        if self.low is None or self.high is None:
            return "unknown"
        return "gain" if self.low > 0 else "loss" if self.high < 0 else "unclear"


@dataclass(frozen=True)
class Cell:
    """All runs of one source, student and number of images per class (None for full data). Accuracies are fractions."""

    source: Source
    student: str
    images_per_class: int | None
    test: Summary
    lowest: float
    highest: float
    validation: Summary | None
    best_test: Summary
    best_step: float
    over_random: Gain | None
    over_untuned: Gain | None
    label_robust_score: float | None
    leads: bool


class Run(BaseModel):
    """One line of `scores.jsonl`: one student, trained once. Accuracies are fractions; `accuracy_val` is None without a val split."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: Source
    student: str
    images_per_class: int | None = Field(ge=1)
    generation_seed: int | None
    student_seed: int
    protocol: str
    steps: int
    train_images: int
    accuracy_test: float = Accuracy
    accuracy_val: float | None = Accuracy
    best_test: float = Accuracy
    best_step: int
    labels: Literal["hard"]
    images_digest: str

    @model_validator(mode="after")
    def _full_has_no_size(self) -> Self:
        if (self.source == "full") != (self.images_per_class is None) or (self.source == "full") != (self.generation_seed is None):
            raise ValueError("images_per_class and generation_seed are null for `full`, and only for it")
        return self

    @property
    def column(self) -> Column:
        """What the runs of one cell of the table share."""
        return self.source, self.student, self.images_per_class

    @property
    def order(self) -> tuple[int, str, int, int, int]:
        """Where the run stands among all, whatever order the scores came in; no two runs may share it."""
        return list(SOURCE_NAMES).index(self.source), self.student, self.images_per_class or 0, self.generation_seed or 0, self.student_seed


def read_runs(scores: Sequence[Artifact]) -> list[Run]:
    """All runs of all scores in a fixed order. Raises `DiffstillError` if they share no table (see `report`)."""
    runs = sorted((run for artifact in scores for run in read_lines(artifact.folder / SCORES)), key=lambda run: run.order)
    if not runs:
        raise DiffstillError(f"{scores[0].folder}: no student run in the scores given; run `evaluate` with at least one student")
    _refuse_mixture("protocol", {run.protocol for run in runs})
    _refuse_mixture("images digest", {run.images_digest for run in runs})
    for earlier, later in itertools.pairwise(runs):
        if earlier.order == later.order:
            raise DiffstillError(f"{_named(later)} occurs twice in the scores; pass each scores folder once")
    _refuse_gaps(runs)
    _refuse_other_students(runs)
    return runs


def read_lines(path: Path) -> list[Run]:
    """The runs of one file. Raises `DiffstillError` naming the first line that breaks the contract."""
    if not path.is_file():
        raise DiffstillError(f"{path}: missing; make the artifact that it belongs to anew")
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            runs.append(Run.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            knob = ".".join(str(part) for part in first["loc"]) or "the line"
            raise DiffstillError(f"{path}, line {number}: {knob}: {first['msg']}; make the artifact that it belongs to anew") from error
    return runs


def _named(run: Run) -> str:
    size = "all images" if run.images_per_class is None else f"{run.images_per_class} images per class"
    return f"the run {run.source}, {run.student}, {size}, generation seed {run.generation_seed}, student seed {run.student_seed}"


def _refuse_mixture(what: str, found: set[str]) -> None:
    if len(found) > 1:
        raise DiffstillError(f"scores of more than one {what}: {', '.join(sorted(found))}; they never share a table, so make one report for each")


def _refuse_gaps(runs: Sequence[Run]) -> None:
    """Every generation seed of a cell must have the same student seeds, or means over runs would weigh the seeds unequally."""
    for cell in by_column(runs).values():
        students = {run.student_seed for run in cell}
        for seed, found in by_seed(cell).items():
            if missing := students - {run.student_seed for run in found}:
                raise DiffstillError(
                    f"{cell[0].source}, {cell[0].student}, {cell[0].images_per_class} images per class: generation seed {seed} lacks "
                    f"student seed {min(missing)} that others have; pass all scores of the experiment"
                )


def _refuse_other_students(runs: Sequence[Run]) -> None:
    """What one student seed is good for, all sources must share: it is no part of the interval of a difference."""
    asked: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)
    for (source, student, _), cell in by_column(runs).items():
        asked[student].setdefault(tuple(sorted({run.student_seed for run in cell})), source)
    for student, found in asked.items():
        if len(found) > 1:
            told = " but ".join(f"{source} by student seeds {', '.join(map(str, seeds))}" for seeds, source in found.items())
            raise DiffstillError(
                f"{student}: {told}; sources compare only if the same students judge them, so give all the same `evaluate.student_seeds`"
            )


def by_column(runs: Iterable[Run]) -> dict[Column, list[Run]]:
    """Runs by source, student and images per class."""
    groups: dict[Column, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.column].append(run)
    return dict(groups)


def by_seed(runs: Iterable[Run]) -> dict[int | None, list[Run]]:
    """Runs by generation seed."""
    groups: dict[int | None, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.generation_seed].append(run)
    return dict(groups)


def table(runs: Sequence[Run]) -> list[Cell]:
    """One cell per source, student and size, in the order of `runs`: summaries at the last epoch, gains, scores."""
    groups = by_column(runs)
    means = {column: summary([run.accuracy_test for run in found]).mean for column, found in groups.items()}
    return [_cell(found, groups, means) for found in groups.values()]


def _cell(runs: Sequence[Run], groups: Mapping[Column, Sequence[Run]], means: Mapping[Column, float]) -> Cell:
    source, student, size = runs[0].source, runs[0].student, runs[0].images_per_class
    tests = [run.accuracy_test for run in runs]
    validations = [run.accuracy_val for run in runs if run.accuracy_val is not None]
    rivals = [means[other] for other in means if other[1:] == (student, size)]
    return Cell(
        source=source,
        student=student,
        images_per_class=size,
        test=summary(tests),
        lowest=min(tests),
        highest=max(tests),
        validation=summary(validations) if validations else None,
        best_test=summary([run.best_test for run in runs]),
        best_step=summary([run.best_step for run in runs]).mean,
        over_random=_over("random", runs, groups) if source in GENERATED else None,
        over_untuned=_over("untuned", runs, groups) if source == "distilled" else None,
        label_robust_score=_robust(runs[0], means),
        leads=source != "full" and means[source, student, size] == max(rivals),
    )


def _over(base: Source, runs: Sequence[Run], groups: Mapping[Column, Sequence[Run]]) -> Gain | None:
    return difference(runs, groups.get((base, *runs[0].column[1:]), ()), "accuracy_test")


def difference(runs: Sequence[Run], base: Sequence[Run], split: Split) -> Gain | None:
    """What `runs` gain over `base`, over generation seeds; None where one has no run, or one of its runs was not judged on that split.

    Generated sets of the same generation seeds share their noise and are paired.
    """
    ours, theirs = seed_means(runs, split), seed_means(base, split)
    if not ours or not theirs:
        return None
    generated = all(run.source in GENERATED for run in (*runs, *base))
    return gain(list(ours.values()), list(theirs.values()), paired=generated and ours.keys() == theirs.keys())


def seed_means(runs: Iterable[Run], split: Split) -> dict[int | None, float]:
    """Mean accuracy by generation seed, ascending: students on the same images are no independent samples. Empty if a run lacks it."""
    values = {seed: [getattr(run, split) for run in own] for seed, own in sorted(by_seed(runs).items(), key=lambda item: item[0] or 0)}
    if any(None in own for own in values.values()):
        return {}
    return {seed: summary(own).mean for seed, own in values.items()}


def gain(values: Sequence[float], base: Sequence[float], *, paired: bool = False) -> Gain:
    """Difference of means in points with its two-sided 95 % interval, one value (a fraction) per generation seed.

    Welch's, or with `paired`, where `values[i]` and `base[i]` have something in common, that of the paired t-test: it holds where they have not, too, and
    is narrower where they have. No interval with fewer than two values on a side, or where nothing varies.
    """
    points = 100 * (summary(values).mean - summary(base).mean)
    samples = [np.subtract(values, base)] if paired else [values, base]
    if min(map(len, samples)) < 2 or max(np.std(sample, ddof=1) for sample in samples) < 1e-12:
        return Gain(points, None, None, paired)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # one side may well be constant
        found = stats.ttest_rel(values, base) if paired else stats.ttest_ind(values, base, equal_var=False)
    low, high = found.confidence_interval(0.95)
    return Gain(points, 100 * float(low), 100 * float(high), paired)


def _robust(run: Run, means: Mapping[Column, float]) -> float | None:
    """LRS with hard labels; None for real sources and where random real or the full-data ceiling is absent."""
    random, full = means.get(("random", run.student, run.images_per_class)), means.get(("full", run.student, None))
    if run.source not in GENERATED or random is None or full is None:
        return None
    return label_robust_score(means[run.column], random, full)


def metrics(cells: Sequence[Cell]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """The content of metrics.json: {student: {source: {"ipc<n>" or "all": numbers}}}; accuracies and gains as fractions."""
    tree: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for cell in cells:
        size = "all" if cell.images_per_class is None else f"ipc{cell.images_per_class}"
        tree.setdefault(cell.student, {}).setdefault(cell.source, {})[size] = _numbers(cell)
    return tree


def _numbers(cell: Cell) -> dict[str, float]:
    found: dict[str, float | None] = {"test_mean": cell.test.mean, "test_std": cell.test.sd}
    if cell.validation:
        found |= {"val_mean": cell.validation.mean, "val_std": cell.validation.sd}
    for name, over in (("random", cell.over_random), ("untuned", cell.over_untuned)):
        if over:
            found |= {f"gain_over_{name}{end}": value for end, value in over.fractions.items()}
    found["label_robust_score_hard"] = cell.label_robust_score
    return {name: round(value, 6) for name, value in found.items() if value is not None} | {"runs": cell.test.runs}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by names with slashes."""
    found: dict[str, float] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": float(value)}
    return found


@dataclass(frozen=True)
class Validation:
    """A distilled set of one size on the val split: mean accuracy over students per generation seed, and the gain over the best real baseline."""

    images_per_class: int
    accuracies: tuple[float, ...]
    baseline: Source
    gain: Gain


def validations(runs: Sequence[Run]) -> list[Validation]:
    """One for each size that was judged on val beside a real baseline by the same students, ascending; empty without a val split."""
    sizes = sorted({run.images_per_class for run in runs if run.source == "distilled" and run.images_per_class})
    return [found for size in sizes if (found := _validation(runs, size))]


def _validation(runs: Sequence[Run], size: int) -> Validation | None:
    of_size = [run for run in runs if run.images_per_class == size]
    own = {source: [run for run in of_size if run.source == source] for source in ("distilled", *REAL)}
    ours = seed_means(own["distilled"], "accuracy_val")
    judges = {(run.student, run.student_seed) for run in own["distilled"]}
    rivals = {source: means for source in REAL if _all_judged(own[source], judges) and (means := seed_means(own[source], "accuracy_val"))}
    if not ours or not rivals or not _all_judged(own["distilled"], judges):
        return None
    best = max(rivals, key=lambda source: summary(list(rivals[source].values())).mean)
    return Validation(size, tuple(ours.values()), best, gain(list(ours.values()), list(rivals[best].values())))


def _all_judged(runs: Sequence[Run], judges: set[tuple[str, int]]) -> bool:
    """Whether these students with these seeds, and no others, judged every generation seed: a mean over unlike ones would be one of students."""
    return all({(run.student, run.student_seed) for run in own} == judges for own in by_seed(runs).values())


@dataclass(frozen=True)
class Chance:
    """What the best constant answer scores: `level`, a fraction, is the share of the most frequent class among so many test images."""

    level: float
    images: int

    @classmethod
    def of(cls, images: Mapping[str, Any]) -> Chance:
        """From the facts of an `images` artifact."""
        counts = images["counts"]["test"].values()
        return cls(max(counts) / sum(counts), sum(counts))

    def explains(self, runs: Sequence[Run]) -> bool:
        """Whether the mean of a cell is less than two standard errors above chance: those of so many test images and over generation seeds together."""
        seeds = seed_means(runs, "accuracy_test")
        means = summary(list(seeds.values()) if len(seeds) > 1 else [run.accuracy_test for run in runs])
        error = math.hypot(math.sqrt(self.level * (1 - self.level) / self.images), (means.sd or 0.0) / math.sqrt(means.runs))
        return means.mean < self.level + 2 * error


def cautions(runs: Sequence[Run], chance: Chance) -> list[str]:
    """What must be said before any verdict, with what to change: of students that may only guess, and of intervals that say next to nothing."""
    groups = by_column(runs)
    guessed = {column for column, cell in groups.items() if chance.explains(cell)}
    students = dict.fromkeys(student for _, student, _ in groups)
    return [*(told for student in students if (told := _guessing(student, groups, guessed, chance))), *_too_wide(runs)]


def _guessing(student: str, groups: Mapping[Column, Sequence[Run]], guessed: set[Column], chance: Chance) -> str:
    level, full = f"chance ({100 * chance.level:.1f} %)", ("full", student, None)
    if full in guessed:
        reached = summary([run.accuracy_test for run in groups["full", student, None]]).mean
        return (
            f"{student} lies within noise of {level} even on full data ({100 * reached:.1f} %), so its figures mean nothing: "
            "train it longer (`evaluate.protocol`), or take another network (`evaluate.students`) or larger images (`prepare.side`)."
        )
    own = [column for column in groups if column[1] == student and column != full]
    blind = [size for size in sorted({column[2] or 0 for column in own}) if all(column in guessed for column in own if column[2] == size)]
    if not blind:
        return ""
    return (
        f"{student}, images per class {', '.join(map(str, blind))}: all sources lie within noise of {level}, so nothing tells them apart: "
        "train longer (`evaluate.protocol`), or take more images per class (`sample.images_per_class`, `evaluate.images_per_class`)."
    )


def _too_wide(runs: Sequence[Run]) -> Iterator[str]:
    widths = {name: over.high - over.low for name, over in _gains(runs) if over.low is not None and over.high is not None}
    if wide := [name for name, width in widths.items() if width > WIDE]:
        widest = max(wide, key=widths.__getitem__)
        yield (
            f"{len(wide)} of {len(widths)} intervals {'is' if len(wide) == 1 else 'are'} wider than {WIDE:g} points and {'says' if len(wide) == 1 else 'say'} "
            f"next to nothing (widest: {widest}, {widths[widest]:.0f} points): repeat the experiment with a fresh, larger set of "
            "generation seeds (`sample.seeds`), of draws (`evaluate.random_seeds`) and of student seeds (`evaluate.student_seeds`)."
        )


def _gains(runs: Sequence[Run]) -> Iterator[tuple[str, Gain]]:
    """Every difference that is told of these runs, by name."""
    for cell in table(runs):
        for base, over in (("random", cell.over_random), ("untuned", cell.over_untuned)):
            if over:
                yield f"{cell.student}, {cell.images_per_class} per class, {cell.source} over {base}", over
    for one in validations(runs):
        yield f"val, {one.images_per_class} per class, distilled over {one.baseline}", one.gain


def repeated(fine_tunes: int, sets: int) -> str:
    """What the generation seeds of a distilled set repeat, and so what its intervals are about."""
    if sets == 1:
        return "One fine-tune, sampled once."
    if fine_tunes == 1:
        return (
            "Each distilled generation seed repeats the sampling only, from one fine-tune, so the spread leaves out that of fine-tuning: "
            "intervals are about this fine-tune, and a claim about the method needs several (`finetune.seeds`)."
        )
    return "Each distilled generation seed repeats fine-tuning and sampling."
