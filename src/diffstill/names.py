"""Names that come from outside - of a manifest, a table, an archive, a store - checked before one of them becomes a path."""

from __future__ import annotations

from pathlib import PurePosixPath

LONGEST_NAME = 255
"""Bytes of UTF-8 that file systems give to a name."""


def is_inside(path: str) -> bool:
    """Whether it is the path of a file below whatever folder it is appended to."""
    found = PurePosixPath(path)
    return str(found) == path and "\0" not in path and path != "." and not found.is_absolute() and ".." not in found.parts


def is_name(name: object) -> bool:
    """Whether it is the name of one file or folder, on any system, and no path."""
    if not isinstance(name, str) or not is_inside(name) or "/" in name or "\\" in name:
        return False
    return len(name.encode(errors="surrogatepass")) <= LONGEST_NAME
