"""Weights on the Hugging Face hub: pinned to a commit, fetched once, recorded; errors in one message. Its own client, a small server."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from chains import Chain, contents, flip
from diffstill import references
from diffstill.artifacts import open_artifact
from diffstill.config import preset, render_params
from diffstill.errors import DiffstillError, TransientError
from diffstill.references import HubReference, parse
from hub import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_location_names_repository_and_revision() -> None:
    assert parse("hf://facebook/DiT-XL-2-256@main") == HubReference("facebook/DiT-XL-2-256", "main")
    assert str(parse("hf://facebook/DiT-XL-2-256@main")) == "hf://facebook/DiT-XL-2-256@main"
    for wrong in ("hf://facebook/DiT-XL-2-256", "hf:facebook/DiT@main", "hf://DiT@main", "hf://a/b/c@main", "hf://a/b@"):
        with pytest.raises(DiffstillError, match=r"is not hf://<owner>/<repository>@<branch, tag or commit>"):
            parse(wrong)


def pretrain(chain: Chain, folder: Path, location: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`diffstill pretrain` in a process of its own, since the hub's client reads its settings when it is imported."""
    config = preset("tiny").pretrain.model_copy(update={"source": "folder", "location": location})
    (folder / "params.yaml").write_text(render_params(preset("tiny").model_copy(update={"pretrain": config})))
    command = [sys.executable, "-m", "diffstill", "pretrain", f"--images={chain.artifacts / 'images'}", "--generator=generator"]
    around = {**os.environ, "MLFLOW_TRACKING_URI": "none", "DIFFSTILL_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf"), **environment}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False, env=around)


def test_weights_are_pinned_fetched_once_and_recorded(tiny_chain: Chain, tmp_path: Path) -> None:
    source = tiny_chain.artifacts / "generator"
    with hub(source, "someone/DiT-tiny", {"main": COMMIT}) as (url, seen):
        done = pretrain(tiny_chain, tmp_path, "hf://someone/DiT-tiny@main", HF_ENDPOINT=url)
        assert done.returncode == 0, done.stderr
        made = open_artifact(tmp_path / "generator", "generator")
        assert made.manifest.config["location"] == f"hf://someone/DiT-tiny@{COMMIT}"
        ours, theirs = contents(tmp_path / "generator"), contents(source)
        assert {name: ours[name] for name in ours if name.startswith(("transformer/", "vae/"))} == {
            name: theirs[name] for name in theirs if name.startswith(("transformer/", "vae/"))
        }
        loaded = [one for one in seen if one.startswith("GET") and one.endswith(".safetensors")]
        assert len(loaded) == 2
        assert not any(one.endswith(".png") for one in seen)
        again = pretrain(tiny_chain, tmp_path, f"hf://someone/DiT-tiny@{COMMIT}", HF_ENDPOINT=url)
        assert again.returncode == 0, again.stderr
        assert [one for one in seen if one.startswith("GET") and one.endswith(".safetensors")] == loaded
        damaged = next((tmp_path / "cache" / "hub").rglob("vae/*.safetensors")).resolve()
        flip(damaged)
        mended = pretrain(tiny_chain, tmp_path, f"hf://someone/DiT-tiny@{COMMIT}", HF_ENDPOINT=url)
        assert mended.returncode == 0, mended.stderr
        assert mended.stderr.count("was changed since it was downloaded; downloaded again") == 1
    assert open_artifact(tmp_path / "generator", "generator").digest == made.digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("location", "environment", "told"),
    [
        ("hf://someone/DiT-tiny@none", {}, "hf://someone/DiT-tiny@none: cannot be had from the hub"),
        ("hf://someone/other@main", {}, "hf://someone/other@main: cannot be had from the hub"),
        ("hf://someone/DiT-tiny@main", {"HF_TOKEN": "hf_wrongwrongwrong"}, "HF_TOKEN if the repository wants one"),
        ("hf://someone/DiT-tiny@main", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be had from the hub"),
    ],
)
def test_what_cannot_be_had_is_one_message(tiny_chain: Chain, tmp_path: Path, location: str, environment: dict[str, str], told: str) -> None:
    token = "hf_right" if "HF_TOKEN" in environment else None
    with hub(tiny_chain.artifacts / "generator", "someone/DiT-tiny", {"main": COMMIT}, token) as (url, _):
        done = pretrain(tiny_chain, tmp_path, location, **{"HF_ENDPOINT": url, **environment})
    assert (done.returncode, told in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
    assert "hf_wrong" not in done.stderr
    assert not (tmp_path / "generator").exists()


@pytest.mark.parametrize(
    ("status", "kind"), [(None, TransientError), (503, TransientError), (429, TransientError), (401, DiffstillError), (404, DiffstillError)]
)
def test_a_hub_that_is_away_may_be_asked_again(status: int | None, kind: type[DiffstillError]) -> None:
    """Its client says of both that a file is not here."""
    cause = references.hub_failure()("no route to host")
    if status:
        cause.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    with pytest.raises(DiffstillError) as caught, references._hub_errors(HubReference("someone/DiT-tiny", "main")):
        raise LocalEntryNotFoundError("not in the cache") from cause
    assert type(caught.value) is kind
