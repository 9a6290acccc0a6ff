"""Noise-schedule maths, the denoising loss and guided sampling. Torch only: a library to lift out.

Symbols as in the papers: x0 a clean latent, eps its noise, abar_t the cumulative alpha, x_t the noised latent,
eps_theta the predicted noise. Shapes: N images, C channels, side h = w.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (N,C,h,w), t (N,), labels (N,)) -> network output (N,C,h,w), or (N,2C,h,w) with a learned variance."""


class Scheduler(Protocol):
    """The part of diffusers' scheduler interface that sampling uses."""

    timesteps: Tensor
    init_noise_sigma: Any

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Choose the timesteps of a run."""
        ...

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        """Go from x_t to the x of the next timestep."""
        ...


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.dim() - 1))


def add_noise(x0: Tensor, eps: Tensor, abar_t: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM, eq. 4). `abar_t` is (N,). Inverse: `predicted_clean`."""
    abar_t = _per_image(abar_t, x0)
    return abar_t.sqrt() * x0 + (1 - abar_t).sqrt() * eps


def predicted_clean(x_t: Tensor, eps_theta: Tensor, abar_t: Tensor) -> Tensor:
    """x0_hat = (x_t - sqrt(1 - abar_t) eps_theta) / sqrt(abar_t), unclipped. Inverse of `add_noise` where eps_theta = eps."""
    abar_t = _per_image(abar_t, x_t)
    return (x_t - (1 - abar_t).sqrt() * eps_theta) / abar_t.sqrt()


def denoising_loss(eps_theta: Tensor, eps: Tensor) -> Tensor:
    """Mean squared error of the predicted noise (DDPM, eq. 14), a scalar."""
    return torch.nn.functional.mse_loss(eps_theta, eps)


def variational_loss(output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The variational term of a network that predicts a variance beside the noise, in bits per dimension, a scalar.

    Improved DDPM (Nichol & Dhariwal 2021), eq. 14 to 16, as DiT trains it: added to the squared error with weight 1, the
    predicted noise held fixed, so that it teaches the variance alone. `output` is (N,2C,h,w), t (N,), `alphas_cumprod`
    (T,), all on one device.
    """
    eps_theta, v = output.chunk(2, dim=1)
    abar, before = alphas_cumprod.double(), torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]]).double()
    beta = 1 - abar / before
    small = beta * (1 - before) / (1 - abar)
    small = torch.cat([small[1:2], small[1:]])  # the posterior of t = 0 has none
    large, small, abar_t = (_per_image(values[t].to(x_t.dtype), x_t) for values in (beta.log(), small.log(), abar))
    log_variance = torch.lerp(small, large, (v + 1) / 2)
    of_x0, of_x_t = (_per_image(values[t].to(x_t.dtype), x_t) for values in _posterior_weights(abar, before, beta))
    x0_hat = (x_t - (1 - abar_t).sqrt() * eps_theta.detach()) / abar_t.sqrt()
    mean, guess = of_x0 * x0 + of_x_t * x_t, of_x0 * x0_hat + of_x_t * x_t
    divergence = 0.5 * (log_variance - small + (small - log_variance).exp() + (mean - guess).square() * (-log_variance).exp() - 1)
    first = -_bin_log_probability(x0, guess, 0.5 * log_variance)
    nats = torch.where(_per_image(t, x_t) == 0, first, divergence)
    return nats.mean() / math.log(2)


def _posterior_weights(abar: Tensor, before: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """How much x0 and x_t count in the mean of q(x_{t-1} | x_t, x0) (DDPM, eq. 7), each (T,)."""
    return before.sqrt() * beta / (1 - abar), (beta.neg() + 1).sqrt() * (1 - before) / (1 - abar)


def _bin_log_probability(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the bin of width 2/255 around x under a normal (DDPM, eq. 13); the outermost bins are open."""
    above, below = ((x - mean + side / 255) * (-log_scale).exp() for side in (1, -1))
    upper, lower = torch.special.ndtr(above), torch.special.ndtr(below)
    inside = (upper - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, upper.clamp(min=1e-12).log(), torch.where(x > 0.999, (1 - lower).clamp(min=1e-12).log(), inside))


def drop_labels(labels: Tensor, dropped: Tensor, null_label: int) -> Tensor:
    """`labels` (N,) with the null label where `dropped` (N,) is true: the unconditional branch of classifier-free guidance."""
    return torch.where(dropped, null_label, labels)


def guided(predict: Predict, x_t: Tensor, t: Tensor, labels: Tensor, null_label: int, guidance: float) -> Tensor:
    """Classifier-free guidance: eps_null + guidance (eps_class - eps_null), on all latent channels.

    The conditional and the unconditional pass share one batch; with guidance 1 there is only the conditional one.
    A learned variance (channels beyond those of `x_t`) stays that of the conditional pass.
    """
    if guidance == 1:
        return predict(x_t, t, labels)
    both = predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([labels, torch.full_like(labels, null_label)]))
    conditional, unconditional = both.chunk(2)
    channels = x_t.shape[1]
    eps = torch.lerp(unconditional[:, :channels], conditional[:, :channels], guidance)
    return torch.cat([eps, conditional[:, channels:]], dim=1)


@torch.inference_mode()
def sample_latents(
    predict: Predict,
    scheduler: Scheduler,
    labels: Tensor,
    generators: Sequence[torch.Generator],
    *,
    shape: tuple[int, int, int],
    null_label: int,
    guidance: float,
    steps: int,
) -> Tensor:
    """Draw one latent (C, h, w) = `shape` for each of `labels` (N,), image n from the CPU generator n alone: (N, C, h, w).

    A `scheduler` that does not take a learned variance must be given a `predict` without one.
    """
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    scheduler.set_timesteps(steps)
    x_t: Tensor = noise.to(labels.device) * scheduler.init_noise_sigma
    for number, t in enumerate(scheduler.timesteps, start=1):
        output = guided(predict, x_t, t.to(labels.device).expand(len(labels)), labels, null_label, guidance)
        if number == len(scheduler.timesteps):
            output[
                :, shape[0] :
            ] = -1  # the least variance: the last step adds no noise (DDPM, algorithm 2), as the scheduler would with a learned one
        x_t = scheduler.step(output, t, x_t, generator=list(generators), return_dict=False)[0]
    return x_t
