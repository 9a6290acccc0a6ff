"""Stage `publish`: a distilled set and its report -> a version in a registry, with a card that says what it is worth."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from diffstill.artifacts import MANIFEST, Artifact, new_artifact, open_artifact
from diffstill.config import PublishConfig
from diffstill.errors import DiffstillError, GateError
from diffstill.html import percent, plain, plural, signed
from diffstill.imagenet import titled
from diffstill.lineage import Lineage
from diffstill.pictures import contact_sheet, read_png, save_png
from diffstill.record import Record, ignore
from diffstill.scores import SCORES, SOURCE_NAMES, Cell, Chance, Gain, Run, Validation, cautions, metrics, read_lines, repeated, table, validations

log = logging.getLogger("diffstill")
SHEET_COLUMNS = 10
"""Images per row of a class's contact sheet."""
SHEET_ROWS = 10


@dataclass(frozen=True)
class Release:
    """What becomes a version: the model's name, the artifacts by kind, and the tags that say what it is."""

    name: str
    config: PublishConfig
    artifacts: Mapping[str, Artifact]
    tags: Mapping[str, str]
    lineage: Lineage

    @property
    def content(self) -> str:
        """SHA-256 over the digests of the set and of its report: what makes it this version and no other."""
        return sha256(" ".join(self.artifacts[kind].digest for kind in ("distilled", "report")).encode()).hexdigest()


class Registry(Protocol):
    """Where versions are kept."""

    def publish(self, release: Release, record: Record) -> int:
        """The number of the version with that content: a new one, or the one that is there."""
        ...


def publish(
    config: PublishConfig,
    *,
    distilled: Path,
    report: Path,
    card: Path,
    registry: Registry,
    force: bool = False,
    record: Record = ignore,
) -> dict[str, float]:
    """Write the `card` artifact (card.md, lineage.json, a contact sheet per class) and register a version with it.

    Returns the version's number, its images and bytes, and the gain on val per size, as a fraction. Raises `GateError` where the gain of the set over real images of the same
    number is not shown on val, unless `force` or `config.gate` allow it; `DiffstillError` for a set and a report that do not belong together.
    """
    made, told = open_artifact(distilled, "distilled"), open_artifact(report, "report")
    if told.manifest.inputs["distilled"] != made.digest:
        raise DiffstillError(f"{report}: reports on another distilled set than {distilled}; run `report` again, or pass the set it was made from")
    runs = read_lines(told.folder / SCORES)
    judged, lineage = validations(runs), Lineage.of(made, told)
    warned = cautions(runs, Chance.of(lineage["images"].manifest.facts))
    if config.gate != "off" and not force:
        _refuse_unproven(made, judged, warned)
    for caution in warned:
        log.warning("%s", caution)
    name = _model_name(config, lineage)
    tags = _tags(config, made, told, runs, judged, lineage)
    with new_artifact(card, "card", config, {"distilled": made, "report": told}) as draft:
        (draft.folder / "card.md").write_text(_card(config, name, made, runs, judged, lineage, warned), encoding="utf-8")
        (draft.folder / "lineage.json").write_text(json.dumps(lineage.plain(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        _draw_sheets(made, draft.folder / "sheets")
    artifacts = {"distilled": made, "report": told, "card": open_artifact(card, "card")}
    number = registry.publish(Release(name, config, artifacts, tags, lineage), record)
    gains = {f"val_gain/ipc{one.images_per_class}": one.gain.fractions[""] or 0.0 for one in judged}
    return {"version": float(number), "images": float(_images(made)), "bytes": float(tags["bytes"])} | gains


# The gate


def _refuse_unproven(made: Artifact, judged: Sequence[Validation], warned: Sequence[str]) -> None:
    """Raise `GateError` unless the whole set gains over the best real baseline on val, beyond its 95 % interval."""
    size, seeds = made.facts["images_per_class"], made.facts["seeds"]
    found = next((one for one in judged if one.images_per_class == size), None)
    what = "".join(f"{caution} " for caution in warned) + f"a set of {plural(size, 'image')} per class"
    anyway = "or publish it all the same with --force or `publish.gate: off`"
    if found is None:
        raise GateError(f"{what} was not judged on a val split beside real images of that number; judge it (`evaluate.images_per_class`), {anyway}")
    # Looking again with seeds added to the old ones, until a gain shows, finds gains that are not there.
    fresh = list(range(max(seeds) + 1, max(seeds) + 1 + max(3, len(seeds))))
    fix = f"improve it (guidance, steps) and judge it by a fresh set of generation seeds in place of the old ones (`sample.seeds: {fresh}`), {anyway}"
    if found.gain.verdict != "gain":
        raise GateError(
            f"{what} reaches {percent(float(np.mean(found.accuracies)))} % on val, {_told(found.gain)} against {SOURCE_NAMES[found.baseline]}: "
            f"the gain is not shown to be above zero; {fix}"
        )


def _told(gain: Gain) -> str:
    interval = (
        "no interval: too few generation seeds, or no spread"
        if gain.low is None or gain.high is None
        else f"{signed(gain.low)} to {signed(gain.high)}"
    )
    return f"{signed(gain.points)} points ({interval})"


# Tags


def _model_name(config: PublishConfig, lineage: Lineage) -> str:
    source = lineage.data()["source"]
    if config.name is None and source == "folder":
        raise DiffstillError("`publish.name` is null, but images of a folder have no name of their own; set it, like distilled-flowers")
    return config.name or f"distilled-{source}"


def _images(made: Artifact) -> int:
    return int(made.facts["images_per_class"] * len(made.facts["classes"]) * len(made.facts["seeds"]))


def _tags(
    config: PublishConfig, made: Artifact, told: Artifact, runs: Sequence[Run], judged: Sequence[Validation], lineage: Lineage
) -> dict[str, str]:
    """What a version can be searched by, and what says where it comes from; what people look for first, for MLflow shows them in this order."""
    facts, generator, denoiser, raw = made.facts, lineage["generator"].manifest, lineage["denoiser"].manifest, lineage.data()
    tags = {
        "dataset": raw["source"],
        "ipc": facts["images_per_class"],
        "classes": len(facts["classes"]),
        "resolution": f"{facts['side']}x{facts['side']}",
        **{f"val_gain/ipc{one.images_per_class}": _typed(one.gain) for one in judged},
        **_scores(table(runs)),
        "protocol": told.facts["protocol"],
        "students": ", ".join(told.facts["students"]),
        "student_seeds": ", ".join(map(str, sorted({run.student_seed for run in runs}))),
        "memory_policy": denoiser.facts["policy"],
        "guidance": f"{facts['guidance']:g}",
        "sampler": f"{facts['sampler']}, {facts['steps']} steps",
        "seeds": ", ".join(map(str, facts["seeds"])),
        "generator": " ".join(filter(None, (generator.config["source"], generator.config["location"]))),
        "licence": config.licence,
        "weights_licence": generator.facts.get("licence", ""),
        "bytes": sum((made.folder / name).stat().st_size for name in (MANIFEST, *made.manifest.files)),
        "data_location": raw.get("location", ""),
        "data_revision": raw.get("revision", ""),
        "data_md5": raw.get("md5", ""),
        "images_sha256": lineage["images"].digest,
        "generator_sha256": lineage["generator"].digest,
        "sha256": made.digest,
        "report_sha256": told.digest,
        **{f"val_seeds/ipc{one.images_per_class}": json.dumps([round(value, 6) for value in one.accuracies]) for one in judged},
        **{f"numbers/ipc{size}": json.dumps(found, sort_keys=True) for size, found in _numbers(runs, judged).items()},
    }
    return {name: str(value) for name, value in tags.items() if value != ""}


def _scores(cells: Sequence[Cell]) -> dict[str, str]:
    """Accuracy on val and test per student and size, and the gain over random real images on test."""
    found = {}
    for cell in cells:
        if cell.source == "distilled":
            where = f"{cell.student}/ipc{cell.images_per_class}"
            found[f"test/{where}"] = _accuracy(cell.test)
            if cell.validation:
                found[f"val/{where}"] = _accuracy(cell.validation)
            if cell.over_random:
                found[f"gain_over_random/{where}"] = _typed(cell.over_random)
    return found


def _typed(gain: Gain) -> str:
    """The same with the minus that keyboards have, for tags are searched."""
    return _told(gain).replace("\u2212", "-")


def _numbers(runs: Sequence[Run], judged: Sequence[Validation]) -> dict[int, dict[str, Any]]:
    """For programs, per size: the gain on val with its interval, and the distilled set's part of metrics.json by student; all as fractions."""
    gains = {one.images_per_class: {f"val_gain{end}": value for end, value in one.gain.fractions.items()} for one in judged}
    students = {student: tree.get("distilled", {}) for student, tree in metrics(table(runs)).items()}
    sizes = sorted({run.images_per_class for run in runs if run.source == "distilled" and run.images_per_class})
    return {
        size: gains.get(size, {}) | {"students": {name: one[f"ipc{size}"] for name, one in students.items() if f"ipc{size}" in one}} for size in sizes
    }


def _accuracy(found: Any) -> str:
    return percent(found.mean) + (f" ± {percent(found.sd)}" if found.sd is not None else "") + f" % ({plural(found.runs, 'run')})"


# The card


def _sheets(made: Artifact) -> dict[str, str]:
    """The file of each class's picture: its name, or its label where a name is too long for a file or may not survive a URL."""
    safe = re.compile(r"[^\W_][\w .+-]{0,59}")
    return {name: f"{name if safe.fullmatch(name) else f'_{label}'}.png" for label, name in enumerate(made.facts["classes"])}


def _draw_sheets(made: Artifact, folder: Path) -> None:
    """One picture per class: the first generation seed, as many images as fit."""
    root = made.folder / f"seed-{made.facts['seeds'][0]}"
    count = min(made.facts["images_per_class"], SHEET_COLUMNS * SHEET_ROWS)
    columns = min(count, SHEET_COLUMNS)
    for name, file in _sheets(made).items():
        pictures = [read_png(root / name / f"{number:05d}.png") for number in range(count)]
        pictures += [np.full_like(pictures[0], 255)] * (-count % columns)
        save_png(contact_sheet(np.stack(pictures).reshape(-1, columns, *pictures[0].shape)), folder / file)


def _card(
    config: PublishConfig, name: str, made: Artifact, runs: Sequence[Run], judged: Sequence[Validation], lineage: Lineage, warned: Sequence[str]
) -> str:
    environment = Environment(loader=PackageLoader("diffstill"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # noqa: S701 (Markdown)
    environment.filters |= {
        "percent": percent,
        "signed": signed,
        "plural": plural,
        "plain": plain,
        "told": _told,
        "accuracy": _accuracy,
        "literal": _literal,
        "code": _code,
        "titled": titled,
    }
    images = lineage["images"].manifest.facts
    return environment.get_template("card.md.j2").render(
        config=config,
        name=name,
        facts=made.facts,
        sha256=made.digest,
        sheets=_sheets(made),
        images=images,
        counts={split: sum(found.values()) for split, found in images["counts"].items()},
        judged=judged,
        cautions=warned,
        repeated=repeated(len(lineage["denoiser"].manifest.facts["seeds"]), len(made.facts["seeds"])),
        rows=_rows(table(runs)),
        columns=sorted({(cell.student, cell.images_per_class) for cell in table(runs) if cell.images_per_class}),
        baselines=SOURCE_NAMES,
        protocol=runs[0].protocol,
        weights_licence=lineage["generator"].manifest.facts.get("licence", ""),
        denoiser=lineage["denoiser"].manifest.facts,
        lineage=list(lineage.lines()),
        raw={"location": "", "revision": "", "md5": ""} | lineage.data(),
    )


def _rows(cells: Sequence[Cell]) -> dict[str, dict[tuple[str, int | None], Cell]]:
    """Cells by source, then by student and size; full data stands under every size."""
    rows: dict[str, dict[tuple[str, int | None], Cell]] = {}
    for source, shown in SOURCE_NAMES.items():
        if own := {(cell.student, cell.images_per_class): cell for cell in cells if cell.source == source}:
            rows[shown] = own
    return rows


def _literal(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>&|~])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Text for a code span in a table."""
    return " ".join(text.split()).replace("`", "'").replace("|", "\\|")
