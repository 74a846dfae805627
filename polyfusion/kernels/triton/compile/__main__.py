"""Compile every shipped kernel for capabilities 80, 90 and 100 and print the table as JSON.

TRITON_INTERPRET=0 python -m polyfusion.kernels.triton.compile > tests/library/compiled_kernels.json

Names of calls, or how they begin, compile those alone; --sample compiles one call in four, the
first configurations for one of the capabilities, which takes half a minute of the ten.
"""

import argparse
import json

import triton

from polyfusion.dispatch import interpreted
from polyfusion.kernels.triton.compile.gate import COLUMNS, compile_shipped, sources_digest


def main(prefixes: tuple[str, ...], sample: bool) -> None:
    if interpreted():
        raise SystemExit("Triton interprets its kernels here: set TRITON_INTERPRET=0")
    rows = ",\n".join(json.dumps(row) for row in compile_shipped(prefixes, sample=sample))
    about = json.dumps(
        {"triton": triton.__version__, "sources": sources_digest(), "columns": COLUMNS}
    )
    print(f'{about[:-1]}, "kernels": [\n{rows}\n]}}')


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calls", nargs="*", help="calls to compile (default: all)")
    parser.add_argument("--sample", action="store_true", help="one call in four")
    arguments = parser.parse_args()
    main(tuple(arguments.calls), arguments.sample)
