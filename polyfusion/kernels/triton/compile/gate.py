"""Compile every shipped kernel, and say what came out.

:func:`compile_shipped` makes the shipped calls with every launch replaced by a compilation, so what
is compiled is exactly what would run: every configuration to choose from, same specialisation.
Needs ``TRITON_INTERPRET=0`` before Triton's import.
"""

import contextlib
import functools
import hashlib
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

from polyfusion.kernels.triton import common, tune
from polyfusion.kernels.triton.compile import block, fusion  # noqa: F401  (they ship their calls)
from polyfusion.kernels.triton.compile.shipped import SHIPPED

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per program
INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync")
SAMPLED = 4  # a sample takes one call in so many
COLUMNS = ("registers", "stack", "shared", "instruction")


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


def compile_shipped(
    prefixes: tuple[str, ...] = (), *, sample: bool = False
) -> list[dict[str, Any]]:
    """Compile the launches of the shipped calls whose names begin so, for every capability.

    A ``sample`` takes a twentieth of the time: one call in :data:`SAMPLED`, of each the first
    configurations, for one capability, in turn.

    Returns one row per distinct kernel: call, kernel, config, and per capability what the
    :data:`COLUMNS` say: registers per thread, bytes of stack (where spills go) and of shared
    memory, and the instruction of its matrix products: "fma" if they do not use tensor cores,
    "none" if there are none.
    """
    rows: list[dict[str, Any]] = []
    every = list(SHARED_LIMIT)
    calls = sorted(SHIPPED)[:: SAMPLED if sample else 1]
    for number, name in enumerate(calls):
        if name.startswith(prefixes or ("",)):
            capabilities = [every[number % len(every)]] if sample else every
            launches = {c: _compile(name, c, sample) for c in capabilities}
            for same in zip(*launches.values(), strict=True):
                kernel, config, _ = same[0]
                row = {"call": name, "kernel": kernel, "config": config}
                row |= {str(c): found for c, (*_, found) in zip(launches, same, strict=True)}
                if row not in rows:
                    rows.append(row)
    return rows


def sources_digest() -> str:
    """A name for the contents of the kernels' sources and of the shipped calls."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for source in sorted([*here.parent.glob("*.py"), *here.glob("*.py")]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(
    name: str, capability: int, sample: bool
) -> list[tuple[str, dict[str, int], list[Any]]]:
    """(kernel, config, columns) of each of a shipped call's launches."""
    shipped = SHIPPED[name]
    every = shipped.every and not sample
    launches = compile_launches(shipped.call, capability, every=every)
    return [(kernel, config, describe(compiled)) for kernel, config, compiled in launches]


def compile_launches(
    call: Callable[[], Any], capability: int, *, every: bool = False
) -> list[tuple[str, dict[str, int], Any]]:
    """(kernel, config, compiled kernel) of each launch of a call, and nothing is launched.

    ``every``: of each launch all configurations to choose from, not just the first.
    """
    launches: list[tuple[str, dict[str, int], Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append((self.__name__, configuration(kwargs), kernel))
        return kernel

    driver.set_active(_Target(capability))
    JITFunction.run = compile_only
    try:
        configurations = tune.sweep() if every else contextlib.nullcontext()
        with common.pretend(capability), configurations:
            call()
    finally:
        JITFunction.run = run
    return launches


def configuration(constants: dict[str, Any]) -> dict[str, int]:
    """A launch's tile sizes, warps and stages, out of its constants."""
    return {k: v for k, v in constants.items() if k.startswith(("BLOCK_", "num_"))}


@functools.cache
def describe(kernel: Any) -> list[Any]:
    """The :data:`COLUMNS` of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [str(tools / "cuobjdump"), "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    instruction = "none"
    if "tt.dot" in kernel.asm["ttir"]:
        instruction = next((x for x in INSTRUCTIONS if x in kernel.asm["ptx"]), "fma")
    spilled = int(found["STACK"]) + int(found["LOCAL"])
    return [int(found["REG"]), spilled, kernel.metadata.shared, instruction]
