"""python -m train: train the talking-face GAN. See ``python -m train --help``."""

import os
import sys

# Triton's interpreter multiplies small tiles in NumPy: a second BLAS thread only gets in the way.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from train.config import parse
from train.errors import run
from train.loop import train


def main() -> int:
    """Parse, train, and turn a user's mistake into one line and exit code 2."""
    return run(lambda: train(parse()))


if __name__ == "__main__":
    sys.exit(main())
