"""Students: the ordinary classifiers that judge a training set, their augmentation and their training loop.

Shapes: B batch, N images, C channels, S side in pixels, K classes. Pixels rest as uint8, are augmented as floats 0..1
and standardised last. Every draw comes from an explicit CPU generator, so students train in threads and on any device
alike. Definitions and recipe: Gu et al. 2024 (arXiv 2311.15529) and the dataset condensation papers before it.
"""

from __future__ import annotations

import difflib
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffstill.draws import Purpose, seed_of, seeded
from diffstill.errors import DiffstillError
from diffstill.protocols import PADDED_SIDE, Protocol, student_misfit

Pixels = npt.NDArray[np.uint8] | Tensor
Labels = npt.NDArray[np.int64] | Tensor

CONVNET_WIDTH = 128
RESNET_WIDTHS = (64, 128, 256, 512)
SMALL_GREY_SIDE = 64

CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
JITTER = 0.4
LIGHTING = 0.1
GREY_WEIGHTS = (0.2989, 0.587, 0.114)
# Principal components of ImageNet's colours (Krizhevsky et al. 2012, numbers as the field uses them).
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

# Siamese augmentation (Zhao & Bilen 2021, arXiv 2102.08259), strengths as its code has them.
BRIGHTNESS, CONTRAST, SATURATION = 1.0, 0.5, 2.0
SCALE, ROTATION = 1.2, 15.0

_EVALUATED_PIXELS = 2**19
# Module constructors draw from torch's global generator: one at a time, and its state is put back.
_GLOBAL_GENERATOR = threading.Lock()


# Networks


def build_student(name: str, *, classes: int, channels: int, side: int, seed: int) -> nn.Module:
    """A fresh student `name` that maps images (B, channels, side, side) to logits (B, classes); its weights are a function of `seed`.

    Names: `convnet-<depth>`, `resnetap-10`, `resnet-18` (all with instance norm), or any timm architecture, without pretrained weights.
    Raises `DiffstillError` on an unknown name and on images too small for the network.
    """
    if misfit := student_misfit(name, side, channels):
        raise DiffstillError(misfit)
    with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(Purpose.STUDENT_WEIGHTS, seed))
        if match := re.fullmatch(r"convnet-([1-9]\d?)", name):
            return _convnet(int(match[1]), classes, channels, side)
        if name in ("resnetap-10", "resnet-18"):
            build = _resnetap_10 if name == "resnetap-10" else _resnet_18
            return _with_normal_convolutions(build(classes, channels, side))
        return _timm_model(name, classes, channels, side)


def _with_normal_convolutions(student: nn.Module) -> nn.Module:
    """Convolutions N(0, sqrt(2 / fan_out)), the rest as torch draws it: so the ResNets of the field.

    Its ConvNet is torch's default throughout. The official code of both: see `diffstill.protocols`.
    """
    for module in student.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return student


def _instance_norm(width: int) -> nn.Module:
    return nn.GroupNorm(width, width)


def _convnet(depth: int, classes: int, channels: int, side: int) -> nn.Module:
    """`depth` times [3x3 convolution, instance norm, ReLU, 2x2 average pool], then a linear layer.

    The first layer pads a grey image of 28 px to 32, as the field's code does.
    """
    first_padding = 3 if (channels, side) == (1, PADDED_SIDE) else 1
    side += 2 * (first_padding - 1)
    layers: list[nn.Module] = []
    for block in range(depth):
        width_in, padding = (CONVNET_WIDTH, 1) if block else (channels, first_padding)
        convolution = nn.Conv2d(width_in, CONVNET_WIDTH, 3, padding=padding)
        layers += [convolution, _instance_norm(CONVNET_WIDTH), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(CONVNET_WIDTH * (side >> depth) ** 2, classes))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; `halving` says how the side is halved, if at all."""

    def __init__(self, width_in: int, width: int, halving: Literal["none", "stride", "pool"]) -> None:
        super().__init__()
        stride = 2 if halving == "stride" else 1
        pool = [nn.AvgPool2d(2)] if halving == "pool" else []
        first, second = _convolution(width_in, width, 3, stride), _convolution(width, width, 3)
        self.residual = nn.Sequential(*first, nn.ReLU(inplace=True), *pool, *second)
        same = width_in == width and halving == "none"
        self.shortcut = nn.Identity() if same else nn.Sequential(*pool, *_convolution(width_in, width, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def _convolution(width_in: int, width: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias and its instance norm."""
    return [nn.Conv2d(width_in, width, kernel, stride, padding=kernel // 2, bias=False), _instance_norm(width)]


def _resnet(stem: list[nn.Module], blocks: int, halving: Literal["stride", "pool"], classes: int) -> nn.Module:
    """Stem, four stages of `blocks` basic blocks (the last three halve the side), global average pool, linear layer."""
    layers, width_in = list(stem), RESNET_WIDTHS[0]
    for stage, width in enumerate(RESNET_WIDTHS):
        for block in range(blocks):
            layers.append(_BasicBlock(width_in, width, halving if stage and not block else "none"))
            width_in = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, classes))


def _resnetap_10(classes: int, channels: int, side: int) -> nn.Module:
    """ResNet-10 whose every downsampling is an average pool; its stem brings large images to a quarter or half of their side."""
    kernel, pool = (7, 4) if side > 128 else (3, 2) if side > 64 else (3, 1)
    stem = [*_convolution(channels, RESNET_WIDTHS[0], kernel), nn.ReLU(inplace=True), nn.AvgPool2d(pool)]
    return _resnet(stem, 1, "pool", classes)


def _resnet_18(classes: int, channels: int, side: int) -> nn.Module:
    """ResNet-18 with instance norm; 7x7 stem of stride 2 above 128 px, 3x3 of stride 1 below.

    A max pool follows above 64 px.
    """
    kernel, stride = (7, 2) if side > 128 else (3, 1)
    pool = [nn.MaxPool2d(3, 2, padding=1)] if side > 64 else []
    convolution = _convolution(channels, RESNET_WIDTHS[0], kernel, stride)
    stem = [*convolution, nn.ReLU(inplace=True), *pool]
    return _resnet(stem, 2, "stride", classes)


def _timm_model(name: str, classes: int, channels: int, side: int) -> nn.Module:
    """A timm architecture without pretrained weights. Its constructor draws from the global generator."""
    import timm

    refuse_unknown(name)
    resizable = {"img_size": side} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    try:
        student: nn.Module = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=classes, **resizable)
        with torch.inference_mode():
            student.eval()(torch.zeros(1, channels, side, side))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DiffstillError(
            f"student {name!r} (timm) does not take {channels}x{side}x{side} images ({reason}); use another student or a larger side"
        ) from error
    return _without_dropout(student.train(), timm.layers.DropPath)


def _without_dropout(student: nn.Module, drop_path: type[Any]) -> nn.Module:
    """Dropout would draw from the global generator, which threads share, so students train without it."""
    for module in student.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, drop_path):
            module.drop_prob = 0.0
    return student


def refuse_unknown(name: str) -> None:
    """Raise `DiffstillError` if there is no student of that name, with those that are near."""
    if re.fullmatch(r"convnet-([1-9]\d?)|resnetap-10|resnet-18", name):
        return
    import timm

    if name not in timm.list_models():
        raise DiffstillError(_unknown_student(name, timm.list_models()))


def _unknown_student(name: str, known: list[str]) -> str:
    ours = ["convnet-1", "convnet-2", "convnet-3", "convnet-4", "convnet-5", "convnet-6", "resnetap-10", "resnet-18"]
    close = difflib.get_close_matches(name, [*ours, *known], n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "use convnet-<depth>, resnetap-10, resnet-18 or a timm architecture by name"
    return f"student {name!r} is not known; {hint}"


# Pixels


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation per channel of pixels 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def pixel_statistics(parts: Iterable[npt.NDArray[np.uint8]]) -> PixelStatistics:
    """Statistics of real training pixels in parts (n, C, S, S), exact from their histogram. Raises `DiffstillError` if a channel is constant.

    Take them from the full real training split and use them for every source of a table.
    """
    values = np.arange(256) / 255
    counts = sum(np.stack([np.bincount(part[:, channel].reshape(-1), minlength=256) for channel in range(part.shape[1])]) for part in parts)
    moments = []
    for channel, own in enumerate(np.asarray(counts)):
        share = own / own.sum()
        mean = float(share @ values)
        moments.append((mean, math.sqrt(float(share @ (values - mean) ** 2))))
        if moments[-1][1] == 0:
            raise DiffstillError(
                f"channel {channel} of the training images has the value {mean * 255:.0f} everywhere; a student needs images that differ"
            )
    means, stds = zip(*moments, strict=True)
    return PixelStatistics(means, stds)


def standardise(images: Tensor, statistics: PixelStatistics) -> Tensor:
    """Images (B, C, S, S) in 0..1 to zero mean and unit deviation per channel of the training split."""
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (statistics.mean, statistics.std))
    return (images - mean) / std


# Augmentation. Ours, since torchvision's random transforms use the global generator and draw once per batch.


def augment(images: Tensor, *, flip: bool, generator: torch.Generator) -> Tensor:
    """Augment images (B, C, S, S) in 0..1, each with its own draws; see `siamese` for the other way.

    Grey images up to 64 px: random crop after padding by S // 8. Others: random resized crop, and in colour images
    jitter and PCA lighting. Mirrored only if `flip`.
    """
    channels, side = images.shape[1], images.shape[-1]
    if channels == 1 and side <= SMALL_GREY_SIDE:
        images = padded_crop(images, torch.randint(2 * (side // 8) + 1, (len(images), 2), generator=generator), side // 8)
    else:
        images = resized_crop(images, draw_boxes(len(images), generator))
    if flip:
        images = mirror(images, torch.rand(len(images), generator=generator) < 0.5)
    if channels == 3:
        order = torch.rand(len(images), 3, generator=generator).argsort(dim=1)
        images = colour_jitter(images, order, _jitter_factors(len(images), generator))
        images = lighting(images, torch.randn(len(images), 3, generator=generator) * LIGHTING)
    return images


def padded_crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Pad images (B, C, S, S) with zeros and cut S x S at `offsets` (B, 2) = row and column in 0..2 * padding."""
    span = torch.arange(images.shape[-1])
    rows, columns = (offsets.unsqueeze(-1) + span).to(images.device).unbind(1)
    each, channel = (torch.arange(size, device=images.device) for size in images.shape[:2])
    # Channels are indexed, too: a permuted result would have channels-last strides, which one-channel
    # batches keep through `contiguous` and `clone`, and GroupNorm is 4 to 10 times slower with them.
    where = each[:, None, None, None], channel[:, None, None], rows[:, None, :, None]
    return F.pad(images, (padding,) * 4)[(*where, columns[:, None, None, :])]


def draw_boxes(images: int, generator: torch.Generator) -> Tensor:
    """Crop boxes (B, 4) = top, left, height, width as shares of the side: area 0.5-1, aspect ratio 3/4-4/3, the whole image after ten misfits."""
    tries = torch.rand(images, 10, 4, generator=generator)
    area = CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * tries[..., 0]
    ratio = torch.exp(math.log(CROP_RATIO[0]) + (math.log(CROP_RATIO[1]) - math.log(CROP_RATIO[0])) * tries[..., 1])
    size = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], -1)
    fits = (size <= 1).all(-1)
    first = fits.to(torch.uint8).argmax(1)
    chosen = torch.arange(images), first
    size = torch.where(fits[chosen].unsqueeze(1), size[chosen], torch.ones(()))
    return torch.cat([(1 - size) * tries[chosen][:, 2:], size], 1)


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Cut `boxes` (B, 4) (see `draw_boxes`) out of images (B, C, S, S) and scale them to S x S, bilinear."""
    centres = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1]
    rows, columns = (boxes[:, :2].unsqueeze(-1) + boxes[:, 2:].unsqueeze(-1) * centres).mul(2).sub(1).to(images.device).unbind(1)
    side = images.shape[-1]
    grid = torch.stack([columns.unsqueeze(1).expand(-1, side, -1), rows.unsqueeze(2).expand(-1, -1, side)], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the `chosen` (B,) images left to right."""
    return torch.where(chosen.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def _jitter_factors(images: int, generator: torch.Generator) -> Tensor:
    return 1 + JITTER * (2 * torch.rand(3, images, generator=generator) - 1)


def colour_jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Change brightness (0), contrast (1) and saturation (2) of images (B, 3, S, S), not clipped.

    Each image in its own `order` (B, 3), by `factors` (3, B) of the three kinds.
    """
    order, factors = order.to(images.device), factors.to(images.device)
    for kind in order.unbind(1):
        grey = _grey(images)
        fixed = torch.stack([torch.zeros_like(grey), grey.mean((2, 3), keepdim=True).expand_as(grey), grey])
        each = torch.arange(len(images), device=images.device)
        images = torch.lerp(fixed[kind, each], images, factors[kind, each].view(-1, 1, 1, 1))
    return images


def _grey(images: Tensor) -> Tensor:
    return (images * images.new_tensor(GREY_WEIGHTS).view(3, 1, 1)).sum(1, keepdim=True)


def lighting(images: Tensor, amounts: Tensor) -> Tensor:
    """Shift colours along ImageNet's principal components by `amounts` (B, 3) of their eigenvalues."""
    shift = (amounts * torch.tensor(EIGENVALUES)) @ torch.tensor(EIGENVECTORS).T
    return images + shift.to(images.device).view(-1, 3, 1, 1)


def siamese(images: Tensor, *, flip: bool, generator: torch.Generator) -> Tensor:
    """Augment standardised images (B, C, S, S) as the papers on small sets do (Zhao & Bilen 2021).

    Mirroring if `flip`, brightness, saturation and contrast, each image by its own draws; then one of
    crop, scaling and rotation, which one is drawn once for the batch.
    """
    if flip:
        images = mirror(images, torch.rand(len(images), generator=generator) < 0.5)
    draws = torch.rand(3, len(images), 1, 1, 1, generator=generator).to(images.device)
    images = images + BRIGHTNESS * (draws[0] - 0.5)
    images = torch.lerp(images.mean(1, keepdim=True), images, SATURATION * draws[1])
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, CONTRAST + draws[2])
    kind = int(torch.randint(3, (1,), generator=generator))
    if kind == 0:
        padding = int(images.shape[-1] / 8 + 0.5)
        offsets = torch.randint(2 * padding + 1, (len(images), 2), generator=generator)
        return padded_crop(images, offsets, padding)
    draws = torch.rand(len(images), 2, generator=generator)
    affine = _scalings(draws) if kind == 1 else _rotations(draws[:, 0])
    grid = F.affine_grid(affine.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _scalings(draws: Tensor) -> Tensor:
    """Affine maps (B, 2, 3) that scale each axis by 1 / 1.2 to 1.2, from `draws` (B, 2) in 0..1."""
    scales = 1 / SCALE + (SCALE - 1 / SCALE) * draws
    return F.pad(torch.diag_embed(scales), (0, 1))


def _rotations(draws: Tensor) -> Tensor:
    """Affine maps (B, 2, 3) that turn by -15 to 15 degrees, from `draws` (B,) in 0..1."""
    angles = math.radians(ROTATION) * (2 * draws - 1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
    return F.pad(turned, (0, 1))


# CutMix (Yun et al. 2019, arXiv 1905.04899), one box and one partner permutation per batch.


@dataclass(frozen=True)
class Mixed:
    """A CutMix batch: `share` of each image keeps its own label, the rest has the label of its `partner` (B,)."""

    images: Tensor
    partner: Tensor
    share: float


def cutmix(images: Tensor, *, beta: float, generator: torch.Generator) -> Mixed:
    """Paste one box, of an area share drawn from Beta(beta, beta) and cut at the border, from a permutation of the batch (B, C, S, S)."""
    side = images.shape[-1]
    half = int(side * math.sqrt(1 - draw_beta(beta, generator))) // 2
    centres = torch.randint(side, (2,), generator=generator).tolist()
    (top, bottom), (left, right) = ((max(0, centre - half), min(side, centre + half)) for centre in centres)
    partner = torch.randperm(len(images), generator=generator).to(images.device)
    mixed = images.clone(memory_format=torch.contiguous_format)
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    return Mixed(mixed, partner, 1 - (bottom - top) * (right - left) / side**2)


def draw_beta(beta: float, generator: torch.Generator) -> float:
    """One draw from Beta(beta, beta) (Jöhnk 1964: torch's own Beta takes no generator)."""
    while True:
        x, y = torch.rand(2, generator=generator, dtype=torch.float64).pow(1 / beta).tolist()
        if 0 < x + y <= 1:
            return float(x / (x + y))


def cutmix_loss(logits: Tensor, labels: Tensor, mixed: Mixed) -> Tensor:
    """Cross-entropy of logits (B, K) against hard labels (B,), weighted by the area each label has in its image."""
    own, other = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[mixed.partner])
    return mixed.share * own + (1 - mixed.share) * other


# Training and testing


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` said of a student after `step` optimiser steps."""

    step: int
    metrics: dict[str, float]


def _nothing() -> None:
    pass


def train_student(
    student: nn.Module,
    pixels: Pixels,
    labels: Labels,
    *,
    protocol: Protocol,
    classes: int,
    statistics: PixelStatistics,
    flip: bool,
    seed: int,
    evaluations: int,
    evaluate: Callable[[nn.Module], dict[str, float]],
    step_done: Callable[[], None] = _nothing,
) -> list[Evaluation]:
    """Train `student` in place on uint8 pixels (N, C, S, S) and labels (N,), on the device where its weights lie.

    `evaluate` is called at `evaluations` evenly spaced steps, the last being the end; `step_done` after each step (what it raises ends
    the training). Batches and augmentation are a function of `seed`; nothing touches the global generator.
    """
    device = next(student.parameters()).device
    pixels, labels = torch.as_tensor(pixels).to(device), torch.as_tensor(labels).to(device)
    steps = protocol.budget(len(labels), classes)
    looks, history = evaluation_steps(steps, evaluations), []
    generator = seeded(Purpose.STUDENT_TRAINING, seed)
    optimiser, schedule = _optimiser(student, protocol, steps)
    student.train()
    for step, batch in enumerate(islice(batches(len(labels), protocol.batch_size, generator), steps), start=1):
        chosen = batch.to(device)
        images = _augmented(pixels[chosen], protocol, statistics, flip, generator)
        mixed = _perhaps_mixed(images, protocol, generator)
        optimiser.zero_grad(set_to_none=True)
        cutmix_loss(student(mixed.images), labels[chosen], mixed).backward()
        optimiser.step()
        schedule.step()
        if step in looks:
            history.append(Evaluation(step, evaluate(student)))
        step_done()
    return history


def _augmented(pixels: Tensor, protocol: Protocol, statistics: PixelStatistics, flip: bool, generator: torch.Generator) -> Tensor:
    """The batch as `protocol` augments it, standardised: (B, C, S, S)."""
    images = _to_float(pixels)
    if protocol.augmentation == "siamese":
        return siamese(standardise(images, statistics), flip=flip, generator=generator)
    return standardise(augment(images, flip=flip, generator=generator), statistics)


def _perhaps_mixed(images: Tensor, protocol: Protocol, generator: torch.Generator) -> Mixed:
    """CutMix in the protocol's share of batches; elsewhere the batch as it is."""
    share = protocol.cutmix_share
    if share < 1 and float(torch.rand(1, generator=generator)) >= share:
        return Mixed(images, torch.arange(len(images), device=images.device), 1.0)
    return cutmix(images, beta=protocol.cutmix_beta, generator=generator)


def _optimiser(student: nn.Module, protocol: Protocol, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    rate, momentum, decay = protocol.learning_rate, protocol.momentum, protocol.weight_decay
    optimiser = torch.optim.SGD(student.parameters(), lr=rate, momentum=momentum, weight_decay=decay, fused=True)
    milestones = [int(fraction * steps) for fraction in protocol.milestones]
    return optimiser, torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=protocol.decay)


def batches(images: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of shuffled batches, epoch after epoch, each epoch without replacement; its last batch may be partial.

    A last batch of one image borrows the epoch's first: batch norm, in timm's networks, cannot train on a single image.
    """
    while True:
        order = torch.randperm(images, generator=generator)
        for batch in order.split(size):
            yield batch if len(batch) > 1 else torch.cat([batch, order[:1]])


def evaluation_steps(steps: int, evaluations: int) -> list[int]:
    """`evaluations` evenly spaced steps in 1..steps, the last being `steps`; fewer where there are fewer steps."""
    return sorted({max(1, steps * k // evaluations) for k in range(1, evaluations + 1)})


def accuracy(student: nn.Module, pixels: Pixels, labels: Labels, statistics: PixelStatistics) -> float:
    """Share of uint8 images (N, C, S, S) whose largest logit is that of their label (N,). Leaves the student in its mode."""
    device, training = next(student.parameters()).device, student.training
    pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels)
    size = max(1, _EVALUATED_PIXELS // pixels.shape[-1] ** 2)
    student.eval()
    with torch.inference_mode():
        hits = [
            (student(standardise(_to_float(images.to(device)), statistics)).argmax(1) == truth.to(device)).sum()
            for images, truth in zip(pixels.split(size), labels.split(size), strict=True)
        ]
    student.train(training)
    return int(torch.stack(hits).sum()) / len(labels)


def resized(pixels: npt.NDArray[np.uint8], side: int | None) -> npt.NDArray[np.uint8]:
    """uint8 images (N, C, S, S) at `side` px (bilinear, antialiased); None leaves them as they are."""
    if side is None or side == pixels.shape[-1]:
        return pixels
    parts = torch.from_numpy(pixels).split(max(1, _EVALUATED_PIXELS // pixels.shape[-1] ** 2))
    return torch.cat([F.interpolate(part, (side, side), mode="bilinear", antialias=True) for part in parts]).numpy()


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float().div_(255)
