"""What the benchmarks of the generator share: networks of random weights, their arithmetic, the machine's rate, and a clock."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffstill import torchvision_shim  # noqa: F401  isort:skip  (before diffusers)
from diffusers import AutoencoderKL, DiTTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from diffstill.networks import Generator, set_frequency_shift, share_embedder

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@dataclass(frozen=True)
class Size:
    """A DiT with learned variance and patches of 2, and its autoencoder."""

    layers: int
    heads: int
    head_dim: int
    side: int
    """Pixels per side of the images; the latent has an eighth."""
    widths: tuple[int, ...]
    vae_layers: int


SIZES = {
    "xl": Size(28, 16, 72, 256, (128, 256, 512, 512), 2),
    "small": Size(6, 6, 64, 128, (32, 64, 128, 128), 1),
    "tiny": Size(2, 2, 32, 64, (16, 16, 16, 16), 1),
}
"""xl: DiT-XL/2 and the autoencoder of Stable Diffusion at 256 px; small: the same family for two CPU cores; tiny: for tests."""


def random_generator(size: Size, device: str) -> Generator:
    """A generator of random weights with ImageNet's 1,000 labels: as fast as a trained one."""
    torch.manual_seed(0)
    with torch.device(device):
        transformer = DiTTransformer2DModel(
            num_layers=size.layers, num_attention_heads=size.heads, attention_head_dim=size.head_dim, in_channels=4, out_channels=8,
            sample_size=size.side // 8, patch_size=2, num_embeds_ada_norm=1000, norm_eps=1e-6,
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size.widths, layers_per_block=size.vae_layers, latent_channels=4, norm_num_groups=min(32, size.widths[0] // 2),
            sample_size=size.side,
        )  # fmt: skip
    share_embedder(transformer)
    set_frequency_shift(transformer, 0.0)
    return Generator(transformer.eval().requires_grad_(False), vae.eval().requires_grad_(False), SCHEDULE)


def forward_flop(generator: Generator) -> float:
    """Floating-point operations of the transformer's forward pass for one image: 0.237e12 for DiT-XL/2 at 256 px."""
    with torch.device("meta"):
        meta = DiTTransformer2DModel.from_config(generator.transformer.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta(
            torch.zeros(1, *generator.latent_shape, device="meta"),
            torch.zeros(1, dtype=torch.long, device="meta"),
            torch.zeros(1, dtype=torch.long, device="meta"),
        )
    return float(counter.get_total_flops())


def matmul_rate(device: str, dtype: torch.dtype, side: int) -> float:
    """Floating-point operations per second of a square matrix product, the best of ten."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = [timed(lambda: a @ b, device, steps=10 if device != "cpu" else 1, warm=1) for _ in range(10)]
    return 2 * side**3 / min(times)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(step: Callable[[], object], device: str, *, steps: int, warm: int) -> float:
    """Seconds per step: after `warm` steps, the mean of `steps`."""
    for _ in range(warm):
        step()
    wait(device)
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait(device)
    return (time.perf_counter() - start) / steps


@dataclass(frozen=True)
class Spread:
    """Seconds per step over several blocks."""

    times: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.times)

    def rate(self, images: int) -> str:
        """Images per second: median, least and most."""
        low, high = images / max(self.times), images / min(self.times)
        return f"{images / self.median:.4g} img/s ({low:.4g} to {high:.4g})"


def by_turns(ways: dict[str, Callable[[], object]], device: str, *, steps: int, warm: int, blocks: int) -> dict[str, Spread]:
    """Each way timed in blocks, by turns, so that what else the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(blocks):
        for name, step in ways.items():
            times[name].append(timed(step, device, steps=steps, warm=warm if block == 0 else 1))
    return {name: Spread(tuple(each)) for name, each in times.items()}


def options(description: str | None, **defaults: int) -> argparse.ArgumentParser:
    """A command line with the device, the size, and whole numbers by name and default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda where there is one")
    parser.add_argument("--size", choices=SIZES, default="xl" if torch.cuda.is_available() else "small", help="xl on a GPU, small on a CPU")
    for name, default in {"steps": 20, "warm": 5, "blocks": 3, "threads": 1, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{default} by default")
    return parser


def machine(device: str) -> str:
    """What this ran on."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"
