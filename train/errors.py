"""What the commands share: a user's mistake is one line on stderr and exit code 2."""

import sys
from collections.abc import Callable
from typing import Any

from polyfusion.ops._dispatch import KernelsUnavailable
from train.config import UserError
from train.data.media import MediaError
from train.data.prepared import DataError
from train.metrics.score import MetricError
from train.tasks import TaskFailed

MISTAKES = (UserError, DataError, MetricError, MediaError, KernelsUnavailable, TaskFailed)


def run(command: Callable[[], Any], stopped: str = "nothing was written") -> int:
    """Call ``command`` and return the exit code; ``stopped`` is what to say after Ctrl-C."""
    try:
        command()
    except MISTAKES as error:
        # an error of a loader's worker comes with the worker's traceback in front of it
        line = str(error).strip().splitlines()[-1]
        print(f"error: {line.removeprefix(f'{DataError.__module__}.DataError: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        return 130
    return 0
