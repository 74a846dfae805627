"""A launch is planned once for what looks alike, and anew for everything it depends on."""

import pytest
import torch
import triton.language as tl

from polyfusion.kernels.layout import Norm
from polyfusion.kernels.triton import common, hadamard, matmul, norm, tucker
from polyfusion.kernels.triton.matmul import Product, multiply

MODULES = (hadamard, matmul, norm, tucker)


@pytest.fixture
def launched(monkeypatch):
    """Arguments and constants of the launches that would follow on a GPU; nothing is launched."""
    launches = []

    def note(kernel, grid, *arguments, **constants):
        launches.append((grid, arguments, constants))

    for module in MODULES:
        monkeypatch.setattr(module, "launch", note)
    with common.pretend(90):
        yield launches


def draw(dtype=torch.float32, frames=6):
    make = [(2, frames, 5), (2, 3), (6, 7), (4, 7), (9, 7)]
    view, still, *weights = (torch.zeros(shape, dtype=dtype) for shape in make)
    return [view, still], weights[:2], weights[2]


def cp(dtype=torch.float32, frames=6):
    views, factors, out = draw(dtype, frames)
    hadamard.cp_forward(views, factors, out, None)
    grad = torch.zeros(2, frames, 9, dtype=dtype)
    hadamard.cp_backward(grad, views, factors, out, [True] * 5)


def tucker_call(dtype=torch.float32, frames=6):
    views, (first, second), _ = draw(dtype, frames)
    core, out = torch.zeros(4, 7, 7, dtype=dtype), torch.zeros(9, 4, dtype=dtype)
    tucker.tucker_forward(views, core, [first, second], out, None)
    grad = torch.zeros(2, frames, 9, dtype=dtype)
    tucker.tucker_backward(grad, views, core, [first, second], out, [True] * 6)


def settings(launches):
    return {(x["COMPUTE"], x["ACC"], x["PRECISION"]) for *_, x in launches}


@pytest.mark.parametrize("call", [cp, tucker_call])
def test_precision_and_dtype(call, launched, fp32_precision):
    for precision in ("ieee", "tf32", "ieee"):
        fp32_precision(precision, "tf32" if precision == "ieee" else "ieee")
        launched.clear()
        call()
        assert settings(launched) == {(tl.float32, tl.float32, precision)}
    for dtype, name, total in (
        (torch.bfloat16, tl.bfloat16, tl.float32),
        (torch.float64, tl.float64, tl.float64),
    ):
        launched.clear()
        call(dtype)
        assert settings(launched) == {(name, total, "ieee")}


@pytest.mark.parametrize("call", [cp, tucker_call])
def test_other_frames(call, launched):
    call(frames=6)
    grids = [grid for grid, *_ in launched]
    launched.clear()
    call(frames=600)
    assert [grid for grid, *_ in launched] != grids


def test_products_by_strides_and_by_operands(launched, fp32_precision):
    """A half precision result of float32 operands follows the switch as well."""
    a, b, out = torch.zeros(6, 4), torch.zeros(4, 5), torch.zeros(6, 5, dtype=torch.bfloat16)
    tables = []
    for left in (a, a.mT.contiguous().mT, a):
        multiply([Product(out, left, b)])
        tables.append([x for x in launched[-1][1] if not isinstance(x[0], torch.Tensor)])
    assert tables[0] == tables[2] != tables[1]
    for precision in ("ieee", "tf32"):
        fp32_precision(precision)
        multiply([Product(out, a, b)])
        assert launched[-1][2]["PRECISION"] == precision


def test_a_plan_is_made_once(launched, monkeypatch):
    cp()
    tucker_call()
    for module in (hadamard, matmul, tucker):
        monkeypatch.setattr(module, "arithmetic", None)
        monkeypatch.setattr(module, "options", None)
    cp()
    tucker_call()


@pytest.mark.parametrize("skip", [True, False])
def test_normalisation_gets_no_number_in_float32(launched, skip):
    """A float that is handed over at a launch is one of float32 to a compiled kernel."""
    u = torch.zeros(6, 5, 2, 3, dtype=torch.float64)
    s = torch.zeros(2, 5, 2, 3, dtype=torch.float64) if skip else None
    values = torch.ones(4, 5, dtype=torch.float64)
    norm.norm_forward(Norm(u, s, values[0], values[1], None, None, True, 1e-5, 0.2))
    norm.norm_backward(u, Norm(u, s, *values, True, 1e-5, 0.2))
    assert len(launched) == 3 + 2
    assert not any(isinstance(x, float) for _, arguments, _ in launched for x in arguments)
    assert {x["EPS"] for *_, x in launched if "EPS" in x} == {1e-5}
