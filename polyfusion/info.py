"""Say what runs where on this machine, in which configuration, and why.

python -m polyfusion.info
"""

import inspect
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from polyfusion import __version__, ops
from polyfusion.dispatch import (
    cuda_problem,
    interpreted,
    resolve,
    triton_problem,
    why_eager,
)
from polyfusion.ops.conv import conv_method

# Those of polyfusion.dispatch, in the order in which people look for them.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPERATORS = [x for x in ops.__all__ if x.endswith(("_fusion", "_activation", "_block"))]
# An operator that has fused kernels takes ``kernels``.
FUSED = [x for x in OPERATORS if "kernels" in inspect.signature(getattr(ops, x)).parameters]
EAGER_ONLY = [x for x in OPERATORS if x not in FUSED]
# The published generator: channels, and the size of the maps of its stages, coarsest first.
STAGES = ((1024, 4, 3), (512, 8, 6), (256, 16, 12), (128, 32, 24))
METHODS = {
    "taps": "one matrix product per tap: few pixels of many channels",
    "library": "PyTorch's convolution",
}


def lines() -> list[str]:
    """The report, line by line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = [torch.empty(1, dtype=dtype, device=device) for dtype in DTYPES]
    report = [
        f"polyfusion {__version__}, torch {torch.__version__}, triton {_version('triton')}, "
        f"Python {platform.python_version()}",
        *_devices(),
        f"kernels='triton': {triton_problem() or _triton_mode()}",
        f"kernels='cuda': {cuda_problem() or 'available'}",
        "",
        "kernels='auto' means, by dtype:",
        " " * 26 + "".join(f"{str(dtype).removeprefix('torch.'):<10}" for dtype in DTYPES),
    ]
    for operator in FUSED:
        chosen = [resolve("auto", [example]) for example in examples]
        report.append(f"  {operator:<24}" + "".join(f"{name:<10}" for name in chosen).rstrip())
    for operator in EAGER_ONLY:
        report.append(f"  {operator:<24}eager     in every dtype: it has no fused kernels")
    reasons: dict[str, list[str]] = {}
    for example in examples:
        reason = why_eager(example) or "these kernels serve every operator on a GPU"
        reasons.setdefault(reason, []).append(str(example.dtype).removeprefix("torch."))
    report += ["Why:", *(f"  {', '.join(names)}: {why}" for why, names in reasons.items())]
    report += ["", *_convolutions(examples[0])]
    if triton_problem() is None:
        report += ["", *_configurations(device)]
    return report


def _convolutions(like: torch.Tensor) -> Iterator[str]:
    """How the blocks convolve at the paper's sizes."""
    kernels = resolve("auto", [like])
    around = "Triton's statistics and apply" if kernels == "triton" else "PyTorch's normalisation"
    yield f"Convolutions of the generator at the paper's sizes, float32, with {around}:"
    for channels, height, width in STAGES:
        weight = like.expand(channels, channels, 3, 3)
        methods = [
            conv_method(height * width, weight, None, kernels),
            conv_method(height * width, weight[:, : channels // 2], None, kernels),
        ]
        for operator, method in zip(("skip_conv_block", "up_conv_block"), methods, strict=True):
            size = f"{channels} channels on {height}×{width}"
            yield f"  {operator:<17}{size:<25}{method:<9}{METHODS[method]}"
    final = "triton" if kernels == "triton" else "library"
    yield f"  {'final_block':<17}{'64 channels on 64×48':<25}{final:<9}" + (
        "one kernel with tanh" if final == "triton" else METHODS["library"]
    )
    yield "  The implicit GEMM in Triton is never chosen unasked: conv='own' with kernels='triton'."


def _configurations(device: str) -> Iterator[str]:
    """The launches of every operator's Triton kernels, and what was chosen for each."""
    from polyfusion.kernels.triton import common, tune
    from polyfusion.kernels.triton.compile import block, fusion  # noqa: F401  (they fill SHIPPED)
    from polyfusion.kernels.triton.compile.shipped import SHIPPED

    yield "Triton configurations, bfloat16, the sizes of polyfusion.kernels.triton.compile:"
    if common.capability(torch.empty(0, device=device)) is None:
        yield "  the interpreter has one of each: tiles as large as possible; nothing to tune"
    elif tune.enabled():
        yield f"  the first use of a size measures what fits best; kept in {tune.cache_file()}"
    else:
        yield "  POLYFUSION_AUTOTUNE=0: always the first candidate"
    for shipped in SHIPPED.values():
        if not shipped.operators:
            continue
        with torch.device(device), tune.record() as launches, common.dry():
            shipped.call()
        yield f"  {', '.join(shipped.operators)}"
        unique = {(x.name, str(tile)): (x, tile) for x, tile in launches}
        for options, tile in unique.values():
            chosen = words(tile or options.tiles[0])
            others = (
                f"default of {len(options.tiles)}" if len(options.tiles) > 1 else "the only one"
            )
            yield f"    {options.name:<20}{chosen:<52}{'tuned' if tile else others}"


def words(tile: dict[str, int]) -> str:
    """A configuration in short: ``t=64 m=64 num_warps=4``."""
    return " ".join(f"{key.removeprefix('BLOCK_').lower()}={v}" for key, v in tile.items())


def _devices() -> list[str]:
    if not torch.cuda.is_available():
        return [f"CPU with {torch.get_num_threads()} threads, no CUDA device"]
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"cuda:{index} {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def _triton_mode() -> str:
    return "available, in the CPU interpreter (slow)" if interpreted() else "available"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    print("\n".join(lines()))
