"""The stage `prepare` over many images: speed, memory, and a kill: `python -m benchmarks.prepare [--images 200000 --side 32 --shard-size 1024]`.

Makes that many JPEGs of blurred noise in ten class folders (each content is written once, other names are hard links to it) and runs the
stage on a quarter of them, on half and on all, each time in a process of its own: images per second, and its peak memory, which
must not grow with the number of images beyond their names. Then it kills the stage at a random point with SIGKILL, runs it again,
and compares the digest of the artifact with that of the undisturbed run. The plain loop that the speed is compared with decodes
one image after the other in one process, and keeps nothing. Small pictures are all overhead, in which threads cannot help; so
the two are compared on `--photos` pictures of ImageNet's usual size, too.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffstill.artifacts import open_artifact
from diffstill.config import PrepareConfig
from diffstill.datasets import decode

CLASSES, CONTENTS = 10, 500
PHOTO = (500, 375)
"""Width and height of ImageNet's usual picture."""
PHOTO_SIDE = 256
RUN = """
import json, resource, sys, time
from importlib import import_module
from pathlib import Path
from diffstill import config
name, section, options = sys.argv[1:]
stage = getattr(import_module(f"diffstill.stages.{name}"), name)
knobs = getattr(config, f"{name.capitalize()}Config").model_validate_json(section)
start = time.perf_counter()
stage(knobs, **{key: value if key == "device" else Path(value) for key, value in json.loads(options).items()})
print(json.dumps([time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


@dataclass(frozen=True)
class Cost:
    """What one run took."""

    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class StageRun:
    """One run of a stage, in a process of its own."""

    stage: str
    config: str
    options: Mapping[str, str]
    work: Path

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, self.stage, self.config, json.dumps(self.options)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"DIFFSTILL_WORK": str(self.work)})

    def to_the_end(self) -> Cost:
        """Run it."""
        with self._start() as running:
            told, _ = running.communicate()
        if running.returncode:
            raise SystemExit(f"{self.stage} failed")
        return Cost(*json.loads(told))

    def killed(self, pieces: int) -> int:
        """Kill it at a random point; the number of finished pieces, fewer than `pieces`."""
        wanted = random.randrange(1, max(2, pieces - 1))
        with self._start() as running:
            while running.poll() is None and self.finished() < wanted:
                time.sleep(0.002)
            time.sleep(random.random() * 0.05)
            running.send_signal(signal.SIGKILL)
        return self.finished()

    def finished(self) -> int:
        """The pieces that are kept."""
        return len(list(self.work.glob(f"{self.stage}-*/*.safetensors")))


def report_kill(run: StageRun, pieces: int, undisturbed: str, digest: Callable[[], str]) -> None:
    """Kill, resume, compare; print what came of it."""
    kept = run.killed(pieces)
    cost, same = run.to_the_end(), digest() == undisturbed
    print(f"killed with {kept} of {pieces} pieces finished, resumed in {cost.seconds:.1f} s: {'the same digest' if same else 'ANOTHER DIGEST'}")
    if not same:
        raise SystemExit(1)


def image_folder(root: Path, images: int, size: tuple[int, int]) -> Path:
    """`images` JPEGs in class folders of train/, `CONTENTS` different ones at most."""
    noise = np.random.default_rng(0)
    for number in tqdm(range(images), "make images", leave=False, disable=None):
        path = root / "train" / f"class-{number % CLASSES}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < CONTENTS:
            coarse = noise.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8)
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        else:
            first = number % CONTENTS
            os.link(root / "train" / f"class-{first % CLASSES}" / f"{first:07d}.jpg", path)
    return root


def plain_rate(folder: Path, side: int, images: int) -> float:
    """Images per second of a loop over the files."""
    paths = sorted((folder / "train").rglob("*.jpg"))[:images]
    start = time.perf_counter()
    for path in paths:
        np.asarray(decode(path, side, 50_000_000))
    return len(paths) / (time.perf_counter() - start)


def prepared(root: Path, images: int, size: tuple[int, int], side: int, shard_size: int) -> StageRun:
    """Run the stage over a new folder of images; print speed and memory."""
    folder = image_folder(root / f"data-{images}-{side}", images, size)
    config = PrepareConfig(source="folder", location=str(folder), side=side, channels=3, shard_size=shard_size)
    run = StageRun("prepare", config.model_dump_json(), {"images": str(root / "images")}, root / "work")
    cost = run.to_the_end()
    print(f"{images:>9,} images of {size[0]} x {size[1]} at {side}: {images / cost.seconds:>7,.0f} img/s, peak memory {cost.peak_mib:,.0f} MiB")
    plain = plain_rate(folder, side, 2000)
    print(
        f"          plain loop, one image at a time: {plain:,.0f} img/s; prepare is {images / cost.seconds / plain:.2f} times as fast, writing included"
    )
    return run


def main() -> None:
    """Photos, then three numbers of small pictures, then a kill."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"images": 200_000, "side": 32, "shard-size": 1024, "photos": 4000, "kills": 1}.items():
        options.add_argument(f"--{name}", type=int, default=default, help=f"{default} by default")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepared(root, given.photos, PHOTO, PHOTO_SIDE, given.shard_size)
        for images in (given.images // 4, given.images // 2, given.images):
            run = prepared(root, images, (given.side, given.side), given.side, given.shard_size)
        artifact = open_artifact(root / "images", "images")
        pieces = len(list(artifact.folder.glob("*.safetensors")))
        for _ in range(given.kills):
            report_kill(run, pieces, artifact.digest, lambda: open_artifact(root / "images", "images").digest)


if __name__ == "__main__":
    main()
