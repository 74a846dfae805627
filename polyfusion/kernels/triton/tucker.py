"""Tucker: the core meets the clips' views once per clip, then the frames meet that matrix.

    M_clip = 𝒢 ×_clip q    (k_1, K_f) per clip         y = (p M_clipᵀ) U₁ᵀ

with p (N, K_f) the projections of the views with frames and q (B, K_c) of those without. Of several
views of a kind, p or q is the Khatri-Rao product, formed with library calls.
"""

from collections.abc import Sequence
from math import prod
from string import ascii_lowercase
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from polyfusion.kernels.eager.views import khatri_rao
from polyfusion.kernels.layout import sum_dtype
from polyfusion.kernels.triton.common import (
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
    NOISE: tl.constexpr, PROJECTED: tl.constexpr,
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
    line = result + n[:, None] * (OUTPUTS + NOISE)
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
    elif full and kernel == "forward":
        tile["BLOCK_J"] = block(sizes["J"], 16, 128)  # then p is projected once
    return {**tile, "num_warps": 4, "num_stages": 3 if full else 2}


def options(
    kernel: str, sizes: dict[str, int], tensor: Tensor, constants: dict[str, Any]
) -> Options:
    """What to choose from for the ``"core"`` or the ``"forward"`` kernel."""
    tile = config(kernel, sizes, tensor, constants)
    # Fewer tiles of outputs compute p Mᵀ less often.
    change = [{"BLOCK_W": 128} if kernel == "core" else {"BLOCK_M": 128, "num_warps": 8}]
    tiles = vary(tile, tensor, constants, cores=change, plain=change)
    return Options(f"tucker {kernel}", tuple(sizes.values()), tiles)


@planned
def _plan(tensors: Sequence[Tensor], kernel: str, **sizes: int) -> tuple[dict[str, Any], Options]:
    """Constants of the ``"core"`` or ``"forward"`` kernel, and what to choose from."""
    (core,) = tensors
    constants = arithmetic(core)
    return constants, options(kernel, sizes, core, constants)


class _Groups:
    """The views with frames and those without, and the core as (k_1, K_f, K_c) to match."""

    def __init__(self, views: Sequence[Tensor], core: Tensor, factors: Sequence[Tensor]) -> None:
        self.rows = lay_out(views, block_t=1)
        self.views = [view.flatten(0, -2).contiguous() for view in views]
        self.factors = dense(factors)
        self.framed = [v for v, framed in enumerate(self.rows.framed) if framed]
        self.still = [v for v, framed in enumerate(self.rows.framed) if not framed]
        self.order = (0, *(v + 1 for v in (*self.framed, *self.still)))
        self.ranks = [core.shape[axis] for axis in self.order]
        inner, width = core.shape[0], prod(core.shape[v + 1] for v in self.framed)
        clip_width = prod(core.shape[v + 1] for v in self.still)
        self.core = core.permute(self.order).contiguous().view(inner, width, clip_width)

    def projections(self, group: list[int]) -> tuple[list[Tensor], list[Product]]:
        """Room for [z_v, 1] U_v of each view in the group, and the products that fill it."""
        rooms = [
            self.views[v].new_empty(len(self.views[v]), self.factors[v].shape[1]) for v in group
        ]
        return rooms, [
            Product(room, self.views[v], self.factors[v])
            for room, v in zip(rooms, group, strict=True)
        ]

    def operand(self, group: list[int]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """What :func:`_factor` takes: a single view and its factor, or a Khatri-Rao product."""
        if len(group) == 1:
            view, factor = self.views[group[0]], self.factors[group[0]]
            return view, factor, {"SIZE": view.shape[1], "PROJECTED": False}
        rooms, products = self.projections(group)
        multiply(products)
        product = khatri_rao(rooms)
        return product, product, {"SIZE": 1, "PROJECTED": True}


def tucker_forward(
    views: Sequence[Tensor],
    core: Tensor,
    factors: Sequence[Tensor],
    out: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """[y, noise] in two launches, one for the clips and one for the frames."""
    groups = _Groups(views, core, factors)
    core, out = groups.core, out.contiguous()
    (inner, width, clip_width), outputs = core.shape, out.shape[0]
    extra = 0 if noise is None else noise.shape[-1]
    result = out.new_empty((*groups.rows.leading, outputs + extra))
    if not result.numel():
        return result

    per_clip, stride, clips, frames = core, 0, groups.rows.clips, groups.rows.frames
    if groups.still:
        view, factor, kind = groups.operand(groups.still)
        stride = inner * width

        def run_core(tile: Tile) -> Tensor:
            per_clip = core.new_empty(clips, stride)
            launch(
                _core_kernel,
                (cdiv(stride, tile["BLOCK_W"]), cdiv(clips, tile["BLOCK_B"])),
                view, factor, core, per_clip, clips,
                RANK=clip_width, WIDTH=stride, **kind, **constants, **tile,
            )
            return per_clip

        constants, choice = _plan(
            (core,), "core", B=clips, W=stride, K=clip_width, D=view.shape[1]
        )
        per_clip = tuned(choice, core, constants, run_core)

    view, factor, kind = groups.operand(groups.framed)
    count = groups.rows.count
    rows = frames if groups.still else count
    noise = out if noise is None else noise.contiguous()

    def run(tile: Tile) -> Tensor:
        each, number = frames, clips
        if not groups.still:  # any cut of the rows will do
            each, number = tile["BLOCK_T"], cdiv(count, tile["BLOCK_T"])
        across = max(1, cdiv(outputs, tile["BLOCK_M"]))
        launch(
            _forward_kernel, (number * cdiv(each, tile["BLOCK_T"]), across),
            view, factor, per_clip, out, noise, result, each, count, stride,
            WIDTH=width, INNER=inner, OUTPUTS=outputs, NOISE=extra, **kind,
            BLOCK_NOISE=next_power_of_2(max(extra, 1)), **constants, **tile,
        )
        return result

    constants, choice = _plan(
        (core,), "forward", T=rows, M=outputs, I=inner, J=width, D=kind["SIZE"]
    )
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
    groups = _Groups(views, core, factors)
    grads = [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need else x.new_empty(0)
        for x, need in zip(operands, needs, strict=True)
    ]
    core, count = groups.core, groups.rows.count
    inner, width, clip_width = core.shape
    grad = grad.contiguous().view(count, grad.shape[-1])[:, : out.shape[0]]
    grad_core = core.new_empty(groups.ranks)

    g, h = out.new_empty(count, inner), out.new_empty(count, inner)
    grad_p = out.new_empty(count, width)
    frame_parts, products = groups.projections(groups.framed)
    clip_parts, clip_products = groups.projections(groups.still)
    multiply([Product(g, grad, out), *products, *clip_products])
    p = khatri_rao(frame_parts)

    if groups.still:
        clips, frames = groups.rows.clips, groups.rows.frames
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
        (groups.framed, frame_parts, grad_p),
        (groups.still, clip_parts, grad_q),
    ):
        for v, part in zip(group, _split_gradient(grad_group, parts), strict=True):
            view, factor = groups.views[v], groups.factors[v]
            if needs[v]:
                products.append(Product(grads[v].view(view.shape), part, factor[:-1].mT))
            if needs[number + 1 + v]:
                products.append(Product(grads[number + 1 + v], view.mT, part))
    multiply(products)
    if needs[number]:
        inverse = sorted(range(number + 1), key=groups.order.__getitem__)
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
