"""What the compiler made of a launch: registers, memory, and how wide its instructions are."""

import math
import re
from collections import Counter
from typing import Any

from polyfusion.kernels.triton.compile.gate import COLUMNS, compile_launches, describe
from polyfusion.kernels.triton.count.calls import Call

REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 228 * 1024, 64, 32  # of a multiprocessor of an H100
RESERVED = 1024  # bytes of shared memory the system takes for each program
_PTX = (
    ("loads", re.compile(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b")),
    ("stores", re.compile(r"\bst\.global[\w.:]*?(?:\.v(\d))?\.[busf](\d+)\b")),
)
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[^,]*,[^,]*, 0x([0-9a-f]+)")
_TMA = re.compile(r"\bcp\.async\.bulk\.tensor")


def compile_call(call: Call, capability: int = 90) -> list[dict[str, Any]]:
    """Kernel, config and what came out, for each launch of a call; see :func:`look`."""
    launches = compile_launches(lambda: call.run(*call.arguments), capability)
    return [
        {"kernel": name, "config": config, **look(kernel, config["num_warps"])}
        for name, config, kernel in launches
    ]


def look(kernel: Any, warps: int) -> dict[str, Any]:
    """What of a compiled kernel decides how fast it can be.

    Registers, stack, shared memory and matrix instruction; ``per_sm``, the programs that are
    resident on a multiprocessor of an H100; and how many instructions load, store and copy
    asynchronously to shared memory how many bytes: {"16": 3, "2": 8}, TMA's under "tma".
    """
    found: dict[str, Any] = dict(zip(COLUMNS, describe(kernel), strict=True))
    found["per_sm"] = resident(found["registers"], found["shared"], warps)
    return {**found, **widths(kernel.asm["ptx"])}


def resident(registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor of an H100 holds at a time."""
    per_warp = math.ceil(registers * 32 / 256) * 256  # they are given out by 256
    limits = (REGISTERS // (per_warp * warps), SHARED // (shared + RESERVED), WARPS // warps)
    return min(*limits, PROGRAMS)


def widths(ptx: str) -> dict[str, dict[str, int]]:
    """How many instructions of PTX load, store and copy how many bytes of global memory a lane."""
    found = {
        name: Counter(int(vector or 1) * int(bits) // 8 for vector, bits in pattern.findall(ptx))
        for name, pattern in _PTX
    }
    copies = Counter(int(size, 16) for size in _COPY.findall(ptx))
    shown = {
        name: {str(width): counter[width] for width in sorted(counter, reverse=True)}
        for name, counter in (*found.items(), ("copies", copies))
    }
    tma = len(_TMA.findall(ptx))
    if tma:
        shown["copies"]["tma"] = tma
    return shown
