"""Stage `sample`: generator, with or without a denoiser -> distilled, image folders that anyone can load."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from diffstill.artifacts import Array, Artifact, new_artifact, open_artifact, refuse_foreign, to_pixels
from diffstill.config import SampleConfig
from diffstill.draws import Purpose, seeded
from diffstill.errors import DiffstillError
from diffstill.networks import LARGEST_LATENT, LARGEST_PIXEL, Generator, apply_delta, open_generator, refuse_unsound
from diffstill.pictures import contact_sheet, read_png, save_png, to_image
from diffstill.record import Record, ignore
from diffstill.shards import Share
from diffstill.training import set_threads

SHEET_COLUMNS, SHEET_ROWS = 20, 100
"""Images per class, and classes, on the contact sheet of a whole set."""


@dataclass(frozen=True)
class _Slot:
    """Image `number` of class `label`, to be drawn with generation seed `seed`."""

    seed: int
    number: int
    label: int

    def generator(self) -> torch.Generator:
        """The noise of this image and of no other."""
        return seeded(Purpose.IMAGE, self.seed, self.label, self.number)


def sample(
    config: SampleConfig,
    *,
    generator: Path,
    distilled: Path,
    denoiser: Path | None = None,
    parts: Sequence[Path] = (),
    shard: str | None = None,
    device: str = "cpu",
    record: Record = ignore,
) -> dict[str, float]:
    """Draw a distilled set per seed: from the fine-tuned generator, or from the untuned one where no denoiser is given.

    Writes the `distilled` artifact: per seed `seed-<s>/<class>/<number>.png`, `seed-<s>/metadata.csv` and a contact
    sheet `seed-<s>.png`. Image k of class c is a pure function of (generator and denoiser, seed, c, k). With `shard`
    ("0/3") only that share of the images; with `parts`, the artifacts of all shards, it gathers these instead of
    drawing. Returns the number of images drawn here.
    """
    set_threads(config.threads, device)
    made = open_artifact(generator, "generator")
    tuned = open_artifact(denoiser, "denoiser") if denoiser else None
    if tuned and tuned.manifest.inputs["generator"] != made.digest:
        raise DiffstillError(f"{denoiser}: was fine-tuned from another generator than {generator}; run `finetune` again")
    refuse_foreign(distilled, "distilled")
    classes, mine, drawn = _chosen(config.classes, made.facts["classes"]), Share.of(shard, parts), 0
    inputs = {"generator": made} | ({"denoiser": tuned} if tuned else {})
    with new_artifact(distilled, "distilled", config, inputs) as draft:
        if parts:
            draft.facts |= mine.gather(draft.folder, "distilled", config, inputs)
        else:
            drawn = _draw_share(config, mine, _sources(config, made, tuned, device), classes, draft.folder, record)
            draft.facts |= _facts(config, made, tuned, classes) | mine.facts()
        for seed in config.seeds if mine.whole else ():
            _finish_set(draft.folder, seed, list(classes.values()), config.images_per_class)
            record.file(draft.folder / f"seed-{seed}.png")
    return {"images": float(drawn)}


def _chosen(wanted: tuple[str, ...] | None, known: list[str]) -> dict[int, str]:
    """The wanted classes: label -> name."""
    for name in wanted or ():
        if name not in known:
            raise DiffstillError(f"`sample.classes` names {name!r}, which the generator does not know; its classes are {', '.join(known[:20])}")
    return {known.index(name): name for name in (wanted or known)}


def _facts(config: SampleConfig, made: Artifact, tuned: Artifact | None, classes: dict[int, str]) -> dict[str, Any]:
    return {
        "source": "distilled" if tuned else "untuned",
        "seeds": list(config.seeds),
        "images_per_class": config.images_per_class,
        "classes": list(classes.values()),
        "side": made.facts["side"],
        "channels": made.facts["channels"],
        "guidance": config.guidance,
        "sampler": config.sampler,
        "steps": config.steps,
        "images_digest": made.manifest.inputs["images"],
    }


@dataclass(frozen=True)
class _Source:
    """A generator, loaded when it is asked for, and the generation seeds that are drawn from it."""

    load: Callable[[], Generator]
    seeds: tuple[int, ...]


def _sources(config: SampleConfig, made: Artifact, tuned: Artifact | None, device: str) -> list[_Source]:
    """One source per fine-tune."""

    def load(tune: int | None) -> Generator:
        opened = open_generator(made)
        if config.steps > (timesteps := len(opened.alphas_cumprod())):
            raise DiffstillError(f"`sample.steps` {config.steps} exceeds the generator's {timesteps} timesteps; lower it")
        if tuned and tune is not None:
            apply_delta(opened.transformer, load_file(tuned.folder / f"seed-{tune}" / "delta.safetensors"))
        return opened.to(device).accelerate(config.precision, compiled=config.compile)

    tunes = tuned.facts["seeds"] if tuned else [None]
    if len(tunes) == 1:
        return [_Source(partial(load, tunes[0]), config.seeds)]
    if len(tunes) != len(config.seeds):
        raise DiffstillError(
            f"`sample.seeds` has {len(config.seeds)} entries, but the denoiser {len(tunes)} fine-tunes; give as many seeds, or fine-tune once"
        )
    return [_Source(partial(load, tune), (seed,)) for tune, seed in zip(tunes, config.seeds, strict=True)]


def _draw_share(config: SampleConfig, mine: Share, sources: list[_Source], classes: dict[int, str], folder: Path, record: Record) -> int:
    """Write this process's PNGs, drawn in chunks of one fixed size; the number of images."""
    pieces = mine.of_pieces([(source, chunk) for source in sources for chunk in _chunks(config, list(classes), source.seeds)])
    count = sum(len(chunk) for _, chunk in pieces)
    blank = dict.fromkeys((slot.seed for _, chunk in pieces for slot in chunk), True)
    with record.progress("sample", count, "img") as bar:
        for source, own in itertools.groupby(pieces, key=itemgetter(0)):
            opened = source.load()
            for _, chunk in own:
                filled = chunk + [chunk[0]] * (config.chunk_size - len(chunk))
                for slot, pixels in zip(chunk, _draw(config, opened, filled, classes)[: len(chunk)], strict=True):
                    save_png(to_image(pixels), folder / f"seed-{slot.seed}" / classes[slot.label] / f"{slot.number:05d}.png")
                    blank[slot.seed] &= bool(pixels.min() == pixels.max())
                bar.update(len(chunk))
    if empty := [seed for seed, is_blank in blank.items() if is_blank]:
        raise DiffstillError(
            f"every image of seed {empty[0]} is of one colour alone, so the generator draws nothing; "
            "train it for longer, or lower its learning rates and `sample.guidance`"
        )
    return count


def _chunks(config: SampleConfig, labels: list[int], seeds: tuple[int, ...]) -> list[list[_Slot]]:
    slots = [_Slot(seed, number, label) for seed in seeds for number in range(config.images_per_class) for label in labels]
    return [slots[start : start + config.chunk_size] for start in range(0, len(slots), config.chunk_size)]


def _draw(config: SampleConfig, opened: Generator, slots: list[_Slot], classes: Mapping[int, str]) -> Array:
    """The images of `slots`: uint8 (N, channels, side, side). Raises `DiffstillError` where one is no image."""
    labels, noise = [slot.label for slot in slots], [slot.generator() for slot in slots]
    latents = opened.draw_latents(labels, noise, sampler=config.sampler, steps=config.steps, guidance=config.guidance)
    images = opened.decode_all(latents).float().cpu()
    fix = (
        f"lower `sample.guidance` ({config.guidance:g}); if that is a few, the weights have diverged: "
        "lower `finetune.learning_rate` or `pretrain.dit.learning_rate` and make them anew"
    )
    for slot, latent, image in zip(slots, latents.cpu(), images, strict=True):
        of = f"{slot.number} of class {classes[slot.label]!r}, seed {slot.seed}"
        refuse_unsound(latent, LARGEST_LATENT, f"latent {of}", fix)
        refuse_unsound(image, LARGEST_PIXEL, f"image {of}", fix)
    return to_pixels(images.numpy())


def _finish_set(folder: Path, seed: int, names: list[str], images_per_class: int) -> None:
    """What belongs to a whole set: `metadata.csv`, and a contact sheet with a row per class."""
    root = folder / f"seed-{seed}"
    files = [[f"{name}/{number:05d}.png" for number in range(images_per_class)] for name in names]
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("file_name", "label", "seed"), lineterminator="\n")
        writer.writeheader()
        writer.writerows({"file_name": path, "label": name, "seed": seed} for name, own in zip(names, files, strict=True) for path in own)
    rows = [np.stack([read_png(root / path) for path in own[:SHEET_COLUMNS]]) for own in files[:SHEET_ROWS]]
    save_png(contact_sheet(np.stack(rows)), folder / f"seed-{seed}.png")
