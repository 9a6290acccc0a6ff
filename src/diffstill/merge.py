"""A denoiser merged into its generator: one folder that the stock classes of diffusers open."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from diffstill.artifacts import open_artifact, open_as_usual, refuse_overlap
from diffstill.errors import DiffstillError
from diffstill.networks import ABOUT, apply_delta, fold_scales, open_generator, save_generator


def merge(generator: Path, denoiser: Path, output: Path, seed: int | None = None) -> int:
    """Write a DiTPipeline folder with the fine-tuned weights, whole or not at all; the seed of the fine-tune.

    `seed` chooses among several fine-tunes. Raises `DiffstillError` if the denoiser is that of another generator, the
    seed unknown, or `output` is there already.
    """
    made, tuned = open_artifact(generator, "generator"), open_artifact(denoiser, "denoiser")
    if tuned.manifest.inputs["generator"] != made.digest:
        raise DiffstillError(f"{denoiser}: was fine-tuned from another generator than {generator}; name that one")
    seeds = tuned.facts["seeds"]
    if seed is None and len(seeds) > 1:
        raise DiffstillError(f"{denoiser}: holds {len(seeds)} fine-tunes; choose one with --seed: {', '.join(map(str, seeds))}")
    chosen = int(seeds[0]) if seed is None else seed
    if chosen not in seeds:
        raise DiffstillError(f"--seed {chosen}: {denoiser} has no such fine-tune; it has {', '.join(map(str, seeds))}")
    refuse_overlap(output, {"generator": generator, "denoiser": denoiser})
    if output.exists():
        raise DiffstillError(f"{output}: is there already; remove it or choose another folder")
    opened = open_generator(made)
    apply_delta(opened.transformer, load_file(tuned.folder / f"seed-{chosen}" / "delta.safetensors"))
    fold_scales(opened.transformer)
    names = json.loads((made.folder / "model_index.json").read_text())["id2label"]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as partial:
        folder = Path(partial) / output.name
        save_generator(opened, folder, list(names.values()))
        if (made.folder / "class_map.json").is_file():
            shutil.copyfile(made.folder / "class_map.json", folder / "class_map.json")
        said = {"frequency_shift": made.facts["frequency_shift"], "licence": made.facts.get("licence")}
        (folder / ABOUT).write_text(json.dumps(said, indent=1) + "\n")
        open_as_usual(folder)
        folder.rename(output)
    return chosen
