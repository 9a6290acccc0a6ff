"""What the training loops of two stages share: draws that depend on (seed, step) alone, averaged weights, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from time import monotonic
from typing import Self

import numpy as np
import psutil
import torch
from torch import Tensor

from diffstill.artifacts import Array, WorkFolder
from diffstill.draws import Purpose, shuffled

CHECKPOINT_SHARE = 0.02
"""Of the time of a training, at most so much is spent on waiting for checkpoints."""


def set_threads(threads: int, device: str = "cpu") -> None:
    """Compute on `threads` CPU threads. On the CPU with deterministic kernels: equal thread counts give equal bytes."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(torch.device(device).type == "cpu")


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor` on `device`, on its way there while the CPU goes on."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def free_memory(device: str) -> int:
    """Bytes that are free on `device`."""
    return int(torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else psutil.virtual_memory().available)


@lru_cache(maxsize=4096)
def _order(images: int, purpose: Purpose, seed: int, epoch: int, part: int) -> Array:
    return shuffled(images, purpose, seed, epoch, part)


def _stream(images: int, purpose: Purpose, seed: int, start: int, count: int, part: int = 0) -> Array:
    """Positions `start` to `start + count` of an endless stream of shuffled epochs over `images`."""
    places = np.arange(start, start + count)
    epochs = [_order(images, purpose, seed, int(place // images), part) for place in places]
    return np.array([epoch[place % images] for epoch, place in zip(epochs, places, strict=True)])


def batch_indices(images: int, purpose: Purpose, seed: int, step: int, batch_size: int) -> Tensor:
    """Which images form the batch of `step`: (batch_size,) int64, each image once per epoch."""
    return torch.from_numpy(_stream(images, purpose, seed, step * batch_size, batch_size))


def balanced_indices(members: Sequence[Array], purpose: Purpose, seed: int, step: int, batch_size: int) -> Tensor:
    """The same with batch_size / classes images of every class, whose numbers `members` holds."""
    share = batch_size // len(members)
    parts = [own[_stream(len(own), purpose, seed, step * share, share, part)] for part, own in enumerate(members)]
    return torch.from_numpy(np.concatenate(parts))


def ema_decay(step: int, decay: float) -> float:
    """Warmed-up decay of averaged weights: min(decay, (1 + step) / (10 + step)), `step` from 0."""
    return min(decay, (1 + step) / (10 + step))


class Training:
    """Weights under AdamW with a running average, and everything that a checkpoint must keep of them."""

    def __init__(self, weights: Sequence[Tensor], learning_rate: float, ema_decay: float, weight_decay: float = 0.0) -> None:
        self.weights, self.ema_decay = list(weights), ema_decay
        self.average = [weight.detach().clone() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=learning_rate, weight_decay=weight_decay, fused=True)
        self.done = 0

    def advance(self, loss: Tensor, learning_rate: float | None = None) -> None:
        """One optimiser step down `loss`, at another learning rate if one is given; then the average follows."""
        if learning_rate is not None:
            self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [weight.detach() for weight in self.weights], 1 - ema_decay(self.done, self.ema_decay))
        self.done += 1

    @torch.no_grad()
    def adopt_average(self) -> None:
        """Replace the weights by their average."""
        torch._foreach_copy_(self.weights, self.average)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again, bit for bit. Nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for weight, average in zip(self.weights, self.average, strict=True):
            weight.data, average.data = average.data, weight.data

    def state(self) -> dict[str, Mapping[str, Tensor]]:
        """Groups of tensors for `pack`; `load` is the inverse."""
        groups = {"weights": _numbered(self.weights), "average": _numbered(self.average), "optimizer": _optimizer_state(self.optimizer)}
        return {**groups, "training": {"done": torch.tensor(self.done)}}

    @torch.no_grad()
    def load(self, saved: Mapping[str, Array]) -> None:
        """Take back what `state` gave, from packed arrays."""
        for own, group in ((self.weights, "weights"), (self.average, "average")):
            values = unpack(saved, group)
            for number, tensor in enumerate(own):
                tensor.copy_(values[str(number)])
        _load_optimizer_state(self.optimizer, unpack(saved, "optimizer"))
        self.done = int(unpack(saved, "training")["done"])


class TimeShare:
    """Lets work on the side take at most `share` of the time since this was made."""

    def __init__(self, share: float) -> None:
        self.share, self.started = share, monotonic()
        self.spent = self.last = 0.0

    @property
    def left(self) -> bool:
        """Whether there is time for as much again as the last time."""
        return self.spent + self.last <= self.share * (monotonic() - self.started)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Count the time of a block."""
        before = monotonic()
        try:
            yield
        finally:
            self.last = monotonic() - before
            self.spent += self.last


class Checkpoints:
    """Keeps the state of a training as `name` in `work`, written by a thread while the steps go on; nowhere without `work`.

    A `with` block: what was begun is written when it ends. How often depends on the time it takes, so nothing that is
    kept may depend on that.
    """

    def __init__(self, work: WorkFolder | None, name: str) -> None:
        self.work, self.name, self.time = work, name, TimeShare(CHECKPOINT_SHARE)
        self._writer, self._pending = ThreadPoolExecutor(1), Future[None]()
        self._pending.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._writer.shutdown()
        if error is None:
            self._pending.result()

    def offer(self, state: Callable[[], Mapping[str, Array]], *, last: bool) -> None:
        """Keep `state`, a copy, if there is time left for another, and at any rate if it is the last. Raises what the writer met."""
        if self.work is None or not (last or self.time.left):
            return
        with self.time.taken():  # as far as the steps wait for it
            self._pending.result()
            self._pending = self._writer.submit(self.work.save, self.name, state())


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts by `<parameter number>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, own in state.items() for name, value in own.items()}


def _load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def pack(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Array]:
    """A copy of groups of named tensors as one flat mapping of arrays, `<group>/<name>`; inverse: `unpack`."""
    named = {f"{group}/{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}
    return {name: tensor.detach().to("cpu", copy=True).numpy() for name, tensor in named.items()}


def unpack(arrays: Mapping[str, Array], group: str) -> dict[str, Tensor]:
    """The tensors of one group of `pack`."""
    return {name.removeprefix(f"{group}/"): torch.from_numpy(array) for name, array in arrays.items() if name.startswith(f"{group}/")}


def _numbered(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}
