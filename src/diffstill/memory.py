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
Accumulate = Literal["paper", "as_published"]
TIE = 1e-6
"""Redundancies closer than this are equal; the oldest of equals leaves."""


class ClassMemory:
    """For each of K classes up to N flattened latents, kept as unit vectors, oldest first, with their cosine similarities.

    A batch joins as a whole. Then, while a class holds more than N entries, one of them leaves: with `redundancy` the
    one whose cosine similarities to all entries of its class sum highest (it may be a newcomer); with `fifo` the
    oldest. Labels are on the CPU and everything else stays on the device, so that no update waits for it.
    """

    def __init__(self, classes: int, capacity: int, dim: int, policy: Policy, device: torch.device | str = "cpu") -> None:
        self.policy, self.capacity = policy, capacity
        self.entries = torch.zeros(classes, capacity, dim, device=device)
        self.similarity = torch.zeros(classes, capacity, capacity, device=device)
        self.filled = torch.zeros(classes, dtype=torch.long, device=device)

    def valid(self) -> Tensor:
        """Which slots hold an entry: (K, N) bool."""
        return torch.arange(self.capacity, device=self.filled.device) < self.filled[:, None]

    @torch.no_grad()
    def add(self, vectors: Tensor, labels: Tensor) -> None:
        """Let `vectors` (B, D) of classes `labels` (B,), on the CPU, join in order; then the surplus leaves."""
        if not len(labels):
            return
        device = self.entries.device
        present, of = labels.unique(return_inverse=True)
        turn = (labels[:, None] == labels[None, :]).tril(-1).sum(dim=1)  # how many of its class came before it in the batch
        most = int(turn.max()) + 1
        classes, of, turn = _sent(present, device), _sent(of, device), _sent(turn, device)

        newcomers = self.entries.new_zeros(len(present), most, vectors.shape[1])
        newcomers[of, turn] = normalize(vectors.float(), dim=1)
        arrived = torch.zeros(len(present), most, dtype=torch.bool, device=device)
        arrived[of, turn] = True
        pool = torch.cat([self.entries[classes], newcomers], dim=1)
        valid = torch.cat([self.valid()[classes], arrived], dim=1)
        similarity = self._pooled_similarity(classes, newcomers)

        for _ in range(most):
            self._drop_one(similarity, valid)
        kept = torch.argsort(~valid, dim=1, stable=True)[:, : self.capacity]  # those that stay, in their order, come first
        rows = torch.arange(len(present), device=device)[:, None]
        self.entries[classes] = pool[rows, kept]
        self.similarity[classes] = similarity[rows[..., None], kept[:, :, None], kept[:, None, :]]
        self.filled[classes] = valid.sum(dim=1)

    def _pooled_similarity(self, classes: Tensor, newcomers: Tensor) -> Tensor:
        """Similarities of the entries of `classes` and the newcomers (P, M, D), old ones not computed again: (P, N+M, N+M)."""
        across = self.entries[classes] @ newcomers.mT
        above = torch.cat([self.similarity[classes], across], dim=2)
        below = torch.cat([across.mT, newcomers @ newcomers.mT], dim=2)
        return torch.cat([above, below], dim=1)

    def _drop_one(self, similarity: Tensor, valid: Tensor) -> None:
        """Where more than N of the pool (P, N+M) are left, one leaves: its similarities become 0. In place."""
        places = torch.arange(valid.shape[1], device=valid.device)
        candidates = valid
        if self.policy == "redundancy":
            redundancy = similarity.double().sum(dim=2).masked_fill(~valid, -torch.inf)
            candidates = redundancy >= redundancy.amax(dim=1, keepdim=True) - TIE
        leaver = places.expand_as(valid).masked_fill(~candidates, len(places)).amin(dim=1, keepdim=True)  # the oldest of equals
        leaves = (places == leaver) & (valid.sum(dim=1, keepdim=True) > self.capacity)
        valid &= ~leaves
        similarity.masked_fill_(leaves[:, :, None] | leaves[:, None, :], 0.0)

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint must keep; `load_state` is the inverse."""
        return {name: getattr(self, name) for name in ("entries", "similarity", "filled")}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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


def _over_present(terms: Tensor, known: Tensor, labels: Tensor, accumulate: Accumulate) -> Tensor:
    """Mean over the n classes present in the batch; a class with an empty memory counts with 0.

    `as_published`: the k-th class of them counts n - k + 1 times, as in the code that was published with
    the paper, which adds the running sum once per class: (n + 1) / 2 times as much on average.
    """
    present = torch.zeros_like(terms).index_fill(0, labels, 1.0)
    times = present if accumulate == "paper" else present.flip(0).cumsum(0).flip(0)
    return (times * torch.where(known, terms, 0.0)).sum() / present.sum().clamp(min=1)


def representativeness(x0_hat: Tensor, labels: Tensor, real: ClassMemory, accumulate: Accumulate = "paper") -> Tensor:
    """L_real: mean over the classes in the batch of 1 - min cos(x0_hat of c, entry of c). A scalar.

    The least similar pair is pulled together, so that the whole memory is covered. x0_hat is (B, D), labels (B,),
    all on the memory's device. An empty batch gives 0.
    """
    least, known = _extreme_per_class(_similarity(x0_hat, labels, real), labels, real, "amin")
    return _over_present(1 - torch.where(known, least, 0.0), known, labels, accumulate)


def diversity(x0_hat: Tensor, labels: Tensor, generated: ClassMemory, accumulate: Accumulate = "paper") -> Tensor:
    """L_gen: mean over the classes in the batch of max cos(x0_hat of c, entry of c). A scalar.

    The most similar pair is pushed apart. Shapes as in `representativeness`.
    """
    greatest, known = _extreme_per_class(_similarity(x0_hat, labels, generated), labels, generated, "amax")
    return _over_present(torch.where(known, greatest, 0.0), known, labels, accumulate)
