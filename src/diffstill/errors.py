"""The errors that a user can cause: the message names the value, the rule and the fix, and no secret."""

import re


class DiffstillError(ValueError):
    """Bad input at a boundary. The command line prints its message alone and exits with 2."""

    exit_code = 2


class TransientError(DiffstillError):
    """A service or machine that is away for now: the same again may succeed. A task exits with 75, the command line with 2."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class GateError(DiffstillError):
    """A set that is not shown to be worth publishing; exit code 3."""

    exit_code = 3


def without_secrets(text: str) -> str:
    """`text` with the credentials and queries of all URLs in it blotted out."""
    return re.sub(r"\?[^\s'\"()]+", "?***", re.sub(r"//[^\s'\"()]*@", "//***@", text))
