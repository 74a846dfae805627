"""The table of what is counted: made, and kept in a file."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyfusion.kernels.triton import common
from polyfusion.kernels.triton.count.calls import Call
from polyfusion.kernels.triton.count.traffic import Launch, count

_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")


def operator_row(name: str, call: Call) -> dict[str, Any]:
    """What an operator must move, and the launches that PyTorch adds to the kernels' own.

    ``compulsory``: bytes of its operands and results, each once.
    """
    with common.pretend(90), common.dry(), _Library() as library:
        result = call.run(*call.arguments)
    moved = {x.data_ptr(): x.numel() * x.element_size() for x in _tensors((call.arguments, result))}
    return {"call": name, "compulsory": sum(moved.values()), "library": library.launched}


def launch_rows(name: str, call: Call) -> list[dict[str, Any]]:
    """What each launch of the call asks for, in bytes and FLOPs; ``operands``: size, loads, stores.

    The shares of a sample of the programs are rounded to what they are good for.
    """
    launches = count(lambda: call.run(*call.arguments), step=call.step)
    return [_row(name, launch) for launch in launches]


def _row(name: str, launch: Launch) -> dict[str, Any]:
    return {
        "call": name,
        "kernel": launch.kernel,
        "config": launch.config,
        "grid": list(launch.grid),
        "counted": launch.counted,
        "flops": round(launch.flops),
        "requested": round(launch.requested),
        "compulsory": round(launch.compulsory),
        "masked": round(launch.masked, 3),
        "operands": {
            x.name: [x.size, round(x.loaded), round(x.stored)]
            for x in sorted(launch.operands, key=lambda x: x.name)
            if x.loaded or x.stored
        },
    }


class _Library(TorchDispatchMode):
    """Note the operators of PyTorch that would launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and name not in _ALLOCATIONS:
            self.launched.append(name)
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.numel()]


def read(path: Path) -> dict[str, Any]:
    """The table in a file; an empty one if there is none."""
    if not path.exists():
        host = {"of": "", "rows": []}
        return {"sources": "", "operators": [], "launches": [], "host": host, "compiled": {}}
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def write(path: Path, table: dict[str, Any]) -> None:
    """Keep the table, a row a line, so that a change is a short diff."""
    compiled = ",\n".join(
        f"{json.dumps(version)}: {_lines(rows)}" for version, rows in table["compiled"].items()
    )
    of = table["host"]["of"]
    path.write_text(
        f'{{"about": "counted, not timed: python -m polyfusion.kernels.triton.count",\n'
        f'"sources": "{table["sources"]}",\n'
        f'"operators": {_lines(table["operators"])},\n"launches": {_lines(table["launches"])},\n'
        f'"host": {{"of": {json.dumps(of)}, "rows": {_lines(table["host"]["rows"])}}},\n'
        f'"compiled": {{{compiled}}}}}\n'
    )


def _lines(rows: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
