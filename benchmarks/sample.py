"""Drawing images, in large guided batches and one by one: `python -m benchmarks.sample [--batch 100 --sampler-steps 50 --device cuda]`.

The same network, sampler, steps and guidance; ours in `--precision` (bf16 on a GPU), compiled with `--compile`, batches of mixed
classes; the plain way in float32, one image at a time. Both decode. `dpm++` in 20 steps stands beside DDPM in 50: what a deterministic
sampler saves, which the report of a run must show to be as good.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.shapes import SIZES, Spread, forward_flop, machine, matmul_rate, options, random_generator, timed
from diffstill.draws import Purpose, seeded
from diffstill.training import set_threads


def main() -> None:
    """A row per way."""
    parser = options(__doc__, batch=100, sampler_steps=50, singles=2)
    parser.set_defaults(blocks=3)
    parser.add_argument("--precision", default=None, choices=("float32", "bf16"), help="bf16 on a GPU, float32 on a CPU")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--guidance", type=float, default=4.0)
    given = parser.parse_args()
    device, size, batch = given.device, SIZES[given.size], given.batch
    set_threads(given.threads, device)
    torch.backends.cuda.matmul.allow_tf32 = True
    precision = given.precision or ("float32" if device == "cpu" else "bf16")
    rate = matmul_rate(device, torch.float32 if device == "cpu" else torch.bfloat16, 1024 if device == "cpu" else 8192)
    plain, ours = random_generator(size, device), random_generator(size, device).accelerate(precision, compiled=given.compile)
    flop = forward_flop(plain)
    noise = [seeded(Purpose.SHOWN, number) for number in range(batch)]

    def drawn(generator: object, count: int, sampler: str, steps: int) -> None:
        generator.draw([number % 10 for number in range(count)], noise[:count], sampler=sampler, steps=steps, guidance=given.guidance)  # type: ignore[attr-defined]

    cold = timed(lambda: drawn(ours, batch, "ddpm", 1), device, steps=1, warm=0)
    fewer = max(1, given.sampler_steps * 2 // 5)
    ways = {
        f"ours, ddpm, {given.sampler_steps} steps, batch {batch}": (ours, batch, "ddpm", given.sampler_steps),
        f"ours, dpm++, {fewer} steps, batch {batch}": (ours, batch, "dpm++", fewer),
        f"plain, ddpm, {given.sampler_steps} steps, batch 1": (plain, 1, "ddpm", given.sampler_steps),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for block in range(given.blocks):
        for name, (generator, count, sampler, steps) in ways.items():
            repeats = given.singles if count == 1 else 1
            times[name].append(timed(lambda g=generator, c=count, s=sampler, n=steps: drawn(g, c, s, n), device, steps=repeats, warm=int(block == 0)))
    base = Spread(tuple(times[next(reversed(ways))]))
    print(
        f"{machine(device)}; {given.size}; guidance {given.guidance:g}; ours in {precision}{', compiled' if given.compile else ''}; cold start {cold:.1f} s"
    )
    table = Table("way", "rate", "ratio to one by one (least to most)", "MFU")
    for name, (_, count, _, steps) in ways.items():
        found = Spread(tuple(times[name]))
        ratios = sorted(count / fast * slow for fast, slow in zip(found.times, base.times, strict=True))
        share = count / found.median * 2 * steps * flop / rate
        table.add_row(name, found.rate(count), f"{count / found.median * base.median:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})", f"{share:.1%}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
