"""The generator's networks: build, save and load a diffusers DiT and autoencoder; DiffFit; noise schedulers.

The diffusers DiT keeps one timestep-and-label embedder per block, each dropping labels by itself in training mode.
Here all blocks share one embedder, and the model stays in `eval()` mode even while it trains (it has no other
dropout); labels are dropped by the caller, once per sample. Writing a folder puts the copies back.

A class is a position in the list of classes of `images`; a label is a row of the generator's label table. Only
`Generator.labels` knows which belongs to which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diffstill.diffusion import sample_latents
from diffstill.errors import DiffstillError

if TYPE_CHECKING:
    from diffstill.artifacts import Artifact
    from diffstill.config import PretrainConfig

from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler

Precision = Literal["float32", "bf16"]
STOCK_FREQUENCY_SHIFT = 1.0
"""diffusers' timestep frequencies; weights from the original DiT code need 0, which no diffusers config records."""
ORIGINAL_FREQUENCY_SHIFT = 0.0
LABEL_TABLE = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
LABEL_ROWS = "label_rows"
"""In a delta: which rows of the label table it holds."""
ABOUT = "diffstill.json"
"""In a merged folder: what no configuration of diffusers says of its weights."""
LARGEST_LATENT = 1e4
"""Scaled latents have a deviation of about 1, and some hundreds where a network predicts no noise at all: beyond this they are
of no image, though the norms in the decoder make one of them."""
LARGEST_PIXEL = 100.0
"""Decoded images lie in about -1..1."""
NONSENSE = 100.0
"""A denoising loss above this is of a network that has diverged: one that predicts no noise at all has a loss of 1."""
DECODED_AT_ONCE = 32
"""Latents per pass through the decoder; its activations at 256 px take some 0.3 GB an image."""


@dataclass
class Generator:
    """A latent diffusion model, opened: the networks and what its maths needs."""

    transformer: Any
    vae: Any
    scheduler: dict[str, Any]
    labels: Sequence[int] | None = None
    """The label of each class; None: class c has label c."""
    precision: Precision = "float32"
    """What the transformer computes in; everything else stays float32."""
    parallel: Any = None
    """The transformer as several processes train it; None: alone."""

    @property
    def null_label(self) -> int:
        """The label that stands for no label: the last row of the label table."""
        return int(self.transformer.config.num_embeds_ada_norm)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        config = self.transformer.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def frequency_shift(self) -> float:
        """The shift of the timestep frequencies."""
        return float(_time_projection(self.transformer).downscale_freq_shift)

    @property
    def learned_variance(self) -> bool:
        """Whether the transformer predicts a variance beside the noise."""
        return bool(self.transformer.out_channels == 2 * self.transformer.config.in_channels)

    def labels_of(self, classes: Tensor) -> Tensor:
        """The labels of `classes` (N,), on the same device."""
        return classes if self.labels is None else torch.tensor(self.labels, device=classes.device)[classes]

    def alphas_cumprod(self) -> Tensor:
        """The cumulative alphas abar_t, (T,) float32."""
        alphas_cumprod: Tensor = build_scheduler("ddpm", self.scheduler, learned_variance=False).alphas_cumprod
        return alphas_cumprod

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation, each (N, C, h, w), of images (N, channels, side, side) in -1..1."""
        posterior = self.vae.encode(images).latent_dist
        return posterior.mean, posterior.std

    def decode(self, latents: Tensor) -> Tensor:
        """Images (N, channels, side, side), about -1..1, of scaled latents."""
        images: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return images

    def predict(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The transformer's output in float32: noise (N,C,h,w), or noise and variance (N,2C,h,w)."""
        network = self.parallel if self.parallel and torch.is_grad_enabled() else self.transformer  # without gradients a rank may be alone
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output: Tensor = network(x_t, timestep=t, class_labels=labels, return_dict=False)[0]
        return output.float() if self.precision == "bf16" else output

    def predict_noise(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The predicted noise alone, (N,C,h,w)."""
        return self.predict(x_t, t, labels)[:, : x_t.shape[1]]

    def draw(self, classes: Sequence[int], noise: Sequence[torch.Generator], **how: Any) -> Tensor:
        """Images (N, channels, side, side), about -1..1, of latents drawn as `draw_latents` says."""
        return self.decode_all(self.draw_latents(classes, noise, **how))

    @torch.inference_mode()
    def decode_all(self, latents: Tensor) -> Tensor:
        """The images of any number of scaled latents, some at a time."""
        return torch.cat([self.decode(part) for part in latents.split(DECODED_AT_ONCE)])

    @torch.inference_mode()
    def draw_latents(self, classes: Sequence[int], noise: Sequence[torch.Generator], *, sampler: str, steps: int, guidance: float) -> Tensor:
        """Scaled latents (N, C, h, w) of `classes`; that of image n from the CPU generator n of `noise` alone."""
        uses_variance = sampler == "ddpm" and self.learned_variance
        return sample_latents(
            self.predict if uses_variance else self.predict_noise,
            build_scheduler(sampler, self.scheduler, learned_variance=uses_variance),
            self.labels_of(torch.tensor(classes)).to(next(self.transformer.parameters()).device),
            noise,
            shape=self.latent_shape,
            null_label=self.null_label,
            guidance=guidance,
            steps=steps,
        )

    def to(self, device: str) -> Generator:
        """The same generator on `device`."""
        return replace(self, transformer=self.transformer.to(device), vae=self.vae.to(device))

    def accelerate(self, precision: Precision, *, compiled: bool = False, checkpointing: bool = False) -> Generator:
        """The same generator, computing in `precision`, its blocks compiled by TorchInductor, or saving memory by computing activations twice.

        With `bf16` the weights that are not trained are rounded to it, once, as autocast would round them at every use.
        """
        if precision == "bf16":
            _round_frozen(self.transformer)
        if checkpointing:
            self.transformer.enable_gradient_checkpointing()
        if compiled:
            for block in self.transformer.transformer_blocks:  # not as a whole: the blocks are alike, so one is compiled for all
                block.compile()
        return replace(self, precision=precision)


def _round_frozen(transformer: nn.Module) -> None:
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for weight in module.parameters(recurse=False):
                if not weight.requires_grad:
                    weight.data = weight.data.bfloat16()


def refuse_unsound(values: Tensor, bound: float, what: str, fix: str) -> None:
    """Raise `DiffstillError` naming the worst of `values`, unless all are finite and within +-`bound`."""
    size = values.detach().abs().flatten().nan_to_num(nan=torch.inf)
    worst = size.argmax()
    if not size[worst] <= bound:
        value = values.flatten()[worst].item()
        raise DiffstillError(f"{what}: holds the value {value:g} where sound ones lie within {bound:g} of 0; {fix}")


def build_vae(config: PretrainConfig, channels: int, side: int) -> Any:
    """A small AutoencoderKL for images of `channels` x `side` x `side`. `DiffstillError` if the side does not fit `config`."""
    widths = config.vae.channels
    config.latent_side(side)
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=config.vae.layers,
        latent_channels=config.vae.latent_channels,
        norm_num_groups=math.gcd(8, *widths),
        sample_size=side,
    ).eval()


def build_transformer(config: PretrainConfig, classes: int, latent_side: int) -> Any:
    """A small DiT with one shared embedder, for latents of `build_vae`."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=config.dit.heads,
        attention_head_dim=config.dit.head_dim,
        in_channels=config.vae.latent_channels,
        out_channels=config.vae.latent_channels,  # DiTPipeline cannot sample with the default None
        num_layers=config.dit.layers,
        sample_size=latent_side,
        patch_size=config.dit.patch,
        num_embeds_ada_norm=classes,
    )
    _zero_init(transformer)
    return share_embedder(transformer.eval())


def _zero_init(transformer: Any) -> None:
    """adaLN-Zero (DiT, section 3.2): every block starts as the identity, and the output starts at zero.

    The label table keeps torch's N(0, 1), not the original 0.02: in a short training labels are then learned, not ignored.
    """
    for layer in (*(block.norm1.linear for block in transformer.transformer_blocks), transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def share_embedder(transformer: Any) -> Any:
    """Let all blocks use the embedder of the first."""
    for block in transformer.transformer_blocks:
        block.norm1.emb = transformer.transformer_blocks[0].norm1.emb
    return transformer


def _check_embedders(transformer: Any, folder: Path) -> None:
    """Sharing is exact only where all copies are equal, as in every DiT trained with one embedder."""
    first, *others = [list(block.norm1.emb.parameters()) for block in transformer.transformer_blocks]
    for number, other in enumerate(others, start=1):
        if not all(torch.equal(a, b) for a, b in zip(first, other, strict=True)):
            raise DiffstillError(
                f"{folder}: block {number} of the transformer has another timestep and label embedder than block 0; only a DiT with one embedder is supported"
            )


def _unshared(transformer: Any) -> Any:
    copy = DiTTransformer2DModel.from_config(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    return copy


def save_generator(generator: Generator, folder: Path, label_names: Sequence[str]) -> None:
    """Write a folder that diffusers' `DiTPipeline.from_pretrained` opens (with `guidance_scale=1`: its null label is fixed at 1000).

    `label_names` are those of the label table, without the null row.
    """
    shift = generator.frequency_shift
    scheduler = build_scheduler("ddim", generator.scheduler, learned_variance=False)
    DiTPipeline(_unshared(generator.transformer), generator.vae, scheduler).save_pretrained(folder, safe_serialization=True)
    index = folder / "model_index.json"  # the pipeline reads `id2label` from here, but does not write it
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": dict(enumerate(label_names))}, indent=2) + "\n")
    for config in (folder / "transformer" / "config.json", folder / "vae" / "config.json"):  # where they were opened from is nobody's business
        config.write_text(
            json.dumps({name: value for name, value in json.loads(config.read_text()).items() if name != "_name_or_path"}, indent=2) + "\n"
        )
    if shift != STOCK_FREQUENCY_SHIFT:
        (folder / "README.md").write_text(SHIFTED.format(shift=shift))


SHIFTED = """# Timestep frequencies

These weights were trained with timestep frequencies of `downscale_freq_shift = {shift:g}`, as the original DiT code has them; no diffusers
configuration records that, and `DiTPipeline.from_pretrained` sets 1. Open the folder with diffstill, or set it yourself:

    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = {shift:g}
"""


def _time_projection(transformer: Any) -> Any:
    return transformer.transformer_blocks[0].norm1.emb.time_proj


def load_generator(folder: Path, frequency_shift: float = STOCK_FREQUENCY_SHIFT, labels: Sequence[int] | None = None) -> Generator:
    """Open a diffusers DiTPipeline folder, in `eval()` mode with one shared embedder; `.bin` weights as plain tensors alone.

    `frequency_shift` is that of the timestep frequencies the weights were trained with (1 in diffusers, 0 in the
    original DiT), `labels` the label of each class. Raises `DiffstillError` where the folder is not such a pipeline.
    """
    try:
        transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer", local_files_only=True, low_cpu_mem_usage=False)
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        build_scheduler("ddpm", scheduler, learned_variance=False)
        dict(json.loads((folder / "model_index.json").read_text()))
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise DiffstillError(
            f"{folder}: not a diffusers DiTPipeline folder with safetensors weights ({' '.join(str(error).split())[:200]})"
        ) from error
    _check_embedders(transformer, folder)
    share_embedder(transformer)
    set_frequency_shift(transformer, frequency_shift)
    return Generator(transformer.eval().requires_grad_(False), load_vae(folder / "vae"), scheduler, labels)


def open_generator(made: Artifact) -> Generator:
    """The generator of a `generator` artifact, as its manifest says it is."""
    return load_generator(made.folder, made.facts["frequency_shift"], made.facts.get("labels"))


def load_vae(folder: Path) -> Any:
    """A diffusers AutoencoderKL folder, in `eval()` mode. Raises `DiffstillError` where the folder is not one."""
    if not (folder / "config.json").is_file():
        raise DiffstillError(f"{folder}: has no config.json, so it is not a diffusers AutoencoderKL folder; name the one that has it")
    try:
        vae = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise DiffstillError(
            f"{folder}: not a diffusers AutoencoderKL folder with safetensors weights ({' '.join(str(error).split())[:200]})"
        ) from error
    return vae.eval().requires_grad_(False)


def empty_transformer(**shape: Any) -> Any:
    """A DiT of diffusers' class whose weights mean nothing yet."""
    return DiTTransformer2DModel(**shape)


def set_frequency_shift(transformer: Any, shift: float) -> None:
    """Set the shift of the timestep frequencies of a DiT with one shared embedder."""
    _time_projection(transformer).downscale_freq_shift = shift


def add_labels(transformer: Any, like: Sequence[int | None]) -> Any:
    """A DiT with new rows in its label table, each a copy of that of a label or, for None, the mean of all; the null row stays last."""
    if not like:
        return transformer
    table = transformer.state_dict()[LABEL_TABLE]
    known, null = table[:-1], table[-1:]
    rows = [known.mean(dim=0) if label is None else known[label] for label in like]
    wider = DiTTransformer2DModel.from_config(transformer.config, num_embeds_ada_norm=len(known) + len(rows))
    share_embedder(wider)
    set_frequency_shift(wider, _time_projection(transformer).downscale_freq_shift)
    embedding = f"{LABEL_TABLE.split('.', 2)[2]}"
    state = {name: value for name, value in transformer.state_dict().items() if not name.endswith(embedding)}
    grown = torch.cat([known, torch.stack(rows), null])
    wider.load_state_dict(state | {f"transformer_blocks.{number}.{embedding}": grown for number in range(len(wider.transformer_blocks))})
    return wider.eval().requires_grad_(False)


def build_scheduler(sampler: str, config: Mapping[str, Any], *, learned_variance: bool) -> Any:
    """The scheduler of diffusers for `sampler` (`ddpm`, `ddim`, `dpm++`) over the betas of `config`.

    Predictions are not clipped. Only `ddpm` uses a learned variance (`learned_range`); give the others
    the noise alone. Timesteps end at or near 0, or fine detail is smoothed away. `ddpm` visits those of
    the original respaced code (`linspace`). The other two were chosen by the share of a Gaussian latent's
    variance that survives 25 steps, in closed form: `ddim` keeps 72 % of a component of variance 0.1 with
    `leading`, 70 % with `trailing` (and steps to wrong timesteps with `linspace`); `dpm++` 102 % with
    steps even in the logarithm of the signal-to-noise ratio (Lu et al. 2022, arXiv 2206.00927),
    84 % with `trailing`.
    """
    common = {
        "num_train_timesteps": config["num_train_timesteps"],
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
        "beta_schedule": config["beta_schedule"],
    }
    if sampler == "ddpm":
        variance = "learned_range" if learned_variance else "fixed_small"
        return DDPMScheduler(**common, timestep_spacing="linspace", clip_sample=False, variance_type=variance)
    if sampler == "ddim":
        return DDIMScheduler(**common, timestep_spacing="leading", clip_sample=False, set_alpha_to_one=True)
    return DPMSolverMultistepScheduler(
        **common,
        timestep_spacing="linspace",
        use_lu_lambdas=True,
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )


def add_scales(transformer: Any) -> None:
    """DiffFit's scale vectors, ones at first, in the first half of the blocks (arXiv 2304.06648, as the paper uses it).

    They multiply the outputs of q, k and v, of the attention's output projection, and of both residual branches.
    """
    for block in transformer.transformer_blocks[: len(transformer.transformer_blocks) // 2]:
        attention = block.attn1
        for module in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0], attention, block.ff):
            width = attention.to_q.out_features
            module.register_parameter("difffit_scale", nn.Parameter(torch.ones(width, device=attention.to_q.weight.device)))
            module.register_forward_hook(_scaled)


def _scaled(module: Any, _inputs: object, output: Tensor) -> Tensor:
    scaled: Tensor = output * module.difffit_scale
    return scaled


def choose_trainable(transformer: Any, trainable: str) -> dict[str, nn.Parameter]:
    """Freeze everything but what `trainable` names, and return that by name.

    `difffit`: every bias, the label table and the scale vectors, which this adds; `all`: every weight.
    """
    if trainable == "difffit":
        add_scales(transformer)
    chosen = {name: weight for name, weight in transformer.named_parameters() if trainable == "all" or _is_difffit(name)}
    transformer.requires_grad_(False)
    for weight in chosen.values():
        weight.requires_grad_(True)
    return chosen


def _is_difffit(name: str) -> bool:
    return name.endswith((".bias", ".difffit_scale", "class_embedder.embedding_table.weight"))


def moved_labels(generator: Generator, classes: int) -> list[int]:
    """The rows of the label table that training on `classes` classes moves: theirs and the null row."""
    return sorted({*generator.labels_of(torch.arange(classes)).tolist(), generator.null_label})


def take_delta(weights: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """What of the trained `weights` has moved, to be kept: of the label table `rows` alone. Inverse: `apply_delta`."""
    delta = {name: (weight[list(rows)] if name == LABEL_TABLE else weight).cpu().contiguous() for name, weight in weights.items()}
    return delta | ({LABEL_ROWS: torch.tensor(rows)} if LABEL_TABLE in delta else {})


def apply_delta(transformer: Any, delta: Mapping[str, Tensor]) -> None:
    """Give `transformer` the weights of a denoiser. Raises `DiffstillError` where a name or shape does not fit."""
    if any(name.endswith(".difffit_scale") for name in delta):
        add_scales(transformer)
    own = dict(transformer.named_parameters())
    rows = {LABEL_TABLE: delta[LABEL_ROWS]} if LABEL_ROWS in delta else {}
    values = {name: value for name, value in delta.items() if name != LABEL_ROWS}
    for name, value in values.items():
        if not _fits(own.get(name), value, rows.get(name)):
            raise DiffstillError(
                f"the denoiser's weight `{name}` {tuple(value.shape)} does not fit this generator; use the generator it was fine-tuned from"
            )
    with torch.no_grad():
        for name, value in values.items():
            own[name][rows.get(name, ...)] = value


def _fits(weight: Tensor | None, value: Tensor, rows: Tensor | None) -> bool:
    if weight is None or rows is None:
        return weight is not None and weight.shape == value.shape
    return value.shape == (len(rows), *weight.shape[1:]) and int(rows.max()) < len(weight)


def fold_scales(transformer: Any) -> None:
    """Multiply DiffFit's scales into the weights before them, so that the stock classes of diffusers compute the same; in place."""
    for block in transformer.transformer_blocks:
        attention, last = block.attn1, block.ff.net[2]
        places = [(linear, linear) for linear in (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])]
        for linear, scaled in (*places, (attention.to_out[0], attention), (last, block.ff)):
            if (scale := scaled._parameters.pop("difffit_scale", None)) is not None:
                scaled._forward_hooks.clear()
                linear.weight.data.mul_(scale[:, None])
                linear.bias.data.mul_(scale)
