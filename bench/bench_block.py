"""The generator's blocks and the normalise-activate operator against plain modules."""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from bench.bench_fusion import choose_kernels, fused_kernels
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
from bench.rewritten import SharedSkipConv, SharedSkipNorm
from bench.straightforward import PlainFinal, PlainFirst, PlainNorm, PlainSkipConv, PlainUpConv
from polyfusion.nn import FinalBlock, FirstBlock, NormActivation, SkipConvBlock, UpConvBlock
from train.device import lay_out

DEVICE = pick_device()
ON_GPU = DEVICE.type == "cuda"
CLIPS, FRAMES = (16, 75) if ON_GPU else (1, 25)
#: ReLUs whose argument is 0 up to rounding alone give √1e-6 in the gradients.
TOLERANCE = {"float32": 5e-3, "bfloat16": 1e-1}
MAPS = {1024: (4, 3), 512: (8, 6), 256: (16, 12), 128: (32, 24)}


class PlainSkipNorm(PlainNorm):
    """u + s stored, batch normalisation, activation."""

    def forward(self, u: Tensor, s: Tensor) -> Tensor:
        return super().forward(u + s.repeat_interleave(u.shape[0] // s.shape[0], 0))


#: The plain form of what is rewritten, on a GPU: elsewhere rewriting changes nothing.
SHARED: dict[type[nn.Module], type[nn.Module]] = {
    PlainSkipConv: SharedSkipConv,
    PlainSkipNorm: SharedSkipNorm,
}
#: Our block, its plain form, the shapes of its inputs (None stands for B·T, "B" for B).
Block = tuple[Callable[[], nn.Module], type[nn.Module], Sequence[tuple]]


def skip_conv(c: int, h: int, w: int) -> Block:
    """The skip convolution block on a map of this size."""
    shapes = [(None, c, h, w), ("B", c, h, w)]
    return functools.partial(SkipConvBlock, c), PlainSkipConv, shapes


BLOCKS: dict[str, Block] = {
    "first 394 → 1024·4·3": (lambda: FirstBlock(394, 1024), PlainFirst, [(None, 394)]),
    **{f"skip conv {c}, {h}×{w}": skip_conv(c, h, w) for c, (h, w) in MAPS.items()},
    **{
        f"up conv {c} → {c // 2}, {h}×{w}": (
            functools.partial(UpConvBlock, c, c // 2),
            PlainUpConv,
            [(None, c, h, w)],
        )
        for c, (h, w) in MAPS.items()
    },
    "final 64 → 3, 64×48": (lambda: FinalBlock(64), PlainFinal, [(None, 64, 64, 48)]),
    "norm of u + s, 256, 16×12": (
        lambda: NormActivation(256),
        PlainSkipNorm,
        [(None, 256, 16, 12), ("B", 256, 16, 12)],
    ),
    "norm, slope 0.2, 256, 16×12": (
        lambda: NormActivation(256, slope=0.2),
        PlainNorm,
        [(None, 256, 16, 12)],
    ),
}
#: The blocks of the generator; the rest are the discriminators'.
GENERATOR = [block for name, block in BLOCKS.items() if "slope" not in name]


def comparisons() -> list[Comparison]:
    """Every block; on a CPU ``torch.compile`` only where the rewriting is (skips and norms)."""
    dtypes = ("bfloat16", "float32") if ON_GPU else ("float32",)
    return [block_comparison(name, dtype) for dtype in dtypes for name in BLOCKS]


def block_comparison(name: str, dtype: str = "float32") -> Comparison:
    compiled = ON_GPU or "skip" in name or "norm" in name
    variants = [PUBLISHED, *([COMPILED] if compiled else [])]
    if not ON_GPU or BLOCKS[name][1] in SHARED:
        variants += [REWRITTEN, *([COMPILED_REWRITTEN] if compiled else [])]
    variants += fused_kernels()
    return Comparison(
        "block",
        name,
        tuple(variants),
        functools.partial(build_block, BLOCKS[name], tuple(variants), CLIPS, FRAMES, dtype),
        DEVICE,
        dtype,
        tolerance=TOLERANCE[dtype],
        size={"clips": CLIPS, "frames": FRAMES},
    )


def build_block(
    kind: Block, variants: tuple[str, ...], clips: int, frames: int, dtype: str = "float32"
) -> Workload:
    """A block in training mode. bf16 runs under autocast, on fp32 parameters and bf16 maps.

    Each form has the maps in the memory format that the network around it makes them in: channels
    last on a GPU, and on a CPU in our generator; elsewhere as PyTorch's convolutions leave them.
    """
    torch.manual_seed(0)
    make, plain, shapes = kind
    block = make().to(DEVICE)
    sizes = {None: clips * frames, "B": clips}
    target = {"device": DEVICE, "dtype": getattr(torch, dtype)}
    inputs = [torch.randn(sizes[first], *rest).relu().to(**target) for first, *rest in shapes]
    plain_block = plain(block).to(DEVICE)
    reference = copy.deepcopy(plain_block).double()
    lay_out(plain_block, DEVICE)
    with torch.no_grad():
        result = plain_block(*(x.float() for x in inputs))
    grad = torch.randn(result.shape).to(**target)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def subject(variant: str) -> Operator:
        if variant in (PUBLISHED, COMPILED):
            module = plain_block
        elif ON_GPU and variant in (REWRITTEN, COMPILED_REWRITTEN):
            module = SHARED[plain](block).to(DEVICE)
            lay_out(module, DEVICE)
        else:
            module = copy.deepcopy(block)
            choose_kernels(module, variant)
        call = torch.compile(module, dynamic=False) if variant.startswith("compile") else module
        last = ON_GPU or (kind in GENERATOR and module is not plain_block)
        *maps, maps_grad = [maps_last(x) if last else x for x in (*inputs, grad)]
        leaves = [x.detach().requires_grad_() for x in maps]

        def function() -> Tensor:
            with autocast:
                return call(*leaves).to(grad.dtype)

        return Operator(function, [*leaves, *module.parameters()], maps_grad, compared=len(leaves))

    def oracle() -> dict[str, list[Tensor]]:
        exact = [x.double().requires_grad_() for x in inputs]
        leaves = [*exact, *reference.parameters()]
        function = functools.partial(reference, *exact)
        return Operator(function, leaves, grad.double(), compared=len(inputs)).results()

    return Workload({name: subject(name) for name in variants}, oracle)


def maps_last(x: Tensor) -> Tensor:
    """A map with its channels last in memory; anything else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def test_block(comparison: Comparison, run: str, variant: str, replay) -> None:
    replay(comparison, run, variant, seconds=0.3)
