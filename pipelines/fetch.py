"""The artifacts of a run on a cluster, brought to this machine and laid out as the chain does."""

import tempfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from diffstill import storage
from diffstill.artifacts import MANIFEST, Artifact, Manifest, open_artifact
from diffstill.errors import DiffstillError

NAMES = ("images", "generator", "latents", "denoiser", "distilled", "untuned", "scores", "report", "card")


def fetch(uri: str, folder: Path, only: Collection[str] = NAMES) -> list[Path]:
    """Download the artifacts of the run that keeps its outputs at `uri`; those that are new in `folder`.

    All are verified before the first appears. Raises `DiffstillError` if one that is asked for is not there or damaged,
    or if `folder` holds another one in its place. What the cache has served lies with the run that made it.
    """
    if unknown := sorted(set(only) - set(NAMES)):
        raise DiffstillError(f"--only {', '.join(unknown)}: no artifact of a run; it has {', '.join(NAMES)}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=folder) as scratch:
        arrived = {place: made for place, made in _download(uri, Path(scratch), only).items() if _name(place) in only}
        missing = [] if set(only) == set(NAMES) else sorted(set(only) - {_name(place) for place in arrived})
        if missing or not arrived:
            raise DiffstillError(
                f"{uri}: has no {', '.join(missing) or 'artifact'}; wait until the run has finished, and fetch what the cache has served "
                "from the run that made it, or submit with --no-cache"
            )
        new = {place: made for place, made in arrived.items() if not _is_there(folder / place, made)}
        for place, made in new.items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            made.folder.rename(folder / place)
    return [folder / place for place in new]


def _download(uri: str, scratch: Path, only: Collection[str]) -> dict[str, Artifact]:
    """Every whole artifact below `uri` that may be one of `only`, verified, by its place in the chain's layout."""
    outputs = {"distilled" if name == "untuned" else name for name in only}
    found = [PurePosixPath(item.name).parent for item in storage.listing(uri) if PurePosixPath(item.name).name == MANIFEST]
    arrived = {}
    for number, output in enumerate(output for output in found if output.name in outputs):
        folder = scratch / str(number)
        storage.download(f"{uri}/{output}", folder)
        manifest = _manifest(folder, f"{uri}/{output}")
        if "shard" not in manifest.facts:
            arrived[_place(manifest)] = open_artifact(folder, manifest.kind)
    return arrived


def _manifest(folder: Path, uri: str) -> Manifest:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except ValidationError as error:
        raise DiffstillError(f"{uri}: its manifest is damaged or of another version ({error.error_count()} errors); run its task again") from error


def _place(manifest: Manifest) -> str:
    """Where the chain keeps such an artifact."""
    if manifest.kind == "distilled":
        return str(manifest.facts["source"])
    if manifest.kind == "scores":
        source = manifest.facts["sources"][0]
        return f"scores/{source if source in ('distilled', 'untuned') else 'real'}-{manifest.facts['students'][0]}"
    return manifest.kind


def _name(place: str) -> str:
    return place.partition("/")[0]


def _is_there(place: Path, made: Artifact) -> bool:
    """Whether `place` holds the very artifact. Raises `DiffstillError` if it holds anything else."""
    if not place.exists():
        return False
    if not (place / MANIFEST).is_file() or open_artifact(place, made.manifest.kind).digest != made.digest:
        raise DiffstillError(f"{place}: is there already and differs from what the run made; fetch into another --output")
    return True
