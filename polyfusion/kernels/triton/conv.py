"""Implicit-GEMM convolutions whose tiles are one pixel of many frames.

Along the frames nothing moves: a tap reads the same input pixel for the whole tile, and a tap in
the padding is skipped for the whole tile. On 4×3 maps that saves 35 % of a 3×3 convolution, and a
stride-2 transposed convolution visits just the taps of its phase. Maps are in channels-last memory,
where a tile is a plain two-dimensional box; weights (out, in, k, k) may have any strides.

The epilogue can add a clip-constant map to what the statistics see and leave (count, mean, M2) of
its tile for the two-stage merge of :mod:`polyfusion.kernels.triton.norm`.
"""

from typing import Any

import triton.language as tl
from torch import Tensor

from polyfusion.kernels.layout import (
    channels_last,
    conv_size,
    empty_channels_last,
    sum_dtype,
)
from polyfusion.kernels.triton.common import (
    arithmetic,
    block,
    capability,
    cdiv,
    jit,
    launch,
    uses_tensor_cores,
)
from polyfusion.kernels.triton.norm import merge
from polyfusion.kernels.triton.tune import Options, Tile, tuned, vary


@jit
def _source(position, tap, size, STRIDE: tl.constexpr, PADDING: tl.constexpr, UP: tl.constexpr):
    """Where along one axis a tap of an output position reads, and whether that exists."""
    if UP:
        shifted = position + PADDING - tap
        at = shifted // STRIDE
        exists = (shifted >= 0) & (shifted % STRIDE == 0) & (at < size)
    else:
        at = position * STRIDE + tap - PADDING
        exists = (at >= 0) & (at < size)
    return at, exists


@jit
def _conv_kernel(
    x, weight, s, result, counts, means, squares, frames, clip_frames, in_h, in_w, out_h, out_w,
    in_stride, out_stride, y_stride, x_stride,
    IN: tl.constexpr, OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, UP: tl.constexpr, STATISTICS: tl.constexpr, SKIP: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """One output pixel of BLOCK_N frames by BLOCK_O channels. UP: transposed."""
    across = tl.cdiv(OUT, BLOCK_O)
    o = (tl.program_id(0) % across) * BLOCK_O + tl.arange(0, BLOCK_O)
    tile = tl.program_id(0) // across
    tiles = tl.cdiv(frames, BLOCK_N)
    pixel = tile // tiles
    oy, ox = pixel // out_w, pixel % out_w
    n = (tile % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_O), ACC)
    for tap in range(KERNEL * KERNEL):
        ky, kx = tap // KERNEL, tap % KERNEL
        iy, inside_y = _source(oy, ky, in_h, STRIDE, PADDING, UP)
        ix, inside_x = _source(ox, kx, in_w, STRIDE, PADDING, UP)
        if inside_y & inside_x:
            row = (n * in_h + iy) * in_w + ix
            at = weight + ky * y_stride + kx * x_stride
            for start in range(0, IN, BLOCK_I):
                i = start + tl.arange(0, BLOCK_I)
                values = tl.load(
                    x + row[:, None] * IN + i[None, :],
                    mask=(n < frames)[:, None] & (i < IN)[None, :], other=0.0,
                )
                w = tl.load(
                    at + i[:, None] * in_stride + o[None, :] * out_stride,
                    mask=(i < IN)[:, None] & (o < OUT)[None, :], other=0.0,
                )
                acc = tl.dot(
                    values.to(COMPUTE), w.to(COMPUTE), acc,
                    input_precision=PRECISION, out_dtype=ACC,
                )
    live = (n < frames)[:, None] & (o < OUT)[None, :]
    rounded = acc.to(result.dtype.element_ty)
    row = (n * out_h + oy) * out_w + ox
    tl.store(result + row[:, None] * OUT + o[None, :], rounded, mask=live)
    if STATISTICS:
        value = rounded.to(ACC)
        if SKIP:
            clip_row = ((n // clip_frames) * out_h + oy) * out_w + ox
            value += tl.load(s + clip_row[:, None] * OUT + o[None, :], mask=live, other=0.0).to(ACC)
        count = tl.sum((n < frames).to(ACC), axis=0)
        mean = tl.sum(tl.where(live, value, 0.0), axis=0) / count
        distance = tl.where(live, value - mean[None, :], 0.0)
        line = tile.to(tl.int64) * OUT + o
        tl.store(counts + tile, count, mask=tl.program_id(0) % across == 0)
        tl.store(means + line, mean, mask=o < OUT)
        tl.store(squares + line, tl.sum(distance * distance, axis=0), mask=o < OUT)


@jit
def _weight_grad_kernel(
    x, grad, result, frames, in_h, in_w, out_h, out_w,
    IN: tl.constexpr, OUT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """One tap's tile of the gradient (out, k, k, in), over some of the pixels."""
    across = tl.cdiv(IN, BLOCK_I)
    o = (tl.program_id(0) // across) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = (tl.program_id(0) % across) * BLOCK_I + tl.arange(0, BLOCK_I)
    tap = tl.program_id(1)
    ky, kx = tap // KERNEL, tap % KERNEL
    acc = tl.zeros((BLOCK_O, BLOCK_I), ACC)
    for pixel in range(tl.program_id(2), out_h * out_w, tl.num_programs(2)):
        oy, ox = pixel // out_w, pixel % out_w
        iy, inside_y = _source(oy, ky, in_h, STRIDE, PADDING, False)
        ix, inside_x = _source(ox, kx, in_w, STRIDE, PADDING, False)
        if inside_y & inside_x:
            for start in range(0, frames, BLOCK_N):
                n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
                g = tl.load(
                    grad + ((n * out_h + oy) * out_w + ox)[:, None] * OUT + o[None, :],
                    mask=(n < frames)[:, None] & (o < OUT)[None, :], other=0.0,
                )
                values = tl.load(
                    x + ((n * in_h + iy) * in_w + ix)[:, None] * IN + i[None, :],
                    mask=(n < frames)[:, None] & (i < IN)[None, :], other=0.0,
                )
                acc = tl.dot(
                    tl.trans(g.to(COMPUTE)), values.to(COMPUTE), acc,
                    input_precision=PRECISION, out_dtype=ACC,
                )
    part = (tl.program_id(2).to(tl.int64) * OUT + o) * KERNEL * KERNEL + tap
    tl.store(
        result + part[:, None] * IN + i[None, :], acc.to(result.dtype.element_ty),
        mask=(o < OUT)[:, None] & (i < IN)[None, :],
    )


def config(
    kernel: str, x: Tensor, in_channels: int, out_channels: int, constants: dict[str, Any]
) -> dict[str, int]:
    """Tile sizes and warps of the ``"conv"`` or the ``"weight_grad"`` kernel."""
    frames = x.shape[0]
    if capability(x) is None:
        return {
            "BLOCK_N": block(frames), "BLOCK_O": block(out_channels), "BLOCK_I": block(in_channels)
        }
    if not uses_tensor_cores(constants):
        side = 16 if constants["COMPUTE"] == tl.float64 else 32
        return {
            "BLOCK_N": side, "BLOCK_O": side, "BLOCK_I": side, "num_warps": 4, "num_stages": 2
        }
    # float32 operands take twice the registers and the shared memory of half precision.
    half = constants["PRECISION"] == "ieee"
    deep = 64 if half else 32
    if kernel == "weight_grad":
        tile = {"BLOCK_N": deep, "BLOCK_O": block(out_channels, 64, 128)}
        tile["BLOCK_I"] = block(in_channels, 64, 128 if half else 64)
        return {**tile, "num_warps": 8, "num_stages": 3}
    tile = {"BLOCK_N": block(frames, 64, 128), "BLOCK_O": block(out_channels, 64, 128)}
    return {**tile, "BLOCK_I": deep, "num_warps": 8, "num_stages": 3}


def options(
    kernel: str,
    x: Tensor,
    in_channels: int,
    out_channels: int,
    size: int,
    stride: int,
    constants: dict[str, Any],
) -> Options:
    """What to choose from for ``"conv"``, ``"conv_transpose"`` or ``"weight_grad"``."""
    grad = kernel == "weight_grad"
    tile = config("weight_grad" if grad else "conv", x, in_channels, out_channels, constants)
    cores = [{"BLOCK_I": 64} if grad else {"BLOCK_N": 64, "num_warps": 4}]
    plain = [{"BLOCK_O": 64}]
    sizes = (x.shape[0], *x.shape[2:], in_channels, out_channels, size, stride)
    return Options(kernel, sizes, vary(tile, x, constants, cores, plain))


def conv(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """``conv2d(x, weight)`` of x (N, in, H, W) by weight (out, in, k, k)."""
    return _convolve(x, weight, stride, padding, up=False)[0]


def conv_transpose(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """``conv_transpose2d(x, weight)`` of x (N, out, H, W): the gradient of :func:`conv`."""
    return _convolve(x, weight, stride, padding, up=True)[0]


def conv_statistics(
    x: Tensor, weight: Tensor, s: Tensor | None, stride: int, padding: int, up: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """u = :func:`conv` or :func:`conv_transpose`, and mean and biased variance of u + s."""
    u, counts, means, squares = _convolve(x, weight, stride, padding, up, s, statistics=True)
    return u, *merge(counts, means, squares)


def weight_grad(x: Tensor, grad: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Gradient (out, in, k, k) of :func:`conv` in its weight; ``grad`` is that of its result."""
    x, grad = channels_last(x), channels_last(grad)
    (frames, in_channels, in_h, in_w), (_, out_channels, out_h, out_w) = x.shape, grad.shape
    constants = arithmetic(x, convolution=True)

    def run(tile: Tile) -> Tensor:
        across = cdiv(in_channels, tile["BLOCK_I"])
        down = cdiv(out_channels, tile["BLOCK_O"])
        parts = 1
        if capability(x) is not None:  # enough programs for a large GPU
            programs = max(1, across * down * kernel * kernel)
            parts = max(1, min(out_h * out_w, 512 // programs))
        total = x.dtype if parts == 1 else sum_dtype(x)
        result = x.new_empty(parts, out_channels, kernel, kernel, in_channels, dtype=total)
        launch(
            _weight_grad_kernel, (across * down, kernel * kernel, parts),
            x, grad, result, frames, in_h, in_w, out_h, out_w,
            IN=in_channels, OUT=out_channels, KERNEL=kernel, STRIDE=stride, PADDING=padding,
            **constants, **tile,
        )
        result = result[0] if parts == 1 else result.sum(0).to(x.dtype)
        return result.permute(0, 3, 1, 2)

    choice = options("weight_grad", x, in_channels, out_channels, kernel, stride, constants)
    return tuned(choice, x, constants, run)


def _convolve(
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    up: bool,
    s: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, s = channels_last(x), None if s is None else channels_last(s)
    frames, in_channels, in_h, in_w = x.shape
    kernel = weight.shape[-1]
    out_h, out_w = conv_size((in_h, in_w), kernel, stride, padding, up)
    if up:
        in_stride, out_stride, *taps = weight.stride()
        out_channels = weight.shape[1]
    else:
        out_stride, in_stride, *taps = weight.stride()
        out_channels = weight.shape[0]
    constants = arithmetic(x, convolution=True)
    total = {"dtype": sum_dtype(x)}

    def run(tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result = empty_channels_last(x, frames, out_channels, out_h, out_w)
        rows = out_h * out_w * cdiv(frames, tile["BLOCK_N"])
        parts = rows if statistics else 0
        counts = x.new_empty(parts, **total)
        means, squares = (x.new_empty(parts, out_channels, **total) for _ in range(2))
        launch(
            _conv_kernel, (cdiv(out_channels, tile["BLOCK_O"]) * rows,),
            x, weight, x if s is None else s, result, counts, means, squares,
            frames, max(1, frames // (1 if s is None else max(1, s.shape[0]))),
            in_h, in_w, out_h, out_w, in_stride, out_stride, *taps,
            IN=in_channels, OUT=out_channels, KERNEL=kernel, STRIDE=stride, PADDING=padding, UP=up,
            STATISTICS=statistics, SKIP=s is not None, **constants, **tile,
        )
        return result, counts, means, squares

    name = "conv_transpose" if up else "conv"
    choice = options(name, x, in_channels, out_channels, kernel, stride, constants)
    return tuned(choice, x, constants, run)
