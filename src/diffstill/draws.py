"""Every random stream of the project: a generator is a pure function of what it is for and of three numbers."""

from __future__ import annotations

from enum import IntEnum, unique

import numpy as np
import torch


@unique
class Purpose(IntEnum):
    """What a stream is for: the first number of its key. Behind the colon, the numbers that follow.

    Values are part of what a seed means: add new ones at the end, never renumber.
    """

    SPLIT = 1
    """Which images of a class become test or val: seed, 64 bits of the class name's digest."""
    GENERATOR_WEIGHTS = 2
    """First weights of autoencoder and transformer: seed."""
    VAE_BATCH = 3
    """Order of images: seed, epoch."""
    VAE_STEP = 4
    """Noise of an optimiser step: seed, step."""
    DIT_BATCH = 5
    DIT_STEP = 6
    FINETUNE_BATCH = 7
    """Order of images: seed, epoch, class (balanced batches) or 0."""
    FINETUNE_STEP = 8
    IMAGE = 9
    """Noise of a synthetic image: generation seed, class, number."""
    SHOWN = 10
    """Noise of the pictures that `pretrain` shows: number."""
    RANDOM_REAL = 11
    """Which real images form a baseline: draw, class."""
    STUDENT_WEIGHTS = 12
    """First weights of a student: seed."""
    STUDENT_TRAINING = 13
    """Its batches and augmentation: seed."""


def _sequence(purpose: Purpose, numbers: tuple[int, ...]) -> np.random.SeedSequence:
    # A SeedSequence takes (1,) and (1, 0) for the same, and splits numbers of more than 32 bits:
    # keys that all have four numbers of 32 bits cannot meet.
    if len(numbers) > 3 or not all(0 <= number < 2**32 for number in numbers):
        raise ValueError(f"{purpose.name}: {numbers}: at most three numbers from 0 to 2**32 - 1")
    return np.random.SeedSequence((purpose, *numbers, *(0,) * (3 - len(numbers))))


def seeded(purpose: Purpose, *numbers: int) -> torch.Generator:
    """A CPU generator that is a pure function of `purpose` and up to three `numbers` (0 to 2**32 - 1)."""
    return torch.Generator().manual_seed(seed_of(purpose, *numbers))


def seed_of(purpose: Purpose, *numbers: int) -> int:
    """The seed of that stream (63 bits), for what takes no generator, such as constructors of modules."""
    return int(_sequence(purpose, numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def shuffled(size: int, purpose: Purpose, *numbers: int) -> np.typing.NDArray[np.int64]:
    """A permutation of 0 to `size` - 1 from that stream."""
    return np.random.default_rng(_sequence(purpose, numbers)).permutation(size)
