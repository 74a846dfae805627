"""python -m train: train the talking-face GAN. See ``python -m train --help``."""

import sys

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
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
