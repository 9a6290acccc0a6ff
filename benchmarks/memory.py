"""The update of a memory alone, tensors beside lists: `python -m benchmarks.memory [--batch 8 64 256 --device cuda]`.

Full memories of 64 vectors of 4,096 numbers for ten classes take in a batch: ours keeps the similarities it knows and asks the
device nothing; the lists of `baseline.py` compute all similarities of a class anew for every vector that leaves, and ask which one.
`--step SECONDS` says what share of a step of that length ours takes.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.baseline import ListMemory
from benchmarks.shapes import by_turns, machine, options
from diffstill.memory import ClassMemory
from diffstill.training import sent, set_threads

CLASSES, CAPACITY, DIM = 10, 64, 4096


def main() -> None:
    """A row per batch size."""
    parser = options(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64, 256])
    given = parser.parse_args()
    device = given.device
    set_threads(given.threads, device)
    print(f"{machine(device)}; {CLASSES} classes, {CAPACITY} entries of {DIM}; blocks of {given.steps} updates, {given.blocks} by turns")
    table = Table("batch", "ours, ms", "lists, ms", "ratio (least to most)")
    for batch in given.batch:
        vectors = torch.randn(CLASSES * CAPACITY + batch, DIM, device=device)
        full = torch.arange(CLASSES).repeat_interleave(CAPACITY)
        labels = torch.randint(CLASSES, (batch,), generator=torch.Generator().manual_seed(0))
        ours, lists = ClassMemory(CLASSES, CAPACITY, DIM, "redundancy", device), ListMemory(CAPACITY)
        ours.add(vectors[:-batch], full)
        lists.add(vectors[:-batch], full.tolist())
        asked = sent(labels, device)
        ways = {
            "ours": lambda m=ours, v=vectors[-batch:], of=labels: m.add(v, of),
            "lists": lambda m=lists, v=vectors[-batch:], of=asked: m.add(v, of.tolist()),
        }
        found = by_turns(ways, device, steps=given.steps, warm=given.warm, blocks=given.blocks)
        ratios = sorted(slow / fast for slow, fast in zip(found["lists"].times, found["ours"].times, strict=True))
        shown = [f"{1e3 * found[name].median:.3f} ({1e3 * min(found[name].times):.3f} to {1e3 * max(found[name].times):.3f})" for name in ways]
        table.add_row(str(batch), *shown, f"{found['lists'].median / found['ours'].median:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
