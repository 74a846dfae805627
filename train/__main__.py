"""python -m train: train the talking-face GAN. See ``python -m train --help``."""

import os
import sys

# Triton's interpreter multiplies small tiles in NumPy: a second BLAS thread only gets in the way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import polyfusion  # noqa: F401  (first: it chooses Triton's interpreter)
from polyfusion.ops._dispatch import KernelsUnavailable
from train.config import UserError, parse
from train.data.prepared import DataError
from train.loop import train


def main() -> int:
    """Parse, train, and turn a user's mistake into one line and exit code 2."""
    try:
        train(parse())
    except (UserError, DataError, KernelsUnavailable) as error:
        # an error of a loader's worker comes with the worker's traceback in front of it
        line = str(error).strip().splitlines()[-1]
        print(f"error: {line.removeprefix(f'{DataError.__module__}.DataError: ')}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
