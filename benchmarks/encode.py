"""The stage `encode` over many images: speed, memory, and a kill: `python -m benchmarks.encode [--images 200000 --side 32 --device cpu]`.

Makes `images` artifacts of noise in class folders, a quarter, half and all of that number, and a generator with untrained weights
(`--widths 128 256 512 512 --layers 2 --side 256` is the autoencoder of the paper's size). Each run is a process of its own: images per
second, and its peak memory, which must not grow with the number of images beyond their labels. Then it kills the stage at a random
point with SIGKILL, runs it again, and compares the digest of the artifact with that of the undisturbed run. The plain loop that the
speed is compared with encodes one image after the other in one process, and keeps nothing.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.prepare import StageRun, image_folder, report_kill
from diffstill.artifacts import Rows, new_artifact, open_artifact
from diffstill.config import EncodeConfig, PrepareConfig, PretrainConfig
from diffstill.networks import STOCK_FREQUENCY_SHIFT, Generator, build_scheduler, build_transformer, build_vae, load_generator, save_generator
from diffstill.stages.prepare import prepare


def untrained(folder: Path, side: int, widths: tuple[int, ...], layers: int) -> Path:
    """A generator whose autoencoder halves the side with each width after the first."""
    config = PretrainConfig.model_validate({"vae": {"channels": widths, "layers": layers}, "dit": {"layers": 1}})
    torch.manual_seed(0)
    vae, transformer = build_vae(config, 3, side), build_transformer(config, 10, side // 2 ** (len(widths) - 1))
    betas = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    scheduler = dict(build_scheduler("ddim", betas, learned_variance=False).config)
    with new_artifact(folder, "generator", config, {}) as draft:
        save_generator(Generator(transformer, vae, scheduler), draft.folder, [f"class-{label}" for label in range(10)])
        draft.facts |= {"frequency_shift": STOCK_FREQUENCY_SHIFT, "classes": [f"class-{label}" for label in range(10)]}
    return folder


@torch.inference_mode()
def plain_rate(images: Path, generator: Path, device: str, count: int) -> float:
    """Images per second of a loop over the images, the first of which warms up."""
    opened, pixels = load_generator(generator).to(device), Rows(images, "train", "pixels")
    start = 0.0
    for number in range(count + 1):
        batch = torch.from_numpy(pixels[number : number + 1]).to(device).float() / 127.5 - 1
        opened.encode(batch)[0].half().cpu()
        start = start or time.perf_counter()
    return count / (time.perf_counter() - start)


def main() -> None:
    """Three sizes, the plain loop, a kill."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"images": 200_000, "side": 32, "batch-size": 64, "shard-size": 1024, "threads": 1, "layers": 1, "kills": 1, "plain": 500}
    for name, default in defaults.items():
        options.add_argument(f"--{name}", type=int, default=default, help=f"{default} by default")
    options.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64], help="16 32 64 by default")
    options.add_argument("--device", default="cpu")
    options.add_argument("--precision", default="float32", choices=("float32", "bf16"))
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    config = EncodeConfig(batch_size=given.batch_size, shard_size=given.shard_size, threads=given.threads, precision=given.precision)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        os.environ["DIFFSTILL_WORK"] = str(root / "work")
        generator = untrained(root / "generator", given.side, tuple(given.widths), given.layers)
        for number in (given.images // 4, given.images // 2, given.images):
            folder = image_folder(root / f"data-{number}", number, (given.side, given.side))
            real = PrepareConfig(source="folder", location=str(folder), side=given.side, channels=3, flip=True, shard_size=given.shard_size)
            counts = prepare(real, images=root / "images")
            encoded = counts["train_images"] + counts["val_images"]
            paths = {"images": str(root / "images"), "generator": str(generator), "latents": str(root / "latents"), "device": given.device}
            run = StageRun("encode", config.model_dump_json(), paths, root / "work")
            cost = run.to_the_end()
            print(f"{encoded:>9,.0f} images of {given.side} px: {encoded / cost.seconds:>7,.0f} img/s, peak memory {cost.peak_mib:,.0f} MiB")
        rate = plain_rate(root / "images", generator, given.device, given.plain)
        ours = 2 * encoded / cost.seconds  # as it is and mirrored
        print(f"plain loop, one image at a time: {rate:,.0f} views/s; encode is {ours / rate:.2f} times as fast, start and writing included")
        artifact = open_artifact(root / "latents", "latents")
        pieces = len(list(artifact.folder.glob("*.safetensors")))
        for _ in range(given.kills):
            report_kill(run, pieces, artifact.digest, lambda: open_artifact(root / "latents", "latents").digest)


if __name__ == "__main__":
    main()
