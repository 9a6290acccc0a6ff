"""Stage `pretrain`: real images -> generator, a folder that diffusers' DiTPipeline opens."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from diffstill.artifacts import Artifact, WorkFolder, load_split, new_artifact, open_artifact, refuse_foreign, to_pixels, to_unit
from diffstill.config import DitConfig, PretrainConfig, VaeConfig
from diffstill.diffusion import add_noise, denoising_loss, drop_labels, sample_latents
from diffstill.errors import DiffstillError
from diffstill.networks import STOCK_FREQUENCY_SHIFT, Generator, build_scheduler, build_transformer, build_vae, load_generator, save_generator
from diffstill.pictures import contact_sheet, save_png
from diffstill.record import Record, ignore
from diffstill.training import Training, batch_indices, pack, seeded, set_threads

LOG_EVERY = 50  # steps
VAE, DIT = 1, 2  # the first number of a draw's key, after the seed: which network it is for
Loss = Callable[[int], Tensor]
"""The loss of a step, by its number."""


def pretrain(
    config: PretrainConfig, *, images: Path, generator: Path, weights: Path | None = None, device: str = "cpu", record: Record = ignore
) -> dict[str, float]:
    """Train a small autoencoder and a small DiT on the training split, or take over a DiTPipeline folder: `weights`, or `config.location`.

    Writes the `generator` artifact at `generator`. Returns the reconstruction error on val (mean squared, images in
    -1..1) and the parameter counts. A killed run goes on from its last checkpoint.
    """
    set_threads(config.threads)
    real = open_artifact(images, "images")
    refuse_foreign(generator)
    if config.source == "folder":
        return _take_over(config, real, weights or Path(config.location or ""), generator, device, record)
    if weights:
        raise DiffstillError(f"{weights}: weights are given, but `pretrain.source` is scratch; set it to folder, or give no weights")
    with WorkFolder("pretrain", config, {"images": real}) as work:
        metrics = _make(config, real, generator, work, device, record)
        work.clear()
    return metrics


def _make(config: PretrainConfig, real: Artifact, generator: Path, work: WorkFolder, device: str, record: Record) -> dict[str, float]:
    made = _train(config, real, work, device, record)
    with new_artifact(generator, "generator", config, {"images": real}) as draft:
        metrics = _judge(made, real, draft.folder, record)
        draft.facts |= _facts(made, real) | metrics
        save_generator(made.to("cpu"), draft.folder, real.facts["classes"])
    return metrics


def _facts(made: Generator, real: Artifact) -> dict[str, object]:
    return {
        "frequency_shift": STOCK_FREQUENCY_SHIFT,
        "classes": real.facts["classes"],
        "side": real.facts["side"],
        "channels": real.facts["channels"],
        "null_label": made.null_label,
        "parameters_transformer": sum(weight.numel() for weight in made.transformer.parameters()),
        "parameters_vae": sum(weight.numel() for weight in made.vae.parameters()),
    }


def _take_over(config: PretrainConfig, real: Artifact, source: Path, generator: Path, device: str, record: Record) -> dict[str, float]:
    made = load_generator(source)
    _check_fit(made, real, source)
    made.to(device)
    with new_artifact(generator, "generator", config, {"images": real}) as draft:
        metrics = _judge(made, real, draft.folder, record)
        draft.facts |= _facts(made, real) | metrics
        for part in ("transformer", "vae", "scheduler"):
            shutil.copytree(source / part, draft.folder / part)
        shutil.copy(source / "model_index.json", draft.folder)
    return metrics


def _check_fit(made: Generator, real: Artifact, source: Path) -> None:
    facts, config = real.facts, made.vae.config
    side = made.latent_shape[1] * 2 ** (len(config.block_out_channels) - 1)
    if (config.in_channels, side) != (facts["channels"], facts["side"]):
        raise DiffstillError(
            f"{source}: makes images of {config.in_channels} x {side} px, but `prepare` gave {facts['channels']} x {facts['side']} px; "
            f"set `prepare.channels: {config.in_channels}` and `prepare.side: {side}`"
        )
    named = json.loads((source / "model_index.json").read_text()).get("id2label") or {}
    labels = [str(named.get(str(label))) for label in range(made.null_label)] if named else facts["classes"]
    if labels != facts["classes"] or made.null_label != len(facts["classes"]):
        raise DiffstillError(
            f"{source}: has {made.null_label} labels ({_shortened(labels)}), but the images have {len(facts['classes'])} classes ({_shortened(facts['classes'])}); "
            "they must be the same in the same order, so choose and order them with `prepare.classes`"
        )


def _shortened(names: list[str], shown: int = 5) -> str:
    return ", ".join(map(str, names[:shown])) + (", ..." if len(names) > shown else "")


def _run(name: str, training: Training, config: VaeConfig | DitConfig, loss_at: Loss, checkpoints: tuple[WorkFolder, int], record: Record) -> None:
    """Train to the end, from the last checkpoint if there is one; the averaged weights are the result."""
    work, every = checkpoints
    saved = work.load(name)
    if saved is not None:
        training.load(saved)
    with record.progress(f"pretrain {name}", config.steps * config.batch_size, "img", training.done * config.batch_size) as bar:
        while training.done < config.steps:
            loss = loss_at(training.done)
            training.advance(loss, config.learning_rate * (1 + math.cos(math.pi * training.done / config.steps)) / 2)
            bar.update(config.batch_size)
            if training.done % LOG_EVERY == 0 or training.done == config.steps:
                record.metrics({f"{name}_loss": _finite(loss.item(), name, training.done)}, training.done)
            if training.done % every == 0 or training.done == config.steps:
                work.save(name, pack(training.state()))
    training.adopt_average()


def _finite(loss: float, name: str, step: int) -> float:
    if not math.isfinite(loss):
        raise DiffstillError(f"the loss of the {name} is {loss} at step {step}: training diverged; lower `pretrain.{name}.learning_rate`")
    return loss


def _train(config: PretrainConfig, real: Artifact, work: WorkFolder, device: str, record: Record) -> Generator:
    pixels, labels = load_split(real, "train")
    images, targets = torch.from_numpy(to_unit(pixels)).to(device), torch.from_numpy(labels).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        vae = build_vae(config, real.facts["channels"], real.facts["side"]).to(device)
        side = real.facts["side"] // 2 ** (len(config.vae.channels) - 1)
        transformer = build_transformer(config, len(real.facts["classes"]), side).to(device)
    schedule = {"num_train_timesteps": config.timesteps, "beta_start": config.beta_start, "beta_end": config.beta_end, "beta_schedule": "linear"}
    made = Generator(transformer, vae, schedule)
    _train_vae(config, vae, images, work, record)
    mean, std = _moments(made, images)
    made.vae.register_to_config(scaling_factor=1 / float((mean.var() + std.square().mean()).sqrt()))
    _train_dit(config, made, (mean, std, targets), work, record)
    return made


def _train_vae(config: PretrainConfig, vae: nn.Module, images: Tensor, work: WorkFolder, record: Record) -> None:
    """Mean squared error plus `kl_weight` times the KL divergence to a standard normal, both per element of their own."""
    vae_config = config.vae

    def loss_at(step: int) -> Tensor:
        rows = batch_indices(len(images), config.seed, step, vae_config.batch_size)
        batch = images[rows.to(images.device)]
        posterior = vae.encode(batch).latent_dist  # type: ignore[operator]
        noise = torch.randn(posterior.mean.shape, generator=seeded(config.seed, VAE, step)).to(images.device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample  # type: ignore[operator]
        loss: Tensor = torch.nn.functional.mse_loss(decoded, batch) + vae_config.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
        return loss

    training = Training(list(vae.parameters()), vae_config.learning_rate, vae_config.ema_decay)
    _run("vae", training, vae_config, loss_at, (work, config.checkpoint_every), record)


def _train_dit(config: PretrainConfig, made: Generator, latents: tuple[Tensor, Tensor, Tensor], work: WorkFolder, record: Record) -> None:
    """The denoising loss on latents sampled anew at each use, labels dropped once per sample."""
    mean, std, targets = latents
    alphas_cumprod = made.alphas_cumprod()
    scaling = made.vae.config.scaling_factor

    def loss_at(step: int) -> Tensor:
        rows = batch_indices(len(mean), config.seed, step, config.dit.batch_size)
        draws = seeded(config.seed, DIT, step)
        t = torch.randint(config.timesteps, (len(rows),), generator=draws)
        dropped = torch.rand(len(rows), generator=draws) < config.dit.label_drop
        noise, eps = torch.randn((2, len(rows), *mean.shape[1:]), generator=draws).to(mean.device)
        at = rows.to(mean.device)
        x0 = (mean[at] + std[at] * noise) * scaling
        labels = drop_labels(targets[at], dropped.to(mean.device), made.null_label)
        x_t = add_noise(x0, eps, alphas_cumprod[t].to(mean.device))
        return denoising_loss(made.predict_noise(x_t, t.to(mean.device), labels), eps)

    training = Training(list(made.transformer.parameters()), config.dit.learning_rate, config.dit.ema_decay)
    _run("dit", training, config.dit, loss_at, (work, config.checkpoint_every), record)


@torch.no_grad()
def _moments(made: Generator, images: Tensor, chunk: int = 256) -> tuple[Tensor, Tensor]:
    parts = [made.encode(part) for part in images.split(chunk)]
    return torch.cat([mean for mean, _ in parts]), torch.cat([std for _, std in parts])


@torch.no_grad()
def _judge(made: Generator, real: Artifact, folder: Path, record: Record) -> dict[str, float]:
    """Reconstruction error on val; a picture of val images above their reconstructions, and one of guided samples."""
    device = next(made.vae.parameters()).device
    images = torch.from_numpy(to_unit(load_split(real, "val")[0])).to(device)
    rebuilt = torch.cat([made.vae.decode(made.encode(part)[0]).sample for part in images.split(256)])
    _show(torch.stack([images[:16], rebuilt[:16]]), folder / "reconstructions.png", record)
    _show(_samples(made, len(real.facts["classes"]), device), folder / "samples.png", record)
    return {"reconstruction_mse": float((rebuilt - images).square().mean())}


def _samples(made: Generator, classes: int, device: torch.device, rows: int = 4, shown: int = 10) -> Tensor:
    """Guided samples of the first `shown` classes, (rows, shown, channels, side, side)."""
    labels = torch.arange(min(classes, shown), device=device).repeat(rows)
    scheduler = build_scheduler("ddim", made.scheduler, learned_variance=False)
    draws = [seeded(0, number) for number in range(len(labels))]
    steps = min(25, made.scheduler["num_train_timesteps"])
    latents = sample_latents(
        made.predict_noise, scheduler, labels, draws, shape=made.latent_shape, null_label=made.null_label, guidance=2.0, steps=steps
    )
    decoded: Tensor = made.decode(latents).unflatten(0, (rows, -1))
    return decoded


def _show(rows: Tensor, path: Path, record: Record) -> None:
    save_png(contact_sheet(to_pixels(rows.cpu().numpy())), path)
    record.file(path)
