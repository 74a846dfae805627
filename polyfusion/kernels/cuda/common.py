"""What the calls of the CUDA extension share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyfusion.dispatch import KernelsUnavailable


def tf32() -> bool:
    """Whether products of float32 may round their operands to tf32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def check_two(views: Sequence[Tensor]) -> None:
    """Raise :class:`KernelsUnavailable` unless there are two views."""
    if len(views) != 2:
        raise KernelsUnavailable(
            f"kernels='cuda': the CUDA kernels fuse 2 views, got {len(views)}; "
            "use kernels='triton' or 'eager'"
        )


def bits(needs: Sequence[bool]) -> int:
    """Which gradients are needed, as one number: bit i is set if gradient i is."""
    return sum(need << i for i, need in enumerate(needs))
