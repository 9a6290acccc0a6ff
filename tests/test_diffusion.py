"""Noise-schedule maths in inverse pairs and limits; sampling against a sampler written out by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from diffstill.diffusion import add_noise, denoising_loss, drop_labels, guided, predicted_clean, sample_latents, variational_loss


def test_predicted_clean_inverts_add_noise() -> None:
    draws = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 4, 3, 3, generator=draws, dtype=torch.float64)
    abar = torch.tensor([0.999, 0.7, 0.3, 0.01, 1e-4], dtype=torch.float64)
    torch.testing.assert_close(predicted_clean(add_noise(x0, eps, abar), eps, abar), x0)


def test_add_noise_at_its_limits_and_element_by_element() -> None:
    x0, eps = torch.full((2, 1, 2, 2), 3.0), torch.full((2, 1, 2, 2), -2.0)
    x_t = add_noise(x0, eps, torch.tensor([1.0, 0.0]))
    assert torch.equal(x_t[0], x0[0])
    assert torch.equal(x_t[1], eps[1])
    half = add_noise(x0[:1], eps[:1], torch.tensor([0.36]))
    assert half.flatten().tolist() == pytest.approx([0.6 * 3 - 0.8 * 2] * 4)


def test_noise_keeps_unit_variance() -> None:
    x0, eps = torch.randn(2, 2000, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    for abar in (0.9, 0.5, 0.1):
        assert add_noise(x0, eps, torch.full((2000,), abar)).std().item() == pytest.approx(1, abs=0.02)


def test_denoising_loss_is_the_mean_over_all_elements() -> None:
    eps_theta, eps = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[0.0, -1.0]]]])
    assert denoising_loss(eps_theta, eps).item() == pytest.approx((1 + 9) / 2)


ABAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)


def slow_variational_bits(output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> float:
    """Element by element, from DDPM's equations 6, 7 and 13 and the interpolated variance of Improved DDPM, eq. 15."""
    abar, bits = [1.0, *ABAR.tolist()], []  # abar[0] belongs to the clean latent, abar[t + 1] to timestep t
    for n, step in enumerate(t.tolist()):
        now, before = abar[step + 1], abar[step]
        beta = 1 - now / before
        later = abar[3], abar[2], abar[1]
        posterior = beta * (1 - before) / (1 - now) if step else (1 - abar[2] / abar[1]) * (1 - later[2]) / (1 - later[1])
        for eps, v, clean, noisy in zip(*(one.flatten().tolist() for one in (*output[n].chunk(2), x0[n], x_t[n])), strict=True):
            guess = (noisy - math.sqrt(1 - now) * eps) / math.sqrt(now)
            mean, predicted = ((math.sqrt(before) * beta * x + math.sqrt(1 - beta) * (1 - before) * noisy) / (1 - now) for x in (clean, guess))
            variance = math.exp((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(posterior))
            if step:
                nats = 0.5 * (math.log(variance / posterior) + (posterior + (mean - predicted) ** 2) / variance - 1)
            else:
                above, below = (0.5 * (1 + math.erf((clean - predicted + side / 255) / math.sqrt(2 * variance))) for side in (1, -1))
                chance = above if clean < -0.999 else 1 - below if clean > 0.999 else above - below
                nats = -math.log(max(chance, 1e-12))
            bits.append(nats / math.log(2))
    return sum(bits) / len(bits)


@pytest.mark.parametrize("t", [[1, 2, 500, 999], [0, 0, 0, 7]])
def test_the_variational_term_is_that_of_the_equations(t: list[int]) -> None:
    draws = torch.Generator().manual_seed(3)
    x0 = torch.randn(4, 2, 2, 2, generator=draws, dtype=torch.float64)
    eps, steps = torch.randn(x0.shape, generator=draws, dtype=torch.float64), torch.tensor(t)
    x_t = add_noise(x0, eps, ABAR[steps])
    output = torch.cat([eps + 0.01 * torch.randn(x0.shape, generator=draws), torch.rand(x0.shape, generator=draws) * 2 - 1], dim=1)
    assert variational_loss(output, x0, x_t, steps, ABAR).item() == pytest.approx(slow_variational_bits(output, x0, x_t, steps), rel=1e-6)


@pytest.mark.parametrize("clean", [-1.0, -0.95, 0.4, 0.95, 1.0])
@pytest.mark.parametrize("error", [-5.5, -4.5, 4.5, 5.5, 300.0])
def test_a_wrong_prediction_of_the_last_step_costs_its_true_bits(clean: float, error: float) -> None:
    """Chances from 1e-4 to 1e-12 in each of the three kinds of bins, and the bound of 1e-12 beyond."""
    t, x0 = torch.tensor([0]), torch.full((1, 1, 1, 1), clean, dtype=torch.float64)
    x_t = add_noise(x0, torch.zeros_like(x0), ABAR[t])
    output = torch.tensor([error, -0.5], dtype=torch.float64).reshape(1, 2, 1, 1)
    expected = slow_variational_bits(output, x0, x_t, t)
    assert variational_loss(output, x0, x_t, t, ABAR).item() == pytest.approx(expected, rel=1e-5)
    in_the_tail = abs(clean) < 0.999 or (error < 0) == (clean < 0)  # an open bin lies on one side
    assert (12 < expected < -math.log2(0.99e-12)) == in_the_tail


def test_the_variational_term_teaches_the_variance_alone_and_is_least_where_it_is_right() -> None:
    draws = torch.Generator().manual_seed(4)
    x0, eps = torch.randn(2, 2000, 1, 1, 1, generator=draws, dtype=torch.float64)
    steps = torch.full((2000,), 300)
    x_t = add_noise(x0, eps, ABAR[steps])
    output = torch.cat([eps, torch.zeros_like(eps)], dim=1).requires_grad_()
    variational_loss(output, x0, x_t, steps, ABAR).backward()
    assert output.grad is not None
    assert output.grad[:, :1].abs().max() == 0 < output.grad[:, 1:].abs().min()
    at = {v: variational_loss(torch.cat([eps, torch.full_like(eps, v)], dim=1), x0, x_t, steps, ABAR).item() for v in (-1.0, 0.0, 1.0)}
    assert at[-1.0] == pytest.approx(0, abs=1e-9)  # the noise is known, so the variance is that of the posterior
    assert at[-1.0] < at[0.0] < at[1.0]


@pytest.mark.parametrize(("sampler", "learned"), [("ddpm", False), ("ddpm", True), ("ddim", False), ("dpm++", False)])
def test_whoever_knows_the_noise_ends_at_the_clean_latent(sampler: str, learned: bool) -> None:
    """The last step adds no noise, whatever variance the network asks for."""
    from diffstill.networks import build_scheduler

    clean = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    schedule = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    scheduler = build_scheduler(sampler, schedule, learned_variance=learned)

    def predict(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        abar = scheduler.alphas_cumprod[t.long()].reshape(-1, 1, 1, 1)
        eps = (x_t - abar.sqrt() * clean) / (1 - abar).sqrt()
        return torch.cat([eps, torch.full_like(eps, 1.1)], dim=1) if learned else eps

    noise = [torch.Generator().manual_seed(number) for number in range(2)]
    drawn = sample_latents(predict, scheduler, torch.tensor([0, 0]), noise, shape=(4, 4, 4), null_label=1, guidance=1.0, steps=20)
    torch.testing.assert_close(drawn, clean.expand_as(drawn), atol=2e-3, rtol=0)


def test_drop_labels_touches_only_the_dropped() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    assert drop_labels(labels, torch.tensor([False, True, False, True]), 3).tolist() == [0, 3, 2, 3]


def by_label(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """A network whose output is its label."""
    return labels.reshape(-1, 1, 1, 1).expand_as(x_t).float()


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_from_the_null_label(guidance: float) -> None:
    x_t = torch.zeros(2, 4, 1, 1)
    eps = guided(by_label, x_t, torch.zeros(2), torch.tensor([1, 5]), 10, guidance)
    assert eps.shape == x_t.shape
    for row, label in zip(eps, (1, 5), strict=True):
        assert row.flatten().tolist() == pytest.approx([10 + guidance * (label - 10)] * 4)  # on every latent channel


def test_each_image_is_guided_at_its_own_timestep() -> None:
    def by_time(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return by_label(x_t, t, labels) * t.reshape(-1, 1, 1, 1) + x_t

    x_t = torch.tensor([0.25, 0.5]).reshape(2, 1, 1, 1)
    eps = guided(by_time, x_t, torch.tensor([3.0, 7.0]), torch.tensor([1, 5]), 10, 2.0)
    assert eps.flatten().tolist() == pytest.approx([0.25 + 3 * (2 * 1 - 10), 0.5 + 7 * (2 * 5 - 10)])


def test_guidance_leaves_a_learned_variance_alone() -> None:
    def with_variance(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.cat([by_label(x_t, t, labels), 100 + by_label(x_t, t, labels)], dim=1)

    out = guided(with_variance, torch.zeros(1, 2, 1, 1), torch.zeros(1), torch.tensor([1]), 10, 2.0)
    assert out.flatten().tolist() == pytest.approx([-8, -8, 101, 101])


class HalfScheduler:
    """x <- x / 2 - output + noise, so that the whole path can be written down."""

    init_noise_sigma = 2.0

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = torch.arange(steps).flip(0)

    def step(self, output: Tensor, t: Tensor, x_t: Tensor, generator: list[torch.Generator], return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        noise = torch.stack([torch.randn(x_t.shape[1:], generator=one) for one in generator])
        return (x_t / 2 - output + noise,)


def slow_sample(label: int, seed: int, steps: int, guidance: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x_t = 2.0 * torch.randn((1, 2, 2), generator=generator)
    for _ in range(steps):
        x_t = x_t / 2 - (10 + guidance * (label - 10)) + torch.randn((1, 2, 2), generator=generator)
    return x_t


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_every_image_follows_its_own_noise(guidance: float) -> None:
    labels, seeds = [3, 0, 3], [7, 8, 9]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    drawn = sample_latents(by_label, HalfScheduler(), torch.tensor(labels), generators, shape=(1, 2, 2), null_label=10, guidance=guidance, steps=4)
    for image, label, seed in zip(drawn, labels, seeds, strict=True):
        torch.testing.assert_close(image, slow_sample(label, seed, 4, guidance))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_samplers_recover_gaussian_data(sampler: str) -> None:
    """With the exact noise prediction for data N(m, s^2), samples have that mean and spread."""
    from diffstill.networks import build_scheduler

    mean, spread, steps = 1.5, 0.4, 500 if sampler == "ddpm" else 50  # ancestral steps are narrow when few
    config = SimpleNamespace(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear").__dict__
    scheduler = build_scheduler(sampler, config, learned_variance=False)
    alphas_cumprod = scheduler.alphas_cumprod

    def exact(x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        abar = alphas_cumprod[t.long()].reshape(-1, 1, 1, 1)
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * mean) / (abar * spread**2 + 1 - abar)

    generators = [torch.Generator().manual_seed(seed) for seed in range(200)]
    x0 = sample_latents(exact, scheduler, torch.zeros(200, dtype=torch.long), generators, shape=(1, 4, 4), null_label=1, guidance=1.0, steps=steps)
    assert x0.mean().item() == pytest.approx(mean, abs=4 * spread / math.sqrt(x0.numel()) + 0.02)
    assert x0.std().item() == pytest.approx(spread, rel=0.12)
