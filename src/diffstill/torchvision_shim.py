"""Lets `import torchvision` work beside another build of torch. `import diffstill` puts it in place, before whatever import comes next.

The torchvision wheel's compiled library links the CUDA libraries of the torch it was built for. Beside a CPU torch it does not
load, and `import torchvision`, on which timm and diffusers rest, then dies while it registers shapes for operators that do not
exist. Nothing here needs those operators, so where the library does not load their two schemas are declared, right before
torchvision looks for it. Where the builds match, the library loads and nothing else happens.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARY = "torchvision.extension"
"""The part of torchvision that looks for the compiled library."""
_kept: list[Any] = []  # a torch.library.Library takes its schemas away when it is collected


class _Shim(MetaPathFinder):
    """Finds nothing: it is told of every import before it happens."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:  # noqa: ARG002  (as importlib calls it)
        """Declare what the library would, if it does not load."""
        if name == LIBRARY and path and not _kept and not loads(Path(path[0])):
            import torch

            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(library)


def loads(package: Path) -> bool:
    """Whether the compiled library in the folder of torchvision loads beside this torch; True where there is none."""
    import torch

    for compiled in package.glob("_C*.so"):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            return False
    return True


def install() -> Path:
    """Let a plain `import torchvision` work in this environment: Python reads the file returned as it starts, and it imports diffstill."""
    path = Path(sysconfig.get_path("purelib")) / "diffstill-torchvision.pth"
    path.write_text("import importlib.util; importlib.util.find_spec('diffstill') and __import__('diffstill')\n", encoding="utf-8")
    return path


sys.meta_path.insert(0, _Shim())
