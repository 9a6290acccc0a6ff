"""A fine-tuning step, ours beside the plain loop of `baseline.py`: `python -m benchmarks.finetune [--batch 8 64 --device cuda --size xl]`.

Both start from files: ours from a `latents` artifact, the plain loop from JPEGs; both on the same network, DiffFit, ten classes,
memories of 64. Timed by turns in one process. MFU is images/s x 2 x (FLOP of a forward pass) / (bf16 matrix product measured in
the same run): a step needs the forward pass and the gradients of activations, and none of the weights'; what is computed twice does
not count. `--compile` and `--precision bf16` are what the presets for GPUs use. `--only ours` leaves the plain loop out, as
`--trace FILE` does, which writes a profile for chrome://tracing and prints the kernels that take longest. `--ablate` goes from the plain
loop to ours one change after the other, on a CPU with what each part of a step takes.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.baseline import BaselineLoop, write_jpegs
from benchmarks.shapes import SIZES, Size, by_turns, forward_flop, machine, matmul_rate, options, random_generator, timed, wait
from diffstill.artifacts import new_artifact, open_artifact, write_shards
from diffstill.config import EncodeConfig, FinetuneConfig
from diffstill.ranks import Ranks
from diffstill.stages.finetune import FineTuning, Latents
from diffstill.training import set_threads

CLASSES = 10


def write_latents(folder: Path, size: Size, images: int) -> Path:
    """A `latents` artifact of noise, both flips."""
    draws, side = np.random.default_rng(0), size.side // 8
    with new_artifact(folder, "latents", EncodeConfig(), {}) as draft:
        mean = draws.standard_normal((images, 2, 4, side, side), np.float32).astype(np.float16)
        labels = np.arange(images, dtype=np.int64) % CLASSES
        write_shards(draft.folder, "train", {"mean": mean, "std": np.full_like(mean, 0.1), "labels": labels}, 1024)
        draft.facts |= {"classes": [f"class-{label}" for label in range(CLASSES)], "scaling_factor": 0.18215}
    return folder


def our_loop(size: Size, latents: Path, config: FinetuneConfig, device: str) -> FineTuning:
    """The stage's own loop, on random weights."""
    data = Latents.open(open_artifact(latents, "latents"), device)
    return FineTuning(config, 0, data, random_generator(size, device), Ranks(0, 1, device))


def ablation(
    size: Size, latents: Path, pictures: Path, batch: int, config: FinetuneConfig, given: argparse.Namespace
) -> dict[str, Callable[[], object]]:
    """The ways from the plain loop to ours: each has one change more."""
    device, workers = given.device, given.workers if given.device != "cpu" else 0
    kept = Latents.open(open_artifact(latents, "latents"), device)

    def plain(**changes: Any) -> Callable[[], object]:
        return BaselineLoop(random_generator(size, device), pictures, batch, device, workers=workers, **changes).step

    plainest = config.model_copy(update={"precision": "float32", "compile": False})
    ways = {
        "plain loop": plain(),
        "latents encoded once": plain(latents=kept),
        "memories as tensors": plain(latents=kept, tensors=True),
        "nothing waits; fused; average of what is trained": our_loop(size, latents, plainest, device).step,
    }
    if config.precision == "bf16":
        ways["bf16"] = our_loop(size, latents, config.model_copy(update={"compile": False}), device).step
    if config.compile:
        ways["compiled"] = our_loop(size, latents, config, device).step
    return ways


PARTS = {
    "data": ("_data", "draw", "__call__:finetune.py"),
    "terms": ("_terms",),
    "backward": ("backward:_tensor.py",),
    "optimiser": ("step:adamw.py", "wrapper:optimizer.py"),
    "memories": ("add",),
}
"""What a step does, by the functions that do it; forward pass, average and the rest are what is left."""


def parts(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds a step in each part, by Python's profiler: for a CPU, where a function ends when its work is done."""
    step()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(steps):
        step()
    profiler.disable()
    found = dict.fromkeys(PARTS, 0.0)
    whole = 0.0
    for (path, _, name), (_, _, _, cumulative, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        places = (name, f"{name}:{Path(path).name}")
        if name == "step" and Path(path).name in ("baseline.py", "finetune.py"):
            whole += cumulative
        for part, functions in PARTS.items():
            if ":" not in name and any(place in functions for place in places) and "torch/_dynamo" not in path:
                found[part] = max(found[part], cumulative)
    found["forward and rest"] = whole - sum(found.values())
    return {part: 1e3 * seconds / steps for part, seconds in found.items()}


def show_ablation(ways: dict[str, Callable[[], object]], batch: int, given: argparse.Namespace) -> None:
    """A row per change, with what it gains over the row before and over the first."""
    found = by_turns(ways, given.device, steps=given.steps, warm=given.warm, blocks=given.blocks)
    profiled = {name: parts(step, 3) for name, step in ways.items()} if given.device == "cpu" else {}
    heads = [f"{part}, ms" for part in next(iter(profiled.values()), {})]
    table = Table(
        f"batch {batch}: the plain loop, and each change", "ms a step (least to most)", "gain over the row before", "over the plain loop", *heads
    )
    first = before = found["plain loop"]
    for name, own in found.items():
        shown = f"{1e3 * own.median:.1f} ({1e3 * min(own.times):.1f} to {1e3 * max(own.times):.1f})"
        share = [f"{value:.1f}" for value in profiled.get(name, {}).values()]
        table.add_row(name, shown, f"{before.median / own.median:.2f}", f"{first.median / own.median:.2f}", *share)
        before = own
    Console(width=200).print(table)


def profile(step: Callable[[], object], path: str, device: str) -> None:
    """Five steps for chrome://tracing, and what took longest."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if device != "cpu" else [])]
    with torch.profiler.profile(activities=kinds) as found:
        timed(step, device, steps=5, warm=0)
    found.export_chrome_trace(path)
    print(found.key_averages().table(sort_by=f"self_{'cpu' if device == 'cpu' else 'device'}_time_total", row_limit=25))


def main() -> None:
    """A row per batch size."""
    parser = options(__doc__, images=1024, workers=8)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--precision", default=None, choices=("float32", "bf16"), help="bf16 on a GPU, float32 on a CPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--only", choices=("ours", "plain"))
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--trace", help="file for a profile of ours")
    given = parser.parse_args()
    device, size = given.device, SIZES[given.size]
    set_threads(given.threads, device)
    precision = given.precision or ("float32" if device == "cpu" else "bf16")
    rate = matmul_rate(device, torch.float32 if device == "cpu" else torch.bfloat16, 1024 if device == "cpu" else 8192)
    flop = forward_flop(random_generator(size, device))
    print(f"{machine(device)}; {given.size}: {flop / 1e12:.4f} TFLOP a forward pass; matrix product {rate / 1e12:.3g} TFLOP/s; ours in {precision}"
          f"{', compiled' if given.compile else ''}; blocks of {given.steps} steps, {given.blocks} by turns")  # fmt: skip
    table = Table("batch", "ours", "plain loop", "ratio (least to most)", "MFU of ours", "peak memory of ours", "cold start")
    with tempfile.TemporaryDirectory() as root:
        latents = write_latents(Path(root) / "latents", size, given.images)
        pictures = write_jpegs(Path(root) / "pictures", CLASSES, given.images // CLASSES, size.side)
        for batch in given.batch:
            config = FinetuneConfig(
                steps=1_000_000, batch_size=batch, precision=precision, compile=given.compile,
                gradient_checkpointing=given.gradient_checkpointing, preview_every=0,
            )  # fmt: skip
            if given.ablate:
                show_ablation(ablation(size, latents, pictures, batch, config, given), batch, given)
                continue
            ways, cold, peak = {}, 0.0, 0.0
            if given.only != "plain":
                if device != "cpu":
                    torch.cuda.reset_peak_memory_stats(device)
                ours = our_loop(size, latents, config, device)
                cold = timed(ours.step, device, steps=1, warm=0)
                timed(ours.step, device, steps=given.warm, warm=0)
                wait(device)
                peak = torch.cuda.max_memory_allocated(device) / 2**30 if device != "cpu" else float("nan")
                ways["ours"] = ours.step
            if given.trace:
                profile(ours.step, given.trace, device)
            elif given.only != "ours":
                ways["plain"] = BaselineLoop(
                    random_generator(size, device), pictures, batch, device, workers=given.workers if device != "cpu" else 0
                ).step
            found = by_turns(ways, device, steps=given.steps, warm=given.warm, blocks=given.blocks)
            mine, plain = found.get("ours"), found.get("plain")
            ratios = sorted(slow / fast for slow, fast in zip(plain.times, mine.times, strict=True)) if mine and plain else []
            table.add_row(
                str(batch), mine.rate(batch) if mine else "-", plain.rate(batch) if plain else "-",
                f"{plain.median / mine.median:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" if mine and plain else "-",
                f"{batch / mine.median * 2 * flop / rate:.1%}" if mine else "-", f"{peak:.2f} GiB", f"{cold:.1f} s",
            )  # fmt: skip
            del ways
    if not given.ablate:
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
