"""Names that come from outside - of a manifest, a table, an archive, a store - checked before one of them becomes a path."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

OURS = re.compile(r"metadata\.(csv|jsonl|parquet)|classes\.json|manifest\.json|seed-\d+(\.png)?|\.ds_store|thumbs\.db|desktop\.ini", re.IGNORECASE)
"""Files that lie beside class folders, or are left out wherever they lie."""
WINDOWS = re.compile(r"(con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3])(\..*)?", re.IGNORECASE)
"""Names that Windows gives to devices."""
LONGEST_NAME = 255
"""Bytes of UTF-8 that file systems give to a name."""


def is_inside(path: str) -> bool:
    """Whether it is the path of a file below whatever folder it is appended to."""
    found = PurePosixPath(path)
    return str(found) == path and "\0" not in path and path != "." and not found.is_absolute() and ".." not in found.parts


def is_name(name: object) -> bool:
    """Whether it is the name of one file or folder, and no path."""
    if not isinstance(name, str) or not is_inside(name) or "/" in name:
        return False
    return len(name.encode(errors="surrogatepass")) <= LONGEST_NAME


def flaw(name: str) -> str | None:
    """What keeps a class from being called so: sets are folders of class folders, on whatever system they end up."""
    if not is_name(name):
        return f"is no name of a folder of at most {LONGEST_NAME} bytes"
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in name):
        return "has control characters"
    if OURS.fullmatch(name):
        return "is that of a file which lies beside the class folders of a set"
    if WINDOWS.fullmatch(name) or name[-1] in ". " or "\\" in name:
        return "is none that Windows can have: reserved, with a backslash, or with a dot or a space at its end"
    return None


def composed(name: str) -> str:
    """The one spelling (NFC) of a name: systems store accents as they please, apart from their letters or with them."""
    return unicodedata.normalize("NFC", name)
