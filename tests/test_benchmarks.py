"""The benchmarks run, on small numbers; what they count is counted right."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from benchmarks.baseline import ListMemory
from benchmarks.shapes import SCHEDULE, SIZES, Spread, by_turns, forward_flop
from diffstill.memory import ClassMemory
from diffstill.networks import DiTTransformer2DModel, Generator

QUICK = {
    "finetune": "--device cpu --size tiny --batch 4 --steps 1 --warm 1 --blocks 1 --images 100",
    "finetune --ablate": "--device cpu --size tiny --batch 4 --steps 1 --warm 1 --blocks 1 --images 100",
    "memory": "--device cpu --batch 4 --steps 1 --warm 0 --blocks 1",
    "sample": "--device cpu --size tiny --batch 2 --sampler-steps 3 --blocks 1 --singles 1",
    "students": "--device cpu --side 16 --student-steps 20 --warm 0 --blocks 1",
    "recipe": "--device cpu --size tiny --images 20 --epochs 1 --per-class 1 --chunk 10 --sampler-steps 2",
}


def test_a_forward_pass_of_dit_xl_2_is_counted_right() -> None:
    """118.6 G multiply-adds (DiT, table 1), and so twice as many operations."""
    xl = SIZES["xl"]
    with torch.device("meta"):
        transformer = DiTTransformer2DModel(
            num_layers=xl.layers, num_attention_heads=xl.heads, attention_head_dim=xl.head_dim, out_channels=8, num_embeds_ada_norm=1000
        )
    assert forward_flop(Generator(transformer, None, SCHEDULE)) == pytest.approx(2 * 118.6e9, rel=2e-3)


def test_the_memories_that_are_compared_hold_the_same() -> None:
    draws = torch.Generator().manual_seed(0)
    ours, lists = ClassMemory(2, 5, 16, "redundancy"), ListMemory(5)
    for _ in range(12):  # one at a time, for the lists drop one after each newcomer
        vector, label = torch.randn(1, 16, generator=draws), torch.randint(2, (1,), generator=draws)
        ours.add(vector, label)
        lists.add(vector, label.tolist())
    for label in range(2):
        kept = torch.nn.functional.normalize(torch.stack(lists.entries[label]), dim=1)
        torch.testing.assert_close(ours.entries[label, : len(kept)], kept)


def test_a_spread_names_the_median_and_the_ends() -> None:
    assert Spread((0.2, 0.1, 0.4)).rate(1) == "5 img/s (2.5 to 10)"
    seen: list[str] = []
    by_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, "cpu", steps=2, warm=1, blocks=2)
    assert "".join(seen) == "aaabbbaaabbb"


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module, *flags = name.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [module, *flags, *QUICK[name].split()])
    import_module(f"benchmarks.{module}").main()
    assert re.search(r"│.*\d", capsys.readouterr().out)
