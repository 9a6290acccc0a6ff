"""Two distilled sets side by side: whether they are the same, where their lineages part, and their scores, settings and images.

The first set is called A, the second B. Differences are B minus A, accuracies fractions, gains in points. Nothing depends on the time or the
machine: equal sets give equal pages.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from diffstill.artifacts import Array, Artifact, Kind, open_artifact
from diffstill.config import Params, Section
from diffstill.errors import DiffstillError
from diffstill.html import data_uri, percent, plain, plural, signed, strip
from diffstill.lineage import SECTIONS, Ancestor, Lineage
from diffstill.metrics import Summary
from diffstill.pictures import read_png
from diffstill.registry import DEPRECATED, MARK, Found
from diffstill.scores import SCORES, Cell, Gain, Run, Split, difference, read_lines, table

IMAGES_SHOWN = 10
"""Images of a class on the page."""
CLASSES_SHOWN = 100
STEPS: tuple[Kind, ...] = ("images", "generator", "latents", "denoiser", "distilled")
"""What a set is made through, inputs first."""
TAGS = {MARK: "diffstill", "code": "code", "git_sha": "project's commit", "image": "container image", "licence": "licence"}
"""Tags of a version that tell of code and terms, in a reader's words."""
_NAMES: Mapping[Kind, str] = {"images": "real images", "distilled": "distilled set"}
_ORIGINS = {"untuned": "the untuned generator", "distilled": "a fine-tuned generator"}
INTERVALS = "paired where both have the same (then they share noise), else Welch's"
OUTCOMES = {"gain": "B clearly better", "loss": "A clearly better", "unclear": "no difference shown", "unknown": "no interval, so no claim"}


@dataclass(frozen=True)
class Pair:
    """One thing of both sets as text; None where a set has no such thing. `note` says what the thing means."""

    name: str
    first: str | None
    second: str | None
    note: str = ""

    @property
    def verdict(self) -> Literal["equal", "different", "only A", "only B"]:
        """How the two stand to each other."""
        if self.first is None or self.second is None:
            return "only A" if self.second is None else "only B"
        return "equal" if self.first == self.second else "different"


@dataclass(frozen=True)
class Parting:
    """Where two lineages part: what is still the same, the first artifact that is not, and why.

    `knobs` are the settings of that step that differ, `reason` says what else does, or what is left to. `later` are differing settings of steps after it.
    """

    same: tuple[Kind, ...]
    first: Kind
    knobs: tuple[Pair, ...]
    reason: str
    later: tuple[Pair, ...]


@dataclass(frozen=True)
class Difference:
    """B above A in points; `gain` is None, with the reason, where the two do not compare."""

    gain: Gain | None
    reason: str = ""


@dataclass(frozen=True)
class Score:
    """What students of one kind reach on both sets at one size; None for a set that was not judged so."""

    student: str
    images_per_class: int
    first: Cell | None
    second: Cell | None
    validation: Difference
    test: Difference


@dataclass(frozen=True, eq=False)  # arrays have no single truth
class Pictures:
    """The first images of one class, (count, channels, side, side) uint8; None for a set without that class."""

    name: str
    first: Array | None
    second: Array | None


@dataclass(frozen=True)
class Comparison:
    """All that the page shows. `common` counts the images of the same seed, class and number in both sets, and those of them with equal bytes."""

    names: tuple[str, str]
    identical: bool
    same_images: bool
    common: tuple[int, int]
    parting: Parting | None
    facts: tuple[Pair, ...]
    scores: tuple[Score, ...]
    unreported: tuple[str, ...]
    settings: Mapping[str, tuple[Pair, ...]]
    equal_settings: int
    lone_sections: Mapping[str, tuple[str, ...]]
    data: tuple[Pair, ...]
    digests: tuple[Pair, ...]
    code: tuple[Pair, ...]
    seeds: tuple[int, int]
    alone: tuple[str, ...]
    """Sets drawn several times from a fine-tune that the other set is not from, and from no other."""
    images: tuple[Pictures, ...]
    classes: int

    @property
    def headline(self) -> str:
        """The same bytes or not."""
        if self.identical:
            return "The same set, byte for byte."
        return "The same images, byte for byte, made in two ways." if self.same_images else "Not the same images."

    @property
    def findings(self) -> list[str]:
        """Where the lineages part, and what else decides, in sentences; `code` stands between backticks."""
        told = list(_parting_told(self.parting)) if self.parting else []
        if not self.same_images:
            told.append(_common_told(*self.common))
        return [*told, *_scores_told(self.scores, self.alone)]

    @property
    def settings_told(self) -> str:
        """How many knobs differ, and how many do not."""
        count = sum(map(len, self.settings.values()))
        equal = f"{plain(self.equal_settings)} {'is' if self.equal_settings == 1 else 'are'} equal"
        return f"{plural(count, 'setting')} {'differs' if count == 1 else 'differ'}, {equal}."


class _Facts(BaseModel):
    """What the manifest of a set must say."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    source: Literal["distilled", "untuned"]
    seeds: Annotated[list[int], Field(min_length=1)]
    images_per_class: int = Field(ge=1)
    classes: Annotated[list[str], Field(min_length=1)]
    side: int = Field(ge=1)
    channels: Literal[1, 3]


@dataclass(frozen=True)
class _Side:
    """One of the two sets, opened and verified."""

    letter: Literal["A", "B"]
    found: Found
    made: Artifact
    facts: _Facts
    own: Mapping[Kind, Ancestor]
    """The set and what it was made through."""
    lineage: Mapping[str, Ancestor]
    """The same and, where there is a report, all that it was made from; by name."""
    data: Mapping[str, str]
    runs: tuple[Run, ...] | None

    @classmethod
    def open(cls, letter: Literal["A", "B"], found: Found) -> _Side:
        made, lineage = open_artifact(found.folder(), "distilled"), found.lineage()
        judged = any(one.manifest.kind == "report" for one in lineage.artifacts)
        runs = tuple(read_lines(found.folder("report") / SCORES)) if judged else None
        own = {one.manifest.kind: one for one in Lineage.of(made).artifacts}
        return cls(letter, found, made, _facts(made), own, _by_name(lineage), lineage.data(), runs)

    @property
    def name(self) -> str:
        return self.found.version.ref if self.found.version else self.found.ref

    @property
    def tags(self) -> Mapping[str, str]:
        return self.found.version.tags if self.found.version else {}

    @property
    def images(self) -> dict[str, str]:
        """SHA-256 of every image by its path."""
        return {path: digest for path, digest in self.made.manifest.files.items() if re.fullmatch(r"seed-\d+/[^/]+/\d+\.png", path)}


def compare(first: Found, second: Found) -> Comparison:
    """Fetch, verify and compare two sets. Raises `DiffstillError` for what is no whole distilled set, or has gaps in its lineage."""
    one, other = _Side.open("A", first), _Side.open("B", second)
    settings, equal, lone = _settings(one, other)
    classes = list(dict.fromkeys([*one.facts.classes, *other.facts.classes]))
    shared = one.images.keys() & other.images.keys()
    return Comparison(
        names=(one.name, other.name),
        identical=one.made.digest == other.made.digest,
        same_images=one.images == other.images,
        common=(len(shared), sum(one.images[path] == other.images[path] for path in shared)),
        parting=_parting(one, other),
        facts=tuple(_joined(_described(one), _described(other))),
        scores=_scores(one, other),
        unreported=tuple(side.letter for side in (one, other) if side.runs is None),
        settings=settings,
        equal_settings=equal,
        lone_sections=lone,
        data=tuple(_joined(one.data, other.data)),
        digests=tuple(_joined(_digests(one), _digests(other))),
        code=tuple(_joined(_code(one), _code(other))),
        seeds=(one.facts.seeds[0], other.facts.seeds[0]),
        alone=_alone(one, other),
        images=tuple(Pictures(name, _pictures(one, name), _pictures(other, name)) for name in classes[:CLASSES_SHOWN]),
        classes=len(classes),
    )


def _alone(one: _Side, other: _Side) -> tuple[str, ...]:
    tunes = [side.own.get("denoiser") for side in (one, other)]
    if tunes[0] and tunes[1] and tunes[0].digest == tunes[1].digest:
        return ()
    return tuple(
        side.letter for side, tune in zip((one, other), tunes, strict=True) if tune and len(tune.manifest.facts["seeds"]) == 1 < len(side.facts.seeds)
    )


def _facts(made: Artifact) -> _Facts:
    try:
        return _Facts.model_validate(made.facts)
    except ValidationError as error:
        knob = ".".join(map(str, error.errors()[0]["loc"]))
        raise DiffstillError(f"{made.folder}: its manifest does not say what a distilled set must (`{knob}`); make the set anew") from error


def _by_name(lineage: Lineage) -> dict[str, Ancestor]:
    """Artifacts by name; further ones of a name are numbered."""
    found: dict[str, Ancestor] = {}
    times: Counter[str] = Counter()
    for one in lineage.artifacts:
        times[one.name] += 1
        found[one.name if times[one.name] == 1 else f"{one.name} ({times[one.name]})"] = one
    return found


# Where the lineages part


def _parting(one: _Side, other: _Side) -> Parting | None:
    """The first step whose artifacts differ: its inputs are the same, so its settings made the difference, or what no manifest tells."""
    shared = [kind for kind in STEPS if kind in one.own and kind in other.own]
    apart = [kind for kind in shared if one.own[kind].digest != other.own[kind].digest]
    if not apart:
        return None
    first, *rest = apart
    same = tuple(kind for kind in shared if kind not in apart)
    knobs = _step_knobs(one, other, first)
    return Parting(same, first, knobs, _reason(one, other, first, knobs), tuple(pair for kind in rest for pair in _step_knobs(one, other, kind)))


def _step_knobs(one: _Side, other: _Side, kind: Kind) -> tuple[Pair, ...]:
    return tuple(pair for pair in _knobs(SECTIONS[kind], one.own[kind], other.own[kind]) if pair.verdict != "equal")


def _reason(one: _Side, other: _Side, kind: Kind, knobs: Sequence[Pair]) -> str:
    """What made the difference beside settings, or is left to have made it where no setting did."""
    if kind == "distilled" and one.facts.source != other.facts.source:
        return f"A is drawn from {_ORIGINS[one.facts.source]}, B from {_ORIGINS[other.facts.source]}"
    if knobs:
        return ""
    commits = [side.tags.get("code") or side.tags.get("git_sha") for side in (one, other)]
    data = "the raw data, " if kind == "images" else "the imported weights, " if one.own[kind].manifest.config.get("location") else ""
    known = f" (published with {commits[0]} and {commits[1]})" if all(commits) and commits[0] != commits[1] else ""
    return f"the settings and inputs of this step are equal, so {data}the code{known}, its libraries or the machine made the difference"


def _parting_told(parting: Parting) -> Iterator[str]:
    other = _NAMES.get(parting.first, parting.first)
    same = [_NAMES.get(kind, kind) for kind in parting.same]
    start = f"Same {_listed(same)}, other {other}" if same else f"They part at the first step, the {other}"
    yield f"{start}: {'; '.join(filter(None, [parting.reason, _knobs_told(parting.knobs)]))}."
    if parting.later:
        yield f"Settings of later steps differ too: {_knobs_told(parting.later)}."


def _common_told(shared: int, equal: int) -> str:
    if not shared:
        return "No image of one has a counterpart of the same seed, class and number in the other."
    return f"Equal bytes: {plain(equal)} of the {plural(shared, 'image')} with the same seed, class and number in both."


def _scores_told(scores: Sequence[Score], alone: Sequence[str]) -> Iterator[str]:
    """How often each set is shown to be better: on val where it can be told, else on test."""
    for split, differences in (("val", [score.validation for score in scores]), ("test", [score.test for score in scores])):
        if verdicts := [one.gain.verdict for one in differences if one.gain]:
            count = plural(len(verdicts), "comparison")
            yield f"On {split}, B is shown to be better in {verdicts.count('gain')} of {count}, A in {verdicts.count('loss')}."
            if alone:
                yield f"One fine-tune alone stands behind {_listed(alone)}: a claim about the method needs several (`finetune.seeds`)."
            return


def _knobs_told(knobs: Sequence[Pair], most: int = 3) -> str:
    told = [f"`{knob.name}` {_short(knob.first)} against {_short(knob.second)}" for knob in knobs[:most]]
    return ", ".join(told) + (f" and {len(knobs) - most} more" if len(knobs) > most else "")


def _short(value: str | None, length: int = 60) -> str:
    shown = "absent" if value is None else value
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# Scores


def _scores(one: _Side, other: _Side) -> tuple[Score, ...]:
    """One for every student and size that either set was judged with, in ascending order."""
    cells = [
        {(cell.student, cell.images_per_class or 0): cell for cell in table(side.runs or ()) if cell.source == "distilled"} for side in (one, other)
    ]
    return tuple(_score(one, other, *column, cells[0].get(column), cells[1].get(column)) for column in sorted(cells[0].keys() | cells[1].keys()))


def _score(one: _Side, other: _Side, student: str, size: int, first: Cell | None, second: Cell | None) -> Score:
    runs = [[run for run in side.runs or () if run.column == ("distilled", student, size)] for side in (one, other)]
    reason = _hindrance(one, other, *runs)
    if reason:
        return Score(student, size, first, second, Difference(None, reason), Difference(None, reason))
    return Score(student, size, first, second, _difference("accuracy_val", *runs), _difference("accuracy_test", *runs))


def _hindrance(one: _Side, other: _Side, first: Sequence[Run], second: Sequence[Run]) -> str:
    """Why there is no difference to tell; empty if there is one."""
    for side, own in ((one, first), (other, second)):
        if not own:
            return f"not comparable: {side.letter} {'comes without a report' if side.runs is None else 'has no runs of this student and size'}"
    apart = ["judged on other real images"] if {run.images_digest for run in first} != {run.images_digest for run in second} else []
    protocols = [", ".join(sorted({run.protocol for run in runs})) for runs in (first, second)]
    if protocols[0] != protocols[1]:
        apart.append(f"judged by protocol {protocols[0]} against {protocols[1]}")
    seeds = [", ".join(map(str, sorted({run.student_seed for run in runs}))) for runs in (first, second)]
    if seeds[0] != seeds[1]:
        apart.append(f"judged by student seeds {seeds[0]} against {seeds[1]}")
    if apart:
        return f"not comparable: {', '.join(apart)}"
    return "the same runs" if one.made.digest == other.made.digest and list(first) == list(second) else ""


def _difference(split: Split, first: Sequence[Run], second: Sequence[Run]) -> Difference:
    found = difference(second, first, split)
    return Difference(found) if found else Difference(None, "not comparable: not judged on a val split")


# Settings


def _settings(one: _Side, other: _Side) -> tuple[dict[str, tuple[Pair, ...]], int, dict[str, tuple[str, ...]]]:
    """Knobs that differ by section, the number of equal ones, and the sections that A or B alone has."""
    sections = [_sections(side, _ambiguous(one) | _ambiguous(other)) for side in (one, other)]
    both = [title for title in sections[0] if title in sections[1]]
    pairs = {title: _knobs(SECTIONS[sections[0][title].manifest.kind], sections[0][title], sections[1][title]) for title in both}
    differing = {title: found for title in both if (found := tuple(pair for pair in pairs[title] if pair.verdict != "equal"))}
    lone = {letter: tuple(title for title in own if title not in both) for letter, own in zip("AB", sections, strict=True)}
    equal = sum(pair.verdict == "equal" for found in pairs.values() for pair in found)
    return differing, equal, {letter: titles for letter, titles in lone.items() if titles}


def _ambiguous(side: _Side) -> set[str]:
    """Sections that made artifacts of one lineage with unlike values."""
    values: dict[str, set[str]] = defaultdict(set)
    for one in side.lineage.values():
        values[SECTIONS[one.manifest.kind]].add(json.dumps(one.manifest.config, sort_keys=True))
    return {section for section, found in values.items() if len(found) > 1}


def _sections(side: _Side, ambiguous: set[str]) -> dict[str, Ancestor]:
    """An artifact that each section made; where one is ambiguous, every artifact stands for itself."""
    found = {}
    for name, one in side.lineage.items():
        section = SECTIONS[one.manifest.kind]
        found[f"{section} of {name}" if section in ambiguous else section] = one
    return found


def _knobs(section: str, first: Ancestor, second: Ancestor) -> tuple[Pair, ...]:
    """All knobs of a section, nested ones by dotted names; those unknown here without a description."""
    told = _descriptions(Params)
    values = (dict(_flat(one.manifest.config, f"{section}.")) for one in (first, second))
    return tuple(
        Pair(pair.name, pair.first, pair.second, told.get(pair.name, "not a knob of this version of diffstill")) for pair in _joined(*values)
    )


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in sorted(config.items()):
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False)


def _descriptions(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found |= _descriptions(kind, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = field.description or ""
    return found


# Facts, data and code


def _joined(first: Mapping[str, str | None], second: Mapping[str, str | None]) -> Iterator[Pair]:
    """The values of two mappings by name, those of the first in front; nothing where neither has any."""
    for name in dict.fromkeys([*first, *second]):
        if first.get(name) is not None or second.get(name) is not None:
            yield Pair(name, first.get(name), second.get(name))


def _digests(side: _Side) -> dict[str, str]:
    return {name: one.digest for name, one in side.lineage.items()}


def _code(side: _Side) -> dict[str, str | None]:
    named = {shown: side.tags.get(name) for name, shown in TAGS.items()}
    return named | (_environment(side.tags["environment"]) if "environment" in side.tags else {})


def _environment(tag: str) -> dict[str, str]:
    """What the tag lists, each by its name. Anybody may edit tags: one that is no such list is shown as it stands."""
    try:
        return {f"environment: {name}": str(value) for name, value in json.loads(tag).items()}
    except (ValueError, AttributeError):
        return {"environment": tag}


def _described(side: _Side) -> dict[str, str | None]:
    facts, version = side.facts, side.found.version
    return {
        "Aliases": (", ".join(version.aliases) or "none") if version else None,
        "Deprecated": side.tags.get(DEPRECATED),
        "Images per class (IPC)": plain(facts.images_per_class),
        "Classes": plain(len(facts.classes)),
        "Generation seeds": ", ".join(map(str, facts.seeds)),
        "Images per seed": plain(len(facts.classes) * facts.images_per_class),
        "Resolution": f"{facts.side} × {facts.side} pixels, {'grey' if facts.channels == 1 else 'colour'}",
        "Drawn from": _ORIGINS[facts.source],
    }


# Images


def _pictures(side: _Side, name: str) -> Array | None:
    """The first images of a class from the first generation seed. Files come from elsewhere: only those that the manifest lists are opened."""
    if name not in side.facts.classes:
        return None
    paths = [f"seed-{side.facts.seeds[0]}/{name}/{number:05d}.png" for number in range(min(IMAGES_SHOWN, side.facts.images_per_class))]
    for path in paths:
        if path not in side.images:
            raise DiffstillError(f"{side.made.folder}: its manifest lists no {path}, though its facts promise it; make the set anew")
    return np.stack([_picture(side, path) for path in paths])


def _picture(side: _Side, path: str) -> Array:
    wanted = (side.facts.channels, side.facts.side, side.facts.side)
    try:
        with Image.open(side.made.folder / path) as image:
            fits = (image.format, image.size) == ("PNG", wanted[1:])
        pixels = read_png(side.made.folder / path) if fits else None
    except (OSError, Image.DecompressionBombError) as error:
        raise DiffstillError(f"{side.made.folder / path}: cannot be read as PNG ({error}); make the set anew") from error
    if pixels is None or pixels.dtype != np.uint8 or pixels.shape != wanted:
        raise DiffstillError(
            f"{side.made.folder / path}: is no PNG of {wanted[1]} x {wanted[2]} pixels in {plural(wanted[0], 'channel')}; make the set anew"
        )
    return pixels


# The page and the terminal


def render(comparison: Comparison) -> str:
    """The comparison as one HTML text: styles and pictures inside, no script, no outside request."""
    environment = Environment(loader=PackageLoader("diffstill"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "signed": signed, "plural": plural, "plain": plain, "coded": _coded, "address": _address}
    return environment.get_template("compare.html.j2").render(comparison=comparison, outcomes=OUTCOMES, intervals=INTERVALS, small=_small(comparison))


def _coded(sentence: str) -> Markup:
    """`code` between backticks as an element, all else escaped."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(sentence))))  # noqa: S704 (escaped before)


def _address(pictures: Array) -> str:
    """The pictures side by side as a `data:` address, each a whole multiple of a small side and at most 96 pixels wide."""
    side = pictures.shape[-1]
    return data_uri(strip(pictures, side * -(-48 // side) if side <= 96 else 96))


def _small(comparison: Comparison) -> bool:
    """Whether pictures are so small that they are enlarged by repeating pixels."""
    return all(pictures.shape[-1] <= 64 for row in comparison.images for pictures in (row.first, row.second) if pictures is not None)


def summarised(found: Comparison) -> dict[str, Any]:
    """What the page says in words, and the settings that differ, as JSON has it."""
    return {
        "sets": found.names,
        "identical": found.identical,
        "same_images": found.same_images,
        "headline": found.headline,
        "findings": found.findings,
        "settings": {section: {one.name: [one.first, one.second] for one in pairs} for section, pairs in found.settings.items()},
    }


def text(comparison: Comparison) -> str:
    """The comparison in short, for a terminal: no control character of a name or a value gets there."""
    file = io.StringIO()
    console = Console(file=file, highlight=False, markup=False, soft_wrap=True, width=10_000)
    for letter, name in zip("AB", comparison.names, strict=True):
        console.print(f"{letter}  {name}")
    console.print(" ".join([comparison.headline, *comparison.findings]).replace("`", ""))
    if comparison.scores:
        console.print(_score_table(comparison.scores))
    for note in _score_notes(comparison):
        console.print(note)
    console.print(comparison.settings_told)
    for pair in (pair for found in comparison.settings.values() for pair in found):
        console.print(f"  {pair.name}  {_short(pair.first)} against {_short(pair.second)}")
    for letter, titles in comparison.lone_sections.items():
        console.print(f"  only {letter} tells of {_listed(titles)}")
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", "\ufffd", file.getvalue().rstrip())


def _score_table(scores: Sequence[Score]) -> Table:
    found = Table(
        title=f"Accuracy of students, % (IPC: images per class): mean ± sd (runs); B − A in points, 95 % interval over generation seeds, {INTERVALS}",
        title_justify="left",
    )
    found.add_column("student")
    for head in ("IPC", "val A", "val B", "B − A", "test A", "test B", "B − A"):
        found.add_column(head, justify="right")
    for score in scores:
        val = [cell.validation if cell else None for cell in (score.first, score.second)]
        test = [cell.test if cell else None for cell in (score.first, score.second)]
        cells = [*map(_spread, val), _points(score.validation), *map(_spread, test), _points(score.test)]
        found.add_row(score.student, str(score.images_per_class), *cells)
    return found


def _spread(found: Summary | None) -> str:
    if found is None:
        return "-"
    return f"{percent(found.mean)}{'' if found.sd is None else f' ± {percent(found.sd)}'} ({found.runs})"


def _points(difference: Difference) -> str:
    over = difference.gain
    if over is None:
        return "-"
    return signed(over.points) + ("" if over.low is None or over.high is None else f" ({signed(over.low)} to {signed(over.high)})")


def _score_notes(comparison: Comparison) -> Iterator[str]:
    """What the table leaves out: sets without a report, and why there are no differences."""
    for letter in comparison.unreported:
        yield f"{letter} comes without a report, so its scores are not known"
    reasons = dict.fromkeys(difference.reason for score in comparison.scores for difference in (score.validation, score.test) if difference.reason)
    yield from (f"B − A: {reason}" for reason in reasons)
