"""Stage `sample`: generator, with or without a denoiser -> distilled, image folders that anyone can load."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from diffstill.artifacts import Array, Artifact, new_artifact, open_artifact, refuse_foreign, to_pixels
from diffstill.config import SampleConfig
from diffstill.diffusion import sample_latents
from diffstill.errors import DiffstillError
from diffstill.networks import Generator, apply_delta, build_scheduler, load_generator
from diffstill.pictures import contact_sheet, save_png, to_image
from diffstill.record import Progress, Record, ignore
from diffstill.training import seeded, set_threads

SHEET_COLUMNS = 20
"""Images per class on the contact sheet of a whole set."""


@dataclass(frozen=True)
class _Slot:
    """Image `number` of class `label`, to be drawn with generation seed `seed`."""

    seed: int
    number: int
    label: int

    def generator(self) -> torch.Generator:
        """The noise of this image and of no other."""
        return seeded(self.seed, self.label, self.number)


def sample(
    config: SampleConfig, *, generator: Path, distilled: Path, denoiser: Path | None = None, device: str = "cpu", record: Record = ignore
) -> dict[str, float]:
    """Draw a distilled set per seed: from the fine-tuned generator, or from the untuned one where no denoiser is given.

    Writes the `distilled` artifact: per seed `seed-<s>/<class>/<number>.png`, `seed-<s>/metadata.csv` and a contact
    sheet `seed-<s>.png`. Image k of class c is a pure function of (generator and denoiser, seed, c, k). Returns counts.
    """
    set_threads(config.threads)
    made = open_artifact(generator, "generator")
    tuned = open_artifact(denoiser, "denoiser") if denoiser else None
    if tuned and tuned.manifest.inputs["generator"] != made.digest:
        raise DiffstillError(f"{denoiser}: was fine-tuned from another generator than {generator}; run `finetune` again")
    refuse_foreign(distilled)
    classes = _chosen(config.classes, made.facts["classes"])
    inputs = {"generator": made} | ({"denoiser": tuned} if tuned else {})
    with new_artifact(distilled, "distilled", config, inputs) as draft:
        with record.progress("sample", len(config.seeds) * len(classes) * config.images_per_class, "img") as bar:
            for opened, seeds in _opened(config, made, tuned, device):
                for seed, images in _draw_all(config, opened, _slots(config, list(classes), seeds), bar).items():
                    _write_set(draft.folder, seed, images, classes)
        for seed in config.seeds:
            record.file(draft.folder / f"seed-{seed}.png")
        draft.facts |= _facts(config, made, tuned, classes)
    return {"images": float(len(config.seeds) * len(classes) * config.images_per_class)}


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


def _opened(config: SampleConfig, made: Artifact, tuned: Artifact | None, device: str) -> Iterator[tuple[Generator, tuple[int, ...]]]:
    """The generators to sample from, each with its generation seeds."""

    def load(delta_seed: int | None) -> Generator:
        opened = load_generator(made.folder, made.facts["frequency_shift"])
        if config.steps > (timesteps := len(opened.alphas_cumprod())):
            raise DiffstillError(f"`sample.steps` {config.steps} exceeds the generator's {timesteps} timesteps; lower it")
        if tuned and delta_seed is not None:
            apply_delta(opened.transformer, load_file(tuned.folder / f"seed-{delta_seed}" / "delta.safetensors"))
        return opened.to(device)

    tunes = tuned.facts["seeds"] if tuned else [None]
    if len(tunes) not in (1, len(config.seeds)):
        raise DiffstillError(
            f"`sample.seeds` has {len(config.seeds)} entries, but the denoiser {len(tunes)} fine-tunes; give as many seeds, or fine-tune once"
        )
    if len(tunes) == 1:
        yield load(tunes[0]), config.seeds
    else:
        for tune, seed in zip(tunes, config.seeds, strict=True):
            yield load(tune), (seed,)


def _slots(config: SampleConfig, classes: list[int], seeds: tuple[int, ...]) -> list[_Slot]:
    return [_Slot(seed, number, label) for seed in seeds for number in range(config.images_per_class) for label in classes]


def _draw_all(config: SampleConfig, opened: Generator, slots: list[_Slot], bar: Progress) -> dict[int, list[tuple[_Slot, Array]]]:
    """The images of all slots by generation seed, drawn in batches of one fixed size, the last one filled up."""
    drawn: dict[int, list[tuple[_Slot, Array]]] = {}
    for start in range(0, len(slots), config.chunk_size):
        chunk = slots[start : start + config.chunk_size]
        filled = chunk + [chunk[0]] * (config.chunk_size - len(chunk))
        for slot, pixels in zip(chunk, _draw(config, opened, filled)[: len(chunk)], strict=True):
            drawn.setdefault(slot.seed, []).append((slot, pixels))
        bar.update(len(chunk))
    return drawn


@torch.inference_mode()
def _draw(config: SampleConfig, opened: Generator, slots: list[_Slot]) -> Array:
    """The images of `slots`: uint8 (N, channels, side, side)."""
    uses_variance = config.sampler == "ddpm" and opened.learned_variance
    latents = sample_latents(
        opened.predict if uses_variance else opened.predict_noise,
        build_scheduler(config.sampler, opened.scheduler, learned_variance=uses_variance),
        torch.tensor([slot.label for slot in slots], device=next(opened.transformer.parameters()).device),
        [slot.generator() for slot in slots],
        shape=opened.latent_shape,
        null_label=opened.null_label,
        guidance=config.guidance,
        steps=config.steps,
    )
    return to_pixels(opened.decode(latents).float().cpu().numpy())


def _write_set(folder: Path, seed: int, images: list[tuple[_Slot, Array]], names: dict[int, str]) -> None:
    """One distilled set: PNGs by class, `metadata.csv`, and a contact sheet with a row per class."""
    ordered = sorted(images, key=lambda image: (list(names).index(image[0].label), image[0].number))
    root = folder / f"seed-{seed}"
    rows = []
    for slot, pixels in ordered:
        name = f"{names[slot.label]}/{slot.number:05d}.png"
        save_png(to_image(pixels), root / name)
        rows.append({"file_name": name, "label": names[slot.label], "seed": seed})
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("file_name", "label", "seed"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    grid = np.stack([pixels for _, pixels in ordered]).reshape(len(names), -1, *ordered[0][1].shape)
    save_png(contact_sheet(grid[:, :SHEET_COLUMNS]), folder / f"seed-{seed}.png")
