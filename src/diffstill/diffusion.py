"""Noise-schedule maths, the denoising loss and guided sampling. Torch only: a library to lift out.

Symbols as in the papers: x0 a clean latent, eps its noise, abar_t the cumulative alpha, x_t the noised latent,
eps_theta the predicted noise. Shapes: N images, C channels, side h = w.
"""

from __future__ import annotations

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
    for t in scheduler.timesteps:
        output = guided(predict, x_t, t.to(labels.device).expand(len(labels)), labels, null_label, guidance)
        x_t = scheduler.step(output, t, x_t, generator=list(generators), return_dict=False)[0]
    return x_t
