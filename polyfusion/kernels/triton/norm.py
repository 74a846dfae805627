"""Batch normalisation and activation of u + s, where the frames of a clip share s.

In channels-last memory u is a matrix of rows (clip, frame, pixel) by channels. A program takes some
of the clips' pixels by some channels and walks over the frames, so that it reads its part of s once
and sums its part of ds alone. Without s, rows are dealt to programs the same way.

Statistics take two stages: every program keeps (count, mean, M2) of what it saw, M2 the sum of
squared distances from its mean, and these are merged in a fixed order. No sum of squares, whose
difference to the squared sum loses all digits at a large mean, and all values are taken relative to
the first one of their channel; no atomics, so it is deterministic.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from polyfusion.kernels.layout import Norm, channels_last, lie_as, sum_dtype
from polyfusion.kernels.triton.common import arithmetic, block, capability, cdiv, dense, jit, launch
from polyfusion.kernels.triton.tune import Options, Tile, tuned, vary


@jit
def _pixels(group, count, frames, pixels, BLOCK_P: tl.constexpr):
    """(BLOCK_P,): pixels of all clips, their rows in the first frame, and which of them exist."""
    p = (group * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    return p, (p // pixels) * frames * pixels + p % pixels, p < count


@jit
def _clip_tile(
    s, p, exists, c, CHANNELS: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """(1, BLOCK_P, BLOCK_C): this program's part of s, where it lies, and what of it exists."""
    at = p[None, :, None] * CHANNELS + c[None, None, :]
    live = exists[None, :, None] & (c < CHANNELS)[None, None, :]
    if SKIP:
        return tl.load(s + at, mask=live, other=0.0).to(ACC), at, live
    else:
        return tl.zeros((1, BLOCK_P, BLOCK_C), ACC), at, live


@jit
def _tile(start, first, exists, frames, pixels, rows, BLOCK_T: tl.constexpr):
    """(BLOCK_T, BLOCK_P, 1): rows of these pixels in frames from ``start``, and which exist."""
    t = start + tl.arange(0, BLOCK_T)
    row = first[None, :] + t[:, None] * pixels
    live = (t < frames)[:, None] & exists[None, :] & (row < rows)
    return row[:, :, None], live[:, :, None]


@jit
def _origin(u, s, c, CHANNELS: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr):
    """(BLOCK_C,): the first value of each channel, near which the others are."""
    value = tl.load(u + c, mask=c < CHANNELS, other=0.0).to(ACC)
    if SKIP:
        value += tl.load(s + c, mask=c < CHANNELS, other=0.0).to(ACC)
    return value


@jit
def _statistics_kernel(
    u, s, counts, means, squares, count, frames, pixels, rows,
    CHANNELS: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """First stage: a row of (count, mean, M2) for each program. Welford's update, per pixel."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p, first, exists = _pixels(tl.program_id(0), count, frames, pixels, BLOCK_P)
    shared, _at, _live = _clip_tile(s, p, exists, c, CHANNELS, SKIP, ACC, BLOCK_P, BLOCK_C)
    origin = _origin(u, s, c, CHANNELS, SKIP, ACC)[None, None, :]
    seen = tl.zeros((BLOCK_P, 1), ACC)
    mean = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    square = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for start in range(0, frames, BLOCK_T):
        row, live = _tile(start, first, exists, frames, pixels, rows, BLOCK_T)
        inside = live & (c < CHANNELS)[None, None, :]
        x = tl.load(u + row * CHANNELS + c[None, None, :], mask=inside, other=0.0).to(ACC)
        x = tl.where(inside, x + shared - origin, 0.0)
        more = tl.sum(live.to(ACC), axis=0)
        tile_mean = tl.sum(x, axis=0) / tl.maximum(more, 1.0)
        distance = tl.where(inside, x - tile_mean[None, :, :], 0.0)
        step = tile_mean - mean
        share = more / tl.maximum(seen + more, 1.0)
        mean += step * share
        square += tl.sum(distance * distance, axis=0) + step * step * (seen * share)
        seen += more
    total = tl.sum(tl.sum(seen, axis=0), axis=0)
    center = tl.sum(mean * seen, axis=0) / tl.maximum(total, 1.0)
    distance = mean - center[None, :]
    square = tl.sum(square + distance * distance * seen, axis=0)
    line = tl.program_id(0).to(tl.int64) * CHANNELS + c
    tl.store(counts + tl.program_id(0), total, mask=tl.program_id(1) == 0)
    tl.store(means + line, center, mask=c < CHANNELS)
    tl.store(squares + line, square, mask=c < CHANNELS)


@jit
def _merge_kernel(
    counts, means, squares, u, s, mean, square, parts,
    CHANNELS: tl.constexpr, MOVED: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    VARIANCE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Second stage: mean and M2, or the variance, of all parts. MOVED: u's origin is at zero."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_N,), ACC)
    weighted = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for start in range(0, parts, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < parts)[:, None] & (c < CHANNELS)[None, :]
        at = n.to(tl.int64)[:, None] * CHANNELS + c[None, :]
        count = tl.load(counts + n, mask=n < parts, other=0.0)
        total += count
        weighted += tl.load(means + at, mask=inside, other=0.0) * count[:, None]
    everything = tl.maximum(tl.sum(total, axis=0), 1.0)
    center = tl.sum(weighted, axis=0) / everything
    sum_squares = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    residue = tl.zeros((BLOCK_N, BLOCK_C), ACC)  # what rounding left out of the mean
    for start in range(0, parts, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < parts)[:, None] & (c < CHANNELS)[None, :]
        at = n.to(tl.int64)[:, None] * CHANNELS + c[None, :]
        count = tl.load(counts + n, mask=n < parts, other=0.0)
        distance = tl.load(means + at, mask=inside, other=0.0) - center[None, :]
        sum_squares += tl.load(squares + at, mask=inside, other=0.0)
        sum_squares += distance * distance * count[:, None]
        residue += distance * count[:, None]
    correction = tl.sum(residue, axis=0) / everything
    m2 = tl.sum(sum_squares, axis=0) - correction * correction * everything
    center += correction
    if MOVED:
        center += _origin(u, s, c, CHANNELS, SKIP, ACC)
    tl.store(mean + c, center, mask=c < CHANNELS)
    m2 = tl.maximum(m2, 0.0)
    if VARIANCE:
        m2 /= everything
    tl.store(square + c, m2, mask=c < CHANNELS)


@jit
def _per_channel(values, c, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    return tl.load(values + c, mask=c < CHANNELS, other=0.0).to(ACC)[None, None, :]


@jit
def _apply_kernel(
    u, s, weight, bias, mean, var, result, count, frames, pixels, rows,
    CHANNELS: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    EPS: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p, first, exists = _pixels(tl.program_id(0), count, frames, pixels, BLOCK_P)
    shared, _at, _live = _clip_tile(s, p, exists, c, CHANNELS, SKIP, ACC, BLOCK_P, BLOCK_C)
    shared -= _per_channel(mean, c, CHANNELS, ACC)
    inverse = 1.0 / tl.sqrt(_per_channel(var, c, CHANNELS, ACC) + EPS)
    scale = _per_channel(weight, c, CHANNELS, ACC) * inverse
    shift = _per_channel(bias, c, CHANNELS, ACC)
    for start in range(0, frames, BLOCK_T):
        row, live = _tile(start, first, exists, frames, pixels, rows, BLOCK_T)
        inside = live & (c < CHANNELS)[None, None, :]
        at = row * CHANNELS + c[None, None, :]
        x = tl.load(u + at, mask=inside, other=0.0).to(ACC)
        y = (x + shared) * scale + shift
        y = tl.where(y > 0, y, y * SLOPE)
        tl.store(result + at, y.to(result.dtype.element_ty), mask=inside)


@jit
def _backward_sums_kernel(
    grad, u, s, weight, bias, mean, var, sums, products, count, frames, pixels, rows,
    CHANNELS: tl.constexpr, SKIP: tl.constexpr, ACC: tl.constexpr,
    EPS: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """Σ g and Σ g x̂ of each program; g is the gradient through the activation, x̂ normalised."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    center = _per_channel(mean, c, CHANNELS, ACC)
    inverse = 1.0 / tl.sqrt(_per_channel(var, c, CHANNELS, ACC) + EPS)
    scale = _per_channel(weight, c, CHANNELS, ACC) * inverse
    shift = _per_channel(bias, c, CHANNELS, ACC)
    total = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    product = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for group in range(tl.program_id(0), tl.cdiv(count, BLOCK_P), tl.num_programs(0)):
        p, first, exists = _pixels(group, count, frames, pixels, BLOCK_P)
        shared, _at, _live = _clip_tile(s, p, exists, c, CHANNELS, SKIP, ACC, BLOCK_P, BLOCK_C)
        shared -= center
        for start in range(0, frames, BLOCK_T):
            row, live = _tile(start, first, exists, frames, pixels, rows, BLOCK_T)
            inside = live & (c < CHANNELS)[None, None, :]
            at = row * CHANNELS + c[None, None, :]
            x = tl.load(u + at, mask=inside, other=0.0).to(ACC) + shared
            g = tl.load(grad + at, mask=inside, other=0.0).to(ACC)
            g = tl.where(x * scale + shift > 0, g, g * SLOPE)
            total += tl.sum(g, axis=0)
            product += tl.sum(g * (x * inverse), axis=0)
    line = tl.program_id(0).to(tl.int64) * CHANNELS + c
    tl.store(sums + line, tl.sum(total, axis=0), mask=c < CHANNELS)
    tl.store(products + line, tl.sum(product, axis=0), mask=c < CHANNELS)


@jit
def _add_up(
    parts, number, c, CHANNELS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):
    """(BLOCK_C,): the sum of what the programs of the launch before found, in a fixed order."""
    total = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for start in range(0, number, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < number)[:, None] & (c < CHANNELS)[None, :]
        total += tl.load(parts + n[:, None] * CHANNELS + c[None, :], mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@jit
def _backward_kernel(
    grad, u, s, weight, bias, mean, var, sums, products, grad_weight, grad_bias, du, ds,
    parts, count, frames, pixels, rows,
    CHANNELS: tl.constexpr, SKIP: tl.constexpr, BATCH: tl.constexpr, ACC: tl.constexpr,
    EPS: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """du = weight / σ · (g - Σ g / n - x̂ Σ g x̂ / n), and its sum over a clip's frames.

    Every program adds up the parts of the sums, which are few, so that no launch has to. Σ g is the
    bias's gradient and Σ g x̂ the weight's. Constants in the place of statistics have no gradient:
    unless BATCH the last two terms are left out.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sum_g = _add_up(sums, parts, c, CHANNELS, ACC, BLOCK_N, BLOCK_C)
    sum_gx = _add_up(products, parts, c, CHANNELS, ACC, BLOCK_N, BLOCK_C)
    once = c < tl.where(tl.program_id(0) == 0, CHANNELS, 0)
    tl.store(grad_bias + c, sum_g.to(grad_bias.dtype.element_ty), mask=once)
    tl.store(grad_weight + c, sum_gx.to(grad_weight.dtype.element_ty), mask=once)
    center = _per_channel(mean, c, CHANNELS, ACC)
    inverse = 1.0 / tl.sqrt(_per_channel(var, c, CHANNELS, ACC) + EPS)
    scale = _per_channel(weight, c, CHANNELS, ACC) * inverse
    shift = _per_channel(bias, c, CHANNELS, ACC)
    every = tl.zeros((BLOCK_C,), ACC) + rows
    mean_g = (sum_g / every)[None, None, :]
    mean_gx = (sum_gx / every)[None, None, :]
    for group in range(tl.program_id(0), tl.cdiv(count, BLOCK_P), tl.num_programs(0)):
        p, first, exists = _pixels(group, count, frames, pixels, BLOCK_P)
        shared, clip_at, clip_live = _clip_tile(
            s, p, exists, c, CHANNELS, SKIP, ACC, BLOCK_P, BLOCK_C
        )
        shared -= center
        clip_sum = tl.zeros((1, BLOCK_P, BLOCK_C), ACC)
        for start in range(0, frames, BLOCK_T):
            row, live = _tile(start, first, exists, frames, pixels, rows, BLOCK_T)
            inside = live & (c < CHANNELS)[None, None, :]
            at = row * CHANNELS + c[None, None, :]
            x = tl.load(u + at, mask=inside, other=0.0).to(ACC) + shared
            g = tl.load(grad + at, mask=inside, other=0.0).to(ACC)
            dx = tl.where(x * scale + shift > 0, g, g * SLOPE)
            if BATCH:
                dx -= mean_g + x * inverse * mean_gx
            dx *= scale
            tl.store(du + at, dx.to(du.dtype.element_ty), mask=inside)
            if SKIP:
                clip_sum += tl.sum(tl.where(inside, dx, 0.0), axis=0)[None, :, :]
        if SKIP:
            tl.store(ds + clip_at, clip_sum.to(ds.dtype.element_ty), mask=clip_live)


_WAVE = 264
"""Programs of a backward launch: two of eight warps for each of an H100's 132 multiprocessors."""


def _lay_out(
    u: Tensor, s: Tensor | None, programs: int = 2048
) -> tuple[tuple[int, int, int, int], dict[str, Any], tuple[int, int]]:
    """(pixels of all clips, frames, pixels of a clip, rows), tile sizes, and grid.

    Without s there is one clip, of as many pixels as so many programs take at a time; its last
    frame is not complete. With s there is a program for every group of pixels.
    """
    frames, channels, height, width = u.shape
    rows = frames * height * width
    if capability(u) is None:
        # As few and large tiles as Triton allows: the interpreter's time goes by their number.
        tile, most = {"BLOCK_C": block(channels, 1, 128)}, rows
        room = 2**19 // tile["BLOCK_C"]
    else:
        tile = {"BLOCK_T": 4, "BLOCK_C": block(channels, 16, 64), "num_warps": 4}
        room = 1024 // tile["BLOCK_C"]
        most = room * max(1, programs // cdiv(max(1, channels), tile["BLOCK_C"]))
    if s is None:
        pixels = count = max(1, min(rows, most))
        frames = cdiv(rows, pixels)
    else:
        pixels, count = height * width, s.shape[0] * height * width
        frames //= max(1, s.shape[0])
    tile["BLOCK_P"] = block(count, 1, room)
    tile.setdefault("BLOCK_T", block(frames, 1, room // tile["BLOCK_P"]))
    across = cdiv(max(1, channels), tile["BLOCK_C"])
    grid = (cdiv(count, tile["BLOCK_P"]) if u.numel() else 0, across)
    return (count, frames, pixels, rows), tile, grid


def options(
    kernel: str, tile: Tile, sizes: tuple[int, ...], tensor: Tensor, constants: dict[str, Any]
) -> Options:
    """What to choose from for a kernel whose tile and sizes :func:`_lay_out` made."""
    change = [{"BLOCK_T": 8, "num_warps": 8}]
    tiles = vary(tile, tensor, constants, change, change)
    return Options(f"norm {kernel}", (*sizes, tensor.shape[1]), tiles)


def norm_forward(call: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """The result in three launches, and the mean and biased variance it was normalised with.

    With given statistics it is one launch.
    """
    mean, var = call.mean, call.var
    if mean is None or var is None:
        mean, var = _statistics(call.u, call.s, variance=True)
    return _apply(call._replace(mean=mean, var=var)), mean, var


def norm_statistics(u: Tensor, s: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and M2 per channel of u + s, in two launches."""
    return _statistics(u, s, variance=False)


def norm_backward(grad: Tensor, call: Norm) -> list[Tensor | None]:
    """du, ds, dweight, dbias in two launches."""
    u, s, weight, bias, mean, var, batch, eps, slope = call
    if not u.numel():
        ds = None if s is None else torch.zeros_like(s)
        return [torch.empty_like(u), ds, torch.zeros_like(weight), torch.zeros_like(bias)]
    x, s_last, g = channels_last(u), None if s is None else channels_last(s), channels_last(grad)
    sizes, tile, (groups, across) = _lay_out(x, s_last, _WAVE)
    # Every program of the second launch reads what all of the first found: few of both, and large.
    grid = (min(groups, max(1, _WAVE // across)), across)
    if capability(u) is not None:
        tile["num_warps"] = 8
    channels = u.shape[1]
    values = dense((weight, bias, mean, var))
    constants = arithmetic(u)
    fixed = {
        "CHANNELS": channels, "SKIP": s is not None, "ACC": constants["ACC"],
        "EPS": eps, "SLOPE": slope,
    }
    shared = x if s_last is None else s_last
    parts = mean.new_empty(2, grid[0], channels, dtype=sum_dtype(u))

    def run_sums(tile: Tile) -> None:
        launch(
            _backward_sums_kernel, grid, g, x, shared, *values, parts[0], parts[1],
            *sizes, **fixed, **tile,
        )

    tuned(options("backward sums", tile, sizes, x, constants), x, constants, run_sums)
    dweight, dbias = weight.new_empty(channels), bias.new_empty(channels)
    du = torch.empty_like(x)
    ds = None if s_last is None else torch.empty_like(s_last)
    tile["BLOCK_N"] = block(grid[0], 1, 1024 if capability(u) is None else 64)

    def run(tile: Tile) -> None:
        launch(
            _backward_kernel, grid, g, x, shared, *values, parts[0], parts[1],
            dweight, dbias, du, du if ds is None else ds, grid[0], *sizes,
            BATCH=batch, **fixed, **tile,
        )

    tuned(options("backward", tile, sizes, x, constants), x, constants, run)
    ds = None if ds is None or s is None else lie_as(ds, s)
    return [lie_as(du, u), ds, dweight, dbias]


def _statistics(u: Tensor, s: Tensor | None, *, variance: bool) -> tuple[Tensor, Tensor]:
    """Mean and M2, or the biased variance, per channel of u + s, in two launches."""
    u, s = channels_last(u), None if s is None else channels_last(s)
    sizes, tile, grid = _lay_out(u, s)
    channels, constants = u.shape[1], arithmetic(u)
    like = {"dtype": sum_dtype(u)}
    counts = u.new_empty(grid[0], **like)
    means, squares = (u.new_empty(grid[0], channels, **like) for _ in range(2))

    def run(tile: Tile) -> None:
        launch(
            _statistics_kernel, grid, u, u if s is None else s, counts, means, squares,
            *sizes, CHANNELS=channels, SKIP=s is not None, ACC=constants["ACC"], **tile,
        )

    tuned(options("statistics", tile, sizes, u, constants), u, constants, run)
    return merge(counts, means, squares, u, s, variance=variance)


def merge(
    counts: Tensor,
    means: Tensor,
    squares: Tensor,
    u: Tensor | None = None,
    s: Tensor | None = None,
    *,
    variance: bool = True,
) -> tuple[Tensor, Tensor]:
    """Mean and variance, or M2, of parts: counts (P,), means and M2 (P, C), in one launch.

    With u the parts' means are relative to the first value of u + s.
    """
    parts, channels = means.shape
    if not parts:
        return means.new_zeros(channels), means.new_zeros(channels)
    mean, square = means.new_empty(channels), means.new_empty(channels)
    tile = _merging(parts, channels, means)
    launch(
        _merge_kernel, (cdiv(channels, tile["BLOCK_C"]),),
        counts, means, squares, means if u is None else u, means if s is None else s,
        mean, square, parts, CHANNELS=channels, MOVED=u is not None,
        SKIP=s is not None, ACC=arithmetic(means)["ACC"], VARIANCE=variance, **tile,
    )
    return mean, square


def _merging(parts: int, channels: int, tensor: Tensor) -> Tile:
    """Tile sizes and warps of the kernels that merge what programs found."""
    if capability(tensor) is None:
        return {"BLOCK_C": block(channels, 1, 128), "BLOCK_N": block(parts, 1, 1024)}
    return {"BLOCK_C": 16, "BLOCK_N": 64, "num_warps": 4}


def _apply(call: Norm) -> Tensor:
    """The activation of the normalised u + s, in one launch."""
    u, s, weight, bias, mean, var, _batch, eps, slope = call
    x, s = channels_last(u), None if s is None else channels_last(s)
    sizes, tile, grid = _lay_out(x, s)
    result, constants = torch.empty_like(x), arithmetic(u)
    values = dense((weight, bias, mean, var))

    def run(tile: Tile) -> None:
        launch(
            _apply_kernel, grid, x, x if s is None else s, *values, result,
            *sizes, CHANNELS=u.shape[1], SKIP=s is not None, ACC=constants["ACC"],
            EPS=eps, SLOPE=slope, **tile,
        )

    tuned(options("apply", tile, sizes, x, constants), x, constants, run)
    return lie_as(result, u)
