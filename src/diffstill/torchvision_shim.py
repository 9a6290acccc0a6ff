"""Makes `import torchvision` work beside a CPU build of torch. Import this before torchvision, timm or diffusers.

The torchvision wheel's compiled library links CUDA. Beside a CPU torch it does not load, and `import torchvision` then
dies while it registers shapes for operators that do not exist. Nothing here needs those operators, so where the library
does not load their two schemas are declared. Where the builds match, the library loads and nothing else happens.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_declared: torch.library.Library | None = None  # a Library takes its schemas away when it is collected


def _load_or_declare() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    compiled = next(iter(Path(spec.origin).parent.glob("_C*.so")), None) if spec and spec.origin else None
    if compiled is None:
        return None
    try:
        torch.ops.load_library(str(compiled))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_declared = _load_or_declare()
