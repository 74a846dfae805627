"""The machine: what it is, and how fast a matrix product and a copy are on it."""

import contextlib
import functools
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polyfusion


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise(device: torch.device) -> None:
    """Wait for all work on the device; a CPU has none pending."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """The same switches for every form: float32 is float32, and cuDNN tries its algorithms.

    PyTorch has a switch for products and one for convolutions, and the latter begins with TF32: as
    they are, one form would have its products in the one and another in the other.
    """
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    tries = torch.backends.cudnn.benchmark
    for switch in switches:
        switch.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tries
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """Empty caches of compiled kernels, so that a first call takes what it takes anyone."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {name: str(Path(folder) / name.lower()) for name in names}
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@functools.cache
def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions and measured ceilings: the circumstances of every result of this run."""
    on_gpu = device.type == "cuda"
    threads = torch.get_num_threads()
    cpu = f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "kind": device.type,
        "processor": processor(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "tensorly": _version("tensorly"),
        "polyfusion": polyfusion.__version__,
        "ceilings": ceilings(device),
    }


#: FLOP/s below which a product in bf16 is left at a small size.
SLOW_PRODUCT = 2e10


def ceilings(device: torch.device) -> dict[str, float]:
    """FLOP/s of a square matrix product per dtype, B/s of a copy; the best of several runs."""
    on_gpu = device.type == "cuda"
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        best = _product_flops(8192, dtype, device) if on_gpu else 0.0
        for n in () if on_gpu else (256, 1024):
            best = max(best, _product_flops(n, dtype, device))
            if dtype == torch.bfloat16 and best < SLOW_PRODUCT:
                break  # a processor without this arithmetic needs seconds at 1024
        found[str(dtype).removeprefix("torch.")] = best
    source = torch.empty((1 << 30 if on_gpu else 1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    found["copy"] = 2 * source.numel() / _best_seconds(device)(copy)
    return found


def _product_flops(n: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest product of two (n, n) matrices that there is here."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    ways: list[Callable[[], Any]] = [functools.partial(torch.mm, a, b)]
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways.append(functools.partial(_onednn, a, b))  # MKL is slow on AMD processors
    seconds = []
    for way in ways:
        with contextlib.suppress(RuntimeError):  # oneDNN has no bf16 for every processor
            seconds.append(_best_seconds(device)(way))
    return 2 * n**3 / min(seconds)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _best_seconds(device: torch.device, rounds: int = 8) -> Callable[[Callable], float]:
    def best(call: Callable) -> float:
        call()
        seconds = []
        for _ in range(rounds):
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    return best


def _version(module: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return None
