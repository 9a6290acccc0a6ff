"""What a preset takes on paper, by arithmetic alone: `python -m benchmarks.capacity --preset imagenet1k --gpus 8 64`.

Operations are counted on networks without memory, bytes and files follow the layout of the artifacts, hours divide operations by
`--tflops` x `--mfu`. The rates that are given by default and were not measured are marked so in docs/scaling.md.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import ceil

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import SIZES, forward_flop, random_generator
from diffstill.config import Params, preset
from diffstill.imagenet import SUBSETS
from diffstill.protocols import protocol
from diffstill.storage import PART
from diffstill.students import build_student

TRAIN, VAL = 1_281_167, 50_000
"""Images of ImageNet-1K (Russakovsky et al. 2015, table 2)."""
WOOF = 12_454
"""Training images of ImageWoof's ten classes in it."""
GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """What the machines do: operations per second of a GPU, and images per second that one CPU core prepares."""

    flops: float
    prepare: float
    cores: int
    """Of the pod that prepares."""
    network: float
    """Bytes per second between a pod and the store."""
    requests: float
    """Small objects per second that one client sends."""


@dataclass(frozen=True)
class Work:
    """Operations per image of what a run does."""

    denoise: float
    encode: float
    decode: float
    student: float


def count_work(params: Params, classes: int) -> Work:
    """Forward passes of DiT-XL/2, the autoencoder's halves and the first student, on the meta device."""
    generator = random_generator(SIZES["xl"], "meta")
    side = params.prepare.side or SIZES["xl"].side
    seen = protocol(params.evaluate.protocol).side or side
    student = build_student(params.evaluate.students[0], classes=classes, channels=3, side=seen, seed=0).to("meta")
    picture, latent = torch.zeros(1, 3, side, side, device="meta"), torch.zeros(1, 4, side // 8, side // 8, device="meta")
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        generator.vae.encode(picture)
    with FlopCounterMode(display=False) as decoding, torch.no_grad():
        generator.vae.decode(latent)
    with FlopCounterMode(display=False) as looking, torch.no_grad():
        student(torch.zeros(1, 3, seen, seen, device="meta"))
    return Work(forward_flop(generator), float(encoding.get_total_flops()), float(decoding.get_total_flops()), float(looking.get_total_flops()))


@dataclass(frozen=True)
class Plan:
    """A run of `params` on `images` training images of `classes` classes."""

    params: Params
    images: int
    tested: int
    classes: int

    @property
    def side(self) -> int:
        """Pixels per side."""
        return self.params.prepare.side or SIZES["xl"].side

    @property
    def image_bytes(self) -> int:
        """One row of `images`: uint8 pixels and an int64 label."""
        return 3 * self.side**2 + 8

    @property
    def latent_bytes(self) -> int:
        """One row of `latents`: mean and standard deviation in float16, of both flips, and a label."""
        return 2 * self.flips * 2 * 4 * (self.side // 8) ** 2 + 8

    @property
    def flips(self) -> int:
        """Views of each image."""
        return 2 if self.params.prepare.flip else 1

    @property
    def bank_bytes(self) -> int:
        """Both memories on each GPU: float32 vectors, and their similarities."""
        tuning, dim = self.params.finetune, 4 * (self.side // 8) ** 2
        return sum(4 * self.classes * entries * (dim + entries) for entries in (tuning.capacity_real, tuning.capacity_gen))

    @property
    def drawn(self) -> int:
        """Distilled images of all generation seeds."""
        return self.classes * self.params.sample.images_per_class * len(self.params.sample.seeds)

    def tuning_flops(self, work: Work) -> float:
        """Forward pass and gradients of activations, for every fine-tune."""
        tuning = self.params.finetune
        passes = self.images * tuning.epochs if tuning.epochs else tuning.steps * tuning.batch_size
        return 2 * work.denoise * passes * len(tuning.seeds)

    def sampling_flops(self, work: Work) -> float:
        """Guided passes and decoding, of the tuned and the untuned generator."""
        guided = 2 if self.params.sample.guidance != 1 else 1
        return 2 * self.drawn * (self.params.sample.steps * guided * work.denoise + work.decode)

    def student_flops(self, work: Work, images: int) -> float:
        """One student trained on `images`: a step is three forward passes."""
        judged = protocol(self.params.evaluate.protocol)
        return 3 * work.student * judged.budget(images, self.classes) * min(judged.batch_size, images)

    def judging_flops(self, work: Work) -> dict[str, float]:
        """By the task that does it: a set of every size, generation seed and student seed; all real images once per student seed."""
        asked = self.params.evaluate
        one = sum(self.student_flops(work, self.classes * size) for size in asked.images_per_class) * len(asked.student_seeds)
        full = self.student_flops(work, self.images) * len(asked.student_seeds) if "full" in asked.baselines else 0.0
        return {
            "distilled": one * len(self.params.sample.seeds),
            "untuned": one * len(self.params.sample.seeds),
            "real": one * len(asked.random_seeds) + full,
        }


def files_of(rows: int, shard_size: int) -> int:
    """Shards of one split."""
    return ceil(rows / shard_size)


def requests_of(files: int, size: int) -> int:
    """Requests that send `files` files of `size` bytes each: one, or one per part and two around them."""
    return files if size < PART else files * (ceil(size / PART) + 2)


def _hours(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bytes(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def tables(plan: Plan, work: Work, rates: Rates, gpus: list[int]) -> list[Table]:
    """What lies in the store, and what the stages take on so many GPUs."""
    return [_stored(plan, rates), _taken(plan, work, rates, gpus)]


def _stored(plan: Plan, rates: Rates) -> Table:
    """`sent`: how often the pipeline sends each file, once by a shard and once by who gathers the shards."""
    table = Table("artifact", "files", "bytes", "sent", "requests", "time for one pod to fetch it")
    pixels = files_of(plan.images + plan.tested, plan.params.prepare.shard_size), plan.params.prepare.shard_size * plan.image_bytes
    latents = files_of(plan.images, plan.params.encode.shard_size), plan.params.encode.shard_size * plan.latent_bytes
    for name, (files, each), whole, sent in (
        ("images", pixels, (plan.images + plan.tested) * plan.image_bytes, 1),
        ("latents", latents, plan.images * plan.latent_bytes, 2),
    ):
        table.add_row(name, f"{files:,}", _bytes(whole), f"{sent} x", f"{sent * requests_of(files, each):,}", _hours(whole / rates.network))
    for name in ("distilled", "untuned"):
        size, seconds = plan.drawn * 3 * plan.side**2, plan.drawn / rates.requests
        table.add_row(f"{name}, PNG, at most", f"{plan.drawn:,}", _bytes(size), "2 x", f"{2 * plan.drawn:,}", f"{_hours(seconds)}, as to send it")
    table.add_row("memories, on each GPU", "", _bytes(plan.bank_bytes), "", "", "")
    return table


def _taken(plan: Plan, work: Work, rates: Rates, gpus: list[int]) -> Table:
    table = Table("stage", "operations", *(f"{count} GPU" + "s" * (count > 1) for count in gpus))
    preparing = _hours((plan.images + plan.tested) / rates.prepare / rates.cores)
    table.add_row("prepare, one pod", "", *[preparing] * len(gpus))
    spread = {
        "encode": plan.images * plan.flips * work.encode,
        "finetune": plan.tuning_flops(work),
        "sample, tuned and untuned": plan.sampling_flops(work),
    }
    for name, flops in spread.items():
        most = 30 if name != "finetune" else max(gpus)  # shards of a loop in the pipeline
        table.add_row(name, f"{flops:.2g}", *(_hours(flops / rates.flops / min(count, most)) for count in gpus))
    judging = plan.judging_flops(work)
    for name, flops in judging.items():
        table.add_row(f"evaluate {name}, one GPU per student", f"{flops:.2g}", *[_hours(flops / rates.flops)] * len(gpus))
    return table


def main() -> None:
    """Print the tables of a preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(name for name in SUBSETS), default="imagenet1k")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--tflops", type=float, default=790.0, help="bf16 matrix product of one GPU in TFLOP/s")
    parser.add_argument("--mfu", type=float, default=0.45, help="share of it that networks reach")
    parser.add_argument("--prepare", type=float, default=168.0, help="photographs per second and core")
    parser.add_argument("--cores", type=int, default=16, help="of the pod that prepares")
    parser.add_argument("--network", type=float, default=1.25e9, help="bytes per second between a pod and the store")
    parser.add_argument("--requests", type=float, default=113.0, help="small objects per second that one client sends")
    given = parser.parse_args()
    params, wnids = preset(given.preset), SUBSETS[given.preset]
    images = {"imagenet1k": TRAIN, "imagewoof": WOOF}.get(given.preset, TRAIN * len(wnids) // 1000)
    plan = Plan(params, images, VAL * len(wnids) // 1000, len(wnids))
    rates = Rates(given.tflops * 1e12 * given.mfu, given.prepare, given.cores, given.network, given.requests)
    print(f"{given.preset}: {plan.images:,} training images of {plan.classes} classes, {given.tflops:g} TFLOP/s x {given.mfu:g}")
    for table in tables(plan, count_work(params, plan.classes), rates, given.gpus):
        Console(width=140).print(table)


if __name__ == "__main__":
    main()
