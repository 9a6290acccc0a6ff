"""A published set under DVC: real git and DVC repositories, a real registry; the same bytes come back in a clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import diffstill
from chains import contents, enter
from diffstill.artifacts import open_artifact
from diffstill.errors import DiffstillError
from diffstill.promote import promote, text
from diffstill.references import fetch, parse
from diffstill.registry import KINDS, Found, find
from diffstill.run import run_stage

pytestmark = pytest.mark.xdist_group("chain")

ENVIRONMENT = {
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    "DVC_NO_ANALYTICS": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    **{f"GIT_{role}_{what}": f"{what.lower()}@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def call(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def server(tiny_chain, tmp_path_factory) -> Path:
    """A folder with a registry that has one version."""
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as world:
        enter(world, folder)
        world.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        inputs = {name: tiny_chain.artifacts / name for name in ("distilled", "report")}
        run_stage("publish", tiny_chain.params.publish, {**inputs, "card": folder / "card"}, params=tiny_chain.params)
    return folder


@pytest.fixture
def found(server, tmp_path, monkeypatch) -> Found:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{server / 'mlflow.db'}")
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    return find("distilled-digits")


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """A git repository with DVC and a remote beside it."""
    folder = tmp_path_factory.mktemp("empty") / "project"
    folder.mkdir()
    for command in ("git init -q -b main", "dvc init -q", "dvc remote add -q -d store ../remote", "git add .dvc", "git commit -qm start"):
        call(folder, *command.split())
    return folder


@pytest.fixture
def project(empty, tmp_path, monkeypatch) -> Path:
    """One of one's own, the current folder."""
    shutil.copytree(empty, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "project"


def type_in(promotion) -> None:
    """What the user is told to type."""
    for command in text(promotion).splitlines()[1:]:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def refusal(*arguments) -> str:
    with pytest.raises(DiffstillError) as refused:
        promote(*arguments)
    return str(refused.value)


def test_the_same_bytes_come_back_in_a_clone(found, project, tmp_path):
    type_in(promote(found))
    assert call(project, "git", "status", "--porcelain") == ""
    call(tmp_path, "git", "clone", "-q", str(project), "clone")
    call(tmp_path / "clone", "dvc", "pull", "-q")
    there = tmp_path / "clone" / "distilled" / "distilled-digits-v1"
    assert {path.name for path in there.iterdir()} == set(KINDS)
    for kind in KINDS:
        assert open_artifact(there / kind, kind).digest == found.version.digest(kind)
        assert contents(there / kind) == contents(found.folder(kind))


def test_dvc_sees_nothing_to_do(found, project):
    promote(found)
    assert call(project, "dvc", "status", "--json") == "{}"


def test_it_is_data_that_a_reference_names(found, project, tmp_path):
    promotion = promote(found)
    type_in(promotion)
    fetched = fetch(parse(f"dvc+file:{project}?rev=main&path=distilled/distilled-digits-v1"), tmp_path / "elsewhere")
    assert fetched.facts["md5"] == promotion.md5
    assert contents(fetched.folder) == contents(promotion.folder)


def test_the_folder_is_a_set_that_loads(found, project):
    folder = promote(found).folder
    assert find(str(folder)).digest == found.digest
    assert len(diffstill.load(str(folder))) == 6


def test_the_dvc_file_says_where_it_is_from(found, project):
    told = YAML(typ="safe").load(promote(found).folder.with_suffix(".dvc"))
    assert told["desc"] == "distilled images: distilled-digits/1"
    assert told["meta"] == {
        "ref": "distilled-digits/1",
        "sha256": found.version.tags["sha256"],
        "images_sha256": found.version.tags["images_sha256"],
        "git_sha": found.version.tags["git_sha"],
        "code": found.version.tags["code"],
    }


def test_the_same_again_changes_nothing(found, project):
    first = promote(found)
    type_in(first)
    assert promote(found) == first
    assert call(project, "git", "status", "--porcelain") == ""


def test_a_clone_without_the_data_takes_it_from_the_registry(found, project):
    first = promote(found)
    type_in(first)
    shutil.rmtree(first.folder)
    assert promote(found) == first
    assert call(project, "dvc", "status", "--json") == "{}"
    assert call(project, "git", "status", "--porcelain") == ""


def test_it_goes_on_where_it_was_killed(found, project):
    """With the folder in place, and DVC's file without what we add to it."""
    folder = promote(found).folder
    folder.with_suffix(".dvc").unlink()
    call(project, "dvc", "add", "-q", str(folder))
    assert "meta" not in folder.with_suffix(".dvc").read_text()
    assert promote(found).folder == folder
    assert found.digest in folder.with_suffix(".dvc").read_text()


def test_a_set_in_a_folder_goes_where_it_is_told(tiny_chain, project):
    found = find(str(tiny_chain.artifacts))
    assert "--output" in refusal(found)
    promotion = promote(found, Path("kept here"))
    assert {path.name for path in promotion.folder.iterdir()} == {"distilled", "report"}
    told = promotion.folder.with_suffix(".dvc").read_text()
    assert f"ref: {found.digest[:12]}" in told
    assert str(tiny_chain.artifacts) not in told
    type_in(promotion)
    assert call(project, "git", "status", "--porcelain") == ""


@pytest.mark.parametrize("change", ["image", "file", "kind"])
def test_other_content_is_refused_and_left(found, project, change):
    folder = promote(found).folder
    if change == "image":
        next(folder.glob("distilled/seed-0/*/*.png")).unlink()
    elif change == "file":
        (folder / "notes.txt").write_text("mine")
    else:
        shutil.rmtree(folder / "card")
    before = contents(project)
    assert str(folder) in refusal(found)
    assert contents(project) == before


def test_a_dvc_file_of_something_else_is_refused(found, project):
    own = project / "distilled" / "distilled-digits-v1"
    own.mkdir(parents=True)
    (own / "notes.txt").write_text("mine")
    call(project, "dvc", "add", "-q", str(own))
    shutil.rmtree(own)
    assert "tracks something else" in refusal(found)
    assert not own.exists()


def test_outside_a_dvc_repository_it_is_refused(found, tmp_path, monkeypatch):
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path / "plain")
    assert "dvc init" in refusal(found)
    assert not list((tmp_path / "plain").iterdir())


def test_what_git_ignores_is_refused(found, project):
    (project / ".gitignore").write_text("distilled/\n")
    assert "ignored" in refusal(found)


def test_what_dvc_ignores_is_refused(found, project):
    (project / ".dvcignore").write_text("*.csv\n")
    assert ".dvcignore" in refusal(found)


def test_without_dvc_there_is_one_message(found, project, monkeypatch):
    monkeypatch.setitem(sys.modules, "dvc.repo", None)
    assert refusal(found) == "DVC is not installed; pip install 'diffstill[dvc]'"
    assert not (project / "distilled").exists()
