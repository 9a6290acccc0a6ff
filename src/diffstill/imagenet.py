"""The 1,000 classes of ImageNet-1K, and the subsets that the literature of dataset distillation uses.

A class is known by its wnid (`n02086240`), its id in WordNet. Its index is its place in the order of all wnids: the label that
generators pre-trained on ImageNet know it by.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class _Class:
    """One class; `positions` are its places in the subsets it belongs to."""

    index: int
    wnid: str
    title: str
    positions: Mapping[str, int]


def _read() -> tuple[_Class, ...]:
    with files("diffstill").joinpath("imagenet_classes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    subsets = [name for name in rows[0] if name not in ("index", "wnid", "name")]
    return tuple(
        _Class(int(row["index"]), row["wnid"], row["name"].split(",")[0], {name: int(row[name]) for name in subsets if row[name]}) for row in rows
    )


_CLASSES = _read()
_BY_WNID = {one.wnid: one for one in _CLASSES}


def _subset(name: str) -> tuple[str, ...]:
    members = [one for one in _CLASSES if name in one.positions]
    return tuple(one.wnid for one in sorted(members, key=lambda one: one.positions[name]))


SUBSETS: Mapping[str, tuple[str, ...]] = {
    **{name: _subset(name) for name in ("imagewoof", "imagenette", "imageidc", "imagenet100")},
    "imagenet1k": tuple(one.wnid for one in _CLASSES),
}
"""The wnids of each subset, in its order; imagenet1k has all, by index."""


def index_of(wnid: str) -> int | None:
    """The index 0..999 of a class; None if `wnid` is not one of ImageNet-1K."""
    found = _BY_WNID.get(wnid)
    return found.index if found else None


def titled(name: str) -> str:
    """A class as people know it: with its English name where it is a wnid, `Shih-Tzu (n02086240)`."""
    title = title_of(name)
    return f"{title} ({name})" if title else name


def title_of(wnid: str) -> str | None:
    """The first of a class's English names, such as `Shih-Tzu`; None if `wnid` is not one of ImageNet-1K."""
    found = _BY_WNID.get(wnid)
    return found.title if found else None
