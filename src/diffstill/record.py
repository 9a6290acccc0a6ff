"""What a stage may tell the outside world while it works, and the silent listener that is the default."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


class Progress(Protocol):
    """A running count of work done."""

    def update(self, n: int = 1) -> object:
        """Count `n` more units as done."""
        ...


class Record(Protocol):
    """Where a stage sends its metrics, pictures and progress; it never asks who listens."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log scalar `values` at `step`."""
        ...

    def file(self, path: Path) -> None:
        """Log a file (a contact sheet, a figure, a page) by the name it has."""
        ...

    def image(self, name: str, draw: Callable[[], Image], step: int) -> None:
        """Log a picture at `step`, one of a series called `name`; nobody draws what nobody looks at."""
        ...

    def progress(self, description: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Progress]:
        """Open a progress bar over `total` units, `done` of them finished earlier."""
        ...


class _NoProgress:
    def update(self, n: int = 1) -> None:
        pass


class _Ignore:
    def metrics(self, values: Mapping[str, float], step: int) -> None:
        pass

    def file(self, path: Path) -> None:
        pass

    def image(self, name: str, draw: Callable[[], Image], step: int) -> None:
        pass

    @contextmanager
    def progress(self, description: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
        yield _NoProgress()


ignore: Record = _Ignore()
