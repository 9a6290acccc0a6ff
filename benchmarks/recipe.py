"""The ten-class recipe of the paper, end to end on random weights and synthetic images: `python -m benchmarks.recipe --device cuda`.

12,454 training images (as many as ImageWoof has), both flips encoded, 8 epochs of batches of 8 with DiffFit, 50 images per class by 50
DDPM steps with guidance 4. Times of the stages themselves, their artifacts written and verified; what compiling costs at first stands
apart: three steps of fine-tuning and a one-step draw beforehand. `--images 60 --size tiny --epochs 1` tries it out on a CPU.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.shapes import SIZES, Size, machine, options, random_generator, wait
from diffstill.artifacts import Artifact, new_artifact, open_artifact, write_shards
from diffstill.config import EncodeConfig, FinetuneConfig, PrepareConfig, PretrainConfig, SampleConfig
from diffstill.imagenet import SUBSETS, index_of
from diffstill.networks import save_generator
from diffstill.stages.encode import encode
from diffstill.stages.finetune import finetune
from diffstill.stages.sample import sample

WOOF = SUBSETS["imagewoof"]


def write_images(folder: Path, side: int, count: int) -> Artifact:
    """An `images` artifact of noise in ImageWoof's classes."""
    draws = np.random.default_rng(0)
    with new_artifact(folder, "images", PrepareConfig(), {}) as draft:
        for split, images in {"train": count, "val": 100}.items():
            for number, start in enumerate(range(0, images, 1024)):
                rows = min(1024, images - start)
                pixels = draws.integers(0, 256, (rows, 3, side, side), np.uint8)
                write_shards(draft.folder, split, {"pixels": pixels, "labels": (np.arange(rows, dtype=np.int64) + start) % 10}, 1024, number)
        counts = {split: dict.fromkeys(WOOF, images // 10) for split, images in {"train": count, "val": 100}.items()}
        draft.facts |= {"source": "imagewoof", "classes": list(WOOF), "side": side, "channels": 3, "flip": True, "counts": counts}
    return open_artifact(folder, "images")


def write_generator(folder: Path, size: Size, images: Artifact) -> None:
    """A `generator` artifact of random weights with ImageNet's labels."""
    opened = random_generator(size, "cpu")
    opened.vae.register_to_config(scaling_factor=0.18215)
    with new_artifact(folder, "generator", PretrainConfig(), {"images": images}) as draft:
        save_generator(opened, draft.folder, list(SUBSETS["imagenet1k"]))
        draft.facts |= {
            "frequency_shift": 0.0, "classes": list(WOOF), "labels": [index_of(wnid) for wnid in WOOF], "side": size.side, "channels": 3,
            "null_label": 1000,
        }  # fmt: skip


def main() -> None:
    """A row per stage."""
    parser = options(__doc__, images=12_454, epochs=8, batch=8, per_class=50, sampler_steps=50, chunk=100)
    parser.add_argument("--precision", default=None, choices=("float32", "bf16"), help="bf16 on a GPU, float32 on a CPU")
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args()
    device, size = given.device, SIZES[given.size]
    speed = {"precision": given.precision or ("float32" if device == "cpu" else "bf16"), "compile": not given.no_compile and device != "cpu"}
    tuning = {"batch_size": given.batch, "ema_decay": 0.9999, "preview_every": 0, "log_every": 100, "checkpoint_every": 2000, **speed}
    drawing = {"images_per_class": given.per_class, "seeds": [0], "guidance": 4.0, "sampler": "ddpm", "chunk_size": given.chunk, **speed}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        paths = {kind: root / kind for kind in ("images", "generator", "latents", "denoiser", "distilled")}
        write_generator(paths["generator"], size, write_images(paths["images"], size.side, given.images))
        reading = {kind: paths[kind] for kind in ("images", "generator", "latents")}
        tuned, drawn = (
            {kind: paths[kind] for kind in ("latents", "generator", "denoiser")},
            {kind: paths[kind] for kind in ("generator", "denoiser", "distilled")},
        )
        encoding = EncodeConfig(batch_size=64, shard_size=1024, precision=speed["precision"])
        first = FinetuneConfig.model_validate_json(json.dumps({**tuning, "steps": 3}))
        first_draw = SampleConfig.model_validate_json(json.dumps({**drawing, "images_per_class": given.chunk // 10, "steps": 1}))
        whole = FinetuneConfig.model_validate_json(json.dumps({**tuning, "epochs": given.epochs}))
        whole_draw = SampleConfig.model_validate_json(json.dumps({**drawing, "steps": given.sampler_steps}))
        table = Table("stage", "seconds", "images", "images/s", "peak GPU memory, GiB")
        for stage, run, images in (
            ("encode, both flips", lambda: encode(encoding, **reading, device=device), 2 * given.images),
            ("(cold) 3 steps", lambda: finetune(first, **tuned, device=device), 3 * given.batch),
            ("finetune", lambda: finetune(whole, **tuned, device=device), given.epochs * given.images),
            ("(cold) one-step draw", lambda: sample(first_draw, **drawn, device=device), given.chunk),
            ("sample", lambda: sample(whole_draw, **drawn, device=device), 10 * given.per_class),
        ):
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            run()
            wait(device)
            seconds = time.perf_counter() - start
            peak = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}" if device != "cpu" else "-"
            table.add_row(stage, f"{seconds:.1f}", str(images), f"{images / seconds:.1f}", peak)
    print(f"{machine(device)}; {given.size}, {speed}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
