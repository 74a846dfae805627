"""Products by oneDNN and by MKL: values and gradients of first and second order, any strides."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from polyfusion.kernels.eager import product
from tests.library.helpers import FORMS, TOLERANCE, make_problem, relative_error

GATE = pytest.mark.skipif(not product._available(), reason="PyTorch was built without oneDNN")


@pytest.fixture(autouse=True, params=["onednn", "mkl"])
def library(request, monkeypatch):
    """As on either kind of processor, whichever this one is."""
    monkeypatch.setattr(product, "_mkl_is_faster", lambda: request.param == "mkl")
    return request.param


def lay_out(x, how):
    """The same matrix with other strides."""
    if how == "columns":
        return x.mT.contiguous().mT
    return x.repeat_interleave(2, -1)[..., ::2] if how == "sliced" else x


@GATE
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("left", "right"), list(itertools.product(["rows", "columns", "sliced"], repeat=2))
)
def test_gradients_of_every_order(left, right, biased, noisy, monkeypatch):
    monkeypatch.setattr(product, "_LARGE", 0)
    torch.manual_seed(0)
    x, w = lay_out(torch.randn(7, 5), left), lay_out(torch.randn(5, 3), right)
    more = {"bias": torch.randn(3)} if biased else {}
    more |= {"noise": lay_out(torch.randn(7, 2), left)} if noisy else {}
    inputs = [x, w, *more.values()]

    def differentiate(function, dtype):
        leaves = [v.detach().to(dtype).requires_grad_() for v in inputs]
        value = function(*leaves[:2], **dict(zip(more, leaves[2:], strict=True)))
        grads = torch.autograd.grad((value * value).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**3).sum() for g in grads), leaves)
        return [value, *grads, *second]

    def plain(x, w, bias=None, noise=None):
        y = F.linear(x, w.mT, bias)
        return y if noise is None else torch.cat([y, noise], -1)

    found = differentiate(product.product, torch.float32)
    for value, exactly in zip(found, differentiate(plain, torch.float64), strict=True):
        assert relative_error(value, exactly) < 2e-6


@GATE
def test_forward_mode_and_vmap(monkeypatch):
    monkeypatch.setattr(product, "_LARGE", 0)
    torch.manual_seed(0)
    x, w, bias = torch.randn(4, 7, 5), torch.randn(5, 3), torch.randn(3)
    dx, dw, dbias = (torch.randn_like(v) for v in (x, w, bias))
    with torch.autograd.forward_ad.dual_level():
        make = torch.autograd.forward_ad.make_dual
        y = product.product(make(x, dx), make(w, dw), make(bias, dbias))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert relative_error(tangent, dx @ w + x @ dw + dbias) < 2e-6
    x = x[0].mT.contiguous().mT  # whose transpose oneDNN is given
    with torch.autograd.forward_ad.dual_level():
        y = product.product(make(x, dx[0]), make(w, dw))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert relative_error(tangent, dx[0] @ w + x @ dw) < 2e-6
    noise, dnoise = torch.randn(7, 2), torch.randn(7, 2)
    for is_dual in (False, True):
        with torch.autograd.forward_ad.dual_level():
            behind = make(noise, dnoise) if is_dual else noise
            y = product.product(make(x, dx[0]), w, noise=behind)
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        expected = torch.cat([dx[0] @ w, dnoise * is_dual], 1)
        assert relative_error(tangent, expected) < 2e-6
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        y = product.product(make(x, dx[0]), w)
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    assert relative_error(tangent, dx[0] @ w) < 2e-6
    x = x.expand(4, 7, 5)
    mapped = torch.func.vmap(product.product, (0, None, None))(x, w, bias)
    assert relative_error(mapped, x @ w + bias) < 2e-6


@GATE
@pytest.mark.parametrize("left", ["rows", "columns"])
def test_hessian_products_in_place_and_strided_bias(left, monkeypatch):
    monkeypatch.setattr(product, "_LARGE", 0)
    torch.manual_seed(0)
    x, w, dx = lay_out(torch.randn(7, 5), left), torch.randn(5, 3), torch.randn(7, 5)

    def cubes(product, x, w):
        return product(x, w).pow(3).sum()

    def hessian_product(product, *values):
        x, w, dx = values
        gradient = torch.func.grad(lambda x: cubes(product, x, w))
        return torch.func.jvp(gradient, (x,), (dx,))[1]

    exactly = hessian_product(torch.matmul, x.double(), w.double(), dx.double())
    assert relative_error(hessian_product(product.product, x, w, dx), exactly) < 1e-5
    assert relative_error(product.product(x.requires_grad_(), w).mul_(2), 2 * x @ w) < 1e-6
    for bias in (torch.ones(1).expand(3), torch.randn(3, 2)[:, 0]):
        assert relative_error(product.product(x, w, bias), x @ w + bias) < 1e-6


@GATE
@pytest.mark.parametrize("form", FORMS)
def test_fusion_at_sizes_that_use_it(form, monkeypatch):
    """Value and every gradient of the eager operators, all their products by one library."""
    monkeypatch.setattr(product, "_LARGE", 0)
    problem = make_problem(form, dtype=torch.float32)
    cotangent = torch.randn(2, 3, 21)
    value, gradients = problem.expect(cotangent)
    found = [problem.fuse("eager"), *problem.gradients("eager", cotangent)]
    for one, exactly in zip(found, [value, *gradients], strict=True):
        assert relative_error(one, exactly) < TOLERANCE[torch.float32]


@GATE
def test_only_where_it_pays(monkeypatch, library):
    called, once = [], int(library == "onednn")
    original = product._linear
    monkeypatch.setattr(product, "_linear", lambda *a: called.append(1) or original(*a))
    x, w = torch.randn(128, 128), torch.randn(128, 128)
    product.product(x, w)  # 2^21 multiply-adds
    assert len(called) == once
    product.product(x[:127], w)
    product.product(x.double(), w.double())
    product.product(x.bfloat16(), w.bfloat16())
    product.product(x[:0], w)
    assert len(called) == once
