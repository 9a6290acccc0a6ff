"""Artifacts: whole or absent, verified when opened, equal bytes for equal work."""

import errno
import json
import os
import re
import shutil
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from safetensors.numpy import save_file

from chains import contents
from diffstill import environment
from diffstill.artifacts import (
    ANCESTORS,
    MANIFEST,
    Rows,
    WorkFolder,
    ancestors,
    new_artifact,
    open_artifact,
    read_ahead,
    read_shards,
    refuse_foreign,
    to_pixels,
    to_unit,
    write_shards,
)
from diffstill.config import PrepareConfig, SampleConfig
from diffstill.environment import code_version
from diffstill.errors import DiffstillError


def write(folder: Path, text: str = "one", kind="images", config=None, inputs=None, facts=None):
    with new_artifact(folder, kind, config or PrepareConfig(), inputs or {}) as draft:
        (draft.folder / "deep").mkdir()
        (draft.folder / "deep" / "a.txt").write_text(text)
        (draft.folder / "b.txt").write_text("b")
        draft.facts.update(facts or {"classes": ["0", "1"]})
    return open_artifact(folder, kind)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "root" / "images"


# --- written ------------------------------------------------------------------------------------------------------


def test_an_artifact_tells_what_it_is_made_of(folder, tmp_path):
    first = write(folder)
    made = write(tmp_path / "root" / "set", "set", "distilled", SampleConfig(guidance=2.0), {"generator": first}, {"seeds": [0]})
    assert made.manifest.kind == "distilled"
    assert made.manifest.config["guidance"] == 2.0
    assert made.manifest.inputs == {"generator": first.digest}
    assert made.facts == {"seeds": [0]}
    assert made.manifest.files == {name: digest for name, digest in contents(made.folder).items() if name != MANIFEST}


def test_equal_work_gives_equal_bytes_wherever_and_in_whatever_order(folder, tmp_path):
    write(folder)
    with new_artifact(tmp_path / "elsewhere", "images", PrepareConfig(), {}) as draft:
        draft.facts["classes"] = ["0", "1"]
        (draft.folder / "b.txt").write_text("b")
        (draft.folder / "deep").mkdir()
        (draft.folder / "deep" / "a.txt").write_text("one")
    assert contents(tmp_path / "elsewhere") == contents(folder)
    text = (folder / MANIFEST).read_text()
    assert str(tmp_path) not in text
    assert os.uname().nodename not in text


@pytest.mark.parametrize(
    "changes",
    [{"text": "two"}, {"config": PrepareConfig(side=9)}, {"facts": {"classes": ["1", "0"]}}],
    ids=["content", "config", "facts"],
)
def test_the_digest_tells_different_work_apart(changes, folder, tmp_path):
    assert write(folder).digest != write(tmp_path / "other", **changes).digest


def test_the_digest_reaches_back_to_the_inputs(folder, tmp_path):
    first, second = write(folder, "one"), write(tmp_path / "second", "two")
    digests = {
        write(tmp_path / f"set-{number}", "same", "distilled", SampleConfig(), {"generator": given}).digest
        for number, given in enumerate((first, second))
    }
    assert len(digests) == 2


@pytest.mark.parametrize(("umask", "modes"), [(0o022, {"0o755", "0o644"}), (0o077, {"0o700", "0o600"}), (0o002, {"0o775", "0o664"})])
def test_modes_are_those_of_new_files_and_folders_whoever_wrote(folder, umask, modes):
    before = os.umask(umask)
    try:
        with new_artifact(folder, "images", PrepareConfig(), {}) as draft:
            (draft.folder / "part").mkdir(mode=0o755)
            (draft.folder / "part" / "file").write_text("")
            for name, mode in {"secretive": 0o600, "free": 0o666}.items():
                (draft.folder / name).write_text("")
                (draft.folder / name).chmod(mode)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (folder, *folder.rglob("*"))} == modes
    assert not list(folder.glob(".*"))


# --- whole or absent ----------------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """Like a KeyboardInterrupt."""


def fail_half_way(folder: Path, error: type[BaseException]) -> None:
    with new_artifact(folder, "images", PrepareConfig(), {}) as draft:
        (draft.folder / "half.txt").write_text("half")
        raise error


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_a_failed_block_leaves_nothing(error, folder):
    with pytest.raises(error):
        fail_half_way(folder, error)
    assert names(folder.parent) == []


@pytest.mark.parametrize("error", [ValueError, Interrupted])
def test_a_failed_block_leaves_the_earlier_artifact_as_it_was(error, folder):
    write(folder, "earlier")
    before = contents(folder.parent)
    with pytest.raises(error):
        fail_half_way(folder, error)
    assert contents(folder.parent) == before
    assert names(folder.parent) == ["images"]


def test_success_replaces_the_earlier_artifact_and_leaves_no_litter(folder):
    write(folder, "earlier")
    assert (write(folder, "later").folder / "deep" / "a.txt").read_text() == "later"
    assert names(folder.parent) == ["images"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failure_between_the_two_renames_loses_nothing(failing, folder, monkeypatch):
    """The earlier artifact has already stepped aside when the second rename fails: it comes back."""
    write(folder, "earlier")
    before, renames, rename = contents(folder.parent), [], Path.rename

    def fail_once(path, target):
        renames.append(path)
        if len(renames) == failing:
            raise Interrupted
        return rename(path, target)

    with monkeypatch.context() as world:
        world.setattr(Path, "rename", fail_once)
        with pytest.raises(Interrupted), new_artifact(folder, "images", PrepareConfig(), {}):
            pass
    assert contents(folder.parent) == before
    assert names(folder.parent) == ["images"]


def test_a_reader_sees_the_earlier_artifact_until_the_later_is_whole(folder):
    earlier = write(folder, "earlier")
    with new_artifact(folder, "images", PrepareConfig(), {}) as draft:
        (draft.folder / "half.txt").write_text("half")
        assert open_artifact(folder, "images").digest == earlier.digest
    assert open_artifact(folder, "images").digest != earlier.digest


# --- refused as output --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["thesis.tex", MANIFEST])
def test_a_folder_of_someone_else_is_never_replaced(name, folder):
    """Not even if it has a manifest.json, as web extensions have."""
    folder.mkdir(parents=True)
    (folder / name).write_text('{"name": "an extension", "manifest_version": 3}')
    before = contents(folder)
    with pytest.raises(DiffstillError, match="exists and is not an artifact; refusing to replace it"):
        refuse_foreign(folder)
    with pytest.raises(DiffstillError, match="exists and is not an artifact; refusing to replace it"):
        write(folder)
    assert contents(folder) == before


def test_a_file_is_never_replaced(folder):
    folder.parent.mkdir()
    folder.write_text("a file")
    with pytest.raises(DiffstillError, match="exists and is not an artifact"):
        write(folder)
    assert folder.read_text() == "a file"


def test_an_artifact_of_another_kind_is_never_replaced(folder):
    write(folder)
    before = contents(folder)
    with pytest.raises(DiffstillError, match="holds a `images` artifact; refusing to replace it by `distilled`"):
        write(folder, kind="distilled", config=SampleConfig())
    assert contents(folder) == before


def test_an_empty_folder_and_one_of_an_older_schema_are_replaced(folder):
    folder.mkdir(parents=True)
    write(folder)
    edit(folder, lambda manifest: manifest | {"schema_version": 0})
    assert write(folder, "later").manifest.schema_version == 1


# --- refused as input ---------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip_a_bit(folder / "deep" / "a.txt"), "deep/a.txt: content differs from the digest in its manifest"),
        (lambda folder: (folder / "b.txt").unlink(), "b.txt: listed in the manifest but missing"),
        (lambda folder: (folder / "deep" / "c.txt").touch(), "deep/c.txt: not listed in the manifest; remove it"),
        (lambda folder: (folder / MANIFEST).unlink(), "images: has no manifest.json, so it is no artifact; expected the `images` artifact"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json: not a manifest of schema 1"),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff"), "manifest.json: not a manifest of schema 1"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "holds a `None` artifact where `images` is expected"),
        (lambda folder: edit(folder, lambda manifest: manifest | {"schema_version": 2}), "manifest.json: not a manifest of schema 1"),
        (lambda folder: edit(folder, lambda manifest: manifest | {"host": "here"}), "manifest.json: not a manifest of schema 1"),
        (lambda folder: edit(folder, lambda manifest: manifest | {"kind": "scores"}), "holds a `scores` artifact where `images` is expected"),
        (lambda folder: edit(folder, lambda manifest: manifest | {"files": {}}), "b.txt: not listed in the manifest"),
        (lambda folder: edit(folder, lambda manifest: manifest | {"files": {"../x": "0"}}), "names '../x' in `files`"),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), "manifest.json: not a manifest of schema 1"),
    ],
)
def test_damage_is_found_and_named(damage, message, folder):
    write(folder)
    damage(folder)
    with pytest.raises(DiffstillError) as refusal:
        open_artifact(folder, "images")
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_kind_and_an_absent_folder_are_refused(folder):
    write(folder)
    with pytest.raises(DiffstillError, match="holds a `images` artifact where `latents` is expected; pass the `latents` folder"):
        open_artifact(folder, "latents")
    with pytest.raises(DiffstillError, match=r"absent: does not exist; expected the `images` artifact; run the stage that makes it first"):
        open_artifact(folder.parent / "absent", "images")


# --- ancestors ----------------------------------------------------------------------------------------------------


def kept(folder: Path) -> set[str]:
    return {path.stem for path in (folder / ANCESTORS).glob("*.json")}


@pytest.fixture
def family(tmp_path):
    """Images, a generator made from them, and a set made from both."""
    images = write(tmp_path / "images")
    generator = write(tmp_path / "generator", "weights", "generator", SampleConfig(), {"images": images})
    made = write(tmp_path / "set", "set", "distilled", SampleConfig(), {"generator": generator, "images": images})
    return images, generator, made


def test_an_artifact_has_the_manifests_of_all_that_it_comes_from(family):
    images, generator, made = family
    assert not (images.folder / ANCESTORS).exists()
    assert kept(generator.folder) == {images.digest}
    assert kept(made.folder) == {images.digest, generator.digest}
    assert ancestors(made) == {images.digest: images.manifest, generator.digest: generator.manifest}
    assert ancestors(images) == {}
    assert (made.folder / ANCESTORS / f"{images.digest}.json").read_bytes() == (images.folder / MANIFEST).read_bytes()


@given(st.lists(st.sets(st.integers(0, 6)), min_size=1, max_size=7))
@settings(max_examples=15)
def test_ancestors_are_all_that_can_be_reached(tmp_path_factory, wanted):
    """Node k of a random graph is made from earlier nodes; the reference walks the graph."""
    root, made = tmp_path_factory.mktemp("graph"), []
    origins = [sorted(one for one in sources if one < node) for node, sources in enumerate(wanted)]
    for node, sources in enumerate(origins):
        inputs = {f"input-{one}": made[one] for one in sources}
        made.append(write(root / str(node), f"text {node}", config=PrepareConfig(seed=node), inputs=inputs))

    def reached(node: int) -> set[int]:
        return set(origins[node]).union(*map(reached, origins[node]))

    for node, artifact in enumerate(made):
        expected = {made[one].digest for one in reached(node)}
        assert set(ancestors(artifact)) == expected == kept(artifact.folder)


def test_ancestors_are_verified_with_the_other_files(family):
    images, _, made = family
    flip_a_bit(made.folder / ANCESTORS / f"{images.digest}.json")
    with pytest.raises(DiffstillError, match=rf"{ANCESTORS}/{images.digest}\.json: content differs from the digest"):
        open_artifact(made.folder, "distilled")


def change_a_fact(path: Path) -> None:
    path.write_text(path.read_text().replace('"classes"', '"klasses"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "missing, so the lineage has a gap; make the artifact anew with this version of diffstill"),
        (change_a_fact, "has another digest than its name says"),
        (lambda path: path.write_text("{"), "not a manifest of schema 1"),
        (lambda path: path.write_bytes(b"\xff"), "not a manifest of schema 1"),
    ],
    ids=["missing", "changed", "no JSON", "no text"],
)
def test_a_damaged_ancestor_is_one_clear_message(family, damage, message):
    images, _, made = family
    damage(made.folder / ANCESTORS / f"{images.digest}.json")
    with pytest.raises(DiffstillError, match=message) as refusal:
        ancestors(made)
    assert f"set/{ANCESTORS}/{images.digest}.json: " in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_gap_further_back_shows_in_what_is_made_from_it(family, tmp_path):
    """As when an input was made by a release that kept no ancestors."""
    images, generator, _ = family
    (generator.folder / ANCESTORS / f"{images.digest}.json").unlink()
    made = write(tmp_path / "later", "set", "distilled", SampleConfig(), {"generator": generator})
    with pytest.raises(DiffstillError, match=rf"later/{ANCESTORS}/{images.digest}\.json: missing, so the lineage has a gap"):
        ancestors(made)


# --- shards -------------------------------------------------------------------------------------------------------

DTYPES = st.sampled_from([np.uint8, np.int64, np.float16, np.float32])


@st.composite
def columns(draw):
    rows = draw(st.integers(1, 12))
    shapes = st.lists(st.integers(0, 3), max_size=3).map(lambda rest: (rows, *rest))
    names = draw(st.lists(st.sampled_from(["pixels", "labels", "mean", "std"]), min_size=1, unique=True))
    return {name: draw(arrays_of.arrays(draw(DTYPES), draw(shapes))) for name in names}


@given(columns(), st.integers(1, 14))
def test_shards_are_joined_as_they_were_cut(tmp_path_factory, arrays, shard_size):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, "train", arrays, shard_size)
    rows = len(next(iter(arrays.values())))
    assert len(list(folder.iterdir())) == -(-rows // shard_size)
    joined = read_shards(folder, "train")
    assert joined.keys() == arrays.keys()
    for name, array in arrays.items():
        assert joined[name].dtype == array.dtype
        np.testing.assert_array_equal(joined[name], array)


def test_strided_arrays_and_many_shards_keep_their_order(tmp_path):
    array = np.arange(60).reshape(30, 2)[:, ::-1]
    write_shards(tmp_path, "train", {"x": array}, 1)
    np.testing.assert_array_equal(read_shards(tmp_path, "train")["x"], array)
    (tmp_path / "train-00028.safetensors").rename(tmp_path / "train-99999.safetensors")
    (tmp_path / "train-00029.safetensors").rename(tmp_path / "train-100000.safetensors")
    np.testing.assert_array_equal(read_shards(tmp_path, "train")["x"], array)


def test_splits_do_not_mix_and_absent_shards_are_refused(tmp_path):
    write_shards(tmp_path, "train", {"x": np.zeros(3)}, 2)
    write_shards(tmp_path, "train-more", {"x": np.ones(3)}, 2)
    assert read_shards(tmp_path, "train")["x"].sum() == 0
    with pytest.raises(DiffstillError, match=r"has no shard val-\*.safetensors"):
        read_shards(tmp_path, "val")


@given(arrays=st.data())
def test_rows_are_those_of_the_whole_array(tmp_path_factory, arrays):
    folder = tmp_path_factory.mktemp("rows")
    whole = np.arange(arrays.draw(st.integers(1, 40), "rows") * 6, dtype=arrays.draw(st.sampled_from([np.uint8, np.int64, np.float16]))).reshape(
        -1, 2, 3
    )
    write_shards(folder, "train", {"x": whole, "y": whole[:, 0, 0].copy()}, arrays.draw(st.integers(1, 45), "shard size"))
    rows = Rows(folder, "train", "x")
    assert (len(rows), rows.shape) == (len(whole), whole.shape)
    start, stop = arrays.draw(st.integers(0, 45), "start"), arrays.draw(st.integers(0, 45), "stop")
    chosen = np.array(arrays.draw(st.lists(st.integers(0, len(whole) - 1))), np.int64)
    for wanted in (slice(start, stop), slice(None), chosen):
        np.testing.assert_array_equal(rows[wanted], whole[wanted])
        assert (rows[wanted].dtype, rows[wanted].shape) == (whole.dtype, whole[wanted].shape)
    np.testing.assert_array_equal(Rows(folder, "train", "y")[:], whole[:, 0, 0])


def test_rows_pass_over_empty_shards_and_refuse_what_is_not_there(tmp_path):
    for number, rows in enumerate((0, 3, 0, 0, 2, 0)):
        save_file({"x": np.full((rows, 2), number)}, tmp_path / f"train-{number:05d}.safetensors")
    np.testing.assert_array_equal(Rows(tmp_path, "train", "x")[:][:, 0], [1, 1, 1, 4, 4])
    np.testing.assert_array_equal(Rows(tmp_path, "train", "x")[np.array([4, 0])][:, 0], [4, 1])
    with pytest.raises(IndexError):
        Rows(tmp_path, "train", "x")[np.array([5])]
    with pytest.raises(DiffstillError, match=r"has no shard val-\*.safetensors"):
        Rows(tmp_path, "val", "x")


def test_few_rows_are_read_without_the_rest(tmp_path):
    write_shards(tmp_path, "train", {"x": np.zeros((4000, 1000), np.uint8)}, 500)
    tracemalloc.start()
    Rows(tmp_path, "train", "x")[np.arange(0, 4000, 200)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300_000  # 20 rows are 20 kB, twice while they are joined; one shard is 500 kB


def test_what_is_read_ahead_comes_in_order_one_at_a_time_and_ends_well():
    made, closed = [], []

    def numbers():
        try:
            for number in range(9):
                made.append(number)
                yield number
        finally:
            closed.append(True)

    seen = []
    for number in read_ahead(numbers()):
        seen.append(number)
        assert len(made) <= number + 2
    assert (seen, closed) == (list(range(9)), [True])
    reading = read_ahead(numbers())
    next(reading)
    reading.close()
    assert len(made) <= 9 + 3
    assert closed == [True, True]


def test_what_goes_wrong_ahead_is_raised_in_its_place():
    def numbers():
        yield 1
        raise Interrupted

    reading = read_ahead(numbers())
    assert next(reading) == 1
    with pytest.raises(Interrupted):
        next(reading)


def test_pixels_and_unit_range_are_inverse_on_all_values():
    pixels = np.arange(256, dtype=np.uint8)
    unit = to_unit(pixels)
    assert unit.dtype == np.float32
    assert (unit.min(), unit.max()) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_pixels(unit), pixels)


def test_to_pixels_rounds_to_the_nearest_and_clips():
    np.testing.assert_array_equal(to_pixels(np.array([-9.0, 9.0, 0.0039], np.float32)), [0, 255, 128])


# --- what a killed run goes on from -------------------------------------------------------------------------------


def work(config=None, inputs=None, *more) -> WorkFolder:
    return WorkFolder("pretrain", config or SampleConfig(), inputs or {}, *more)


def test_a_checkpoint_is_read_as_it_was_written_and_the_newest_counts():
    arrays = {"weights/0": np.arange(6, dtype=np.float32).reshape(2, 3), "training/done": np.array(7)}
    assert work().load("vae") is None
    work().save("vae", {"weights/0": np.zeros(1)})
    work().save("vae", arrays)
    found = work().load("vae")
    assert found is not None
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) and found[name].dtype == arrays[name].dtype for name in arrays)
    assert [path.name.split(".")[0] for path in work().folder.iterdir()] == ["vae"]


def test_arrays_are_kept_as_they_read_whatever_their_strides():
    array = np.arange(24.0).reshape(2, 3, 4)
    arrays = {"moved": array.transpose(2, 0, 1), "backwards": array[..., ::-1], "number": np.array(7)}
    work().save("vae", arrays)
    found = work().load("vae")
    assert found is not None
    assert all(np.array_equal(found[name], arrays[name]) and found[name].shape == arrays[name].shape for name in arrays)


@pytest.mark.parametrize("links", [True, False])
def test_what_is_kept_is_placed_whole(links, tmp_path, monkeypatch):
    def refuse(*_paths):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    work().save("train-00000", {"x": np.arange(9)})
    assert [work().holds(name) for name in ("train-00000", "train-00001")] == [True, False]
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    work().place("train-00000", tmp_path)
    placed = tmp_path / "train-00000.safetensors"
    assert (placed.stat().st_ino == checkpoint("train-00000").stat().st_ino) == links
    work().clear()
    np.testing.assert_array_equal(read_shards(tmp_path, "train")["x"], np.arange(9))


def checkpoint(name: str) -> Path:
    (path,) = work().folder.glob(f"{name}.*safetensors")
    return path


@pytest.mark.parametrize("place", [0, 9, 60, -1])
def test_a_flipped_byte_anywhere_makes_a_checkpoint_anew(place, caplog):
    """In the header's length, the header, and the values: none of them ends the command, none of them is believed."""
    work().save("vae", {"x": np.zeros(100)})
    content = bytearray(checkpoint("vae").read_bytes())
    content[place] ^= 1
    checkpoint("vae").write_bytes(content)
    again = work()
    assert (again.load("vae"), again.holds("vae")) == (None, False)
    (told,) = caplog.messages
    assert re.fullmatch(r".*vae\..*safetensors: damaged, its digest is another; made again", told)
    again.save("vae", {"x": np.ones(3)})
    assert again.load("vae")["x"].tolist() == [1, 1, 1]
    assert len(list(again.folder.iterdir())) == 1


def test_a_piece_cut_short_is_not_taken_for_a_whole_one():
    work().save("train-00000", {"x": np.zeros(100)})
    checkpoint("train-00000").write_bytes(checkpoint("train-00000").read_bytes()[:-40])
    assert not work().holds("train-00000")


def test_the_checkpoint_before_a_damaged_one_counts_where_it_is_still_there():
    work().save("vae", {"x": np.zeros(1)})
    before, content = checkpoint("vae"), checkpoint("vae").read_bytes()
    work().save("vae", {"x": np.ones(1)})
    newest = checkpoint("vae")
    before.write_bytes(content)
    os.utime(before, ns=(0, 0))
    assert work().load("vae")["x"].tolist() == [1]
    newest.write_bytes(b"")
    assert work().load("vae")["x"].tolist() == [0]


@pytest.mark.parametrize("changed", ["code", "device", "ranks", "settings", "stage", "name"])
def test_a_checkpoint_of_other_work_is_made_again(changed, monkeypatch, caplog):
    """Even one that was copied to where ours would lie, whole as it is."""
    work().save("vae", {"x": np.zeros(1)})
    work().append("finished", {"number": 0})
    source, ours = work().folder, {"code": work, "device": work, "ranks": work}.get(changed)
    if changed == "code":
        monkeypatch.setattr("diffstill.environment.code_version", lambda: "another")
    if changed == "device":
        ours = partial(WorkFolder, "pretrain", SampleConfig(), {}, device="meta")
    if changed == "ranks":
        world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
        for name, value in world.items():
            monkeypatch.setenv(name, value)
    if changed == "settings":
        ours = partial(WorkFolder, "pretrain", SampleConfig(guidance=1.0), {})
    if changed == "stage":
        ours = partial(WorkFolder, "finetune", SampleConfig(), {})
    if changed == "name":
        checkpoint("vae").rename(source / "vae.safetensors")  # as no seal had been kept
        (source / "finished.jsonl").write_text('{"number": 0}\n')
        ours = work
    found = ours()
    if found.folder != source:
        shutil.copytree(source, found.folder)
    assert (found.load("vae"), found.lines("finished")) == (None, [])
    assert len(caplog.messages) <= 2
    assert "by other code, on another kind of device or by another number of processes; made again" in caplog.messages[0]
    found.append("finished", {"number": 1})
    found.save("vae", {"x": np.ones(1)})
    assert (found.load("vae")["x"].tolist(), found.lines("finished")) == ([1], [{"number": 1}])


def test_the_code_is_what_the_package_holds(tmp_path, monkeypatch):
    code_version.cache_clear()
    before = code_version()
    shutil.copytree(Path(environment.__file__).parent, tmp_path / "package", ignore=shutil.ignore_patterns("*.pyc"))
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "package" / "environment.py"))
    code_version.cache_clear()
    assert code_version() == before
    with (tmp_path / "package" / "stages" / "finetune.py").open("a") as file:
        file.write("# another\n")
    code_version.cache_clear()
    assert code_version() != before
    code_version.cache_clear()


def test_a_line_torn_by_a_kill_is_dropped_and_writing_goes_on():
    for number in range(3):
        work().append("finished", {"number": number})
    path = work().folder / "finished.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    assert work().lines("finished") == [{"number": 0}, {"number": 1}]
    work().append("finished", {"number": 9})
    assert work().lines("finished") == [{"number": 0}, {"number": 1}, {"number": 9}]


@pytest.mark.parametrize(
    "edit",
    [lambda line: line.replace("0.25", "0.95"), lambda line: line[1:], lambda line: "5", lambda line: '{"number": 1}', lambda line: "\xff"],
)
def test_an_edited_line_is_dropped_alone_and_told(edit, caplog):
    for number in range(3):
        work().append("finished", {"number": number, "accuracy": 0.25})
    path = work().folder / "finished.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], edit(lines[1]), *lines[2:]]) + "\n", encoding="latin-1")
    again = work()
    assert [line["number"] for line in again.lines("finished")] == [0, 2]
    assert [line["number"] for line in again.lines("finished")] == [0, 2]
    assert len(caplog.messages) == 1
    assert "made again" in caplog.messages[0]
    again.append("finished", {"number": 1})
    assert [line["number"] for line in work().lines("finished")] == [0, 2, 1]


def test_a_line_that_is_there_twice_counts_once():
    work().append("finished", {"number": 0})
    path = work().folder / "finished.jsonl"
    path.write_text(path.read_text() * 3)
    assert work().lines("finished") == [{"number": 0}]


def test_work_is_kept_apart_by_stage_settings_inputs_and_cell(folder, tmp_path):
    first, second = write(folder, "one"), write(tmp_path / "second", "two")
    folders = {
        WorkFolder("finetune", SampleConfig(), {}).folder,
        work().folder,
        work(SampleConfig(guidance=1.0)).folder,
        work(None, {"images": first}).folder,
        work(None, {"images": second}).folder,
        work(None, None, "convnet-2").folder,
    }
    assert len(folders) == 6
    assert work(None, {"images": first}).folder in folders


def test_clearing_forgets_this_work_alone():
    work().save("vae", {"x": np.zeros(1)})
    work(None, None, "other").append("finished", {"number": 0})
    work().clear()
    work().clear()
    assert work().load("vae") is None
    assert work(None, None, "other").lines("finished") == [{"number": 0}]


def test_two_processes_do_not_share_a_work_folder():
    with work(), pytest.raises(DiffstillError, match="another diffstill is at work"), work():
        pass
    with work() as again:  # free again once the first has ended
        again.append("lines", {"a": 1})


def test_a_short_stage_waits_for_the_other(caplog):
    first, second = work(), WorkFolder("pretrain", SampleConfig(), {}, wait=True)
    first.__enter__()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.__enter__)
        time.sleep(0.2)
        assert not waiting.done()
        first.__exit__()
        waiting.result(timeout=10)
    second.__exit__()
    assert "is at work on this very step; waiting until it has finished" in caplog.text


def test_what_a_file_browser_leaves_is_no_damage(tmp_path):
    with new_artifact(tmp_path / "a", "images", SampleConfig(), {}) as draft:
        (draft.folder / "x.txt").write_text("x")
    before = open_artifact(tmp_path / "a", "images").digest
    (tmp_path / "a" / ".DS_Store").write_text("litter")
    assert open_artifact(tmp_path / "a", "images").digest == before
