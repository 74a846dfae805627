"""What the machine is: device, versions, tools, and two ceilings."""

import importlib.util
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bench.gpu import CARRIED, CARRY
from bench.gpu.stage import Case, Setting
from bench.machine import alike, ceilings, pick_device
from polyfusion import build, dispatch, info

TOOLS = ("nvidia-smi", "nvcc", "g++", "compute-sanitizer", "ncu")
PACKAGES = ("torch", "triton", "numpy", "tyro", "tqdm", "matplotlib", "filelock", "tensorly")


def cases(setting: Setting) -> list[Case]:
    return [
        Case("machine", _machine),
        Case("packages", _packages),
        Case("tools", _tools),
        Case("kernels", _kernels),
        *([] if setting.tiny else [Case("ceilings", _ceilings)]),
    ]


def _machine() -> list[dict[str, Any]]:
    rows = [{"what": line} for line in info._devices()]
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        rows.append({"what": f"{p.multi_processor_count} multiprocessors, L2 {p.L2_cache_size} B"})
        rows.append({"what": f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"})
    return rows


def _packages() -> list[dict[str, Any]]:
    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "here" if importlib.util.find_spec(name) else "missing"

    rows = [{"what": ", ".join(f"{name} {found(name)}" for name in PACKAGES)}]
    if any(importlib.util.find_spec(name) is None for name in CARRIED):
        rows.append({"what": f"some are missing; to carry them: `{CARRY}`"})
    return rows


def _tools() -> list[dict[str, Any]]:
    places = {tool: shutil.which(tool) for tool in TOOLS}
    places["nvcc"] = places["nvcc"] or shutil.which("/usr/local/cuda/bin/nvcc")
    rows = [{"what": ", ".join(f"{tool}: {at or 'missing'}" for tool, at in places.items())}]
    if smi := places["nvidia-smi"]:
        asked = "driver_version,memory.total,clocks.sm,clocks.mem,power.limit,mig.mode.current"
        command = [smi, f"--query-gpu={asked}", "--format=csv"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
        rows.append({"what": " | ".join((said.stdout or said.stderr).split("\n"))})
    return rows


def _kernels() -> list[dict[str, Any]]:
    device = pick_device()
    triton = dispatch.triton_problem() or "runs"
    chosen = dispatch.resolve("auto", [torch.zeros(1, device=device)])
    return [
        {"what": f"kernels='triton': {triton}"},
        {"what": f"the CUDA extension: {build.find_library() or 'not built yet'}"},
        {"what": f"kernels='auto' for float32 on {device}: {chosen}"},
    ]


def _ceilings() -> list[dict[str, Any]]:
    with alike():
        found = ceilings(pick_device())
    return [
        {"what": f"{name}: {rate / 1e9:.4g} {'GB/s' if name == 'copy' else 'GFLOP/s'}"}
        for name, rate in found.items()
    ]
