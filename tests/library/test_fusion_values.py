"""Fused and eager operators against the dense oracle: value and every gradient."""

import itertools

import pytest
import torch

from polyfusion import ops
from polyfusion.kernels.triton import hadamard, matmul, tucker
from polyfusion.ops import reference
from tests.library.helpers import FORMS, TOLERANCE, make_problem, relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TWO = list(itertools.product((True, False), repeat=2))
THREE = [(True, False, False), (False, True, True), (True, True, True), (False, False, False)]


def check(problem, kernels):
    """Compare value and gradients with the oracle's, in the dtype of the problem."""
    dtype = problem.leaves[0].dtype
    value = problem.fuse(kernels)
    assert value.dtype == dtype
    rng = torch.Generator().manual_seed(7)
    cotangent = torch.randn(value.shape, generator=rng, dtype=torch.float64).to(dtype)
    expected, expected_gradients = problem.expect(cotangent)
    assert relative_error(value, expected) < TOLERANCE[dtype]
    gradients = problem.gradients(kernels, cotangent)
    for i, (gradient, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert relative_error(gradient, wanted) < TOLERANCE[dtype], f"gradient {i}"


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("framed", TWO + THREE, ids=lambda f: "".join("TB"[not x] for x in f))
def test_views_per_frame_and_per_clip(form, framed, kernels):
    check(make_problem(form, framed), kernels)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape",
    [{"frames": 1}, {"batch": 1}, {"noise": 0}, {"outputs": 1, "rank": 1, "sizes": (1, 1)}],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()),
)
def test_small_sizes(form, shape, kernels):
    shape = dict(shape)
    if form == "tucker" and shape.get("rank") == 1:
        shape["rank"] = 2
    check(make_problem(form, **shape), kernels)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(form, dtype, kernels):
    check(make_problem(form, dtype=dtype, sizes=(9, 7)), kernels)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("framed", [(True, False), (False, True), (True, True)])
def test_many_tiles(form, framed, monkeypatch):
    """The interpreter's tiles cover small problems whole; here every loop runs several times."""
    for module in (hadamard, matmul, tucker):
        monkeypatch.setattr(module, "block", lambda *_: 16)
    sizes = {"frames": 18, "sizes": (19, 17), "outputs": 18, "rank": 17}
    check(make_problem(form, framed, batch=2, **sizes), "triton")


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("empty", [{"batch": 0}, {"frames": 0}], ids=str)
@pytest.mark.parametrize("framed", [(True, False), (True, True)], ids=str)
def test_empty(form, framed, empty, kernels):
    """No clips or no frames: an empty result, and parameters get gradients of zero."""
    check(make_problem(form, framed, **empty), kernels)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_strides(form, kernels):
    """Operands that are slices or transposes of something else."""
    problem = make_problem(form)
    strided = []
    for x in problem.leaves:
        wide = x.detach().mT.contiguous().mT if x.ndim > 1 else x.detach().repeat_interleave(2)[::2]
        if x.ndim == 3:
            wide = torch.cat([wide, wide], -1)[..., : x.shape[-1]]
        assert x.ndim != 3 or not wide.is_contiguous()
        strided.append(wide.requires_grad_())
    check(problem.with_leaves(strided), kernels)


@pytest.mark.parametrize("form", FORMS)
def test_strided_cotangent(form):
    """The gradient that comes in may be expanded or transposed."""
    problem = make_problem(form)
    expected = problem.fuse("eager").sum().backward
    expected()
    wanted = [x.grad.clone() for x in problem.leaves]
    for x in problem.leaves:
        x.grad = None
    problem.fuse("triton").sum().backward()
    for x, grad in zip(problem.leaves, wanted, strict=True):
        assert relative_error(x.grad, grad) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("form", FORMS)
def test_only_gradients_that_are_needed(form):
    """Frozen views and parameters cost nothing and the others' gradients stay right."""
    for kept in range(len(make_problem(form).leaves)):
        problem = make_problem(form)
        for i, x in enumerate(problem.leaves):
            x.requires_grad_(i == kept)
        value = problem.fuse("triton")
        cotangent = torch.ones_like(value)
        value.backward(cotangent)
        _, wanted = problem.expect(cotangent)
        assert relative_error(problem.leaves[kept].grad, wanted[kept]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("form", FORMS)
def test_deterministic(form):
    first, second = (make_problem(form, dtype=torch.float32, frames=40) for _ in range(2))
    a, b = first.fuse("triton"), second.fuse("triton")
    assert torch.equal(a, b)
    for x, y in zip(
        first.gradients("triton", torch.ones_like(a)),
        second.gradients("triton", torch.ones_like(b)),
        strict=True,
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_cmf_small_projections_do_not_cancel(kernels):
    """∏(1 + p) - 1 for p far below the rounding error of 1."""
    problem = make_problem("cmf-sr", dtype=torch.float32, noise=0)
    views, first, second, out, bias = problem.arguments
    problem.arguments = [views, [1e-6 * x for x in first], second, out, 0 * bias]
    expected = reference.cmf_fusion_reference(
        [x.double() for x in views],
        [x.double() for x in problem.arguments[1]],
        None,
        out.double(),
        0 * bias.double(),
    )
    assert relative_error(problem.fuse(kernels), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("framed", [*TWO, *THREE], ids=str)
def test_dense(framed):
    problem = make_problem("cp", framed)
    views, factors, out = problem.arguments
    weight = reference.cp_tensor(factors, out)
    value = ops.dense_fusion(views, weight, noise=problem.noise)
    assert relative_error(value, problem.expect()[0]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("framed", [*TWO, *THREE], ids=str)
def test_partial_tucker(framed):
    problem = make_problem("tucker", framed)
    views, core, factors, _out = problem.arguments
    value = ops.partial_tucker_fusion(views, core, factors, noise=problem.noise)
    eye = torch.eye(core.shape[0], dtype=core.dtype)
    expected = reference.tucker_fusion_reference(views, core, factors, eye, problem.noise)
    assert relative_error(value, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("framed", [*TWO, *THREE], ids=str)
def test_tensor_train(framed):
    problem = make_problem("cp", framed)
    views = problem.arguments[0]
    sizes = [view.shape[-1] + 1 for view in views]
    cores = [torch.randn(7, 4), *(torch.randn(4 + v, d, 5 + v) for v, d in enumerate(sizes))]
    cores = [core.double() for core in [*cores[:-1], cores[-1][..., 0]]]
    value = ops.tensor_train_fusion(views, cores, noise=problem.noise)
    tensor = reference.tensor_train_tensor(cores)
    expected = reference.dense_fusion_reference(views, tensor, problem.noise)
    assert relative_error(value, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("framed", [*TWO, *THREE], ids=str)
def test_cmf_first_order(framed):
    problem = make_problem("cmf", framed)
    views, first, _second, out, bias = problem.arguments
    value = ops.cmf_first_order_fusion(views, first, out, bias, noise=problem.noise)
    none = [torch.zeros_like(x) for x in first]
    expected = reference.cmf_fusion_reference(views, first, none, out, bias, problem.noise)
    assert relative_error(value, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("framed", TWO, ids=str)
def test_published_forms_agree(form, framed):
    """What benchmarks compare with computes the same thing."""
    problem = make_problem(form, framed)
    published = getattr(reference, f"{form.split('-')[0]}_fusion_published")
    value = published(*problem.arguments, problem.noise)
    assert relative_error(value, problem.expect()[0]) < TOLERANCE[torch.float64]


def test_equations_by_hand():
    """Eqs. (5) and (7) with numbers small enough to check by hand."""
    speech, identity = torch.tensor([[[2.0]]]), torch.tensor([[3.0]])
    one = torch.ones(1, 1)
    factors = [torch.tensor([[5.0], [1.0]]), torch.tensor([[7.0], [2.0]])]
    cp = ops.cp_fusion([speech, identity], factors, 10 * one)
    assert cp.item() == 10 * (5 * 2 + 1) * (7 * 3 + 2)
    cmf = ops.cmf_fusion(
        [speech, identity], [4 * one, 5 * one], [6 * one, 7 * one], 10 * one, torch.tensor([0.5])
    )
    assert cmf.item() == 0.5 + 10 * (4 * 2 + 5 * 3 + (6 * 2) * (7 * 3))


def test_concat():
    speech, identity = torch.randn(2, 3, 4), torch.randn(2, 5)
    noise = torch.randn(2, 3, 6)
    z = ops.concat_fusion([speech, identity], noise=noise)
    assert z.shape == (2, 3, 15)
    assert torch.equal(z[:, 1], torch.cat([speech[:, 1], identity, noise[:, 1]], -1))
    assert torch.equal(ops.concat_fusion([identity, identity]), torch.cat([identity, identity], -1))
