"""Generators that others have trained: the original DiT checkpoint, the class map to its labels, and licences.

Source of the checkpoint's layout: Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748).
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffstill import imagenet
from diffstill.config import PretrainConfig
from diffstill.errors import DiffstillError
from diffstill.networks import ORIGINAL_FREQUENCY_SHIFT, empty_transformer, set_frequency_shift, share_embedder

IMAGENET = 1000
MEAN = "mean"
LICENCES: Mapping[str, str] = {
    "facebook/DiT-XL-2-256": "CC-BY-NC-4.0: no commercial use",
    "facebook/DiT-XL-2-512": "CC-BY-NC-4.0: no commercial use",
    "stabilityai/sd-vae-ft-ema": "MIT",
    "stabilityai/sd-vae-ft-mse": "MIT",
}
"""Licences of weights by the name of their repository on the Hugging Face hub, as their pages state them."""
CHECKPOINT_LICENCE = "CC-BY-NC-4.0: no commercial use"
"""That of the checkpoints which the authors of DiT publish."""
HEADS = {1152: 16}
"""DiT-XL has heads of 72; all others have heads of 64."""


# --- the original checkpoint ---------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> Any:
    """The transformer of an original DiT checkpoint (`.pt`), as diffusers' class, in `eval()` mode with one shared embedder.

    Loaded with `weights_only`; of a training checkpoint the averaged weights (`ema`) are taken. Learned variance, timestep
    frequencies and the epsilon of the norms are those of the original. Raises `DiffstillError` naming what does not fit.
    """
    state = _read_state(path)
    try:
        transformer = _like(state, path)
        converted = _converted(state, len(transformer.transformer_blocks))
        positions = state["pos_embed"].expand(transformer.pos_embed.pos_embed.shape)
    except DiffstillError:
        raise
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise DiffstillError(
            f"{path}: its weights do not make a DiT ({type(error).__name__}: {' '.join(str(error).split())[:120]}); give the original checkpoint"
        ) from error
    theirs, ours = set(converted), set(transformer.state_dict())
    if theirs != ours:
        odd = sorted(theirs ^ ours)[0]
        raise DiffstillError(f"{path}: weight `{odd}` is {'unknown' if odd in theirs else 'missing'}; expected a checkpoint of the original DiT code")
    for name, value in transformer.state_dict().items():
        if converted[name].shape != value.shape:
            raise DiffstillError(f"{path}: weight `{name}` is {tuple(converted[name].shape)} where {tuple(value.shape)} is expected")
    transformer.load_state_dict(converted)
    _check_positions(positions, transformer, path)
    share_embedder(transformer)
    set_frequency_shift(transformer, ORIGINAL_FREQUENCY_SHIFT)
    return transformer.eval().requires_grad_(False)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals([(SimpleNamespace, "argparse.Namespace")]):  # training checkpoints keep their options in one
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, pickle.UnpicklingError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise DiffstillError(
            f"{path}: not a file of plain tensors ({' '.join(str(error).split())[:160]}); give the original DiT checkpoint"
        ) from error
    state = loaded.get("ema", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not {"pos_embed", "x_embedder.proj.weight", "final_layer.linear.weight"} <= state.keys():
        raise DiffstillError(f"{path}: holds no DiT (`pos_embed`, `x_embedder.proj.weight` and the like); give the original DiT checkpoint")
    if odd := [name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point()]:
        raise DiffstillError(f"{path}: {str(odd[0])!r:.60} is no tensor of weights; give the original DiT checkpoint")
    return {name: value.to_dense().float() for name, value in state.items()}


def _like(state: Mapping[str, Tensor], path: Path) -> Any:
    """An empty transformer of the shape that the weights tell."""
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    heads = HEADS.get(width, width // 64)
    if heads * (width // max(heads, 1)) != width or (width not in HEADS and width % 64):
        raise DiffstillError(f"{path}: its width {width} is no multiple of 64, the width of a head; it is none of the DiT family")
    if len(state["y_embedder.embedding_table.weight"]) < 2:
        raise DiffstillError(f"{path}: its label table has no label beside the null label; it cannot be told classes")
    return empty_transformer(
        num_layers=1 + max(int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=len(state["final_layer.linear.weight"]) // patch**2,
        sample_size=math.isqrt(state["pos_embed"].shape[1]) * patch,
        patch_size=patch,
        num_embeds_ada_norm=len(state["y_embedder.embedding_table.weight"]) - 1,
        norm_eps=1e-6,
    )


def _converted(state: Mapping[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """The weights under diffusers' names; every block gets its copy of the embedder."""
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if name == "pos_embed":
            continue
        block, _, inside = name.removeprefix("blocks.").partition(".") if name.startswith("blocks.") else ("", "", name)
        for old, new in _NAMES.items():
            if inside.startswith(old):
                targets = [f"transformer_blocks.{number}." for number in range(blocks)] if new.startswith("norm1.emb.") else [""]
                prefix = [f"transformer_blocks.{block}."] if block else targets
                converted |= {f"{place}{new}{inside.removeprefix(old)}": value for place in prefix}
                break
        else:
            if inside.startswith("attn.qkv."):
                kind = inside.removeprefix("attn.qkv.")
                parts = zip("qkv", value.chunk(3), strict=True)
                converted |= {f"transformer_blocks.{block}.attn1.to_{letter}.{kind}": part for letter, part in parts}
            else:
                converted[name] = value  # unknown, and named as such by the caller
    return converted


_NAMES = {
    "x_embedder.proj.": "pos_embed.proj.",
    "t_embedder.mlp.0.": "norm1.emb.timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "norm1.emb.timestep_embedder.linear_2.",
    "y_embedder.embedding_table.": "norm1.emb.class_embedder.embedding_table.",
    "adaLN_modulation.1.": "norm1.linear.",
    "attn.proj.": "attn1.to_out.0.",
    "mlp.fc1.": "ff.net.0.proj.",
    "mlp.fc2.": "ff.net.2.",
    "final_layer.adaLN_modulation.1.": "proj_out_1.",
    "final_layer.linear.": "proj_out_2.",
}


def _check_positions(positions: Tensor, transformer: Any, path: Path) -> None:
    """Positions are computed, not stored, in diffusers: they must be the same ones."""
    if not torch.allclose(positions, transformer.pos_embed.pos_embed.to(positions), atol=1e-3):
        raise DiffstillError(f"{path}: has other position embeddings than the sine and cosine of the original DiT; it cannot be converted")


# --- the class map -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassLabel:
    """Which row of the generator's label table stands for a class, and where that row comes from."""

    name: str
    label: int
    origin: str
    copied: int | None = None
    """For a new row: the label it begins as a copy of; None: the mean of all."""

    @property
    def new(self) -> bool:
        """Whether the row is added to the table."""
        return self.origin.startswith("new")


def map_classes(classes: Sequence[str], known: Sequence[str] | None, count: int, chosen: Mapping[str, str]) -> list[ClassLabel]:
    """The class map: a label of a generator with `count` labels, named `known` where it names them, for each of `classes`.

    What `chosen` says of a class goes first: a label's number, a wnid, `mean`, or `new:<number or wnid>`. Then a name that the
    generator knows is that label, a wnid is its ImageNet index where the generator has 1,000 labels, and without any
    names as many classes as labels are taken in order. Any other class gets a new row, which begins as the mean of all.
    Raises `DiffstillError` on a choice that cannot be, and on two classes of one label.
    """
    if unknown := sorted(set(chosen) - set(classes)):
        raise DiffstillError(
            f"`pretrain.labels` names {unknown[0]!r}, which is no class of the images; known are {', '.join(map(repr, classes[:20]))}"
        )
    found: list[ClassLabel] = []
    for position, name in enumerate(classes):
        number = count + sum(one.new for one in found)
        found.append(_chosen(name, chosen[name], number, count) if name in chosen else _guessed(name, position, number, known, count, len(classes)))
    for label in (one.label for one in found):
        if len(same := [one.name for one in found if one.label == label]) > 1:
            raise DiffstillError(f"classes {same[0]!r} and {same[1]!r} have one label, {label}; choose others in `pretrain.labels`")
    return found


def _guessed(name: str, position: int, number: int, known: Sequence[str] | None, count: int, classes: int) -> ClassLabel:
    if known is not None and name in known:
        return ClassLabel(name, known.index(name), "name")
    if count == IMAGENET and (index := imagenet.index_of(name)) is not None:
        return ClassLabel(name, index, "imagenet")
    if known is None and count == classes:
        return ClassLabel(name, position, "order")
    return ClassLabel(name, number, f"new: {MEAN}")


def _chosen(name: str, choice: str, number: int, count: int) -> ClassLabel:
    if choice == MEAN:
        return ClassLabel(name, number, f"new: {MEAN}")
    new = choice.startswith("new:")
    wanted = choice.removeprefix("new:").strip()
    index = imagenet.index_of(wanted) if count == IMAGENET else None
    label = int(wanted) if wanted.isdecimal() else index
    if label is None or label >= count:
        raise DiffstillError(
            f"`pretrain.labels` gives class {name!r} {choice!r}; give a label below {count}{', a wnid' if count == IMAGENET else ''}, `{MEAN}` for a new "
            "label, or `new:` and a label to begin as a copy of it"
        )
    return ClassLabel(name, number, f"new: copy of {wanted}", label) if new else ClassLabel(name, label, "chosen")


def label_names(found: Sequence[ClassLabel], known: Sequence[str] | None, count: int) -> list[str]:
    """The names of all labels, new ones included: those the generator knows, else ImageNet's wnids, else those of the classes."""
    by_label = {one.label: one.name for one in found}
    if known is None:
        known = imagenet.SUBSETS["imagenet1k"] if count == IMAGENET else [by_label.get(label, f"label-{label}") for label in range(count)]
    return [*known, *(one.name for one in found if one.new)]


def class_map(found: Sequence[ClassLabel]) -> list[dict[str, Any]]:
    """The class map as it stands in `class_map.json`."""
    return [{name: value for name, value in asdict(one).items() if value is not None} for one in found]


# --- where they come from ------------------------------------------------------------------------------------------


def known_licence(config: PretrainConfig) -> str:
    """What is known of the licence of the weights that `config` names, in words."""
    transformer = CHECKPOINT_LICENCE if config.source == "checkpoint" else _licence_of(config.location)
    return f"transformer {transformer}" + (f"; autoencoder {_licence_of(config.autoencoder)}" if config.autoencoder else "")


def _licence_of(location: str | None) -> str:
    found = [licence for name, licence in LICENCES.items() if re.search(rf"(^|[/:]){re.escape(name)}(@|$)", location or "")]
    return found[0] if found else "licence unknown: look where you have them from, and say it in `pretrain.licence`"


def weights_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of the files of pretrained weights: a folder, or one file."""
    whole = hashlib.sha256()
    for path in [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            whole.update(f"{path.name if folder.is_file() else path.relative_to(folder).as_posix()}\0".encode())
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
