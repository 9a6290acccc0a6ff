"""The one error that a user can cause: it names the value, the rule and the fix."""


class DiffstillError(ValueError):
    """Bad input at a boundary. The command line prints its message alone and exits with 2."""
