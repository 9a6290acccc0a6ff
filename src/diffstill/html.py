"""The report page, its figures and its picture strips: from plain results to SVG, PNG and one self-contained HTML file.

The same drawing functions serve the page, where colours follow the reader's light or dark theme through CSS variables,
and the PNG files. Nothing here depends on the time, the machine or the fonts installed: equal results give equal bytes.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image

from diffstill.metrics import moving_average
from diffstill.pictures import to_image
from diffstill.scores import SOURCE_NAMES, Cell, Source

Axes = Any
Pixels = npt.NDArray[np.uint8]

_MARKERS: Mapping[Source, str] = {"random": "o", "untuned": "s", "distilled": "D"}
_LIGHT = {
    "ink": "#1c2430",
    "muted": "#667085",
    "line": "#dfe3ea",
    "random": "#8a6d1f",
    "untuned": "#c2571a",
    "distilled": "#2456c8",
    "full": "#1c7c54",
}
_THEMED = {role: f"#0000{number:02x}" for number, role in enumerate(_LIGHT, start=1)}
_STYLE: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": "diffstill", "font.size": 9.5, "font.family": "DejaVu Sans"}
_PANEL = (4.4, 3.1)


@dataclass(frozen=True)
class Curve:
    """The log of one fine-tune: columns of its `metrics.csv` by name, equally long."""

    seed: int
    columns: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class GridRow:
    """One class: its name and one row of pictures per source, each (count, channels, side, side) uint8."""

    name: str
    pictures: Mapping[str, Pixels]


@dataclass(frozen=True)
class Verdict:
    """What one comparison says: its subject, which may be empty, and a sentence; `tone` picks the colour."""

    tone: Literal["gain", "loss", "unclear", "unknown"]
    text: str
    subject: str = ""


@dataclass(frozen=True)
class Setting:
    """One knob of one stage, as it stands in the manifest of an input."""

    name: str
    value: str
    description: str


@dataclass(frozen=True)
class Page:
    """Everything that the page shows, in the reader's words; figures are drawn from `cells`, `curves` and `grid`."""

    title: str
    lead: str
    facts: Sequence[tuple[str, str]]
    cautions: Sequence[str]
    headline: Verdict
    verdicts: Sequence[Verdict]
    cells: Sequence[Cell]
    chance: float
    caption: str
    footnotes: Sequence[str]
    grid: Sequence[GridRow]
    grid_caption: str
    curves: Sequence[Curve]
    capacities: tuple[int, int]
    memories: bool
    memory_caption: str
    settings: Mapping[str, Sequence[Setting]]
    digests: Sequence[tuple[str, str]]

    @property
    def students(self) -> dict[str, list[int]]:
        """Students, and the numbers of images per class judged with each, in ascending order."""
        names = sorted({cell.student for cell in self.cells})
        sizes = {name: {cell.images_per_class for cell in self.cells if cell.student == name} for name in names}
        return {name: sorted(size for size in found if size is not None) for name, found in sizes.items()}

    @property
    def pixelated(self) -> bool:
        """Whether pictures are so small that the page enlarges them by repeating pixels."""
        return bool(max(pictures.shape[-1] for row in self.grid for pictures in row.pictures.values()) <= 64)

    def cell(self, source: str, student: str, images_per_class: int | None) -> Cell | None:
        """The cell of the table, or None where nothing was run."""
        return next((cell for cell in self.cells if (cell.source, cell.student, cell.images_per_class) == (source, student, images_per_class)), None)


@style.context(["default", _STYLE])
def render(page: Page) -> str:
    """The page as one HTML text: styles, figures and pictures inside, no script, no outside request."""
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            source_names=SOURCE_NAMES,
            sources=[source for source in SOURCE_NAMES if any(cell.source == source for cell in page.cells)],
            strips=[{name: data_uri(strip(pictures, _tile(page.grid))) for name, pictures in row.pictures.items()} for row in page.grid],
            **_inline_figures(page),
        )
    )


def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("diffstill"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "signed": signed, "plural": plural, "plain": plain}
    return environment


def _inline_figures(page: Page) -> dict[str, list[Markup]]:
    """The figures of the page by section, one panel each, in the reader's theme."""
    panels = [(_accuracy_panel(page, student, _THEMED), f"Test accuracy over images per class, {student}") for student in page.students]
    curves = [(_loss_panel(page.curves, _THEMED), "Diffusion loss over fine-tuning steps")]
    if page.memories:
        curves.append((_terms_panel(page.curves, _THEMED), "The memory terms L_real and L_gen over fine-tuning steps"))
        curves.append((_fill_panel(page, _THEMED), "Entries per class in both memories over fine-tuning steps"))
    sections = {"accuracy": panels, "fine_tuning": curves}
    return {name: [svg(figure, f"{name}-{number}", alt) for number, (figure, alt) in enumerate(found)] for name, found in sections.items()}


@style.context(["default", _STYLE])
def figures(page: Page) -> dict[str, bytes]:
    """The figures as PNG files by name, on white."""
    accuracy, memory, loss = (_figure(panels) for panels in (len(page.students), 2, 1))
    for axes, student in zip(accuracy.axes, page.students, strict=True):
        _draw_accuracy(axes, page, student, _LIGHT)
    _draw_terms(memory.axes[0], page.curves, _LIGHT)
    _draw_fill(memory.axes[1], page, _LIGHT)
    _draw_loss(loss.axes[0], page.curves, _LIGHT)
    if not page.memories:
        memory.suptitle("fine-tuned without memories", fontsize=10)
    return {
        "accuracy_vs_ipc.png": png(accuracy),
        "memory_terms.png": png(memory),
        "loss.png": png(loss),
        "grid.png": png(_grid_figure(page.grid), dpi=100),
    }


def percent(fraction: float) -> str:
    """A fraction as per cent with one decimal, without the sign."""
    return f"{100 * fraction:.1f}"


def signed(points: float) -> str:
    """Points with one decimal and their sign, by a true minus; with as many more (up to four) as tell them from zero."""
    for digits in (1, 2, 3, 4):
        text = f"{points:+.{digits}f}"
        if float(text):
            return text.replace("-", "\u2212")
    return "0.0"


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`: the number with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def plain(number: float) -> str:
    """A number without needless digits, thousands set apart by a thin space."""
    text = f"{number:,.1f}".removesuffix(".0")
    return text.replace(",", "\u202f")


def svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an inline SVG element that says `alt` aloud: ids made unique by `name`, colours turned into CSS variables, no outside name."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    element = text.getvalue()
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element[element.index("<svg") :], flags=re.DOTALL)
    element = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", element).replace("xlink:href", "href")
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", element, count=2)
    element = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", element)
    for role, colour in _THEMED.items():
        element = element.replace(colour, f"var(--{role})")
    return Markup('<svg role="img" aria-label="{}"').format(alt) + Markup(element.removeprefix("<svg").strip())  # noqa: S704 (matplotlib escapes the texts)


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG bytes on white, without metadata."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def strip(pictures: Pixels, tile: int, gap: int = 2) -> Image.Image:
    """Pictures (count, channels, side, side) beside each other, each `tile` pixels wide, transparent gaps between.

    Enlarged by repeating pixels, so that a small picture stays what it is; reduced smoothly.
    """
    row = Image.new("RGBA", (len(pictures) * (tile + gap) - gap, tile))
    for number, picture in enumerate(pictures):
        image = to_image(picture).convert("RGBA")
        smaller = tile < image.width
        row.paste(image.resize((tile, tile), Image.Resampling.LANCZOS if smaller else Image.Resampling.NEAREST), (number * (tile + gap), 0))
    return row


def data_uri(image: Image.Image) -> str:
    """The image as PNG in a `data:` address."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _tile(grid: Sequence[GridRow]) -> int:
    """Pixels per picture in a grid: a whole multiple of small sides, at most 96, and 48 where there are very many pictures."""
    shapes = [pictures.shape for row in grid for pictures in row.pictures.values()]
    side = max(shape[-1] for shape in shapes)
    bound = 96 if sum(shape[0] for shape in shapes) <= 1000 else 48
    return side * -(-48 // side) if side <= bound else bound


def _figure(panels: int) -> Figure:
    """An empty figure with `panels` axes side by side."""
    figure = Figure(figsize=(_PANEL[0] * panels, _PANEL[1]), layout="constrained")
    figure.subplots(1, panels)
    return figure


def _accuracy_panel(page: Page, student: str, colours: Mapping[str, str]) -> Figure:
    figure = _figure(1)
    _draw_accuracy(figure.axes[0], page, student, colours)
    return figure


def _loss_panel(curves: Sequence[Curve], colours: Mapping[str, str]) -> Figure:
    figure = _figure(1)
    _draw_loss(figure.axes[0], curves, colours)
    return figure


def _terms_panel(curves: Sequence[Curve], colours: Mapping[str, str]) -> Figure:
    figure = _figure(1)
    _draw_terms(figure.axes[0], curves, colours)
    return figure


def _fill_panel(page: Page, colours: Mapping[str, str]) -> Figure:
    figure = _figure(1)
    _draw_fill(figure.axes[0], page, colours)
    return figure


def _draw_accuracy(axes: Axes, page: Page, student: str, colours: Mapping[str, str]) -> None:
    """Accuracy over images per class: mean as points, lowest to highest run as a band, full data as a dashed line, chance as a dotted one."""
    for source, marker in _MARKERS.items():
        cells = [cell for size in page.students[student] if (cell := page.cell(source, student, size))]
        if cells:
            sizes = [cell.images_per_class for cell in cells]
            _draw_band(axes, sizes, cells, colours[source])
            axes.plot(sizes, [100 * cell.test.mean for cell in cells], marker=marker, color=colours[source], label=SOURCE_NAMES[source], lw=1.8, ms=5)
    if full := page.cell("full", student, None):
        axes.axhline(100 * full.test.mean, color=colours["full"], ls=(0, (5, 3)), lw=1.5, label=SOURCE_NAMES["full"])
    axes.axhline(100 * page.chance, color=colours["muted"], ls=":", lw=1.5, label="chance")
    axes.autoscale_view(scalex=False)  # axhline keeps limits that just hold it, so it would lie on the frame
    _log_sizes(axes, page.students[student])
    _finish(axes, colours, student, "images per class", "test accuracy, %")


def _draw_band(axes: Axes, sizes: Sequence[int | None], cells: Sequence[Cell], colour: str) -> None:
    lowest, highest = ([100 * value for value in ends] for ends in ([cell.lowest for cell in cells], [cell.highest for cell in cells]))
    if len(cells) > 1:
        axes.fill_between(sizes, lowest, highest, color=colour, alpha=0.16, lw=0)
    else:
        axes.vlines(sizes, lowest, highest, color=colour, alpha=0.35, lw=5)


def _log_sizes(axes: Axes, sizes: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each size that was judged, and nowhere else."""
    axes.set_xscale("log")
    axes.set_xticks(sizes, labels=[str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    if sizes:
        axes.set_xlim(sizes[0] / 1.25, sizes[-1] * 1.25)


def _draw_loss(axes: Axes, curves: Sequence[Curve], colours: Mapping[str, str]) -> None:
    """The diffusion loss of each fine-tune: faint as logged, strong as a moving average over a twentieth of the lines."""
    for curve in curves:
        loss = curve.columns["loss"]
        window = max(1, len(loss) // 20)
        first = curve is curves[0]
        axes.plot(curve.columns["step"], loss, color=colours["muted"], alpha=0.5, lw=0.8, label="as logged" if first else None)
        smooth = moving_average(loss, window)
        axes.plot(curve.columns["step"], smooth, color=colours["distilled"], lw=1.6, label=f"mean of {window} lines" if first else None)
    _finish(axes, colours, "Diffusion loss", "fine-tuning step", "mean squared error of the noise")


def _draw_terms(axes: Axes, curves: Sequence[Curve], colours: Mapping[str, str]) -> None:
    """L_real and L_gen of each fine-tune, unweighted, smoothed like the loss."""
    _draw_pairs(axes, curves, {"loss_real": "L_real, representativeness", "loss_gen": "L_gen, diversity"}, colours)
    _finish(axes, colours, "Memory terms, before their weights", "fine-tuning step", "term")


def _draw_fill(axes: Axes, page: Page, colours: Mapping[str, str]) -> None:
    """Mean entries per class in both memories; their capacities as dashed lines."""
    _draw_pairs(axes, page.curves, {"memory_real": "real", "memory_gen": "generated"}, colours)
    for capacity, role in zip(page.capacities, ("distilled", "untuned"), strict=True):
        axes.axhline(capacity, color=colours[role], ls=(0, (5, 3)) if role == "distilled" else (4, (5, 3)), lw=1.2)
    axes.plot([], [], color=colours["muted"], ls=(0, (5, 3)), lw=1.2, label="capacity")
    axes.set_ylim(bottom=0, top=1.08 * max(page.capacities))
    _finish(axes, colours, "Memory fill", "fine-tuning step", "entries per class")


def _draw_pairs(axes: Axes, curves: Sequence[Curve], labels: Mapping[str, str], colours: Mapping[str, str]) -> None:
    for (column, label), role in zip(labels.items(), ("distilled", "untuned"), strict=True):
        for curve in curves:
            values = curve.columns[column]
            smooth = moving_average(values, max(1, len(values) // 20)) if column.startswith("loss") else values
            axes.plot(curve.columns["step"], smooth, color=colours[role], lw=1.6, label=label if curve is curves[0] else None)


def _finish(axes: Axes, colours: Mapping[str, str], title: str, across: str, up: str) -> None:
    """Title, labels, legend and a quiet frame, in the theme's colours. Names are shown as they are: `$` starts no formula."""
    rows = _legend(axes, colours)
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=colours["ink"], pad=12 + 16 * rows, parse_math=False)
    axes.set_xlabel(across, color=colours["muted"])
    axes.set_ylabel(up, color=colours["muted"])
    axes.tick_params(colors=colours["muted"], length=0, labelsize=9)
    axes.grid(axis="y", color=colours["line"], lw=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(colours["line"])


def _legend(axes: Axes, colours: Mapping[str, str]) -> int:
    """A legend above the axes, at most three entries to a row; returns the number of rows."""
    entries = len(axes.get_legend_handles_labels()[0])
    if not entries:
        return 0
    columns = entries if entries <= 3 else 2
    look = {"frameon": False, "fontsize": 8.5, "labelcolor": colours["ink"], "handlelength": 2.0, "columnspacing": 1.2, "borderpad": 0.2}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.03), borderaxespad=0.0, ncols=columns, **look).set_in_layout(False)
    return -(-entries // columns)


def _grid_figure(grid: Sequence[GridRow]) -> Figure:
    """All rows of pictures with their class and source names, one image pixel per figure pixel at 100 dots per inch."""
    rows = [{name: strip(pictures, _tile(grid)) for name, pictures in row.pictures.items()} for row in grid]
    widths = {name: max(row[name].width for row in rows) for name in rows[0]}
    left, top, gap, height = 110, 30, 16, _tile(grid) + 6
    size = (left + sum(widths.values()) + gap * len(widths), top + height * len(rows) + gap)
    figure = Figure(figsize=(size[0] / 100, size[1] / 100))
    for number, (row, images) in enumerate(zip(grid, rows, strict=True)):
        y = size[1] - top - height * number - height // 2
        figure.text((left - 12) / size[0], y / size[1], _shortened(row.name), ha="right", va="center", fontsize=9, parse_math=False)
        x = left
        for name, image in images.items():
            figure.figimage(np.asarray(image), xo=x, yo=y - image.height // 2, origin="upper")
            x += widths[name] + gap
    x = left
    for name, width in widths.items():
        figure.text(x / size[0], 1 - 18 / size[1], name, ha="left", va="center", fontsize=10, fontweight="bold")
        x += width + gap
    return figure


def _shortened(name: str, length: int = 14) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}\u2026"
