"""Every knob of the science: one frozen pydantic section per stage, mirroring `params.yaml`. No hosts, no credentials.

The defaults are the `digits` preset; the other presets are the differences in `PRESETS`.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.composer import Composer, ComposerError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from diffstill.errors import DiffstillError, without_secrets
from diffstill.names import composed, is_name
from diffstill.protocols import NAMED, SHORT, protocol, student_misfit


def _once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """A seed or a name that is listed twice would count twice in every mean."""
    value, times = Counter(values).most_common(1)[0] if values else (None, 0)
    if times > 1:
        raise ValueError(f"lists {value!r} {times} times; list it once")
    return values


def _without_credentials(location: str | None) -> str | None:
    """A location is sent to clusters, logged and kept in manifests."""
    parts = urlsplit(location or "")
    named_user = "@" in parts.netloc and not parts.scheme.endswith("ssh")
    if parts.netloc and (parts.password is not None or named_user or (parts.query and not parts.scheme.startswith("dvc+"))):
        raise ValueError("holds credentials or a query, which would be sent, logged and kept; remove them, and give credentials by the environment")
    return location


def _one_name(text: str) -> str:
    """It stands in the name of a folder."""
    if not is_name(text):
        raise ValueError("is no name of a folder, which its scores need; leave out slashes")
    return text


Each = AfterValidator(_once)
ClassName = Annotated[str, AfterValidator(composed)]
Location = Annotated[str | None, AfterValidator(_without_credentials)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), Each]
Count = Annotated[int, Field(ge=1)]
Batch = Annotated[int, Field(ge=1, le=100_000)]
Size = Annotated[int, Field(ge=1, le=10_000)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Precision = Literal["float32", "bf16"]
YAML_1_1 = ("on", "off", "yes", "no", "y", "n")
"""Words that YAML 1.1, and with it many tools, reads as true or false."""
SPLITS = ("train", "val", "test")
CLASSES: Mapping[str, int] = {
    **dict.fromkeys(("digits", "fashion-mnist", "imagewoof", "imagenette", "imageidc"), 10),
    "imagenet100": 100,
    "imagenet1k": 1000,
}
"""How many classes a dataset has, where that is known without reading it."""
LARGEST_CLASS: Mapping[str, int] = {
    **dict.fromkeys(CLASSES, 1300),
    "digits": 183,
    "fashion-mnist": 6000,
}
"""Training images of a dataset's largest class, as they are published."""
LONGEST_YAML = 2**18
"""Bytes of a file of parameters, which take some seconds to parse: ten times what a thousand classes need."""
SectionType = TypeVar("SectionType", bound=BaseModel)


class Section(BaseModel):
    """A frozen group of knobs that refuses unknown names, loose types and infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def canonical(self) -> str:
        """The section as JSON with sorted keys: equal knobs give equal bytes."""
        return json.dumps(self.plain(), sort_keys=True, separators=(",", ":"))

    def plain(self) -> dict[str, Any]:
        """The section as it stands in JSON: mappings, lists, text, numbers."""
        return self.model_dump(mode="json")


class PrepareConfig(Section):
    """Where the real images come from, and how they are cut and split."""

    source: Literal["digits", "fashion-mnist", "folder", "imagewoof", "imagenette", "imageidc", "imagenet100", "imagenet1k"] = Field(
        "digits",
        description="dataset: digits (inside scikit-learn), fashion-mnist, folder (<class>/*, or train/<class>/* and optionally test/ and val/), "
        "or classes of ImageNet (a tree with train/<wnid>/* and val/<wnid>/*)",
    )
    location: Location = Field(None, description="folder or URL of the data; null = where the dataset usually is")
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1), Each] | None = Field(
        None, description="keep these classes only, in this order; null = all"
    )
    side: Annotated[int, Field(ge=8, le=1024)] = Field(8, description="pixels per side after centre crop and resize")
    channels: Literal[1, 3] | None = Field(1, description="1 = grey, 3 = colour, null = grey only if every image is grey")
    flip: bool = Field(False, description="may an image be mirrored left to right and keep its label? never for digits")
    test_fraction: Share = Field(0.2, description="share of each class cut off as test, where the data bring no test split")
    val_fraction: Share = Field(0.1, description="share of each class of the training split cut off as val; all choices use val")
    seed: Seed = Field(0, description="seed of the splits")
    max_bad_fraction: Fraction = Field(0.0, description="share of unreadable files that is tolerated (they are listed); above it the stage fails")
    max_pixels: Count = Field(50_000_000, description="refuse to decode images with more pixels than this")
    shard_size: Count = Field(4096, description="images per shard file")


class VaeConfig(Section):
    """The small autoencoder, trained from scratch."""

    channels: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        (16, 32), description="widths per resolution; each after the first halves the side"
    )
    layers: Count = Field(1, description="residual blocks per resolution")
    latent_channels: Count = Field(4, description="channels of the latent")
    steps: Count = Field(400, description="optimiser steps")
    batch_size: Batch = Field(32, description="images per step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-3, description="AdamW learning rate, cosine to zero")
    kl_weight: Annotated[float, Field(ge=0)] = Field(1e-4, description="weight of the KL term beside the mean squared error")
    ema_decay: Fraction = Field(0.99, description="decay of the averaged weights, warmed up as (1 + step) / (10 + step)")


class DitConfig(Section):
    """The small class-conditional diffusion transformer, trained from scratch."""

    layers: Count = Field(3, description="transformer blocks")
    heads: Count = Field(3, description="attention heads")
    head_dim: Count = Field(32, description="width per head")
    patch: Count = Field(2, description="latent pixels per token side")
    steps: Count = Field(800, description="optimiser steps")
    batch_size: Batch = Field(64, description="latents per step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-3, description="AdamW learning rate, cosine to zero")
    label_drop: Fraction = Field(0.1, description="probability that a label is replaced by the null label (classifier-free guidance)")
    ema_decay: Fraction = Field(0.999, description="decay of the averaged weights, warmed up as (1 + step) / (10 + step)")

    @model_validator(mode="after")
    def _even_width(self) -> Self:
        width = self.heads * self.head_dim
        if width % 4:
            raise ValueError(f"the width `heads` x `head_dim` = {width} must be a multiple of 4 for the position embedding; change one of them")
        return self


class PretrainConfig(Section):
    """The generator: trained here from scratch, or pretrained weights of others."""

    source: Literal["scratch", "folder", "checkpoint"] = Field(
        "scratch",
        description="scratch = train a small one; folder = a diffusers DiTPipeline folder; checkpoint = a .pt file of the original DiT code",
    )
    location: Location = Field(None, description="the folder or file: a path, s3://<bucket>/<prefix>, or hf://<owner>/<repository>@<revision>")
    autoencoder: Location = Field(
        None, description="a diffusers AutoencoderKL folder (path, s3://, hf://), or ema or mse for that of Stable Diffusion; null = the folder's own"
    )
    labels: Mapping[ClassName, str] = Field(
        {}, description="class -> label number or wnid of the generator, `mean` for a new label, `new:<label>` for one that begins as a copy"
    )
    frequency_shift: Literal[0, 1] | None = Field(
        None, description="of the timestep frequencies of pretrained weights: 0 = original DiT code, 1 = diffusers; null = by the source"
    )
    licence: str | None = Field(None, description="licence of pretrained weights, for the manifest and the card; null = what is known of the source")
    timesteps: Annotated[int, Field(ge=2, le=10_000)] = Field(1000, description="diffusion timesteps T")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = Field(1e-4, description="first of the linear betas")
    beta_end: Annotated[float, Field(gt=0, lt=1)] = Field(0.02, description="last of the linear betas")
    vae: VaeConfig = Field(VaeConfig(), description="the autoencoder (source: scratch)")
    dit: DitConfig = Field(DitConfig(), description="the diffusion transformer (source: scratch)")
    seed: Seed = Field(0, description="seed of weights and draws")
    threads: Count = Field(1, description="CPU threads; another number may change rounding")
    checkpoint_every: Count = Field(500, description="at least so many steps between checkpoints from which a killed run goes on")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source == "scratch") != (self.location is None):
            raise ValueError("`location` goes with `source: folder` or `checkpoint`, and only with them; set both or neither")
        if self.source == "scratch" and (self.autoencoder or self.labels or self.frequency_shift is not None or self.licence):
            raise ValueError(
                "`autoencoder`, `labels`, `frequency_shift` and `licence` are for pretrained weights, not for `source: scratch`; leave them out"
            )
        if self.source == "checkpoint" and self.autoencoder is None:
            raise ValueError("`source: checkpoint` has no autoencoder; set `autoencoder` to ema, mse or a folder")
        if self.beta_start > self.beta_end:
            raise ValueError(f"`beta_start` {self.beta_start} must not exceed `beta_end` {self.beta_end}")
        return self

    def latent_side(self, side: int) -> int:
        """Pixels per side of the small autoencoder's latents. `DiffstillError` if images of `side` px cannot be halved, or latents be cut so."""
        halved, patch = len(self.vae.channels) - 1, self.dit.patch
        if side % 2**halved:
            raise DiffstillError(
                f"`pretrain.vae.channels` {list(self.vae.channels)} halves the side {halved} times, but {side} px cannot be halved so often; "
                f"use fewer widths, or make `prepare.side` a multiple of {2**halved}"
            )
        latent = side >> halved
        if latent % patch:
            raise DiffstillError(f"`pretrain.dit.patch` {patch} does not divide the latent side {latent}; use a divisor")
        return latent


class EncodeConfig(Section):
    """Posterior moments of every training image, computed once."""

    batch_size: Batch = Field(256, description="images per pass through the autoencoder")
    shard_size: Count = Field(4096, description="images per shard file")
    precision: Precision = Field("float32", description="arithmetic of the autoencoder; bf16 is faster on a GPU, and rounds")
    threads: Count = Field(1, description="CPU threads; another number may change rounding")


class FinetuneConfig(Section):
    """The paper's objective: diffusion loss, representativeness and diversity against two memories."""

    seeds: Seeds = Field((0,), description="one fine-tune per seed; generation seed number i samples from fine-tune i, or from the only one")
    steps: Count = Field(300, description="optimiser steps")
    epochs: Count | None = Field(None, description="passes over the training images, in place of `steps`; null = as many as `steps` says")
    batch_size: Batch = Field(32, description="latents per step, over all GPUs together")
    balanced: bool = Field(False, description="draw the same number of images of every class into each batch")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="AdamW learning rate, constant (paper: 1e-3 with DiffFit)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW weight decay")
    trainable: Literal["difffit", "all"] = Field("difffit", description="difffit = biases, label table and scale vectors; all = every weight")
    label_drop: Fraction = Field(0.1, description="probability that a label is replaced by the null label; such samples never meet the memories")
    lambda_real: Annotated[float, Field(ge=0)] = Field(0.002, description="weight of representativeness, L_real")
    lambda_gen: Annotated[float, Field(ge=0)] = Field(0.008, description="weight of diversity, L_gen")
    accumulate: Literal["paper", "as_published"] = Field(
        "paper",
        description="how the terms of a batch's classes add up: paper = their mean; "
        "as_published = as the published code does, the k-th of n classes counts n - k + 1 times",
    )
    capacity_real: Count = Field(64, description="entries per class of the memory of real latents, N_R")
    capacity_gen: Count = Field(64, description="entries per class of the memory of generated latents, N_G")
    policy: Literal["redundancy", "fifo", "none"] = Field(
        "redundancy",
        description="who leaves a full memory: redundancy = the most similar to the rest (self-adaptive; at a capacity of 1 the last two always tie, and the older leaves), "
        "fifo = the oldest; none = no memories",
    )
    update: Literal["step", "epoch"] = Field(
        "step", description="when entries join the memories: after each step, or once per epoch (the paper's figure 2)"
    )
    epoch_candidates: Count = Field(256, description="with update: epoch, the newest candidates kept per class until the epoch ends")
    max_timestep: Count | None = Field(
        None,
        description="noise-aware memory: only predictions from timesteps below this are compared and enter; null = all. "
        "The mean is then over the classes that are left, so each of them weighs more",
    )
    ema_decay: Fraction = Field(0.999, description="decay of the averaged weights, warmed up as (1 + step) / (10 + step)")
    log_every: Count = Field(5, description="steps between lines of metrics.csv")
    preview_every: Annotated[int, Field(ge=0)] = Field(
        50, description="at least so many steps between pictures of what the averaged weights draw, for the tracker; 0 = none"
    )
    precision: Precision = Field("float32", description="what the transformer computes in; bf16 suits GPUs, weights in training stay float32")
    compile: bool = Field(False, description="compile the transformer's blocks (TorchInductor): half a minute at first, then faster on a GPU")
    gradient_checkpointing: bool = Field(False, description="compute activations twice rather than keep them: slower, less memory")
    threads: Count = Field(1, description="CPU threads; another number may change rounding")
    checkpoint_every: Count = Field(500, description="at least so many steps between checkpoints from which a killed run goes on")

    def refuse_unbalanced(self, classes: int) -> None:
        """Raise `DiffstillError` if batches with as many images of each class are asked for, and `batch_size` does not allow them."""
        if self.balanced and self.batch_size % classes:
            raise DiffstillError(
                f"`finetune.balanced` needs a batch size that is a multiple of the {classes} classes, not {self.batch_size}; "
                "change `finetune.batch_size`"
            )


class SampleConfig(Section):
    """How the synthetic images are drawn."""

    images_per_class: Size = Field(10, description="IPC: images per class; a smaller set is contained in a larger one")
    seeds: Seeds = Field(tuple(range(10)), description="generation seeds: one complete set of images for each")
    guidance: Annotated[float, Field(ge=0)] = Field(2.0, description="classifier-free guidance scale; 1 = none")
    sampler: Literal["ddpm", "ddim", "dpm++"] = Field("ddim", description="ddpm (ancestral), ddim or dpm++ (deterministic)")
    steps: Count = Field(25, description="sampling steps")
    classes: Annotated[tuple[ClassName, ...], Field(min_length=1), Each] | None = Field(None, description="sample these classes only; null = all")
    chunk_size: Batch = Field(100, description="images per batch; every batch is filled up to it, so that a subset gives the same images")
    precision: Precision = Field("float32", description="what the transformer computes in; bf16 suits GPUs, the sampler's state stays float32")
    compile: bool = Field(False, description="compile the transformer's blocks (TorchInductor): half a minute at first, then faster on a GPU")
    threads: Count = Field(1, description="CPU threads; another number may change rounding")


class EvaluateConfig(Section):
    """Students trained from scratch on a small set, tested on real images."""

    students: Annotated[tuple[Annotated[str, AfterValidator(_one_name)], ...], Field(min_length=1), Each] = Field(
        ("convnet-2",), description="networks: convnet-<depth>, resnetap-10, resnet-18 (instance norm) or any timm model by name"
    )
    images_per_class: Annotated[tuple[Size, ...], Field(min_length=1), Each] = Field((1, 10), description="set sizes that are judged")
    student_seeds: Seeds = Field((0, 1), description="trainings per set, each with its own initial weights and batches")
    baselines: Annotated[tuple[Literal["random", "full"], ...], Field(min_length=1), Each] = Field(
        ("random", "full"), description="random = random real images of the same size, full = the whole training split"
    )
    random_seeds: Seeds = Field(
        tuple(range(10)), description="draws of random real images, whatever the number of generation seeds; each costs students, but no generator"
    )
    protocol: str = Field(
        "short-150",
        description="named student protocol: short-<steps> for any data, or the literature's minimax-224, minimax-256 (up to 100 classes), "
        "minimax-1k (more), condensation-small (up to 32 px); numbers of two protocols never share a table",
    )
    evaluations: Count = Field(
        1, description="times a student is tested while it trains, the last at the end: the headline; more cost time and give the report a best step"
    )
    workers: Count = Field(2, description="students trained at the same time, each on its own CPU thread; changes no number")

    @model_validator(mode="after")
    def _known_protocol(self) -> Self:
        protocol(self.protocol)
        return self


class ReportConfig(Section):
    """The page and the figures."""

    shown_per_class: Count = Field(10, description="images per class in the grids of the report")


class PublishConfig(Section):
    """A version in MLflow's registry."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._ -]*[A-Za-z0-9_-])?$", max_length=200)] | None = Field(
        None, description="registered model; null = distilled-<prepare.source>"
    )
    gate: Annotated[Literal["val-gain", "off"], BeforeValidator(lambda value: "off" if value is False else value)] = Field(
        "val-gain", description="val-gain: refuse a set whose gain over real images of the same number is not shown on val; off: publish any"
    )
    store: Location = Field(None, description="s3://<bucket>/<prefix> for the files; null = MLflow's own artifact store")
    encryption: Literal["AES256", "aws:kms"] | None = Field(
        None, description="server-side encryption asked of the store; null = what the bucket does"
    )
    kms_key: str | None = Field(None, description="id of the key for aws:kms; null = the account's own")
    licence: str = Field("", description="licence of the real images and terms for the set, for the card")
    note: str = Field("", max_length=1000, description="what readers of the card should know")

    @model_validator(mode="after")
    def _store_takes_encryption(self) -> Self:
        if self.store is not None and not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/.*)?", self.store):
            raise ValueError(f"`publish.store` is {self.store!r}; give s3://<bucket>/<prefix>, or null for MLflow's own artifact store")
        if self.encryption and not self.store:
            raise ValueError("`publish.encryption` is for `publish.store`; set that, or set encryption to null")
        if self.kms_key and self.encryption != "aws:kms":
            raise ValueError("`publish.kms_key` needs `publish.encryption: aws:kms`; set that, or set the key to null")
        return self


class Params(Section):
    """The whole of `params.yaml`."""

    STAGES: ClassVar[tuple[str, ...]] = ("prepare", "pretrain", "encode", "finetune", "sample", "evaluate", "report", "publish")

    prepare: PrepareConfig = Field(PrepareConfig(), description="real images, validated, cropped and split")
    pretrain: PretrainConfig = Field(PretrainConfig(), description="the generator: autoencoder and diffusion transformer")
    encode: EncodeConfig = Field(EncodeConfig(), description="latents of the training images")
    finetune: FinetuneConfig = Field(FinetuneConfig(), description="the method: two memories beside the diffusion loss")
    sample: SampleConfig = Field(SampleConfig(), description="the distilled images")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="students trained on distilled and on real sets")
    report: ReportConfig = Field(ReportConfig(), description="tables, figures, page")
    publish: PublishConfig = Field(PublishConfig(), description="the version in MLflow's registry")

    @model_validator(mode="after")
    def _enough_timesteps(self) -> Self:
        if self.pretrain.source == "scratch" and self.sample.steps > self.pretrain.timesteps:
            raise ValueError(f"`sample.steps` {self.sample.steps} exceeds the {self.pretrain.timesteps} `pretrain.timesteps`; lower it")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wanted, drawn = max(self.evaluate.images_per_class), self.sample.images_per_class
        if wanted > drawn:
            raise ValueError(f"`evaluate.images_per_class` asks for {wanted}, but `sample.images_per_class` draws {drawn}; raise the latter")
        tunes, draws = len(self.finetune.seeds), len(self.sample.seeds)
        if tunes not in (1, draws):
            raise ValueError(f"`finetune.seeds` has {tunes} entries; give 1, or one for each of the {draws} `sample.seeds`")
        return self

    @model_validator(mode="after")
    def _fitting_protocol(self) -> Self:
        if misfit := protocol(self.evaluate.protocol).misfit(self.prepare.side, self._classes):
            raise ValueError(misfit)
        return self

    @model_validator(mode="after")
    def _fitting_images(self) -> Self:
        """What a stage would find out hours later: sides, classes and numbers that do not go together."""
        if self.pretrain.source == "scratch":
            self.pretrain.latent_side(self.prepare.side)
        side = protocol(self.evaluate.protocol).side or self.prepare.side
        for student in self.evaluate.students:
            if misfit := student_misfit(student, side, self.prepare.channels):
                raise ValueError(misfit)
        if self._classes:
            self.finetune.refuse_unbalanced(self._classes)
        wanted, most = max(self.evaluate.images_per_class), self._most_per_class()
        if "random" in self.evaluate.baselines and wanted > most:
            raise ValueError(
                f"`evaluate.images_per_class` asks for {wanted}, but no class of {self.prepare.source} has more than {most} training images; "
                "lower it, or leave `random` out of `evaluate.baselines`"
            )
        return self

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.prepare.source == "folder" and self.publish.name is None:
            raise ValueError("`publish.name` is null, but images of a folder have no name of their own; set it, like distilled-flowers")
        return self

    @property
    def _classes(self) -> int | None:
        """How many there are, where that is known."""
        return len(self.prepare.classes) if self.prepare.classes else CLASSES.get(self.prepare.source)

    def _most_per_class(self) -> float:
        """Training images that the largest class can have, once val and, where the data bring none, test are cut off."""
        left: float = LARGEST_CLASS.get(self.prepare.source, math.inf)
        for share in (self.prepare.test_fraction if self.prepare.source == "digits" else 0.0, self.prepare.val_fraction):
            left -= round(share * left) if left < math.inf else 0
        return left

    def section(self, stage: str) -> Section:
        """The section of that stage."""
        section: Section = getattr(self, stage)
        return section


_PHOTOS: Mapping[str, Any] = {"side": 256, "channels": 3, "flip": True, "shard_size": 1024}
_PAPER: Mapping[str, Mapping[str, Any]] = {
    "pretrain": {"source": "folder", "location": "hf://facebook/DiT-XL-2-256@main", "autoencoder": "ema"},
    "encode": {"batch_size": 64, "shard_size": 1024},
    "finetune": {
        "epochs": 8,
        "batch_size": 8,
        "ema_decay": 0.9999,
        "log_every": 100,
        "preview_every": 1000,
        "precision": "bf16",
        "compile": True,
        "checkpoint_every": 1000,
    },
    "sample": {"images_per_class": 50, "seeds": [0, 1, 2], "guidance": 4.0, "sampler": "ddpm", "steps": 50, "precision": "bf16", "compile": True},
    "evaluate": {"students": ["resnetap-10"], "images_per_class": [10, 20, 50], "protocol": "minimax-224", "workers": 1},
}
"""The paper's settings at 256 px (ICIP 2025, section 4): DiT-XL/2, DiffFit, 8 epochs of batches of 8, 50 DDPM steps, guidance 4."""

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "digits": {},
    "fashion-mnist": {
        "prepare": {"source": "fashion-mnist", "side": 28, "flip": True, "shard_size": 16384},
        "pretrain": {
            "vae": {"channels": [8, 16, 32], "steps": 1500, "batch_size": 32},
            "dit": {"layers": 4, "patch": 1, "steps": 5000, "learning_rate": 1e-3},
        },
        "encode": {"shard_size": 16384},
        "finetune": {"steps": 1000, "batch_size": 64, "learning_rate": 5e-4, "preview_every": 100},
        "sample": {"seeds": [0, 1, 2]},
        "evaluate": {"students": ["convnet-3"], "student_seeds": [0], "protocol": "short-200"},
    },
    "folder": {
        "prepare": {"source": "folder", "location": "data", "side": 32, "channels": None, "flip": True},
        "publish": {"name": "distilled-data"},
        "pretrain": {
            "vae": {"channels": [16, 32, 64], "steps": 2000, "learning_rate": 1e-3},
            "dit": {"layers": 6, "heads": 6, "patch": 1, "steps": 10000, "learning_rate": 5e-4},
        },
        "finetune": {"steps": 1000, "batch_size": 64, "preview_every": 100},
        "sample": {"seeds": [0, 1, 2]},
        "evaluate": {"students": ["convnet-3"], "protocol": "short-500"},
    },
    "imagewoof": {"prepare": {"source": "imagewoof", **_PHOTOS}, **_PAPER},
    "imagenette": {"prepare": {"source": "imagenette", **_PHOTOS}, **_PAPER},
    "imageidc": {"prepare": {"source": "imageidc", **_PHOTOS}, **_PAPER},
    "imagenet100": {"prepare": {"source": "imagenet100", **_PHOTOS}, **_PAPER},
    "imagenet1k": {
        "prepare": {"source": "imagenet1k", **_PHOTOS, "val_fraction": 0.02},
        **_PAPER,
        "finetune": {**_PAPER["finetune"], "batch_size": 256},
        # Ten draws of random real images would take longer than all the rest.
        "evaluate": {**_PAPER["evaluate"], "protocol": "minimax-1k", "random_seeds": [0, 1, 2]},
    },
    "tiny": {
        "prepare": {"classes": ["0", "1", "2"]},
        "pretrain": {
            "vae": {"channels": [16, 16], "steps": 12, "batch_size": 16},
            "dit": {"layers": 2, "heads": 2, "head_dim": 16, "steps": 12, "batch_size": 16},
            "threads": 1,
            "checkpoint_every": 5,
        },
        "encode": {"batch_size": 32, "shard_size": 96, "threads": 1},
        "finetune": {
            "steps": 12,
            "batch_size": 12,
            "capacity_real": 4,
            "capacity_gen": 4,
            "log_every": 1,
            "preview_every": 5,
            "threads": 1,
            "checkpoint_every": 5,
        },
        "sample": {"images_per_class": 2, "seeds": [0, 1], "guidance": 1.5, "steps": 3, "chunk_size": 4, "threads": 1},
        "evaluate": {
            "images_per_class": [1, 2],
            "student_seeds": [0],
            "random_seeds": [0, 1],
            "protocol": "short-20",
            "evaluations": 2,
            "workers": 1,
        },
        "publish": {"gate": "off"},
    },
}


def preset(name: str) -> Params:
    """The parameters of a preset; a `DiffstillError` lists the known names otherwise."""
    if name not in PRESETS:
        raise DiffstillError(f"preset {name!r} is not known; use one of {', '.join(PRESETS)}")
    return Params.model_validate_json(json.dumps(PRESETS[name]))


def load_params(path: Path, changes: Sequence[str] = ()) -> Params:
    """Read `params.yaml`, with `changes` to it, like `sample.guidance=2`. Raises `DiffstillError` naming every wrong knob, its value and the rule."""
    params = read_yaml(path, Params, "write one with `diffstill preset digits`")
    if not changes:
        return params
    values = params.plain()
    for change in changes:
        _change(values, change)
    try:
        return read_json(json.dumps(values), Params)
    except DiffstillError as error:
        raise DiffstillError(f"--set: {error}") from error
    except (TypeError, ValueError) as error:  # YAML has dates, too
        raise DiffstillError(f"--set: holds a value that is no number, text, list or mapping ({error}); put text in quotes") from error


def _change(values: dict[str, Any], change: str) -> None:
    """Set one knob of `values`, given as on the command line. The value is YAML, as in the file; the last of several for one knob holds."""
    knob, equals, text = change.partition("=")
    names = knob.split(".")
    if not equals or len(names) < 2 or not all(names):
        raise DiffstillError(f"--set {change!r}: write <section>.<knob>=<value>, like sample.guidance=2")
    section: Any = values
    for name in names[:-1]:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or names[-1] not in section:
        raise DiffstillError(f"--set {change!r}: {_unknown(knob, Params)}")
    if within := [one for one in _knobs(Params) if one.startswith(f"{knob}.")]:
        raise DiffstillError(f"--set {change!r}: `{knob}` is a group of knobs; set them one at a time, like {within[0]}=...")
    section[names[-1]] = _parsed(text, f"--set {change!r}")


def read_yaml(path: Path, model: type[SectionType], advice: str) -> SectionType:
    """The sections of a YAML file. Raises `DiffstillError` naming every wrong entry, its value and the rule; `advice` says how to get a right file."""
    if not path.is_file():
        raise DiffstillError(f"{path}: no such file; {advice}")
    if (size := path.stat().st_size) > LONGEST_YAML:
        raise DiffstillError(f"{path}: has {size:,} bytes, above the {LONGEST_YAML:,} that are read; {advice}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DiffstillError(f"{path}: not valid YAML ({_first_problem(error)})") from error
    values = _parsed(text, str(path))
    if not isinstance(values, dict | None):
        raise DiffstillError(f"{path}: holds {values!r:.40} where sections are expected ({', '.join(model.model_fields)}); {advice}")
    try:
        return read_json(json.dumps(values or {}), model)
    except DiffstillError as error:
        raise DiffstillError(f"{path}: {error}") from error
    except (TypeError, ValueError) as error:
        raise DiffstillError(f"{path}: holds a value that is no number, text, list or mapping ({error})") from error


def _parsed(text: str, where: str) -> Any:
    """What a text of YAML says. Raises `DiffstillError` that begins with `where`."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _WithoutAliases
    try:
        return yaml.load(text)
    except _AliasError as error:
        raise DiffstillError(f"{where}: {_first_problem(error)}; write the value out in each place") from error
    except (YAMLError, RecursionError) as error:
        raise DiffstillError(f"{where}: not valid YAML ({_first_problem(error)})") from error


class _AliasError(ComposerError):
    """A value that stands for another."""


class _WithoutAliases(Composer):
    """Ten lines of aliases of aliases make a value of a billion parts."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node of the file."""
        if self.loader.parser.check_event(AliasEvent):
            event = self.loader.parser.peek_event()
            raise _AliasError(problem=f"holds the alias *{event.anchor}, which is not taken here", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def read_json(text: str, model: type[SectionType]) -> SectionType:
    """A section from its JSON. Raises `DiffstillError` naming every wrong entry, its value and the rule."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise DiffstillError(_explain(error, model)) from error


def _first_problem(error: Exception) -> str:
    """What is wrong and in which line, without the parser's drawing of the place."""
    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """One line per wrong knob, in plain words."""
    lines: list[str] = []
    unquoted: dict[str, list[Any]] = {}
    for item in error.errors():
        if item["type"] == "too_short" and item["input"]:
            continue  # its entries are wrong, which is said of each
        knob = _knob(item["loc"])
        if item["type"] == "string_type" and isinstance(item["input"], int | float):
            unquoted.setdefault(_knob(item["loc"][:-1]) if isinstance(item["loc"][-1], int) else knob, []).append(item["input"])
        elif item["type"] == "extra_forbidden":
            lines.append(_unknown(knob, model))
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(
                f"`{knob}` is {_shown(knob, item['input'])}: {message}"
                if knob and item["type"] != "value_error"
                else f"{knob}{': ' if knob else ''}{message}"
            )
    for knob, values in unquoted.items():
        shown, several = ", ".join(map(json.dumps, values)), len(values) > 1
        lines.append(f"`{knob}` has {shown} where text is expected; put {'them' if several else 'it'} in quotes")
    return "; ".join(lines)


def _unknown(knob: str, model: type[BaseModel]) -> str:
    """What to say of a name that no knob has, with the one that may be meant."""
    near = difflib.get_close_matches(knob, [*model.model_fields, *_knobs(model)], n=1, cutoff=0.75)
    meant = f"did you mean `{near[0]}`? " if near else ""
    return f"`{knob}` is not a knob; {meant}remove it or mend its name (`diffstill show` lists all)"


def _knobs(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The full names of all knobs below a section."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _knobs(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _knob(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(part) for part in loc if not str(part).startswith(("tuple[", "constrained-", "int", "literal")))


def _shown(knob: str, value: Any) -> str:
    """The wrong value, unless it may be a secret that someone has put where its name belongs."""
    return "not what it may be" if re.search("token|secret", knob) else without_secrets(repr(value))


def render_params(params: Params) -> str:
    """`params` as YAML with one comment per knob, as `load_params` reads it."""
    text = io.StringIO()
    yaml = YAML()
    yaml.width = 4096
    yaml.dump(_commented(params), text)
    return text.getvalue()


def _commented(section: Section, indent: int = 0) -> CommentedMap:
    node = CommentedMap()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            node[name] = _commented(value, indent + 2)
            node.yaml_set_comment_before_after_key(
                name, before=("\n" if indent == 0 and len(node) > 1 else "") + str(field.description), indent=indent
            )
        else:
            node[name] = _flow(value)
            node.yaml_add_eol_comment(str(field.description), name, column=36)
    return node


def _flow(value: Any) -> Any:
    """`value` as YAML shows it: a tuple in one line, odd text in quotes (ruamel writes some of it so that it is read as a mapping)."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[A-Za-z][\w.+-]*", value) and value not in YAML_1_1 else DoubleQuotedScalarString(value)
    if isinstance(value, Mapping):
        mapping = CommentedMap({name: _flow(one) for name, one in value.items()})
        mapping.fa.set_flow_style()
        return mapping
    if not isinstance(value, tuple):
        return value
    sequence = CommentedSeq(map(_flow, value))
    sequence.fa.set_flow_style()
    return sequence


def json_schema() -> dict[str, Any]:
    """JSON schema of `params.yaml`, for editors."""
    schema = Params.model_json_schema()
    schema["$defs"]["EvaluateConfig"]["properties"]["protocol"]["pattern"] = f"^({'|'.join(NAMED)}|{SHORT})$"
    return schema
