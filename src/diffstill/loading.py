"""A distilled set as a dataset of PyTorch: what `diffstill.load` gives, once the files are on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from diffstill.artifacts import Artifact, Manifest, open_artifact
from diffstill.errors import DiffstillError
from diffstill.pictures import read_png

Transform = Callable[[Any], Any]


class DistilledSet(Dataset[tuple[Any, int]]):
    """The images of one generation seed with their labels, class by class; `open_set` makes it.

    An item is (image, label): a Pillow image, grey (mode L) or colour (RGB) as the set is, or what `transform` makes of
    it. A label is the position of the class in `classes`. `classes`, `class_to_idx`, `samples` and `targets` are there
    as in torchvision's `ImageFolder`, but classes are in diffstill's order, which need not be alphabetical: that of the
    real images, or of `sample.classes` where the set has only those.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        seed: int,
        images_per_class: int,
        transform: Transform | None = None,
        target_transform: Transform | None = None,
        card: str | None = None,
    ) -> None:
        self.artifact, self.seed, self.images_per_class, self.card = artifact, seed, images_per_class, card
        self.transform, self.target_transform = transform, target_transform
        self.classes: list[str] = list(artifact.facts["classes"])
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.samples = [
            (_path(artifact, seed, name, number), label) for name, label in self.class_to_idx.items() for number in range(images_per_class)
        ]
        self.targets = [label for _, label in self.samples]

    @property
    def manifest(self) -> Manifest:
        """What the whole artifact says of itself."""
        return self.artifact.manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the whole artifact, of which this may be a part."""
        return self.artifact.digest

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        with Image.open(path) as file:
            image = file.copy()
        return (
            self.transform(image) if self.transform else image,
            self.target_transform(label) if self.target_transform else label,
        )

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images, uint8 (N, C, H, W), and labels, int64 (N,), untransformed."""
        pixels = np.stack([read_png(Path(path)) for path, _ in self.samples])
        return torch.from_numpy(pixels), torch.tensor(self.targets)

    def __repr__(self) -> str:
        lines = [
            f"Dataset {type(self).__name__}",
            f"Number of datapoints: {len(self)}",
            f"Root location: {self.artifact.folder}",
            f"Classes: {len(self.classes)}, images per class: {self.images_per_class}, seed: {self.seed}",
            f"Digest: {self.digest}",
        ]
        transforms = {"Transform": self.transform, "Target transform": self.target_transform}
        lines += [line for name, given in transforms.items() if given for line in f"{name}: {given}".splitlines()]
        return "\n    ".join(lines)


def open_set(
    folder: Path,
    *,
    ipc: int | None = None,
    seed: int | None = None,
    transform: Transform | None = None,
    target_transform: Transform | None = None,
    card: str | None = None,
) -> DistilledSet:
    """Open the `distilled` artifact at `folder` and verify the digests of all its files.

    `seed` picks the generation seed, by default the first; `ipc` keeps the first images of each class, which are the
    set for that many images per class. `card` is Markdown about the set and is handed on. Raises `DiffstillError` on a
    damaged artifact, and on an `ipc` or `seed` that it has not.
    """
    artifact = open_artifact(folder, "distilled")
    seeds, most = artifact.facts["seeds"], artifact.facts["images_per_class"]
    seed, ipc = seeds[0] if seed is None else seed, most if ipc is None else ipc
    if type(seed) is not int or type(ipc) is not int:
        raise DiffstillError(f"`ipc` {ipc!r} and `seed` {seed!r}: whole numbers are expected")
    if seed not in seeds:
        raise DiffstillError(f"{folder}: has no generation seed {seed}; its seeds are {', '.join(map(str, seeds))}")
    if not 1 <= ipc <= most:
        raise DiffstillError(f"{folder}: cannot give {ipc} images per class; ask for 1 to {most}")
    return DistilledSet(artifact, seed=seed, images_per_class=ipc, transform=transform, target_transform=target_transform, card=card)


def _path(artifact: Artifact, seed: int, name: str, number: int) -> str:
    """Where an image lies. Files come from elsewhere: only those are opened that the manifest lists."""
    file = f"seed-{seed}/{name}/{number:05d}.png"
    if file not in artifact.manifest.files:
        raise DiffstillError(f"{artifact.folder}: its manifest lists no {file}, though its facts promise it; make the artifact anew")
    return str(artifact.folder / file)
