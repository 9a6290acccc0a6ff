"""The table that a chain ends with, on the terminal."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from diffstill.artifacts import open_artifact, read_manifest
from diffstill.errors import without_secrets
from diffstill.lineage import Lineage
from diffstill.scores import SCORES, Chance, cautions, read_lines, repeated
from diffstill.tracking import OFF, tracking_uri

SOURCES = {"random": "random real", "untuned": "untuned generator", "distilled": "distilled", "full": "full data"}


def print_summary(artifacts: Path) -> None:
    """Print mean and sample standard deviation per source, student and IPC, and the absolute paths of the results.

    Raises `DiffstillError` where there is no whole report.
    """
    report = artifacts / "report"
    table, first, last = _table(_rows(report)), *_remarks(report)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for caution in first:
        console.print(f"caution: {caution}")
    console.print(table)
    console.print(last)
    console.print(f"report     {report.absolute() / 'report.html'}")
    for seed in read_manifest(artifacts / "distilled", "distilled").facts["seeds"][:1]:
        console.print(f"distilled  {artifacts.absolute() / 'distilled' / f'seed-{seed}'}  (an image folder; torchvision and Hugging Face open it)")
    if tracking_uri().startswith("sqlite"):
        console.print(f"MLflow     mlflow ui --backend-store-uri {shlex.quote(tracking_uri())}")
    elif tracking_uri() != OFF:
        console.print(f"MLflow     {without_secrets(tracking_uri())}")


def plain(artifacts: Path) -> dict[str, Any]:
    """The same as JSON has it: accuracies are fractions. Raises `DiffstillError` where there is no whole report."""
    report = artifacts / "report"
    rows = [{name: _number(value) for name, value in row.items()} for row in _rows(report)]
    seeds = read_manifest(artifacts / "distilled", "distilled").facts["seeds"]
    return {
        "cautions": _remarks(report)[0],
        "accuracy": rows,
        "report": str(report.absolute() / "report.html"),
        "distilled": {str(seed): str(artifacts.absolute() / "distilled" / f"seed-{seed}") for seed in seeds},
    }


def _number(text: str) -> float | int | str | None:
    """A cell of the table as a number, if it is one; None if it is empty."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text or None


def markdown(report: Path) -> str:
    """The same table in Markdown. Raises `DiffstillError` where there is no whole report."""
    table, text, (first, last) = _table(_rows(report)), io.StringIO(), _remarks(report)
    title, table.title, table.box = table.title, None, box.MARKDOWN
    Console(file=text, highlight=False, markup=False, width=10_000).print(table)
    return "\n\n".join([*(f"**Caution.** {caution}" for caution in first), str(title), text.getvalue().strip(), last]) + "\n"


def _remarks(report: Path) -> tuple[list[str], str]:
    """What to say before the table, and what its repetitions repeat."""
    made = open_artifact(report, "report")
    lineage = Lineage.of(made)
    tunes, sets = (len(lineage[name].manifest.facts["seeds"]) for name in ("denoiser", "distilled"))
    return cautions(read_lines(made.folder / SCORES), Chance.of(lineage["images"].manifest.facts)), repeated(tunes, sets)


def _rows(report: Path) -> list[dict[str, str]]:
    with (open_artifact(report, "report").folder / "accuracy.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _table(rows: list[dict[str, str]]) -> Table:
    """One row per source, one column per student and IPC."""
    columns = list(dict.fromkeys((row["student"], row["images_per_class"]) for row in rows if row["images_per_class"]))
    protocols = ", ".join(dict.fromkeys(row["protocol"] for row in rows))
    table = Table(
        title=f"Test accuracy of students, % (IPC: images per class): mean ± sd (runs); protocol {protocols}, hard labels, last epoch",
        title_justify="left",
    )
    table.add_column("source")
    for student, size in columns:
        table.add_column(f"{student}, IPC {size}", justify="right")
    for source, name in SOURCES.items():
        own = {(row["student"], row["images_per_class"]): row for row in rows if row["source"] == source}
        if own:
            table.add_row(name, *(_cell(own, student, size) for student, size in columns))
    return table


def _cell(own: Mapping[tuple[str, str], Mapping[str, str]], student: str, size: str) -> str:
    row = own.get((student, size)) or own.get((student, ""))
    if row is None:
        return "-"
    spread = f" ± {100 * float(row['sd']):.1f}" if row["sd"] else ""
    return f"{100 * float(row['mean']):.1f}{spread} ({row['runs']})"
