"""Named student protocols: numbers of two protocols never share a table.

The recipes of the literature carry the name of where they come from and refuse data that they are
not for; `short-<steps>` is ours, for any data: the same optimiser with a budget in steps, equal
for every source of a table.

Sources: Gu et al. 2024 (arXiv 2311.15529) and its code; Kim et al. 2022 (arXiv 2205.14959), whose
harness that is; Zhao & Bilen 2021 (arXiv 2102.08259) for the siamese augmentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from diffstill.errors import DiffstillError

_EPOCHS = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))
CONDENSATION_EPOCHS = 1000


@dataclass(frozen=True)
class Protocol:
    """How a student is trained, and on what. `steps` is None where the budget is in epochs.

    `side` is that at which students see the images; None: as they are. `sides` and `classes` bound
    what the recipe is for (inclusive).
    """

    name: str
    steps: int | None = None
    epochs: int | None = None
    """Passes over the training set, whatever its size; None: by images per class."""
    side: int | None = None
    sides: tuple[int, int] = (1, 1024)
    classes: tuple[int, int] = (1, 10**6)
    augmentation: Literal["crop", "siamese"] = "crop"
    cutmix_share: float = 1.0
    """Share of batches that CutMix mixes."""
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    milestones: tuple[float, float] = (2 / 3, 5 / 6)
    decay: float = 0.2
    cutmix_beta: float = 1.0

    def budget(self, images: int, classes: int) -> int:
        """Optimiser steps for a set of `images` in `classes` classes; an epoch's last batch is partial."""
        if self.steps is not None:
            return self.steps
        epochs = self.epochs or literature_epochs(images / classes, classes)
        return epochs * -(-images // self.batch_size)

    def misfit(self, side: int, classes: int | None = None) -> str | None:
        """Why the recipe is not for images of `side` px in `classes` classes, and what is; None: it is."""
        found = ((side, self.sides, "px"), (classes, self.classes, "classes"))
        for value, (least, most), unit in found:
            if value is not None and not least <= value <= most:
                bounds = str(least) if least == most else f"{least} to {most}"
                return (
                    f"protocol {self.name!r} is for {bounds} {unit}, not {value}; set "
                    "`evaluate.protocol` to short-<steps>, which takes any data, or to one of "
                    f"{', '.join(NAMED)} that fits"
                )
        return None


def literature_epochs(images_per_class: float, classes: int) -> int:
    """Epochs by images per class: 1 -> 3000 ... above 500 -> 300; 100 classes: x2/3, in hundreds."""
    epochs = next((epochs for bound, epochs in _EPOCHS if images_per_class <= bound), 300)
    return epochs * 2 // 3 // 100 * 100 if classes == 100 else epochs


NAMED = {
    protocol.name: protocol
    for protocol in (
        # Minimax cuts its students' images to 224 px; several that follow it keep 256.
        Protocol("minimax-224", side=224, sides=(224, 1024), classes=(2, 100)),
        Protocol("minimax-256", side=256, sides=(256, 1024), classes=(2, 100)),
        Protocol(
            "minimax-1k",
            side=224,
            sides=(224, 1024),
            classes=(101, 10**6),
            learning_rate=0.1,
            weight_decay=1e-4,
            batch_size=128,
        ),
        Protocol(
            "condensation-small",
            epochs=CONDENSATION_EPOCHS,
            sides=(8, 32),
            classes=(2, 100),
            augmentation="siamese",
            cutmix_share=0.5,
        ),
    )
}
"""The recipes of the literature."""
SHORT = r"short-([1-9]\d{0,6})"
KNOWN = f"{', '.join(NAMED)}, or short-<steps>"


PADDED_SIDE = 28
"""Grey images of this side (MNIST's) are padded to 32 by the field's ConvNet."""
RESNET_MIN_SIDE = 16


def student_misfit(name: str, side: int, channels: int | None) -> str | None:
    """Why images of `side` px are too small for a student, as its name says; None: they are not.

    Where `channels` are not known (None) they may be grey.
    """
    what = "its last instance norm would see a single pixel"
    if match := re.fullmatch(r"convnet-([1-9]\d?)", name):
        padded = side + 4 if side == PADDED_SIDE and channels != 3 else side
        if 2 ** int(match[1]) > padded:
            return (
                f"student {name!r} needs images of at least {2 ** int(match[1])} px, these have "
                f"{side} px ({what}); use convnet-{padded.bit_length() - 1} or fewer"
            )
    if name in ("resnetap-10", "resnet-18") and side < RESNET_MIN_SIDE:
        return f"student {name!r} needs images of at least {RESNET_MIN_SIDE} px, these have {side} px ({what}); raise `prepare.side` or use a convnet"
    return None


def protocol(name: str) -> Protocol:
    """The protocol of that name; a `DiffstillError` lists the known ones otherwise."""
    if name in NAMED:
        return NAMED[name]
    if match := re.fullmatch(SHORT, name):
        return Protocol(name, steps=int(match[1]))
    raise DiffstillError(f"protocol {name!r} is not known; use {KNOWN} (1 to 9,999,999 steps)")
