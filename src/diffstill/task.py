"""What a component of the pipeline calls: one stage, with the artifacts and parameters that Kubeflow hands it.

Nothing here knows Kubeflow: an artifact is anything with a `path` (and, for several nodes, a `uri`), metrics anything that takes a name and a number.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffstill.config import Params, read_json
from diffstill.doctor import Needs, preflight
from diffstill.errors import DiffstillError
from diffstill.launch import Work, device_here, launch, one_message, ranks_here
from diffstill.run import STAGES, run_stage
from diffstill.summary import markdown
from diffstill.tracking import open_chain
from diffstill.trainjob import Order, train

log = logging.getLogger("diffstill")


class Artifact(Protocol):
    """A file or folder that Kubeflow has brought here, or will fetch from here."""

    path: str


class Metrics(Artifact, Protocol):
    """Numbers that Kubeflow shows beside the task, and a file for them."""

    def log_metric(self, metric: str, value: float) -> None:
        """Keep one number."""
        ...


Given = Artifact | Sequence[Artifact] | str | None


def run_task(
    stage: str,
    config: str,
    *,
    metrics: Metrics,
    step: str = "",
    data_version: str = "",
    sheet: Artifact | None = None,
    page: Artifact | None = None,
    summary: Artifact | None = None,
    **given: Given,
) -> None:
    """Run a stage with its section of the parameters as JSON, and its artifacts and options by the names of its signature.

    Numbers go to `metrics`; pictures, the page and the table or card, where asked for, to files that Kubeflow's pages show.
    `data_version` is there for Kubeflow's cache, which knows a task by what it is given. Bad input ends the process with
    one message and exit code 2, a set that the gate refuses with 3.
    """
    with one_message():
        if data_version:
            _refuse_macro(data_version)
            log.info("data version %s", data_version)
        options: dict[str, Any] = {name: value for name, value in given.items() if isinstance(value, str) and value}
        paths: dict[str, Any] = {name: _path(value) for name, value in given.items() if value and not isinstance(value, str)}
        measured = _measured(stage, config, step or stage, paths, options, given)
        _write(metrics, json.dumps(measured))
        for name, value in measured.items():
            metrics.log_metric(name, value)
        made = paths[STAGES[stage].output]
        if sheet:
            _write(sheet, _pictures(sorted(made.glob("seed-*.png"))))
        if page:
            shutil.copyfile(made / "report.html", page.path)
        if summary:
            _write(summary, _card(made) if stage == "publish" else markdown(made))


def _measured(stage: str, config: str, step: str, paths: Mapping[str, Any], options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, float]:
    """Run the stage in this process, or, if it can, in one per GPU, or on the nodes of a TrainJob."""
    section = read_json(config, type(Params.model_fields[stage].default))
    if STAGES[stage].in_ranks:
        work = Work(stage=stage, config=config, step=step, paths={name: str(path) for name, path in paths.items()})
        if order := os.environ.get("DIFFSTILL_TRAINJOB"):
            return train(work, read_json(order, Order), STAGES[stage].output, {name: given[name].uri for name in paths})
        if (ranks := ranks_here()) > 1:
            return launch(work, ranks)
    return run_stage(stage, section, paths, step=step, device=device_here() if STAGES[stage].on_device else "cpu", **options)


def _refuse_macro(data_version: str) -> None:
    """Of a schedule whose runs cannot be told apart the cache would serve the first for ever."""
    if data_version.startswith("[["):
        raise DiffstillError(
            f"the data version is {data_version!r}: this Kubeflow does not fill in the time of a run, so that each run of the schedule would be served the "
            "data of the first; use Kubeflow Pipelines 2.17 or later, or submit runs one by one"
        )


def run_preflight(needs: str, params: str) -> None:
    """Check that the run will find what it needs, and open its run in MLflow, before GPU time is spent."""
    with one_message():
        preflight(read_json(needs, Needs))
        open_chain(read_json(params, Params))


def _path(value: Any) -> Path | list[Path]:
    return [Path(one.path) for one in value] if isinstance(value, Sequence) else Path(value.path)


def _write(artifact: Artifact, text: str) -> None:
    Path(artifact.path).write_text(text, encoding="utf-8")


def _card(made: Path) -> str:
    """The card without its pictures: they are files beside it, which a page of Kubeflow does not reach."""
    return re.sub(r"^!\[.*\]\(sheets/.*\)\n", "", (made / "card.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def _pictures(files: Sequence[Path]) -> str:
    """A page of nothing but pictures, self-contained."""
    encoded: Mapping[str, str] = {file.stem: base64.b64encode(file.read_bytes()).decode() for file in files}
    return "".join(f'<p>{name}<br><img alt="{name}" src="data:image/png;base64,{data}"></p>\n' for name, data in encoded.items())
