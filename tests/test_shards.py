"""Cutting work changes nothing: shards gathered are what one process makes, and only a whole cut is gathered."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chains import Chain, contents
from diffstill.artifacts import ancestors, open_artifact, read_shards
from diffstill.config import Params
from diffstill.errors import DiffstillError
from diffstill.shards import Shard, Share
from diffstill.stages.encode import encode
from diffstill.stages.finetune import finetune
from diffstill.stages.sample import sample


@given(st.integers(1, 40), st.integers(0, 100))
def test_every_piece_is_made_by_exactly_one_shard(count: int, pieces: int) -> None:
    shares = [Share.of(f"{index}/{count}", ()).of_pieces(range(pieces)) for index in range(count)]
    assert sorted(piece for own in shares for piece in own) == list(range(pieces))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_a_shard_everything_is_made() -> None:
    assert Share.of(None, ()).of_pieces("abc") == list("abc")
    assert Shard.parse("") is None
    assert str(Shard.parse("1/3")) == "1/3"


@pytest.mark.parametrize("text", ["3/3", "0/0", "-1/3", "1", "1/", "a/b", "0/3 "])
def test_a_malformed_shard_is_refused(text: str) -> None:
    with pytest.raises(DiffstillError, match="counted from 0; the first of three is 0/3"):
        Shard.parse(text)


def shards_of(chain: Chain, folder: Path, stage: str, count: int) -> list[Path]:
    """The artifacts of all shards of encode or sample."""
    made = [folder / f"{stage}-{index}-of-{count}" for index in range(count)]
    for index, place in enumerate(made):
        if stage == "encode":
            encode(chain.params.encode, **inputs(chain, "images", "generator"), latents=place, shard=f"{index}/{count}")
        else:
            sample(chain.params.sample, **inputs(chain, "generator", "denoiser"), distilled=place, shard=f"{index}/{count}")
    return made


def inputs(chain: Chain, *names: str) -> dict[str, Path]:
    return {name: chain.artifacts / name for name in names}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_gathered_latents_are_those_of_one_process(tiny_chain: Chain, tmp_path: Path, count: int) -> None:
    parts = shards_of(tiny_chain, tmp_path, "encode", count)
    metrics = encode(tiny_chain.params.encode, **inputs(tiny_chain, "images", "generator"), latents=tmp_path / "latents", parts=parts)
    assert contents(tmp_path / "latents") == contents(tiny_chain.artifacts / "latents")
    assert metrics["encoded"] == 0
    whole = read_shards(tiny_chain.artifacts / "latents", "train")["mean"].astype(np.float64)
    assert metrics["latent_std"] == pytest.approx(whole.std() * open_artifact(tmp_path / "latents", "latents").facts["scaling_factor"], rel=1e-3)
    files = [len(list(part.glob("*.safetensors"))) for part in parts]
    assert min(files) > 0, "every shard has work"


@pytest.mark.parametrize("count", [1, 3, 7])
def test_gathered_images_are_those_of_one_process(tiny_chain: Chain, tmp_path: Path, count: int) -> None:
    parts = shards_of(tiny_chain, tmp_path, "sample", count)
    assert sum(len(list(part.rglob("*.png"))) for part in parts) == 2 * 3 * 2
    sample(tiny_chain.params.sample, **inputs(tiny_chain, "generator", "denoiser"), distilled=tmp_path / "distilled", parts=parts[::-1])
    assert contents(tmp_path / "distilled") == contents(tiny_chain.artifacts / "distilled")


def test_a_gathered_artifact_knows_where_it_comes_from(tiny_chain: Chain, tmp_path: Path) -> None:
    parts = shards_of(tiny_chain, tmp_path, "sample", 2)
    sample(tiny_chain.params.sample, **inputs(tiny_chain, "generator", "denoiser"), distilled=tmp_path / "distilled", parts=parts)
    whole = ancestors(open_artifact(tmp_path / "distilled", "distilled"))
    assert sorted(manifest.kind for manifest in whole.values()) == ["denoiser", "generator", "images", "latents"]
    assert all(ancestors(open_artifact(part, "distilled", shard=True)) == whole for part in parts)


def test_more_shards_than_work_leave_empty_ones(tiny_chain: Chain, tmp_path: Path) -> None:
    last = shards_of(tiny_chain, tmp_path, "sample", 7)[-1]
    assert open_artifact(last, "distilled", shard=True).facts["shard"] == "6/7"
    assert list(last.rglob("*.png")) == []


def test_a_shard_is_not_taken_for_the_whole(tiny_chain: Chain, tmp_path: Path) -> None:
    part = shards_of(tiny_chain, tmp_path, "encode", 2)[0]
    with pytest.raises(DiffstillError, match=r"encode-0-of-2: holds only shard 0/2 of a `latents` artifact"):
        finetune(tiny_chain.params.finetune, latents=part, generator=tiny_chain.artifacts / "generator", denoiser=tmp_path / "denoiser")
    with pytest.raises(DiffstillError, match="holds no shard but the whole of a `latents` artifact"):
        encode(
            tiny_chain.params.encode,
            **inputs(tiny_chain, "images", "generator"),
            latents=tmp_path / "out",
            parts=[tiny_chain.artifacts / "latents"],
        )
    assert not (tmp_path / "denoiser").exists()
    assert not (tmp_path / "out").exists()


def test_only_a_whole_cut_is_gathered(tiny_chain: Chain, tmp_path: Path) -> None:
    three, two = (shards_of(tiny_chain, tmp_path, "encode", count) for count in (3, 2))
    for parts in (three[:2], [*three, three[0]], [two[0], three[1]]):
        with pytest.raises(DiffstillError, match="not each of one cut once"):
            encode(tiny_chain.params.encode, **inputs(tiny_chain, "images", "generator"), latents=tmp_path / "out", parts=parts)
    assert not (tmp_path / "out").exists()


def test_shards_of_other_settings_are_refused(tiny_chain: Chain, tmp_path: Path) -> None:
    parts = shards_of(tiny_chain, tmp_path, "sample", 2)
    values = tiny_chain.params.plain()
    values["sample"]["guidance"] = 3.0
    other = Params.model_validate_json(json.dumps(values)).sample
    with pytest.raises(DiffstillError, match=r"sample-0-of-2: was made with other settings or from other inputs"):
        sample(other, **inputs(tiny_chain, "generator", "denoiser"), distilled=tmp_path / "out", parts=parts)
    with pytest.raises(DiffstillError, match="was made with other settings or from other inputs"):
        sample(tiny_chain.params.sample, **inputs(tiny_chain, "generator"), distilled=tmp_path / "out", parts=parts)


def test_a_shard_and_parts_together_are_refused(tiny_chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(DiffstillError, match="make a shard, or gather all of them"):
        sample(tiny_chain.params.sample, **inputs(tiny_chain, "generator"), distilled=tmp_path / "out", parts=[tmp_path], shard="0/1")
