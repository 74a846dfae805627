"""Benchmarks against every honest peer: `pytest bench/ --benchmark-only`, or `python -m bench`."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler's start and stop, every time
