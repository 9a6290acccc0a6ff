"""Contact sheets and PNG files from arrays of pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from diffstill.artifacts import Array

SHOWN_SIDE = 48
"""Smaller images are enlarged, without smoothing, to about this many pixels."""


LARGEST_SIDE = 128
"""Larger ones are reduced to this: a sheet is for looking at, the images themselves lie beside it."""


def to_image(pixels: Array) -> Image.Image:
    """uint8 (channels, height, width) as a Pillow image, grey or colour."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def read_png(path: Path) -> Array:
    """The pixels of an image that `save_png` wrote, uint8 (channels, height, width)."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def contact_sheet(rows: Array, gap: int = 2) -> Image.Image:
    """A grid of uint8 images (rows, columns, channels, side, side), on white, small ones enlarged and large ones reduced."""
    if rows.shape[-1] > LARGEST_SIDE:
        rows = np.stack([np.stack([_reduced(image) for image in row]) for row in rows])
    scale = max(1, round(SHOWN_SIDE / rows.shape[-1]))
    large = rows.repeat(scale, axis=3).repeat(scale, axis=4)
    padded = np.pad(large, ((0, 0), (0, 0), (0, 0), (gap, gap), (gap, gap)), constant_values=255)
    count, columns, channels, height, width = padded.shape
    return to_image(padded.transpose(2, 0, 3, 1, 4).reshape(channels, count * height, columns * width))


def _reduced(image: Array) -> Array:
    pixels = np.asarray(to_image(image).resize((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG; equal pixels give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", compress_level=9)
