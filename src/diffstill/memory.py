"""The self-adaptive memory, its rivals, and the two terms of the loss that use it. Torch only: a library to lift out.

Source: Li et al., "Diversity-Driven Generative Dataset Distillation Based on Diffusion Model with Self-Adaptive
Memory" (ICIP 2025); the first-in-first-out policy is that of Gu et al., "Efficient Dataset Distillation via Minimax
Diffusion" (CVPR 2024). Shapes: K classes, N capacity, D flattened latent, B samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

Policy = Literal["redundancy", "fifo"]
TIE = 1e-6
"""Redundancies closer than this are equal; the oldest of equals leaves."""


class ClassMemory:
    """For each of K classes up to N flattened latents, kept as unit vectors, with their cosine similarities.

    An entry that joins a full memory makes one entry leave: with `redundancy` the one whose cosine similarities to all
    entries of its class, the newcomer included, sum highest (it may be the newcomer); with `fifo` the oldest.
    Entries join one by one in the order of the batch, those of different classes at the same time; labels are on the
    CPU and everything else stays on the device, so that no update waits for it.
    """

    def __init__(self, classes: int, capacity: int, dim: int, policy: Policy, device: torch.device | str = "cpu") -> None:
        self.policy, self.capacity = policy, capacity
        self.entries = torch.zeros(classes, capacity, dim, device=device)
        self.similarity = torch.zeros(classes, capacity, capacity, device=device)
        self.age = torch.zeros(classes, capacity, dtype=torch.long, device=device)  # when an entry joined its class, from 0
        self.joined = torch.zeros(classes, dtype=torch.long, device=device)  # entries that ever joined
        self.filled = torch.zeros(classes, dtype=torch.long, device=device)

    def valid(self) -> Tensor:
        """Which slots hold an entry: (K, N) bool."""
        return torch.arange(self.capacity, device=self.filled.device) < self.filled[:, None]

    @torch.no_grad()
    def add(self, vectors: Tensor, labels: Tensor) -> None:
        """Let `vectors` (B, D) of classes `labels` (B,), on the CPU, join in order."""
        unit = normalize(vectors.float(), dim=1)
        for rows in _rounds(labels):
            self._join(unit[rows.to(unit.device)], labels[rows].to(unit.device))

    def _join(self, newcomers: Tensor, classes: Tensor) -> None:
        """Let one newcomer (R, D) join each of R different `classes` (R,)."""
        entries, similarity, valid = self.entries[classes], self.similarity[classes], self.valid()[classes]
        to_newcomer = torch.einsum("rnd,rd->rn", entries, newcomers) * valid
        filled = self.filled[classes]
        full = filled == self.capacity
        leaver = self._leaver(similarity, to_newcomer, newcomers.square().sum(dim=1), self.age[classes])
        slot = torch.where(full, leaver, filled).clamp(max=self.capacity - 1)
        stays = ~full | (leaver < self.capacity)
        kept, at = classes[:, None], slot[:, None]
        row = to_newcomer.scatter(1, at, newcomers.square().sum(dim=1, keepdim=True))
        write = stays[:, None]
        self.entries[kept, at] = torch.where(write[..., None], newcomers[:, None], self.entries[kept, at])
        self.similarity[classes, slot] = torch.where(write, row, self.similarity[classes, slot])
        self.similarity[classes, :, slot] = torch.where(write, row, self.similarity[classes, :, slot])
        self.age[classes, slot] = torch.where(stays, self.joined[classes], self.age[classes, slot])
        self.joined[classes] += 1
        self.filled[classes] = (filled + 1).clamp(max=self.capacity)

    def _leaver(self, similarity: Tensor, to_newcomer: Tensor, to_itself: Tensor, age: Tensor) -> Tensor:
        """The slot that a full memory gives up, (R,); `capacity` stands for the newcomer itself."""
        if self.policy == "fifo":
            return age.argmin(dim=1)
        redundancy = similarity.double().sum(dim=2) + to_newcomer
        own = to_newcomer.double().sum(dim=1) + to_itself
        redundancy = torch.cat([redundancy, own[:, None]], dim=1)
        newest = torch.full_like(age[:, :1], torch.iinfo(torch.long).max - 1)
        ages = torch.cat([age, newest], dim=1)
        most = redundancy >= redundancy.amax(dim=1, keepdim=True) - TIE
        return ages.masked_fill(~most, torch.iinfo(torch.long).max).argmin(dim=1)

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must keep; `load_state` is the inverse."""
        return {name: getattr(self, name) for name in ("entries", "similarity", "age", "joined", "filled")}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _rounds(labels: Tensor) -> list[Tensor]:
    """Cut a batch into rounds in which every class comes at most once: round r holds each class's r-th sample, in order."""
    same_before = (labels[:, None] == labels[None, :]).tril(-1).sum(dim=1)
    return [torch.nonzero(same_before == turn).flatten() for turn in range(int(same_before.max()) + 1 if len(labels) else 0)]


def _extreme_per_class(similarity: Tensor, labels: Tensor, memory: ClassMemory, reduce: Literal["amin", "amax"]) -> tuple[Tensor, Tensor]:
    """Per class the least or greatest similarity of a batch to its memory (K,), and which classes have one (K,)."""
    nothing = torch.inf if reduce == "amin" else -torch.inf
    similarity = similarity.masked_fill(~memory.valid()[labels], nothing)
    per_sample = similarity.amin(dim=1) if reduce == "amin" else similarity.amax(dim=1)
    classes = len(memory.filled)
    per_class = per_sample.new_full((classes,), nothing).scatter_reduce(0, labels, per_sample, reduce)
    return per_class, per_class != nothing


def _similarity(x0_hat: Tensor, labels: Tensor, memory: ClassMemory) -> Tensor:
    return torch.einsum("bd,bnd->bn", normalize(x0_hat.float(), dim=1), memory.entries[labels])


def _mean_over_present(terms: Tensor, known: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes present in the batch; a class with an empty memory counts with 0."""
    present = torch.zeros_like(terms).index_fill(0, labels, 1.0)
    return torch.where(known, terms, 0.0).sum() / present.sum().clamp(min=1)


def representativeness(x0_hat: Tensor, labels: Tensor, real: ClassMemory) -> Tensor:
    """L_real: mean over the classes in the batch of 1 - min cos(x0_hat of c, entry of c). A scalar.

    The least similar pair is pulled together, so that the whole memory is covered. x0_hat is (B, D), labels (B,),
    all on the memory's device. An empty batch gives 0.
    """
    least, known = _extreme_per_class(_similarity(x0_hat, labels, real), labels, real, "amin")
    return _mean_over_present(1 - torch.where(known, least, 0.0), known, labels)


def diversity(x0_hat: Tensor, labels: Tensor, generated: ClassMemory) -> Tensor:
    """L_gen: mean over the classes in the batch of max cos(x0_hat of c, entry of c). A scalar.

    The most similar pair is pushed apart. Shapes as in `representativeness`.
    """
    greatest, known = _extreme_per_class(_similarity(x0_hat, labels, generated), labels, generated, "amax")
    return _mean_over_present(torch.where(known, greatest, 0.0), known, labels)
