"""Where a stage meets the world: its paths, progress bars, tracking. And the chain, step by step."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm import tqdm

from diffstill import storage
from diffstill.artifacts import ANCESTORS, MANIFEST, Kind, cache_folder, open_artifact, read_manifest, refuse_foreign, refuse_overlap, work_root
from diffstill.commands import keeping
from diffstill.config import SPLITS, Params, Section
from diffstill.environment import rank_here
from diffstill.errors import DiffstillError
from diffstill.plan import STAGES, Stage, Step, chain
from diffstill.record import Progress, ignore
from diffstill.references import S3Reference, fetch, listing_digest, parse, pin
from diffstill.registry import Registry, bring
from diffstill.tracking import StageRun, stage_run

log = logging.getLogger("diffstill")
SHOWN = 8
"""A stage with more metrics than this does not list them on the terminal; all are in the side log and in MLflow."""
SHOWN_CAUSES = 3
"""Settings, or earlier steps, that a plan names of those that a step has to run for."""


class Listener:
    """A stage's record: progress on the terminal, metrics and files to MLflow where tracking is on."""

    def __init__(self, run: StageRun | None = None) -> None:
        self._run = run

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars at a step."""
        if self._run:
            self._run.metrics(values, step)

    def file(self, path: Path) -> None:
        """Upload a file."""
        if self._run:
            self._run.file(path)

    def image(self, name: str, draw: Callable[[], Image], step: int) -> None:
        """Upload a picture for a step, drawn only if somebody will see it."""
        if self._run:
            self._run.image(name, draw(), step)

    @contextmanager
    def progress(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
        """A bar on a terminal; elsewhere one line when the work is done. With the first one the work begins, so that the run is opened."""
        if self._run:
            self._run.open()
        started, quiet = time.monotonic(), not log.isEnabledFor(logging.INFO)
        on_terminal = sys.stderr.isatty() and not quiet
        with tqdm(total=total, desc=description, unit=unit, initial=done, disable=not on_terminal, dynamic_ncols=True) as bar:
            yield bar
        seconds = time.monotonic() - started
        if not on_terminal and seconds >= 1:
            log.info("%s: %s %s in %.1f s (%.0f %s/s)", description, f"{total - done:,}", unit, seconds, (total - done) / seconds, unit)


def run_stage(
    name: str,
    config: Section,
    paths: Mapping[str, Any],
    *,
    params: Params | None = None,
    step: str | None = None,
    device: str = "cpu",
    **options: Any,
) -> dict[str, float]:
    """Run one stage with tracking and progress; `paths` by the names of its signature, `params` those of its chain if known. Returns its metrics.

    Raises `DiffstillError` for bad input, before the stage starts where that can be known.
    """
    stage, step = STAGES[name], step or name
    main = _is_main(name, stage)
    for taken, place in _taken(stage, config, paths):  # several may have one name
        refuse_overlap(paths[stage.output], {taken: place})
    remote, paths = _landing(stage, paths)
    config, paths = _brought(stage, config, _gathered(stage, paths))
    _require(stage, paths)
    refuse_foreign(paths[stage.output], stage.output)
    function = getattr(importlib.import_module(f"diffstill.stages.{name}"), name)
    if stage.on_device:
        options["device"] = device
    if not main:
        return dict(function(config, **paths, record=ignore, **options))
    log.info("%s ...", step)
    with keeping(partial(_kept, step, name)), stage_run(step, config, params) as run:
        if stage.registers:
            options["registry"] = Registry.here(run)
        if run and "images" in stage.inputs:
            run.data(read_manifest(paths["images"], "images"))
        started = time.monotonic()
        metrics: dict[str, float] = function(config, **paths, record=Listener(run), **options)
        costs = {"seconds": time.monotonic() - started, "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        if gpus := gpus_held(device) * stage.on_device:
            costs["gpu_hours"] = gpus * costs["seconds"] / 3600
        if run:
            run.metrics({**metrics, **costs}, 0)
            if stage.output == "images":
                run.data(read_manifest(paths["images"], "images"))
            if name == "report":
                run.headline({key: value for key, value in metrics.items() if key.endswith(("/test_mean", "/gain_over_random"))})
        if remote:
            storage.upload(paths[stage.output], remote, Listener())
            shutil.rmtree(paths[stage.output])
    _log_costs(step, metrics, costs)
    return metrics


def gpus_held(device: str) -> int:
    """The GPUs that nobody else can use meanwhile: those of all ranks, all of this machine, or the one that is named."""
    if not device.startswith("cuda"):
        return 0
    import torch

    ranks = rank_here()[1]
    return ranks if ranks > 1 else 1 if ":" in device else torch.cuda.device_count()


def _is_main(name: str, stage: Stage) -> bool:
    """Whether this process writes and tracks: the first of those that `torchrun` has started, or the only one."""
    rank, count = rank_here()
    if count > 1 and not stage.in_ranks:
        able = ", ".join(one for one, other in STAGES.items() if other.in_ranks)
        raise DiffstillError(f"`{name}` runs in one process, but torchrun has started {count} (WORLD_SIZE); only {able} can be started so")
    return rank == 0


def _landing(stage: Stage, paths: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Where an output that belongs into a store is to go, and the paths with a folder here in its place; the bucket is tried before hours of work."""
    remote = paths[stage.output]
    if not isinstance(remote, str):
        return None, paths
    if not remote.startswith("s3://"):
        raise DiffstillError(f"{remote!r}: cannot be written to; give a folder or s3://<bucket>/<prefix> for `{stage.output}`")
    storage.probe(remote)
    return remote, {**paths, stage.output: work_root() / "outgoing" / hashlib.sha256(remote.encode()).hexdigest()[:16]}


def _taken(stage: Stage, config: Section, paths: Mapping[str, Any]) -> Iterator[tuple[str, Path | str]]:
    """All places that a stage reads, by the name of what lies there."""
    for name in (*stage.inputs, *stage.optional, *stage.many, "parts"):
        given = paths.get(name) or ()
        yield from ((name, one) for one in ([given] if isinstance(given, str | Path) else given))
    for name, named in stage.outside.items():
        if place := paths.get(name) or getattr(config, named):
            # Of a folder of images with splits these alone are read, so that an output may lie beside them.
            parts = SPLITS if stage.output == "images" and ("://" in str(place) or (Path(place) / "train").is_dir()) else ("",)
            yield from ((name, f"{place}/{part}" if "://" in str(place) else Path(place) / part) for part in parts)


def _gathered(stage: Stage, paths: Mapping[str, Any]) -> dict[str, Any]:
    """The paths with every input that is a reference (`s3://`, `models:/`) brought here."""
    kinds = {**{name: "distilled" if name == "untuned" else name for name in (*stage.inputs, *stage.optional)}, "parts": stage.output}
    found = dict(paths)
    for name, kind in kinds.items():
        value = found.get(name)
        if isinstance(value, str):
            found[name] = bring(value, kind, Listener())
        elif isinstance(value, Sequence):
            found[name] = [bring(one, kind, Listener()) if isinstance(one, str) else one for one in value]
    return found


def _brought(stage: Stage, config: Section, paths: Mapping[str, Any]) -> tuple[Section, Mapping[str, Any]]:
    """Bring what the configuration names outside this machine: the configuration with it pinned, and the paths with the folders where it lies now."""
    found = dict(paths)
    for name, named in stage.outside.items():
        given = paths.get(name)
        location = given if isinstance(given, str) else getattr(config, named)
        if isinstance(given, Path) or not location or not (reference := parse(location)):
            continue
        pinned = pin(reference)
        found[name] = fetch(pinned, cache_folder(), Listener()).folder
        config = config.model_copy(update={named: str(pinned)})
    return config, found


def resolve_device(device: str) -> str:
    """The torch device of that name, checked; `auto` is cuda where there is one."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError as error:
        raise DiffstillError(f"--device {device!r} is not a device; use cpu, cuda, cuda:<n> or auto") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and index >= torch.cuda.device_count()):
        raise DiffstillError(f"--device {device!r} is not here ({torch.cuda.device_count()} CUDA devices); use cpu or auto")
    return device


def _require(stage: Stage, paths: Mapping[str, Any]) -> None:
    """Raise `DiffstillError` if an input that is given or needed is not there."""
    one = [paths[name] for name in (*stage.inputs, *stage.optional) if name in stage.inputs or paths.get(name)]
    several = [*stage.many, *(["parts"] if paths.get("parts") else [])]
    for folder in [*one, *(folder for name in several for folder in paths[name])]:
        if not (folder / MANIFEST).is_file():
            raise DiffstillError(f"{folder}: no artifact here; run the stage that makes it first (`diffstill run` or `dvc repro` runs them all)")


def _kept(step: str, stage: str) -> str:
    """What an interruption leaves."""
    checkpoints = any(path.is_dir() for path in work_root().glob(f"{stage}-*"))
    where = f"what {step} has in {work_root()} is kept" if checkpoints else f"{step} starts anew"
    return f"all finished artifacts are kept, {where}, and the same command goes on from there"


def _log_costs(step: str, metrics: Mapping[str, float], costs: Mapping[str, float]) -> None:
    """Costs go to a side log, never into artifacts. The many numbers of a report stand in its table, not here."""
    shown = ", ".join(f"{name} {_number(step, name, value)}" for name, value in metrics.items()) if len(metrics) <= SHOWN else ""
    log.info("%s done in %.1f s, peak memory %.0f MiB%s", step, costs["seconds"], costs["peak_memory_mib"], f": {shown}" if shown else "")
    path = work_root() / "costs.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({"step": step, **costs, **metrics}) + "\n")


def _number(step: str, name: str, value: float) -> str:
    """As people read it: accuracies in %, gains in points, as in the table that a chain ends with."""
    if name.startswith("val_gain/"):
        return f"{100 * value:+.1f} points"
    if step.startswith("evaluate"):
        return f"{100 * value:.1f} %"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.4g}"


def planned(params: Params, root: Path) -> list[tuple[Step, str | None]]:
    """Every step of the chain, and why it would run; None for those that are up to date.

    By what artifacts say of themselves: that no file of theirs is damaged is seen when the chain runs, and a step may turn out to be
    up to date after all, where one before it makes the same bytes anew.
    """
    _refuse_part(params)
    steps: list[tuple[Step, str | None]] = []
    anew: dict[str, str] = {}
    for step in chain(params):
        output = STAGES[step.stage].output
        taken = [one for name, where in step.paths.items() if name != output for one in ([where] if isinstance(where, str) else where)]
        makers = list(dict.fromkeys(anew[one] for one in taken if one in anew))
        reason = _why(step, params, root, made_anew=makers)
        if reason:
            anew[str(step.paths[output])] = step.name
        steps.append((step, reason))
    return steps


def _refuse_part(params: Params) -> None:
    if params.sample.classes is not None:
        raise DiffstillError(
            "`sample.classes` is for `diffstill sample` alone, a whole chain judges all classes; set it to null, or use `prepare.classes`"
        )


def run_chain(params: Params, root: Path, device: str = "cpu") -> None:
    """Run every step of the chain whose artifact is missing or was made from other settings or inputs.

    `device` is looked for, and students are looked up, before the first step that has work: where none has, torch is not loaded.
    """
    _refuse_part(params)
    ready = cache(partial(_ready, params, device))
    if device not in ("auto", "cpu", "cuda"):  # a name that may be mistyped
        ready()
    for step in chain(params):
        if (reason := _why(step, params, root, verified=True)) is None:
            log.info("%s is up to date", step.name)
            continue
        log.debug("%s runs: %s", step.name, reason)
        output = STAGES[step.stage].output
        paths = {name: [root / one for one in where] if isinstance(where, tuple) else root / where for name, where in step.paths.items()}
        options = {"student": step.student} if step.student else {}
        outside = _outside(STAGES[step.stage], params.section(step.stage))
        run_stage(step.stage, params.section(step.stage), paths, params=params, step=step.name, device=ready(), **options)
        log.debug("%s wrote %s", step.name, paths[output])
        if outside:
            _seen(step.output(root)).parent.mkdir(parents=True, exist_ok=True)
            _seen(step.output(root)).write_text(json.dumps([read_manifest(step.output(root), output).digest, outside]))


def _ready(params: Params, device: str) -> str:
    """The device, once it is known to be here, and so are all students before the first is trained."""
    from diffstill.students import refuse_unknown

    for student in params.evaluate.students:
        refuse_unknown(student)
    return resolve_device(device)


def _why(step: Step, params: Params, root: Path, *, verified: bool = False, made_anew: Sequence[str] = ()) -> str | None:
    """Why the step has to run; None if its artifact is whole, and made by these settings from the inputs that lie there now.

    `verified` looks at every byte of the artifact, too; `made_anew` are steps before this one that are known to run.
    """
    return next(_reasons(step, params, root, verified, made_anew), None)


def _reasons(step: Step, params: Params, root: Path, verified: bool, made_anew: Sequence[str]) -> Iterator[str]:
    """The first of these reasons is the one to tell: those after it may not even be found out."""
    stage, output = STAGES[step.stage], step.output(root)
    if not (output / MANIFEST).is_file():
        yield "not made yet"
    manifest = (open_artifact(output, stage.output) if verified else read_manifest(output, stage.output)).manifest
    if any(f"{ANCESTORS}/{digest}.json" not in manifest.files for digest in manifest.inputs.values()):
        yield "made by a diffstill that kept no lineage"
    config = params.section(step.stage)
    outside = _outside(stage, config)
    pinned = dict.fromkeys(stage.outside.values()) if outside else {}  # the manifest has the commit where the settings have the branch
    if changes := _changes(step.stage, manifest.config | pinned, config.plain() | pinned):
        yield _shortened(changes)
    if outside and not _has_seen(output, stage.output, outside):
        yield f"{' and '.join(f'`{step.stage}.{name}`' for name in outside)}: other files than those it was made from"
    if made_anew:
        yield f"after {_shortened(made_anew)}"
    found = _input_digests({name: where for name, where in step.paths.items() if name != stage.output}, root)
    if other := {name for name, _ in manifest.inputs.items() ^ found.items()}:
        # Scores are numbered, as there are several; here they are one input.
        yield f"input {', '.join(sorted({name.partition('-')[0] for name in other}))} changed"


def _shortened(causes: Sequence[str]) -> str:
    more = len(causes) - SHOWN_CAUSES
    return ", ".join(causes[:SHOWN_CAUSES]) + (f" and {more} more" if more > 0 else "")


def _changes(stage: str, before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What was set otherwise when an artifact was made, as `sample.guidance 1.5 -> 3`."""
    changes: list[str] = []
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changes += _changes(stage, old, new, f"{prefix}{name}.")
        elif old != new or (name in before) != (name in now):
            changes.append(f"{stage}.{prefix}{name} {json.dumps(old)} -> {json.dumps(new)}")
    return changes


def _seen(output: Path) -> Path:
    """Where a chain notes what lay outside when it made this artifact. No part of the artifact, which is the same wherever its data lie."""
    return work_root() / "outside" / f"{hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:16]}.json"


def _has_seen(output: Path, kind: Kind, outside: Mapping[str, str]) -> bool:
    try:
        noted = json.loads(_seen(output).read_text())
    except (OSError, ValueError):  # none, or a damaged one
        return False
    return bool(noted == [read_manifest(output, kind).digest, outside])


def _outside(stage: Stage, config: Section) -> dict[str, str]:
    """What tells the data and weights that a stage takes from outside from others at the same places; nothing where it takes none."""
    places = {name: getattr(config, name) for name in stage.outside.values()}
    return {name: f"{place} {fingerprint(place)}" for name, place in places.items() if place}


def fingerprint(place: str) -> str:
    """The commit of a repository, the listing of a bucket; of a folder or file here the names, sizes and times; of a URL nothing more."""
    if reference := parse(place):
        return listing_digest(reference) if isinstance(reference, S3Reference) else str(pin(reference))
    if "://" in place:
        return place
    path, listed = Path(place).expanduser(), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        known = file.stat()
        listed.update(f"{file.relative_to(path)}\0{known.st_size}\0{known.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return listed.hexdigest()


def _input_digests(named: Mapping[str, str | tuple[str, ...]], root: Path) -> dict[str, str]:
    digests = {}
    for name, where in named.items():
        kind = "distilled" if name == "untuned" else name
        if isinstance(where, str):
            digests[name] = read_manifest(root / where, kind).digest  # type: ignore[arg-type]
        else:
            each = sorted(read_manifest(root / one, kind).digest for one in where)  # type: ignore[arg-type]
            digests |= {f"{name}-{number:03d}": digest for number, digest in enumerate(each)}
    return digests
