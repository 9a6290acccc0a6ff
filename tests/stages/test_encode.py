"""Latents: the moments that the autoencoder gives, for every image and its mirror image."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from chains import Chain, contents, flip
from diffstill.artifacts import Artifact, load_split, new_artifact, open_artifact, read_shards, to_unit, write_shards
from diffstill.config import EncodeConfig
from diffstill.errors import DiffstillError
from diffstill.networks import Generator, load_generator
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


# --- against the plain way ---------------------------------------------------------------------------------------


def in_memory(config: EncodeConfig, images: Artifact, generator: Path, folder: Path) -> Path:
    """All images and all moments at once: what streaming must give, byte for byte."""
    opened, folder = load_generator(generator), folder / "in memory"
    folder.mkdir()
    for split in ("train", "val"):
        pixels, labels = load_split(images, split)
        means, stds = [], []
        for piece in range(0, len(pixels), config.shard_size):
            own = pixels[piece : piece + config.shard_size]
            for start in range(0, len(own), config.batch_size):
                batch = torch.from_numpy(to_unit(own[start : start + config.batch_size]))
                with torch.no_grad():
                    views = [opened.encode(view) for view in ((batch, batch.flip(-1)) if images.facts["flip"] else (batch,))]
                means.append(torch.stack([mean for mean, _ in views], 1).half().numpy())
                stds.append(torch.stack([std for _, std in views], 1).half().numpy())
        write_shards(folder, split, {"mean": np.concatenate(means), "std": np.concatenate(stds), "labels": labels}, config.shard_size)
    return folder


def shards(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(("batch_size", "shard_size"), [(32, 96), (17, 50), (100, 7), (500, 500)])
def test_streaming_gives_the_bytes_of_the_plain_way(tiny_chain: Chain, tmp_path: Path, batch_size: int, shard_size: int) -> None:
    config, generator = EncodeConfig(batch_size=batch_size, shard_size=shard_size), tiny_chain.artifacts / "generator"
    metrics = encode(config, images=tiny_chain.artifacts / "images", generator=generator, latents=tmp_path / "latents")
    plain = in_memory(config, open_artifact(tiny_chain.artifacts / "images", "images"), generator, tmp_path)
    assert shards(tmp_path / "latents") == shards(plain)
    facts = open_artifact(tmp_path / "latents", "latents").facts
    mean = read_shards(plain, "train")["mean"].astype(np.float64)
    assert metrics["latent_std"] == pytest.approx(mean.std() * facts["scaling_factor"], rel=1e-9)


def test_both_flips_stream_too(tiny_chain: Chain, tmp_path: Path) -> None:
    images, config = flippable(tiny_chain, tmp_path / "images"), EncodeConfig(batch_size=3, shard_size=4)
    encode(config, images=images.folder, generator=tiny_chain.artifacts / "generator", latents=tmp_path / "latents")
    assert shards(tmp_path / "latents") == shards(in_memory(config, images, tiny_chain.artifacts / "generator", tmp_path))


@pytest.mark.parametrize("value", [torch.nan, 1e9])
def test_latents_that_are_no_float16_are_refused(tiny_chain: Chain, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, done = Generator.encode, 0

    def spoilt(self: Generator, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal done
        mean, std = whole(self, images)
        if done <= 21 < done + len(images):
            mean[21 - done, 2] = value
        done += len(images)
        return mean, std

    monkeypatch.setattr(Generator, "encode", spoilt)
    inputs = {name: tiny_chain.artifacts / name for name in ("images", "generator")}
    with pytest.raises(DiffstillError, match=r"image 21 of train: the mean of its latent is (nan|inf), .* set `encode.precision: float32`"):
        encode(EncodeConfig(batch_size=8, shard_size=16), **inputs, latents=tmp_path / "latents")
    assert not (tmp_path / "latents").exists()


def test_latents_that_are_all_alike_are_refused(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "encode", lambda self, images: (images.new_ones(len(images), 4, 4, 4),) * 2)
    inputs = {name: tiny_chain.artifacts / name for name in ("images", "generator")}
    with pytest.raises(DiffstillError, match="the deviation 0: the autoencoder tells no image from another"):
        encode(tiny_chain.params.encode, **inputs, latents=tmp_path / "latents")


def test_bf16_rounds_and_is_no_other_result(tiny_chain: Chain, tmp_path: Path) -> None:
    config = tiny_chain.params.encode.model_copy(update={"precision": "bf16"})
    encode(config, images=tiny_chain.artifacts / "images", generator=tiny_chain.artifacts / "generator", latents=tmp_path / "latents")
    exact, rounded = (read_shards(folder, "train") for folder in (tiny_chain.artifacts / "latents", tmp_path / "latents"))
    assert np.array_equal(exact["labels"], rounded["labels"])
    for name in ("mean", "std"):
        assert rounded[name].dtype == np.float16
        difference = np.abs(exact[name].astype(np.float32) - rounded[name].astype(np.float32))
        assert 0 < difference.max() < 0.05 * np.abs(exact[name]).max()  # bf16 keeps eight bits


# --- killed and resumed ------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from diffstill.config import EncodeConfig
from diffstill.stages import encode

whole = encode._moments
def slowly(*given, **named):
    time.sleep(0.05)
    return whole(*given, **named)
encode._moments = slowly
encode.encode(EncodeConfig.model_validate_json(sys.argv[1]), images=Path(sys.argv[2]), generator=Path(sys.argv[3]), latents=Path(sys.argv[4]))
"""


class Bar:
    """Remembers how bars were opened, counts, and raises after `last` images."""

    def __init__(self, last: float = float("inf")) -> None:
        self.opened: list[tuple[object, ...]] = []
        self.done, self.last = 0, last

    @contextmanager
    def progress(self, *opened: object) -> Iterator[Bar]:
        self.opened.append(opened)
        yield self

    def update(self, n: int = 1) -> None:
        self.done += n
        if self.done > self.last:
            raise KeyboardInterrupt


def test_a_killed_run_goes_on_where_it_was_with_the_same_bytes(tiny_chain: Chain, tmp_path: Path) -> None:
    config = EncodeConfig(batch_size=8, shard_size=16)
    inputs = {name: tiny_chain.artifacts / name for name in ("images", "generator")}
    command = [sys.executable, "-c", SLOW, config.model_dump_json(), str(inputs["images"]), str(inputs["generator"]), str(tmp_path / "latents")]
    with subprocess.Popen(command) as running:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "work").glob("encode-*/*.safetensors"))) < 3:
            assert running.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
    assert not (tmp_path / "latents").exists()
    kept, bar = len(list((tmp_path / "work").glob("encode-*/*.safetensors"))), Bar()
    metrics = encode(config, **inputs, latents=tmp_path / "latents", record=bar)
    ((_, total, _, done),) = bar.opened
    assert (done, bar.done) == (16 * kept, total - 16 * kept)
    assert metrics["encoded"] == total
    plain = in_memory(config, open_artifact(inputs["images"], "images"), inputs["generator"], tmp_path)
    assert shards(tmp_path / "latents") == shards(plain)
    assert list((tmp_path / "work").glob("encode-*/*")) == []


def test_an_interrupted_shard_goes_on_by_itself(tiny_chain: Chain, tmp_path: Path) -> None:
    config = EncodeConfig(batch_size=8, shard_size=16)
    inputs = {name: tiny_chain.artifacts / name for name in ("images", "generator")}
    parts = [tmp_path / f"part-{number}" for number in range(2)]
    for number, part in enumerate(parts):
        with pytest.raises(KeyboardInterrupt):
            encode(config, **inputs, latents=part, shard=f"{number}/2", record=Bar(last=40))
    for number, part in enumerate(parts):
        bar = Bar()
        encode(config, **inputs, latents=part, shard=f"{number}/2", record=bar)
        assert bar.opened[0][3] == 32
    encode(config, **inputs, latents=tmp_path / "latents", parts=parts)
    encode(config, **inputs, latents=tmp_path / "undisturbed")
    assert contents(tmp_path / "latents") == contents(tmp_path / "undisturbed")


def test_a_damaged_piece_is_encoded_again(tiny_chain: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = EncodeConfig(batch_size=8, shard_size=16)
    inputs = {name: tiny_chain.artifacts / name for name in ("images", "generator")}
    with pytest.raises(KeyboardInterrupt):
        encode(config, **inputs, latents=tmp_path / "latents", record=Bar(last=40))
    first, _ = sorted((tmp_path / "work").rglob("*.safetensors"))
    flip(first)
    bar = Bar()
    encode(config, **inputs, latents=tmp_path / "latents", record=bar)
    assert bar.opened[0][3] == 16
    assert len(caplog.messages) == 1
    encode(config, **inputs, latents=tmp_path / "undisturbed")
    assert contents(tmp_path / "latents") == contents(tmp_path / "undisturbed")


def test_memory_does_not_grow_with_the_number_of_images(tiny_chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image's pixels are 64 bytes, its moments 256; all that may grow is a label or two of 8 bytes."""
    source = open_artifact(tiny_chain.artifacts / "images", "images")

    def peak(images: int) -> int:
        with new_artifact(tmp_path / "images", "images", tiny_chain.params.prepare, {}) as draft:
            for split in ("train", "val"):
                write_shards(draft.folder, split, {"pixels": np.zeros((images, 1, 8, 8), np.uint8), "labels": np.zeros(images, np.int64)}, 200)
            draft.facts |= source.facts
        tracemalloc.start()
        encode(
            EncodeConfig(batch_size=200, shard_size=200),
            images=tmp_path / "images",
            generator=tiny_chain.artifacts / "generator",
            latents=tmp_path / "latents",
        )
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # files are hashed in threads with buffers of a quarter of a megabyte, as many as happen to run at once: not what is asked here
    monkeypatch.setattr("diffstill.artifacts.file_digest", lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
    small = peak(1000)
    assert (peak(5000) - small) / 4000 < 100  # to hold the pixels of both splits would take 128, their moments 512
