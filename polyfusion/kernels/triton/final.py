"""The generator's last layer, tanh of a 4×4 stride-2 transposed convolution to very few channels.

It is bound by memory. Output pixel (2i + r, 2j + q) sums over input pixels (i + dy, j + dx) with
dy, dx in {-1, 0, 1} and taps ky = r + 1 - 2 dy, kx = q + 1 - 2 dx, where these exist. So a program
of the forward takes input pixels and computes their four output pixels from nine neighbours; the
backward reads the 16 output pixels around each input pixel once, for both gradients.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from polyfusion.kernels.layout import channels_last, empty_channels_last, sum_dtype
from polyfusion.kernels.triton.common import (
    arithmetic,
    block,
    capability,
    cdiv,
    jit,
    launch,
    uses_tensor_cores,
)
from polyfusion.kernels.triton.tune import Options, Tile, tuned, vary


@jit
def _forward_kernel(
    x, weight, result, rows, height, width,
    CHANNELS: tl.constexpr, OUT: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    i, j = row // width % height, row % width
    k = tl.arange(0, BLOCK_K)  # (r, q, output channel)
    r, q, out = k // (2 * OUT), k // OUT % 2, k % OUT
    acc = tl.zeros((BLOCK_P, BLOCK_K), ACC)
    for neighbour in range(9):
        dy, dx = neighbour // 3 - 1, neighbour % 3 - 1
        inside = (row < rows) & (i + dy >= 0) & (i + dy < height) & (j + dx >= 0) & (j + dx < width)
        ky, kx = r + 1 - 2 * dy, q + 1 - 2 * dx
        tap = (r < 2) & (ky >= 0) & (ky < 4) & (kx >= 0) & (kx < 4)
        for start in range(0, CHANNELS, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            values = tl.load(
                x + (row + dy * width + dx)[:, None] * CHANNELS + c[None, :],
                mask=inside[:, None] & (c < CHANNELS)[None, :], other=0.0,
            )
            w = tl.load(
                weight + ((c[:, None] * OUT + out[None, :]) * 4 + ky[None, :]) * 4 + kx[None, :],
                mask=tap[None, :] & (c < CHANNELS)[:, None], other=0.0,
            )
            acc = tl.dot(
                values.to(COMPUTE), w.to(COMPUTE), acc, input_precision=PRECISION, out_dtype=ACC
            )
    # tanh, without overflow
    decay = tl.exp(-2.0 * tl.abs(acc))
    y = (1.0 - decay) / (1.0 + decay)
    y = tl.where(acc < 0, -y, y)
    image = row // (height * width)
    at = (image * 2 * height + 2 * i)[:, None] + r[None, :]
    at = (at * 2 * width + 2 * j[:, None] + q[None, :]) * OUT + out[None, :]
    tl.store(
        result + at, y.to(result.dtype.element_ty), mask=(row < rows)[:, None] & (r < 2)[None, :]
    )


@jit
def _backward_kernel(
    grad, result, x, weight, dx, dweight, rows, height, width,
    CHANNELS: tl.constexpr, OUT: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dx of the tiles of rows that fall to this program, and their share of dweight."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)  # (output channel, ky, kx), as the weight
    out, ky, kx = k // 16, k // 4 % 4, k % 4
    of_weight = c[:, None] * (16 * OUT) + k[None, :]
    exists = (c < CHANNELS)[:, None] & (out < OUT)[None, :]
    w = tl.load(weight + of_weight, mask=exists, other=0.0).to(COMPUTE)
    acc = tl.zeros((BLOCK_C, BLOCK_K), ACC)
    for start in range(tl.program_id(0) * BLOCK_P, rows, tl.num_programs(0) * BLOCK_P):
        row = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        image, i, j = row // (height * width), row // width % height, row % width
        oy = 2 * i[:, None] - 1 + ky[None, :]
        ox = 2 * j[:, None] - 1 + kx[None, :]
        inside = (row < rows)[:, None] & (out < OUT)[None, :]
        inside &= (oy >= 0) & (oy < 2 * height) & (ox >= 0) & (ox < 2 * width)
        at = (image[:, None] * 2 * height + oy) * 2 * width + ox
        at = at * OUT + out[None, :]
        y = tl.load(result + at, mask=inside, other=0.0).to(ACC)
        g = tl.load(grad + at, mask=inside, other=0.0).to(ACC) * (1.0 - y * y)
        g = g.to(COMPUTE)
        here = row[:, None] * CHANNELS + c[None, :]
        live = (row < rows)[:, None] & (c < CHANNELS)[None, :]
        values = tl.load(x + here, mask=live, other=0.0).to(COMPUTE)
        product = tl.dot(g, tl.trans(w), input_precision=PRECISION, out_dtype=ACC)
        tl.store(dx + here, product.to(dx.dtype.element_ty), mask=live)
        acc = tl.dot(tl.trans(values), g, acc, input_precision=PRECISION, out_dtype=ACC)
    part = tl.program_id(0).to(tl.int64) * CHANNELS * 16 * OUT
    tl.store(dweight + part + of_weight, acc, mask=exists)


def config(kernel: str, x: Tensor, out: int, constants: dict[str, Any]) -> dict[str, int]:
    """Tile sizes and warps of the ``"forward"`` or the ``"backward"`` kernel."""
    columns = 4 * out if kernel == "forward" else 16 * out
    tile = {"BLOCK_C": block(x.shape[1], 16, 64), "BLOCK_K": block(columns)}
    if capability(x) is None:
        most = 2**20 // max(tile["BLOCK_C"], tile["BLOCK_K"])  # Triton's limit
        return {**tile, "BLOCK_P": block(x.numel() // max(1, x.shape[1]), 16, most)}
    if uses_tensor_cores(constants):
        rows = 128 if kernel == "forward" else 64
        if kernel == "backward" and constants["PRECISION"] == "tf32":  # twice the registers
            tile["BLOCK_C"], rows = min(tile["BLOCK_C"], 32), 32
        return {**tile, "BLOCK_P": rows, "num_warps": 4, "num_stages": 2}
    tile["BLOCK_C"] = min(tile["BLOCK_C"], 32 if kernel == "forward" else 16)
    double = constants["COMPUTE"] == tl.float64
    return {**tile, "BLOCK_P": 16 if double else 32, "num_warps": 4, "num_stages": 1}


def options(kernel: str, x: Tensor, out: int, constants: dict[str, Any]) -> Options:
    """What to choose from for the ``"forward"`` or the ``"backward"`` kernel."""
    cores = [{"BLOCK_P": 256, "num_warps": 8} if kernel == "forward" else {"BLOCK_P": 32}]
    plain = [{"BLOCK_P": 64} if kernel == "forward" else {"num_warps": 8}]
    tiles = vary(config(kernel, x, out, constants), x, constants, cores, plain)
    return Options(f"final {kernel}", (*x.shape, out), tiles)


def final_forward(x: Tensor, weight: Tensor) -> Tensor:
    """tanh of the transposed convolution of x (N, C, H, W) by weight (C, out, 4, 4)."""
    x = channels_last(x)
    n, channels, height, width = x.shape
    out = weight.shape[1]
    result = empty_channels_last(x, n, out, 2 * height, 2 * width)
    constants, weight = arithmetic(x, convolution=True), weight.contiguous()
    rows = n * height * width

    def run(tile: Tile) -> Tensor:
        launch(
            _forward_kernel, (cdiv(rows, tile["BLOCK_P"]),),
            x, weight, result, rows, height, width,
            CHANNELS=channels, OUT=out, **constants, **tile,
        )
        return result

    return tuned(options("forward", x, out, constants), x, constants, run)


def final_backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor) -> list[Tensor]:
    """Gradients of x and weight; x's in channels-last memory. Sums run in a fixed order."""
    grad, x, y = channels_last(grad), channels_last(x), channels_last(y)
    n, channels, height, width = x.shape
    out, rows = weight.shape[1], n * height * width
    constants, weight = arithmetic(x, convolution=True), weight.contiguous()
    dx = torch.empty_like(x)

    def run(tile: Tile) -> list[Tensor]:
        across = cdiv(max(1, channels), tile["BLOCK_C"])
        programs = min(cdiv(rows, tile["BLOCK_P"]), max(1, 512 // across))
        parts = x.new_empty(programs, *weight.shape, dtype=sum_dtype(x))
        launch(
            _backward_kernel, (programs, across if channels else 0),
            grad, y, x, weight, dx, parts, rows, height, width,
            CHANNELS=channels, OUT=out, **constants, **tile,
        )
        return [dx, parts.sum(0).to(weight.dtype)]

    return tuned(options("backward", x, out, constants), x, constants, run)
