"""Convolutions on a CPU as one matrix product per tap, for maps so small that padding dominates.

A tap (ky, kx) joins input pixel (s·i + ky - p, s·j + kx - p) to output pixel (i, j). With pixels
outermost, (H, W, N, C), the pixels a tap joins are a slice, those in the padding are never visited
(on 4×3 maps they are 35 % of a 3×3 convolution), and frames times pixels are the rows of one
product. Weights are (out, in, k, k) in channels-last memory, as are the maps.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor

from polyfusion.kernels.eager.product import matmul
from polyfusion.kernels.layout import conv_size

Size = Sequence[int]


def conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """``conv2d(x, weight)`` of x (N, in, H, W)."""
    x = _pixels_first(x)
    small = conv_size(x.shape[:2], weight.shape[-1], stride, padding)
    result = x.new_zeros((*small, x.shape[2], weight.shape[0]))
    for tap, large_at, small_at in _taps(x.shape[:2], small, weight.shape[-1], stride, padding):
        rows = x[large_at]
        product = matmul(rows.flatten(0, 2), _tap(weight, tap).mT)
        result[small_at] += product.view(*rows.shape[:3], product.shape[1])
    return _frames_first(result)


def conv_transpose(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """``conv_transpose2d(x, weight)`` of x (N, out, H, W): the gradient of :func:`conv`."""
    x = _pixels_first(x)
    large = conv_size(x.shape[:2], weight.shape[-1], stride, padding, up=True)
    result = x.new_zeros((*large, x.shape[2], weight.shape[1]))
    for tap, large_at, small_at in _taps(large, x.shape[:2], weight.shape[-1], stride, padding):
        rows = x[small_at]
        product = matmul(rows.flatten(0, 2), _tap(weight, tap))
        result[large_at] += product.view(*rows.shape[:3], product.shape[1])
    return _frames_first(result)


def weight_grad(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Gradient (out, in, k, k) of :func:`conv` in its weight; ``grad`` is that of its result."""
    x, grad = _pixels_first(x), _pixels_first(grad)
    result = x.new_empty(grad.shape[-1], kernel, kernel, x.shape[-1])
    for (ky, kx), large_at, small_at in _taps(x.shape[:2], grad.shape[:2], kernel, stride, padding):
        product = matmul(grad[small_at].flatten(0, 2).mT, x[large_at].flatten(0, 2))
        result[:, ky, kx] = product
    return result.permute(0, 3, 1, 2)


def _taps(
    large: Size, small: Size, kernel: int, stride: int, padding: int
) -> Iterator[tuple[Size, tuple[slice, slice], tuple[slice, slice]]]:
    """Every tap with the slices of the pixels it joins, in the large and in the small map."""
    for ky in range(kernel):
        large_y, small_y = _joined(large[0], small[0], ky - padding, stride)
        for kx in range(kernel):
            large_x, small_x = _joined(large[1], small[1], kx - padding, stride)
            yield (ky, kx), (large_y, large_x), (small_y, small_x)


def _joined(large: int, small: int, shift: int, stride: int) -> tuple[slice, slice]:
    """The j with 0 <= stride·j + shift < large, as a slice of large positions and of small ones."""
    first = max(0, -(shift // stride))
    count = max(0, min(small, (large - 1 - shift) // stride + 1) - first)
    start = stride * first + shift
    return slice(start, start + stride * count, stride), slice(first, first + count)


def _tap(weight: Tensor, tap: Size) -> Tensor:
    """(out, in), dense: oneDNN takes a slow path for a strided operand."""
    return weight[:, :, tap[0], tap[1]].contiguous()


def _pixels_first(x: Tensor) -> Tensor:
    return x.permute(2, 3, 0, 1).contiguous()


def _frames_first(x: Tensor) -> Tensor:
    """(N, C, H, W) in channels-last memory."""
    return x.permute(2, 0, 1, 3).contiguous().permute(0, 3, 1, 2)
