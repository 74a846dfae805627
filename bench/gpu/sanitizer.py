"""compute-sanitizer on every operator at odd sizes: addresses out of bounds, races between threads.

python -m bench.gpu.sanitizer KERNELS     what runs under it: each operator once, nothing checked
"""

import functools
import os
import shutil
import subprocess
import sys
from typing import Any

import torch

from bench.gpu.operators import check_available
from bench.gpu.problems import problems
from bench.gpu.stage import Case, Setting, Unavailable
from bench.machine import pick_device

FOUND = 9
"""Exit code if compute-sanitizer has found something."""


def cases(setting: Setting) -> list[Case]:
    if not shutil.which("compute-sanitizer"):
        raise Unavailable("compute-sanitizer is missing (it is part of the CUDA toolkit)")
    return [
        Case(f"{tool}, {kernels}", functools.partial(check, tool, kernels), seconds=90)
        for tool in ("memcheck", "racecheck")
        for kernels in ("triton", "cuda")
    ]


def check(tool: str, kernels: str) -> list[dict[str, Any]]:
    """One row: the tool's summary."""
    check_available(kernels, "cuda")
    # memory from PyTorch's cache is part of a large allocation, in which nothing is out of bounds
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "POLYFUSION_AUTOTUNE": "0"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
    command += [sys.executable, "-m", "bench.gpu.sanitizer", kernels]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    print(done.stdout)
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    row = {"summary": said[-1].strip("= ") if said else "it said nothing"}
    if done.returncode == 0:
        return [row]
    if done.returncode != FOUND and not any("ERROR" in line or "hazard" in line for line in said):
        last = (done.stdout.strip().splitlines() or ["nothing said"])[-1][:300]
        raise Unavailable(f"compute-sanitizer ended with {done.returncode}: {last}")
    first = next((line.strip("= ") for line in said if "rror" in line or "azard" in line), "")
    return [row | {"failure": f"{first}; {row['summary']}"}]


def main(kernels: str) -> None:
    """Run every operator once."""
    device = pick_device()
    for make in problems("odd", device.type, ("bfloat16",)).values():
        make().results(kernels)
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1])
