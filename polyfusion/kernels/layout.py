"""What the backends agree on: the dtype of sums, how maps lie in memory, a convolution's size."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Norm(NamedTuple):
    """One normalisation of u + s with its activation: the operator's arguments, in their order.

    u (B·T, C, H, W), s (B, C, H, W) or None; weight, bias, mean and var (C,). ``mean`` and ``var``
    are None in a forward that takes them from the batch, and never None in a backward. ``batch``
    says whether they are, or were, the batch's: then gradients flow through them.
    """

    u: Tensor
    s: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    var: Tensor | None
    batch: bool
    eps: float
    slope: float

    @property
    def per_channel(self) -> int:
        """The number of values of u per channel, at least 1."""
        return max(1, self.u.numel() // max(1, self.u.shape[1]))


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums and statistics: float64 for doubles, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tf32(convolution: bool = False) -> bool:
    """Whether products of float32 may round their operands to TF32, by PyTorch's two switches.

    ``torch.backends.cuda.matmul.fp32_precision`` is for products, and for a ``convolution``
    ``torch.backends.cudnn.conv.fp32_precision``, which is "tf32" unless somebody changes it.
    """
    # What the switches read; by their names it takes eight times as long.
    precision = torch._C._get_fp32_precision_getter("cuda", "conv" if convolution else "matmul")
    return bool(precision == "tf32")


def per_clip(frames: Tensor, clips: int) -> Tensor:
    """View frames (B·T, ...) as (B, T, ...)."""
    return frames.unflatten(0, (clips, frames.shape[0] // clips if clips else 0))


def channels_last(x: Tensor) -> Tensor:
    """The maps (N, C, H, W) in channels-last memory, copied if they are not."""
    return x.contiguous(memory_format=torch.channels_last)


def empty_channels_last(like: Tensor, n: int, c: int, h: int, w: int) -> Tensor:
    """New maps (n, c, h, w) in channels-last memory, of the dtype and on the device of ``like``."""
    return like.new_empty(n, h, w, c).permute(0, 3, 1, 2)


def row_strides(shape: Sequence[int], element_size: int) -> list[int]:
    """Strides of a new (..., width) whose rows begin at multiples of 16 bytes.

    That is what a GPU's widest loads and asynchronous copies need: m + n = 394 values of two bytes
    take the room of 400. The room behind a row belongs to nobody.
    """
    *leading, width = shape
    step = 16 // element_size
    strides, stride = [1], -(-width // step) * step
    for size in reversed(leading):
        strides.append(stride)
        stride *= max(1, size)
    return strides[::-1]


def empty_rows(like: Tensor, shape: Sequence[int]) -> Tensor:
    """New (..., width) of the dtype and on the device of ``like``, with :func:`row_strides`."""
    return like.new_empty_strided(shape, row_strides(shape, like.element_size()))


def as_rows(x: Tensor) -> Tensor:
    """(..., width) as a matrix whose values in a row lie side by side, copied if they do not."""
    rows = x.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def lie_as(x: Tensor, like: Tensor) -> Tensor:
    """The values of x with the strides of ``torch.empty_like(like)``, copied if they differ."""
    same = torch.empty_like(like, device="meta").stride() == x.stride()
    return x if same else torch.empty_like(like).copy_(x)


def conv_size(
    size: Sequence[int], kernel: int, stride: int, padding: int, up: bool = False
) -> list[int]:
    """Height and width of the convolution of a map, transposed if ``up``."""
    if up:
        return [(n - 1) * stride - 2 * padding + kernel for n in size]
    return [(n + 2 * padding - kernel) // stride + 1 for n in size]
