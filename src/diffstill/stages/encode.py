"""Stage `encode`: real images -> latents, the posterior moments that fine-tuning samples from at each use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffstill.artifacts import Array, load_split, new_artifact, open_artifact, refuse_foreign, to_unit, write_shards
from diffstill.config import EncodeConfig
from diffstill.networks import Generator, load_generator
from diffstill.record import Record, ignore
from diffstill.training import set_threads


def encode(config: EncodeConfig, *, images: Path, generator: Path, latents: Path, device: str = "cpu", record: Record = ignore) -> dict[str, float]:
    """Encode the training and val splits once, mirrored too where the data allow it.

    Writes the `latents` artifact: per split, `mean` and `std` (N, F, C, h, w) float16, unscaled, with F = 2 (as it is,
    mirrored) or 1, and `labels` (N,). Returns the number of images and the standard deviation of the scaled latents.
    """
    set_threads(config.threads)
    real, made = open_artifact(images, "images"), open_artifact(generator, "generator")
    refuse_foreign(latents)
    opened = load_generator(generator, made.facts["frequency_shift"]).to(device)
    scaling = float(opened.vae.config.scaling_factor)
    counts, spread = {}, 0.0
    with new_artifact(latents, "latents", config, {"images": real, "generator": made}) as draft:
        for split in ("train", "val"):
            pixels, labels = load_split(real, split)
            mean, std = _moments(opened, pixels, real.facts["flip"], config.batch_size, device, split, record)
            write_shards(draft.folder, split, {"mean": mean, "std": std, "labels": labels}, config.shard_size)
            counts[split] = len(labels)
            spread = spread or float(mean.astype(np.float32).std() * scaling)
        draft.facts |= {
            "classes": real.facts["classes"],
            "counts": counts,
            "flips": mean.shape[1],
            "scaling_factor": scaling,
            "shape": list(mean.shape[2:]),
        }
    return {"encoded": float(sum(counts.values())), "latent_std": spread}


@torch.inference_mode()
def _moments(opened: Generator, pixels: Array, flip: bool, batch_size: int, device: str, split: str, record: Record) -> tuple[Array, Array]:
    """Posterior mean and std of every image, each (N, F, C, h, w) float16."""
    means, stds = [], []
    with record.progress(f"encode {split}", len(pixels), "img") as bar:
        for start in range(0, len(pixels), batch_size):
            batch = torch.from_numpy(to_unit(pixels[start : start + batch_size])).to(device)
            moments = [opened.encode(view) for view in ((batch, batch.flip(-1)) if flip else (batch,))]
            means.append(torch.stack([mean for mean, _ in moments], dim=1).half().cpu().numpy())
            stds.append(torch.stack([std for _, std in moments], dim=1).half().cpu().numpy())
            bar.update(len(batch))
    return np.concatenate(means), np.concatenate(stds)
