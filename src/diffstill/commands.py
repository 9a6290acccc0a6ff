"""What every program of the project does alike: a user's error is one message, Ctrl-C says what is kept, any standard stream will do."""

from __future__ import annotations

import codecs
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from diffstill.errors import DiffstillError, GateError

MENDABLE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "mend the permissions or choose another folder"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "choose another folder"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space or choose another disk"),
}
"""What a user can do about an error of the file system; any other is a bug of ours."""
PATIENCE = 1.0
"""Seconds after Ctrl-C in which threads may end and trackers be told; then the process ends, as it survives any kill."""
LINES = {chr(code): "+" for code in range(0x2500, 0x2580)} | dict.fromkeys("─━═", "-") | dict.fromkeys("│┃║", "|")
SPELLED = LINES | {"−": "-", "±": "+-", "×": "x", "→": "->", "…": "...", "•": "*", "\u00a0": " ", "\u202f": " "}
"""What our texts and rich's tables use beyond ASCII, for terminals and logs that take no more."""


class Refusal(click.ClickException):
    """What the user can mend: one message, exit code 2."""

    exit_code = DiffstillError.exit_code

    def show(self, file: Any = None) -> None:  # noqa: ARG002  (click's signature)
        """Print the message."""
        rank = os.environ.get("RANK", "0")
        click.echo(f"error: {'' if rank == '0' else f'rank {rank}: '}{self.message}", err=True)


class GateRefusal(Refusal):
    """A set that is not worth publishing: one message, exit code 3."""

    exit_code = GateError.exit_code


class Interruption(click.ClickException):
    """Ctrl-C: what is kept, exit code 130 as shells have it."""

    exit_code = 128 + signal.SIGINT

    def __init__(self, told: str = "") -> None:
        super().__init__(f"interrupted: {told or _kept[-1]()}")

    def show(self, file: Any = None) -> None:  # noqa: ARG002  (click's signature)
        """Print the message, once."""
        if not _told.is_set() and os.environ.get("RANK", "0") == "0":
            _told.set()
            click.echo(self.message, err=True)


class _Alike:
    def main(self, *arguments: Any, **options: Any) -> Any:
        """Run the program."""
        mend_streams()
        with _in_time():
            return super().main(*arguments, **options)  # type: ignore[misc]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except KeyboardInterrupt as stop:
            raise Interruption(*stop.args) from None
        except DiffstillError as error:
            raise (GateRefusal if isinstance(error, GateError) else Refusal)(str(error)) from error
        except OSError as error:
            if error.errno not in MENDABLE:
                raise
            place = f"{error.filename}: " if error.filename else ""
            raise Refusal(f"{place}{error.strerror}; {MENDABLE[error.errno]}") from error


class Group(_Alike, click.Group):
    """Commands that print a user's error as one message, exit code 2; a bug keeps its traceback."""


class Command(_Alike, click.Command):
    """A program of one command, with the manners of `Group`."""


# Ctrl-C

_kept: list[Callable[[], str]] = [lambda: "what is finished is kept, and the same command goes on from there"]
_told, _interrupted = threading.Event(), threading.Event()


@contextmanager
def keeping(told: Callable[[], str]) -> Iterator[None]:
    """Inside, an interruption says `told()`: what is kept, and how to go on."""
    _kept.append(told)
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(*stop.args or [told()]) from None
    finally:
        _kept.pop()


@contextmanager
def _in_time() -> Iterator[None]:
    """Ctrl-C ends the process in time, whatever its threads and kernels are busy with: Python's own handler waits for the main thread.

    Nothing is changed where Ctrl-C is ignored, or somebody else's business.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _told.clear()
    signal.signal(signal.SIGINT, _interrupt)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_leave_on_interrupt, args=(reading,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(writing)
        if _interrupted.is_set():  # all blocks have ended: what is left is Python's own end, which waits for threads and takes apart libraries
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(Interruption.exit_code)


def _interrupt(*_signal: object) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


def _leave_on_interrupt(reading: int) -> None:
    """Wait for the number of a signal, and if it is that of Ctrl-C, end the process a little later."""
    with os.fdopen(reading, "rb", buffering=0) as signals:
        while number := signals.read(1):
            if number[0] == signal.SIGINT and signal.getsignal(signal.SIGINT) is _interrupt:
                time.sleep(PATIENCE)
                Interruption().show()
                os._exit(Interruption.exit_code)


# Standard streams


def mend_streams() -> None:
    """Give the process the standard streams it was started without, and let those that it has take any text.

    Without this the next file that is opened becomes standard error, and warnings of C libraries are written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="diffstill.spell")


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(SPELLED.get(one) or one.encode("ascii", "backslashreplace").decode() for one in lacking), error.end


codecs.register_error("diffstill.spell", _spell)
