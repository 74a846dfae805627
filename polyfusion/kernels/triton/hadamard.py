"""CP and both forms of CMF: project every view, combine entrywise, project.

With r_v the projections of the views (N x k, or a row per clip for a view without frames):

    cp      y = (∏ r_v) A₁ᵀ                          r_v = [z_v, 1] A_v
    cmf-sr  y = b + (∏ (1 + r_v) - 1) Uᵀ             r_v = z_v V_v
    cmf     y = b + (Σ p_v + ∏ (1 + r_v) - 1 - Σ r_v) Uᵀ     p_v = z_v V_v, r_v = z_v B_v

The weights that make the r_v are the ``gates``: CP's ``factors``, CMF's ``second``, and its
``first`` if the row space is shared; the kernels read ``first`` itself for the p_v of CMF only.
The products of two and more r_v are summed by ``high += (low + high) r; low += r``, which does not
cancel. A program never leaves its clip, so a clip's own views are projected once per tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from polyfusion.kernels.layout import as_rows, row_strides, sum_dtype
from polyfusion.kernels.triton.common import (
    Rows,
    arithmetic,
    block,
    capability,
    cdiv,
    dense,
    jit,
    launch,
    lay_out,
    next_power_of_2,
    planned,
    project,
    uses_tensor_cores,
)
from polyfusion.kernels.triton.matmul import Product, multiply
from polyfusion.kernels.triton.tune import Options, Tile, tuned, vary


@jit
def _project_clip(
    view, weight, clip, k, SIZE: tl.constexpr, RANK: tl.constexpr, BIASED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """(BLOCK_K,): the clip's row of z W, or of [z, 1] W."""
    acc = tl.zeros((BLOCK_K,), ACC)
    for start in range(0, SIZE, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        z = tl.load(view + clip * SIZE + d, mask=d < SIZE, other=0.0).to(ACC)
        w = tl.load(
            weight + d[:, None] * RANK + k[None, :],
            mask=(d[:, None] < SIZE) & (k[None, :] < RANK), other=0.0,
        ).to(ACC)
        acc += tl.sum(z[:, None] * w, axis=0)
    if BIASED:
        acc += tl.load(weight + SIZE * RANK + k, mask=k < RANK, other=0.0).to(ACC)
    return acc


@jit
def _merge(low, high, r, FORM: tl.constexpr):
    """Take one more view into (∏ r, unused), or into (Σ r, all products of two and more)."""
    if FORM == "cp":
        low *= r
    else:
        high += (low + high) * r
        low += r
    return low, high


@jit
def _every(low, high, FORM: tl.constexpr):
    """∏ r for CP, else ∏ (1 + r) - 1."""
    if FORM == "cp":
        return low
    else:
        return low + high


@jit
def _clip_views(
    views, first, gates, clip, k, SKIP: tl.constexpr,
    RANK: tl.constexpr, SIZES: tl.constexpr, FRAMED: tl.constexpr, FORM: tl.constexpr,
    ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """(CMF's linear terms, low, high) of the views without frames, view ``SKIP`` left out."""
    terms = tl.zeros((BLOCK_K,), ACC)
    low = tl.full((BLOCK_K,), 1.0 if FORM == "cp" else 0.0, ACC)
    high = tl.zeros((BLOCK_K,), ACC)
    for v in tl.static_range(len(FRAMED)):
        if not FRAMED[v] and v != SKIP:
            r = _project_clip(
                views[v], gates[v], clip, k, SIZES[v], RANK, FORM == "cp", ACC, BLOCK_K, BLOCK_D
            )
            low, high = _merge(low, high, r, FORM)
            if FORM == "cmf":
                terms += _project_clip(
                    views[v], first[v], clip, k, SIZES[v], RANK, False, ACC, BLOCK_K, BLOCK_D
                )
    if FORM == "cmf-sr":
        terms = low
    return terms, low, high


@jit
def _combine(
    clip_terms, clip_low, clip_high, terms, low, high, FORM: tl.constexpr
):
    """The rows that the last projection takes, from the clip's part and the frames'."""
    every = _every(low, high, FORM) * _every(clip_low, clip_high, FORM)[None, :]
    if FORM != "cp":
        every += terms + high + (clip_terms + clip_high)[None, :]
    return every


@jit
def _forward_kernel(
    views, first, gates, out, bias, noise, result, frames, count,
    RANK: tl.constexpr, OUTPUTS: tl.constexpr, NOISE: tl.constexpr, STRIDE: tl.constexpr,
    SIZES: tl.constexpr, FRAMED: tl.constexpr, FORM: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_NOISE: tl.constexpr,
):
    """One tile of a clip's frames by a tile of outputs."""
    tiles = tl.cdiv(frames, BLOCK_T)
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = clip * frames + t
    live = (t < frames) & (n < count)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_T, BLOCK_M), ACC)
    for start in range(0, RANK, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        clip_terms, clip_low, clip_high = _clip_views(
            views, first, gates, clip, k, -1, RANK, SIZES, FRAMED, FORM, ACC, BLOCK_K, BLOCK_D
        )
        terms = tl.zeros((BLOCK_T, BLOCK_K), ACC)
        low = tl.full((BLOCK_T, BLOCK_K), 1.0 if FORM == "cp" else 0.0, ACC)
        high = tl.zeros((BLOCK_T, BLOCK_K), ACC)
        for v in tl.static_range(len(FRAMED)):
            if FRAMED[v]:
                r = project(
                    views[v], gates[v], n, live, k, SIZES[v], RANK, FORM == "cp",
                    COMPUTE, ACC, PRECISION, BLOCK_T, BLOCK_K, BLOCK_D,
                )
                low, high = _merge(low, high, r, FORM)
                if FORM == "cmf":
                    terms += project(
                        views[v], first[v], n, live, k, SIZES[v], RANK, False,
                        COMPUTE, ACC, PRECISION, BLOCK_T, BLOCK_K, BLOCK_D,
                    )
        if FORM == "cmf-sr":
            terms = low
        x = _combine(clip_terms, clip_low, clip_high, terms, low, high, FORM)
        w = tl.load(
            out + m[None, :] * RANK + k[:, None],
            mask=(m[None, :] < OUTPUTS) & (k[:, None] < RANK), other=0.0,
        )
        acc = tl.dot(
            x.to(COMPUTE), w.to(COMPUTE), acc, input_precision=PRECISION, out_dtype=ACC
        )
    if FORM != "cp":
        acc += tl.load(bias + m, mask=m < OUTPUTS, other=0.0).to(ACC)[None, :]
    line = result + n[:, None] * STRIDE
    kind = result.dtype.element_ty
    tl.store(line + m[None, :], acc.to(kind), mask=live[:, None] & (m[None, :] < OUTPUTS))
    if NOISE > 0:
        j = tl.program_id(1) * BLOCK_NOISE + tl.arange(0, BLOCK_NOISE)
        inside = live[:, None] & (j[None, :] < NOISE)
        e = tl.load(noise + n[:, None] * NOISE + j[None, :], mask=inside, other=0.0)
        tl.store(line + OUTPUTS + j[None, :], e, mask=inside)


@jit
def _backward_kernel(
    views, first, gates, out, grad, grad_gates, grad_first, grad_first_clip, hidden,
    frames, count, grad_stride, tiles,
    RANK: tl.constexpr, OUTPUTS: tl.constexpr,
    SIZES: tl.constexpr, FRAMED: tl.constexpr, FORM: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Some frames of a clip by a chunk of the rank: gradients of the projections, and ``hidden``.

    ``grad_gates[v]`` is dL/dr_v, ``grad_first`` dL/dp_v of every view with frames (they are equal)
    and ``grad_first_clip`` of every view without, ``hidden`` what the last projection took. Of a
    view without frames these are sums over the frames at hand, a matrix per tile of frames.
    """
    clip = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0) % tiles
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    clip_terms, clip_low, clip_high = _clip_views(
        views, first, gates, clip, k, -1, RANK, SIZES, FRAMED, FORM, ACC, BLOCK_K, BLOCK_D
    )
    clip_every = _every(clip_low, clip_high, FORM)
    t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    n = clip * frames + t
    live = (t < frames) & (n < count)
    inside = live[:, None] & (k[None, :] < RANK)
    at = n[:, None] * RANK + k[None, :]
    g = tl.zeros((BLOCK_T, BLOCK_K), ACC)
    for m_start in range(0, OUTPUTS, BLOCK_M):
        m = m_start + tl.arange(0, BLOCK_M)
        y = tl.load(
            grad + n[:, None] * grad_stride + m[None, :],
            mask=live[:, None] & (m[None, :] < OUTPUTS), other=0.0,
        )
        w = tl.load(
            out + m[:, None] * RANK + k[None, :],
            mask=(m[:, None] < OUTPUTS) & (k[None, :] < RANK), other=0.0,
        )
        g = tl.dot(
            y.to(COMPUTE), w.to(COMPUTE), g, input_precision=PRECISION, out_dtype=ACC
        )
    terms = tl.zeros((BLOCK_T, BLOCK_K), ACC)
    low = tl.full((BLOCK_T, BLOCK_K), 1.0 if FORM == "cp" else 0.0, ACC)
    high = tl.zeros((BLOCK_T, BLOCK_K), ACC)
    projected = ()
    for v in tl.static_range(len(FRAMED)):
        if FRAMED[v]:
            r = project(
                views[v], gates[v], n, live, k, SIZES[v], RANK, FORM == "cp",
                COMPUTE, ACC, PRECISION, BLOCK_T, BLOCK_K, BLOCK_D,
            )
            projected = projected + (r,)  # noqa: RUF005
            low, high = _merge(low, high, r, FORM)
            if FORM == "cmf":
                terms += project(
                    views[v], first[v], n, live, k, SIZES[v], RANK, False,
                    COMPUTE, ACC, PRECISION, BLOCK_T, BLOCK_K, BLOCK_D,
                )
        else:
            projected = projected + (0,)  # noqa: RUF005
    if FORM == "cmf-sr":
        terms = low
    x = _combine(clip_terms, clip_low, clip_high, terms, low, high, FORM)
    tl.store(hidden + at, x.to(hidden.dtype.element_ty), mask=inside)
    sum_g = tl.sum(g, axis=0)
    sum_gated = tl.sum(g * _every(low, high, FORM), axis=0)  # ∏ r, or ∏ (1 + r) - 1, of the frames'
    if FORM == "cmf":
        tl.store(grad_first + at, g.to(grad_first.dtype.element_ty), mask=inside)
    for v in tl.static_range(len(FRAMED)):
        if FRAMED[v]:
            other = tl.full((BLOCK_T, BLOCK_K), 1.0 if FORM == "cp" else 0.0, ACC)
            other_high = tl.zeros((BLOCK_T, BLOCK_K), ACC)
            for u in tl.static_range(len(FRAMED)):
                if FRAMED[u] and u != v:
                    other, other_high = _merge(other, other_high, projected[u], FORM)
            other = _every(other, other_high, FORM)
            slope = other * clip_every[None, :]
            if FORM != "cp":
                slope += other + clip_every[None, :]
            if FORM == "cmf-sr":
                slope += 1.0
            tl.store(grad_gates[v] + at, (g * slope).to(hidden.dtype.element_ty), mask=inside)
    line = (tile * (tl.num_programs(0) // tiles) + clip) * RANK + k
    for v in tl.static_range(len(FRAMED)):
        if not FRAMED[v]:
            _terms, other, other_high = _clip_views(
                views, first, gates, clip, k, v, RANK, SIZES, FRAMED, FORM, ACC, BLOCK_K, BLOCK_D
            )
            other = _every(other, other_high, FORM)
            slope = other * sum_gated
            if FORM != "cp":
                slope += sum_gated + other * sum_g
            if FORM == "cmf-sr":
                slope += sum_g
            tl.store(grad_gates[v] + line, slope, mask=k < RANK)
    if FORM == "cmf":
        tl.store(grad_first_clip + line, sum_g, mask=k < RANK)


def config(
    kernel: str, views: Sequence[Tensor], out: Tensor, constants: dict[str, Any]
) -> Tile:
    """Tile sizes and warps of the ``"forward"`` or the ``"backward"`` kernel for these sizes."""
    frames = max((view.shape[1] for view in views if view.ndim == 3), default=views[0].shape[0])
    if capability(out) is None:
        outputs, rank = out.shape
        return {
            "BLOCK_T": block(frames), "BLOCK_M": block(outputs), "BLOCK_K": block(rank),
            "BLOCK_D": block(max(view.shape[-1] for view in views)),
        }
    if not uses_tensor_cores(constants):
        tile = {"BLOCK_T": 32, "BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_D": 32}
        if kernel == "backward":
            tile["BLOCK_T"] = 16
        if constants["COMPUTE"] == tl.float64:
            tile = dict.fromkeys(tile, 16)
        return {**tile, "num_warps": 4, "num_stages": 2}
    # float32 operands take twice the registers and the shared memory of half precision.
    deep = 64 if constants["PRECISION"] == "ieee" else 32
    tile = {"BLOCK_T": block(frames, 16, 32), "BLOCK_M": deep, "BLOCK_K": 32, "BLOCK_D": deep}
    if kernel == "backward":
        return {**tile, "num_warps": 4, "num_stages": 3}
    # The whole rank of the paper: a view is projected once for each tile of outputs.
    rank = block(out.shape[1], 16, 2 * deep)
    return {**tile, "BLOCK_M": 2 * deep, "BLOCK_K": rank, "num_warps": 8, "num_stages": 3}


def options(
    kernel: str, form: str, views: Sequence[Tensor], out: Tensor, constants: dict[str, Any]
) -> Options:
    """What to choose from for the ``"forward"`` or the ``"backward"`` kernel of a form."""
    tile = config(kernel, views, out, constants)
    # More tiles of outputs, or smaller chunks of the rank, occupy more.
    change = [{"BLOCK_M": 64, "num_warps": 4} if kernel == "forward" else {"BLOCK_K": 16}]
    tiles = vary(tile, out, constants, cores=change, plain=change)
    sizes = (size for view in views for size in view.shape)
    outputs, rank = out.shape
    return Options(f"{form} {kernel}", (*sizes, rank, outputs), tiles)


@planned
def _plan(tensors: Sequence[Tensor], kernel: str, form: str) -> tuple[dict[str, Any], Options]:
    """Constants of a kernel on these tensors, ``out`` and the views, and what to choose from."""
    out, *views = tensors
    constants = arithmetic(out)
    return constants, options(kernel, form, views, out, constants)


def cp_forward(
    views: Sequence[Tensor], factors: Sequence[Tensor], out: Tensor, noise: Tensor | None
) -> Tensor:
    """[y, noise] in one launch."""
    return _forward("cp", views, (), factors, out, None, noise)


def cp_backward(
    grad: Tensor,
    views: Sequence[Tensor],
    factors: Sequence[Tensor],
    out: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of views, factors and out in two launches; an empty tensor where not needed."""
    return _backward("cp", grad, views, (), factors, out, None, needs)


def cmf_forward(
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    out: Tensor,
    bias: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """[y, noise] in one launch; ``second`` is empty for the shared row space."""
    if second:
        return _forward("cmf", views, first, second, out, bias, noise)
    return _forward("cmf-sr", views, (), first, out, bias, noise)


def cmf_backward(
    grad: Tensor,
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    out: Tensor,
    bias: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of views, first, second, out and bias in two launches; empty where not needed."""
    if second:
        return _backward("cmf", grad, views, first, second, out, bias, needs)
    return _backward("cmf-sr", grad, views, (), first, out, bias, needs)


@dataclass(frozen=True)
class _Forward:
    """The result's layout, and for each configuration the grid, (frames, rows) and constants."""

    shape: tuple[int, ...]
    strides: list[int]
    constants: dict[str, Any]
    options: Options
    launches: list[tuple[tuple[int, int], tuple[int, int], dict[str, Any]]]


@planned
def _plan_forward(tensors: Sequence[Tensor], form: str, noise: int) -> _Forward:
    """How the forward kernel runs on these tensors, ``out`` and the views."""
    out, *views = tensors
    constants, choice = _plan(tensors, "forward", form)
    outputs, rank = out.shape
    layouts = [lay_out(views, tile["BLOCK_T"]) for tile in choice.tiles]
    shape = (*layouts[0].leading, outputs + noise)
    strides = row_strides(shape, out.element_size())
    fixed = {
        "RANK": rank, "OUTPUTS": outputs, "NOISE": noise, "STRIDE": strides[-2], "FORM": form,
        "SIZES": tuple(view.shape[-1] for view in views), "FRAMED": layouts[0].framed,
        "BLOCK_NOISE": next_power_of_2(max(noise, 1)), **constants,
    }
    launches = []
    for tile, layout in zip(choice.tiles, layouts, strict=True):
        tiles = layout.clips * cdiv(layout.frames, tile["BLOCK_T"])
        grid = (tiles if prod(shape) else 0, max(1, cdiv(outputs, tile["BLOCK_M"])))
        launches.append((grid, (layout.frames, layout.count), {**fixed, **tile}))
    return _Forward(shape, strides, constants, choice, launches)


def _forward(
    form: str,
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    gates: Sequence[Tensor],
    out: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    views, first, gates = dense(views), dense(first), dense(gates)
    out = out.contiguous()
    extra = 0 if noise is None else noise.shape[-1]
    bias = out if bias is None else bias.contiguous()
    noise = out if noise is None else noise.contiguous()
    plan: _Forward = _plan_forward((out, *views), form, extra)

    def run(tile: Tile) -> Tensor:
        grid, sizes, fixed = plan.launches[plan.options.tiles.index(tile)]
        result = out.new_empty_strided(plan.shape, plan.strides)
        launch(
            _forward_kernel, grid, views, first or gates, gates, out, bias, noise, result, *sizes,
            **fixed,
        )
        return result

    return tuned(plan.options, out, plan.constants, run)


def _backward(
    form: str,
    grad: Tensor,
    views: Sequence[Tensor],
    first: Sequence[Tensor],
    gates: Sequence[Tensor],
    out: Tensor,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of views, first, gates, out, and of the bias if there is one."""
    views, first, gates = dense(views), dense(first), dense(gates)
    grad, out, (outputs, rank) = as_rows(grad), out.contiguous(), out.shape
    constants, choice = _plan((out, *views), "backward", form)
    flat = [view.flatten(0, -2) for view in views]

    def run(tile: Tile) -> tuple[Rows, Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        layout = lay_out(views, tile["BLOCK_T"])
        tiles = max(1, cdiv(layout.frames, tile["BLOCK_T"]))
        hidden = out.new_empty(layout.count, rank)

        def sums() -> Tensor:
            return out.new_empty(tiles, layout.clips, rank, dtype=sum_dtype(out))

        grad_gates = tuple(
            torch.empty_like(hidden) if framed else sums() for framed in layout.framed
        )
        every_frame, every_clip = hidden, hidden
        if form == "cmf":
            every_frame, every_clip = torch.empty_like(hidden), sums()
        launch(
            _backward_kernel,
            (layout.clips * tiles if rank else 0, cdiv(rank, tile["BLOCK_K"])),
            views, first or gates, gates, out, grad, grad_gates, every_frame, every_clip, hidden,
            layout.frames, layout.count, grad.stride(0), tiles,
            RANK=rank, OUTPUTS=outputs, FORM=form,
            SIZES=tuple([view.shape[-1] for view in views]), FRAMED=layout.framed,
            **constants, **tile,
        )
        return layout, hidden, grad_gates, every_frame, every_clip

    layout, hidden, grad_gates, every_frame, every_clip = tuned(choice, out, constants, run)
    grad = grad[:, :outputs]
    needed = iter(needs)

    def rooms(operands: Sequence[Tensor]) -> list[Tensor]:
        """Room for the gradients of the next operands; none for those that are not needed."""
        return [torch.empty_like(x) if next(needed) else x.new_empty(0) for x in operands]

    d_views, d_first, d_gates, d_out = (rooms(x) for x in (views, first, gates, (out,)))
    d_bias = [] if bias is None else rooms((bias,))
    products: list[Product] = []
    for v, view in enumerate(flat):
        every = every_frame if layout.framed[v] else every_clip  # dL/dp_v of CMF
        if d_views[v].numel():
            weight = gates[v][: view.shape[-1]]
            more = (every, first[v].mT) if first else None
            products.append(Product(d_views[v].reshape(view.shape), grad_gates[v], weight.mT, more))
        if first:
            products.append(Product(d_first[v], view.mT, every))
        products.append(Product(d_gates[v], view.mT, grad_gates[v]))
    products.append(Product(d_out[0], grad.mT, hidden))
    for d in d_bias:
        nothing = hidden[:, :0].mT  # (0, N): a row of ones joins it
        products.append(Product(d.unsqueeze(0), nothing, grad))
    multiply(products)
    return [*d_views, *d_first, *d_gates, *d_out, *d_bias]
