"""Slow references of the memories and of the two terms, written loop by loop from the equations."""

from __future__ import annotations

import math

from torch import Tensor

TIE = 1e-6  # redundancies closer than this are equal; the oldest leaves


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


class SlowMemory:
    """Lists, and every similarity computed anew from the definition."""

    def __init__(self, capacity: int, policy: str) -> None:
        self.capacity, self.policy = capacity, policy
        self.entries: dict[int, list[list[float]]] = {}

    def add(self, vectors: Tensor, labels: Tensor) -> None:
        for vector, label in zip(vectors.tolist(), labels.tolist(), strict=True):
            self.entries.setdefault(label, []).append(vector)
        for own in self.entries.values():
            while len(own) > self.capacity:
                own.pop(self.leaver(own))

    def leaver(self, own: list[list[float]]) -> int:
        if self.policy == "fifo":
            return 0
        sums = [sum(cosine(entry, other) for other in own) for entry in own]
        return next(number for number, value in enumerate(sums) if value >= max(sums) - TIE)

    def term(self, x0_hat: Tensor, labels: Tensor, kind: str, *, as_published: bool = False) -> float:
        """The mean over classes; `as_published` adds the running sum once for every class."""
        total, running, present = 0.0, 0.0, sorted(set(labels.tolist()))
        for label in present:
            if entries := self.entries.get(label, []):
                mine = [vector for vector, of in zip(x0_hat.tolist(), labels.tolist(), strict=True) if of == label]
                pairs = [cosine(vector, entry) for vector in mine for entry in entries]
                running += 1 - min(pairs) if kind == "real" else max(pairs)
            total += running
        return (total if as_published else running) / len(present)
