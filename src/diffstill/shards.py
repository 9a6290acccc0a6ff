"""Work cut into shards: each process makes some files of an artifact, and gathered they are what one process makes.

The pieces of the work are numbered in one fixed order, whatever the number of shards; shard i of n takes the pieces
i, i + n, i + 2n, ... A shard's artifact says so in its facts (`shard`); only `Share.gather` opens it.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from diffstill.artifacts import MANIFEST, Artifact, Kind, open_artifact
from diffstill.config import Section
from diffstill.errors import DiffstillError

Piece = TypeVar("Piece")


@dataclass(frozen=True)
class Shard:
    """Shard `index` of `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> Self | None:
        """From `<index>/<count>`, counted from 0; None without a text. Raises `DiffstillError` on anything else."""
        if not text:
            return None
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if not found or int(found[1]) >= int(found[2]):
            raise DiffstillError(f"shard {text!r} is not <index>/<count> with the index counted from 0; the first of three is 0/3")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True)
class Share:
    """What one process does of a stage: everything, one shard of it, or gathering the shards in `parts`."""

    shard: Shard | None
    parts: tuple[Path, ...]

    @classmethod
    def of(cls, shard: str | None, parts: Sequence[Path]) -> Self:
        """Raises `DiffstillError` on a malformed shard, and on a shard with parts."""
        if shard and parts:
            raise DiffstillError(f"shard {shard!r} and parts are given together; make a shard, or gather all of them")
        return cls(Shard.parse(shard), tuple(parts))

    @property
    def whole(self) -> bool:
        """Whether what is written is the whole artifact."""
        return self.shard is None

    def of_pieces(self, pieces: Sequence[Piece]) -> list[Piece]:
        """The pieces that this process makes."""
        return list(pieces[self.shard.index :: self.shard.count] if self.shard else pieces)

    def facts(self) -> dict[str, str]:
        """What marks the artifact of a shard."""
        return {"shard": str(self.shard)} if self.shard else {}

    def gather(self, folder: Path, kind: Kind, config: Section, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """Copy the files of all parts into `folder`; the facts of the whole.

        Raises `DiffstillError` unless the parts are all the shards of one cut, made with `config` from `inputs`.
        """
        parts = [open_artifact(part, kind, shard=True) for part in self.parts]
        digests = {name: artifact.digest for name, artifact in inputs.items()}
        for part in parts:
            if part.manifest.config != config.plain() or part.manifest.inputs != digests:
                raise DiffstillError(f"{part.folder}: was made with other settings or from other inputs than asked for now; make its shards anew")
        _refuse_incomplete([Shard.parse(part.facts["shard"]) for part in parts])
        for part in parts:
            shutil.copytree(part.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        return {name: value for name, value in parts[0].facts.items() if name != "shard"}


def _refuse_incomplete(shards: Sequence[Shard | None]) -> None:
    count = next(shard.count for shard in shards if shard)
    if Counter(shards) != Counter(Shard(index, count) for index in range(count)):
        raise DiffstillError(
            f"parts are the shards {', '.join(sorted(map(str, shards)))}, not each of one cut once; give all {count} shards of one command"
        )
