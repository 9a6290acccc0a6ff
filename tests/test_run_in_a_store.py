"""Stages whose inputs, parts and outputs lie in S3, against moto's server."""

import logging

import boto3
import pytest

from chains import Chain, contents
from diffstill import storage
from diffstill.errors import DiffstillError
from diffstill.run import run_stage
from servers import s3, s3_environment


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    with s3(tmp_path) as (url, _):
        for name, value in (s3_environment(url) | {"DIFFSTILL_CACHE": str(tmp_path / "cache")}).items():
            monkeypatch.setenv(name, value)
        boto3.Session().client("s3").create_bucket(Bucket="store")
        yield "s3://store"


def test_inputs_parts_and_outputs_of_a_stage_may_lie_in_a_store(bucket, tiny_chain: Chain, tmp_path):
    """Encoding in two shards, everything in S3, gives the bytes of the chain; nothing is left beside it."""
    for name in ("images", "generator"):
        storage.upload(tiny_chain.artifacts / name, f"{bucket}/{name}")
    given = {"images": f"{bucket}/images", "generator": f"{bucket}/generator"}
    parts = [f"{bucket}/latents-{index}" for index in range(2)]
    for index, part in enumerate(parts):
        run_stage("encode", tiny_chain.params.encode, given | {"latents": part}, shard=f"{index}/2")
    run_stage("encode", tiny_chain.params.encode, given | {"parts": parts, "latents": f"{bucket}/latents"})
    run_stage("encode", tiny_chain.params.encode, given | {"parts": parts, "latents": f"{bucket}/latents"})  # the same again is the same
    assert not [path for path in (tmp_path / "work" / "outgoing").rglob("*") if path.is_file() and path.suffix != ".lock"]
    storage.download(f"{bucket}/latents", tmp_path / "latents")
    assert contents(tmp_path / "latents") == contents(tiny_chain.artifacts / "latents")


def test_an_output_in_a_store_never_replaces_another(bucket, tiny_chain: Chain):
    config = tiny_chain.params.prepare
    run_stage("prepare", config, {"images": f"{bucket}/images"})
    before = storage.listing(f"{bucket}/images")
    with pytest.raises(DiffstillError, match="s3://store/images"):
        run_stage("prepare", config.model_copy(update={"seed": 7}), {"images": f"{bucket}/images"})
    assert storage.listing(f"{bucket}/images") == before


def test_an_input_that_is_not_in_the_store_is_one_message(bucket, tiny_chain: Chain, tmp_path):
    paths = {"images": f"{bucket}/nothing", "generator": tiny_chain.artifacts / "generator", "latents": tmp_path / "latents"}
    with pytest.raises(DiffstillError, match="s3://store/nothing"):
        run_stage("encode", tiny_chain.params.encode, paths)
    assert not (tmp_path / "latents").exists()


@pytest.mark.parametrize(
    "place", ["s3://no-such-bucket/images", "s3://Wrong_name/images", "models:/distilled-digits", "dvc+https://git.example/x?rev=a&path=b"]
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(bucket, tiny_chain: Chain, place, caplog):
    caplog.set_level(logging.INFO, logger="diffstill")
    with pytest.raises(DiffstillError):
        run_stage("prepare", tiny_chain.params.prepare, {"images": place})
    assert "prepare ..." not in caplog.messages
