"""What the calls of the CUDA extension share."""

from collections.abc import Sequence

from torch import Tensor

from polyfusion.dispatch import KernelsUnavailable


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
