"""The one error a user can cause, and how a program ends."""

import sys
from collections.abc import Callable, Collection

FINISHED, FAILED, WRONG_SETTINGS, BUSY, INTERRUPTED = 0, 1, 2, 75, 85  # exit codes


class SettingsError(ValueError):
    """A setting that cannot be used: one sentence with the value, what is allowed, and the remedy.

    The command line prints it without a traceback and exits with WRONG_SETTINGS.
    """


def exit_code(main: Callable[[], int | None]) -> int:
    """What a program ends with: `main`'s code, or WRONG_SETTINGS after the sentence of a SettingsError."""
    try:
        return main() or FINISHED
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_SETTINGS


def check_choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raises SettingsError unless `value` is one of the `allowed` names."""
    if value not in allowed:
        raise SettingsError(f"{name}={value!r}: choose one of {', '.join(map(str, allowed))}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises SettingsError unless value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"{name}={value!r}: must be a whole number of at least {least}")
