"""Every operator as a module and its inputs, at odd sizes and the paper's, and what is right.

What is right is the same module in plain PyTorch in float64, on the CPU where that is quick: the
tests hold that form against the dense oracles. Values are those that the dtype has.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.bench_block import BLOCKS, Block, skip_conv
from bench.bench_fusion import FORMS, SIZES
from bench.measure import errors_of
from polyfusion.nn import FinalBlock, FirstBlock, NormActivation, UpConvBlock, make_fusion

DTYPES = ("bfloat16", "float32", "float16", "float64")
HALF = ("bfloat16", "float16")
ODD = {"clips": 3, "frames": 35, "dims": (37, 9), "outputs": 67, "rank": 34}
ODD_FRAMES = 7
ODD_BLOCKS: dict[str, Block] = {
    "first": (lambda: FirstBlock(37, 72), FirstBlock, [(None, 37)]),
    "skip conv": skip_conv(72, 5, 7),
    "up conv": (lambda: UpConvBlock(72, 34), UpConvBlock, [(None, 72, 5, 3)]),
    "final": (lambda: FinalBlock(21), FinalBlock, [(None, 21, 9, 6)]),
    "norm of u + s": (
        lambda: NormActivation(37),
        NormActivation,
        [(None, 37, 5, 7), ("B", 37, 5, 7)],
    ),
    "norm, slope 0.2": (lambda: NormActivation(37, slope=0.2), NormActivation, [(None, 37, 5, 7)]),
}
#: Relative errors of whole tensors. A (leaky) ReLU whose argument is 0 up to rounding gives blocks
#: single gradients that differ by their whole size, which is the root of the rounding in the norm.
FUSION_TOLERANCE = {"float64": 1e-12, "float32": 2e-5, "float16": 1e-2, "bfloat16": 3e-2}
BLOCK_TOLERANCE = {"float64": 1e-6, "float32": 5e-3, "float16": 5e-2, "bfloat16": 1e-1}


@dataclass
class Problem:
    """A module in the dtype, its inputs, and the gradient of its result."""

    module: nn.Module
    inputs: list[Tensor]
    grad: Tensor
    dtype: str
    tolerance: float
    autocast: bool

    def tensors(self) -> list[Tensor]:
        return [*self.inputs, *self.module.parameters(), self.grad]

    def value(self) -> Tensor:
        """What the module makes of its inputs."""
        kind, device = getattr(torch, self.dtype), self.grad.device.type
        with torch.autocast(device, kind) if self.autocast else contextlib.nullcontext():
            y: Tensor = self.module(*self.inputs)
        return y

    def results(self, kernels: str) -> list[Tensor]:
        """The result, all gradients, and the statistics that the module keeps."""
        choose(self.module, kernels)
        leaves, y = [*self.inputs, *self.module.parameters()], self.value()
        gradients = torch.autograd.grad(y, leaves, self.grad)
        kept = [x.clone() for x in self.module.buffers() if x.is_floating_point()]
        return [y.detach(), *gradients, *kept]

    def copy(self) -> "Problem":
        """With tensors of its own; the statistics begin afresh."""
        inputs = [x.detach().clone().requires_grad_() for x in self.inputs]
        module, grad = copy.deepcopy(self.module), self.grad.clone()
        return Problem(module, inputs, grad, self.dtype, self.tolerance, self.autocast)

    def exact(self, device: str = "cpu") -> list[Tensor]:
        """The results in float64."""
        module = copy.deepcopy(self.module).to(device, torch.float64)
        inputs = [x.detach().to(device, torch.float64).requires_grad_() for x in self.inputs]
        grad = self.grad.to(device, torch.float64)
        return Problem(module, inputs, grad, "float64", 0.0, False).results("eager")

    def error(self, results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
        """The worst tensor's relative error."""
        return errors_of([x.to(e.device) for x, e in zip(results, exact, strict=True)], exact)[0]


def choose(module: nn.Module, kernels: str) -> None:
    """Let every part of ``module`` that has a choice use these kernels."""
    for part in module.modules():
        if hasattr(part, "kernels"):
            part.kernels = kernels


def problems(size: str, device: str, dtypes: Sequence[str]) -> dict[str, Any]:
    """Makers of :class:`Problem`, by name; ``size`` is "odd" or "paper"."""
    made: dict[str, Callable[[], Problem]] = {}
    blocks = ODD_BLOCKS if size == "odd" else BLOCKS
    for dtype in dtypes:
        for form in FORMS:
            made[f"{form}, {size}, {dtype}"] = lambda f=form, d=dtype: fusion(f, size, d, device)
        for name, block in blocks.items():
            made[f"{name}, {size}, {dtype}"] = lambda b=block, d=dtype: maps(b, size, d, device)
    return made


def fusion(form: str, size: str, dtype: str, device: str) -> Problem:
    """A fusion layer and two views, of which the second has no frames."""
    torch.manual_seed(0)
    at = ODD if size == "odd" else SIZES["paper"]
    clips, frames, dims, rank = at["clips"], at["frames"], at["dims"], at["rank"]
    ranks = None if rank == 128 else (rank,) * (1 + len(dims))
    layer = make_fusion(form, dims, at["outputs"], rank=rank, ranks=ranks)
    views = [torch.randn(clips, frames, dims[0]), *(torch.randn(clips, d).tanh() for d in dims[1:])]
    grad = torch.randn(clips, frames, at["outputs"])
    kind = getattr(torch, dtype)
    views = [view.to(device, kind).requires_grad_() for view in views]
    layer, grad = layer.to(device, kind), grad.to(device, kind)
    return Problem(layer, views, grad, dtype, FUSION_TOLERANCE[dtype], False)


def maps(kind: Block, size: str, dtype: str, device: str) -> Problem:
    """A block in training mode and its maps; halves run under autocast on float32 parameters."""
    torch.manual_seed(0)
    make, _, shapes = kind
    clips, frames = (3, ODD_FRAMES) if size == "odd" else (16, 75)
    counts, half = {None: clips * frames, "B": clips}, dtype in HALF
    to = getattr(torch, dtype)
    module = make()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(to).to(torch.float32 if half else to)
    module.to(device, torch.float32 if half else to)
    inputs = [torch.randn(counts[first], *rest, device=device) for first, *rest in shapes]
    inputs = [_maps_last(x.relu().to(to)).requires_grad_() for x in inputs]
    with torch.no_grad():
        choose(module, "eager")
        result = copy.deepcopy(module).float()(*(x.float() for x in inputs))
    grad = _maps_last(torch.randn_like(result).to(to))
    return Problem(module, inputs, grad, dtype, BLOCK_TOLERANCE[dtype], half)


def _maps_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
