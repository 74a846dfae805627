"""Choose Triton's CPU interpreter on machines without a GPU, before Triton is imported."""

import os
import sys

import torch


def prefer_interpreter_without_gpu() -> None:
    """Set ``TRITON_INTERPRET=1`` if there is no CUDA device and the user has not decided.

    Triton reads the variable while it is imported, and ``torch.optim`` imports Triton, so this runs
    as soon as polyfusion is imported. Without a GPU no Triton kernel could run otherwise.
    """
    if "triton" in sys.modules or torch.cuda.is_available():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
