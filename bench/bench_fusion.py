"""The fusion operators, every form and size, against their published forms and other libraries."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.machine import pick_device
from bench.measure import (
    COMPILED,
    COMPILED_REWRITTEN,
    PUBLISHED,
    REWRITTEN,
    Comparison,
    Operator,
    Workload,
)
from bench.peers import HAVE_TENSORLY, TENSORLY_FORMS, tensorly_fusion
from bench.straightforward import published_fusion
from polyfusion.dispatch import cuda_problem, triton_problem
from polyfusion.nn import make_fusion
from polyfusion.nn.fusion import FUSED as FORMS

#: Clips B, frames T, view sizes d_v, outputs m, rank k. At k = 128, the paper's, Tucker has half of
#: every size; at others it has k in every mode.
SIZES: dict[str, dict] = {
    "paper": {"clips": 16, "frames": 75, "dims": (256, 128), "outputs": 384, "rank": 128},
    "stream": {"clips": 1, "frames": 1, "dims": (256, 128), "outputs": 384, "rank": 128},
    "large": {"clips": 64, "frames": 75, "dims": (256, 128), "outputs": 384, "rank": 128},
    "small rank": {"clips": 16, "frames": 75, "dims": (256, 128), "outputs": 384, "rank": 8},
}
SHORT = {"clips": 2, "frames": 25, "dims": (256, 128), "outputs": 384, "rank": 128}
DEVICE = pick_device()


def fused_kernels() -> list[str]:
    """The fused kernels worth timing here: Triton's interpreter is for checking, not speed."""
    if DEVICE.type != "cuda":
        return []
    problems = {"triton": triton_problem(), "cuda": cuda_problem()}
    return [kernels for kernels, problem in problems.items() if problem is None]


def choose_kernels(module: nn.Module, variant: str) -> None:
    """Let every part of ``module`` that has a choice use the kernels a variant is named after."""
    for part in module.modules():
        if hasattr(part, "kernels"):
            part.kernels = variant if variant in ("triton", "cuda") else "eager"


def comparisons() -> list[Comparison]:
    """Every form at every size; the unfactored tensor and concatenation at one size each."""
    dtypes = ("bfloat16", "float32") if DEVICE.type == "cuda" else ("float32",)
    made = [
        fusion_comparison(form, name, size, dtype)
        for dtype in dtypes
        for form in FORMS
        for name, size in SIZES.items()
    ]
    made += [fusion_comparison("dense", "short", SHORT, dtype) for dtype in dtypes]
    made += [fusion_comparison("concat", "paper", SIZES["paper"], dtype) for dtype in dtypes]
    return made


def fusion_comparison(form: str, name: str, size: dict, dtype: str = "float32") -> Comparison:
    """One form at one size; on a CPU the slow peers only at the paper's and the streaming size."""
    variants = [PUBLISHED]
    factored = form in FORMS
    every_peer = DEVICE.type == "cuda" or name in ("paper", "stream")
    if factored and every_peer:
        variants += [COMPILED]
    variants += [REWRITTEN]
    if COMPILED in variants:
        variants += [COMPILED_REWRITTEN]
    if HAVE_TENSORLY and form in TENSORLY_FORMS and dtype == "float32" and every_peer:
        variants += ["tensorly"]
    if factored:
        variants += fused_kernels()
    build = functools.partial(build_fusion, form, tuple(variants), dtype=dtype, **size)
    described = {k: v for k, v in size.items() if k != "dims"} | {"views": len(size["dims"])}
    return Comparison(
        "fusion",
        f"{form}, {name}",
        tuple(variants),
        build,
        DEVICE,
        dtype,
        tolerance=2e-4 if dtype == "float32" else 3e-2,
        size=described,
    )


def build_fusion(
    form: str,
    variants: tuple[str, ...],
    *,
    clips: int,
    frames: int,
    dims: tuple[int, ...],
    outputs: int,
    rank: int,
    dtype: str = "float32",
) -> Workload:
    """Views, parameters and the variants on them. The first view has frames, the others do not."""
    torch.manual_seed(0)
    ranks = None if rank == 128 else (rank,) * (1 + len(dims))
    layer = make_fusion(form, dims, outputs, rank=rank, ranks=ranks)
    views = [torch.randn(clips, frames, dims[0]), *(torch.randn(clips, d).tanh() for d in dims[1:])]
    target = {"device": DEVICE, "dtype": getattr(torch, dtype)}
    layer.to(**target)
    views = [view.to(**target).requires_grad_() for view in views]
    leaves = [*views, *layer.parameters()]
    width = sum(dims) if form == "concat" else outputs
    grad = torch.randn(clips, frames, width).to(**target)
    subjects = {name: Operator(_function(name, layer, views), leaves, grad) for name in variants}

    def oracle() -> dict[str, list[Tensor]]:
        exact = make_fusion(form, dims, outputs, rank=rank, ranks=ranks).to(DEVICE, torch.float64)
        exact.load_state_dict(layer.state_dict())
        exact_views = [view.detach().double().requires_grad_() for view in views]
        function = functools.partial(published_fusion, exact, exact_views, None)
        return Operator(function, [*exact_views, *exact.parameters()], grad.double()).results()

    return Workload(subjects, oracle)


def _function(variant: str, layer: nn.Module, views: list[Tensor]) -> Callable[[], Tensor]:
    def with_kernels(kernels: str) -> nn.Module:
        own = copy.copy(layer)  # the same parameters
        own.kernels = kernels
        return own

    if variant == PUBLISHED:
        return functools.partial(published_fusion, layer, views, None)
    if variant == COMPILED:
        compiled = torch.compile(published_fusion, dynamic=False)
        return functools.partial(compiled, layer, views, None)
    if variant == REWRITTEN:
        return functools.partial(with_kernels("eager"), views)
    if variant == COMPILED_REWRITTEN:
        return functools.partial(torch.compile(with_kernels("eager"), dynamic=False), views)
    if variant == "tensorly":
        return functools.partial(tensorly_fusion, views, layer)
    return functools.partial(with_kernels(variant), views)


def test_fusion(comparison: Comparison, run: str, variant: str, replay) -> None:
    replay(comparison, run, variant, seconds=0.2)
