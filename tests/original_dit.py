"""The DiT of Peebles & Xie (arXiv 2212.09748), written from the paper as plain functions: a checkpoint of random weights, and its output.

Shapes: N images, C channels, D width, H heads, T tokens. Weights are named as in the original code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def random_checkpoint(depth: int = 3, width: int = 128, classes: int = 1000, side: int = 8, channels: int = 4, seed: int = 0) -> Weights:
    """Random weights of the XL/2 shape family made small: patch 2, learned sigma, MLP ratio 4."""
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws) / math.sqrt(math.prod(shape[1:]) or 1)

    def linear(name: str, out: int, into: int) -> Weights:
        return {f"{name}.weight": normal(out, into), f"{name}.bias": 0.1 * normal(out)}

    weights = {
        "pos_embed": positions(side // 2, width)[None],
        "x_embedder.proj.weight": normal(width, channels, 2, 2),
        "x_embedder.proj.bias": 0.1 * normal(width),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": torch.randn(classes + 1, width, generator=draws),
    }
    for number in range(depth):
        block = f"blocks.{number}"
        weights |= linear(f"{block}.attn.qkv", 3 * width, width) | linear(f"{block}.attn.proj", width, width)
        weights |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
        weights |= linear(f"{block}.adaLN_modulation.1", 6 * width, width)
    return weights | linear("final_layer.linear", 4 * 2 * channels, width) | linear("final_layer.adaLN_modulation.1", 2 * width, width)


def positions(grid: int, width: int) -> Tensor:
    """Sine and cosine of the column in the first half of the width, of the row in the second, tokens row by row: (T, D)."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    places = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([places.sin(), places.cos()], dim=1)
    columns, rows = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def forward(weights: Weights, x: Tensor, t: Tensor, labels: Tensor, heads: int) -> Tensor:
    """The network's output (N, 2C, h, w) in the precision of x."""
    w = {name: value.to(x.dtype) for name, value in weights.items()}
    images, channels, height, _ = x.shape
    grid, depth = height // 2, 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    patches = x.reshape(images, channels, grid, 2, grid, 2).permute(0, 2, 4, 1, 3, 5).reshape(images, grid * grid, channels * 4)
    tokens = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    angles = t[:, None].float() * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)  # float32 there, whatever x is
    embedded = silu(linear(w, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)))
    condition = silu(linear(w, "t_embedder.mlp.2", embedded) + w["y_embedder.embedding_table.weight"][labels])
    for number in range(depth):
        block = f"blocks.{number}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(w, f"{block}.adaLN_modulation.1", condition)[:, None].chunk(6, dim=-1)
        tokens = tokens + gate1 * attention(w, block, normed(tokens) * (1 + scale1) + shift1, heads)
        hidden = linear(w, f"{block}.mlp.fc1", normed(tokens) * (1 + scale2) + shift2)
        tokens = tokens + gate2 * linear(w, f"{block}.mlp.fc2", gelu(hidden))
    shift, scale = linear(w, "final_layer.adaLN_modulation.1", condition)[:, None].chunk(2, dim=-1)
    out = linear(w, "final_layer.linear", normed(tokens) * (1 + scale) + shift)
    return out.reshape(images, grid, grid, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(images, -1, height, height)


def attention(w: Weights, block: str, x: Tensor, heads: int) -> Tensor:
    """Multi-head self-attention over tokens."""
    images, tokens, width = x.shape
    q, k, v = linear(w, f"{block}.attn.qkv", x).reshape(images, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.mT / math.sqrt(width // heads), dim=-1)
    return linear(w, f"{block}.attn.proj", (weights @ v).transpose(1, 2).reshape(images, tokens, width))


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def normed(x: Tensor) -> Tensor:
    """Layer normalisation without weights, epsilon 1e-6."""
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return x * torch.sigmoid(x)


def gelu(x: Tensor) -> Tensor:
    """The tanh approximation."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
