"""diffstill: dataset distillation by diffusion with a self-adaptive memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffstill import torchvision_shim  # noqa: F401  (before torchvision, timm and diffusers, whoever imports them)

if TYPE_CHECKING:
    from diffstill.loading import DistilledSet

__version__ = "0.1.0"


def load(
    ref: str,
    *,
    ipc: int | None = None,
    seed: int | None = None,
    transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[int], Any] | None = None,
) -> DistilledSet:
    """A distilled set as a torch data set of (PIL image or what `transform` makes of it, label).

    `ref` is a published version (`distilled-digits`, `distilled-digits@best-ipc10`, `distilled-digits/3`, `models:/...`), the S3 prefix of a
    `distilled` artifact, or its folder. `ipc` takes the first images of each class; `seed` one of the set's generation seeds, by default its
    first. Files are kept in a cache and verified each time. Raises `DiffstillError` where there is no such set, or it was tampered with.
    """
    from diffstill.loading import open_set
    from diffstill.registry import find

    found = find(ref)
    card = found.version.card if found.version else None
    return open_set(found.folder(), ipc=ipc, seed=seed, transform=transform, target_transform=target_transform, card=card)
