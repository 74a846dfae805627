"""Signals that ask a training to stop: it finishes its step, saves and says how to go on."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

#: Ctrl-C, ``kill`` (also of schedulers and containers), and the end of the terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """The signal that asked to stop, if one did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def code(self) -> int:
        """The exit code of a process that a signal ended, as shells count it; 0 without one."""
        return 128 + self.signal if self.signal else 0

    def request(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal: note it, and let a second one of the kind end the process at once."""
        signal.signal(number, signal.SIG_DFL)
        if self.signal is None:
            self.signal = signal.Signals(number)
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):  # `print` may have been interrupted by this very call
            os.write(2, f"\n{name}: saving after this step; again to stop at once\n".encode())


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Note the first of ``SIGNALS`` in place of ending by it, in the block.

    A signal that is ignored (``nohup``) stays so. Outside the main thread, where Python allows no
    handlers, nothing changes.
    """
    stop = Stop()
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {k: handler for k, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, stop.request)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tell(message: str) -> None:
    """Print to standard error, or to nowhere once the terminal is gone."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:  # a later flush of either stream must not fail: it would change the exit code
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
