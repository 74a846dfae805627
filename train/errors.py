"""A user's mistakes: one base class, and what a command does with them."""

import io
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NoReturn

from polyfusion.ops import KernelsUnavailable


class UserError(Exception):
    """A mistake of the user's; its message is the one line to print before exit code 2."""


class Terminated(BaseException):
    """SIGTERM, as an exception: on its way out it removes what is temporary, as Ctrl-C does."""


def run(command: Callable[[], Any], stopped: str = "nothing was written") -> int:
    """Call ``command`` and return the exit code; ``stopped`` is what to say when it was stopped.

    A full disk, and whatever else the system refuses, ends in one line as a user's mistake does,
    and so do Ctrl-C and SIGTERM.
    """
    print_anything()
    with ExitStack() as afterwards:
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, _terminate)
            afterwards.callback(signal.signal, signal.SIGTERM, before)
        try:
            command()
        except (UserError, KernelsUnavailable) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 2
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            print(f"error: {what}{error.strerror or one_line(error)}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, Terminated) as stop:
            print(f"stopped; {stopped}", file=sys.stderr)
            return 143 if isinstance(stop, Terminated) else 130
    return 0


def _terminate(number: int, _frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated


def print_anything() -> None:
    """Let the output show as ``\\xe9`` what its encoding lacks, which may be ASCII."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def one_line(error: Exception) -> str:
    """What an error says, without the traceback that one of a loader's worker comes with."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
