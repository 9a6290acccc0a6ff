"""`python -m infra.local`: bring the stack of this machine up, end it, back it up, restore it, change its passwords."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from diffstill.commands import Group, Refusal
from infra.local import backup
from infra.local.compose import ComposeStack
from infra.local.native import NativeStack
from infra.local.processes import claim, private
from infra.local.settings import FILE, Settings, fresh_settings, read_settings, settings_at, write_settings

ROOT = Path(__file__).parents[2]
STATE = ROOT / "build" / "stack"
ENGINES = ("auto", "compose", "native")
FOLDER = click.Path(path_type=Path, file_okay=False)


@dataclass(frozen=True)
class Place:
    """Where a stack is: the folder of its state, and its settings file."""

    state: Path
    path: Path

    @property
    def chosen(self) -> Path:
        """Holds the engine of the stack that was brought up last."""
        return self.state / "engine"

    def choose(self, engine: str) -> str:
        """The engine that is asked for; else the one that has the stack's data; else compose where it can run."""
        if engine != "auto":
            return engine
        if self.chosen.exists():
            return self.chosen.read_text(encoding="utf-8").strip()
        if reason := ComposeStack(self.path, settings_at(self.path)).obstacle():
            click.echo(f"no containers here: {reason}; taking processes of this machine", err=True)
            return "native"
        return "compose"

    @property
    def known(self) -> Settings:
        """The settings, or any where there is no file: to look at a stack and to end it takes none."""
        return read_settings(self.path) if self.path.exists() else fresh_settings()

    def stack(self, settings: Settings, engine: str | None = None) -> NativeStack | ComposeStack:
        """The stack that is there."""
        engine = engine or (self.chosen.read_text(encoding="utf-8").strip() if self.chosen.exists() else "native")
        return ComposeStack(self.path, settings) if engine == "compose" else NativeStack(self.state, settings)


class Commands(Group):
    """Takes any error of the file system for one that the user can mend."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            raise Refusal(f"{place}{error.strerror or error}; make the place writable with room on its disk, or name another") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 140})
@click.option("--state", type=FOLDER, default=STATE, show_default="build/stack", help="Folder of the native stack's data, logs and records.")
@click.option(
    "--settings", type=click.Path(path_type=Path, dir_okay=False), default=FILE, show_default="infra/local/.env", help="Passwords and ports."
)
@click.pass_context
def main(context: click.Context, state: Path, settings: Path) -> None:
    """MLflow's server, PostgreSQL and an S3 server on this machine."""
    context.obj = Place(state.resolve(), settings.resolve())


@main.command()
@click.option(
    "--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="Containers, or processes; auto: containers if they can run."
)
@click.pass_obj
def up(place: Place, engine: str) -> None:
    """Bring the stack up, as its settings say; twice is harmless."""
    claim(place.state)
    engine = place.choose(engine)
    stack = place.stack(settings_at(place.path), engine)
    stack.up()
    with os.fdopen(private(place.chosen), "w", encoding="utf-8") as out:
        out.write(f"{engine}\n")
    tell(place, stack)


@main.command()
@click.option("--delete-data", is_flag=True, help="Delete the database and the buckets, too.")
@click.pass_obj
def down(place: Place, delete_data: bool) -> None:
    """End the stack; its data stay."""
    place.stack(place.known).down(delete_data=delete_data)
    if delete_data:
        place.chosen.unlink(missing_ok=True)


@main.command()
@click.pass_obj
def status(place: Place) -> None:
    """Which roles run; exit code 1 unless all do."""
    roles = place.stack(place.known).status()
    for role, runs in roles.items():
        click.echo(f"{role:<10}{'runs' if runs else 'down'}")
    if not all(roles.values()):
        raise SystemExit(1)


@main.command()
@click.pass_obj
def env(place: Place) -> None:
    """Print what `diffstill` needs to work with the stack, for `eval` in a shell."""
    for name, value in read_settings(place.path).environment.items():
        click.echo(f"export {name}={shlex.quote(value)}")


@main.command("backup")
@click.argument("to", type=FOLDER)
@click.pass_obj
def back_up(place: Place, to: Path) -> None:
    """Write the database and the buckets into the folder TO, which must not exist."""
    files, size = backup.back_up(place.stack(read_settings(place.path)), to.resolve())
    click.echo(f"{to}: {files} files, {size / 2**20:.1f} MiB", err=True)


@main.command()
@click.argument("source", metavar="FROM", type=FOLDER)
@click.pass_obj
def restore(place: Place, source: Path) -> None:
    """Put the backup in the folder FROM into the stack, which must be up and empty."""
    backup.restore(place.stack(read_settings(place.path)), source.resolve())
    click.echo(f"{source} is restored", err=True)


@main.command()
@click.pass_obj
def rotate(place: Place) -> None:
    """Replace all passwords by new random ones; MLflow's server is away for some seconds."""
    settings = read_settings(place.path).rotated()
    write_settings(settings, place.path)
    place.stack(settings).up()
    click.echo(f"{place.path} has the new passwords; give them to who has exported the old ones: {hint(place, 'env')}", err=True)


def tell(place: Place, stack: NativeStack | ComposeStack) -> None:
    """What the user needs next."""
    settings = stack.settings
    click.echo(f"MLflow     {settings.mlflow_url}")
    click.echo(f"S3         {settings.s3_url}, buckets mlflow (MLflow's own) and diffstill (publish.store: s3://diffstill/sets)")
    click.echo(f"passwords  {place.path}")
    click.echo(f'use it     eval "$({hint(place, "env")})"')
    click.echo(f"stop it    {hint(place, 'down')}")


def hint(place: Place, command: str) -> str:
    """The command as it has to be given here."""
    if command == "down" and place == Place(STATE, FILE):
        return "make stack-down"
    options = [*(("--state", str(place.state)) if place.state != STATE else ()), *(("--settings", str(place.path)) if place.path != FILE else ())]
    return shlex.join([".venv/bin/python", "-m", "infra.local", *options, command])


if __name__ == "__main__":
    main(prog_name="python -m infra.local")
