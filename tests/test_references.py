"""Data by reference, from real git and DVC repositories with real remotes: exact, verified, whole or absent."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from chains import contents
from diffstill.artifacts import cache_folder, open_artifact
from diffstill.config import PrepareConfig
from diffstill.errors import DiffstillError
from diffstill.references import DvcReference, S3Reference, fetch, parse, pin, refuse_unpushed
from diffstill.run import run_stage
from servers import SECRET, free_port, s3, s3_environment

FILES = {f"train/{label}/{number}.txt": f"{label}{number}" for label in "ab" for number in range(3)}
ENVIRONMENT = {
    "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
    "DVC_NO_ANALYTICS": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


@dataclass(frozen=True)
class Project:
    """A working copy that tracks `data/images` with DVC, the bare repository it is pushed to, and its DVC remote."""

    copy: Path
    bare: Path
    remote: Path

    def call(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.copy, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def commit(self, files: dict[str, str], *, push: bool = True) -> str:
        """Put files into `data/images`, add them to DVC, commit and push; the commit."""
        for name, content in files.items():
            path = self.copy / "data" / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            path.write_text(content)
        self.call("dvc", "add", "-q", "data/images")
        self.call("git", "add", "-A")
        self.call("git", "commit", "-qm", "data")
        self.call("git", "push", "-q", "origin", "main")
        if push:
            self.call("dvc", "push", "-q")
        return self.call("git", "rev-parse", "HEAD")

    def reference(self, rev: str = "main", path: str = "data/images", md5: str | None = None) -> DvcReference:
        """As another machine sees it: through git, without the cache of the working copy."""
        return DvcReference(str(self.bare), rev, path, md5)

    def stored(self, content: str) -> Path:
        """The object of a file in the DVC remote."""
        (found,) = [path for path in self.remote.rglob("*") if path.is_file() and path.read_text() == content]
        return found


def start(folder: Path, remote: str, **settings: str) -> Project:
    project = Project(folder / "copy", folder / "bare.git", folder / "remote")
    project.copy.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(project.bare)], check=True)
    project.call("git", "init", "-q", "-b", "main")
    project.call("git", "remote", "add", "origin", str(project.bare))
    project.call("dvc", "init", "-q")
    if remote:
        project.call("dvc", "remote", "add", "-q", "-d", "store", remote)
    for name, value in settings.items():
        project.call("dvc", "remote", "modify", "-q", "store", name, value)
    return project


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushed")
    project = start(folder, str(folder / "remote"))
    project.commit(FILES)
    return project


@pytest.fixture
def project(pushed, tmp_path):
    """A project to change: the copy of one, at the same place in another folder."""
    shutil.copytree(pushed.copy.parent, tmp_path / "project", symlinks=True)
    mine = Project(*(tmp_path / "project" / name for name in ("copy", "bare.git", "remote")))
    mine.call("git", "remote", "set-url", "origin", str(mine.bare))
    mine.call("dvc", "remote", "modify", "-q", "store", "url", str(mine.remote))
    mine.call("git", "commit", "-qam", "moved")
    mine.call("git", "push", "-q", "origin", "main")
    return mine


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def refusal(call, *arguments) -> str:
    """The one message that a call is refused with."""
    with pytest.raises(DiffstillError) as refused:
        call(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def refused_fetch(reference, cache: Path) -> str:
    """The message, once nothing has come into the cache."""
    told = refusal(fetch, reference, cache)
    assert contents(cache).keys() <= {path.relative_to(cache).as_posix() for path in cache.rglob(".*.lock")}
    return told


# --- locations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "reference"),
    [
        (
            "dvc+https://host/org/repo.git?rev=v1&path=data/images&md5=0f091ce92af3c34020b3681b7bde2aba.dir",
            DvcReference("https://host/org/repo.git", "v1", "data/images", "0f091ce92af3c34020b3681b7bde2aba.dir"),
        ),
        ("dvc+ssh://git@host:2222/org/repo.git?path=data/&rev=feature/a+b", DvcReference("ssh://git@host:2222/org/repo.git", "feature/a+b", "data")),
        ("dvc+file:/srv/my%20data?rev=main&path=a%26b", DvcReference("/srv/my data", "main", "a&b")),
        ("dvc+file:../data?rev=main&path=images", DvcReference("../data", "main", "images")),
        ("s3://bucket/data/images", S3Reference("s3://bucket/data/images")),
        ("data/images", None),
        ("/srv/dvc", None),
        ("https://host/fashion-mnist/", None),
    ],
)
def test_a_location_is_a_reference_or_none(location, reference):
    assert parse(location) == reference
    assert reference is None or parse(str(reference)) == reference


@given(
    repository=st.sampled_from(["https://host/repo.git", "ssh://git@host/repo", "/srv/a b/ä?#", "../other"]),
    revision=st.from_regex(r"\A[A-Za-z0-9_+&=#%/.]{1,20}\Z"),
    path=st.lists(st.from_regex(r"\A[A-Za-z0-9 _+&=?#%äß]{1,8}\Z"), min_size=1, max_size=3).map("/".join),
    md5=st.none() | st.from_regex(r"\A[0-9a-f]{32}\.dir\Z"),
)
def test_every_reference_can_be_written_as_a_location(repository, revision, path, md5):
    reference = DvcReference(repository, revision, path, md5)
    assert parse(str(reference)) == reference


@pytest.mark.parametrize(
    ("location", "told"),
    [
        (f"dvc+https://user:{SECRET}@host/repo.git?rev=a&path=b", "credentials have no place in a location"),
        (f"dvc+https://{SECRET}@host/repo.git?rev=a&path=b", "credentials have no place in a location"),
        (f"dvc+ssh://git:{SECRET}@host/repo.git?rev=a&path=b", "credentials have no place in a location"),
        (f"dvc+https:user:{SECRET}@host/repo.git?rev=a&path=b", "expected dvc+ and the URL of a git repository"),
        (f"dvc+https://host/repo.git?rev=a&path=b&token={SECRET}", "then at most `&md5=...`, each once"),
        ("dvc+https://host/repo.git?rev=a&path=b&path=c", "`?rev=...&path=...` must follow the repository"),
        ("dvc+https://host/repo.git?path=b", "`?rev=...&path=...` must follow the repository"),
        ("dvc+https://host/repo.git?rev", "`?rev=...&path=...` must follow the repository"),
        ("dvc+https://host/repo.git", "`?rev=...&path=...` must follow the repository"),
        ("dvc:https://host/repo.git?rev=a&path=b", "expected dvc+ and the URL of a git repository (https, http, ssh, file)"),
        ("dvc+ftp://host/repo.git?rev=a&path=b", "expected dvc+ and the URL of a git repository"),
        ("dvc+file://host/repo.git?rev=a&path=b", "expected dvc+ and the URL of a git repository"),
        ("dvc+file:repo?rev=--upload-pack=x&path=b", "`rev` '--upload-pack=x' is none"),
        ("dvc+file:repo?rev=&path=b", "`rev` '' is none"),
        ("dvc+file:repo?rev=a&path=../b", "`path` '../b' is no path of a folder inside the repository"),
        ("dvc+file:repo?rev=a&path=/b", "`path` '/b' is no path of a folder inside the repository"),
        ("dvc+file:repo?rev=a&path=.", "`path` '.' is no path of a folder inside the repository"),
        ("dvc+file:repo?rev=a&path=b&md5=0123", "`md5` '0123' is none"),
        (f"s3://key:{SECRET}@bucket/data", "no S3 location; write s3://<bucket>/<prefix>"),
    ],
)
def test_malformed_locations_are_refused_without_their_secrets(location, told):
    refused = refusal(parse, location)
    assert told in refused
    assert SECRET not in refused


# --- DVC: exactly this data ---------------------------------------------------------------------------------------


def test_a_folder_is_fetched_at_its_commit(pushed, tmp_path):
    got = fetch(pushed.reference(), tmp_path)
    assert texts(got.folder) == FILES
    md5 = next(line.split()[-1] for line in (pushed.copy / "data" / "images.dvc").read_text().splitlines() if "md5:" in line)
    assert got.facts == {"revision": pushed.call("git", "rev-parse", "HEAD"), "md5": md5, "path": "data/images"}
    assert got.folder == tmp_path / "dvc" / md5


@pytest.mark.parametrize("path", ["data/images/train", "data"], ids=["inside a tracked folder", "above one"])
def test_other_folders_have_an_md5_of_the_same_kind(path, pushed, tmp_path):
    pinned = pin(pushed.reference(path=path))
    assert texts(fetch(pinned, tmp_path).folder) == {
        f"images/{name}".removeprefix("images/train/" * path.endswith("train")): FILES[name] for name in FILES
    }
    (tmp_path / "again").mkdir()
    copy = start(tmp_path / "again", "")
    shutil.copytree(tmp_path / "dvc" / str(pinned.md5), copy.copy / "moved")
    copy.call("dvc", "add", "-q", "moved")
    assert f"md5: {pinned.md5}" in (copy.copy / "moved.dvc").read_text()


def test_a_working_copy_is_read_at_the_revision_and_not_as_it_lies(project, tmp_path):
    first = project.call("git", "rev-parse", "HEAD")
    (project.copy / "data" / "images" / "train" / "a" / "0.txt").unlink()
    project.commit({"new": "new"}, push=False)
    reference = DvcReference(str(project.copy), first, "data/images")
    assert texts(fetch(reference, tmp_path / "cache").folder) == FILES


def test_a_pinned_branch_stays_where_it_was(project, tmp_path):
    first, pinned = project.call("git", "rev-parse", "HEAD"), pin(project.reference())
    project.call("git", "tag", "-am", "annotated", "v1")
    project.call("git", "push", "-q", "--tags")
    second = project.commit({"train/a/0.txt": "changed"})
    moved = pin(project.reference())
    assert (pinned.revision, moved.revision) == (first, second)
    assert pinned.md5 != moved.md5
    assert texts(fetch(pinned, tmp_path / "cache").folder) == FILES
    assert texts(fetch(moved, tmp_path / "cache").folder) == FILES | {"train/a/0.txt": "changed"}
    assert pin(project.reference("v1")) == pinned
    assert pin(project.reference(first[:8])) == pinned
    assert pin(pinned) == pinned


def test_the_second_time_nothing_is_downloaded(project, tmp_path):
    got = fetch(project.reference(), tmp_path / "cache")
    shutil.rmtree(project.remote)
    assert fetch(project.reference(), tmp_path / "cache") == got
    assert fetch(pin(project.reference()), tmp_path / "cache") == got


def test_another_revision_with_the_same_data_is_not_downloaded_again(project, tmp_path):
    got = fetch(project.reference(), tmp_path / "cache")
    (project.copy / "README").write_text("hello")
    second = project.commit({})
    shutil.rmtree(project.remote)
    again = fetch(project.reference(), tmp_path / "cache")
    assert (again.folder, again.facts["revision"]) == (got.folder, second)


def test_another_md5_than_the_pinned_one_is_refused(pushed, tmp_path):
    fetch(pushed.reference(), tmp_path / "cache")
    told = refusal(fetch, pushed.reference(md5="0" * 32 + ".dir"), tmp_path / "cache")
    assert "for that revision; correct `rev` or `md5`, one of them names other data" in told
    assert pin(pushed.reference()).md5 in told


def test_data_that_was_changed_in_the_cache_is_fetched_again(pushed, tmp_path, caplog):
    got = fetch(pushed.reference(), tmp_path / "cache")
    (got.folder / "train" / "a" / "0.txt").write_text("mine")
    assert fetch(pushed.reference(), tmp_path / "cache") == got
    assert texts(got.folder) == FILES
    assert caplog.messages == [f"{got.folder}: was changed since it was downloaded; downloaded again"]


def test_the_cache_is_no_part_of_the_repositorys_own(project, tmp_path):
    """A repository that links its files must not have its objects linked into ours."""
    project.call("dvc", "config", "cache.type", "symlink")
    project.call("git", "commit", "-qam", "links")
    got = fetch(DvcReference(str(project.copy), "main", "data/images"), tmp_path / "cache")
    assert texts(got.folder) == FILES
    assert [path for path in got.folder.rglob("*") if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1)] == []


# --- DVC: what is not there, or not right -------------------------------------------------------------------------


def test_a_corrupted_file_in_the_remote_is_refused(project, tmp_path):
    stored = project.stored("b2")
    stored.chmod(0o644)
    stored.write_text("rotten")
    told = refused_fetch(project.reference(), tmp_path / "cache")
    assert "train/b/2.txt has md5 " in told
    assert "corrupted; push it again from a good copy" in told


def test_nothing_arrives_after_the_message(project, tmp_path, monkeypatch):
    """The other files are on their way, and slowly, when one is found to be corrupted."""
    from dvc_data.fs import DataFileSystem

    real, arrived = DataFileSystem.get_file, []

    def slow(self, source, target, **options):
        time.sleep(0.0 if source.endswith("b/2.txt") else 0.5)
        arrived.append(source)
        real(self, source, target, **options)

    monkeypatch.setattr(DataFileSystem, "get_file", slow)
    stored = project.stored("b2")
    stored.chmod(0o644)
    stored.write_text("rotten")
    refused_fetch(project.reference(), tmp_path / "cache")
    when_told = len(arrived)
    time.sleep(1)
    assert len(arrived) == when_told > 1
    assert refused_fetch(project.reference(), tmp_path / "cache")


@pytest.mark.parametrize("change", [lambda text: text.replace("train/b/2.txt", "train/b/9.txt"), lambda text: text[:50]], ids=["other", "cut off"])
def test_a_corrupted_listing_in_the_remote_is_refused(change, project, tmp_path):
    (stored,) = project.remote.rglob("*.dir")
    stored.chmod(0o644)
    stored.write_text(change(stored.read_text()))
    assert "corrupted" in refused_fetch(project.reference(), tmp_path / "cache")


def test_a_listing_that_leads_out_of_the_folder_is_refused(project, tmp_path):
    (stored,) = project.remote.rglob("*.dir")
    stored.chmod(0o644)
    stored.write_text(stored.read_text().replace("train/b/2.txt", "../../../2.txt"))
    assert "which is no path of a file below the folder" in refused_fetch(project.reference(), tmp_path / "cache")
    assert not list(tmp_path.rglob("2.txt"))[2:]


def test_data_that_was_not_pushed_is_refused_by_name(project, tmp_path):
    refuse_unpushed(project.reference())
    commit = project.commit({"train/a/7.txt": "new"}, push=False)
    told = refusal(refuse_unpushed, DvcReference(str(project.copy), "main", "data/images"))
    assert "the DVC remote lacks 2 of 8 objects (data/images, data/images/train/a/7.txt); run `dvc push` where the data is" in told
    assert commit in told
    assert "`dvc push`" in refusal(refuse_unpushed, project.reference())
    assert "`dvc push`" in refused_fetch(project.reference(), tmp_path / "cache")
    project.call("dvc", "push", "-q")
    refuse_unpushed(project.reference())


def test_a_file_that_is_gone_from_the_remote_is_refused(project, tmp_path):
    project.stored("b2").unlink()
    assert "lacks 1 of 7 objects (data/images/train/b/2.txt)" in refusal(refuse_unpushed, project.reference())
    told = refused_fetch(project.reference(), tmp_path / "cache")
    assert "train/b/2.txt" in told
    assert "`dvc push`" in told


def test_without_a_remote_nothing_is_pushed(tmp_path):
    project = start(tmp_path / "alone", "")
    project.commit(FILES, push=False)
    assert "the DVC remote lacks 7 of 7 objects" in refusal(refuse_unpushed, DvcReference(str(project.copy), "main", "data/images"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"revision": "no-such-branch"}, "cannot be read (unknown Git revision 'no-such-branch')"),
        ({"revision": "0" * 40}, "cannot be read (unknown Git revision '0000"),
        ({"path": "data/nothing"}, "DVC tracks nothing at 'data/nothing' in that revision; correct `path` or `rev`"),
        ({"path": "data/images/train/a/0.txt"}, "'data/images/train/a/0.txt' is a file; name the folder that has it"),
        ({"repository": "/no/such/repository"}, "check the repository"),
        ({"repository": f"http://127.0.0.1:{free_port()}/repo.git"}, "Connection refused"),
    ],
)
def test_what_is_not_there_is_told(changes, told, pushed, tmp_path):
    reference = DvcReference(**{"repository": str(pushed.bare), "revision": "main", "path": "data/images"} | changes)
    for call in (pin, refuse_unpushed, lambda this: fetch(this, tmp_path)):
        refused = refusal(call, reference)
        assert refused.startswith(f"{reference}: ")
        assert told in refused
    assert list(tmp_path.iterdir()) == []


def test_a_git_repository_without_dvc_is_refused(tmp_path):
    git = ["git", "-C", str(tmp_path / "plain")]
    (tmp_path / "plain").mkdir()
    for command in (["init", "-q", "-b", "main"], ["commit", "-qm", "a", "--allow-empty"]):
        subprocess.run([*git, *command], check=True, env=os.environ | ENVIRONMENT)
    assert "cannot be read" in refusal(pin, DvcReference(str(tmp_path / "plain"), "main", "data"))


def test_files_that_git_has_are_not_left_out_in_silence(project):
    (project.copy / "data" / "classes.txt").write_text("a b")
    project.commit({})
    assert "git and not DVC tracks classes.txt there; add all of the folder to DVC, or none of it" in refusal(pin, project.reference(path="data"))


def test_without_dvc_installed_there_is_one_clear_message(pushed, monkeypatch):
    for name in [name for name in sys.modules if name == "dvc" or name.startswith("dvc.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dvc", None)
    assert refusal(pin, pushed.reference()).endswith("DVC is not installed; pip install 'diffstill[dvc]'")


# --- interrupted --------------------------------------------------------------------------------------------------


class Killing:
    """A record that ends its process without a word when the first file is there."""

    @contextmanager
    def progress(self, description, total, unit, done=0):
        yield self

    def update(self, n=1):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_fetch_leaves_nothing_and_the_next_one_succeeds(pushed, tmp_path):
    code = """
        import sys
        from pathlib import Path
        from diffstill.references import fetch, parse
        from test_references import Killing
        fetch(parse(sys.argv[1]), Path(sys.argv[2]), Killing())
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(pushed.reference()), str(tmp_path)]
    killed = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "dvc").iterdir() if not path.name.startswith(".")] == []
    got = fetch(pushed.reference(), tmp_path)
    assert texts(got.folder) == FILES
    assert sorted(path.name for path in (tmp_path / "dvc").iterdir()) == [f".{got.folder.name}.lock", got.folder.name]


def test_two_processes_at_once_download_once(pushed, tmp_path):
    code = "import sys; from pathlib import Path; from diffstill.references import fetch, parse; print(fetch(parse(sys.argv[1]), Path(sys.argv[2])).folder)"
    command = [sys.executable, "-c", code, str(pushed.reference()), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(folders) == 1
    assert texts(Path(folders.pop())) == FILES


# --- S3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    with s3(tmp_path_factory.mktemp("s3")) as (url, _):
        yield url


@pytest.fixture
def store(endpoint, monkeypatch):
    """A client of an S3 store with two buckets, and the credentials for it in the environment, where DVC finds them too."""
    for name, value in s3_environment(endpoint).items():
        monkeypatch.setenv(name, value)
    client = boto3.Session().client("s3")
    for bucket in ("dvc-store", "images"):
        client.create_bucket(Bucket=bucket)
    return client


def test_dvc_data_on_s3(store, endpoint, tmp_path, monkeypatch):
    """The endpoint stands in the repository's configuration, the credentials in the environment."""
    project = start(tmp_path / "on-s3", "s3://dvc-store/data", endpointurl=endpoint)
    project.commit(FILES)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    refuse_unpushed(project.reference())
    assert texts(fetch(project.reference(), tmp_path / "cache").folder) == FILES
    gone = next(item["Key"] for item in store.list_objects_v2(Bucket="dvc-store", MaxKeys=100)["Contents"] if not item["Key"].endswith(".dir"))
    store.put_object(Bucket="dvc-store", Key=gone, Body=b"rotten")
    assert "corrupted; push it again" in refused_fetch(project.reference(), tmp_path / "other")
    store.delete_object(Bucket="dvc-store", Key=gone)
    assert "lacks 1 of 7 objects" in refusal(refuse_unpushed, project.reference())


def test_a_dvc_remote_out_of_reach_is_one_message(store, tmp_path):
    project = start(tmp_path / "on-s3", "s3://dvc-store/far", endpointurl=f"http://127.0.0.1:{free_port()}")
    project.commit(FILES, push=False)
    told = refused_fetch(project.reference(), tmp_path / "cache")
    assert "Connect call failed" in told
    assert SECRET not in told


def test_an_s3_prefix_is_cached_by_what_it_holds(store, tmp_path, caplog):
    for name, content in FILES.items():
        store.put_object(Bucket="images", Key=f"set/{name}", Body=content.encode())
    reference = parse("s3://images/set")
    got = fetch(reference, tmp_path)
    assert texts(got.folder) == FILES
    assert got.facts["location"] == "s3://images/set"
    before = {path: path.stat().st_mtime_ns for path in got.folder.rglob("*")}
    assert fetch(reference, tmp_path) == got
    assert {path: path.stat().st_mtime_ns for path in got.folder.rglob("*")} == before
    store.put_object(Bucket="images", Key="set/train/a/0.txt", Body=b"0a")
    changed = fetch(reference, tmp_path)
    assert changed.folder != got.folder
    assert texts(changed.folder) == FILES | {"train/a/0.txt": "0a"}
    for damage in (Path.unlink, lambda path: path.write_text("0b"), lambda path: (path.parent / "more.txt").write_text("0a")):
        caplog.clear()
        damage(changed.folder / "train" / "a" / "0.txt")
        assert fetch(reference, tmp_path) == changed
        assert texts(changed.folder) == FILES | {"train/a/0.txt": "0a"}
        assert caplog.messages == [f"{changed.folder}: was changed since it was downloaded; downloaded again"]


# --- the cache ----------------------------------------------------------------------------------------------------


def test_where_downloads_are_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "diffstill"
    monkeypatch.setenv("DIFFSTILL_CACHE", "/scratch/cache")
    assert cache_folder() == Path("/scratch/cache")


# --- a stage over a reference -------------------------------------------------------------------------------------


def test_prepare_reads_the_repository_and_records_commit_and_md5(project, tmp_path, monkeypatch):
    """A branch in the parameters, a commit and an md5 in the manifest; the images are those of the plain folder."""
    monkeypatch.setenv("DIFFSTILL_CACHE", str(tmp_path / "cache"))
    folder = project.copy / "data" / "photos"
    for number in range(24):
        place = folder / "train" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number * 10).save(place)
    project.call("dvc", "add", "-q", "data/photos")
    project.call("git", "add", "-A")
    project.call("git", "commit", "-qm", "photos")
    project.call("git", "push", "-q", "origin", "main")
    project.call("dvc", "push", "-q")
    config = PrepareConfig(source="folder", location=str(project.reference(path="data/photos")))

    run_stage("prepare", config, {"images": tmp_path / "images"})
    run_stage("prepare", config.model_copy(update={"location": str(folder)}), {"images": tmp_path / "plain"})
    made, plain = (open_artifact(tmp_path / name, "images").manifest for name in ("images", "plain"))
    assert made.files == plain.files
    assert made.config["location"] == str(pin(project.reference(path="data/photos")))
    assert project.call("git", "rev-parse", "HEAD") in made.config["location"]
    assert "md5=" in made.config["location"]
