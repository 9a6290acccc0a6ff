"""Bring a distilled set that was made elsewhere under DVC: its files, verified, in a folder that a `.dvc` file of this repository tracks.

The set becomes a data source of the repository, not the output of its stage `sample`: dvc.lock says which code, parameters and weights of
*this* repository made an output, and none of them made this one. Its origin stands in the `.dvc` file.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffstill.artifacts import DESKTOP_LITTER, Kind, open_artifact, refuse_overlap
from diffstill.errors import DiffstillError, without_secrets
from diffstill.lineage import Lineage
from diffstill.registry import KINDS, Found

if TYPE_CHECKING:
    from dvc.repo import Repo
    from dvc.stage import Stage


@dataclass(frozen=True)
class Promotion:
    """A set under DVC: its folder, and the files that git is to track; `md5` is DVC's of the folder."""

    ref: str
    folder: Path
    files: tuple[Path, ...]
    md5: str

    @property
    def commands(self) -> Sequence[str]:
        """What makes it last, as the user types it in the current folder."""
        files = " ".join(shlex.quote(str(_shown(path))) for path in self.files)
        return (f"git add {files}", f"git commit -m {shlex.quote(f'Promote {self.ref}')}", f"dvc push {shlex.quote(str(_shown(self.files[0])))}")


def promote(found: Found, folder: Path | None = None) -> Promotion:
    """Put the set, and its report and card where it has them, into `folder` (by default distilled/<name>-v<number>) and add that to DVC.

    The same again changes nothing, and goes on where it was killed. Raises `DiffstillError` outside a DVC repository, without DVC, if the folder
    or its `.dvc` file is of something else, or where git or DVC ignore it.
    """
    folder = (folder or default_folder(found)).absolute()
    _refuse_without_dvc()
    sources = {kind: found.folder(kind) for kind in (KINDS if found.version else found.folders)}
    with _repository(folder) as repository:
        _refuse_other_origin(folder, repository, found.digest)
        _place(sources, folder)
        stage = _add(repository, folder, found)
        (out,) = stage.outs
        ignored = [path for path in (Path(stage.path).with_name(".gitignore"),) if path.is_file()]
        return Promotion(_name(found), folder, (Path(stage.path), *ignored), out.hash_info.value)


def default_folder(found: Found) -> Path:
    """Where a version goes by itself. Raises `DiffstillError` for a set that is none."""
    if found.version is None:
        raise DiffstillError(f"{found.ref}: is no published version, so it has no name of its own; say where to with --output")
    return Path("distilled", f"{found.version.name}-v{found.version.number}")


def text(promotion: Promotion) -> str:
    """What is there now, and what to do next."""
    return "\n".join([f"{promotion.ref} is under DVC as {_shown(promotion.folder)} (md5 {promotion.md5}); next:", *promotion.commands])


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _refuse_without_dvc() -> None:
    try:
        import dvc.repo  # noqa: F401
    except ImportError as error:
        raise DiffstillError("DVC is not installed; pip install 'diffstill[dvc]'") from error


@contextmanager
def _repository(folder: Path) -> Iterator[Repo]:
    """The DVC repository around `folder`. What goes wrong in DVC or git is one `DiffstillError`."""
    from dvc.exceptions import DvcException, NotDvcRepoError
    from dvc.repo import Repo
    from scmrepo.exceptions import SCMError

    nearest = next(place for place in (folder, *folder.parents) if place.is_dir())
    try:
        with Repo(str(nearest)) as repository:
            repository.scm_context.quiet = True  # its advice is part of ours
            yield repository
    except NotDvcRepoError as error:
        raise DiffstillError(f"{folder}: lies in no DVC repository; run `dvc init` in your git repository, or give an --output inside one") from error
    except (DvcException, SCMError) as error:
        raise DiffstillError(f"{folder}: DVC cannot add it ({without_secrets(' '.join(str(error).split()))[:300]})") from error


def _refuse_other_origin(folder: Path, repository: Repo, digest: str) -> None:
    """Raise `DiffstillError` if a `.dvc` file waits for the files of something else."""
    path = folder.with_name(f"{folder.name}.dvc")
    if path.exists() and not folder.exists() and (repository.stage.load_file(str(path))[0].meta or {}).get("sha256") != digest:
        raise DiffstillError(f"{path}: tracks something else; remove it (`dvc remove`), or choose another --output")


def _place(sources: Mapping[Kind, Path], folder: Path) -> None:
    """Copy the artifacts into `folder`, verified, whole or not at all; nothing is done if these very files are there."""
    wanted = {kind: open_artifact(source, kind).digest for kind, source in sources.items()}
    if folder.exists():
        _refuse_other_content(folder, wanted)
        return
    refuse_overlap(folder, {str(kind): source for kind, source in sources.items()})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
        arriving = Path(aside) / folder.name
        for kind, source in sources.items():
            shutil.copytree(source, arriving / kind, ignore=shutil.ignore_patterns(*DESKTOP_LITTER))
            open_artifact(arriving / kind, kind)
        arriving.rename(folder)


def _refuse_other_content(folder: Path, wanted: Mapping[Kind, str]) -> None:
    names = {path.name for path in folder.iterdir()} - set(DESKTOP_LITTER) if folder.is_dir() else {folder.name}
    if names != wanted.keys() or any(open_artifact(folder / kind, kind).digest != digest for kind, digest in wanted.items()):
        raise DiffstillError(f"{folder}: holds something else than {', '.join(wanted)} of this set; remove it, or choose another --output")


def _add(repository: Repo, folder: Path, found: Found) -> Stage:
    """The folder's `.dvc` file, which says where the set is from."""
    (stage,) = repository.add(str(folder))
    held, present = stage.outs[0].meta.nfiles, sum(path.is_file() for path in folder.rglob("*"))
    if held != present:
        raise DiffstillError(f"{folder}: DVC took {held} of {present} files, .dvcignore leaves out the others; mend that, then promote again")
    stage.desc, stage.meta = f"distilled images: {_name(found)}", _origin(found)
    stage.dump()
    return stage


def _origin(found: Found) -> dict[str, str]:
    """What the `.dvc` file keeps: the reference, digests of the set and of the real images, and the commits of the project and of the code."""
    images = Lineage.of(open_artifact(found.folder(), "distilled"))["images"].digest
    code = {name: found.version.tags[name] for name in ("git_sha", "code") if name in found.version.tags} if found.version else {}
    return {"ref": _name(found), "sha256": found.digest, "images_sha256": images, **code}


def _name(found: Found) -> str:
    """What always means this set, on any machine: the version, its place in S3, or the beginning of its digest."""
    if found.version:
        return found.version.ref
    return found.ref if found.ref.startswith("s3://") else found.digest[:12]
