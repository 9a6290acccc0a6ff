"""Stage `report`: all scores of one experiment as numbers, figures and one page."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffstill.artifacts import Artifact, Rows, new_artifact, open_artifact
from diffstill.config import EvaluateConfig, FinetuneConfig, PrepareConfig, ReportConfig, SampleConfig, Section
from diffstill.errors import DiffstillError
from diffstill.html import Curve, GridRow, Page, Setting, Verdict, figures, percent, plain, plural, render, signed
from diffstill.imagenet import titled
from diffstill.record import Record, ignore
from diffstill.scores import (
    SCORES,
    SOURCE_NAMES,
    Cell,
    Chance,
    Gain,
    Run,
    Source,
    by_column,
    by_seed,
    cautions,
    flat,
    metrics,
    read_runs,
    repeated,
    table,
)

GRID_CLASSES = 50
"""Classes whose pictures the page shows, so that it stays one that a browser opens."""
CURVE_COLUMNS = ("step", "loss", "loss_real", "loss_gen", "memory_real", "memory_gen")
_OUTCOMES = {
    "gain": "clearly better",
    "loss": "clearly worse",
    "unclear": "no difference shown",
    "unknown": "too few generation seeds for an interval, so no claim",
}


@dataclass(frozen=True)
class Inputs:
    """The verified artifacts that a report is made from; scores in the order of their digests."""

    images: Artifact
    denoiser: Artifact
    distilled: Artifact
    untuned: Artifact
    scores: Sequence[Artifact]

    def named(self) -> dict[str, Artifact]:
        """All of them by name, scores numbered."""
        one = {"images": self.images, "denoiser": self.denoiser, "distilled": self.distilled, "untuned": self.untuned}
        return one | {f"scores-{number:03d}": artifact for number, artifact in enumerate(self.scores)}


def report(
    config: ReportConfig,
    *,
    images: Path,
    denoiser: Path,
    distilled: Path,
    untuned: Path,
    scores: Sequence[Path],
    report: Path,
    record: Record = ignore,
) -> dict[str, float]:
    """Write the `report` artifact: scores.jsonl with all runs, metrics.json, accuracy.csv, report.html and four figures as PNG.

    Returns the numbers of metrics.json, flat. Raises `DiffstillError` for scores that share no table: two protocols, two sets of
    real images, a run twice or missing, other images than those given.
    """
    inputs = _open(images, denoiser, distilled, untuned, scores)
    runs = read_runs(inputs.scores)
    _refuse_other_images(runs, inputs)
    cells = table(runs)
    page = _page(config, inputs, runs, cells)
    numbers = metrics(cells)
    with new_artifact(report, "report", config, inputs.named()) as draft:
        (draft.folder / "metrics.json").write_text(json.dumps(numbers, indent=1, sort_keys=True, allow_nan=False) + "\n")
        (draft.folder / SCORES).write_text("".join(run.model_dump_json() + "\n" for run in runs))
        (draft.folder / "accuracy.csv").write_text(_accuracy_csv(cells, runs[0].protocol))
        (draft.folder / "report.html").write_text(render(page), encoding="utf-8")
        pictures = figures(page)
        for name, content in pictures.items():
            (draft.folder / name).write_bytes(content)
        draft.facts |= {"protocol": runs[0].protocol, "students": list(page.students), "runs": len(runs), "images_digest": inputs.images.digest}
    measured = flat(numbers)
    record.metrics(measured, step=0)
    for name in ("report.html", *pictures):
        record.file(report / name)
    return measured


def _open(images: Path, denoiser: Path, distilled: Path, untuned: Path, scores: Sequence[Path]) -> Inputs:
    if not scores:
        raise DiffstillError("no scores were given; a report needs at least one `scores` folder: run `evaluate` first")
    inputs = Inputs(
        open_artifact(images, "images"),
        open_artifact(denoiser, "denoiser"),
        open_artifact(distilled, "distilled"),
        open_artifact(untuned, "distilled"),
        sorted((open_artifact(folder, "scores") for folder in scores), key=lambda artifact: artifact.digest),
    )
    _refuse_strangers(inputs)
    return inputs


def _refuse_strangers(inputs: Inputs) -> None:
    """Both sampled sets must be what their place says, and come from the images and the denoiser that are given."""
    for name, artifact in (("distilled", inputs.distilled), ("untuned", inputs.untuned)):
        source, images = artifact.facts["source"], artifact.facts["images_digest"]
        if source != name:
            raise DiffstillError(f"{artifact.folder}: was sampled from source `{source}` where `{name}` is expected; swap the folders")
        if images != inputs.images.digest:
            raise DiffstillError(
                f"{artifact.folder}: comes from images {images}, the report is given {inputs.images.digest}; pass those it came from"
            )
    if inputs.distilled.manifest.inputs["denoiser"] != inputs.denoiser.digest:
        raise DiffstillError(f"{inputs.distilled.folder}: was sampled from another denoiser than {inputs.denoiser.folder}; pass the one it came from")


def _refuse_other_images(runs: Sequence[Run], inputs: Inputs) -> None:
    """Scores must come from the very artifacts that the page shows."""
    if runs[0].images_digest != inputs.images.digest:
        raise DiffstillError(
            f"scores of images digest {runs[0].images_digest}, but {inputs.images.folder} has {inputs.images.digest}; pass the images that `evaluate` used"
        )
    given = {inputs.images.digest, inputs.distilled.digest, inputs.untuned.digest}
    for artifact in inputs.scores:
        for name, digest in artifact.manifest.inputs.items():
            if digest not in given:
                raise DiffstillError(
                    f"{artifact.folder}: was made from another `{name}` ({digest}) than the report is given; pass the one `evaluate` used"
                )


def _accuracy_csv(cells: Sequence[Cell], protocol: str) -> str:
    """One line per cell for plots; `images_per_class` is empty for full data, `sd` for a single run."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["source", "student", "images_per_class", "mean", "sd", "runs", "protocol"])
    for cell in cells:
        sd = None if cell.test.sd is None else round(cell.test.sd, 6)
        lines.writerow([cell.source, cell.student, cell.images_per_class, round(cell.test.mean, 6), sd, cell.test.runs, protocol])
    return text.getvalue()


def _page(config: ReportConfig, inputs: Inputs, runs: Sequence[Run], cells: Sequence[Cell]) -> Page:
    denoiser, chance = inputs.denoiser.facts, Chance.of(inputs.images.facts)
    warned = cautions(runs, chance)
    headline = _headline(cells, alone=len(denoiser["seeds"]) == 1 < len(inputs.distilled.facts["seeds"]))
    return Page(
        title=_title(inputs.images.facts["source"]),
        lead=_lead(inputs),
        facts=_facts(inputs, runs),
        cautions=warned,
        headline=replace(headline, tone="unknown") if warned else headline,
        verdicts=[verdict for cell in cells if (verdict := _verdict(cell, cells))],
        cells=cells,
        chance=chance.level,
        caption=_caption(inputs, runs),
        footnotes=_footnotes(cells),
        grid=_grid(config, inputs),
        grid_caption=_grid_caption(inputs),
        curves=[_curve(inputs.denoiser, seed) for seed in denoiser["seeds"]],
        capacities=(denoiser["capacity_real"], denoiser["capacity_gen"]),
        memories=denoiser["policy"] != "none",
        memory_caption=_memory_caption(denoiser),
        settings=_settings(config, inputs),
        digests=_digests(inputs),
    )


def _images_in(inputs: Inputs, split: str) -> int:
    return sum(inputs.images.facts["counts"].get(split, {}).values())


def _title(source: str) -> str:
    return "Distilled images" if source == "folder" else f"Distilled {source}"


def _lead(inputs: Inputs) -> str:
    size = inputs.distilled.facts["images_per_class"]
    return (
        f"{plural(size, 'synthetic image').capitalize()} per class in place of {plain(_images_in(inputs, 'train'))} real training images, "
        f"judged by training classifiers from scratch and testing them on {plain(_images_in(inputs, 'test'))} real images kept apart."
    )


def _facts(inputs: Inputs, runs: Sequence[Run]) -> list[tuple[str, str]]:
    images, distilled = inputs.images.facts, inputs.distilled.facts
    classes, seeds = len(images["classes"]), len(distilled["seeds"])
    return [
        ("Real images", f"{images['source']}, {classes} classes"),
        ("Size", f"{images['side']} × {images['side']} pixels, {'grey' if images['channels'] == 1 else 'colour'}"),
        ("Train / val / test", " / ".join(plain(_images_in(inputs, split)) for split in ("train", "val", "test"))),
        ("Distilled", f"{plural(distilled['images_per_class'], 'image')} per class, {plural(seeds, 'set')}"),
        ("Sampler", f"{distilled['sampler']}, {plural(distilled['steps'], 'step')}, guidance {distilled['guidance']:g}"),
        ("Fine-tuning", f"{inputs.denoiser.facts['trainable']}, memories: {inputs.denoiser.facts['policy']}"),
        ("Protocol", runs[0].protocol),
        ("Student runs", plain(len(runs))),
    ]


def _find(cells: Sequence[Cell], source: Source, like: Cell) -> Cell | None:
    found = [cell for cell in cells if (cell.source, cell.student, cell.images_per_class) == (source, like.student, like.images_per_class)]
    return found[0] if found else None


def _verdict(cell: Cell, cells: Sequence[Cell]) -> Verdict | None:
    """What one distilled cell says beside random real, and beside the untuned generator where that was run."""
    random = _find(cells, "random", cell)
    if cell.source != "distilled" or cell.over_random is None or random is None:
        return None
    subject = f"{cell.student}, {plural(cell.images_per_class or 0, 'image')} per class:"
    text = f"distilled {percent(cell.test.mean)} %, random real {percent(random.test.mean)} %, {_difference(cell.over_random)}."
    if cell.over_untuned:
        text += f" Beside the untuned generator: {_difference(cell.over_untuned)}."
    return Verdict(cell.over_random.verdict, text, subject)


def _difference(over: Gain) -> str:
    interval = "" if over.low is None or over.high is None else f" (95 % interval {signed(over.low)} to {signed(over.high)})"
    return f"{signed(over.points)} points{interval}: {_OUTCOMES[over.verdict]}"


def _headline(cells: Sequence[Cell], *, alone: bool) -> Verdict:
    """The answer in one or two sentences, coloured by the comparison with random real; `alone` is one fine-tune that was sampled several times."""
    over_random = [cell.over_random.verdict for cell in cells if cell.source == "distilled" and cell.over_random]
    over_untuned = [cell.over_untuned.verdict for cell in cells if cell.source == "distilled" and cell.over_untuned]
    if not over_random:
        return Verdict("unknown", "These scores hold no distilled runs beside random real ones of the same size, so there is no verdict.")
    text = f"Distilled images {_compared(over_random, 'the same number of random real images')}."
    if over_untuned:
        about = "; they are of one fine-tune, and a claim about the method needs several" * alone
        text += f" They {_compared(over_untuned, 'images of the untuned generator')}{about}."
    outcomes = set(over_random)
    return Verdict(over_random[0] if len(outcomes) == 1 else "unclear", text)


def _compared(outcomes: Sequence[str], other: str) -> str:
    """`beat X in 2 of 3 comparisons, lose in 1`, in plain words."""
    gains, losses, all_of = outcomes.count("gain"), outcomes.count("loss"), len(outcomes)
    place = {1: "the one comparison", 2: "both comparisons"}.get(all_of, f"all {all_of} comparisons")
    if gains == all_of:
        return f"beat {other} in {place}"
    if losses == all_of:
        return f"do worse than {other} in {place}"
    if not gains and not losses:
        return f"are not shown to differ from {other} in {place.replace('all', 'any of').replace('both comparisons', 'either comparison')}"
    parts = [f"beat {other} in {gains}" if gains else f"do worse than {other} in {losses}", f"of {all_of} comparisons"]
    rest = all_of - gains - losses
    more = [f"do worse in {losses}"] * bool(gains and losses) + [f"show no difference in {rest}"] * bool(rest)
    return " ".join(parts) + "".join(f" and {part}" for part in more)


def _caption(inputs: Inputs, runs: Sequence[Run]) -> str:
    again = repeated(len(inputs.denoiser.facts["seeds"]), len(inputs.distilled.facts["seeds"]))
    again = again.replace("`", "")  # a page has no Markdown
    return (
        f"Top-1 accuracy in % on {plain(_images_in(inputs, 'test'))} real test images at the last epoch: mean ± sample standard deviation over all runs "
        f"(number of runs below). Bold: the best small set of each column. In colour: points above random real, with the 95 % interval. "
        f"Protocol {runs[0].protocol}, {_budget(runs)}. {_repeats(runs)} {again} Hard labels."
    )


def _budget(runs: Sequence[Run]) -> str:
    """Optimiser steps, by size where they differ."""
    if len(steps := {run.steps for run in runs}) == 1:
        return f"{plural(steps.pop(), 'optimiser step')} for every student"
    by_size: dict[int | None, set[int]] = defaultdict(set)
    for run in runs:
        by_size[run.images_per_class].add(run.steps)
    ordered = sorted(by_size, key=lambda size: math.inf if size is None else size)
    parts = (f"{size or 'all'}: {' or '.join(plain(count) for count in sorted(by_size[size]))}" for size in ordered)
    return f"optimiser steps by images per class {'; '.join(parts)}"


def _repeats(runs: Sequence[Run]) -> str:
    """How many generation seeds, or draws, and student seeds the cells of each source have."""
    shapes: dict[Source, set[str]] = defaultdict(set)
    for (source, _, _), cell in by_column(run for run in runs if run.source != "full").items():
        seeds = by_seed(cell)
        draws = plural(len(seeds), "draw" if source == "random" else "generation seed")
        shapes[source].add(f"{draws} × {plural(len(cell) // len(seeds), 'student seed')}")
    if not shapes:
        return "No small set was judged."
    return "; ".join(f"{SOURCE_NAMES[source]}: {' or '.join(sorted(found))}" for source, found in shapes.items()).capitalize() + "."


def _regenerated(inputs: Inputs) -> str:
    """Whether generation seeds vary the fine-tuning or the sampling alone."""
    fine_tunes, sets = len(inputs.denoiser.facts["seeds"]), len(inputs.distilled.facts["seeds"])
    if sets == 1:
        return "One fine-tune, sampled once."
    if fine_tunes == 1:
        return "Each distilled generation seed repeats the sampling only, from one fine-tune, so the spread leaves out that of fine-tuning."
    return "Each distilled generation seed repeats fine-tuning and sampling."


def _footnotes(cells: Sequence[Cell]) -> list[str]:
    notes = [
        "Interval: runs that share a generation seed share their images and are not independent. Their accuracies are averaged per generation seed first, "
        "and these averages are the samples of Welch's t interval (two-sided, 95 %). It is not corrected for the number of comparisons."
    ]
    if any(cell.over_untuned and cell.over_untuned.paired for cell in cells):
        notes.append(
            "Distilled and untuned images of one generation seed begin from the same noise, so the interval of distilled over untuned is that of the "
            "paired t-test: its samples are the differences per generation seed."
        )
    if any(cell.source == "full" for cell in cells):
        notes.append("Full data is a single training set: its runs differ in the student seed alone.")
    if any(cell.test.runs == 1 for cell in cells):
        notes.append("A cell with one run has no standard deviation.")
    if any(over and over.low is None for cell in cells for over in (cell.over_random, cell.over_untuned)):
        notes.append("A gain without brackets has too few generation seeds, or no spread, for an interval: it supports no claim.")
    return notes


def _grid(config: ReportConfig, inputs: Inputs) -> list[GridRow]:
    """Pictures of the first sampled classes from all three origins."""
    classes = inputs.distilled.facts["classes"]
    known = inputs.images.facts["classes"]
    for name in {*classes, *inputs.untuned.facts["classes"]}:
        if name not in known or name not in classes or name not in inputs.untuned.facts["classes"]:
            raise DiffstillError(f"class {name!r} is not in all of images, distilled and untuned; sample both from the classes of the images")
    pixels, labels = Rows(inputs.images.folder, "train", "pixels"), Rows(inputs.images.folder, "train", "labels")[:]
    shown = min(config.shown_per_class, inputs.distilled.facts["images_per_class"], inputs.untuned.facts["images_per_class"])
    return [
        GridRow(
            titled(name),
            {
                "Real": pixels[np.flatnonzero(labels == known.index(name))[:shown]],
                "Untuned generator": _sampled(inputs.untuned, name, shown),
                "Distilled": _sampled(inputs.distilled, name, shown),
            },
        )
        for name in classes[:GRID_CLASSES]
    ]


def _sampled(distilled: Artifact, name: str, count: int) -> npt.NDArray[np.uint8]:
    """The first images of a class from the first generation seed, (count, channels, side, side)."""
    folder = distilled.folder / f"seed-{distilled.facts['seeds'][0]}" / name
    mode = "L" if distilled.facts["channels"] == 1 else "RGB"
    pictures = []
    for number in range(count):
        with Image.open(folder / f"{number:05d}.png") as image:
            pictures.append(np.atleast_3d(np.asarray(image.convert(mode))).transpose(2, 0, 1))
    return np.stack(pictures)


def _grid_caption(inputs: Inputs) -> str:
    untuned, distilled = inputs.untuned.facts["seeds"][0], inputs.distilled.facts["seeds"][0]
    seed = f"generation seed {distilled}" if untuned == distilled else f"generation seeds {untuned} (untuned) and {distilled} (distilled)"
    every, count = "each class", len(inputs.distilled.facts["classes"])
    if count > GRID_CLASSES:
        every = f"the first {GRID_CLASSES} of {count} classes"
    return f"The first training images of {every} beside the first images of {seed}. None was picked by eye."


def _curve(denoiser: Artifact, seed: int) -> Curve:
    """The columns of one fine-tune's metrics.csv. Raises `DiffstillError` naming a missing column or a line without numbers."""
    path = denoiser.folder / f"seed-{seed}" / "metrics.csv"
    if not path.is_file():
        raise DiffstillError(f"{path}: missing; make the `denoiser` artifact anew with `finetune`")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    if not lines or (missing := set(CURVE_COLUMNS) - lines[0].keys()):
        raise DiffstillError(f"{path}: has no {'line' if not lines else f'column {min(missing)}'}; make the `denoiser` artifact anew with `finetune`")
    try:
        return Curve(seed, {column: [float(line[column]) for line in lines] for column in CURVE_COLUMNS})
    except (TypeError, ValueError) as error:
        raise DiffstillError(f"{path}: a field is no number ({error}); make the `denoiser` artifact anew with `finetune`") from error


def _memory_caption(facts: Mapping[str, Any]) -> str:
    trained = f"{plain(facts['trained_parameters'])} of {plain(facts['parameters'])} parameters trained ({facts['trainable']})"
    count = f"{plural(len(facts['seeds']), 'fine-tune')} of {plain(facts['steps'])} steps; {trained}."
    if facts["policy"] == "none":
        return f"{count} Without memories: the diffusion loss alone."
    return (
        f"{count} Memories: who leaves is chosen by {facts['policy']}, update per {facts['update']}, capacity {facts['capacity_real']} real and "
        f"{facts['capacity_gen']} generated entries per class (dashed); weights of the terms {facts['lambda_real']:g} for L_real and "
        f"{facts['lambda_gen']:g} for L_gen. Terms are drawn smoothed like the loss."
    )


def _settings(config: ReportConfig, inputs: Inputs) -> dict[str, list[Setting]]:
    """The configuration of every stage whose artifact is at hand, equal ones once."""
    sections: list[tuple[str, type[Section], Mapping[str, Any]]] = [
        ("prepare", PrepareConfig, inputs.images.manifest.config),
        ("finetune", FinetuneConfig, inputs.denoiser.manifest.config),
        ("sample", SampleConfig, inputs.distilled.manifest.config),
    ]
    if inputs.untuned.manifest.config != inputs.distilled.manifest.config:
        sections.append(("sample, untuned", SampleConfig, inputs.untuned.manifest.config))
    distinct = {json.dumps(artifact.manifest.config, sort_keys=True): artifact.manifest.config for artifact in inputs.scores}
    for number, values in enumerate(distinct.values(), start=1):
        sections.append(("evaluate" if len(distinct) == 1 else f"evaluate, {number} of {len(distinct)}", EvaluateConfig, values))
    sections.append(("report", ReportConfig, config.model_dump(mode="json")))
    return {title: _described(kind, values) for title, kind, values in sections}


def _described(kind: type[Section], values: Mapping[str, Any]) -> list[Setting]:
    descriptions = {name: field.description or "" for name, field in kind.model_fields.items()}
    return [Setting(name, json.dumps(values[name], ensure_ascii=False), descriptions.get(name, "")) for name in sorted(values)]


def _digests(inputs: Inputs) -> list[tuple[str, str]]:
    """Every input, then what those were made from, each digest once."""
    found = {artifact.digest: name for name, artifact in inputs.named().items()}
    for name, artifact in inputs.named().items():
        for origin, digest in sorted(artifact.manifest.inputs.items()):
            found.setdefault(digest, f"{origin} (input of {name})")
    return [(name, digest) for digest, name in found.items()]
