"""Latents: the moments that the autoencoder gives, for every image and its mirror image."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from chains import Chain
from diffstill.artifacts import Artifact, load_split, new_artifact, open_artifact, read_shards, to_unit, write_shards
from diffstill.config import EncodeConfig
from diffstill.networks import load_generator
from diffstill.stages.encode import encode


def moments_one_by_one(chain: Chain, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    opened = load_generator(chain.artifacts / "generator")
    with torch.no_grad():
        pairs = [opened.encode(torch.from_numpy(to_unit(image[None]))) for image in images]
    return np.concatenate([mean.numpy() for mean, _ in pairs]), np.concatenate([std.numpy() for _, std in pairs])


def test_moments_are_those_of_each_image(tiny_chain: Chain) -> None:
    pixels, labels = load_split(open_artifact(tiny_chain.artifacts / "images", "images"), "train")
    latents = read_shards(tiny_chain.artifacts / "latents", "train")
    assert latents["mean"].dtype == latents["std"].dtype == np.float16
    assert latents["mean"].shape == (len(pixels), 1, 4, 4, 4)  # digits are never mirrored
    assert np.array_equal(latents["labels"], labels)
    mean, std = moments_one_by_one(tiny_chain, pixels[:5])
    np.testing.assert_allclose(latents["mean"][:5, 0], mean, atol=2e-3)
    np.testing.assert_allclose(latents["std"][:5, 0], std, atol=2e-3)


def flippable(chain: Chain, folder: Path) -> Artifact:
    source = open_artifact(chain.artifacts / "images", "images")
    with new_artifact(folder, "images", chain.params.prepare, {}) as draft:
        for split in ("train", "val", "test"):
            pixels, labels = load_split(source, split)
            write_shards(draft.folder, split, {"pixels": pixels[:6], "labels": labels[:6]}, 4)
        draft.facts |= source.facts | {"flip": True}
    return open_artifact(folder, "images")


def test_both_flips_where_the_data_allow_it(tiny_chain: Chain, tmp_path: Path) -> None:
    images = flippable(tiny_chain, tmp_path / "images")
    encode(
        EncodeConfig(batch_size=4, shard_size=4, threads=1),
        images=images.folder,
        generator=tiny_chain.artifacts / "generator",
        latents=tmp_path / "latents",
    )
    latents, pixels = read_shards(tmp_path / "latents", "train"), load_split(images, "train")[0]
    assert latents["mean"].shape[1] == 2
    for view, shown in enumerate((pixels, pixels[..., ::-1].copy())):
        np.testing.assert_allclose(latents["mean"][:, view], moments_one_by_one(tiny_chain, shown)[0], atol=2e-3)
    assert len(list((tmp_path / "latents").glob("train-*"))) == 2


def test_scaled_latents_have_unit_spread(tiny_chain: Chain) -> None:
    latents, facts = read_shards(tiny_chain.artifacts / "latents", "train"), open_artifact(tiny_chain.artifacts / "latents", "latents").facts
    mean, std = (latents[name].astype(np.float64) * facts["scaling_factor"] for name in ("mean", "std"))
    assert np.sqrt(mean.var() + (std**2).mean()) == pytest.approx(1, abs=0.02)


def test_an_earlier_artifact_survives_a_failure(tiny_chain: Chain, tmp_path: Path) -> None:
    shutil.copytree(tiny_chain.artifacts / "latents", tmp_path / "latents")
    before = open_artifact(tmp_path / "latents", "latents").digest
    shutil.copytree(tiny_chain.artifacts / "images", tmp_path / "images")
    shard = next((tmp_path / "images").glob("train-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=shard.name):
        encode(tiny_chain.params.encode, images=tmp_path / "images", generator=tiny_chain.artifacts / "generator", latents=tmp_path / "latents")
    assert open_artifact(tmp_path / "latents", "latents").digest == before
