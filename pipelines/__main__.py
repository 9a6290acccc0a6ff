"""`python -m pipelines`: compile the pipeline, run it here, submit it to a cluster and follow it there."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click

from components.images import LOCK, load_images
from diffstill.artifacts import file_digest, refuse_overlap
from diffstill.catalogue import FOLDER, Decorated, params_option
from diffstill.cli import log_to_terminal
from diffstill.commands import Group
from diffstill.config import load_params
from diffstill.errors import DiffstillError
from pipelines.settings import Settings, load_settings

if TYPE_CHECKING:
    from pipelines.client import Cluster, Run
    from pipelines.submission import Submission

FILE = click.Path(path_type=Path, dir_okay=False)
SETTINGS = Path(__file__).with_name("settings.yaml")


def settings_option(command: Decorated) -> Decorated:
    """What the cluster is and what the pods get."""
    return click.option("--settings", "settings_path", type=FILE, default=SETTINGS, show_default="pipelines/settings.yaml", help="Cluster and pods.")(
        command
    )


def images_options(command: Decorated) -> Decorated:
    """Which images the tasks run in."""
    command = click.option("--images-lock", type=FILE, default=LOCK, show_default="docker/images.lock", help="Images by digest.")(command)
    return click.option("--allow-tag", is_flag=True, help="Take images by tag too: for trials, such runs cannot be repeated.")(command)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 140})
def main() -> None:
    """The chain of diffstill on Kubeflow Pipelines, and the same pipeline on this machine."""
    log_to_terminal(logging.INFO)


@main.command("compile")
@settings_option
@images_options
@click.option("--output", type=FILE, default=Path("build/distill.yaml"), show_default=True, help="Where to write.")
@click.option("--kubernetes", is_flag=True, help="Write Kubernetes manifests (Pipeline and PipelineVersion), for `kubectl apply` and GitOps.")
def compile_pipeline(settings_path: Path, images_lock: Path, allow_tag: bool, output: Path, kubernetes: bool) -> None:
    """Compile the pipeline into one YAML file that Kubeflow takes."""
    from pipelines.package import write_package

    settings, images = load_settings(settings_path), load_images(images_lock, allow_tag=allow_tag)
    refuse_overlap(output, {"settings": settings_path, "images": images_lock})
    write_package(settings, images, output, kubernetes=kubernetes)
    click.echo(f"wrote {output}", err=True)


@main.command("run-local")
@params_option
@settings_option
@click.option("--runner", type=click.Choice(["subprocess", "docker"]), default="subprocess", show_default=True, help="Processes, or containers.")
@click.option("--image", help="Image of all tasks, with --runner docker; default: diffstill:cpu, as `make images` builds it.")
@click.option("--user", help="User of the containers, like 10001; default: you, or for root that of the image.")
@click.option(
    "--shards", type=click.IntRange(1, 30), default=None, help="Cut encoding and sampling into so many shards; default: as in the settings."
)
@click.option("--output", type=FOLDER, default=Path("build/local"), show_default=True, help="Where runs, cache and artifacts go.")
@click.option("--no-cache", is_flag=True, help="Run every task anew.")
@click.option("--retries", type=click.IntRange(0, 20), default=0, show_default=True, help="Try a failed task so often again.")
@click.option("--publish", is_flag=True, help="Make a version of the distilled set in MLflow's registry.")
def run_here(
    params_path: Path,
    changes: Sequence[str],
    settings_path: Path,
    runner: str,
    image: str | None,
    user: str | None,
    shards: int | None,
    output: Path,
    no_cache: bool,
    retries: int,
    publish: bool,
) -> None:
    """Run the pipeline on this machine, without a cluster; a second run skips what is unchanged."""
    from diffstill.summary import print_summary
    from pipelines.local import containers, processes, run_local
    from pipelines.settings import ShardsConfig

    params, settings = load_params(params_path, changes), load_settings(settings_path)
    if publish and runner == "docker":
        raise DiffstillError("--publish: containers of a local run have no network to a registry; run without it, then `diffstill publish`")
    executor = containers(image, user) if runner == "docker" else processes()
    cut = ShardsConfig(encode=shards, sample=shards) if shards else settings.shards
    print_summary(run_local(params, settings, output, executor=executor, shards=cut, cache=not no_cache, retries=retries, publish=publish))


@main.command()
@settings_option
def readme(settings_path: Path) -> None:
    """Write the README of every component anew."""
    from pipelines.readme import readmes

    for path, text in readmes(load_settings(settings_path).infra).items():
        path.write_text(text, encoding="utf-8")
        click.echo(f"wrote {path}", err=True)


# --- on a cluster ------------------------------------------------------------------------------------------------


def on_cluster(function: Callable[..., None]) -> Callable[..., None]:
    """A command on a cluster: it gets `settings`, the file with what the command line says of the cluster above it."""

    @settings_option
    @click.option("--host", help="URL of Kubeflow Pipelines; default: as in the settings, or KFP_HOST.")
    @click.option("--namespace", help="Namespace of your profile; default: as in the settings.")
    @click.option("--experiment", help="Experiment that lists the runs; default: as in the settings.")
    @wraps(function)
    def command(settings_path: Path, host: str | None, namespace: str | None, experiment: str | None, **given: Any) -> None:
        settings = load_settings(settings_path)
        above = {name: value for name, value in {"host": host, "namespace": namespace, "experiment": experiment}.items() if value}
        function(settings=settings.model_copy(update={"cluster": settings.cluster.model_copy(update=above)}), **given)

    return command


def with_submission(function: Callable[..., None]) -> Callable[..., None]:
    """A command that sends the pipeline: it gets `order`, checked, and nothing has been sent yet."""

    @on_cluster
    @params_option
    @images_options
    @click.option("--name", help="Name of the run; default: data, images per class and commit.")
    @click.option("--no-cache", is_flag=True, help="Run every task anew.")
    @click.option("--no-publish", is_flag=True, help="Make no version in MLflow's registry.")
    @click.option("--allow-dirty", is_flag=True, help="Do not ask whether git holds the code.")
    @click.option("--allow-unpushed", is_flag=True, help="Do not ask whether the DVC remote holds the data.")
    @click.option("--dry-run", is_flag=True, help="Print what would be sent, and send nothing.")
    @wraps(function)
    def command(
        settings: Settings,
        params_path: Path,
        changes: Sequence[str],
        images_lock: Path,
        allow_tag: bool,
        allow_dirty: bool,
        dry_run: bool,
        no_cache: bool,
        no_publish: bool,
        name: str | None,
        allow_unpushed: bool,
        **given: Any,
    ) -> None:
        from pipelines.submission import prepare, refuse_dirty

        params, images = load_params(params_path, changes), load_images(images_lock, allow_tag=allow_tag)
        if not allow_dirty:
            refuse_dirty()
        order = prepare(params, settings, images, name=name, caching=not no_cache, publish=not no_publish, allow_unpushed=allow_unpushed)
        if not images.by_digest:
            click.echo("caching is off: images are given by tag, and the cluster's cache cannot tell when a tag has moved", err=True)
        with TemporaryDirectory() as scratch:
            package = Path(scratch) / "distill.yaml"
            order.write(package)
            if dry_run:
                click.echo(json.dumps({**order.told(), "version": file_digest(package)}, indent=2))
            else:
                function(order=order, package=package, **given)

    return command


def _six_fields(_context: click.Context, _option: click.Parameter, expression: str | None) -> str | None:
    if expression is not None and len(expression.split()) != 6:
        raise DiffstillError(f"cron expression {expression!r} does not have six fields; put the seconds first, like '0 0 3 * * 1' for Mondays at 3")
    return expression


def _reached(settings: Settings) -> "Cluster":
    from pipelines.client import Cluster

    return Cluster.connect(settings.cluster)


def _wait(cluster: "Cluster", run_id: str, minutes: float | None, *, logs: bool) -> None:
    """Tell how the run goes on, to its end; exit code 1 unless it succeeds."""
    from pipelines.client import Watcher

    watcher = Watcher(cluster)
    with _leaving(run_id):
        for run in cluster.polls(run_id, minutes):
            for name, state in watcher.changes(run):
                click.echo(f"{state.lower():<10} {name}")
            if logs:
                _say(watcher.lines(run))
    click.echo(f"run {run_id} {run.state.lower()}" + (f": {run.error}" if run.error else ""))
    if run.state != "SUCCEEDED":
        for name, why in cluster.failures(run):
            click.echo(f"{name} failed:\n{indent(why, '    ')}", err=True)
        raise click.exceptions.Exit(1)


@contextmanager
def _leaving(run_id: str) -> Iterator[None]:
    """Ctrl-C ends the watching, not the run."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(
            f"run {run_id} goes on; `python -m pipelines watch {run_id}` looks at it again, `python -m pipelines cancel {run_id}` stops it", err=True
        )
        raise click.exceptions.Exit(130) from None


def _say(lines: Iterable[tuple[str, str]]) -> None:
    for task, line in lines:
        click.echo(f"{task}: {line}")


def _silence(run: "Run", name: str | None) -> str:
    """Why there is nothing to read."""
    if name and not run.named(name):
        known = ", ".join(dict.fromkeys(task.name for task in run.tasks)) or "none yet"
        return f"run {run.id} has no task {name!r}; it has {known}, and others appear when their turn comes"
    states = ", ".join(f"{task.name} {task.state.lower()}" for task in run.named(name)) or f"run {run.state.lower()}"
    return f"run {run.id} has no log ({states}); a task has no pod before its turn, when it is skipped, and when the cache has served it"


@main.command()
@with_submission
@click.option("--wait/--no-wait", default=False, show_default=True, help="Wait until the run has finished; exit code 1 unless it succeeds.")
@click.option("--follow", is_flag=True, help="Wait, and print what the tasks say.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="MINUTES", help="Wait no longer.")
def submit(order: "Submission", package: Path, wait: bool, follow: bool, timeout: float | None) -> None:
    """Run the pipeline on a cluster; prints the id and the page of the run."""
    cluster = _reached(order.settings)
    run_id = cluster.submit(package, order.arguments, order.name, order.settings.infra.service_account)
    click.echo(f"run   {run_id}\npage  {cluster.url(run_id)}")
    if wait or follow:
        _wait(cluster, run_id, timeout, logs=follow)


@main.command()
@click.argument("run")
@on_cluster
@click.option("--follow", is_flag=True, help="Print what the tasks say.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="MINUTES", help="Wait no longer.")
def watch(run: str, settings: Settings, follow: bool, timeout: float | None) -> None:
    """Follow RUN until it has finished; exit code 1 unless it succeeds."""
    _wait(_reached(settings), run, timeout, logs=follow)


@main.command()
@click.argument("run")
@on_cluster
@click.option("--task", help="Only this task, like `finetune`.")
@click.option("--follow", is_flag=True, help="Go on until the run has finished.")
def logs(run: str, settings: Settings, task: str | None, follow: bool) -> None:
    """Print what the tasks of RUN have said."""
    from pipelines.client import Watcher

    cluster = _reached(settings)
    watcher = Watcher(cluster)
    with _leaving(run):
        for now in cluster.polls(run) if follow else [cluster.run(run)]:
            _say(watcher.lines(now, task, rest=not follow))
    if not watcher.heard:
        raise DiffstillError(_silence(now, task))


@main.command()
@click.argument("run")
@on_cluster
def cancel(run: str, settings: Settings) -> None:
    """Stop RUN; one that has finished is left alone."""
    found, stopped = _reached(settings).cancel(run)
    click.echo(f"run {run} is being stopped" if stopped else f"run {run} is {found.lower()} already", err=True)


@main.command()
@click.argument("run")
@on_cluster
@click.option("--output", type=FOLDER, required=True, help="Where the artifacts go, laid out as `diffstill run` does.")
@click.option("--only", help="Artifacts separated by commas, like report,distilled; default: all.")
def fetch(run: str, settings: Settings, output: Path, only: str | None) -> None:
    """Download the artifacts of RUN, verified; needs the credentials of its S3 store in the environment."""
    from pipelines.fetch import NAMES
    from pipelines.fetch import fetch as fetch_artifacts

    arrived = fetch_artifacts(_reached(settings).outputs(run), output, tuple(only.split(",")) if only else NAMES)
    for folder in arrived:
        click.echo(f"fetched {folder}", err=True)
    if not arrived:
        click.echo(f"{output} is up to date", err=True)


@main.group()
def schedule() -> None:
    """Run the pipeline again and again: one run at a time, and what was missed is not caught up."""


@schedule.command("create")
@with_submission
@click.option("--cron", callback=_six_fields, help="Times in six fields, seconds first: '0 0 3 * * 1' is Mondays at 3 (UTC).")
@click.option("--every", type=click.IntRange(min=60), metavar="SECONDS", help="Seconds from one start to the next.")
def create_schedule(order: "Submission", package: Path, cron: str | None, every: int | None) -> None:
    """Set a schedule; prints its id."""
    when = cron or every
    if when is None or (cron and every):
        raise DiffstillError("give either --cron or --every; one of them says when the runs start")
    made = _reached(order.settings).schedule(package, order.repeating().arguments, order.name, when, order.settings.infra.service_account)
    click.echo(f"schedule  {made}")


@schedule.command("list")
@on_cluster
def list_schedules(settings: Settings) -> None:
    """Print all schedules of the experiment."""
    for one in _reached(settings).schedules():
        click.echo(f"{one.id}  {'on ' if one.enabled else 'off'}  {one.when}  {one.name}")


@schedule.command("disable")
@click.argument("schedule_id")
@on_cluster
def disable_schedule(schedule_id: str, settings: Settings) -> None:
    """Start no more runs of SCHEDULE_ID; it stays listed."""
    _reached(settings).disable_schedule(schedule_id)
    click.echo(f"schedule {schedule_id} is off", err=True)


@schedule.command("delete")
@click.argument("schedule_id")
@on_cluster
def delete_schedule(schedule_id: str, settings: Settings) -> None:
    """Forget SCHEDULE_ID; its runs stay."""
    _reached(settings).delete_schedule(schedule_id)
    click.echo(f"schedule {schedule_id} is deleted", err=True)


if __name__ == "__main__":
    main(prog_name="python -m pipelines")
