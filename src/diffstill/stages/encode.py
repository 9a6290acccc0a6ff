"""Stage `encode`: real images -> latents, the posterior moments that fine-tuning samples from at each use."""

from __future__ import annotations

from collections.abc import Generator as Made
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffstill.artifacts import Array, Artifact, Draft, Rows, WorkFolder, new_artifact, open_artifact, read_ahead, refuse_foreign
from diffstill.config import EncodeConfig
from diffstill.errors import DiffstillError
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
    all shards, it gathers these instead of encoding. Finished files of a killed run are kept. Returns the number of
    images encoded here and, of the whole, the standard deviation of the scaled latents.
    """
    set_threads(config.threads)
    inputs = {"images": open_artifact(images, "images"), "generator": open_artifact(generator, "generator")}
    refuse_foreign(latents, "latents")
    mine, encoded = Share.of(shard, parts), 0
    with WorkFolder("encode", config, inputs, str(mine.shard or ""), device=device) as work:
        with new_artifact(latents, "latents", config, inputs) as draft:
            if parts:
                draft.facts |= mine.gather(draft.folder, "latents", config, inputs)
            else:
                opened = load_generator(generator, inputs["generator"].facts["frequency_shift"]).to(device)
                encoded = _encode_share(config, mine, opened, inputs["images"], draft, work, record)
            metrics = {"latent_std": _spread(draft)} if mine.whole else {}
            if metrics and not 0 < metrics["latent_std"] < np.inf:
                raise DiffstillError(
                    f"all latents together have the deviation {metrics['latent_std']:g}: the autoencoder tells no image from another; "
                    "train it for longer (`pretrain.vae.steps`) or at a lower `pretrain.vae.learning_rate`"
                )
        work.clear()
    return {"encoded": float(encoded), **metrics}


def _encode_share(config: EncodeConfig, mine: Share, opened: Generator, real: Artifact, draft: Draft, work: WorkFolder, record: Record) -> int:
    """Write this process's files, and the facts of the whole; the number of images in them."""
    splits = {split: _Split(Rows(real.folder, split, "pixels"), Rows(real.folder, split, "labels")) for split in ("train", "val")}
    pieces = mine.of_pieces(_pieces(splits, config.shard_size))
    left = [piece for piece in pieces if not work.holds(piece.name)]
    count, waiting = (sum(piece.stop - piece.start for piece in some) for some in (pieces, left))
    with record.progress("encode", count, "img", count - waiting) as bar:
        _encode_pieces(config, opened, splits, left, flip=real.facts["flip"], work=work, bar=bar)
    for piece in pieces:
        work.place(piece.name, draft.folder)
    draft.facts |= {
        "classes": real.facts["classes"],
        "counts": {name: len(split.labels) for name, split in splits.items()},
        "flips": 2 if real.facts["flip"] else 1,
        "scaling_factor": float(opened.vae.config.scaling_factor),
        "shape": list(opened.latent_shape),
        **mine.facts(),
    }
    return count


def _encode_pieces(
    config: EncodeConfig, opened: Generator, splits: Mapping[str, _Split], pieces: Sequence[_Piece], *, flip: bool, work: WorkFolder, bar: Progress
) -> None:
    """Keep the latents of every piece in `work`. While the device computes a batch, the next one is read."""
    parts: list[tuple[Array, Array]] = []
    with closing(read_ahead(_batches(splits, pieces, config.batch_size, opened))) as batches:
        for batch in batches:
            parts.append(_moments(opened, batch.images, flip=flip, precision=config.precision))
            _refuse_overflow(batch.piece, sum(len(mean) for mean, _ in parts[:-1]), parts[-1])
            bar.update(len(batch.images))
            if batch.last:
                mean, std = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
                piece, parts = batch.piece, []
                work.save(piece.name, {"mean": mean, "std": std, "labels": splits[piece.split].labels[piece.start : piece.stop]})


def _refuse_overflow(piece: _Piece, before: int, moments: tuple[Array, Array]) -> None:
    """Raise `DiffstillError` naming the first image, `before` and on in its piece, whose moments are no finite float16."""
    for name, values in zip(("mean", "deviation"), moments, strict=True):
        odd = values[~np.isfinite(values)]
        if len(odd):
            row = piece.start + before + int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).argmax())
            raise DiffstillError(
                f"image {row} of {piece.split}: the {name} of its latent is {odd[0]}, and a finite number below 65504 is expected; set "
                "`encode.precision: float32`, or make the autoencoder anew with a lower `pretrain.vae.learning_rate`"
            )


def _spread(draft: Draft) -> float:
    """The standard deviation of the scaled latents."""
    means, size, total, squares = Rows(draft.folder, "train", "mean"), 256, 0.0, 0.0
    for start in range(0, len(means), size):
        part = means[start : start + size].astype(np.float64)
        total, squares = total + part.sum(), squares + (part**2).sum()
    count = float(np.prod(means.shape))
    return float(np.sqrt(squares / count - (total / count) ** 2) * draft.facts["scaling_factor"])


@dataclass(frozen=True)
class _Split:
    pixels: Rows
    labels: Rows


@dataclass(frozen=True)
class _Piece:
    """The images of one file of the artifact: file `number` of a split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def _pieces(splits: Mapping[str, _Split], size: int) -> list[_Piece]:
    return [
        _Piece(name, number, start, min(start + size, len(split.labels)))
        for name, split in splits.items()
        for number, start in enumerate(range(0, len(split.labels), size))
    ]


@dataclass(frozen=True)
class _Batch:
    """Images (B, channels, side, side) uint8 of a piece, pinned for a GPU; whether they are the piece's last."""

    piece: _Piece
    images: Tensor
    last: bool


def _batches(splits: Mapping[str, _Split], pieces: Sequence[_Piece], size: int, opened: Generator) -> Made[_Batch]:
    pinned = opened.vae.device.type == "cuda"
    for piece in pieces:
        for start in range(piece.start, piece.stop, size):
            stop = min(start + size, piece.stop)
            images = torch.from_numpy(splits[piece.split].pixels[start:stop])
            yield _Batch(piece, images.pin_memory() if pinned else images, stop == piece.stop)


@torch.inference_mode()
def _moments(opened: Generator, images: Tensor, *, flip: bool, precision: str) -> tuple[Array, Array]:
    """Posterior mean and std of every image, each (N, F, C, h, w) float16."""
    device = opened.vae.device
    unit = images.to(device, non_blocking=True).float() / torch.tensor(127.5, device=device) - 1.0  # `to_unit`, to the last bit
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        moments = [opened.encode(view) for view in ((unit, unit.flip(-1)) if flip else (unit,))]
    mean, std = (torch.stack(views, dim=1).half().cpu().numpy() for views in zip(*moments, strict=True))
    return mean, std
