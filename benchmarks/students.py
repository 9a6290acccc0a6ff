"""Training a student on a small set, ours beside the usual loop: `python -m benchmarks.students [--student convnet-3 --side 32 --channels 1 --device cuda]`.

The same network, batch size and number of steps. Ours holds the set on the device and augments a batch at once; the usual loop decodes
nothing (it keeps PIL images), augments each image with torchvision in a DataLoader, and sends the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from benchmarks.shapes import by_turns, machine, options

from diffstill import torchvision_shim  # noqa: F401  isort:skip  (before torchvision)
from torchvision.transforms import ColorJitter, Compose, RandomCrop, RandomHorizontalFlip, RandomResizedCrop, ToTensor

from diffstill.protocols import protocol
from diffstill.students import build_student, pixel_statistics, train_student
from diffstill.training import set_threads

CLASSES = 10


class Pictures(Dataset[tuple[torch.Tensor, int]]):
    """PIL images, augmented one by one."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, side: int) -> None:
        self.images = [Image.fromarray(one.transpose(1, 2, 0).squeeze()) for one in pixels]
        self.labels = labels.tolist()
        grey = [RandomCrop(side, padding=side // 8)]
        colour = [RandomResizedCrop(side, scale=(0.5, 1.0)), ColorJitter(0.4, 0.4, 0.4)]
        changes = grey if pixels.shape[1] == 1 else colour
        self.cut = Compose([*changes, RandomHorizontalFlip(), ToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return self.cut(self.images[number]), self.labels[number]


def usual(pixels: np.ndarray, labels: np.ndarray, name: str, side: int, steps: int, device: str, workers: int) -> None:
    """Train for `steps` steps."""
    student = build_student(name, classes=CLASSES, channels=pixels.shape[1], side=side, seed=0).to(device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        Pictures(pixels, labels, side),
        min(64, len(labels)),
        shuffle=True,
        num_workers=workers,
        pin_memory=device != "cpu",
        persistent_workers=workers > 0,
    )
    done = 0
    while done < steps:
        for images, targets in loader:
            loss = cross_entropy(student(images.to(device)), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if done == steps:
                return


def ours(pixels: np.ndarray, labels: np.ndarray, name: str, side: int, steps: str, device: str) -> None:
    """Train by the stage's own loop, without a look at test images."""
    student = build_student(name, classes=CLASSES, channels=pixels.shape[1], side=side, seed=0).to(device)
    train_student(
        student, pixels, labels, protocol=protocol(steps), classes=CLASSES, statistics=pixel_statistics([pixels]), flip=True, seed=0, evaluations=1,
        evaluate=lambda _: {},
    )  # fmt: skip


def main() -> None:
    """One row."""
    parser = options(__doc__, side=32, channels=3, images_per_class=10, student_steps=20, workers=0)
    parser.set_defaults(steps=1, warm=1)
    parser.add_argument("--student", default="convnet-3")
    given = parser.parse_args()
    set_threads(given.threads, given.device)
    draws = np.random.default_rng(0)
    labels = np.arange(CLASSES * given.images_per_class, dtype=np.int64) % CLASSES
    pixels = draws.integers(0, 256, (len(labels), given.channels, given.side, given.side), np.uint8)
    name, side, steps, device = given.student, given.side, given.student_steps, given.device
    ways = {
        "ours": lambda: ours(pixels, labels, name, side, f"short-{steps}", device),
        "usual": lambda: usual(pixels, labels, name, side, steps, device, given.workers),
    }
    found = by_turns(ways, device, steps=given.steps, warm=given.warm, blocks=given.blocks)
    images = steps * min(64, len(labels))
    ratios = sorted(slow / fast for slow, fast in zip(found["usual"].times, found["ours"].times, strict=True))
    print(
        f"{machine(device)}; {name} at {side} px, {given.channels} channels, {len(labels)} images, {steps} steps; {given.workers} loader processes for the usual loop"
    )
    table = Table("ours", "usual loop", "ratio (least to most)")
    table.add_row(
        found["ours"].rate(images),
        found["usual"].rate(images),
        f"{found['usual'].median / found['ours'].median:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
