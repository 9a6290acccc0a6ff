"""Guidance works because the unconditional branch is really trained: shown on a small generator trained here on digits."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.svm import SVC
from torch import Tensor

from chains import enter
from diffstill.artifacts import load_split, open_artifact, to_unit
from diffstill.config import Params
from diffstill.diffusion import add_noise, sample_latents
from diffstill.draws import Purpose, seeded
from diffstill.networks import Generator, build_scheduler, load_generator
from diffstill.stages.prepare import prepare
from diffstill.stages.pretrain import pretrain

CHOSEN = 1.5


@dataclass(frozen=True)
class Trained:
    generator: Generator
    train: tuple[np.ndarray, np.ndarray]
    val: tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("guidance")
    small = {"vae": {"steps": 200}, "dit": {"layers": 3, "steps": 400}, "threads": 1}
    params = Params.model_validate_json(json.dumps({"pretrain": small}))
    with pytest.MonkeyPatch.context() as world:
        enter(world, folder)
        prepare(params.prepare, images=folder / "images")
        pretrain(params.pretrain, images=folder / "images", generator=folder / "generator")
    images = open_artifact(folder / "images", "images")
    return Trained(load_generator(folder / "generator"), load_split(images, "train"), load_split(images, "val"))


@torch.no_grad()
def loss(trained: Trained, labels: Tensor) -> float:
    """Denoising loss on the val latents under `labels`, at the same timesteps and noise for every choice of labels."""
    opened, draws = trained.generator, torch.Generator().manual_seed(0)
    x0 = opened.encode(torch.from_numpy(to_unit(trained.val[0])))[0] * opened.vae.config.scaling_factor
    total = 0.0
    for _ in range(20):
        t = torch.randint(200, 900, (len(x0),), generator=draws)  # where a label helps: neither all signal nor all noise
        eps = torch.randn(x0.shape, generator=draws)
        x_t = add_noise(x0, eps, opened.alphas_cumprod()[t])
        total += float((opened.predict_noise(x_t, t, labels) - eps).square().mean())
    return total / 20


def test_the_null_label_lies_between_the_right_and_the_wrong_ones(trained: Trained) -> None:
    right = torch.from_numpy(trained.val[1])
    wrong = (right + torch.randint(1, 10, right.shape, generator=torch.Generator().manual_seed(1))) % 10
    conditional, null, shuffled = (loss(trained, labels) for labels in (right, torch.full_like(right, trained.generator.null_label), wrong))
    assert conditional < null < shuffled


def probe_accuracy(trained: Trained, probe: SVC, guidance: float, seed: int) -> float:
    """Share of samples that a classifier of real digits gives the label that was asked for."""
    opened, labels = trained.generator, torch.arange(10).repeat(20)
    scheduler = build_scheduler("ddim", opened.scheduler, learned_variance=False)
    draws = [seeded(Purpose.SHOWN, seed, number) for number in range(len(labels))]
    latents = sample_latents(
        opened.predict_noise, scheduler, labels, draws, shape=opened.latent_shape, null_label=opened.null_label, guidance=guidance, steps=15
    )
    with torch.no_grad():
        images = opened.decode(latents).clamp(-1, 1).flatten(1).numpy()
    return float(probe.score(images, labels.numpy()))


def test_probe_accuracy_rises_with_guidance(trained: Trained) -> None:
    pixels, labels = trained.train
    probe = SVC(C=10).fit(to_unit(pixels).reshape(len(pixels), -1), labels)
    assert probe.score(to_unit(trained.val[0]).reshape(len(trained.val[0]), -1), trained.val[1]) > 0.95
    for seed in range(3):
        assert probe_accuracy(trained, probe, CHOSEN, seed) > probe_accuracy(trained, probe, 1.0, seed)
