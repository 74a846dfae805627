"""What runs where on this machine.

python -m polyfusion.info
"""

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from polyfusion import __version__
from polyfusion.ops._dispatch import cuda_problem, interpreted, resolve, triton_problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _hadamard_configuration(like: torch.Tensor) -> dict[str, int]:
    from polyfusion.kernels import common, hadamard

    views = [like.new_empty(16, 75, 256), like.new_empty(16, 128)]
    return hadamard.config("forward", views, 128, 384, common.arithmetic(like))


def _tucker_configuration(like: torch.Tensor) -> dict[str, int]:
    from polyfusion.kernels import common, tucker

    sizes = {"T": 75, "M": 384, "I": 192, "J": 128, "D": 256}
    return tucker.config("forward", sizes, like, common.arithmetic(like))


# Every operator with fused kernels; how its Triton kernel is configured at the paper's sizes.
FUSED: dict[str, Callable[[torch.Tensor], dict[str, int]]] = {
    "cp_fusion": _hadamard_configuration,
    "cmf_fusion": _hadamard_configuration,
    "tucker_fusion": _tucker_configuration,
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
        " " * 18 + "".join(f"{str(dtype).removeprefix('torch.'):<10}" for dtype in DTYPES),
    ]
    for operator in FUSED:
        chosen = [resolve("auto", [example]) for example in examples]
        report.append(f"  {operator:<16}" + "".join(f"{name:<10}" for name in chosen).rstrip())
    if triton_problem() is None:
        report += ["", "Triton configurations, 16 clips of 75 frames, bfloat16:"]
        for operator, configuration in FUSED.items():
            values = (f"{key.lower()}={value}" for key, value in configuration(examples[1]).items())
            report.append(f"  {operator:<16}{' '.join(values)}")
    return report


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
