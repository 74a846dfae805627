"""Compile every shipped kernel for capabilities 80, 90 and 100 and print the table as JSON.

TRITON_INTERPRET=0 python -m polyfusion.kernels.triton.compile > tests/library/compiled_kernels.json
"""

import json
import sys

import triton

from polyfusion.dispatch import interpreted
from polyfusion.kernels.triton.compile.gate import COLUMNS, compile_shipped


def main(prefixes: tuple[str, ...]) -> None:
    if interpreted():
        raise SystemExit("Triton interprets its kernels here: set TRITON_INTERPRET=0")
    rows = ",\n".join(json.dumps(row) for row in compile_shipped(prefixes))
    about = json.dumps({"triton": triton.__version__, "columns": COLUMNS})
    print(f'{about[:-1]}, "kernels": [\n{rows}\n]}}')


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
