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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from diffstill.artifacts import Artifact, read_manifest
from diffstill.config import Params, read_json
from diffstill.doctor import Needs, preflight
from diffstill.errors import DiffstillError
from diffstill.launch import Work, device_here, launch, one_message, ranks_here
from diffstill.lineage import Lineage
from diffstill.plan import STAGES
from diffstill.run import gpus_held, run_stage
from diffstill.summary import markdown
from diffstill.tracking import open_chain
from diffstill.trainjob import Order, train

log = logging.getLogger("diffstill")


class Handed(Protocol):
    """A file or folder that Kubeflow has brought here, or will fetch from here."""

    path: str
    metadata: dict[str, Any]


class Metrics(Handed, Protocol):
    """Numbers that Kubeflow shows beside the task, and a file for them."""

    def log_metric(self, metric: str, value: float) -> None:
        """Keep one number."""
        ...


Given = Handed | Sequence[Handed] | str | None


def run_task(
    stage: str,
    config: str,
    *,
    metrics: Metrics,
    step: str = "",
    data_version: str = "",
    sheet: Handed | None = None,
    page: Handed | None = None,
    summary: Handed | None = None,
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
        began, device = time.monotonic(), device_here() if STAGES[stage].on_device else "cpu"
        measured = _measured(stage, config, step or stage, device, paths, options, given)
        hours = measured.pop("gpu_hours", gpus_held(device) * (time.monotonic() - began) / 3600)
        _write(metrics, json.dumps(measured))
        for name, value in {**measured, **({"gpu_hours": hours} if hours else {})}.items():
            metrics.log_metric(name, value)
        output, made = STAGES[stage].output, paths[STAGES[stage].output]
        handed: Any = given[output]
        spent = _spent(given) | ({" ".join([step or stage, options.get("shard", "")]).strip(): hours} if hours else {})
        handed.metadata.update(_described(read_manifest(made, output)) | ({"gpu_hours": json.dumps(spent)} if spent else {}))
        if sheet:
            _write(sheet, _pictures(sorted(made.glob("seed-*.png"))))
        if page:
            shutil.copyfile(made / "report.html", page.path)
        if summary:
            _write(summary, _card(made) if stage == "publish" else markdown(made) + _bill(spent))


def _measured(
    stage: str, config: str, step: str, device: str, paths: Mapping[str, Any], options: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, float]:
    """Run the stage in this process, or, if it can, in one per GPU, or on the nodes of a TrainJob."""
    section = read_json(config, type(Params.model_fields[stage].default))
    if STAGES[stage].in_ranks:
        work = Work(stage=stage, config=config, step=step, paths={name: str(path) for name, path in paths.items()})
        if order := os.environ.get("DIFFSTILL_TRAINJOB"):
            return train(work, read_json(order, Order), STAGES[stage].output, {name: given[name].uri for name in paths})
        if (ranks := ranks_here()) > 1:
            return launch(work, ranks)
    return run_stage(stage, section, paths, step=step, device=device, **options)


def _described(made: Artifact) -> dict[str, Any]:
    """What Kubeflow's pages show of an artifact: what it is, how much of it there is, and the data that it descends from."""
    facts, data = made.facts, Lineage.of(made).data()
    told = {name: facts[name] for name in ("side", "channels", "images_per_class", "source") if name in facts}
    counted = {name: len(facts[name]) for name in ("classes", "seeds", "students") if name in facts}
    images = {f"{split}_images": count if isinstance(count, int) else sum(count.values()) for split, count in facts.get("counts", {}).items()}
    origin = {f"data_{name}": value for name, value in data.items()}
    shown = {"kind": made.manifest.kind, "digest": made.digest, **told, **counted, **images, **origin}
    return {name: _plain(value) if isinstance(value, str) else value for name, value in shown.items()}


def _plain(text: str) -> str:
    """The text with what Kubeflow, Argo or Kubernetes would fill in percent-encoded: the metadata of an artifact are handed to every later task."""
    return re.sub(r"\{\{|\$\(", lambda found: quote(found[0]), text)


def _spent(given: Mapping[str, Any]) -> dict[str, float]:
    """Hours of GPUs by task, of all that the inputs have come from. They travel beside the artifacts, whose bytes know no time."""
    listed = [value if isinstance(value, Sequence) else [value] for value in given.values() if value]
    inputs = [one for values in listed for one in values if not isinstance(one, str)]
    return {task: hours for one in inputs for task, hours in json.loads(one.metadata.get("gpu_hours", "{}")).items()}


def _bill(spent: Mapping[str, float]) -> str:
    """The hours as a table in Markdown; nothing where no GPU was there."""
    rows = "".join(f"| {task} | {hours:.2f} |\n" for task, hours in sorted(spent.items()))
    return f"\nHours of GPUs: {sum(spent.values()):.2f}\n\n| task | GPU hours |\n|---|---:|\n{rows}" if spent else ""


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


def _write(artifact: Handed, text: str) -> None:
    Path(artifact.path).write_text(text, encoding="utf-8")


def _card(made: Path) -> str:
    """The card without its pictures: they are files beside it, which a page of Kubeflow does not reach."""
    return re.sub(r"^!\[.*\]\(sheets/.*\)\n", "", (made / "card.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def _pictures(files: Sequence[Path]) -> str:
    """A page of nothing but pictures, self-contained."""
    encoded: Mapping[str, str] = {file.stem: base64.b64encode(file.read_bytes()).decode() for file in files}
    return "".join(f'<p>{name}<br><img alt="{name}" src="data:image/png;base64,{data}"></p>\n' for name, data in encoded.items())
