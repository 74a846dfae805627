"""Every shipped Triton kernel compiles for GPUs of capability 80, 90 and 100, without spills.

The table of what came out is kept in compiled_kernels.json; after a change to a kernel, renew it:

    TRITON_INTERPRET=0 \\
    python -m polyfusion.kernels.triton.compile > tests/library/compiled_kernels.json

That takes ten minutes of a core. The table names the sources it is of; the tests compile a sample:
of one call in four the first configurations, for one of the capabilities.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from polyfusion.kernels.triton.compile.gate import COLUMNS, SAMPLED, SHARED_LIMIT, sources_digest

TABLE = Path(__file__).with_name("compiled_kernels.json")
MATRIX_INSTRUCTION = {"80": "mma.sync", "90": "wgmma", "100": "tcgen05.mma"}
RENEW = "renew tests/library/compiled_kernels.json (see the top of this file)"
TILE = ("BLOCK_B", "BLOCK_T", "BLOCK_M", "BLOCK_N", "BLOCK_P", "BLOCK_O")  # not ranks or inputs


@pytest.fixture(scope="module")
def compiled():
    """Compile a sample in a process of its own: this one may have Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "polyfusion.kernels.triton.compile", "--sample"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def capabilities(row):
    return row.keys() - {"call", "kernel", "config"}


def most_registers(warps):
    """The most registers a thread can have, in steps of 8, that 2, 3, ... programs fit with."""
    return {65536 // (32 * warps * programs) // 8 * 8 for programs in range(2, 17)}


def check(table):
    """No spills, shared memory that fits, and matrix instructions wherever a tile allows them."""
    assert tuple(table["columns"]) == COLUMNS
    for row in table["kernels"]:
        for capability in capabilities(row):
            limit = SHARED_LIMIT[int(capability)]
            found = dict(zip(COLUMNS, row[capability], strict=True))
            where = f"{row['call']} {row['kernel']} for {capability}: {row['config']} {found}"
            # ptxas spills an address or three to fit one more program on a multiprocessor.
            fitted = found["registers"] in most_registers(row["config"]["num_warps"])
            assert found["stack"] <= (24 if fitted else 0), f"spills: {where}"
            assert found["shared"] <= limit, f"shared memory: {where}"
            if found["instruction"] == "none":
                continue
            if row["call"].endswith(("float32", "float64")):
                # capability 80 has matrix instructions for doubles, in full precision
                exact = {"fma", "mma.sync"} if row["call"].endswith("float64") else {"fma"}
                assert found["instruction"] in exact, f"not full precision: {where}"
                continue
            tile = (v for k, v in row["config"].items() if k in TILE)
            allowed = {MATRIX_INSTRUCTION[capability]}
            if min(tile) < 64:
                allowed.add("mma.sync")
            assert found["instruction"] in allowed, where


def test_committed_table_passes():
    table = json.loads(TABLE.read_text())
    check(table)
    assert table["sources"] == sources_digest(), RENEW
    assert len(table["kernels"]) >= 100
    assert all(capabilities(row) == set(MATRIX_INSTRUCTION) for row in table["kernels"])


@pytest.mark.slow
def test_shipped_kernels(compiled):
    check(compiled)


@pytest.mark.slow
def test_committed_table_is_true(compiled):
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {table['triton']}, this is {triton.__version__}")
    for row in compiled["kernels"]:
        columns = {"call", "kernel", "config"} | capabilities(row)
        expected = [{key: known[key] for key in columns} for known in table["kernels"]]
        assert row in expected, RENEW
    sampled = sorted({row["call"] for row in table["kernels"]})[::SAMPLED]
    expected = {(row["call"], row["kernel"]) for row in table["kernels"] if row["call"] in sampled}
    assert {(row["call"], row["kernel"]) for row in compiled["kernels"]} == expected, RENEW
    assert set().union(*map(capabilities, compiled["kernels"])) == set(MATRIX_INSTRUCTION)
