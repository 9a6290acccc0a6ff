"""Sets made anew from their lineage: the same to the last bit, or the first artifact that is not, with what differs and why.

Altered sets are forged: one manifest of a lineage is changed and every digest after it follows, so that the set looks whole.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML
from safetensors.numpy import load_file, save_file

from chains import contents, enter
from diffstill.artifacts import MANIFEST, Manifest, ancestors, file_digest, open_artifact
from diffstill.cli import main
from diffstill.config import load_params
from diffstill.environment import environment
from diffstill.errors import DiffstillError
from diffstill.lineage import Lineage
from diffstill.pictures import read_png, save_png, to_image
from diffstill.registry import Found, find
from diffstill.reproduce import MARK, Reproduction, _causes, _extent, plain, reproduce, text
from diffstill.run import run_stage

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STEPS = ["images", "generator", "latents", "denoiser", "distilled"]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
GIT = {"GIT_CONFIG_GLOBAL": os.devnull, **{f"GIT_{role}_{what}": "a@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}}


def git(folder: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=folder, env=os.environ | GIT, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A repository with a commit of the code that leaves a trace where it runs, and a working copy that does not run."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    entry = folder / "src" / "diffstill" / "cli.py"
    entry.write_text(f"{entry.read_text()}\nimport os\nPath(os.environ['DIFFSTILL_WORK']).with_name('trace').touch()\n")
    for command in (("init", "-q"), ("add", "src"), ("commit", "-qm", "code")):
        git(folder, *command)
    return folder


@pytest.fixture(scope="module")
def settings(tiny_chain, checkout, tmp_path_factory) -> dict[str, str]:
    """The variables that lead to a registry with one version, which names the commit."""
    folder = tmp_path_factory.mktemp("registry")
    found = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}", "DIFFSTILL_CACHE": str(folder / "cache")}
    with pytest.MonkeyPatch.context() as world:
        enter(world, checkout)
        for name, value in found.items():
            world.setenv(name, value)
        world.setattr("diffstill.registry.code_commit", lambda: git(checkout, "rev-parse", "HEAD"))
        inputs = {name: tiny_chain.artifacts / name for name in ("distilled", "report")}
        run_stage("publish", tiny_chain.params.publish, {**inputs, "card": folder / "card"}, params=tiny_chain.params)
    (checkout / "src" / "diffstill" / "cli.py").write_text("raise RuntimeError('not the commit')\n")
    return found


@pytest.fixture(scope="module")
def made(settings, checkout, tmp_path_factory) -> Reproduction:
    """The version, made anew by a user who stands in the repository."""
    with pytest.MonkeyPatch.context() as world:
        enter(world, checkout)
        for name, value in settings.items():
            world.setenv(name, value)
        return reproduce(find("distilled-digits"), tmp_path_factory.mktemp("made") / "anew")


@pytest.fixture
def found(settings, tmp_path, monkeypatch) -> Found:
    """The version, for a user who stands in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return find("distilled-digits")


def begun(made: Reproduction, folder: Path, found: Found, without: tuple[str, ...] = (), code: str = "the installed diffstill 0.1.0") -> Path:
    """A reproduction of `found` that was interrupted: the artifacts of a finished one, but for some."""
    shutil.copytree(made.folder, folder)
    for name in without:
        shutil.rmtree(folder / "artifacts" / name)
    (folder / MARK).write_text(json.dumps({"distilled": found.digest, "code": code}))
    return folder


Change = Callable[[dict[str, Any]], Any]


def forged(artifacts: Path, folder: Path, name: str, change: Change) -> Found:
    """The set in `artifacts` with another manifest of the artifact `name`, and digests that fit."""
    set_folder = folder / "distilled"
    shutil.copytree(artifacts / "distilled", set_folder)
    original = open_artifact(set_folder, "distilled")
    fitting: dict[str, str] = {}
    for one in Lineage.of(original).artifacts:
        written = one.manifest.text()
        for old, new in fitting.items():
            written = written.replace(old, new)
        raw = json.loads(written)
        if one.name == name:
            change(raw)
        written = Manifest.model_validate(raw).text()
        fitting[one.digest] = sha256(written.encode()).hexdigest()
        (set_folder / "ancestors" / f"{one.digest}.json").unlink(missing_ok=True)
        (set_folder / (MANIFEST if one.name == "distilled" else f"ancestors/{fitting[one.digest]}.json")).write_text(written)
    ancestors(open_artifact(set_folder, "distilled"))
    return Found(str(set_folder), None, {"distilled": set_folder})


def refusal(*arguments, **options) -> str:
    with pytest.raises(DiffstillError) as refused:
        reproduce(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- the same -----------------------------------------------------------------------------------------------------


def test_a_published_set_is_made_anew(made, tiny_chain):
    assert made.matches
    assert [one.name for one in made.artifacts] == STEPS
    told = json.loads(json.dumps(plain(made)))
    assert (told["matches"], told["difference"], list(told["artifacts"])) == (True, None, STEPS)
    for name in STEPS:
        assert contents(made.folder / "artifacts" / name) == contents(tiny_chain.artifacts / name)


def test_only_what_the_set_descends_from_is_made(made):
    assert {path.name for path in (made.folder / "artifacts").iterdir()} == set(STEPS)


def test_the_commit_runs_and_not_what_lies_in_its_working_copy(made, checkout):
    sha = git(checkout, "rev-parse", "HEAD")
    assert (made.code.name, made.code.exact) == (f"commit {sha}", True)
    assert (made.folder / "trace").exists()
    assert git(checkout, "status", "--porcelain", "--untracked-files=no") == "M src/diffstill/cli.py"
    assert {path.name for path in (made.folder / "code").iterdir()} == {"src"}


def test_the_settings_are_those_of_the_set(made, tiny_chain):
    """Exactly, whatever other code makes of them: nothing is added that this version has by default."""
    written = YAML(typ="safe", pure=True).load(made.folder / "params.yaml")
    assert written == {name: tiny_chain.params.section(name).plain() for name in written}
    assert written.keys() == {"prepare", "pretrain", "encode", "finetune", "sample", "evaluate", "report"}
    assert load_params(made.folder / "params.yaml") == tiny_chain.params.model_copy(
        update={"publish": load_params(made.folder / "params.yaml").publish}
    )


def test_it_leaves_no_runs_behind(made, settings):
    from mlflow import MlflowClient

    client = MlflowClient(settings["MLFLOW_TRACKING_URI"])
    names = {run.info.run_name for run in client.search_runs([one.experiment_id for one in client.search_experiments()])}
    assert "publish" in names
    assert not names & {"prepare", "pretrain", "encode", "finetune", "sample"}


def test_it_tells_what_was_reached(made):
    lines = text(made).splitlines()
    assert lines[0] == "distilled-digits/1 is reproduced: every digest is the same"
    assert [line.split() for line in lines[1:6]] == [[one.name, one.digest[:12], "the", "same"] for one in made.artifacts]


def test_the_same_again_makes_only_what_is_missing(made, found, checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(checkout)
    folder = begun(made, tmp_path / "anew", found, ("distilled",), made.code.name)
    for name in STEPS[:-1]:
        (folder / "artifacts" / name / MANIFEST).touch()
    times = {name: (folder / "artifacts" / name / MANIFEST).stat().st_mtime_ns for name in STEPS[:-1]}
    again = reproduce(found, folder)
    assert again.matches
    assert times == {name: (folder / "artifacts" / name / MANIFEST).stat().st_mtime_ns for name in STEPS[:-1]}
    assert contents(folder / "artifacts") == contents(made.folder / "artifacts")


# --- not the same -------------------------------------------------------------------------------------------------


def test_altered_weights_are_named_and_measured(made, tiny_chain, tmp_path):
    """The generator that the set says it is from has one weight more by 0.5, and lies beside it."""
    shutil.copytree(tiny_chain.artifacts / "generator", tmp_path / "altered" / "generator")
    weights = tmp_path / "altered" / "generator" / WEIGHTS
    tensors = load_file(weights)
    tensors[min(tensors)].flat[0] += 0.5
    save_file(tensors, weights)
    weights.chmod(0o644)
    found = forged(tiny_chain.artifacts, tmp_path / "altered", "generator", lambda raw: raw["files"].update({WEIGHTS: file_digest(weights)}))
    (generator,) = [digest for digest, manifest in ancestors(open_artifact(found.folder(), "distilled")).items() if manifest.kind == "generator"]
    shutil.copy(found.folder() / "ancestors" / f"{generator}.json", tmp_path / "altered" / "generator" / MANIFEST)

    result = reproduce(found, begun(made, tmp_path / "anew", found, ("latents", "denoiser", "distilled")))
    assert not result.matches
    assert result.difference.artifact.name == "generator"
    assert result.difference.parts == (f"files: {WEIGHTS} (1 of {len(result.difference.artifact.manifest.files)})",)
    assert result.difference.extent == "the numbers in its safetensors files differ by at most 0.5"
    assert {path.name for path in (result.folder / "artifacts").iterdir()} == {"images", "generator"}, "went on after the first difference"
    lines = text(result).splitlines()
    assert lines[0] == f"{found.ref} is not reproduced: `generator` is the first artifact that comes out different"
    assert [line.split()[2:] for line in lines[1:6]] == [["the", "same"], [result.difference.digest[:12], "here"], *[["not", "made"]] * 3]
    ended = CliRunner().invoke(main, ["reproduce", str(found.folder()), "--folder", str(result.folder), "--device", "cpu"])
    assert (ended.exit_code, "`generator` is the first artifact" in ended.stdout) == (1, True)


def test_an_altered_knob_is_named_with_what_it_did_to_the_images(made, tiny_chain, tmp_path):
    """The set says that it was drawn with another guidance than it was, and one of its images was painted over."""
    painted = "seed-0/1/00000.png"
    shutil.copytree(tiny_chain.artifacts / "distilled", tmp_path / "altered" / "distilled")
    path = tmp_path / "altered" / "distilled" / painted
    save_png(to_image(255 - read_png(path)), path)
    (tmp_path / "altered" / "distilled" / MANIFEST).write_text(
        (tmp_path / "altered" / "distilled" / MANIFEST)
        .read_text()
        .replace(file_digest(tiny_chain.artifacts / "distilled" / painted), file_digest(path))
    )
    found = forged(tmp_path / "altered", tmp_path / "forged", "distilled", lambda raw: raw["config"].update(steps=2))

    result = reproduce(found, begun(made, tmp_path / "anew", found))
    difference = result.difference
    assert difference.artifact.name == "distilled"
    assert difference.parts[0] == "facts: steps is 3 there, 2 here"
    assert painted in difference.parts[-1]
    images = sorted(path.relative_to(tmp_path / "altered") for path in (tmp_path / "altered").glob("distilled/seed-*/*/*.png"))
    sides = [(tmp_path / "altered" / name, result.folder / "artifacts" / name) for name in images]
    gaps = [int(abs(read_png(there).astype(int) - read_png(here)).max()) for there, here in sides]
    assert difference.extent == f"{sum(gap > 0 for gap in gaps)} of 12 images differ, by at most {max(gaps)} of 255"


def test_pixels_that_are_equal_in_other_files_are_told_from_others(tiny_chain, tmp_path):
    """As another release of Pillow or zlib writes them."""
    ours = tiny_chain.artifacts / "distilled"
    shutil.copytree(ours, tmp_path / "theirs")
    names = sorted(open_artifact(ours, "distilled").manifest.files)
    for name in names:
        if name.endswith(".png"):
            to_image(read_png(ours / name)).save(tmp_path / "theirs" / name, compress_level=0)
    assert contents(ours) != contents(tmp_path / "theirs")
    assert _extent(tmp_path / "theirs", ours, names) == "all pixels are equal, only their encoding as PNG is another"
    first = next(name for name in names if name.startswith("seed-0/"))
    pixels = read_png(ours / first).copy()
    pixels.flat[0] ^= 4
    save_png(to_image(pixels), tmp_path / "theirs" / first)
    assert _extent(tmp_path / "theirs", ours, names) == "1 of 12 images differ, by at most 4 of 255"


# --- causes -------------------------------------------------------------------------------------------------------


def with_tags(found: Found, **tags: str) -> Found:
    return replace(found, version=replace(found.version, tags={**found.version.tags, **tags}))


@pytest.mark.parametrize(
    ("sha", "why"),
    [
        (
            "0" * 40,
            f"commit {'0' * 40} of diffstill is neither in the git repository of this folder nor in that of the package; `git fetch` it there",
        ),
        (f"{'a' * 40}-dirty", f"the set names {'a' * 40}-dirty: with changes that no commit has"),
        ("none", "the set names no commit"),
        ("--help", "the set names --help: with changes that no commit has"),
        ("0.0.7", "the set was published with diffstill 0.0.7, install that for the same code"),
    ],
)
def test_without_its_commit_the_installed_code_runs_and_says_so(made, found, tmp_path, sha, why):
    found = with_tags(found, code=sha)
    result = reproduce(found, begun(made, tmp_path / "anew", found))
    assert (result.code.why, result.code.exact, result.code.folder) == (why, False, None)
    assert why in text(result)


@pytest.mark.parametrize(("code", "name"), [("b" * 40, f"commit {'b' * 40}"), ("0.1.0", "diffstill 0.1.0")])
def test_where_the_same_code_is_installed_it_is_the_right_one(code, name, made, found, tmp_path, monkeypatch):
    """Whatever the commit of the project was that used it."""
    monkeypatch.setattr("diffstill.reproduce.code_commit", lambda: code)
    found = with_tags(found, code=code, git_sha="c" * 40)
    result = reproduce(found, begun(made, tmp_path / "anew", found, code=name))
    assert (result.code.name, result.code.exact, result.code.folder) == (name, True, None)


def test_a_version_of_before_names_its_code_by_one_commit(made, found, tmp_path, monkeypatch):
    monkeypatch.setattr("diffstill.reproduce.code_commit", lambda: "b" * 40)
    before = replace(found, version=replace(found.version, tags={name: tag for name, tag in found.version.tags.items() if name != "code"}))
    before = with_tags(before, git_sha="b" * 40)
    assert reproduce(before, begun(made, tmp_path / "anew", found, code=f"commit {'b' * 40}")).code.exact


def test_a_commit_of_a_project_that_only_uses_the_package_has_no_code(made, found, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    for command in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "mine")):
        git(own, *command)
    monkeypatch.chdir(own)
    found = with_tags(found, code=git(own, "rev-parse", "HEAD"))
    assert not reproduce(found, begun(made, tmp_path / "anew", found)).code.exact


def likely(found: Found, result: Reproduction, name: str = "distilled") -> list[str]:
    (artifact,) = [one for one in result.artifacts if one.name == name]
    return list(_causes(found, artifact, result.code, "cpu"))


def test_what_differs_between_the_environments_is_the_likely_cause(made, found):
    there = json.loads(found.version.tags["environment"])
    assert there == environment()
    assert [cause.partition(":")[0] for cause in likely(found, made)] == ["nothing that is known"]
    other = with_tags(found, environment=json.dumps(there | {"torch": "2.0.0", "gpu": "NVIDIA H100"}))
    assert likely(other, made) == [
        "another environment: gpu is NVIDIA H100 there, nothing here",
        f"another environment: torch is 2.0.0 there, {there['torch']} here",
        "perhaps another device: this ran on cpu; on which the set was made is not known",
    ]


def test_other_code_is_a_likely_cause(made, found):
    result = replace(made, code=replace(made.code, name="the installed diffstill 9", why="because", exact=False))
    assert likely(found, result) == ["other code: this is the installed diffstill 9, because"]


# --- what cannot be tried -----------------------------------------------------------------------------------------


def from_folder(location: str) -> Change:
    return lambda raw: raw["config"].update(source="folder", location=location)


def test_a_folder_of_images_that_is_not_here_is_asked_for(tiny_chain, tmp_path):
    relative = forged(tiny_chain.artifacts, tmp_path / "relative", "images", from_folder("data/flowers"))
    told = refusal(relative, tmp_path / "anew")
    assert "`prepare.location` was 'data/flowers'" in told
    assert "--data" in told
    absent = forged(tiny_chain.artifacts, tmp_path / "absent", "images", from_folder(str(tmp_path / "flowers")))
    assert "which is not here" in refusal(absent, tmp_path / "anew")
    assert "--data flowers: no such folder" in refusal(absent, tmp_path / "anew", data="flowers")
    assert not (tmp_path / "anew").exists()


def test_images_that_lie_elsewhere_now_are_taken_from_there(tiny_chain, tmp_path, capfd):
    """And weights; with weights that are none the step after says what is wrong with them, and nothing more is made."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            for number in range(6):
                save_png(
                    to_image(read_png(next(tiny_chain.artifacts.glob("distilled/seed-0/*/*.png"))) // (number + 1)),
                    tmp_path / f"moved/{split}/{name}/{number}.png",
                )
    config = tiny_chain.params.prepare.model_copy(update={"source": "folder", "location": "flowers", "classes": None})
    run_stage("prepare", config, {"images": tmp_path / "images", "data": tmp_path / "moved"})
    real = open_artifact(tmp_path / "images", "images")
    forged(tiny_chain.artifacts, tmp_path / "first", "images", lambda raw: (raw.clear(), raw.update(json.loads(real.manifest.text()))))
    found = forged(tmp_path / "first", tmp_path / "second", "generator", from_folder("dit"))
    assert "`pretrain.location` was 'dit'" in refusal(found, tmp_path / "anew", data=str(tmp_path / "moved"))

    (tmp_path / "dit").mkdir()
    told = refusal(found, tmp_path / "anew", data=str(tmp_path / "moved"), weights=str(tmp_path / "dit"))
    assert told.startswith("a step failed with the installed diffstill")
    assert "error: " in capfd.readouterr().err
    assert contents(tmp_path / "anew" / "artifacts") == {f"images/{name}": digest for name, digest in contents(tmp_path / "images").items()}


def test_settings_of_another_version_need_its_code(tiny_chain, tmp_path):
    found = forged(tiny_chain.artifacts, tmp_path / "forged", "images", lambda raw: raw["config"].update(tint=3))
    told = refusal(found, tmp_path / "anew")
    assert "settings of another version of diffstill" in told
    assert "`prepare.tint` is not a knob" in told
    assert "the set names no commit" in told


def test_a_folder_of_something_else_is_left_alone(found, tiny_chain, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(tiny_chain.artifacts, project / "artifacts")
    before = contents(project)
    assert "holds something else than a reproduction" in refusal(found, project)
    assert contents(project) == before


def test_a_reproduction_of_another_set_is_left_alone(made, found, tiny_chain, tmp_path):
    other = forged(tiny_chain.artifacts, tmp_path / "forged", "distilled", lambda raw: raw["config"].update(steps=2))
    folder = begun(made, tmp_path / "anew", found)
    assert "holds something else than a reproduction" in refusal(other, folder)
