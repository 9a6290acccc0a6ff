"""The command line: `diffstill <stage>`, `run`, `show`, `preset`, `summary`, `doctor`. It takes paths; knobs live in params.yaml."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import BashComplete, FishComplete, ZshComplete

from diffstill import __version__, catalogue
from diffstill.catalogue import AS_JSON, FOLDER, Decorated, params_option, print_json
from diffstill.commands import Group, Refusal
from diffstill.config import PRESETS, Params, Section, json_schema, load_params, preset, read_json, render_params
from diffstill.errors import DiffstillError, without_secrets

if TYPE_CHECKING:
    from diffstill.plan import Stage, Step

SUMMARIES = {
    "prepare": "Read, check, crop and split the real images.",
    "pretrain": "Train a small generator on the training split, or take over pretrained weights.",
    "encode": "Encode the real images into latents, once.",
    "finetune": "Fine-tune the generator with the two memories: the method.",
    "sample": "Draw the distilled images (without --denoiser: those of the untuned generator).",
    "evaluate": "Train students on a distilled set (without --distilled: on real baselines).",
    "report": "Gather all scores into numbers, figures and one page.",
    "publish": "Register the distilled set as a version in MLflow, with its card, files and lineage.",
}
PATHS = {
    "images": "real images, from `prepare`",
    "generator": "autoencoder and transformer, from `pretrain`",
    "latents": "latents of the real images, from `encode`",
    "denoiser": "fine-tuned weights, from `finetune`",
    "distilled": "distilled images, from `sample`",
    "untuned": "images of the untuned generator, from `sample` without --denoiser",
    "scores": "student runs, from `evaluate`",
    "report": "tables, figures and the page, from `report`",
    "card": "card, contact sheets and lineage of a version, from `publish`",
    "data": "folder of the data, in place of `prepare.location`",
    "weights": "a diffusers DiTPipeline folder or a DiT checkpoint, in place of `pretrain.location`",
    "autoencoder": "a diffusers AutoencoderKL folder, in place of `pretrain.autoencoder`",
}
FLAGS = {"force": "even where the gain over real images is not shown"}
REMOTE = re.compile(r"(s3://|models:/|dvc\+|hf://)")
COMPLETERS = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}


class Place(click.ParamType[Any]):
    """A folder (or a file, where `here` takes one), or a reference to one that lies elsewhere."""

    name = "place"

    def __init__(self, here: click.Path = FOLDER) -> None:
        self.here = here

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A path, or the reference as it is."""
        return value if isinstance(value, str) and REMOTE.match(value) else self.here.convert(value, param, ctx)


PLACE = Place()
ANY_PLACE = Place(click.Path(path_type=Path))


class Sections(Group):
    """A group whose help lists its commands under headings, in the order in which a user meets them."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  (click's signature)
        """Write the lists."""
        versions = [str(command.name) for command in catalogue.COMMANDS]
        rest = [name for name in self.commands if name not in {*SUMMARIES, *versions}]
        for title, names in {"The chain": rest, "Its stages": list(SUMMARIES), "Published versions": versions}.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(120)) for name in names])


@click.group(cls=Sections, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 140})
@click.version_option(__version__, prog_name="diffstill")
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors; no progress bars.")
def main(verbose: bool, quiet: bool) -> None:
    """Distil a labelled image set into a tiny synthetic one, and judge it.

    Start with `diffstill preset digits` and `diffstill run`.
    """
    follows = os.environ.get("RANK", "0") != "0"  # of several processes the first one speaks
    log_to_terminal(logging.DEBUG if verbose else logging.WARNING if quiet or follows else logging.INFO)


def log_to_terminal(level: int) -> None:
    """Our own messages from `level` on, those of libraries from warnings on, to standard error."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
    logging.getLogger("diffstill").setLevel(level)


def _device_option(command: Decorated) -> Decorated:
    return click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:<n>, or auto: cuda where there is one.")(command)


def _artifacts_option(command: Decorated) -> Decorated:
    return click.option("--artifacts", type=FOLDER, default=Path("artifacts"), show_default=True, help="Folder of all artifacts.")(command)


def _stage_command(name: str) -> click.Command:
    """A subcommand from a stage's interface; its help lists the stage's knobs."""
    from diffstill.plan import STAGES

    stage = STAGES[name]
    options: list[click.Parameter] = [_place(stage, given, PATHS[given]) for given in stage.inputs]
    options += [click.Option([f"--{given}"], type=PLACE, help=f"{PATHS[given]} (optional)") for given in stage.optional]
    options += [
        click.Option([f"--{given}"], type=FOLDER, required=True, help=f"folder that holds one folder of {PATHS[given]} per cell")
        for given in stage.many
    ]
    options += [click.Option([f"--{given}"], type=ANY_PLACE, help=PATHS[given]) for given in stage.outside]
    options += [click.Option([f"--{given}"], help=f"only this {given} of params.yaml") for given in stage.options]
    options += [click.Option([f"--{given}"], is_flag=True, help=FLAGS[given]) for given in stage.flags]
    if stage.sharded:
        options.append(click.Option(["--shard"], metavar="I/N", help="make only share I of N, counted from 0; `--parts` gathers them"))
        options.append(click.Option(["--parts"], type=FOLDER, multiple=True, help="what a shard made: give all of them to gather the whole"))
    options.append(_place(stage, stage.output, f"output: {PATHS[stage.output]}"))
    options.append(click.Option(["--json", "as_json"], is_flag=True, help="Print the numbers as JSON."))
    options.append(click.Option(["--step"], default=name, show_default=True, help="name of this run in MLflow"))

    def callback(params_path: Path, changes: Sequence[str], step: str, as_json: bool, device: str = "auto", **given: Any) -> None:
        from diffstill.plan import score_names
        from diffstill.run import resolve_device, run_stage

        params = load_params(params_path, changes)
        if stage.many:
            given["scores"] = [given["scores"] / Path(name).relative_to("scores") for name in score_names(params.evaluate.students)]
        options = {option: given.pop(option) for option in (*stage.options, *stage.flags, *(["shard"] if stage.sharded else []))}
        on = resolve_device(device) if stage.on_device else "cpu"
        output = given[stage.output]
        metrics = run_stage(name, params.section(name), given, params=params, step=step, device=on, **options)
        if as_json:
            print_json({stage.output: output, "metrics": metrics})

    command = click.Command(name, params=options, callback=callback, help=f"{SUMMARIES[name]}\n\n{_knobs(name)}", short_help=SUMMARIES[name])
    return params_option(_device_option(command) if stage.on_device else command)


def _place(stage: Stage, name: str, text: str) -> click.Option:
    """An artifact of a stage; one that registers stands after a chain, so its artifacts lie where that leaves them."""
    if stage.registers:
        return click.Option([f"--{name}"], type=PLACE, default=f"artifacts/{name}", show_default=True, help=text)
    return click.Option([f"--{name}"], type=PLACE, required=True, help=text)


def _knobs(stage: str) -> str:
    """The knobs of a section, for `--help`, as click prints them unchanged."""
    lines = [f"  {name} = {json.dumps(value)}\n      {text}" for name, value, text in _described(preset("digits").section(stage))]
    return "\b\nKnobs (section `" + stage + "` of params.yaml, with the values of preset digits):\n" + "\n".join(lines)


def _described(section: Section, prefix: str = "") -> list[tuple[str, Any, str]]:
    rows: list[tuple[str, Any, str]] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        rows += _described(value, f"{prefix}{name}.") if isinstance(value, Section) else [(prefix + name, value, str(field.description))]
    return rows


for _name in SUMMARIES:
    main.add_command(_stage_command(_name))
for _command in catalogue.COMMANDS:
    main.add_command(_command)


@main.command()
@params_option
@_artifacts_option
@_device_option
@click.option("--dry-run", is_flag=True, help="Only say what would run and why, as `diffstill plan` does.")
@AS_JSON
def run(params_path: Path, changes: Sequence[str], artifacts: Path, device: str, dry_run: bool, as_json: bool) -> None:
    """Run the whole chain; steps whose artifact is up to date are left alone."""
    from diffstill.run import planned, run_chain

    params = load_params(params_path, changes)
    steps = planned(params, artifacts)
    if dry_run:
        _print_plan(steps, as_json=as_json)
        return
    if not click.get_current_context().find_root().params["quiet"] and any(reason for _, reason in steps):
        _print_plan(steps, err=True)
    run_chain(params, artifacts, device)
    _summarise(artifacts, as_json)


@main.command()
@params_option
@_artifacts_option
@AS_JSON
def plan(params_path: Path, changes: Sequence[str], artifacts: Path, as_json: bool) -> None:
    """Say which steps `diffstill run` would run, and why; nothing is computed."""
    from diffstill.run import planned

    _print_plan(planned(load_params(params_path, changes), artifacts), as_json=as_json)


def _print_plan(steps: Sequence[tuple[Step, str | None]], *, as_json: bool = False, err: bool = False) -> None:
    if as_json:
        click.echo(json.dumps([{"step": step.name, "runs": reason is not None, "why": reason} for step, reason in steps], indent=1))
        return
    width = max(len(step.name) for step, _ in steps)
    for step, reason in steps:
        click.echo(f"{step.name:{width}}  {f'runs: {reason}' if reason else 'up to date'}", err=err)
    click.echo(f"{sum(reason is not None for _, reason in steps)} of {len(steps)} steps to run", err=err)


@main.command()
@click.option("--generator", type=FOLDER, default=Path("artifacts/generator"), show_default=True, help=PATHS["generator"])
@click.option("--denoiser", type=FOLDER, default=Path("artifacts/denoiser"), show_default=True, help=PATHS["denoiser"])
@click.option("--seed", type=int, help="which fine-tune, where there are several")
@click.option("--output", type=FOLDER, required=True, help="new folder, which diffusers' DiTPipeline opens")
@AS_JSON
def merge(generator: Path, denoiser: Path, seed: int | None, output: Path, as_json: bool) -> None:
    """Write the fine-tuned generator as one whole DiTPipeline folder."""
    from diffstill.merge import merge as merge_weights

    chosen = merge_weights(generator, denoiser, output, seed)
    if as_json:
        print_json({"folder": output, "fine-tune": chosen})
    else:
        click.echo(f"{output}: the generator with fine-tune {chosen}", err=True)


@main.command()
@_artifacts_option
@AS_JSON
def summary(artifacts: Path, as_json: bool) -> None:
    """Print the table of a finished chain, and where to look."""
    _summarise(artifacts, as_json)


@main.command("open")
@_artifacts_option
@AS_JSON
def open_report(artifacts: Path, as_json: bool) -> None:
    """Open the report of a finished chain in the browser; where there is none, print its path."""
    from diffstill.artifacts import open_artifact

    page = (open_artifact(artifacts / "report", "report").folder / "report.html").absolute()
    if as_json:
        print_json({"report": page})
    else:
        click.echo(page)
    click.launch(page.as_uri())


@main.command()
@click.option("--port", type=click.IntRange(0, 65535), default=5000, show_default=True, help="Where the server listens, on this machine alone.")
def ui(port: int) -> None:
    """Browse runs and versions: start MLflow's server on the store that the environment names, or say where it runs."""
    from diffstill.tracking import OFF, tracking_uri

    address = tracking_uri()
    if address == OFF:
        raise DiffstillError(f"MLFLOW_TRACKING_URI is {OFF}, so nothing is tracked; unset it, or name a store or server")
    if address.startswith(("http://", "https://")):
        click.echo(without_secrets(address))
        click.launch(address)
        return
    # By the environment: an address may hold a password, and everybody sees a command's words. Output and Ctrl-C are the server's.
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port)]
    os.execve(sys.executable, command, os.environ | {"MLFLOW_BACKEND_STORE_URI": address})  # noqa: S606


def _summarise(artifacts: Path, as_json: bool) -> None:
    from diffstill.summary import plain, print_summary

    if as_json:
        click.echo(json.dumps(plain(artifacts), indent=1))
    else:
        print_summary(artifacts)


@main.command()
@params_option
@AS_JSON
def show(params_path: Path, changes: Sequence[str], as_json: bool) -> None:
    """Print the resolved configuration."""
    params = load_params(params_path, changes)
    click.echo(json.dumps(params.model_dump(mode="json"), indent=2) if as_json else render_params(params), nl=as_json)


@main.command()
def schema() -> None:
    """Print the JSON schema of params.yaml, for editors."""
    click.echo(json.dumps(json_schema(), indent=2, sort_keys=True))


@main.command("preset")
@click.argument("name", type=click.Choice(list(PRESETS)))
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("params.yaml"), show_default=True, help="Where to write.")
@click.option("--force", is_flag=True, help="Overwrite changed values.")
@AS_JSON
def write_preset(name: str, output: Path, force: bool, as_json: bool) -> None:
    """Write the parameters of a preset, one commented line per knob."""
    wanted = preset(name)
    if output.exists() and not force:
        _refuse_changed(output, wanted)
    if not output.parent.is_dir():
        raise DiffstillError(f"{output.parent}: no such folder; make it, or choose another --output")
    output.write_text(render_params(wanted), encoding="utf-8")
    if as_json:
        print_json({"params": output, "preset": name})
    else:
        click.echo(f"wrote {output} (preset {name}); next: diffstill run", err=True)


def _refuse_changed(output: Path, wanted: Params) -> None:
    """An untouched preset may be replaced by another; values of one's own may not."""
    if not output.stat().st_size:  # as the shell leaves it in `diffstill preset tiny > params.yaml`
        return
    try:
        present = load_params(output)
    except DiffstillError as error:
        raise DiffstillError(f"{output}: exists and cannot be read as parameters; move it away or use --force") from error
    if present == wanted or any(present == preset(name) for name in PRESETS):
        return
    values = {name: value for name, value, _ in _described(wanted)}
    changed = [f"{name} = {json.dumps(value)}" for name, value, _ in _described(present) if value != values[name]]
    raise DiffstillError(
        f"{output}: holds values of its own ({', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}); use --force to overwrite them"
    )


@main.command()
@click.option("--gpus", type=click.IntRange(min=0), default=0, help="GPUs that must be here, and compute.")
@click.option("--disk", "disk_gib", type=click.FloatRange(min=0), default=0.0, help="GiB that must be free in the work, cache and temporary folders.")
@click.option("--shared-memory", "shared_memory_gib", type=click.FloatRange(min=0), default=0.0, help="GiB that /dev/shm must have.")
@click.option("--environment", multiple=True, metavar="NAME", help="Variable that must be set; its value is never shown. May be repeated.")
@click.option("--store", metavar="S3-URI", help="Bucket and prefix that must take, give back and delete an object.")
@click.option("--mlflow", is_flag=True, help="The MLflow server must answer and accept.")
@AS_JSON
def doctor(as_json: bool, **needed: Any) -> None:
    """Check this machine: versions, device, disk, endpoints. Prints no secret.

    With options, check that what they name is here, as a run on a cluster does before it starts.
    """
    from diffstill.doctor import Needs, examine, preflight

    if not examine(as_json=as_json):
        raise Refusal("something that diffstill needs is missing, see above")
    if any(needed.values()):
        preflight(read_json(json.dumps(needed), Needs), err=as_json)


@main.command()
@click.argument("shell", type=click.Choice(list(COMPLETERS)))
def completion(shell: str) -> None:
    """Print a completion script: `diffstill completion bash >> ~/.bashrc`."""
    click.echo(COMPLETERS[shell](main, {}, "diffstill", "_DIFFSTILL_COMPLETE").source())
