"""Commands on distilled sets as versions: list, search, card, download, export, lineage, compare, reproduce, promote, deprecate, gc."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from diffstill.config import load_params
from diffstill.errors import DiffstillError

if TYPE_CHECKING:
    from diffstill.artifacts import Kind

FOLDER = click.Path(path_type=Path, file_okay=False)
REF = click.argument("ref")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
FORMATS = ("imagefolder", "parquet", "webdataset", "huggingface")
LONGEST_REASON = 500
GARBAGE = ("what", "files", "size", "idle", "why")
HEADS = ("version", "aliases", "IPC", "classes", "size", "val", "gain on val", "published")


Decorated = TypeVar("Decorated", bound=Callable[..., Any] | click.Command)


def params_option(command: Decorated) -> Decorated:
    """The file of the knobs, and changes to it."""
    path = click.Path(path_type=Path, dir_okay=False)
    command = click.option(
        "--set", "changes", multiple=True, metavar="KNOB=VALUE", help="Another value of a knob, like sample.guidance=2. May be repeated."
    )(command)
    return click.option("--params", "params_path", type=path, default=Path("params.yaml"), show_default=True, help="The knobs.")(command)


def print_json(told: Mapping[str, Any]) -> None:
    """One object for programs; a path as text."""
    click.echo(json.dumps(told, indent=1, default=str))


def _print_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """One line per row, however narrow the terminal: names and digests are there to be copied."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=10_000).print(table)


@click.command("list")
@AS_JSON
def list_sets(as_json: bool) -> None:
    """List the published sets: of each its last version, and those that an alias leads to."""
    from diffstill.registry import Registry

    registry = Registry.here()
    versions = registry.search()
    last = {version.name: version for version in versions}
    shown = [version for version in versions if version.aliases or last[version.name] is version]
    _print_versions(
        shown, as_json, f"nothing is published at {registry.address} yet; `diffstill publish` does, MLFLOW_TRACKING_URI names another server"
    )


@click.command()
@click.argument("terms", nargs=-1, metavar="[TAG=VALUE | WORD]...")
@AS_JSON
def search(terms: Sequence[str], as_json: bool) -> None:
    """List all versions that fit: tags by value (`ipc=10`, `protocol=short-*`), or a word in a name or tag.

    `diffstill search dataset=digits 'memory_policy=r*'`; name, version and alias are taken like tags, `--json` shows all tags there are.
    """
    from diffstill.registry import Registry

    if wrong := [term for term in terms if not term.strip("= ")]:
        raise DiffstillError(f"{wrong[0]!r} asks for nothing; write TAG=VALUE, with * for any text, or a word")
    found = [version for version in Registry.here().search() if all(_fits(version, term) for term in terms)]
    _print_versions(found, as_json, "no version fits; `diffstill list` shows what there is")


def _fits(version: Any, term: str) -> bool:
    tag, equals, pattern = term.partition("=")
    if equals:
        known = {**version.tags, "name": version.name, "version": str(version.number)}
        values = version.aliases if tag == "alias" else [known[tag]] if tag in known else []
        return any(fnmatch(value, pattern) for value in values)
    return any(term.casefold() in text.casefold() for text in (version.name, *version.tags.values()))


def _print_versions(versions: Sequence[Any], as_json: bool, nothing: str) -> None:
    if as_json:
        click.echo(json.dumps([_plain(version) for version in versions], indent=1, sort_keys=True, default=str))
        return
    if not versions:
        click.echo(nothing, err=True)
        return
    _print_table(HEADS, map(_row, versions))


def _plain(version: Any) -> dict[str, Any]:
    """As JSON: numbers as numbers, accuracies and gains as fractions, beside all tags as MLflow has them."""
    counts = {name: int(version.tags[name]) for name in ("ipc", "classes", "bytes") if name in version.tags}
    return asdict(version) | counts | {"ref": version.ref, "scores": version.numbers(), "val_seeds": version.validations()}


def _row(version: Any) -> Sequence[str]:
    tags = version.tags
    aliases = f"deprecated: {tags['deprecated']}" if "deprecated" in tags else " ".join(version.aliases)
    validations = version.validations()
    size = max(validations, default=None)
    val = f"{100 * sum(validations[size]) / len(validations[size]):.1f} %" if size else "-"
    gain = tags.get(f"val_gain/ipc{size}", "-")
    return version.ref, aliases, tags["ipc"], tags["classes"], tags["resolution"], val, gain, f"{version.created:%Y-%m-%d %H:%M}"


@click.command()
@REF
@click.option("--raw", is_flag=True, help="Markdown as it is.")
@AS_JSON
def card(ref: str, raw: bool, as_json: bool) -> None:
    """Print the card of a published set."""
    from rich.console import Console
    from rich.markdown import Markdown

    from diffstill.registry import find

    found = find(ref)
    text = (found.folder("card") / "card.md").read_text(encoding="utf-8")
    if as_json:
        print_json({"ref": found.ref, "markdown": text})
        return
    console = Console()
    if raw or not console.is_terminal:
        click.echo(text)
    else:
        console.print(Markdown(text))


@click.command()
@REF
@click.option("--output", type=FOLDER, help="Where to; the name and number of the version if left out.")
@click.option("--all", "everything", is_flag=True, help="The report and the card, too.")
@AS_JSON
def download(ref: str, output: Path | None, everything: bool, as_json: bool) -> None:
    """Bring a set here, verified: `<output>/distilled` is its artifact, with an image folder per generation seed."""
    from diffstill.registry import KINDS, find
    from diffstill.run import Listener

    found = find(ref, Listener())
    if output is None and found.version is None:
        raise DiffstillError(f"{ref}: is no version with a name of its own; say where to with --output")
    target = output or Path(f"{found.version.name}-v{found.version.number}" if found.version else "")
    folders = {kind: found.folder(kind, Listener()) for kind in (KINDS if everything else KINDS[:1])}
    for kind, folder in folders.items():
        place_copy(folder, target / kind, kind)
    if as_json:
        print_json({"ref": found.ref, **{kind: str(target / kind) for kind in folders}})
    else:
        click.echo(f"{target / 'distilled'}")


def place_copy(source: Path, target: Path, kind: Kind) -> None:
    """Copy an artifact, whole or not at all; nothing is done if it is there. Raises `DiffstillError` if something else is."""
    from diffstill.artifacts import read_manifest, refuse_overlap

    if target.exists():
        if read_manifest(target, kind).digest != read_manifest(source, kind).digest:
            raise DiffstillError(f"{target}: holds another `{kind}` artifact; remove it, or choose another --output")
        return
    refuse_overlap(target, {kind: source})
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as aside:
        shutil.copytree(source, Path(aside) / "new")
        (Path(aside) / "new").rename(target)


@click.command()
@REF
@click.argument("folder", type=FOLDER)
@click.option("--format", "as_format", type=click.Choice(FORMATS), default="imagefolder", show_default=True, help="What to write.")
@click.option("--ipc", type=int, help="Only the first images of each class.")
@click.option("--seed", type=int, help="Which generation seed; the set's first if left out.")
@AS_JSON
def export(ref: str, folder: Path, as_format: Any, ipc: int | None, seed: int | None, as_json: bool) -> None:
    """Write a set to FOLDER in a format that other tools read."""
    from diffstill.export import export as write
    from diffstill.loading import open_set
    from diffstill.registry import find
    from diffstill.run import Listener

    found, record = find(ref), Listener()
    card, licence = (found.version.card, found.version.tags.get("licence")) if found.version else (None, None)
    opened = open_set(found.folder(record=record), ipc=ipc, seed=seed, card=card)
    place = write(opened, folder, as_format, licence=licence, record=record)
    if as_json:
        print_json({"ref": found.ref, "folder": str(place), "format": as_format, "images": len(opened), "seed": opened.seed})
    else:
        click.echo(place)


@click.command()
@REF
@AS_JSON
def lineage(ref: str, as_json: bool) -> None:
    """Print where a set comes from, from the raw data on: every artifact with its digest, data and code with their revisions."""
    from diffstill.registry import find

    found = find(ref)
    traced, version = found.lineage(), found.version
    if as_json:
        told = {"ref": version.ref, "aliases": version.aliases, "tags": version.tags} if version else {"ref": ref}
        click.echo(json.dumps(told | traced.plain(), indent=1, sort_keys=True, default=str))
        return
    _print_table(("artifact", "sha256, or revision", "made from"), [*traced.lines(), *_published(version)])


def _published(version: Any) -> list[tuple[str, str, str]]:
    if version is None:
        return []
    tags, shown = (
        version.tags,
        {
            "data_revision": "data revision",
            "data_md5": "data md5",
            "git_sha": "project",
            "code": "code",
            "image": "image",
            "kfp_run_id": "Kubeflow run",
        },
    )
    lines = [(name, tags[tag], "") for tag, name in shown.items() if tag in tags]
    return [*lines, (version.ref, " ".join(version.aliases) or "no alias", "distilled, report")]


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=Path("compare.html"), show_default=True, help="The page.")
@AS_JSON
def compare(first: str, second: str, output: Path, as_json: bool) -> None:
    """Compare two sets: scores, settings, lineage, and their images side by side on one page."""
    from diffstill import compare as comparing
    from diffstill.artifacts import refuse_overlap
    from diffstill.registry import find

    pair = find(first), find(second)
    refuse_overlap(output, {one.ref: one.folder() for one in pair})
    found = comparing.compare(*pair)
    if not output.parent.is_dir():
        raise DiffstillError(f"{output.parent}: no such folder; make it, or choose another --output")
    output.write_text(comparing.render(found), encoding="utf-8")
    if as_json:
        print_json(comparing.summarised(found) | {"page": output})
    else:
        click.echo(comparing.text(found))
    click.echo(f"wrote {output.absolute()}", err=True)


@click.command()
@REF
@click.option("--folder", type=FOLDER, help="Scratch folder; the same one again goes on where it stopped. By default reproduce/<digest>.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:<n>, or auto: cuda where there is one.")
@click.option("--data", help="Where the raw images lie now, for sets made from a local folder.")
@click.option("--weights", help="Where the imported generator lies now, for sets made from a local DiTPipeline folder or checkpoint.")
@click.option("--autoencoder", help="Where the imported autoencoder lies now, for sets made with a local one.")
@AS_JSON
@click.pass_context
def reproduce(
    ctx: click.Context,
    ref: str,
    folder: Path | None,
    device: str,
    data: str | None,
    weights: str | None,
    autoencoder: str | None,
    as_json: bool,
) -> None:
    """Make a set anew from its own settings, code and data revision, until its digest matches; exit code 1 if it comes out different."""
    from diffstill import reproduce as reproducing
    from diffstill.registry import find
    from diffstill.run import resolve_device

    found = find(ref)
    places = {"data": data, "weights": weights, "autoencoder": autoencoder}
    result = reproducing.reproduce(found, folder or Path("reproduce") / found.digest[:12], device=resolve_device(device), **places)
    if as_json:
        print_json(reproducing.plain(result))
    else:
        click.echo(reproducing.text(result))
    ctx.exit(0 if result.matches else 1)


@click.command()
@REF
@click.option("--output", type=FOLDER, help="Where to, inside the DVC repository; distilled/<name>-v<number> if left out.")
@AS_JSON
def promote(ref: str, output: Path | None, as_json: bool) -> None:
    """Bring a published set under DVC in this repository."""
    from diffstill import promote as promoting
    from diffstill.registry import find

    done = promoting.promote(find(ref), output)
    if as_json:
        print_json(asdict(done))
    else:
        click.echo(promoting.text(done))


@click.command()
@REF
@click.option("--reason", help="Why, for those who load it all the same.")
@click.option("--undo", is_flag=True, help="Take it back.")
@AS_JSON
def deprecate(ref: str, reason: str | None, undo: bool, as_json: bool) -> None:
    """Mark a version as one not to use: it stays, loading it warns, `newest` and `best-ipc<N>` go to others."""
    from diffstill.registry import Reference, Registry

    told = " ".join((reason or "").split())
    if bool(told) == undo or len(told) > LONGEST_REASON:
        raise DiffstillError(
            f"`deprecate` needs --reason, which those who load the set will see, of at most {LONGEST_REASON} characters; or --undo alone"
        )
    registry = Registry.here()
    version = registry.resolve(Reference.parse(ref))
    if undo:
        registry.restore(version)
    else:
        registry.deprecate(version, told)
    if as_json:
        print_json({"ref": version.ref, "deprecated": None if undo else told, "aliases": _aliases(registry, version.name)})
        return
    aliases = ", ".join(f"{alias} = {number}" for alias, number in _aliases(registry, version.name).items())
    click.echo(f"{version.ref} is {'in use again' if undo else 'deprecated'}; aliases: {aliases or 'none'}", err=True)


def _aliases(registry: Any, name: str) -> dict[str, int]:
    return {alias: version.number for version in registry.search(name) for alias in version.aliases}


@click.command()
@click.option("--store", metavar="S3-URI", help="Sets and reports below this `publish.store` that no version names.")
@click.option("--cache", is_flag=True, help="Downloads that nobody uses.")
@click.option("--work", is_flag=True, help="What killed stages left and nobody goes on with.")
@click.option("--older-than", default="7d", show_default=True, metavar="TIME", help="What was not written or used for so long: 7d, 36h.")
@click.option("--registry", "named", multiple=True, metavar="URI", help="Another MLflow with versions in the store. May be repeated.")
@params_option
@click.option("--artifacts", type=FOLDER, default=Path("artifacts"), show_default=True, help="Artifacts of the chain: only drafts beside them go.")
@click.option("--delete", is_flag=True, help="Remove it. Without this nothing is changed.")
@AS_JSON
@click.pass_context
def gc(
    ctx: click.Context,
    store: str | None,
    cache: bool,
    work: bool,
    older_than: str,
    named: tuple[str, ...],
    params_path: Path,
    changes: Sequence[str],
    artifacts: Path,
    delete: bool,
    as_json: bool,
) -> None:
    """Show what nobody needs any more, and with --delete remove it: never what a version names, or a process uses.

    Without --store, --cache or --work: the store of params.yaml, the cache and the work folder. Versions are looked up in the MLflow of the
    environment and in those given by --registry, and nowhere else. In a bucket that keeps versions of objects a removal leaves delete markers.
    """
    from diffstill import gc as collecting
    from diffstill.run import Listener

    grace, everything = collecting.idle_time(older_than), not (store or cache or work)
    explicit = ctx.get_parameter_source("params_path") is ParameterSource.COMMANDLINE
    params = load_params(params_path, changes) if explicit or changes or params_path.is_file() else None
    place = store or (params.publish.store if params and everything else None)
    if named and not place:
        raise DiffstillError("--registry says where versions of a store are looked up; give the store with --store, too")
    asked = collecting.registries(named) if place else []
    survey = collecting.in_store(place, asked, grace, confirmed=bool(named)) if place else collecting.Survey()
    survey += collecting.in_cache(grace) if cache or everything else collecting.Survey()
    survey += collecting.in_work(grace, params, artifacts) if work or everything else collecting.Survey()
    outcomes: dict[Any, str | None] = {}
    try:
        if delete:
            outcomes.update(collecting.sweep(survey, Listener()))
    finally:
        _print_garbage(survey, outcomes, asked, delete, as_json)


def _print_garbage(survey: Any, outcomes: Any, asked: Sequence[Any], delete: bool, as_json: bool) -> None:
    """What was found, and what came of it; those that were not come to have no outcome."""
    from rich.filesize import decimal

    from diffstill import gc as collecting

    spared = {one: f"spared, it {reason}" if reason else "removed" for one, reason in outcomes.items()}
    told = {one: spared.get(one, "stays") if delete else "would go" for one in survey.garbage}
    addresses = [one.address for one in asked]
    if as_json:
        found = [one.plain() | {"outcome": outcome} for one, outcome in told.items()]
        plain = {"garbage": found, "kept": dict(survey.kept), "registries": addresses, "doubt": survey.doubt}
        click.echo(json.dumps(plain, indent=1, sort_keys=True))
        return
    rows = [
        (one.place, str(one.files), decimal(one.size), collecting.shown_time(one.idle), f"{one.why}{f': {outcome}' if delete else ''}")
        for one, outcome in told.items()
    ]
    if rows:
        _print_table(GARBAGE, rows)
    click.echo(collecting.summary(survey, [one for one, outcome in told.items() if outcome in ("would go", "removed")], delete))
    if asked:
        click.echo(
            f"versions: looked up at {', '.join(addresses)} and nowhere else; if another MLflow has versions in this store, name it with --registry"
        )


COMMANDS: tuple[click.Command, ...] = (list_sets, search, card, download, export, lineage, compare, reproduce, promote, deprecate, gc)
