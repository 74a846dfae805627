"""Compile every shipped kernel for capabilities 80, 90 and 100 and print the table as JSON.

python -m polyfusion.kernels > tests/compiled_kernels.json
python -m polyfusion.kernels cp_bfloat16          only the calls whose names begin like this
"""

import json
import os
import sys


def main(prefixes: list[str]) -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    if "triton" in sys.modules:
        raise SystemExit(
            "Triton is imported already, perhaps interpreted: run with TRITON_INTERPRET=0"
        )
    import triton

    from polyfusion.kernels import compile

    rows = {}
    for capability in compile.SHARED_LIMIT:
        rows[capability] = compile.compile_shipped(capability, prefixes)
    print(json.dumps({"triton": triton.__version__, "kernels": rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
