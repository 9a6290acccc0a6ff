"""Which container image a task runs in: by digest, from `docker/images.lock`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from diffstill.errors import DiffstillError

LOCK = Path(__file__).parents[1] / "docker" / "images.lock"
BY_DIGEST = re.compile(r"[^@\s]+@sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Images:
    """References of the two images."""

    cpu: str
    gpu: str

    @property
    def by_digest(self) -> bool:
        """Whether both can only ever mean the same bytes."""
        return all(BY_DIGEST.fullmatch(reference) for reference in (self.cpu, self.gpu))


TAGGED = Images("diffstill:cpu", "diffstill:gpu")
"""What `make images` builds, before it is pushed anywhere."""


def load_images(lock: Path = LOCK, *, allow_tag: bool = False) -> Images:
    """The images of a lock file. Raises `DiffstillError` where one has no digest, unless `allow_tag`: then it may be any tag."""
    found = _read(lock)
    images = Images(found.get("cpu", TAGGED.cpu), found.get("gpu", TAGGED.gpu))
    if not images.by_digest and not allow_tag:
        wrong = next(reference for reference in (images.cpu, images.gpu) if not BY_DIGEST.fullmatch(reference))
        raise DiffstillError(
            f"{lock}: gives the image {wrong!r}, which is no digest, so that a run could not be repeated nor safely cached; "
            "push the images with `make images images-push TARGETS='cpu gpu' REGISTRY=<host>/<name>`, or allow tags with --allow-tag"
        )
    return images


def _read(lock: Path) -> dict[str, str]:
    if not lock.is_file():
        return {}
    try:
        found = json.loads(lock.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DiffstillError(f"{lock}: is not JSON ({error}); write it anew with `make images-push`") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DiffstillError(f"{lock}: is not a mapping of names to image references; write it anew with `make images-push`")
    return found
