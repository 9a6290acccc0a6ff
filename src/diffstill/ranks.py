"""Several processes that train one thing: which part each has, and what they tell each other. Torch only.

`torchrun` starts them and says in the environment who is who. Every rank draws the whole batch and computes its rows;
what is gathered is in the order of the whole batch, so that nothing depends on the number of ranks but rounding.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from safetensors.numpy import load, save
from torch import Tensor, nn

from diffstill.environment import rank_here
from diffstill.errors import DiffstillError

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Ranks:
    """A process among `count`: number `index`, computing on `device`."""

    index: int
    count: int
    device: str

    @property
    def main(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def rows(self, size: int) -> slice:
        """The rows of a batch of `size` that are computed here. Raises `DiffstillError` if it cannot be cut evenly."""
        if size % self.count:
            raise DiffstillError(f"a batch of {size} cannot be cut evenly over {self.count} processes; use a multiple of {self.count}")
        share = size // self.count
        return slice(self.index * share, (self.index + 1) * share)

    def wrap(self, network: nn.Module) -> Any:
        """The network, averaging its gradients over all ranks as they come; None if there is one rank alone."""
        if self.count == 1:
            return None
        cuda = torch.device(self.device).type == "cuda"
        with warnings.catch_warnings():  # torch 2.13 would rather have `forward_sync_buffers`, which older ones do not know
            warnings.filterwarnings("ignore", message=".*broadcast_buffers")
            return nn.parallel.DistributedDataParallel(network, device_ids=[self.device] if cuda else None, broadcast_buffers=False)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all ranks, (count n, ...), with gradient: of a loss that every rank computes from all of them.

        The gradient is scaled so that averaging over ranks, as `wrap` does, gives that of the loss.
        """
        return rows if self.count == 1 else _Gather.apply(rows, self)  # type: ignore[no-untyped-call]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks."""
        if self.count == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def share(self, arrays: Arrays | None) -> Arrays | None:
        """What the main rank has, on all ranks; nothing is read from another machine's files."""
        if self.count == 1:
            return arrays
        packed = np.frombuffer(save(dict(arrays)), np.uint8).copy() if arrays is not None else np.zeros(0, np.uint8)
        size = torch.tensor([len(packed)], device=self.device)
        dist.broadcast(size, 0)
        data = torch.from_numpy(packed).to(self.device) if self.main else torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if not len(data):
            return None
        dist.broadcast(data, 0)
        return arrays if self.main else load(data.cpu().numpy().tobytes())

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        everyone = rows.new_empty(ranks.count * len(rows), *rows.shape[1:])
        dist.all_gather(list(everyone.chunk(ranks.count)), rows.contiguous())  # one name in all versions of torch
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        return gradient[ctx.ranks.rows(len(gradient))] * ctx.ranks.count, None


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that `torchrun` has started, on GPU number LOCAL_RANK if `device` is cuda; alone where it has not.

    All leave together when the block ends well; after an error nobody waits for the others, whom `torchrun` ends.
    """
    count = rank_here()[1]
    if count == 1:
        yield Ranks(0, 1, device)
        return
    cuda = torch.device(device).type == "cuda"
    if cuda:
        local, here = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= here:
            raise DiffstillError(
                f"this machine has {here} GPUs, but torchrun has started a process for number {local + 1}; start as many as there are"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    ranks = Ranks(dist.get_rank(), count, device)
    yield ranks
    ranks.wait()
    dist.destroy_process_group()
