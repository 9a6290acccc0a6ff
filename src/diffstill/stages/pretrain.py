"""Stage `pretrain`: real images -> generator, a folder that diffusers' DiTPipeline opens."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffstill.artifacts import (
    MANIFEST,
    Artifact,
    Rows,
    WorkFolder,
    load_split,
    new_artifact,
    open_artifact,
    read_manifest,
    refuse_foreign,
    to_pixels,
    to_unit,
)
from diffstill.config import DitConfig, PretrainConfig, VaeConfig
from diffstill.diffusion import add_noise, denoising_loss, drop_labels, sample_latents
from diffstill.draws import Purpose, seed_of, seeded
from diffstill.errors import DiffstillError
from diffstill.networks import (
    ABOUT,
    LARGEST_LATENT,
    LARGEST_PIXEL,
    NONSENSE,
    ORIGINAL_FREQUENCY_SHIFT,
    STOCK_FREQUENCY_SHIFT,
    Generator,
    add_labels,
    build_scheduler,
    build_transformer,
    build_vae,
    load_generator,
    load_vae,
    refuse_unsound,
    save_generator,
    set_frequency_shift,
)
from diffstill.pictures import contact_sheet, save_png
from diffstill.pretrained import class_map, known_licence, label_names, map_classes, read_checkpoint, weights_digest
from diffstill.record import Record, ignore
from diffstill.training import Checkpoints, Training, batch_indices, pack, set_threads

log = logging.getLogger("diffstill")
LOG_EVERY = 50  # steps
FARTHEST = 4.0
"""No two images in -1..1 differ by a greater mean square."""
JUDGED = 1024
"""Images of val that judge the autoencoder: enough for a mean, and bounded."""
Loss = Callable[[int], Tensor]
"""The loss of a step, by its number."""


def pretrain(
    config: PretrainConfig,
    *,
    images: Path,
    generator: Path,
    weights: Path | None = None,
    autoencoder: Path | None = None,
    device: str = "cpu",
    record: Record = ignore,
) -> dict[str, float]:
    """Train a small autoencoder and a small DiT on the training split, or take over pretrained weights.

    These are `weights`, or what `config.location` names, and `autoencoder`, or `config.autoencoder`. Writes the `generator`
    artifact at `generator`, with the class map of pretrained weights. Returns the reconstruction error on val (mean
    squared, images in -1..1). A killed run goes on from its last checkpoint.
    """
    set_threads(config.threads, device)
    real = open_artifact(images, "images")
    refuse_foreign(generator)
    if config.source != "scratch":
        return _take_over(config, real, weights or _named(config.location), autoencoder or _named(config.autoencoder), generator, device, record)
    if weights or autoencoder:
        raise DiffstillError(f"{weights or autoencoder}: weights are given, but `pretrain.source` is scratch; set it to folder, or give no weights")
    with WorkFolder("pretrain", config, {"images": real}, device=device) as work:
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
        "frequency_shift": made.frequency_shift,
        "classes": real.facts["classes"],
        "labels": list(made.labels) if made.labels is not None else None,
        "side": real.facts["side"],
        "channels": real.facts["channels"],
        "null_label": made.null_label,
        "parameters_transformer": sum(weight.numel() for weight in made.transformer.parameters()),
        "parameters_vae": sum(weight.numel() for weight in made.vae.parameters()),
    }


def _named(location: str | None) -> Path | None:
    return Path(location).expanduser() if location else None


def _take_over(
    config: PretrainConfig, real: Artifact, source: Path | None, autoencoder: Path | None, generator: Path, device: str, record: Record
) -> dict[str, float]:
    """Pretrained weights with a label for every class, as a folder of our own."""
    if source is None:
        raise DiffstillError("`pretrain.location` is null, but pretrained weights are asked for; name their folder or file")
    about = _about(source)
    licence = config.licence or about.get("licence") or known_licence(config)
    log.warning("pretrained weights: %s", licence)
    made = _opened(config, source, autoencoder)
    _check_fit(made, real, source)
    names = _label_names(source, made.null_label)
    found = map_classes(real.facts["classes"], names, made.null_label, config.labels)
    added = [one for one in found if one.new]
    if added:
        log.warning(
            "%d of %d classes are new to the generator and get labels of their own: %s",
            len(added),
            len(found),
            _shortened([one.name for one in added]),
        )
    table = label_names(found, names, made.null_label)
    made = replace(made, transformer=add_labels(made.transformer, [one.copied for one in added]), labels=[one.label for one in found]).to(device)
    with new_artifact(generator, "generator", config, {"images": real}) as draft:
        metrics = _judge(made, real, draft.folder, record)
        draft.facts |= (
            _facts(made, real) | metrics | {"licence": licence, "weights": weights_digest(source), "learned_variance": made.learned_variance}
        )
        (draft.folder / "class_map.json").write_text(json.dumps(class_map(found), indent=1) + "\n")
        save_generator(made.to("cpu"), draft.folder, table)
    return metrics


def _opened(config: PretrainConfig, source: Path, autoencoder: Path | None) -> Generator:
    """The pretrained networks, with the timestep frequencies that they were trained with."""
    vae = load_vae(autoencoder) if autoencoder else None
    if config.source == "checkpoint":
        schedule = {"num_train_timesteps": config.timesteps, "beta_start": config.beta_start, "beta_end": config.beta_end, "beta_schedule": "linear"}
        made = Generator(read_checkpoint(_only_file(source)), vae, schedule)
    else:
        made = load_generator(source, _shift_of(config, source))
        made = replace(made, vae=vae or made.vae)
        if made.learned_variance and config.frequency_shift is None and made.frequency_shift == STOCK_FREQUENCY_SHIFT:
            log.warning(
                "%s predicts a variance, as weights of the original DiT code do; if it comes from there, set `pretrain.frequency_shift: 0`", source
            )
    if config.frequency_shift is not None:
        set_frequency_shift(made.transformer, float(config.frequency_shift))
    return made


def _shift_of(config: PretrainConfig, source: Path) -> float:
    """A generator of ours says it itself; the weights on the hub are those of the original DiT code."""
    if "frequency_shift" in (about := _about(source)):
        return float(about["frequency_shift"])
    return ORIGINAL_FREQUENCY_SHIFT if "facebook/DiT" in (config.location or "") else STOCK_FREQUENCY_SHIFT


def _about(source: Path) -> dict[str, Any]:
    """What a folder of ours, an artifact or merged, says of its weights; nothing of anyone else's."""
    if (source / MANIFEST).is_file():
        return read_manifest(source, "generator").facts
    return dict(json.loads((source / ABOUT).read_text())) if (source / ABOUT).is_file() else {}


def _only_file(source: Path) -> Path:
    """The checkpoint itself, or the only one in a folder."""
    if not source.is_dir():
        return source
    files = sorted(path for path in source.rglob("*") if path.suffix in (".pt", ".pth"))
    if len(files) != 1:
        raise DiffstillError(f"{source}: holds {len(files)} files *.pt, where one is expected; name the file in `pretrain.location`")
    return files[0]


def _check_fit(made: Generator, real: Artifact, source: Path) -> None:
    facts, config = real.facts, made.vae.config
    side = made.latent_shape[1] * 2 ** (len(config.block_out_channels) - 1)
    if (config.in_channels, side) != (facts["channels"], facts["side"]):
        raise DiffstillError(
            f"{source}: makes images of {config.in_channels} x {side} px, but `prepare` gave {facts['channels']} x {facts['side']} px; "
            f"set `prepare.channels: {config.in_channels}` and `prepare.side: {side}`"
        )
    if made.transformer.out_channels not in (made.latent_shape[0], 2 * made.latent_shape[0]):
        raise DiffstillError(
            f"{source}: the transformer gives {made.transformer.out_channels} channels for latents of {made.latent_shape[0]}; noise, or noise and variance, is "
            "as many or twice as many"
        )
    if not all(weight.isfinite().all() for network in (made.transformer, made.vae) for weight in network.parameters()):
        raise DiffstillError(f"{source}: holds weights that are no finite numbers; get them anew")
    if config.latent_channels != made.latent_shape[0]:
        raise DiffstillError(
            f"{source}: the transformer takes latents of {made.latent_shape[0]} channels, the autoencoder gives {config.latent_channels}; "
            "choose another `pretrain.autoencoder`"
        )


def _label_names(source: Path, count: int) -> list[str] | None:
    """The names of the `count` labels, where the folder has them all."""
    index = source / "model_index.json"
    named = json.loads(index.read_text()).get("id2label") if index.is_file() else None
    known = named if isinstance(named, dict) else {}
    return [str(known[str(label)]) for label in range(count)] if set(known) == {str(label) for label in range(count)} else None


def _shortened(names: list[str], shown: int = 5) -> str:
    return ", ".join(map(str, names[:shown])) + (", ..." if len(names) > shown else "")


def _run(name: str, training: Training, config: VaeConfig | DitConfig, loss_at: Loss, checkpoints: tuple[WorkFolder, int], record: Record) -> None:
    """Train to the end, from the last checkpoint if there is one; the averaged weights are the result."""
    work, every = checkpoints
    saved = work.load(name)
    if saved is not None:
        training.load(saved)
    total, done = config.steps * config.batch_size, training.done * config.batch_size
    with record.progress(f"pretrain {name}", total, "img", done) as bar, Checkpoints(work, name) as kept:
        while training.done < config.steps:
            loss = loss_at(training.done)
            training.advance(loss, config.learning_rate * (1 + math.cos(math.pi * training.done / config.steps)) / 2)
            bar.update(config.batch_size)
            last = training.done == config.steps
            if training.done % LOG_EVERY == 0 or last:
                record.metrics({f"{name}_loss": _sound(loss.item(), name, training.done, last=last)}, training.done)
            if training.done % every == 0 or last:
                kept.offer(lambda: pack(training.state()), last=last)
    training.adopt_average()
    for weight in training.weights:
        fix = f"training diverged; lower `pretrain.{name}.learning_rate`"
        refuse_unsound(weight, torch.finfo(weight.dtype).max, f"a weight of the {name}", fix)


def _sound(loss: float, name: str, step: int, *, last: bool) -> float:
    if not math.isfinite(loss) or (last and loss > NONSENSE):
        raise DiffstillError(f"the loss of the {name} is {loss} at step {step}: training diverged; lower `pretrain.{name}.learning_rate`")
    return loss


def _train(config: PretrainConfig, real: Artifact, work: WorkFolder, device: str, record: Record) -> Generator:
    pixels, labels = load_split(real, "train")
    images, targets = torch.from_numpy(to_unit(pixels)).to(device), torch.from_numpy(labels).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(Purpose.GENERATOR_WEIGHTS, config.seed))
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
        rows = batch_indices(len(images), Purpose.VAE_BATCH, config.seed, step, vae_config.batch_size)
        batch = images[rows.to(images.device)]
        posterior = vae.encode(batch).latent_dist  # type: ignore[operator]
        draws = seeded(Purpose.VAE_STEP, config.seed, step)
        noise = torch.randn(posterior.mean.shape, generator=draws).to(images.device)
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
        rows = batch_indices(len(mean), Purpose.DIT_BATCH, config.seed, step, config.dit.batch_size)
        draws = seeded(Purpose.DIT_STEP, config.seed, step)
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
    images = torch.from_numpy(to_unit(Rows(real.folder, "val", "pixels")[:JUDGED])).to(device)
    rebuilt = torch.cat([made.vae.decode(made.encode(part)[0]).sample for part in images.split(_at_once(images))])
    error = float((rebuilt - images).square().mean())
    if not error <= FARTHEST or rebuilt.min() == rebuilt.max():
        raise DiffstillError(
            f"the autoencoder gives back images of the val split with an error of {error:g} and values from {rebuilt.min():g} to "
            f"{rebuilt.max():g}, where theirs lie in -1..1: it is of no use; train it at a lower `pretrain.vae.learning_rate`, "
            "or choose another `pretrain.autoencoder`"
        )
    _show(torch.stack([images[:16], rebuilt[:16]]), folder / "reconstructions.png", record)
    _show(_samples(made, len(real.facts["classes"]), device), folder / "samples.png", record)
    return {"reconstruction_mse": error}


def _at_once(images: Tensor) -> int:
    """Images per pass through the autoencoder: as many as hold the pixels of 256 small ones, at least one."""
    return max(1, min(256, 2**22 // images[0].numel()))


def _samples(made: Generator, classes: int, device: torch.device, rows: int = 4, shown: int = 10) -> Tensor:
    """Guided samples of the first `shown` classes, (rows, shown, channels, side, side)."""
    labels = made.labels_of(torch.arange(min(classes, shown), device=device).repeat(rows))
    scheduler = build_scheduler("ddim", made.scheduler, learned_variance=False)
    draws = [seeded(Purpose.SHOWN, number) for number in range(len(labels))]
    steps = min(25, made.scheduler["num_train_timesteps"])
    latents = sample_latents(
        made.predict_noise, scheduler, labels, draws, shape=made.latent_shape, null_label=made.null_label, guidance=2.0, steps=steps
    )
    fix = "the transformer has diverged; lower `pretrain.dit.learning_rate`, or get other weights"
    refuse_unsound(latents, LARGEST_LATENT, "a latent that it draws", fix)
    decoded = made.decode_all(latents)
    refuse_unsound(decoded, LARGEST_PIXEL, "an image that it draws", fix)
    grid: Tensor = decoded.unflatten(0, (rows, -1))
    return grid


def _show(rows: Tensor, path: Path, record: Record) -> None:
    save_png(contact_sheet(to_pixels(rows.cpu().numpy())), path)
    record.file(path)
