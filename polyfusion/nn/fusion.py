"""Fusion layers: the operators of :mod:`polyfusion.ops` with their parameters.

Every layer takes the views (as one sequence or one by one) and the noise:

    fuse = CPFusion((256, 128), 384, rank=128)
    z = fuse(speech, identity, noise=noise)     # (B, T, 256), (B, 128), (B, T, 10) -> (B, T, 394)
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyfusion.dispatch import check_choice
from polyfusion.ops.cmf import cmf_first_order_fusion, cmf_fusion
from polyfusion.ops.concat import concat_fusion
from polyfusion.ops.cp import cp_fusion
from polyfusion.ops.dense import dense_fusion
from polyfusion.ops.tensor_train import tensor_train_fusion
from polyfusion.ops.tucker import partial_tucker_fusion, tucker_fusion
from polyfusion.ops.views import check_dtype, check_views

PENALTIES = ("norm", "sumsq", "meansq")


class _Fusion(nn.Module):
    """Views of sizes ``dims`` in, ``out_features`` (and the noise behind them) out."""

    def __init__(self, dims: Sequence[int], out_features: int, kernels: str = "eager") -> None:
        super().__init__()
        self.dims = tuple(dims)
        if len(self.dims) < 2:
            raise ValueError(f"dims={self.dims}: expected the sizes of at least 2 views")
        _check_positive("dims", *self.dims)
        _check_positive("out_features", out_features)
        check_choice(kernels)
        self.out_features = out_features
        self.kernels = kernels

    def forward(self, *views: Any, noise: Tensor | None = None) -> Tensor:
        """Fuse the views, each (B, T, d_v), or (B, d_v) if constant over the clip.

        Returns (B, T, m), or (B, m) if no view has frames; m + n with noise (B, T, n).
        """
        separate = len(views) != 1 or isinstance(views[0], Tensor)
        return self._fuse(views if separate else views[0], noise)

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Xavier-normal, a vector as a matrix of one column, a tensor as its first unfolding."""
        for parameter in self.parameters():
            rows = parameter.shape[0]
            columns = parameter.numel() // rows
            nn.init.normal_(parameter, std=math.sqrt(2 / (rows + columns)))

    def frobenius_penalty(self, kind: str = "norm") -> Tensor:
        """Ω of eq. (9) over every parameter of the layer, a shared one once; a scalar.

        ``"norm"`` is Σ‖P‖_F as in the paper, ``"sumsq"`` Σ‖P‖²_F, ``"meansq"`` the mean square over
        all entries. The gradient of the norm is 0 at a parameter that is 0.
        """
        if kind not in PENALTIES:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(map(repr, PENALTIES))}")
        parameters = list(self.parameters())
        if not parameters:
            return torch.zeros(())
        if kind == "norm":
            return torch.stack([torch.linalg.vector_norm(p) for p in parameters]).sum()
        total = torch.stack([p.square().sum() for p in parameters]).sum()
        return total if kind == "sumsq" else total / sum(p.numel() for p in parameters)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, out_features={self.out_features}"


class CPFusion(_Fusion):
    """PF-CP, eq. (7): k (m + Σ (d_v + 1)) parameters.

    Parameters are ``factors`` A_v (d_v+1, k) and ``out`` A₁ (m, k).
    """

    def __init__(
        self, dims: Sequence[int], out_features: int, rank: int = 128, kernels: str = "auto"
    ) -> None:
        super().__init__(dims, out_features, kernels)
        _check_positive("rank", rank)
        self.rank = rank
        self.factors = nn.ParameterList(torch.empty(d + 1, rank) for d in self.dims)
        self.out = nn.Parameter(torch.empty(out_features, rank))
        self.reset_parameters()

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        return cp_fusion(views, list(self.factors), self.out, noise=noise, kernels=self.kernels)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, kernels={self.kernels!r}"


class TuckerFusion(_Fusion):
    """PF-Tucker, eq. (8), with ranks (k_1, ..., k_{V+1}); by default half of each size.

    Parameters are ``core`` 𝒢 (k_1, ..., k_{V+1}), ``factors`` U_{v+1} (d_v+1, k_{v+1}) and ``out``
    U₁ (m, k_1).
    """

    def __init__(
        self,
        dims: Sequence[int],
        out_features: int,
        ranks: Sequence[int] | None = None,
        kernels: str = "auto",
    ) -> None:
        super().__init__(dims, out_features, kernels)
        if ranks is None:
            ranks = [max(1, size // 2) for size in (out_features, *self.dims)]
        self.ranks = tuple(ranks)
        if len(self.ranks) != len(self.dims) + 1:
            raise ValueError(
                f"ranks={self.ranks}: expected {len(self.dims) + 1} numbers, "
                "one for the output and one for each view"
            )
        _check_positive("ranks", *self.ranks)
        self.core = nn.Parameter(torch.empty(self.ranks))
        self.factors = nn.ParameterList(
            torch.empty(d + 1, k) for d, k in zip(self.dims, self.ranks[1:], strict=True)
        )
        self.out = nn.Parameter(torch.empty(out_features, self.ranks[0]))
        self.reset_parameters()

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        return tucker_fusion(
            views, self.core, list(self.factors), self.out, noise=noise, kernels=self.kernels
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}, kernels={self.kernels!r}"


class PartialTuckerFusion(_Fusion):
    """Eq. (8) without U₁: the core's first mode is the output. Eager only.

    ``ranks`` (k_2, ..., k_{V+1}) has a number for each view; by default half of its size.
    Parameters are ``core`` 𝒢 (m, k_2, ..., k_{V+1}) and ``factors`` U_{v+1} (d_v+1, k_{v+1}).
    """

    def __init__(
        self, dims: Sequence[int], out_features: int, ranks: Sequence[int] | None = None
    ) -> None:
        super().__init__(dims, out_features)
        self.ranks = tuple(max(1, d // 2) for d in self.dims) if ranks is None else tuple(ranks)
        if len(self.ranks) != len(self.dims):
            raise ValueError(
                f"ranks={self.ranks}: expected {len(self.dims)} numbers, one for each view"
            )
        _check_positive("ranks", *self.ranks)
        self.core = nn.Parameter(torch.empty(out_features, *self.ranks))
        self.factors = nn.ParameterList(
            torch.empty(d + 1, k) for d, k in zip(self.dims, self.ranks, strict=True)
        )
        self.reset_parameters()

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        return partial_tucker_fusion(views, self.core, list(self.factors), noise=noise)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ranks={self.ranks}"


class CMFFusion(_Fusion):
    """PF-CMF, eq. (5), or PF-CMF-SR, eq. (6b), with a shared row space.

    Parameters are ``first`` V_v (d_v, k), ``second`` B_v (d_v, k) unless shared, ``out`` U (m, k)
    and ``bias`` b (m,).
    """

    def __init__(
        self,
        dims: Sequence[int],
        out_features: int,
        rank: int = 128,
        shared_row_space: bool = False,
        kernels: str = "auto",
    ) -> None:
        super().__init__(dims, out_features, kernels)
        _check_positive("rank", rank)
        self.rank = rank
        self.shared_row_space = shared_row_space
        self.first = nn.ParameterList(torch.empty(d, rank) for d in self.dims)
        self.second = (
            None if shared_row_space else nn.ParameterList(torch.empty(d, rank) for d in self.dims)
        )
        self.out = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        second = None if self.second is None else list(self.second)
        return cmf_fusion(
            views, list(self.first), second, self.out, self.bias, noise=noise, kernels=self.kernels
        )

    def extra_repr(self) -> str:
        shared = ", shared_row_space=True" if self.shared_row_space else ""
        return f"{super().extra_repr()}, rank={self.rank}{shared}, kernels={self.kernels!r}"


class CMFSRFusion(CMFFusion):
    """PF-CMF-SR, eq. (6b): :class:`CMFFusion` with a shared row space."""

    def __init__(
        self, dims: Sequence[int], out_features: int, rank: int = 128, kernels: str = "auto"
    ) -> None:
        super().__init__(dims, out_features, rank, True, kernels)


class CMFFirstOrderFusion(_Fusion):
    """Eq. (5) without interactions between the views: z̃ = b + U Σ_v V_vᵀ z_v. Eager only.

    Parameters are ``first`` V_v (d_v, k), ``out`` U (m, k) and ``bias`` b (m,).
    """

    def __init__(self, dims: Sequence[int], out_features: int, rank: int = 128) -> None:
        super().__init__(dims, out_features)
        _check_positive("rank", rank)
        self.rank = rank
        self.first = nn.ParameterList(torch.empty(d, rank) for d in self.dims)
        self.out = nn.Parameter(torch.empty(out_features, rank))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        return cmf_first_order_fusion(views, list(self.first), self.out, self.bias, noise=noise)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class TensorTrainFusion(_Fusion):
    """The interaction tensor as a chain of cores, one for each view. Eager only.

    Parameters are ``cores``: G_0 (m, r), G_v (r, d_v+1, r) for each view but the last, and G_V
    (r, d_V+1), with one rank r for the whole chain.
    """

    def __init__(self, dims: Sequence[int], out_features: int, rank: int = 128) -> None:
        super().__init__(dims, out_features)
        _check_positive("rank", rank)
        self.rank = rank
        *inner, last = (d + 1 for d in self.dims)
        shapes = [(out_features, rank), *((rank, d, rank) for d in inner), (rank, last)]
        self.cores = nn.ParameterList(torch.empty(shape) for shape in shapes)
        self.reset_parameters()

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        return tensor_train_fusion(views, list(self.cores), noise=noise)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class DenseFusion(_Fusion):
    """The unfactored tensor, eq. (1): ``weight`` 𝒲 (m, d_1+1, ..., d_V+1). Eager only."""

    def __init__(self, dims: Sequence[int], out_features: int) -> None:
        super().__init__(dims, out_features)
        self.weight = nn.Parameter(torch.empty(out_features, *(d + 1 for d in self.dims)))
        self.reset_parameters()

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        return dense_fusion(views, self.weight, noise=noise)


class ConcatFusion(_Fusion):
    """The baseline: the views one behind the other, no parameters, Σ d_v outputs."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__(dims, sum(dims))

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        return concat_fusion(views, noise=noise)


class WithinView(nn.Module):
    """Powers of one view: a polynomial of degree N in z (…, d), the CCP form of Π-nets.

    y_1 = U_1ᵀ z,  y_n = (U_nᵀ z) ∘ y_{n−1} + y_{n−1},  n = 2, …, N;  y_N (…, d)

    Chrysos et al., "Π-nets", CVPR 2020; their last map C y_N + β is left to what follows, here the
    fusion's factors. Parameters are ``factors`` U_n (d, d). Degree 1 is the identity and has none:
    the fusion's factors absorb U_1.
    """

    def __init__(self, features: int, degree: int) -> None:
        super().__init__()
        _check_positive("features", features)
        _check_positive("degree", degree)
        count = degree if degree > 1 else 0
        self.factors = nn.ParameterList(torch.empty(features, features) for _ in range(count))
        for factor in self.factors:
            nn.init.xavier_normal_(factor)

    def forward(self, z: Tensor) -> Tensor:
        if not self.factors:
            return z
        if z.shape[-1] != len(self.factors[0]):
            expected = len(self.factors[0])
            raise ValueError(f"view of {z.shape[-1]} features: expected {expected}")
        y = z @ self.factors[0]
        for factor in self.factors[1:]:
            y = torch.addcmul(y, z @ factor, y)
        return y


class WithinViewFusion(_Fusion):
    """``fusion`` of views that pass through a :class:`WithinView` polynomial of ``degree`` first.

    The fusion then has terms of every degree up to V·N, those within a view included. The penalty
    Ω counts the polynomials' parameters.
    """

    def __init__(self, fusion: _Fusion, degree: int) -> None:
        super().__init__(fusion.dims, fusion.out_features, fusion.kernels)
        self.within = nn.ModuleList(WithinView(d, degree) for d in fusion.dims)
        self.fusion = fusion

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "kernels" and "fusion" in self._modules:
            self.fusion.kernels = value  # it is the one that uses them
        super().__setattr__(name, value)

    def _fuse(self, views: Sequence[Tensor], noise: Tensor | None) -> Tensor:
        if len(views) != len(self.within):
            raise ValueError(f"views: expected {len(self.within)} tensors, got {len(views)}")
        check_views(views)
        for v, (view, d) in enumerate(zip(views, self.dims, strict=True)):
            check_dtype(f"views[{v}]", view)
            if view.shape[-1] != d:
                raise ValueError(f"views[{v}] has {view.shape[-1]} features, expected {d}")
        raised = [within(view) for within, view in zip(self.within, views, strict=True)]
        return self.fusion(raised, noise=noise)


FUSIONS: dict[str, type[_Fusion]] = {
    "cp": CPFusion,
    "tucker": TuckerFusion,
    "partial-tucker": PartialTuckerFusion,
    "cmf": CMFFusion,
    "cmf-sr": CMFSRFusion,
    "cmf-first-order": CMFFirstOrderFusion,
    "tensor-train": TensorTrainFusion,
    "dense": DenseFusion,
    "concat": ConcatFusion,
}
"""Every form of fusion by its name: the one list of them."""
FUSED = tuple(
    name for name, layer in FUSIONS.items() if "kernels" in inspect.signature(layer).parameters
)
"""The forms that have fused kernels: their layers take ``kernels``."""


def make_fusion(
    name: str,
    dims: Sequence[int],
    out_features: int,
    *,
    rank: int = 128,
    ranks: Sequence[int] | None = None,
    within_view_degree: int = 1,
    kernels: str = "auto",
) -> _Fusion:
    """Make the fusion layer called ``name``, one of :data:`FUSIONS`.

    Of the options each layer gets those that it takes: ``rank`` is for CP, CMF and the tensor
    train, ``ranks`` for the Tucker forms, ``kernels`` for those that have fused kernels.
    Concatenation has Σ d_v outputs, whatever ``out_features`` says; read the result's
    ``out_features``. With a ``within_view_degree`` above 1 the result is a
    :class:`WithinViewFusion`.

    Raises:
        ValueError: there is no form of that name, or a size or an option does not fit.
    """
    check_choice(kernels)
    _check_positive("within_view_degree", within_view_degree)
    if name not in FUSIONS:
        raise ValueError(f"fusion {name!r}: expected one of {', '.join(map(repr, FUSIONS))}")
    layer: Any = FUSIONS[name]
    taken = inspect.signature(layer).parameters
    options = {"out_features": out_features, "rank": rank, "ranks": ranks, "kernels": kernels}
    fusion = layer(dims, **{key: value for key, value in options.items() if key in taken})
    return WithinViewFusion(fusion, within_view_degree) if within_view_degree > 1 else fusion


def _check_positive(name: str, *sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"{name}: expected sizes of at least 1, got {sizes}")
