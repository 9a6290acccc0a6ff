"""`diffstill doctor`: what this machine offers, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffstill.tracking import without_secrets

NEEDED = ("torch", "torchvision", "diffusers", "timm", "safetensors", "pydantic", "scikit-learn", "mlflow")
OPTIONAL = ("dvc", "kfp", "boto3")
SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN")
ENDPOINTS = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "AWS_ENDPOINT_URL", "DIFFSTILL_WORK", "DIFFSTILL_CACHE")
MIN_DISK_GIB = 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    what: str
    found: str
    verdict: Literal["ok", "missing", "-"]


def examine() -> bool:
    """Print all findings; False if something needed is missing."""
    findings = [*_packages(), *_machine(), *_environment()]
    table = Table(show_edge=False, box=None)
    for title in ("", "found", ""):
        table.add_column(title, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, escape(finding.found), {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "-": ""}[finding.verdict])
    Console(highlight=False).print(table)
    return all(finding.verdict != "missing" for finding in findings)


def _packages() -> list[Finding]:
    findings = [Finding("python", platform.python_version(), "ok")]
    for name in (*NEEDED, *OPTIONAL):
        try:
            findings.append(Finding(name, importlib.metadata.version(name), "ok"))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(name, "not installed" + (" (optional)" if name in OPTIONAL else ""), "-" if name in OPTIONAL else "missing"))
    return findings


def _machine() -> list[Finding]:
    import torch

    free = shutil.disk_usage(Path.cwd()).free / 2**30
    memory = psutil.virtual_memory()
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return [
        Finding("device", ", ".join(names) or "cpu (no CUDA device)", "ok"),
        Finding("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads", "ok"),
        Finding("memory", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free", "ok"),
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
