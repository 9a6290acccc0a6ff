"""MLflow's SQLite file: several processes that open it, folders with odd names, folders that move, and files that are no database."""

import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier

import mlflow  # noqa: F401  (for the processes that are forked: importing it takes longest)
import pytest

from diffstill.config import preset
from diffstill.database import file_of, uri_of
from diffstill.errors import DiffstillError
from diffstill.registry import Registry
from diffstill.tracking import answering, connect, stage_run, tracking_uri

TINY = preset("tiny")


def at_once(*work) -> None:
    """Do several things in the same moment. What one of them raises is raised."""
    together = Barrier(len(work))
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(lambda one: (together.wait(), one()), one) for one in work]:
            done.result()


@pytest.fixture(scope="session")
def fresh(tmp_path_factory) -> Path:
    """A folder with a new mlflow.db, which takes seconds to make: copy it. Several processes that opened it in the same moment have made it."""
    folder, context = tmp_path_factory.mktemp("fresh"), get_context("fork")
    together = context.Barrier(3)

    def start() -> None:
        together.wait()
        connect(uri_of(folder / "mlflow.db"))

    processes = [context.Process(target=start) for _ in range(together.parties)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    return folder


@pytest.fixture
def folder(fresh, tmp_path, monkeypatch) -> Path:
    """A working folder with default tracking and an empty database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    return enter(shutil.copytree(fresh, tmp_path / "work"), monkeypatch)


def enter(folder: Path, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def a_run(name: str = "prepare") -> None:
    with stage_run(name, TINY.section(name), TINY):
        pass


def rows(folder: Path, query: str) -> list:
    with sqlite3.connect(folder / "mlflow.db") as database:
        return database.execute(query).fetchall()


# --- at once ------------------------------------------------------------------------------------------------------


def test_a_database_that_several_make_at_once_is_whole(fresh):
    assert rows(fresh, "SELECT count(*) FROM experiments") == [(1,)]


def test_stages_that_start_at_once_are_one_chain(folder):
    at_once(*(partial(a_run, name) for name in ("prepare", "encode", "sample")))
    assert rows(folder, "SELECT count(*) FROM tags WHERE key = 'diffstill.chain'") == [(1,)]
    assert rows(folder, "SELECT count(*) FROM runs WHERE status = 'FINISHED'") == [(3,)]


@pytest.mark.slow
def test_commands_at_once_in_a_new_folder(tmp_path):
    (tmp_path / "params.yaml").write_text("prepare: {classes: ['0', '1', '2'], seed: 1}\n")
    command = [sys.executable, "-m", "diffstill", "prepare", "--images"]
    world = {"cwd": tmp_path, "env": {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*command, f"images-{number}"], **world) for number in range(4)]
    told = [process.communicate()[1].decode() for process in started]
    assert [process.returncode for process in started] == [0] * 4, told
    assert rows(tmp_path, "SELECT count(*) FROM runs WHERE name = 'prepare' AND status = 'FINISHED'") == [(4,)]


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a?b", "100%25", "a%20b", "a#b c", "é;k=[1]&+@:'x", "%"])
def test_a_folder_of_any_name_has_its_own_database(name, fresh, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    here = enter(shutil.copytree(fresh, tmp_path / name), monkeypatch)
    assert file_of(tracking_uri()) == here / "mlflow.db"
    a_run()
    assert rows(here, "SELECT count(*) FROM runs") == [(2,)]
    assert len(list(here.glob("mlartifacts/*/artifacts/params.json"))) == 1
    assert Registry.at(tracking_uri()).search() == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:", "https://mlflow.example?x=1", "postgresql+psycopg2://u@h/d", "sqlite:x", "none"])
def test_what_is_no_file(uri):
    assert file_of(uri) is None


def test_a_relative_uri_is_of_the_current_folder(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)
    assert file_of("sqlite:///mlflow.db") == tmp_path / "mlflow.db"


# --- unusable -----------------------------------------------------------------------------------------------------


def a_text(path: Path) -> None:
    path.write_text("dear diary, " * 100)


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [(a_text, "file is not a database"), (Path.mkdir, "unable to open database file"), (below_a_file, "is no folder or not writable")],
)
def test_an_unusable_file_is_refused_at_once(spoil, told, tmp_path):
    (tmp_path / "here").mkdir()
    file, started = tmp_path / "here" / "mlflow.db", time.monotonic()
    spoil(file)
    with pytest.raises(DiffstillError, match=told), answering(uri_of(file)):
        connect(uri_of(file))
    assert time.monotonic() - started < 5


# --- moved and copied folders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [True, False])
def test_artifacts_follow_a_folder_that_was_moved_or_copied(copied, folder, monkeypatch, caplog):
    from mlflow import MlflowClient
    from mlflow.artifacts import load_dict

    a_run()
    model = MlflowClient(tracking_uri())
    ((parent,),) = rows(folder, "SELECT run_uuid FROM tags WHERE key = 'diffstill.chain'")
    model.create_registered_model("digits")
    model.create_model_version("digits", f"{folder.as_uri()}/mlartifacts/{parent}/artifacts", run_id=parent)
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    there = folder.parent / "50% of it"
    shutil.copytree(folder, there) if copied else folder.rename(there)
    enter(there, monkeypatch)
    a_run("encode")
    assert "mlflow.db was in" in caplog.text
    assert (sorted(path.relative_to(folder) for path in folder.rglob("*")) == before) == copied
    assert not any(str(folder) in str(value) for _, value in rows(there, "SELECT run_uuid, artifact_uri FROM runs"))
    assert rows(there, "SELECT source, storage_location FROM model_versions") == [(f"{there.as_uri()}/mlartifacts/{parent}/artifacts",) * 2]
    assert load_dict(f"{MlflowClient(tracking_uri()).get_run(parent).info.artifact_uri}/params.json") == TINY.plain()
    caplog.clear()
    a_run("sample")
    assert caplog.text == ""


def test_a_database_without_the_files_of_its_runs_is_refused(folder, monkeypatch):
    a_run()
    there = folder.parent / "there"
    there.mkdir()
    (folder / "mlflow.db").rename(there / "mlflow.db")
    (folder / "mlartifacts").rename(folder.parent / "aside")
    enter(there, monkeypatch)
    shutil.rmtree(folder)
    with pytest.raises(DiffstillError, match=rf"neither {folder}/mlartifacts, where they were, nor {there}/mlartifacts has them; move that folder"):
        a_run()
    (folder / "mlartifacts").mkdir(parents=True)
    a_run()


def test_a_copy_of_the_database_alone_writes_into_no_other_folder(folder, monkeypatch):
    a_run()
    before = sorted((folder / "mlartifacts").iterdir())
    there = folder.parent / "there"
    there.mkdir()
    shutil.copy(folder / "mlflow.db", there)
    enter(there, monkeypatch)
    with pytest.raises(
        DiffstillError, match=rf"is a copy of {folder}/mlflow.db without the files of its runs.*copy that folder to {there}/mlartifacts"
    ):
        a_run()
    shutil.copytree(folder / "mlartifacts", there / "mlartifacts")
    a_run()
    assert sorted((folder / "mlartifacts").iterdir()) == before
    assert rows(there, "SELECT artifact_location FROM experiments WHERE name = 'diffstill'") == [((there / "mlartifacts").as_uri(),)]


def test_artifacts_that_lie_elsewhere_on_purpose_stay_there(folder, monkeypatch):
    """Neither a place of another name nor one that is not the database's own is touched."""
    client = connect()
    places = {"big": (folder.parent / "disk" / "mlartifacts"), "named": folder.parent / "elsewhere"}
    for name, place in places.items():
        client.create_experiment(name, artifact_location=place.as_uri())
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", name)
        a_run()
        assert list(place.glob("*/artifacts/params.json"))
    connect()
    assert {client.get_experiment_by_name(name).artifact_location for name in places} == {place.as_uri() for place in places.values()}
