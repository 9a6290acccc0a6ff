"""Stage `encode`: real images -> latents, the posterior moments that fine-tuning samples from at each use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from diffstill.artifacts import Array, Artifact, Draft, load_split, new_artifact, open_artifact, read_shards, refuse_foreign, to_unit, write_shards
from diffstill.config import EncodeConfig
from diffstill.networks import Generator, load_generator
from diffstill.record import Progress, Record, ignore
from diffstill.shards import Share
from diffstill.training import set_threads


def encode(
    config: EncodeConfig,
    *,
    images: Path,
    generator: Path,
    latents: Path,
    parts: Sequence[Path] = (),
    shard: str | None = None,
    device: str = "cpu",
    record: Record = ignore,
) -> dict[str, float]:
    """Encode the training and val splits once, mirrored too where the data allow it.

    Writes the `latents` artifact: per split, `mean` and `std` (N, F, C, h, w) float16, unscaled, with F = 2 (as it is,
    mirrored) or 1, and `labels` (N,). With `shard` ("0/3") only that share of its files; with `parts`, the artifacts of
    all shards, it gathers these instead of encoding. Returns the number of images encoded here and, of the whole, the
    standard deviation of the scaled latents.
    """
    set_threads(config.threads)
    inputs = {"images": open_artifact(images, "images"), "generator": open_artifact(generator, "generator")}
    refuse_foreign(latents, "latents")
    mine, encoded = Share.of(shard, parts), 0
    with new_artifact(latents, "latents", config, inputs) as draft:
        if parts:
            draft.facts |= mine.gather(draft.folder, "latents", config, inputs)
        else:
            opened = load_generator(generator, inputs["generator"].facts["frequency_shift"]).to(device)
            encoded = _encode_share(config, mine, opened, inputs["images"], draft, record)
        metrics = {"latent_std": _spread(draft)} if mine.whole else {}
    return {"encoded": float(encoded), **metrics}


def _encode_share(config: EncodeConfig, mine: Share, opened: Generator, real: Artifact, draft: Draft, record: Record) -> int:
    """Write this process's files, and the facts of the whole; the number of images encoded."""
    splits = {split: load_split(real, split) for split in ("train", "val")}
    pieces = mine.of_pieces(list(_pieces(splits, config.shard_size)))
    count, flip = sum(len(piece.labels) for piece in pieces), real.facts["flip"]
    with record.progress("encode", count, "img") as bar:
        for piece in pieces:
            mean, std = _moments(opened, piece.pixels, flip, config.batch_size, bar)
            write_shards(draft.folder, piece.split, {"mean": mean, "std": std, "labels": piece.labels}, config.shard_size, piece.number)
    draft.facts |= {
        "classes": real.facts["classes"],
        "counts": {split: len(labels) for split, (_, labels) in splits.items()},
        "flips": 2 if flip else 1,
        "scaling_factor": float(opened.vae.config.scaling_factor),
        "shape": list(opened.latent_shape),
        **mine.facts(),
    }
    return count


def _spread(draft: Draft) -> float:
    """The standard deviation of the scaled latents."""
    mean = read_shards(draft.folder, "train")["mean"]
    return float(mean.astype(np.float32).std() * draft.facts["scaling_factor"])


@dataclass(frozen=True)
class _Piece:
    """The images of one file of the artifact: file `number` of a split."""

    split: str
    number: int
    pixels: Array
    labels: npt.NDArray[np.int64]


def _pieces(splits: dict[str, tuple[Array, npt.NDArray[np.int64]]], size: int) -> Iterator[_Piece]:
    for split, (pixels, labels) in splits.items():
        for number, start in enumerate(range(0, len(labels), size)):
            yield _Piece(split, number, pixels[start : start + size], labels[start : start + size])


@torch.inference_mode()
def _moments(opened: Generator, pixels: Array, flip: bool, batch_size: int, bar: Progress) -> tuple[Array, Array]:
    """Posterior mean and std of every image, each (N, F, C, h, w) float16."""
    device = next(opened.vae.parameters()).device
    means, stds = [], []
    for start in range(0, len(pixels), batch_size):
        batch = torch.from_numpy(to_unit(pixels[start : start + batch_size])).to(device)
        moments = [opened.encode(view) for view in ((batch, batch.flip(-1)) if flip else (batch,))]
        means.append(torch.stack([mean for mean, _ in moments], dim=1).half().cpu().numpy())
        stds.append(torch.stack([std for _, std in moments], dim=1).half().cpu().numpy())
        bar.update(len(batch))
    return np.concatenate(means), np.concatenate(stds)
