"""Count every operator at the paper's sizes into a table, and write a page from it.

python -m polyfusion.kernels.triton.count tests/library/counted_kernels.json docs/kernels.md

That takes ten minutes of a core. What the compiler makes of the kernels is kept for each version of
Triton; --compiled renews that of the version here alone, --host how long Python is busy (a minute
on a quiet core, whose processor you name), --page the page.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import triton

from polyfusion.dispatch import interpreted
from polyfusion.kernels.triton.compile.gate import sources_digest
from polyfusion.kernels.triton.count import host, page, table
from polyfusion.kernels.triton.count.calls import CALLS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="JSON file to renew")
    parser.add_argument("markdown", type=Path, nargs="?", help="page to write")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--compiled", action="store_true", help="what the compiler makes, alone")
    only.add_argument("--host", metavar="PROCESSOR", help="microseconds of this host, so named")
    only.add_argument("--page", action="store_true", help="the page, from the table as it is")
    only.add_argument("--compile-here", nargs="*", help=argparse.SUPPRESS)  # for children
    options = parser.parse_args()
    if options.compile_here is not None:
        print(json.dumps(_compile(options.compile_here)))
        return
    kept = table.read(options.table)
    if options.host:
        kept["host"] = {"of": f"{options.host}, {_here()}", "rows": host.measure()}
    elif not options.page:
        kept["compiled"][triton.__version__] = compile_elsewhere(list(CALLS))
        if not options.compiled:
            if not interpreted():
                parser.error("Triton compiles its kernels here: unset TRITON_INTERPRET")
            kept["sources"] = sources_digest()
            kept["operators"] = [table.operator_row(*item) for item in CALLS.items()]
            kept["launches"] = [row for item in CALLS.items() for row in table.launch_rows(*item)]
    if not options.page:
        table.write(options.table, kept)
    if options.markdown:
        options.markdown.write_text(page.render(kept))


def compile_elsewhere(names: list[str]) -> list[dict[str, object]]:
    """The compiled rows of these calls, made in a process whose kernels are not interpreted."""
    command = [sys.executable, "-m", "polyfusion.kernels.triton.count", os.devnull]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [*command, "--compile-here", *names], stdout=subprocess.PIPE, env=environment, check=True
    )
    rows: list[dict[str, object]] = json.loads(done.stdout)
    return rows


def _here() -> str:
    """The versions and the day."""
    python, torch_, triton_ = platform.python_version(), torch.__version__, triton.__version__
    return f"Python {python}, torch {torch_}, triton {triton_}, {datetime.date.today()}"


def _compile(names: list[str]) -> list[dict[str, object]]:
    from polyfusion.kernels.triton.count.compiled import compile_call

    return [{"call": name, **row} for name in names for row in compile_call(CALLS[name])]


if __name__ == "__main__":
    main()
