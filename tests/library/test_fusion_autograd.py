"""Gradients of any order, registration, what is saved, autocast and compilation."""

import pytest
import torch

from tests.library.helpers import FORMS, TOLERANCE, make_problem, relative_error

TINY = {"batch": 2, "frames": 2, "sizes": (3, 2), "outputs": 3, "rank": 2, "noise": 1}


def function(problem, kernels="triton"):
    return lambda *leaves: problem.with_leaves(leaves).fuse(kernels)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    problem = make_problem(form, **TINY)
    assert torch.autograd.gradcheck(function(problem), problem.leaves, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_gradgradcheck(form):
    problem = make_problem(form, **TINY)
    assert torch.autograd.gradgradcheck(function(problem), problem.leaves, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_third_order_and_dependent_inputs(form):
    """Views made from one another, and a penalty on the gradient of a gradient."""
    values = []
    for kernels in ("eager", "triton"):
        problem = make_problem(form, **TINY)
        speech, _identity, *rest = problem.leaves
        dependent = problem.with_leaves([speech, speech[:, 0, :2] * speech[:, 1, 1:], *rest])
        value = dependent.fuse(kernels).square().sum()
        (first,) = torch.autograd.grad(value, speech, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), rest[0], create_graph=True)
        values.append(torch.autograd.grad(second.square().sum(), [speech, *rest[:-1]]))
    for eager, fused in zip(*values, strict=True):
        assert relative_error(fused, eager) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    problem = make_problem(form, **TINY)
    arguments = [[] if x is None else x for x in problem.arguments]
    operator = getattr(torch.ops.polyfusion, f"{form.split('-')[0]}_fusion").default
    torch.library.opcheck(operator, (*arguments, problem.noise, "triton"))
    detached = [[y.detach() for y in x] if isinstance(x, list) else x.detach() for x in arguments]
    torch.library.opcheck(operator, (*detached, None, "triton"))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("all_needed", [True, False])
def test_opcheck_backward(form, all_needed):
    problem = make_problem(form, **TINY)
    arguments = [[] if x is None else x for x in problem.arguments]
    grad = torch.randn(2, 2, 4, dtype=torch.double, requires_grad=True)
    needs = [all_needed or i % 2 == 0 for i in range(len(problem.leaves) - 1)]
    operator = getattr(torch.ops.polyfusion, f"{form.split('-')[0]}_fusion_backward").default
    torch.library.opcheck(operator, (grad, *arguments, needs, "triton"))


@pytest.mark.parametrize("form", FORMS)
def test_saves_only_its_inputs(form):
    problem = make_problem(form)
    inputs = {x.data_ptr() for x in problem.leaves}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        problem.fuse("triton")
    assert saved
    assert all(x.data_ptr() in inputs for x in saved)


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_compile_and_export(form, kernels):
    problem = make_problem(form)
    compiled = torch.compile(function(problem, kernels), fullgraph=True, backend="aot_eager")
    value = compiled(*problem.leaves)
    expected = problem.fuse(kernels)
    assert relative_error(value, expected) < TOLERANCE[torch.float64]
    cotangent = torch.randn_like(value)
    gradients = torch.autograd.grad(value, problem.leaves, cotangent)
    for gradient, wanted in zip(gradients, problem.gradients(kernels, cotangent), strict=True):
        assert relative_error(gradient, wanted) < TOLERANCE[torch.float64]

    class Module(torch.nn.Module):
        def forward(self, *leaves):
            return function(problem, kernels)(*leaves)

    exported = torch.export.export(Module(), tuple(problem.leaves)).module()
    assert relative_error(exported(*problem.leaves), expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("form", FORMS)
def test_compile_with_any_number_of_frames(form):
    function_of = torch.compile(
        lambda p: p.fuse("triton"), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for frames in (4, 5, 7):
        problem = make_problem(form, frames=frames)
        assert relative_error(function_of(problem), problem.expect()[0]) < 1e-13


@pytest.mark.parametrize("kernels", ["eager", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_autocast(form, kernels):
    """Parameters stay float32, the result and the work are in the autocast dtype."""
    problem = make_problem(form, dtype=torch.float32, sizes=(9, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = problem.fuse(kernels)
    assert value.dtype == torch.bfloat16
    cotangent = torch.ones_like(value)
    expected, wanted = problem.expect(cotangent)
    assert relative_error(value, expected) < TOLERANCE[torch.bfloat16]
    for gradient, want in zip(
        torch.autograd.grad(value, problem.leaves, cotangent), wanted, strict=True
    ):
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, want) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("form", FORMS)
def test_vmap_of_eager(form):
    problem = make_problem(form, noise=0)
    stacked = [torch.stack([x, 2 * x]) for x in problem.leaves]
    value = torch.vmap(function(problem, "eager"))(*stacked)
    doubled = problem.with_leaves([2 * x for x in problem.leaves]).fuse("eager")
    assert relative_error(value[1], doubled) < TOLERANCE[torch.float64]
