"""Benchmarks against honest peers: ``pytest bench/ --benchmark-only`` or ``python -m bench``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the memory profiler's start and stop, every time
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and memory that it saw freed only
