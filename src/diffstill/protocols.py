"""Named student protocols: numbers of two protocols never share a table.

Every protocol is the field's common recipe (SGD, learning rate 0.01, momentum 0.9, weight decay 5e-4, batch 64,
x0.2 at 2/3 and 5/6 of the budget, augmentation, then CutMix). They differ in the budget alone: `literature` counts
epochs by images per class, the short ones count optimiser steps, equal for every source of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffstill.errors import DiffstillError

_LITERATURE_EPOCHS = ((1, 3000), (10, 2000), (50, 1500), (200, 1000), (500, 500))


@dataclass(frozen=True)
class Protocol:
    """How a student is trained. `steps` is None where the budget is the literature's, in epochs."""

    name: str
    steps: int | None
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    milestones: tuple[float, float] = (2 / 3, 5 / 6)
    decay: float = 0.2
    cutmix_beta: float = 1.0

    def budget(self, images: int, classes: int) -> int:
        """Optimiser steps for a training set of `images` in `classes` classes (batches of `batch_size`, the last partial)."""
        if self.steps is not None:
            return self.steps
        return literature_epochs(images / classes, classes) * -(-images // self.batch_size)


def literature_epochs(images_per_class: float, classes: int) -> int:
    """Epochs by images per class: 1 -> 3000 ... above 500 -> 300; with exactly 100 classes x2/3, rounded down to a hundred."""
    epochs = next((epochs for bound, epochs in _LITERATURE_EPOCHS if images_per_class <= bound), 300)
    return epochs * 2 // 3 // 100 * 100 if classes == 100 else epochs


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("literature", None),
        *(Protocol(f"short-{steps}", steps) for steps in (20, 150, 200, 300, 500, 1000, 2000, 5000)),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol of that name; a `DiffstillError` lists the known ones otherwise."""
    if name not in PROTOCOLS:
        raise DiffstillError(f"protocol {name!r} is not known; use one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
