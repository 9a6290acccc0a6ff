"""`diffstill doctor`: what this machine offers, what is missing, and whether it has what a run needs before GPU time is spent."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffstill.artifacts import cache_folder, work_root
from diffstill.errors import DiffstillError, TransientError, without_secrets
from diffstill.storage import probe
from diffstill.torchvision_shim import loads
from diffstill.tracking import check_tracking

NEEDED = ("torch", "torchvision", "diffusers", "timm", "safetensors", "pydantic", "scikit-learn", "mlflow")
OPTIONAL = ("dvc", "kfp", "boto3")
MODULES = {"scikit-learn": "sklearn"}
"""Where a module is not called as its package."""
IMPORTS = """
import importlib, json, sys
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""
OTHER_BUILD = """\
import it after diffstill, or let the environment do so by `python -c "from diffstill.torchvision_shim import install; install()"`, \
or install the torchvision that was built for this torch, from the index that torch came from"""
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")
ENDPOINTS = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "AWS_ENDPOINT_URL", "DIFFSTILL_WORK", "DIFFSTILL_CACHE")
MIN_DISK_GIB = 2.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    found: str
    verdict: Literal["ok", "missing", "-"]
    passes: bool = False
    """Whether what is missing may be there later by itself."""


class Needs(BaseModel):
    """What a run needs of the machine and the services around it. Secrets go by the names of their variables."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    gpus: int = Field(0, ge=0, description="CUDA devices that compute")
    disk_gib: float = Field(0, ge=0, description="free GiB where work, downloads and temporary files go")
    shared_memory_gib: float = Field(0, ge=0, description="size of /dev/shm in GiB")
    environment: tuple[Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], ...] = Field(
        (), description="names of variables that must be set and not empty"
    )
    store: str | None = Field(None, description="an s3:// prefix that must take, give back and delete an object")
    mlflow: bool = Field(False, description="whether the tracking server must answer and take runs")


def examine(*, as_json: bool = False) -> bool:
    """Print all findings; False if something needed is missing."""
    findings = [*_packages(), *_machine(), *_environment()]
    if as_json:
        print(json.dumps([{"what": one.what, "found": one.found, "verdict": one.verdict} for one in findings], indent=1))
    else:
        _print(findings)
    return all(finding.verdict != "missing" for finding in findings)


def preflight(needs: Needs, *, err: bool = False) -> None:
    """Check everything that a run needs, a line each. Raises one `DiffstillError` that lists all that is missing, `TransientError` if all of it may come back."""
    findings = list(_checked(needs))
    _print(findings, err=err)
    missing = [finding for finding in findings if finding.verdict == "missing"]
    if missing:
        lines = [f"{finding.what}: {finding.found}" for finding in missing]
        listed = lines[0] if len(lines) == 1 else "; ".join(f"({number}) {one}" for number, one in enumerate(lines, 1))
        raise (TransientError if all(finding.passes for finding in missing) else DiffstillError)(f"this machine lacks what the run needs: {listed}")


def _checked(needs: Needs) -> Iterator[Finding]:
    if needs.gpus:
        yield _gpus(needs.gpus)
    if needs.disk_gib:
        yield from (_disk(folder, needs.disk_gib) for folder in _written())
    if needs.shared_memory_gib:
        yield _shared_memory(needs.shared_memory_gib)
    yield from (_variable(name) for name in needs.environment)
    if needs.store:
        yield _answer("store", partial(_probed, needs.store))
    if needs.mlflow:
        yield _answer("mlflow", check_tracking)


def _print(findings: Sequence[Finding], *, err: bool = False) -> None:
    table = Table(show_edge=False, box=None)
    for title in ("", "found", ""):
        table.add_column(title, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, escape(finding.found), {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "-": ""}[finding.verdict])
    Console(highlight=False, stderr=err).print(table)


def _packages() -> list[Finding]:
    """Every package is imported before it is vouched for: as a user's script does, and if that fails as diffstill does."""
    findings, versions = [Finding("python", platform.python_version(), "ok")], {}
    for name in (*NEEDED, *OPTIONAL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed" + (" (optional)" if name in OPTIONAL else ""), "-" if name in OPTIONAL else "missing"))
    plain = _unimportable(*versions)
    ours = _unimportable("diffstill", *plain) if plain else {}
    for name, version in versions.items():
        if name in ours:
            findings.append(Finding(name, f"{version}, cannot be imported ({ours[name]}); install it anew", "missing"))
        elif name in plain and name == "kfp":
            findings.append(Finding(name, f"{version}, for tasks alone, without what compiling and submitting need", "ok"))
        elif name in plain:
            findings.append(Finding(name, f"{version}, works in diffstill, but not alone ({plain[name]}); {OTHER_BUILD}", "-"))
        else:
            findings.append(Finding(name, version + (_build() if name == "torchvision" else ""), "ok"))
    return findings


def _build() -> str:
    """What is to be said of a torchvision that loads: its own operators may be missing all the same."""
    spec = importlib.util.find_spec("torchvision")
    if not spec or not spec.origin or loads(Path(spec.origin).parent):
        return ""
    return ", built for another torch: its own operators (nms) are missing, which diffstill does not use; for them install the build of torch's index"


@cache
def _unimportable(*packages: str) -> dict[str, str]:
    """Those that cannot be imported one after the other in a fresh process, each with the reason."""
    modules = {MODULES.get(name, name): name for name in packages}
    # As a task on Kubeflow imports it: the images hold kfp without what it needs elsewhere.
    world = os.environ | ({"_KFP_RUNTIME": "true"} if "diffstill" in packages else {})
    command = [sys.executable, "-c", IMPORTS, *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=world)
    if done.returncode:
        return dict.fromkeys(packages, f"Python ended with {done.returncode} while they were imported")
    return {modules[name]: " ".join(reason.split()) for name, reason in json.loads(done.stdout.splitlines()[-1]).items()}


def _machine() -> list[Finding]:
    import torch

    free = shutil.disk_usage(Path.cwd()).free / GIB
    memory = psutil.virtual_memory()
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return [
        Finding("device", ", ".join(names) or "cpu (no CUDA device)", "ok"),
        Finding("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads", "ok"),
        Finding("memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free", "ok"),
        Finding(
            "disk", f"{free:.1f} GiB free in the current folder (at least {MIN_DISK_GIB:.0f} wanted)", "ok" if free >= MIN_DISK_GIB else "missing"
        ),
        Finding(
            "current folder", "writable" if os.access(Path.cwd(), os.W_OK) else "not writable", "ok" if os.access(Path.cwd(), os.W_OK) else "missing"
        ),
        *(Finding(tool, shutil.which(tool) or "not found (optional)", "ok" if shutil.which(tool) else "-") for tool in ("git", "dvc")),
    ]


def _environment() -> list[Finding]:
    """Endpoints without the credentials that a URL may carry; of secrets only whether they are set."""
    endpoints = [Finding(name, without_secrets(os.environ.get(name, "not set")), "-") for name in ENDPOINTS]
    return endpoints + [Finding(name, "set" if os.environ.get(name) else "not set", "-") for name in SECRETS]


def _gpus(wanted: int) -> Finding:
    """Devices that are listed and compute: a driver that does not fit shows only in use."""
    import torch

    names, broken = [], []
    for number in range(torch.cuda.device_count()):
        try:
            torch.ones(1, device=f"cuda:{number}").sum().item()
            names.append(torch.cuda.get_device_name(number))
        except RuntimeError as error:
            broken.append(f"cuda:{number} does not compute ({str(error).splitlines()[0]})")
    if len(names) >= wanted:
        return Finding("gpus", f"{len(names)}: {', '.join(names)}", "ok")
    found = "; ".join([f"{len(names)} of {wanted} wanted", *broken])
    return Finding("gpus", f"{found}; ask for more GPUs, or mend the driver or the CUDA build of torch", "missing")


def _written() -> list[Path]:
    """The folders that a run writes to, or the nearest above them that exist."""
    folders = [folder.absolute() for folder in (work_root(), cache_folder(), Path(tempfile.gettempdir()))]
    return list(dict.fromkeys(next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK)) for folder in folders))


def _disk(folder: Path, wanted: float) -> Finding:
    free = shutil.disk_usage(folder).free / GIB
    if not os.access(folder, os.W_OK):
        return Finding(
            "disk", f"{folder} is not writable; mount a volume there, or point DIFFSTILL_WORK, DIFFSTILL_CACHE or TMPDIR elsewhere", "missing"
        )
    if free < wanted:
        return Finding("disk", f"{free:.1f} of {wanted:g} GiB free in {folder}; free space or mount a larger volume there", "missing")
    return Finding("disk", f"{free:.1f} GiB free in {folder}", "ok")


def _shared_memory(wanted: float) -> Finding:
    size = shutil.disk_usage(SHARED_MEMORY).total / GIB if SHARED_MEMORY.is_dir() else 0.0
    if size < wanted:
        return Finding("shared memory", f"{size:.2f} of {wanted:g} GiB in {SHARED_MEMORY}; mount an emptyDir of medium Memory there", "missing")
    return Finding("shared memory", f"{size:.2f} GiB in {SHARED_MEMORY}", "ok")


def _variable(name: str) -> Finding:
    if os.environ.get(name):
        return Finding(name, "set", "ok")
    return Finding(name, "not set or empty; give the run the secret or setting that holds it", "missing")


def _probed(store: str) -> str:
    probe(store)
    return f"{store} takes, gives back and deletes objects"


def _answer(what: str, ask: Callable[[], str]) -> Finding:
    """Whether a service answers: its own words either way."""
    try:
        return Finding(what, ask(), "ok")
    except DiffstillError as error:
        return Finding(what, str(error), "missing", passes=isinstance(error, TransientError))
