"""What a result depends on beside its settings and inputs: the code, versions of packages, processor, GPUs."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import version
from pathlib import Path

from diffstill.errors import DiffstillError

PACKAGES = ("torch", "diffusers", "numpy", "pillow", "safetensors", "scikit-learn")
CPU_FACTS = Path("/proc/cpuinfo")


def rank_here() -> tuple[int, int]:
    """The number of this process, and how many there are, as `torchrun` says; (0, 1) where it has not started this one."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not all(os.environ.get(name) for name in names):
        return 0, 1  # other schedulers set some of them for purposes of their own
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError as error:
        raise DiffstillError(f"RANK and WORLD_SIZE are {os.environ['RANK']!r} and {os.environ['WORLD_SIZE']!r}, no numbers; unset them") from error


@cache
def code_version() -> str:
    """A digest of this package's own source and of the versions of what computes under it."""
    here, seen = Path(__file__).parent, hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        seen.update(f"{path.relative_to(here).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    seen.update(repr([(name, version(name)) for name in PACKAGES]).encode())
    return seen.hexdigest()[:16]


def maker(device: str) -> str:
    """What beside settings and inputs half-done work depends on: the code, the kind of `device`, the number of processes."""
    kind = device
    if device != "cpu":
        import torch

        kind = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else torch.device(device).type
    return f"code {code_version()}, {kind}, {rank_here()[1]} processes"


def git_sha() -> str:
    """The commit of the project in the current folder, with `-dirty` if files differ from it; `none` outside git."""
    try:
        return _commit(Path.cwd())
    except (OSError, subprocess.CalledProcessError):
        return "none"


def code_commit() -> str:
    """What diffstill itself is: the commit, with `-dirty` as above, of a checkout or of the image, or else the version that is installed."""
    package = Path(__file__).parent
    try:
        _git(package, "ls-files", "--error-unmatch", Path(__file__).name)  # the repository around may ignore the environment that it lies in
        return _commit(package, str(package))
    except (OSError, subprocess.CalledProcessError):
        revision = os.environ.get("DIFFSTILL_REVISION", "")
        return revision if is_commit(revision) else version("diffstill")


def is_commit(code: str) -> bool:
    """Whether what `git_sha` or `code_commit` says names a commit."""
    return re.fullmatch(r"[0-9a-f]{40}(-dirty)?", code) is not None


def _commit(folder: Path, *watched: str) -> str:
    sha = _git(folder, "rev-parse", "HEAD")
    return f"{sha}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *watched) else sha


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def environment() -> dict[str, str]:
    """That of this process, without names of hosts or people. Thread counts are missing: they are settings of each stage."""
    import torch
    from PIL import features

    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    found |= {name: version(name) for name in PACKAGES}
    found |= {"zlib": str(features.version("zlib_ng") or features.version("zlib"))}  # Pillow's: it makes the bytes of a PNG
    found |= {"processor": _processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return found | ({"gpu": ", ".join(gpus), "cuda": str(torch.version.cuda)} if gpus else {})


def _processor() -> str:
    """The model, as Linux or the platform names it."""
    lines = CPU_FACTS.read_text().splitlines() if CPU_FACTS.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")
