"""Tucker: the core meets the clips' views once per clip, then the frames meet that matrix.

    M_clip = 𝒢 ×_clip q    (k_1, K_f) per clip         y = (p M_clipᵀ) U₁ᵀ

with p (N, K_f) the projections of the views with frames and q (B, K_c) of those without. Of several
views of a kind, p or q is the Khatri-Rao product, formed with library calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from string import ascii_lowercase
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from polyfusion.kernels.eager.views import khatri_rao
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
def _factor(
    view, weight, rows, live, k, SIZE: tl.constexpr, RANK: tl.constexpr, PROJECTED: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """(BLOCK_T, BLOCK_K) of p or q: [z, 1] U, or read if it is there already."""
    if PROJECTED:
        x = tl.load(
            view + rows[:, None] * RANK + k[None, :],
            mask=live[:, None] & (k[None, :] < RANK), other=0.0,
        ).to(COMPUTE)
    else:
        x = project(
            view, weight, rows, live, k, SIZE, RANK, True, COMPUTE, ACC, PRECISION,
            BLOCK_T, BLOCK_K, BLOCK_D,
        ).to(COMPUTE)
    return x


@jit
def _core_kernel(
    view, weight, core, result, clips,
    SIZE: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, PROJECTED: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """M (B, k_1 K_f) = q 𝒢₍c₎ᵀ: a tile of clips by a tile of the core's rows (k_1 K_f, K_c)."""
    w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    b = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    live = b < clips
    acc = tl.zeros((BLOCK_B, BLOCK_W), ACC)
    for start in range(0, RANK, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        q = _factor(
            view, weight, b, live, k, SIZE, RANK, PROJECTED,
            COMPUTE, ACC, PRECISION, BLOCK_B, BLOCK_K, BLOCK_D,
        )
        g = tl.load(
            core + w.to(tl.int64)[None, :] * RANK + k[:, None],
            mask=(w[None, :] < WIDTH) & (k[:, None] < RANK), other=0.0,
        ).to(COMPUTE)
        acc = tl.dot(q, g, acc, input_precision=PRECISION, out_dtype=ACC)
    tl.store(
        result + b[:, None] * WIDTH + w[None, :], acc.to(result.dtype.element_ty),
        mask=live[:, None] & (w[None, :] < WIDTH),
    )


@jit
def _forward_kernel(
    view, weight, per_clip, out, noise, result, frames, count, clip_stride,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, OUTPUTS: tl.constexpr,
    NOISE: tl.constexpr, STRIDE: tl.constexpr, PROJECTED: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_NOISE: tl.constexpr,
):
    """y = (p Mᵀ) U₁ᵀ: one tile of a clip's frames by a tile of outputs."""
    tiles = tl.cdiv(frames, BLOCK_T)
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = clip * frames + t
    live = (t < frames) & (n < count)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_T, BLOCK_M), ACC)
    j = tl.arange(0, BLOCK_J)
    if WIDTH <= BLOCK_J:
        p = _factor(
            view, weight, n, live, j, SIZE, WIDTH, PROJECTED,
            COMPUTE, ACC, PRECISION, BLOCK_T, BLOCK_J, BLOCK_D,
        )
    for i_start in range(0, INNER, BLOCK_I):
        i = i_start + tl.arange(0, BLOCK_I)
        h = tl.zeros((BLOCK_T, BLOCK_I), ACC)
        for j_start in range(0, WIDTH, BLOCK_J):
            k = j_start + j
            if WIDTH > BLOCK_J:
                p = _factor(
                    view, weight, n, live, k, SIZE, WIDTH, PROJECTED,
                    COMPUTE, ACC, PRECISION, BLOCK_T, BLOCK_J, BLOCK_D,
                )
            matrix = tl.load(
                per_clip + clip * clip_stride + i[None, :] * WIDTH + k[:, None],
                mask=(i[None, :] < INNER) & (k[:, None] < WIDTH), other=0.0,
            ).to(COMPUTE)
            h = tl.dot(p, matrix, h, input_precision=PRECISION, out_dtype=ACC)
        u = tl.load(
            out + m[None, :] * INNER + i[:, None],
            mask=(m[None, :] < OUTPUTS) & (i[:, None] < INNER), other=0.0,
        ).to(COMPUTE)
        acc = tl.dot(h.to(COMPUTE), u, acc, input_precision=PRECISION, out_dtype=ACC)
    line = result + n[:, None] * STRIDE
    kind = result.dtype.element_ty
    tl.store(line + m[None, :], acc.to(kind), mask=live[:, None] & (m[None, :] < OUTPUTS))
    if NOISE > 0:
        e = tl.program_id(1) * BLOCK_NOISE + tl.arange(0, BLOCK_NOISE)
        inside = live[:, None] & (e[None, :] < NOISE)
        drawn = tl.load(noise + n[:, None] * NOISE + e[None, :], mask=inside, other=0.0)
        tl.store(line + OUTPUTS + e[None, :], drawn, mask=inside)


def config(
    kernel: str, sizes: dict[str, int], tensor: Tensor, constants: dict[str, Any]
) -> dict[str, int]:
    """Tile sizes and warps of the ``"core"`` or the ``"forward"`` kernel for these sizes."""
    if capability(tensor) is None:
        return {f"BLOCK_{letter}": block(size) for letter, size in sizes.items()}
    full = uses_tensor_cores(constants)
    edge = 64 if full else 16 if constants["COMPUTE"] == tl.float64 else 32
    tile = {f"BLOCK_{letter}": block(size, 16, edge) for letter, size in sizes.items()}
    if constants["PRECISION"] == "tf32":  # twice the registers of half precision
        tile = {name: min(size, 64 if name == "BLOCK_T" else 32) for name, size in tile.items()}
    elif kernel == "forward" and edge > 16:
        # p is projected once, and p Mᵀ computed for fewer tiles of outputs.
        most = {"T": 32, "M": 128, "J": 128} if full else {"T": 16, "M": 64, "J": 128}
        tile |= {f"BLOCK_{letter}": block(sizes[letter], 16, size) for letter, size in most.items()}
        tile["num_warps"] = 8 if full else 4
    return {"num_warps": 4, **tile, "num_stages": 3 if full else 2}


def options(
    kernel: str, sizes: dict[str, int], tensor: Tensor, constants: dict[str, Any]
) -> Options:
    """What to choose from for the ``"core"`` or the ``"forward"`` kernel."""
    tile = config(kernel, sizes, tensor, constants)
    wide, deep = [{"BLOCK_W": 128}], [{"BLOCK_M": 64, "num_warps": 4}]
    # Fewer tiles of outputs compute p Mᵀ less often; more of them occupy more.
    plain = [{"BLOCK_M": 128, "num_warps": 8}]
    change = (wide, wide) if kernel == "core" else (deep, plain)
    tiles = vary(tile, tensor, constants, *change)
    return Options(f"tucker {kernel}", tuple(sizes.values()), tiles)


@dataclass(frozen=True)
class _Layout:
    """The views with frames and those without, and the core as (k_1, K_f, K_c) to match.

    ``order`` has the core's axes in that order. Of the two forward kernels, that of the clips and
    that of the frames, there is what to choose from and what they are compiled for; ``shape`` and
    ``strides`` are their result's.
    """

    rows: Rows
    shape: tuple[int, ...]
    strides: list[int]
    framed: list[int]
    still: list[int]
    order: list[int]
    core: tuple[int, int, int]
    clips: tuple[Options, dict[str, Any]]
    frames: tuple[Options, dict[str, Any]]


@planned
def _lay_out(tensors: Sequence[Tensor], noise: int) -> _Layout:
    """How to compute with a core, out and views of these shapes, and so many values of noise."""
    core, out, *views = tensors
    rows, constants = lay_out(views, block_t=1), arithmetic(core)
    framed = [v for v, whole in enumerate(rows.framed) if whole]
    still = [v for v, whole in enumerate(rows.framed) if not whole]
    inner, width = core.shape[0], prod(core.shape[v + 1] for v in framed)
    clip_width = prod(core.shape[v + 1] for v in still)

    def kernel(
        name: str, group: list[int], sizes: dict[str, int], fixed: dict[str, int]
    ) -> tuple[Options, dict[str, Any]]:
        size = views[group[0]].shape[-1] if len(group) == 1 else 1
        fixed |= {"SIZE": size, "PROJECTED": len(group) != 1}
        return options(name, {**sizes, "D": size}, core, constants), {**fixed, **constants}

    clips = {"B": rows.clips, "W": inner * width, "K": clip_width}
    frames = {
        "T": rows.frames if still else rows.count, "M": out.shape[0], "I": inner, "J": width
    }
    shape = (*rows.leading, out.shape[0] + noise)
    strides = row_strides(shape, out.element_size())
    return _Layout(
        rows, shape, strides, framed, still, [0, *(v + 1 for v in (*framed, *still))],
        (inner, width, clip_width),
        kernel("core", still, clips, {"RANK": clip_width, "WIDTH": inner * width}),
        kernel("forward", framed, frames,
               {"WIDTH": width, "INNER": inner, "OUTPUTS": out.shape[0], "NOISE": noise,
                "STRIDE": strides[-2], "BLOCK_NOISE": next_power_of_2(noise)}),
    )


class _Groups:
    """The tensors, dense and by their :class:`_Layout`."""

    def __init__(
        self,
        views: Sequence[Tensor],
        core: Tensor,
        factors: Sequence[Tensor],
        out: Tensor,
        noise: int = 0,
    ) -> None:
        self.layout: _Layout = _lay_out((core, out, *views), noise)
        self.views, self.factors = dense(views), dense(factors)
        if self.layout.order != sorted(self.layout.order):
            core = core.permute(self.layout.order)
        self.core = core.contiguous()

    def rows(self, v: int) -> Tensor:
        """View ``v`` as a matrix, with a row a frame or a row a clip."""
        return self.views[v].flatten(0, -2)

    def projections(self, group: list[int]) -> tuple[list[Tensor], list[Product]]:
        """Room for [z_v, 1] U_v of each view in the group, and the products that fill it."""
        views, factors = [self.rows(v) for v in group], [self.factors[v] for v in group]
        rooms = [
            view.new_empty(len(view), factor.shape[1])
            for view, factor in zip(views, factors, strict=True)
        ]
        return rooms, list(map(Product, rooms, views, factors))

    def operand(self, group: list[int]) -> tuple[Tensor, Tensor]:
        """What :func:`_factor` takes: a single view and its factor, or a Khatri-Rao product."""
        if len(group) == 1:
            return self.views[group[0]], self.factors[group[0]]
        rooms, products = self.projections(group)
        multiply(products)
        product = khatri_rao(rooms)
        return product, product


def tucker_forward(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """[y, noise] in two launches, one for the clips and one for the frames."""
    extra = 0 if noise is None else noise.shape[-1]
    groups, out = _Groups(views, core, factors, out, extra), out.contiguous()
    core, layout = groups.core, groups.layout
    (inner, width, _clip_width), outputs = layout.core, out.shape[0]
    clips, frames, count = layout.rows.clips, layout.rows.frames, layout.rows.count
    result = out.new_empty_strided(layout.shape, layout.strides)
    if not result.numel():
        return result

    per_clip, stride = core, 0
    if layout.still:
        q, (choice, fixed) = groups.operand(layout.still), layout.clips
        stride = inner * width

        def run_core(tile: Tile) -> Tensor:
            per_clip = core.new_empty(clips, stride)
            launch(
                _core_kernel,
                (cdiv(stride, tile["BLOCK_W"]), cdiv(clips, tile["BLOCK_B"])),
                *q, core, per_clip, clips, **fixed, **tile,
            )
            return per_clip

        per_clip = tuned(choice, core, fixed, run_core)

    p, (choice, constants) = groups.operand(layout.framed), layout.frames
    noise = out if noise is None else noise.contiguous()

    def run(tile: Tile) -> Tensor:
        each, number = frames, clips
        if not layout.still:  # any cut of the rows will do
            each, number = tile["BLOCK_T"], cdiv(count, tile["BLOCK_T"])
        across = max(1, cdiv(outputs, tile["BLOCK_M"]))
        launch(
            _forward_kernel, (number * cdiv(each, tile["BLOCK_T"]), across),
            *p, per_clip, out, noise, result, each, count, stride, **constants, **tile,
        )
        return result

    return tuned(choice, core, constants, run)


def tucker_backward(
    grad: Tensor,
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of views, core, factors and out in four launches of matrix products.

    Nothing is kept from the forward pass. An empty tensor where a gradient is not needed.
    """
    operands = [*views, core, *factors, out]
    groups = _Groups(views, core, factors, out)
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else x.new_empty(0)
        for x, need in zip(operands, needs, strict=True)
    ]
    layout, grad_core = groups.layout, torch.empty_like(groups.core)
    (inner, width, clip_width), count = layout.core, layout.rows.count
    core = groups.core.view(layout.core)
    grad = as_rows(grad)[:, : out.shape[0]]

    g, h = out.new_empty(count, inner), out.new_empty(count, inner)
    grad_p = out.new_empty(count, width)
    frame_parts, products = groups.projections(layout.framed)
    clip_parts, clip_products = groups.projections(layout.still)
    multiply([Product(g, grad, out), *products, *clip_products])
    p = khatri_rao(frame_parts)

    if layout.still:
        clips, frames = layout.rows.clips, layout.rows.frames
        q = khatri_rao(clip_parts)
        per_clip = core.new_empty(clips, inner, width)  # M
        grad_per_clip = torch.empty_like(per_clip)
        multiply(
            [
                Product(per_clip.view(clips, inner * width), q, core.flatten(0, 1).mT),
                Product(
                    grad_per_clip, g.view(clips, frames, inner).mT, p.view(clips, frames, width)
                ),
            ]
        )
        # dq sums over k_1 K_f entries of the core: in parts of k_1, added where dq is used.
        parts = max(s for s in range(1, 17) if inner % s == 0)
        entries = inner // parts * width
        grad_q = q.new_empty(clips, parts, clip_width, dtype=sum_dtype(q)).transpose(0, 1)
        multiply(
            [
                Product(h.view(clips, frames, inner), p.view(clips, frames, width), per_clip.mT),
                Product(grad_p.view(clips, frames, width), g.view(clips, frames, inner), per_clip),
                Product(
                    grad_core.view(inner * width, clip_width),
                    grad_per_clip.view(clips, inner * width).mT,
                    q,
                ),
                Product(
                    grad_q,
                    grad_per_clip.view(clips, parts, entries).transpose(0, 1),
                    core.view(parts, entries, clip_width),
                ),
            ]
        )
    else:
        flat, grad_q = core.view(inner, width), None
        multiply(
            [
                Product(h, p, flat.mT),
                Product(grad_p, g, flat),
                Product(grad_core.view(inner, width), g.mT, p),
            ]
        )

    number = len(views)
    products = [Product(grads[-1], grad.mT, h)] if needs[-1] else []
    for group, parts, grad_group in (
        (layout.framed, frame_parts, grad_p),
        (layout.still, clip_parts, grad_q),
    ):
        for v, part in zip(group, _split_gradient(grad_group, parts), strict=True):
            view, factor = groups.rows(v), groups.factors[v]
            if needs[v]:
                products.append(Product(grads[v].view(view.shape), part, factor[:-1].mT))
            if needs[number + 1 + v]:
                products.append(Product(grads[number + 1 + v], view.mT, part))
    multiply(products)
    if needs[number]:
        inverse = sorted(range(number + 1), key=layout.order.__getitem__)
        grads[number] = grad_core.permute(inverse).contiguous()
    return grads


def _split_gradient(grad: Tensor | None, parts: list[Tensor]) -> list[Tensor]:
    """Gradients of the factors of a Khatri-Rao product, from the product's."""
    if len(parts) < 2:
        return [grad] * len(parts)
    if grad.ndim == 3:
        grad = grad.sum(0).to(parts[0].dtype)
    cube = grad.unflatten(-1, [part.shape[-1] for part in parts])
    letters = ascii_lowercase[: len(parts)]
    return [
        torch.einsum(
            f"...{letters},{','.join('...' + x for x in letters if x != mine)}->...{mine}",
            cube,
            *(part for x, part in zip(letters, parts, strict=True) if x != mine),
        )
        for mine in letters
    ]
