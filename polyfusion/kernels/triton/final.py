"""The generator's last layer, tanh of a 4×4 stride-2 transposed convolution to very few channels.

It is bound by memory, so every map is read once. A program goes down a strip of rows of the input,
or several strips at a time. Row i and the row before it make the rows 2i - 1 and 2i of the result,
of which column j makes the columns 2j and 2j + 1 together with the columns beside it:

- taps ky = ρ of row i and ky = 2 + ρ of row i - 1 meet in row 2i - 1 + ρ;
- taps kx = 1 + q of column j meet in column 2j + q with tap 3 of column j - 1 if q = 0, and with
  tap 0 of column j + 1 if q = 1.

So of the products of one row with the 16 taps a quarter is done, a quarter goes a column aside, and
the two quarters of the taps below wait for the next row. The backward is the transpose: the same
rows and columns, the same four quarters of the weight.
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

INTERPRETED_ROWS = 11
"""Rows of a strip in the interpreter: more take more operations, fewer are read more often."""


@jit
def _columns(BLOCK_O: tl.constexpr):
    """(ρ, q, output channel) of the columns of products and of gradients."""
    k = tl.arange(0, 4 * BLOCK_O)
    return k // (2 * BLOCK_O), k // BLOCK_O % 2, k % BLOCK_O


@jit
def _quarter(
    c, CHANNELS: tl.constexpr, OUT: tl.constexpr,
    LATER: tl.constexpr, ASIDE: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """Where in the weight (C, OUT, 4, 4) a quarter of the taps is, and what of it exists."""
    rho, q, out = _columns(BLOCK_O)
    kx = 3 * (1 - q) if ASIDE else 1 + q
    at = (c[:, None] * OUT + out[None, :]) * 16 + ((2 * LATER + rho) * 4 + kx)[None, :]
    return at, (c < CHANNELS)[:, None] & (out < OUT)[None, :]


@jit
def _weights(
    weight, c, CHANNELS: tl.constexpr, OUT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """The quarters of the weight: for the row itself, here and aside; for the next, the same."""
    at, exists = _quarter(c, CHANNELS, OUT, 0, 0, BLOCK_O)
    here = tl.load(weight + at, mask=exists, other=0.0).to(COMPUTE)
    at, exists = _quarter(c, CHANNELS, OUT, 0, 1, BLOCK_O)
    aside = tl.load(weight + at, mask=exists, other=0.0).to(COMPUTE)
    at, exists = _quarter(c, CHANNELS, OUT, 1, 0, BLOCK_O)
    later = tl.load(weight + at, mask=exists, other=0.0).to(COMPUTE)
    at, exists = _quarter(c, CHANNELS, OUT, 1, 1, BLOCK_O)
    later_aside = tl.load(weight + at, mask=exists, other=0.0).to(COMPUTE)
    return here, aside, later, later_aside


@jit
def _place(
    job, maps, width, strips, rows, tiles, BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr
):
    """Maps, columns and first rows of strips; which columns exist, and which have both neighbours.

    Jobs are counted over groups of strips, of one map or several, and tiles of columns.
    """
    p = tl.arange(0, BLOCK_P)
    strip = job // tiles * (BLOCK_P // BLOCK_W) + p // BLOCK_W
    image, first = strip // strips, strip % strips * rows
    column = job % tiles * (BLOCK_W - 2) - 1 + p % BLOCK_W  # one more at both sides
    exists = (image < maps) & (column >= 0) & (column < width)
    whole = exists & (p % BLOCK_W > 0) & (p % BLOCK_W < BLOCK_W - 1)
    return image.to(tl.int64), column, first, exists, whole


@jit
def _neighbour(values, SIGN: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr):
    """The values of column j - SIGN where q = 0, and of column j + SIGN where q = 1."""
    _rho, q, _out = _columns(BLOCK_O)
    source = tl.arange(0, BLOCK_P)[:, None] + SIGN * (2 * q - 1)[None, :]
    return tl.gather(values, tl.minimum(tl.maximum(source, 0), BLOCK_P - 1), 0)


@jit
def _forward_kernel(
    x, weight, result, maps, height, width, strips, rows, tiles,
    CHANNELS: tl.constexpr, OUT: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):
    image, column, first, exists, whole = _place(
        tl.program_id(0), maps, width, strips, rows, tiles, BLOCK_P, BLOCK_W
    )
    rho, q, out = _columns(BLOCK_O)
    w0, w1, w2, w3 = _weights(weight, tl.arange(0, BLOCK_C), CHANNELS, OUT, COMPUTE, BLOCK_O)
    later = tl.zeros((BLOCK_P, 4 * BLOCK_O), ACC)  # what the row before has for this one
    later_aside = tl.zeros((BLOCK_P, 4 * BLOCK_O), ACC)
    for step in range(rows + 1):
        i = first + step - 1
        here, aside = later, later_aside
        later = tl.zeros((BLOCK_P, 4 * BLOCK_O), ACC)
        later_aside = tl.zeros((BLOCK_P, 4 * BLOCK_O), ACC)
        for start in tl.static_range(0, CHANNELS, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            if BLOCK_C < CHANNELS:
                w0, w1, w2, w3 = _weights(weight, c, CHANNELS, OUT, COMPUTE, BLOCK_O)
            values = tl.load(
                x + ((image * height + i) * width + column)[:, None] * CHANNELS + c[None, :],
                mask=(exists & (i >= 0) & (i < height))[:, None] & (c < CHANNELS)[None, :],
                other=0.0,
            ).to(COMPUTE)
            here = tl.dot(values, w0, here, input_precision=PRECISION, out_dtype=ACC)
            aside = tl.dot(values, w1, aside, input_precision=PRECISION, out_dtype=ACC)
            later = tl.dot(values, w2, later, input_precision=PRECISION, out_dtype=ACC)
            later_aside = tl.dot(
                values, w3, later_aside, input_precision=PRECISION, out_dtype=ACC
            )
        acc = here + _neighbour(aside, 1, BLOCK_O, BLOCK_P)
        decay = tl.exp(-2.0 * tl.abs(acc))  # tanh, without overflow
        y = (1.0 - decay) / (1.0 + decay)
        y = tl.where(acc < 0, -y, y)
        oy = (2 * i - 1)[:, None] + rho[None, :]
        at = (image[:, None] * 2 * height + oy) * 2 * width + 2 * column[:, None] + q[None, :]
        made = (whole & (i >= first))[:, None] & (oy >= 0) & (oy < 2 * height)
        tl.store(
            result + at * OUT + out[None, :], y.to(result.dtype.element_ty),
            mask=made & (out < OUT)[None, :],
        )


@jit
def _backward_kernel(
    grad, result, x, weight, dx, dweight, maps, height, width, strips, rows, tiles, jobs,
    CHANNELS: tl.constexpr, OUT: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr,
):
    """dx of the strips that fall to this program, and their share of dweight."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rho, q, out = _columns(BLOCK_O)
    w0, w1, w2, w3 = _weights(weight, c, CHANNELS, OUT, COMPUTE, BLOCK_O)
    d0 = tl.zeros((BLOCK_C, 4 * BLOCK_O), ACC)
    d1 = tl.zeros((BLOCK_C, 4 * BLOCK_O), ACC)
    d2 = tl.zeros((BLOCK_C, 4 * BLOCK_O), ACC)
    d3 = tl.zeros((BLOCK_C, 4 * BLOCK_O), ACC)
    for job in range(tl.program_id(0), jobs, tl.num_programs(0)):
        image, column, first, exists, whole = _place(
            job, maps, width, strips, rows, tiles, BLOCK_P, BLOCK_W
        )
        here = tl.zeros((BLOCK_P, 4 * BLOCK_O), COMPUTE)  # gradients beside row i - 1
        aside = tl.zeros((BLOCK_P, 4 * BLOCK_O), COMPUTE)
        for step in range(rows + 1):
            i = first + step
            oy = (2 * i - 1)[:, None] + rho[None, :]
            at = (image[:, None] * 2 * height + oy) * 2 * width + 2 * column[:, None] + q[None, :]
            at = at * OUT + out[None, :]
            inside = exists[:, None] & (oy >= 0) & (oy < 2 * height) & (out < OUT)[None, :]
            y = tl.load(result + at, mask=inside, other=0.0).to(ACC)
            g = tl.load(grad + at, mask=inside, other=0.0).to(ACC) * (1.0 - y * y)
            later = g.to(COMPUTE)
            later_aside = _neighbour(later, -1, BLOCK_O, BLOCK_P)
            at = ((image * height + i - 1) * width + column)[:, None] * CHANNELS + c[None, :]
            live = (whole & (i > first) & (i <= height))[:, None] & (c < CHANNELS)[None, :]
            product = tl.dot(here, tl.trans(w0), input_precision=PRECISION, out_dtype=ACC)
            product = tl.dot(
                aside, tl.trans(w1), product, input_precision=PRECISION, out_dtype=ACC
            )
            product = tl.dot(
                later, tl.trans(w2), product, input_precision=PRECISION, out_dtype=ACC
            )
            product = tl.dot(
                later_aside, tl.trans(w3), product, input_precision=PRECISION, out_dtype=ACC
            )
            tl.store(dx + at, product.to(dx.dtype.element_ty), mask=live)
            values = tl.trans(tl.load(x + at, mask=live, other=0.0).to(COMPUTE))
            d0 = tl.dot(values, here, d0, input_precision=PRECISION, out_dtype=ACC)
            d1 = tl.dot(values, aside, d1, input_precision=PRECISION, out_dtype=ACC)
            d2 = tl.dot(values, later, d2, input_precision=PRECISION, out_dtype=ACC)
            d3 = tl.dot(values, later_aside, d3, input_precision=PRECISION, out_dtype=ACC)
            here, aside = later, later_aside
    part = dweight + tl.program_id(0).to(tl.int64) * CHANNELS * 16 * OUT
    at, exists = _quarter(c, CHANNELS, OUT, 0, 0, BLOCK_O)
    tl.store(part + at, d0, mask=exists)
    at, exists = _quarter(c, CHANNELS, OUT, 0, 1, BLOCK_O)
    tl.store(part + at, d1, mask=exists)
    at, exists = _quarter(c, CHANNELS, OUT, 1, 0, BLOCK_O)
    tl.store(part + at, d2, mask=exists)
    at, exists = _quarter(c, CHANNELS, OUT, 1, 1, BLOCK_O)
    tl.store(part + at, d3, mask=exists)


def config(kernel: str, x: Tensor, out: int, constants: dict[str, Any]) -> dict[str, int]:
    """Tile sizes and warps of the ``"forward"`` or the ``"backward"`` kernel.

    ``BLOCK_P`` columns at a time, ``BLOCK_W`` of each strip.
    """
    interpreted, double = capability(x) is None, constants["COMPUTE"] == tl.float64
    across = block(x.shape[3] + 2, 16, 2**20 if interpreted else 32 if double else 64)
    tile = {"BLOCK_W": across, "BLOCK_C": block(x.shape[1], 16, 64), "BLOCK_O": block(out, 4, 64)}
    if interpreted:
        most = 2**20 // max(tile["BLOCK_C"], 4 * tile["BLOCK_O"])  # Triton's limit
        columns = x.shape[0] * cdiv(x.shape[2] + 1, INTERPRETED_ROWS) * across
        return {**tile, "BLOCK_P": max(across, block(columns, 16, most))}
    tile["BLOCK_P"] = 32 if double else 64
    forward, cores = kernel == "forward", uses_tensor_cores(constants)
    if cores and (forward or constants["PRECISION"] != "tf32"):
        warps, stages = (4, 3) if forward else (8, 2)
        return {**tile, "num_warps": warps, "num_stages": stages}
    tile["BLOCK_C"] = min(tile["BLOCK_C"], 32 if cores or forward else 16)  # registers
    return {**tile, "num_warps": 8, "num_stages": 1}


def options(kernel: str, x: Tensor, out: int, constants: dict[str, Any]) -> Options:
    """What to choose from for the ``"forward"`` or the ``"backward"`` kernel."""
    tile = config(kernel, x, out, constants)
    wide = {"BLOCK_P": 2 * tile["BLOCK_P"], "num_warps": 8}
    cores = [wide] if kernel == "forward" else [{"num_stages": 3}]
    if constants["PRECISION"] == "tf32" and kernel == "backward":
        cores = []
    plain = [{"BLOCK_C": 16} if kernel == "forward" else {"num_warps": 4}]
    return Options(f"final {kernel}", (*x.shape, out), vary(tile, x, constants, cores, plain))


def _jobs(x: Tensor, rows: int, tile: Tile) -> tuple[int, int, int, int]:
    """Number of strips of a map, their rows, tiles of columns; and of programs for all of them.

    At most 32 rows, and so many strips that a GPU has something for every multiprocessor.
    """
    n, width = x.shape[0], x.shape[3]
    tiles = cdiv(width, tile["BLOCK_W"] - 2)
    if capability(x) is None:
        strips = cdiv(rows, INTERPRETED_ROWS)
    else:
        strips = max(cdiv(rows, 32), min(rows, cdiv(528, max(1, n * tiles))))
    groups = cdiv(n * strips, tile["BLOCK_P"] // tile["BLOCK_W"])
    return strips, cdiv(rows, strips), tiles, groups * tiles


def final_forward(x: Tensor, weight: Tensor) -> Tensor:
    """tanh of the transposed convolution of x (N, C, H, W) by weight (C, out, 4, 4)."""
    x = channels_last(x)
    n, channels, height, width = x.shape
    out = weight.shape[1]
    result = empty_channels_last(x, n, out, 2 * height, 2 * width)
    constants, weight = arithmetic(x, convolution=True), weight.contiguous()

    def run(tile: Tile) -> Tensor:
        strips, rows, tiles, jobs = _jobs(x, height + 1, tile)
        launch(
            _forward_kernel, (jobs,),
            x, weight, result, n, height, width, strips, rows, tiles,
            CHANNELS=channels, OUT=out, **constants, **tile,
        )
        return result

    return tuned(options("forward", x, out, constants), x, constants, run)


def final_backward(grad: Tensor, x: Tensor, weight: Tensor, y: Tensor) -> list[Tensor]:
    """Gradients of x and weight; x's in channels-last memory. Sums run in a fixed order."""
    grad, x, y = channels_last(grad), channels_last(x), channels_last(y)
    n, channels, height, width = x.shape
    out = weight.shape[1]
    constants, weight = arithmetic(x, convolution=True), weight.contiguous()
    dx = torch.empty_like(x)

    def run(tile: Tile) -> list[Tensor]:
        strips, rows, tiles, jobs = _jobs(x, height, tile)
        across = cdiv(channels, tile["BLOCK_C"])
        programs = min(jobs, max(1, 512 // across))
        parts = x.new_empty(programs, *weight.shape, dtype=sum_dtype(x))
        launch(
            _backward_kernel, (programs, across),
            grad, y, x, weight, dx, parts, n, height, width, strips, rows, tiles, jobs,
            CHANNELS=channels, OUT=out, **constants, **tile,
        )
        return [dx, parts.sum(0).to(weight.dtype)]

    return tuned(options("backward", x, out, constants), x, constants, run)
