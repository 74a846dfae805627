"""Compile every shipped kernel for GPUs that need not be present, and say what came out.

A kernel module names calls of its launchers with :func:`shipped`. :func:`compile_shipped` makes
those calls with every launch replaced by a compilation, so what is compiled is exactly what would
run: same configuration, same specialisation. Needs ``TRITON_INTERPRET=0`` before Triton's import.
``python -m polyfusion.kernels`` prints the table.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from polyfusion.kernels import common

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per program
INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync")
SHIPPED: dict[str, Callable[[], Any]] = {}


def shipped(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Register a function that calls launchers, on CPU tensors of a size that people use."""

    def register(call: Callable[[], Any]) -> Callable[[], Any]:
        SHIPPED[name] = call
        return call

    return register


class _Target:
    """As much of a Triton driver as compilation asks for. The device number is the capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_shipped(capability: int, prefixes: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Compile the launches of the shipped calls whose names begin so, for one capability.

    Returns one row per distinct kernel: call, kernel, config, registers per thread, bytes of stack
    (where spills go) and of shared memory, and the instruction of its matrix products: "fma" if
    they do not use tensor cores, "none" if there are none.
    """
    for module in pkgutil.iter_modules(importlib.import_module("polyfusion.kernels").__path__):
        if module.name != "__main__":
            importlib.import_module(f"polyfusion.kernels.{module.name}")
    rows: list[dict[str, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        config = {k: v for k, v in kwargs.items() if k.startswith(("BLOCK_", "num_"))}
        row = {"call": name, "kernel": self.__name__, "config": config, **_describe(kernel)}
        if row not in rows:
            rows.append(row)
        return kernel

    driver.set_active(_Target(capability))
    JITFunction.run = compile_only
    try:
        with common.pretend(capability):
            for name in sorted(SHIPPED):
                if name.startswith(prefixes or ("",)):
                    SHIPPED[name]()
    finally:
        JITFunction.run = run
    return rows


def _describe(kernel: Any) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(tools / "cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    instruction = "none"
    if "tt.dot" in kernel.asm["ttir"]:
        instruction = next((x for x in INSTRUCTIONS if x in kernel.asm["ptx"]), "fma")
    return {
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": kernel.metadata.shared,
        "instruction": instruction,
    }
