"""What is sent to a cluster, made and checked here before the first byte goes out."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

from components.images import Images
from diffstill import references
from diffstill.config import Params, PretrainConfig
from diffstill.environment import git_sha
from diffstill.errors import DiffstillError
from pipelines.client import Arguments
from pipelines.connection import find_host
from pipelines.distill import arguments, literal
from pipelines.package import write_package
from pipelines.settings import Settings

log = logging.getLogger("diffstill")
CURRENT_TIME = "[[CurrentTime]]"
"""Kubeflow puts the time at which a run is made in its place; it leaves `[[ScheduledTime]]` and `[[Index]]` as they are."""


@dataclass(frozen=True)
class Submission:
    """A run as it is asked for."""

    name: str
    unpinned: Params
    """What each run of a schedule takes: the data by the name that was asked for, all else as it was found."""
    settings: Settings
    images: Images
    arguments: Arguments
    caching: bool

    def write(self, package: Path) -> None:
        """Compile the package that is uploaded."""
        write_package(self.settings, self.images, package, caching=self.caching)

    def repeating(self) -> Self:
        """For a schedule: each run takes the data as they are then, and its time keeps it from being served from the cache; the same of weights in S3."""
        params, weights = self.unpinned, (self.unpinned.pretrain.location, self.unpinned.pretrain.autoencoder)
        changed: dict[str, str] = {}
        if params.prepare.location:
            changed = {"prepare": literal(params.prepare.canonical()), "params": literal(params.canonical()), "data_version": CURRENT_TIME}
        if any(place and place.startswith("s3://") for place in weights):
            changed["weights_version"] = CURRENT_TIME
        return replace(self, arguments={**self.arguments, **changed})

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


def prepare(
    params: Params, settings: Settings, images: Images, *, name: str | None, caching: bool, publish: bool, allow_unpushed: bool
) -> Submission:
    """Raises `DiffstillError` on parameters that no cluster can run, and on data that its pods could not get."""
    _refuse_weights(params)
    found = pinned(params, allow_unpushed=allow_unpushed)
    versions = listed(found.prepare.location), listed(found.pretrain.location, found.pretrain.autoencoder)
    given = arguments(found, settings, settings.shards, *versions, publish=publish)
    title = name or f"{params.prepare.source} ipc{params.sample.images_per_class} {git_sha()[:8]}"
    return Submission(title, found.model_copy(update={"prepare": params.prepare}), settings, images, given, caching and images.by_digest)


def pinned(params: Params, *, allow_unpushed: bool) -> Params:
    """The parameters with what lies in a DVC repository or on the hub named by commit, so that the cache of the cluster knows it by content."""
    params = params.model_copy(update={"pretrain": _pinned_weights(params.pretrain)})
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
    if "://" not in reference.repository:
        log.warning("the repository %s is a path: every pod must see it there", reference.repository)
    found = references.pin(reference)
    if not allow_unpushed:
        references.refuse_unpushed(found)
    return params.model_copy(update={"prepare": params.prepare.model_copy(update={"location": str(found)})})


def _pinned_weights(config: PretrainConfig) -> PretrainConfig:
    named = {name: references.parse(place) for name, place in (("location", config.location), ("autoencoder", config.autoencoder)) if place}
    found = {name: str(references.pin(place)) for name, place in named.items() if place}
    return config.model_copy(update=found)


def _refuse_weights(params: Params) -> None:
    """Weights reach a cluster by the stage, which reads S3, the hub and DVC."""
    for name, place in (("location", params.pretrain.location), ("autoencoder", params.pretrain.autoencoder)):
        if place and not references.parse(place):
            or_else = ", or take ema or mse" * (name == "autoencoder")
            raise DiffstillError(
                f"`pretrain.{name}` {place!r} is a path of this machine, which the pods of a cluster do not see; "
                f"upload the folder and name it as s3://<bucket>/<prefix> or {references.HUB_FORM}{or_else}"
            )
        if place and place.startswith("s3://") and place.endswith((".pt", ".pth", ".safetensors")):
            raise DiffstillError(
                f"`pretrain.{name}` {place!r} names a file, and what is fetched lies below a prefix; give {place.rpartition('/')[0]!r}, with this file in it"
            )


def listed(*locations: str | None) -> str:
    """What tells what lies below S3 prefixes from other things there; where this machine cannot list it, a new name each time, so that it is read anew."""
    named = [references.parse(location) for location in locations if location]
    try:
        return "-".join(references.listing_digest(reference) for reference in named if isinstance(reference, references.S3Reference))
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


def _opened(value: str | list[str]) -> Any:
    """A section is JSON in a text; it reads better opened."""
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value
