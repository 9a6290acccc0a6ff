"""Where a distilled set comes from: every artifact from the raw data to the set and its report, and the parameters that made them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from diffstill.artifacts import Artifact, Manifest, ancestors
from diffstill.config import Params, read_json
from diffstill.errors import DiffstillError

SECTIONS = {
    "images": "prepare",
    "generator": "pretrain",
    "latents": "encode",
    "denoiser": "finetune",
    "distilled": "sample",
    "scores": "evaluate",
    "report": "report",
    "card": "publish",
}
"""The section of params.yaml that makes each kind of artifact."""


@dataclass(frozen=True)
class Ancestor:
    """One artifact of a lineage; `name` is its folder in a chain, such as `scores/real-convnet-3`."""

    name: str
    digest: str
    manifest: Manifest


@dataclass(frozen=True)
class Lineage:
    """Artifacts in the order in which they were made, the earliest first."""

    artifacts: tuple[Ancestor, ...]

    @classmethod
    def of(cls, *artifacts: Artifact) -> Lineage:
        """All that these descend from, and they themselves. Raises `DiffstillError` where a manifest is damaged or lacking."""
        manifests = {digest: manifest for artifact in artifacts for digest, manifest in ancestors(artifact).items()}
        manifests |= {artifact.digest: artifact.manifest for artifact in artifacts}
        return cls(tuple(Ancestor(_name(manifests[digest]), digest, manifests[digest]) for digest in _in_order(manifests)))

    def __getitem__(self, name: str) -> Ancestor:
        """The artifact of that name. Raises `DiffstillError` if there is none or more than one."""
        found = [one for one in self.artifacts if one.name == name]
        if len(found) != 1:
            raise DiffstillError(
                f"the lineage has {len(found)} artifacts {name!r}, expected one; it has {', '.join(one.name for one in self.artifacts)}"
            )
        return found[0]

    def data(self) -> dict[str, str]:
        """The raw data: `source`, `location` where it has one, and for a DVC repository `revision` and `md5`."""
        config = self["images"].manifest.config
        location = config["location"]
        if not location:
            return {"source": config["source"]}
        query = {name: values[0] for name, values in parse_qs(location.partition("?")[2]).items()} if location.startswith("dvc") else {}
        known = {name: query[field] for name, field in (("revision", "rev"), ("md5", "md5")) if field in query}
        return {"source": config["source"], "location": location, **known}

    def params(self) -> Params:
        """The parameters of the whole chain; steps that it lacks have their defaults, judging that of the sizes there are.

        Raises `DiffstillError` where this version of diffstill does not know them, or steps disagree.
        """
        sections: dict[str, Any] = {}
        for one in self.artifacts:
            section = SECTIONS[one.manifest.kind]
            if sections.setdefault(section, one.manifest.config) != one.manifest.config:
                raise DiffstillError(f"two artifacts were made by different sections `{section}`, so one set of parameters does not give them both")
        if "sample" in sections:
            sections.setdefault("evaluate", {"images_per_class": [sections["sample"]["images_per_class"]]})
        try:
            return read_json(json.dumps(sections), Params)
        except DiffstillError as error:
            raise DiffstillError(f"made with parameters of another version of diffstill ({error}); use the commit that made it") from error

    def plain(self) -> dict[str, Any]:
        """As JSON has it: the raw data, and per artifact its digest, inputs, configuration and facts."""
        steps = [
            {"name": one.name, "digest": one.digest} | one.manifest.model_dump(mode="json", include={"kind", "inputs", "config", "facts"})
            for one in self.artifacts
        ]
        return {"data": self.data(), "artifacts": steps}

    def lines(self) -> Iterator[tuple[str, str, str]]:
        """Name, digest and origin of each artifact, the raw data first."""
        names = {one.digest: one.name for one in self.artifacts}
        raw = self.data()
        yield "raw data", raw.get("location", raw["source"]), ""
        for one in self.artifacts:
            origins = [names[digest] for digest in one.manifest.inputs.values()]
            scores = [name for name in origins if name.startswith("scores/")]
            told = [name for name in origins if name not in scores] + ([f"{len(scores)} scores"] if len(scores) > 1 else scores)
            yield one.name, one.digest, ", ".join(told) or "raw data"


def _name(manifest: Manifest) -> str:
    """The artifact's folder in a chain."""
    if manifest.kind == "distilled":
        return str(manifest.facts["source"])
    if manifest.kind == "scores":
        source = manifest.facts["sources"][0]
        return f"scores/{source if source in ('distilled', 'untuned') else 'real'}-{'-'.join(manifest.facts['students'])}"
    return manifest.kind


def _in_order(manifests: Mapping[str, Manifest]) -> list[str]:
    """Digests by kind in the order of the stages, which puts inputs before what is made from them; then by name."""
    ranks = list(SECTIONS)
    return sorted(manifests, key=lambda digest: (ranks.index(manifests[digest].kind), _name(manifests[digest]), digest))
