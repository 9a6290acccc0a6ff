"""Make a distilled set anew, from its own settings, code and data revision, and say whether every digest comes out the same."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from safetensors.numpy import load_file

from diffstill import __version__, storage
from diffstill.artifacts import ANCESTORS, MANIFEST, Array, Artifact, Kind, cache_folder, open_artifact, read_manifest, refuse_overlap
from diffstill.config import load_params
from diffstill.environment import code_commit, environment, is_commit
from diffstill.errors import DiffstillError, without_secrets
from diffstill.lineage import SECTIONS, Ancestor, Lineage
from diffstill.pictures import read_png
from diffstill.plan import STAGES
from diffstill.references import fetch, parse
from diffstill.registry import Found
from diffstill.run import Listener

log = logging.getLogger("diffstill")

MARK = "reproduction.json"
"""Says of a scratch folder which set is made anew in it, and by which code."""
SHOWN = 5
DRIVER = """
import hashlib, json, pathlib, sys
from diffstill.cli import main
for command, manifest, digest in json.load(sys.stdin):
    try:
        main(command, prog_name="diffstill")
    except SystemExit as end:
        if end.code:
            raise
    if hashlib.sha256(pathlib.Path(manifest).read_bytes()).hexdigest() != digest:
        break
"""
"""Runs stages by the command line of whatever commit is imported, in one process, until an artifact has another digest than it should."""


@dataclass(frozen=True)
class Code:
    """The code that runs: in `folder`, or as it is installed. `exact` if it is the commit that the set names; `why` says how it was chosen."""

    name: str
    why: str
    exact: bool
    folder: Path | None = None


@dataclass(frozen=True)
class Difference:
    """The first artifact that came out different: its digest here, what differs, by how much where both sides are at hand, and why perhaps."""

    artifact: Ancestor
    digest: str
    parts: tuple[str, ...]
    extent: str | None
    causes: tuple[str, ...]


@dataclass(frozen=True)
class Reproduction:
    """What came of it: the artifacts that the set descends from, the set last; all have the same digest here unless there is a `difference`."""

    ref: str
    folder: Path
    code: Code
    artifacts: tuple[Ancestor, ...]
    difference: Difference | None

    @property
    def matches(self) -> bool:
        """Whether the set was made anew, bit for bit."""
        return self.difference is None


def reproduce(
    found: Found, folder: Path, *, device: str = "cpu", data: str | None = None, weights: str | None = None, autoencoder: str | None = None
) -> Reproduction:
    """Make the set anew in `folder`, step by step, until the digests match or the first artifact differs.

    The code is that of the commit or release of diffstill that the version names, the commit checked out from the repository of the current folder or of the package; where it
    cannot be had, the installed one. That commit, and the environment that differences are explained by, are those of the process that published:
    earlier steps may have run elsewhere. `data`, `weights` and `autoencoder` stand for `prepare.location`, `pretrain.location` and
    `pretrain.autoencoder`, as a path or a reference.
    The same call goes on where an earlier one stopped; artifacts in `folder` that have their digests are left alone. Nothing goes to MLflow.
    Raises `DiffstillError` for what cannot be tried: raw data or weights that are not here, settings that the code does not know, another folder's content.
    """
    folder = folder.absolute()
    lineage = Lineage.of(open_artifact(found.folder(), "distilled"))
    places = _places(found.ref, lineage, {"data": data, "weights": weights, "autoencoder": autoencoder})
    refuse_overlap(folder, {found.ref: found.folder(), **places})
    code = _claim(folder, found, _code(found))
    params = _write_params(folder / "params.yaml", found, lineage)
    if code.folder is None:
        _refuse_unknown(found.ref, params, code)
    log.info("%s with %s (%s)", found.ref, code.name, code.why)
    waiting = [one for one in lineage.artifacts if not _is_same(one, folder)]
    _run(waiting, folder, code, [_command(one, folder, params, places, device) for one in waiting])
    differing = next((one for one in lineage.artifacts if not _is_same(one, folder)), None)
    difference = _difference(found, differing, _made(differing, folder), code, device) if differing else None
    return Reproduction(found.version.ref if found.version else found.ref, folder, code, lineage.artifacts, difference)


# Settings and raw data


def _write_params(path: Path, found: Found, lineage: Lineage) -> Path:
    """The settings of the chain, exactly as the artifacts have them: other code may know other knobs."""
    known = (*found.lineage().artifacts, *lineage.artifacts)
    sections = {SECTIONS[one.manifest.kind]: one.manifest.config for one in known}
    sections.setdefault("evaluate", {"images_per_class": [sections["sample"]["images_per_class"]]})  # the default may ask for more than are drawn
    if sections["prepare"]["source"] == "folder":
        # Nothing is published, but images of a folder have no name without one.
        sections["publish"] = {**sections.get("publish", {}), "name": "reproduced"}
    YAML().dump(sections, path)
    return path


def _refuse_unknown(ref: str, params: Path, code: Code) -> None:
    try:
        load_params(params)
    except DiffstillError as error:
        raise DiffstillError(
            f"{ref}: was made with settings of another version of diffstill, which {code.name} cannot read: {code.why} ({error})"
        ) from error


def _places(ref: str, lineage: Lineage, given: Mapping[str, str | None]) -> dict[str, Path]:
    """What stands for the places that a section names, by the stage's name for them."""
    places = {}
    for one in lineage.artifacts:
        section = SECTIONS[one.manifest.kind]
        for option, field in STAGES[section].outside.items():
            if place := _place(ref, f"{section}.{field}", option, one.manifest.config.get(field), given[option]):
                places[option] = place
    return places


def _place(ref: str, field: str, option: str, location: str | None, given: str | None) -> Path | None:
    """Where `given` lies now; None where the stage finds what it needs by itself."""
    if given and (reference := parse(given)):
        return fetch(reference, cache_folder(), Listener()).folder
    if given:
        if not Path(given).exists():
            raise DiffstillError(f"--{option} {given}: no such folder or file; give the one that `{field}` {location!r} was")
        return Path(given).absolute()
    if location is None or parse(location) or "://" in location or (Path(location).is_absolute() and Path(location).exists()):
        return None
    lies = "which is not here" if Path(location).is_absolute() else "relative to wherever that was"
    raise DiffstillError(f"{ref}: `{field}` was {location!r}, {lies}; say where the same files lie now with --{option}")


# Code


def _code(found: Found) -> Code:
    """Which code is to run."""
    tags = found.version.tags if found.version else {}
    sha = tags.get("code") or tags.get("git_sha", "none")  # earlier versions name one commit, which was that of the code where code was developed
    installed = f"the installed diffstill {__version__}"
    if sha == code_commit() and not sha.endswith("-dirty"):
        return Code(f"commit {sha}" if is_commit(sha) else f"diffstill {sha}", "the set was published with it, and it is installed here", exact=True)
    if sha in ("none", "unknown"):
        return Code(installed, "the set names no commit", exact=False)
    if re.fullmatch(r"[0-9]+\.[0-9]+[.0-9a-z+]*", sha):
        return Code(installed, f"the set was published with diffstill {sha}, install that for the same code", exact=False)
    if not is_commit(sha) or sha.endswith("-dirty"):
        return Code(installed, f"the set names {sha}: with changes that no commit has", exact=False)
    if repository := _repository(sha):
        return Code(f"commit {sha}", f"from {repository}", exact=True, folder=repository)
    why = f"commit {sha} of diffstill is neither in the git repository of this folder nor in that of the package; `git fetch` it there"
    return Code(installed, why, exact=False)


def _repository(sha: str) -> Path | None:
    """The git directory that has the commit, with the package in it: other repositories may hold a project that only uses diffstill."""
    for place in (Path.cwd(), Path(__file__).parent):
        try:
            _git("cat-file", "-e", f"{sha}:src/diffstill/cli.py", cwd=place)
            return Path(_git("rev-parse", "--absolute-git-dir", cwd=place))
        except (OSError, subprocess.CalledProcessError):
            continue
    return None


def _git(*arguments: str, cwd: Path, **variables: str) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, env=os.environ | variables, capture_output=True, text=True, check=True).stdout.strip()


def _claim(folder: Path, found: Found, code: Code) -> Code:
    """Make the scratch folder ours, with the code in it. Raises `DiffstillError` if it holds anything but the same reproduction, begun earlier."""
    wanted = {"distilled": found.digest, "code": code.name}
    mark = folder / MARK
    if folder.exists() and any(folder.iterdir()) and not _says(mark, wanted):
        raise DiffstillError(
            f"{folder}: holds something else than a reproduction of {found.ref} with {code.name}; remove it or choose another --folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(wanted) + "\n")
    if code.folder is None:
        return code
    sha, repository = code.name.removeprefix("commit "), code.folder
    storage.appear(folder / "code", lambda arriving: _check_out(sha, repository, arriving))
    return Code(code.name, code.why, code.exact, folder / "code" / "src")


def _says(mark: Path, wanted: Mapping[str, str]) -> bool:
    try:
        return bool(json.loads(mark.read_text()) == wanted)
    except (OSError, ValueError):
        return False


def _check_out(sha: str, repository: Path, folder: Path) -> None:
    """The package at that commit, with an index of its own and no hooks: the repository stays as it is."""
    index, git = folder / "index", {"GIT_DIR": str(repository), "GIT_WORK_TREE": str(folder)}
    try:
        _git("-c", f"core.hooksPath={os.devnull}", "checkout", sha, "--", "src/diffstill", cwd=folder, GIT_INDEX_FILE=str(index), **git)
    except subprocess.CalledProcessError as error:
        raise DiffstillError(
            f"commit {sha} cannot be checked out of {repository} ({' '.join(error.stderr.split())[:200]}); mend the repository"
        ) from error
    index.unlink()


# Steps


def _output(one: Ancestor, folder: Path) -> Path:
    return folder / "artifacts" / one.manifest.kind


def _made(one: Ancestor, folder: Path) -> Artifact:
    return open_artifact(_output(one, folder), one.manifest.kind)


def _is_same(one: Ancestor, folder: Path) -> bool:
    return (_output(one, folder) / MANIFEST).is_file() and _made(one, folder).digest == one.digest


def _command(one: Ancestor, folder: Path, params: Path, places: Mapping[str, Path], device: str) -> list[str]:
    """How the command line makes that artifact from those before it."""
    name = SECTIONS[one.manifest.kind]
    stage = STAGES[name]
    paths = {given: folder / "artifacts" / given for given in (*one.manifest.inputs, stage.output)}
    paths |= {option: places[option] for option in stage.outside if option in places}
    options = {"params": params, **paths} | ({"device": device} if stage.on_device else {})
    quiet = [] if log.isEnabledFor(logging.INFO) else ["--quiet"]
    return [*quiet, name, *(text for option, value in options.items() for text in (f"--{option}", str(value)))]


def _run(artifacts: Sequence[Ancestor], folder: Path, code: Code, commands: Sequence[list[str]]) -> None:
    """Run the steps until one makes something else than it should. Raises `DiffstillError` if one fails; its own words are on the terminal."""
    if not artifacts:
        return
    steps = [(command, str(_output(one, folder) / MANIFEST), one.digest) for one, command in zip(artifacts, commands, strict=True)]
    search = [str(code.folder)] * bool(code.folder) + [os.environ[name] for name in ("PYTHONPATH",) if name in os.environ]
    world = os.environ | {"MLFLOW_TRACKING_URI": "none", "DIFFSTILL_WORK": str(folder / "work"), "PYTHONPATH": os.pathsep.join(search)}
    done = subprocess.run([sys.executable, "-P", "-c", DRIVER], input=json.dumps(steps), text=True, env=world, check=False)
    if done.returncode:
        raise DiffstillError(f"a step failed with {code.name} (exit code {done.returncode}), see above; mend that, then give the same command again")


# The first difference


def _difference(found: Found, one: Ancestor, made: Artifact, code: Code, device: str) -> Difference:
    theirs, ours = one.manifest, made.manifest
    parts = (
        *(f"settings: {line}" for line in _differing(theirs.config, ours.config)),
        *(f"facts: {line}" for line in _differing(theirs.facts, ours.facts)),
        *_differing_files(theirs.files, ours.files),
    )
    beside = _at_hand(found, one)
    extent = _extent(beside, made.folder, sorted(theirs.files.keys() & ours.files.keys())) if beside else None
    return Difference(one, made.digest, parts, extent, tuple(_causes(found, one, code, device)))


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """A line per value that is not the same."""
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(name, "nothing"), ours.get(name, "nothing")
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differing(there, here, f"{prefix}{name}.")
        elif there != here:
            yield f"{prefix}{name} is {there} there, {here} here"


def _differing_files(theirs: Mapping[str, str], ours: Mapping[str, str]) -> Iterator[str]:
    """Files with other content, and those that one side lacks."""
    names = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name) and not name.startswith(f"{ANCESTORS}/"))
    told = [name + ("" if name in theirs and name in ours else " (only here)" if name in ours else " (only there)") for name in names[:SHOWN]]
    if names:
        yield f"files: {', '.join(told)}{', ...' if len(names) > SHOWN else ''} ({len(names)} of {len(theirs.keys() | ours.keys())})"


def _at_hand(found: Found, one: Ancestor) -> Path | None:
    """The original, where it can be had: a registry has the set alone, a folder of artifacts perhaps all."""
    kind: Kind = one.manifest.kind
    folder = found.folder()
    beside = folder if kind == "distilled" else folder.parent / kind
    return beside if (beside / MANIFEST).is_file() and read_manifest(beside, kind).digest == one.digest else None


def _extent(theirs: Path, ours: Path, names: Collection[str]) -> str | None:
    """How far images lie apart, or else the numbers of weights and shards."""
    pictures = [name for name in names if re.fullmatch(r"seed-\d+/.+/\d+\.png", name)]
    if pictures:
        gaps = [_gap({"": read_png(theirs / name)}, {"": read_png(ours / name)}) for name in pictures]
        far = [gap for gap in gaps if gap]
        told = f"{len(far)} of {len(gaps)} images differ, by at most {max(far, default=0):g} of 255"
        return told if far else "all pixels are equal, only their encoding as PNG is another"
    tensors = [name for name in names if name.endswith(".safetensors")]
    gaps = [_gap(load_file(theirs / name), load_file(ours / name)) for name in tensors]
    return f"the numbers in its safetensors files differ by at most {max(gaps):.3g}" if gaps else None


def _gap(theirs: Mapping[str, Array], ours: Mapping[str, Array]) -> float:
    """The largest difference of two numbers at the same place; infinite for arrays of other names or shapes."""
    if {name: array.shape for name, array in theirs.items()} != {name: array.shape for name, array in ours.items()}:
        return float("inf")
    return max((float(np.abs(array.astype(np.float64) - ours[name]).max(initial=0)) for name, array in theirs.items()), default=0.0)


def _causes(found: Found, one: Ancestor, code: Code, device: str) -> Iterator[str]:
    """What may have made the difference, the likeliest first."""
    config = one.manifest.config
    if config.get("location"):
        yield f"other files than then: it was made from {without_secrets(config['location'])}"
    if not code.exact:
        yield f"other code: this is {code.name}, {code.why}"
    recorded = found.version.tags.get("environment") if found.version else None
    if recorded is None:
        yield "perhaps another environment: the set does not say in which it was made"
        return
    there, here = json.loads(recorded), environment()
    lines = list(_differing(there, here))
    yield from (f"another environment: {line}" for line in lines)
    if "gpu" in there | here:
        yield f"perhaps another device: this ran on {device}; on which the set was made is not known"
    elif code.exact and not lines and not config.get("location"):
        yield "nothing that is known: it was altered, or made on another machine than it was published from, or the code is not deterministic; report it"


# For the terminal


def plain(result: Reproduction) -> dict[str, Any]:
    """What came of it, as JSON has it."""
    differing = result.difference
    return {
        "ref": result.ref,
        "matches": result.matches,
        "folder": str(result.folder),
        "code": result.code.name,
        "exact_code": result.code.exact,
        "artifacts": {one.name: one.digest for one in result.artifacts},
        "difference": differing
        and {
            "artifact": differing.artifact.name,
            "digest": differing.digest,
            "parts": differing.parts,
            "extent": differing.extent,
            "causes": differing.causes,
        },
    }


def text(reproduction: Reproduction) -> str:
    """What came of it: a line per artifact, then what differs and why."""
    code, difference = reproduction.code, reproduction.difference
    verdict = f"`{difference.artifact.name}` is the first artifact that comes out different" if difference else "every digest is the same"
    lines = [f"{reproduction.ref} is {'not ' if difference else ''}reproduced: {verdict}", *_rows(reproduction)]
    lines += [f"folder  {reproduction.folder}", f"code    {code.name} ({code.why})"]
    if difference:
        lines += ["what differs", *(f"  {part}" for part in difference.parts)]
        lines += ["by how much", f"  {difference.extent}"] if difference.extent else []
        lines += ["likely causes", *(f"  {cause}" for cause in difference.causes)]
    return "\n".join(lines)


def _rows(reproduction: Reproduction) -> list[str]:
    table = Table(box=None, pad_edge=False, show_header=False)
    difference = reproduction.difference
    first = reproduction.artifacts.index(difference.artifact) if difference else len(reproduction.artifacts)
    for number, one in enumerate(reproduction.artifacts):
        here = f"{difference.digest[:12]} here" if difference and number == first else "the same" if number < first else "not made"
        table.add_row(f"  {one.name}", one.digest[:12], here)
    console = Console(width=200, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
