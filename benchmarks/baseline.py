"""The plain way to fine-tune with memories, as public research scripts do it; the yardstick of `benchmarks/finetune.py`.

Written for the benchmark after the behaviour of these scripts: images are decoded and encoded by the autoencoder at every step;
weights and arithmetic are float32 (TF32 and fused attention on, to be fair); memories are Python lists per class; whoever leaves is
found by computing all similarities anew and asking the device; the average runs over all weights; the loss is read every step.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import mse_loss, normalize
from torch.utils.data import DataLoader

from diffstill import torchvision_shim  # noqa: F401  isort:skip  (before torchvision)
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Normalize, RandomHorizontalFlip, Resize, ToTensor

from diffstill.diffusion import add_noise, predicted_clean, variational_loss
from diffstill.memory import ClassMemory, diversity, representativeness
from diffstill.networks import Generator, choose_trainable
from diffstill.stages.finetune import Latents


class ListMemory:
    """Up to `capacity` vectors per class, in lists; the most redundant leaves."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: dict[int, list[Tensor]] = defaultdict(list)

    def add(self, vectors: Tensor, labels: list[int]) -> None:
        """Take in a batch, one after the other."""
        for vector, label in zip(vectors, labels, strict=True):
            own = self.entries[label]
            own.append(vector)
            while len(own) > self.capacity:
                stacked = normalize(torch.stack(own), dim=1)
                own.pop(int((stacked @ stacked.T).sum(dim=1).argmax().item()))

    def similarity(self, vectors: Tensor, label: int) -> Tensor | None:
        """Of each vector to each entry of the class."""
        own = self.entries[label]
        return normalize(vectors, dim=1) @ normalize(torch.stack(own), dim=1).T if own else None


class BaselineLoop:
    """One step after the other. With `latents` it takes these in place of images, with `tensors` it has our memories: what each change gains."""

    def __init__(
        self, opened: Generator, images: Path, batch_size: int, device: str, *, capacity: int = 64, workers: int = 0,
        latents: Latents | None = None, tensors: bool = False,
    ) -> None:  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.opened, self.device, self.batch_size, self.latents = opened, device, batch_size, latents
        self.weights = list(choose_trainable(opened.transformer, "difffit").values())
        self.average = copy.deepcopy(opened.transformer).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-3, weight_decay=0)
        self.real, self.generated = ListMemory(capacity), ListMemory(capacity)
        dim = opened.latent_shape[0] * opened.latent_shape[1] ** 2
        self.tensors = [ClassMemory(1000, capacity, dim, "redundancy", device) for _ in range(2)] if tensors else None
        self.alphas_cumprod = opened.alphas_cumprod().to(device)
        side = opened.latent_shape[1] * 8
        cut = Compose([Resize(side), CenterCrop(side), RandomHorizontalFlip(), ToTensor(), Normalize([0.5] * 3, [0.5] * 3)])
        loader = DataLoader(
            ImageFolder(images, cut), batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=device != "cpu",
            persistent_workers=workers > 0,
        )  # fmt: skip
        self.batches = self._endless(loader)

    def _endless(self, loader: DataLoader[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    def _data(self) -> tuple[Tensor, Tensor]:
        if self.latents is not None:
            rows = torch.randint(len(self.latents.labels), (self.batch_size,))
            mean, std = self.latents.take(rows, torch.randint(2, rows.shape))
            return mean + std * torch.randn_like(mean), self.latents.labels[rows].to(self.device)
        pixels, labels = (part.to(self.device) for part in next(self.batches))
        with torch.no_grad():
            return self.opened.vae.encode(pixels).latent_dist.sample() * self.opened.vae.config.scaling_factor, labels

    def _terms(self, x0_hat: Tensor, labels: Tensor) -> Tensor:
        if self.tensors:
            return 0.002 * representativeness(x0_hat, labels, self.tensors[0]) + 0.008 * diversity(x0_hat, labels, self.tensors[1])
        terms, present = x0_hat.new_zeros(()), labels.unique().tolist()
        for label in present:
            mine = x0_hat[labels == label]
            if (near := self.real.similarity(mine, label)) is not None:
                terms = terms + 0.002 * (1 - near.min()) / len(present)
            if (near := self.generated.similarity(mine, label)) is not None:
                terms = terms + 0.008 * near.max() / len(present)
        return terms

    def step(self) -> float:
        """Data, autoencoder, both terms, optimiser, average, memories; the loss."""
        x0, labels = self._data()
        t = torch.randint(0, 1000, (len(x0),), device=self.device)
        eps = torch.randn_like(x0)
        x_t = add_noise(x0, eps, self.alphas_cumprod[t])
        dropped = torch.rand(len(x0), device=self.device) < 0.1
        output = self.opened.transformer(x_t, timestep=t, class_labels=torch.where(dropped, 1000, labels), return_dict=False)[0]
        loss = mse_loss(output[:, :4], eps) + variational_loss(output, x0, x_t, t, self.alphas_cumprod)
        x0_hat = predicted_clean(x_t, output[:, :4], self.alphas_cumprod[t]).flatten(1)
        loss = loss + self._terms(x0_hat, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.opened.transformer.parameters(), strict=True):
                mean.mul_(0.9999).add_(weight, alpha=1e-4)
        if self.tensors:
            for memory, vectors in zip(self.tensors, (x0.flatten(1), x0_hat.detach()), strict=True):
                memory.add(vectors, labels.cpu())
        else:
            self.real.add(x0.flatten(1), labels.tolist())
            self.generated.add(x0_hat.detach(), labels.tolist())
        return loss.item()


def write_jpegs(folder: Path, classes: int, per_class: int, side: int) -> Path:
    """A folder of noise pictures, blurred so that they compress as photographs do."""
    draws = torch.Generator().manual_seed(0)
    for label in range(classes):
        (folder / f"class-{label}").mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            small = torch.randint(0, 256, (side // 8, side // 8, 3), generator=draws, dtype=torch.uint8)
            picture = Image.fromarray(small.numpy()).resize((side, side), Image.Resampling.BICUBIC)
            picture.save(folder / f"class-{label}" / f"{number:05d}.jpg", quality=90)
    return folder
