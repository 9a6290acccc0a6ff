"""The benchmarks run, on small numbers; what they count is counted right."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.baseline import ListMemory
from benchmarks.capacity import Plan, Work, files_of, requests_of
from benchmarks.shapes import SCHEDULE, SIZES, Spread, by_turns, forward_flop
from diffstill.artifacts import write_shards
from diffstill.config import preset
from diffstill.memory import ClassMemory
from diffstill.networks import DiTTransformer2DModel, Generator
from diffstill.storage import PART

QUICK = {
    "finetune": "--device cpu --size tiny --batch 4 --steps 1 --warm 1 --blocks 1 --images 100",
    "finetune --ablate": "--device cpu --size tiny --batch 4 --steps 1 --warm 1 --blocks 1 --images 100",
    "capacity": "--preset imagewoof --gpus 1",
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


def test_bytes_on_paper_are_bytes_on_disk(tmp_path: Path) -> None:
    plan = Plan(preset("imagewoof"), images=1000, tested=0, classes=10)
    latent = (32, 4, 32, 32)
    moments = {name: np.zeros(latent, np.float16) for name in ("mean", "std")}
    write_shards(tmp_path, "latents", {"labels": np.zeros(16, np.int64), **{k: v.reshape(16, 2, 4, 32, 32) for k, v in moments.items()}}, 16)
    write_shards(tmp_path, "images", {"labels": np.zeros(16, np.int64), "pixels": np.zeros((16, 3, 256, 256), np.uint8)}, 16)
    for name, each in {"latents": plan.latent_bytes, "images": plan.image_bytes}.items():
        assert (tmp_path / f"{name}-00000.safetensors").stat().st_size == pytest.approx(16 * each, rel=0.01)
    assert files_of(1025, 1024) == 2
    assert [requests_of(3, size) for size in (100, PART, 3 * PART + 1)] == [3, 9, 18]


def test_memories_on_paper_are_those_in_memory() -> None:
    tuning = (params := preset("imagenet1k")).finetune
    banks = [ClassMemory(1000, entries, 4096, tuning.policy, "meta") for entries in (tuning.capacity_real, tuning.capacity_gen)]
    held = sum(bank.entries.nbytes + bank.similarity.nbytes for bank in banks)
    assert Plan(params, images=1, tested=1, classes=1000).bank_bytes == held


def test_times_on_paper_of_the_ten_class_recipe() -> None:
    """133 s of fine-tuning and 67 s for 1,000 images, guided, by 50 steps, at 45 % of 790 TFLOP/s: counted by hand."""
    params = preset("imagewoof")
    work, plan = Work(denoise=0.2373e12, encode=0, decode=0, student=0), Plan(params, images=12_454, tested=500, classes=10)
    assert params.finetune.epochs == 8
    assert plan.tuning_flops(work) / (0.45 * 790e12) == pytest.approx(133, abs=0.5)
    each = plan.sampling_flops(work) / 2 / plan.drawn
    assert 1000 * each / (0.45 * 790e12) == pytest.approx(67, abs=0.5)


def test_students_on_paper_take_the_protocols_steps() -> None:
    plan = Plan(preset("imagewoof"), images=12_454, tested=500, classes=10)
    work = Work(denoise=0, encode=0, decode=0, student=1.0)
    assert plan.student_flops(work, 10) == 3 * 3000 * 10  # 1 per class: 3,000 epochs of one batch of ten
    assert plan.student_flops(work, 500) == 3 * 1500 * 8 * 64


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module, *flags = name.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [module, *flags, *QUICK[name].split()])
    import_module(f"benchmarks.{module}").main()
    assert re.search(r"│.*\d", capsys.readouterr().out)
