"""What is counted is right, and the committed table of it is true.

After a change to a kernel, renew the table and the page made from it (ten minutes of a core):

    python -m polyfusion.kernels.triton.count tests/library/counted_kernels.json docs/kernels.md
"""

from math import ceil
from pathlib import Path

import pytest
import torch
import triton

from polyfusion.kernels.triton.compile.gate import sources_digest
from polyfusion.kernels.triton.count import host, page, table
from polyfusion.kernels.triton.count.__main__ import compile_elsewhere
from polyfusion.kernels.triton.count.calls import CALLS
from polyfusion.kernels.triton.count.compiled import resident, widths
from polyfusion.kernels.triton.count.traffic import count, find_operands
from polyfusion.kernels.triton.matmul import Product, multiply

TABLE = Path(__file__).with_name("counted_kernels.json")
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
#: Calls that are counted again here, one of each operator; all of them take minutes.
SAMPLE = (
    "cp forward",
    "cmf-sr backward",
    "tucker forward",
    "norm 128 32x24 skip backward",
    "final forward",
    "conv 1024 4x3 weight grad",
)
RENEW = "renew tests/library/counted_kernels.json (see the top of this file)"

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counted in the interpreter")


def test_bytes_and_flops_of_a_product():
    """A tile of the result reads its rows of a and its columns of b, and the edges are masked."""
    m, n, k = 96, 48, 80
    a, b, out = (torch.empty(*size, dtype=torch.bfloat16) for size in ((m, k), (k, n), (m, n)))
    (launch,) = count(lambda: multiply([Product(out, a, b)]))
    tile = launch.config
    down, across, steps = (
        ceil(size / tile[f"BLOCK_{x}"]) for x, size in (("M", m), ("N", n), ("K", k))
    )
    assert (down, across, steps) == (2, 2, 2), "the sizes do not try the edges of the tiles"
    found = {x.name: (x.size, x.loaded, x.stored) for x in launch.operands}
    assert found["lefts[0]"] == (2 * m * k, 2 * m * k * across, 0)
    assert found["rights[0]"] == (2 * k * n, 2 * k * n * down, 0)
    assert found["outs[0]"] == (2 * m * n, 0, 2 * m * n)
    assert launch.requested == 2 * (m * k * across + k * n * down + m * n)
    assert launch.compulsory == 2 * (m * k + k * n + m * n)
    padded = down * across * steps * tile["BLOCK_M"] * tile["BLOCK_N"] * tile["BLOCK_K"]
    assert launch.flops == 2 * padded
    assert launch.programs == launch.counted == down * across


def test_counting_leaves_the_interpreter_as_it_was():
    a, b = torch.randn(20, 30), torch.randn(30, 40)
    with pytest.raises(ZeroDivisionError):
        count(lambda: 1 // 0)
    out = torch.empty(20, 40)
    multiply([Product(out, a, b)])
    torch.testing.assert_close(out, a @ b)


def test_a_sample_of_programs_stands_for_all():
    a, b, out = (torch.empty(256, 256, dtype=torch.bfloat16) for _ in range(3))
    (every,) = count(lambda: multiply([Product(out, a, b)]))
    (sample,) = count(lambda: multiply([Product(out, a, b)]), step=8)
    assert sample.counted == every.programs / 8 == 4
    assert (sample.requested, sample.flops) == (every.requested, every.flops)


def test_operands_that_overlap_are_one():
    x, y = torch.empty(10, 8), torch.empty(3)
    operands = find_operands(["x", "part", "y", "n"], (x, (x[2:5].mT, x[:, :0]), y, 7))
    assert {o.name: o.size for o in operands} == {"x": 320, "y": 12}


def test_widths_of_instructions():
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.b16 { %rs1 }, [ %rd2 + 0 ];
        @%p2 st.global.v2.b64 [ %rd3 + 0 ], { %rd4, %rd5 };
        st.global.b8 [ %rd3 + 0 ], { %rs4 };
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 + 0 ];
        cp.async.cg.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x10, %r6;
        cp.async.ca.shared.global [ %r5 + 0 ], [ %rd6 + 0 ], 0x4, %r6;
        cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [ %r1 ], [ %rd1 ], [ %r2 ];
    """
    assert widths(ptx) == {
        "loads": {"16": 1, "2": 1},
        "stores": {"16": 1, "1": 1},
        "copies": {"16": 1, "4": 1, "tma": 1},
    }


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(255, 0, 8, 1), (128, 36864, 4, 4), (32, 0, 4, 16), (32, 100 * 1024, 4, 2), (16, 0, 1, 32)],
)
def test_resident_programs(registers, shared, warps, expected):
    assert resident(registers, shared, warps) == expected


def test_committed_launches_are_true():
    """Kernels, configurations and grids of every call, and the launches PyTorch adds."""
    kept = table.read(TABLE)
    assert kept["operators"] == [table.operator_row(*item) for item in CALLS.items()], RENEW
    launched = [
        [name, launch.kernel, launch.config, list(launch.grid)]
        for name, call in CALLS.items()
        for launch in count(lambda call=call: call.run(*call.arguments), step=10**9)
    ]
    columns = ("call", "kernel", "config", "grid")
    assert [[row[x] for x in columns] for row in kept["launches"]] == launched, RENEW


def check_compiled(names):
    versions = table.read(TABLE)["compiled"]
    if triton.__version__ not in versions:
        pytest.skip(f"the table is of triton {', '.join(versions)}, this is {triton.__version__}")
    kept = [row for row in versions[triton.__version__] if row["call"] in names]
    assert kept == compile_elsewhere(names), RENEW


def test_committed_counts_are_of_these_sources():
    assert table.read(TABLE)["sources"] == sources_digest(), RENEW


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_committed_counts_are_true(name):
    assert name in CALLS
    kept = [row for row in table.read(TABLE)["launches"] if row["call"] == name]
    assert kept == table.launch_rows(name, CALLS[name]), RENEW


@pytest.mark.slow
def test_what_the_compiler_made_is_true():
    check_compiled(list(CALLS))


def test_the_host_is_soon_done():
    """On one core: at most 40 µs of Python before a launch, and 60 µs with what autograd keeps."""
    rows = table.read(TABLE)["host"]["rows"]
    assert [row["fusion"] for row in rows] == ["cp", "cmf", "cmf-sr", "tucker"]
    for row in rows:
        assert row["fused"][0] <= 40, row
        assert row["fused"][1] <= 60, row
    for row in host.measure(repetitions=2 * host.ROUNDS):  # on any machine, busy or not
        for fused, eager in zip(row["fused"], row["eager"], strict=True):
            assert fused < 3 * eager, row


def test_page_is_of_the_table():
    if not PAGE.parent.is_dir():
        pytest.skip("the documentation is not in a source distribution")
    assert PAGE.read_text() == page.render(table.read(TABLE)), RENEW
