"""Build the CUDA extension, on a CPU the same kernels as host code."""

import os
import time
from typing import Any

import torch

from bench.gpu.stage import Case, Setting, Unavailable
from polyfusion import build


def cases(setting: Setting) -> list[Case]:
    return [Case("build", lambda: _build(setting.on_gpu), seconds=590)]


def _build(on_gpu: bool) -> list[dict[str, Any]]:
    if on_gpu and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        major, minor = torch.cuda.get_device_capability()
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"  # for this device alone
    start = time.monotonic()
    try:
        path = build.build(emulated=not on_gpu)
    except build.BuildError as error:
        raise Unavailable(str(error)) from None
    return [{"library": path.name, "s": time.monotonic() - start}]
