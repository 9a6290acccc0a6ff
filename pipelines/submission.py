"""What is sent to a cluster, made and checked here before the first byte goes out."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from components.images import Images
from diffstill import references
from diffstill.config import Params
from diffstill.errors import DiffstillError
from diffstill.tracking import git_sha
from pipelines.client import Arguments
from pipelines.connection import find_host
from pipelines.distill import arguments
from pipelines.package import write_package
from pipelines.settings import Settings

log = logging.getLogger("diffstill")


@dataclass(frozen=True)
class Submission:
    """A run as it is asked for."""

    name: str
    settings: Settings
    images: Images
    arguments: Arguments
    caching: bool

    def write(self, package: Path) -> None:
        """Compile the package that is uploaded."""
        write_package(self.settings, self.images, package)
        if not self.caching:
            without_caching(package)

    def told(self) -> dict[str, Any]:
        """All that would be sent beside the package, in plain values."""
        cluster = self.settings.cluster
        return {
            "run": self.name,
            "cluster": cluster.plain() | {"host": find_host(cluster)},
            "service_account": self.settings.infra.service_account,
            "images": {"cpu": self.images.cpu, "gpu": self.images.gpu},
            "caching": self.caching,
            "arguments": {name: _opened(value) for name, value in self.arguments.items()},
        }


def prepare(params: Params, settings: Settings, images: Images, *, name: str | None, caching: bool, allow_unpushed: bool) -> Submission:
    """Raises `DiffstillError` on parameters that no cluster can run, and on data that its pods could not get."""
    found = pinned(params, allow_unpushed=allow_unpushed)
    given = arguments(found, settings, settings.shards, data_version(found))
    title = name or f"{params.prepare.source} ipc{params.sample.images_per_class} {git_sha()[:8]}"
    return Submission(title, settings, images, given, caching and images.by_digest)


def pinned(params: Params, *, allow_unpushed: bool) -> Params:
    """The parameters with data in a DVC repository named by commit and md5, so that the cache of the cluster knows it by content."""
    location = params.prepare.location
    if location is None:
        return params
    reference = references.parse(location)
    if reference is None and not location.startswith(("http://", "https://")):
        raise DiffstillError(
            f"`prepare.location` {location!r} is a path of this machine, which the pods of a cluster do not see; "
            f"push the data and name it as s3://<bucket>/<prefix> or {references.FORM}"
        )
    if not isinstance(reference, references.DvcReference):
        return params
    found = references.pin(reference)
    if not allow_unpushed:
        references.refuse_unpushed(found)
    return params.model_copy(update={"prepare": params.prepare.model_copy(update={"location": str(found)})})


def data_version(params: Params) -> str:
    """What tells the data below an S3 prefix from other data there; where this machine cannot list it, a new name each time, so that it is read anew."""
    reference = references.parse(params.prepare.location or "")
    if not isinstance(reference, references.S3Reference):
        return ""
    try:
        return references.listing_digest(reference)
    except DiffstillError as error:
        log.warning("cannot list the data from here, so that the cluster will read it anew: %s", error)
        return uuid4().hex


def refuse_dirty() -> None:
    """Raise `DiffstillError` unless git holds the very code that stands here."""
    sha = git_sha()
    if sha == "none":
        raise DiffstillError("this folder is no git checkout, so that the run could not be traced to its code; submit from one, or use --allow-dirty")
    if sha.endswith("-dirty"):
        raise DiffstillError(
            f"files differ from commit {sha[:8]}, so that the run could not be traced to its code; commit them, or use --allow-dirty"
        )


def without_caching(package: Path) -> None:
    """Rewrite a package so that no task is served from the cache; of an uploaded version kfp cannot ask that for a single run."""
    spec, *platforms = yaml.safe_load_all(package.read_text(encoding="utf-8"))
    for component in (spec["root"], *spec["components"].values()):
        for task in component.get("dag", {}).get("tasks", {}).values():
            if "cachingOptions" in task:
                task["cachingOptions"] = {}
    package.write_text(yaml.safe_dump_all([spec, *platforms]), encoding="utf-8")


def _opened(value: str | list[str]) -> Any:
    """A section is JSON in a text; it reads better opened."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
