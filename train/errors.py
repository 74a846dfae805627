"""A user's mistakes: one base class, and what a command does with them."""

import io
import sys
from collections.abc import Callable
from typing import Any

from polyfusion.ops import KernelsUnavailable


class UserError(Exception):
    """A mistake of the user's; its message is the one line to print before exit code 2."""


def run(command: Callable[[], Any], stopped: str = "nothing was written") -> int:
    """Call ``command`` and return the exit code; ``stopped`` is what to say after Ctrl-C.

    A full disk, and whatever else the system refuses, ends in one line as a user's mistake does.
    """
    print_anything()
    try:
        command()
    except (UserError, KernelsUnavailable) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        print(f"error: {what}{error.strerror or one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        return 130
    return 0


def print_anything() -> None:
    """Let the output show as ``\\xe9`` what its encoding lacks, which may be ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(error: Exception) -> str:
    """What an error says, without the traceback that one of a loader's worker comes with."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
