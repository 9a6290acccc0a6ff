"""How long opening a distilled set takes, digests verified: `python benchmarks/load.py [images] [repeats]`."""

import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffstill.artifacts import new_artifact
from diffstill.config import SampleConfig
from diffstill.loading import open_set
from diffstill.pictures import save_png, to_image


def random_set(
    folder: Path, classes: Sequence[str], images_per_class: int, *, seeds: Sequence[int] = (0,), side: int = 32, channels: int = 3
) -> Path:
    """A `distilled` artifact of noise, laid out as the stage `sample` does."""
    noise = np.random.default_rng(0)
    config = SampleConfig(images_per_class=images_per_class, seeds=tuple(seeds))
    with new_artifact(folder, "distilled", config, {}) as draft:
        draft.facts |= {"source": "distilled", "seeds": list(seeds), "classes": list(classes), "images_per_class": images_per_class}
        draft.facts |= {"side": side, "channels": channels, "guidance": config.guidance, "sampler": config.sampler, "steps": config.steps}
        for seed in seeds:
            for name in classes:
                for number in range(images_per_class):
                    pixels = noise.integers(0, 256, (channels, side, side), np.uint8)
                    save_png(to_image(pixels), draft.folder / f"seed-{seed}" / name / f"{number:05d}.png")
            (draft.folder / f"seed-{seed}" / "metadata.csv").touch()
            (draft.folder / f"seed-{seed}.png").touch()
    return folder


def opening_times(folder: Path, repeats: int) -> list[float]:
    """Seconds of each opening."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        open_set(folder)
        times.append(time.perf_counter() - start)
    return times


def main(images: int = 1000, repeats: int = 20) -> None:
    """Print median and spread."""
    with tempfile.TemporaryDirectory() as root:
        times = sorted(opening_times(random_set(Path(root) / "distilled", [str(label) for label in range(10)], images // 10), repeats))
    print(f"open a set of {images} images 32 x 32: median {statistics.median(times):.3f} s, {times[0]:.3f} to {times[-1]:.3f} s in {repeats} repeats")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
