"""Many matrix products in one launch, for the gradients of the fusion operators.

A product C = A B, or A B + A' B', has operands of any strides, with or without a leading batch; a
batch that C does not have is summed. If A lacks the last row or column that the sizes of B and C
ask for, ones stand there: that is φ's appended 1, so C = [z, 1]ᵀ dp or p = [z, 1] A need no
concatenation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import triton.language as tl
from torch import Tensor

from polyfusion.kernels.triton.common import (
    arithmetic,
    block,
    capability,
    cdiv,
    jit,
    launch,
    remember,
    setting,
    uses_tensor_cores,
)
from polyfusion.kernels.triton.tune import Options, Tile, tuned, vary


@dataclass(frozen=True)
class Product:
    """``out = a @ b``, or ``a @ b + more[0] @ more[1]``; batched operands have one batch size.

    A batch that is summed is one of both terms.
    """

    out: Tensor
    a: Tensor
    b: Tensor
    more: tuple[Tensor, Tensor] | None = None


@jit
def _accumulate(
    acc, a, b, batch, i, j, sizes, strides, SUMMED: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    rows, columns, inner, stored_rows, stored_inner = sizes
    k = tl.arange(0, BLOCK_K)
    a += batch * strides[0]
    b += batch * strides[3]
    for _ in range(0, SUMMED):
        x_at = a + i[:, None] * strides[1] + k[None, :] * strides[2]
        y_at = b + k[:, None] * strides[4] + j[None, :] * strides[5]
        for start in range(0, inner, BLOCK_K):
            stored = (i[:, None] < stored_rows) & (k[None, :] < stored_inner - start)
            x = tl.load(x_at, mask=stored, other=0.0).to(COMPUTE)
            ones = (i[:, None] < rows) & (k[None, :] < inner - start) & ~stored
            x = tl.where(ones, 1.0, x).to(COMPUTE)
            present = (k[:, None] < inner - start) & (j[None, :] < columns)
            y = tl.load(y_at, mask=present, other=0.0).to(COMPUTE)
            acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=ACC)
            x_at += BLOCK_K * strides[2]
            y_at += BLOCK_K * strides[4]
        a += strides[0]
        b += strides[3]
    return acc


@jit
def _products_kernel(
    outs, lefts, rights, more_lefts, more_rights, sizes, strides, more_sizes, more_strides,
    out_strides, starts,
    TWO_TERMS: tl.constexpr, SUMMED: tl.constexpr, INDEX: tl.constexpr,
    COMPUTE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Program p computes one tile of the product in whose range p falls."""
    program = tl.program_id(0)
    for n in tl.static_range(len(outs)):
        if (program >= starts[n]) & (program < starts[n + 1]):
            rows = sizes[n][0]
            columns = sizes[n][1]
            across = tl.cdiv(columns, BLOCK_N)
            tiles = tl.cdiv(rows, BLOCK_M) * across
            batch = ((program - starts[n]) // tiles).to(tl.int64)
            tile = (program - starts[n]) % tiles
            i = ((tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)).to(INDEX)
            j = ((tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)).to(INDEX)
            acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            acc = _accumulate(
                acc, lefts[n], rights[n], batch, i, j, sizes[n], strides[n], SUMMED[n],
                COMPUTE, ACC, PRECISION, BLOCK_K,
            )
            if TWO_TERMS[n]:
                acc = _accumulate(
                    acc, more_lefts[n], more_rights[n], batch, i, j, more_sizes[n],
                    more_strides[n], SUMMED[n], COMPUTE, ACC, PRECISION, BLOCK_K,
                )
            out = outs[n] + batch * out_strides[n][0]
            tl.store(
                out + i[:, None] * out_strides[n][1] + j[None, :] * out_strides[n][2],
                acc.to(out.dtype.element_ty),
                mask=(i[:, None] < rows) & (j[None, :] < columns),
            )


def config(products: Sequence[Product], constants: dict[str, Any]) -> dict[str, int]:
    """Tile sizes and warps for these products."""
    first = products[0].out
    if capability(first) is None:
        m = max(p.out.shape[-2] for p in products)
        n = max(p.out.shape[-1] for p in products)
        k = max(p.a.shape[-1] for p in products)
        return {
            "BLOCK_M": block(m, 16, 512),
            "BLOCK_N": block(n, 16, 512),
            "BLOCK_K": block(k, 16, 512),
        }
    if uses_tensor_cores(constants):
        return {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


def options(products: Sequence[Product], constants: dict[str, Any]) -> Options:
    """What to choose from for these products."""
    cores, plain = [{"BLOCK_N": 64, "num_warps": 8}], [{"BLOCK_N": 64}]
    tiles = vary(config(products, constants), products[0].out, constants, cores, plain)
    sizes = (size for p in products for size in (*p.out.shape, p.a.shape[-1]))
    return Options("products", tuple(sizes), tiles)


class _Plan:
    """What a launch of products needs beside their tensors, the same for tensors that look alike.

    ``order`` has the longest sums first, so that they do not start when everything else is done.
    """

    def __init__(self, products: Sequence[Product]) -> None:
        self.order = sorted(range(len(products)), key=lambda i: -products[i].a.shape[-1])
        products = [products[i] for i in self.order]
        more = [p.more or (p.a, p.b) for p in products]
        # Partial sums are kept in float32: the narrowest operand says what to compute in.
        operands = [(n, side) for n in range(len(products)) for side in ("a", "b")]
        self.narrow = min(operands, key=lambda x: getattr(products[x[0]], x[1]).element_size())
        self.constants = arithmetic(getattr(products[self.narrow[0]], self.narrow[1]))
        self.options = options(products, self.constants)
        self.sizes = [_sizes(p.out, p.a, p.b) for p in products]
        self.batches = [_batch(p.out) for p in products]
        self.tables = (
            tuple(self.sizes),
            tuple((*_strides(p.a), *_strides(p.b)) for p in products),
            tuple(_sizes(p.out, a, b) for p, (a, b) in zip(products, more, strict=True)),
            tuple((*_strides(a), *_strides(b)) for a, b in more),
            tuple(_strides(p.out) for p in products),
        )
        tensors = [x for p in products for x in (p.out, p.a, p.b, *(p.more or ()))]
        self.fixed = {
            "TWO_TERMS": tuple(p.more is not None for p in products),
            "SUMMED": tuple(max(_batch(p.a), _batch(p.b)) // _batch(p.out) for p in products),
            "INDEX": tl.int64 if max(map(_reach, tensors)) >= 2**31 else tl.int32,
            **self.constants,
        }

    def starts(self, tile: Tile) -> tuple[int, ...]:
        """The first program of each product, and how many there are."""
        tiles = (
            batch * cdiv(rows, tile["BLOCK_M"]) * cdiv(columns, tile["BLOCK_N"])
            for batch, (rows, columns, *_) in zip(self.batches, self.sizes, strict=True)
        )
        return (0, *accumulate(tiles))


_plans: dict[Any, _Plan] = {}


def multiply(products: Sequence[Product]) -> None:
    """Compute all products in one launch. Sums run in a fixed order: it is deterministic."""
    products = [product for product in products if product.out.numel()]
    if not products:
        return
    looks = tuple(
        [(_look(p.out), _look(p.a), _look(p.b), *map(_look, p.more or ())) for p in products]
    )
    key = (looks, setting(products[0].out))
    plan: _Plan = remember(_plans, key, lambda: _Plan(products))
    products = [products[i] for i in plan.order]
    more = [p.more or (p.a, p.b) for p in products]
    tensors = (
        tuple([p.out for p in products]),
        tuple([p.a for p in products]),
        tuple([p.b for p in products]),
        tuple([a for a, _ in more]),
        tuple([b for _, b in more]),
    )

    def run(tile: Tile) -> None:
        starts = plan.starts(tile)
        launch(
            _products_kernel, (starts[-1],), *tensors, *plan.tables, starts, **plan.fixed, **tile
        )

    number, side = plan.narrow
    tuned(plan.options, getattr(products[number], side), plan.constants, run)


def _look(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


def _batch(x: Tensor) -> int:
    return x.shape[0] if x.ndim == 3 else 1


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride() if x.ndim == 3 else (0, *x.stride())


def _reach(x: Tensor) -> int:
    """The farthest offset in a matrix of the batch, a tile's overhang included."""
    return sum(
        (size + 256) * stride for size, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True)
    )


def _sizes(out: Tensor, a: Tensor, b: Tensor) -> tuple[int, ...]:
    rows, columns, inner = out.shape[-2], out.shape[-1], b.shape[-2]
    missing = (rows - a.shape[-2], inner - a.shape[-1])
    if missing not in ((0, 0), (1, 0), (0, 1)) or b.shape[-1] != columns:
        raise ValueError(f"no product: {tuple(out.shape)} = {tuple(a.shape)} @ {tuple(b.shape)}")
    return rows, columns, inner, a.shape[-2], a.shape[-1]
