"""The built CUDA extension on a GPU; nothing here runs without both."""

import pytest
import torch

from polyfusion import extension
from polyfusion.kernels.cuda import final
from polyfusion.ops.norm import norm_activation
from tests.library.helpers import FORMS, TOLERANCE, make_problem, relative_error

PAPER = {"batch": 16, "frames": 75, "sizes": (256, 128), "outputs": 384, "noise": 10}


@pytest.fixture(autouse=True)
def _extension():
    if problem := extension.problem():
        pytest.skip(problem)


pytestmark = pytest.mark.gpu


def on_gpu(problem, scale=1.0):
    leaves = [(scale * x).detach().cuda().requires_grad_() for x in problem.leaves]
    return problem.with_leaves(leaves)


@pytest.mark.parametrize("framed", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_fusion(form, dtype, framed):
    sizes = {"frames": 35, "sizes": (37, 9), "outputs": 67, "rank": 34}
    problem = on_gpu(make_problem(form, framed, dtype=dtype, **sizes), 0.5)
    value = problem.fuse("cuda")
    cotangent = torch.randn_like(value)
    expected, expected_gradients = problem.expect(cotangent)
    assert relative_error(value, expected) < TOLERANCE[dtype]
    for gradient, wanted in zip(
        problem.gradients("cuda", cotangent), expected_gradients, strict=True
    ):
        assert relative_error(gradient, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_paper_size(form):
    rank = 64 if form == "tucker" else 128
    problem = on_gpu(make_problem(form, dtype=torch.bfloat16, rank=rank, **PAPER), 0.2)
    value, wanted = problem.fuse("cuda"), problem.fuse("eager")
    cotangent = torch.randn_like(value)
    assert relative_error(value, wanted) < TOLERANCE[torch.bfloat16]
    gradients = [problem.gradients(kernels, cotangent) for kernels in ("cuda", "eager")]
    for gradient, expected in zip(*gradients, strict=True):
        assert relative_error(gradient, expected) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("form", FORMS)
def test_graph_capture(form):
    """Launches go to the current stream, and nothing synchronises."""
    problem = on_gpu(make_problem(form, dtype=torch.float32))
    cotangent = torch.randn_like(problem.fuse("eager"))
    graph = torch.cuda.CUDAGraph()
    problem.gradients("cuda", cotangent)
    with torch.cuda.graph(graph):
        gradients = problem.gradients("cuda", cotangent)
    with torch.no_grad():
        problem.leaves[0].mul_(2)
    graph.replay()
    for gradient, wanted in zip(gradients, problem.gradients("eager", cotangent), strict=True):
        assert relative_error(gradient, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm(dtype, memory_format):
    u = torch.randn(150, 72, 16, 12, device="cuda").to(dtype, memory_format=memory_format)
    s = torch.randn(2, 72, 16, 12, device="cuda").to(dtype, memory_format=memory_format)
    leaves = [u, s, torch.rand(72, device="cuda"), torch.randn(72, device="cuda")]
    leaves = [x.requires_grad_() for x in leaves]
    cotangent = torch.randn_like(u)
    results = []
    for kernels in ("cuda", "eager"):
        wide = (
            leaves if kernels == "cuda" else [x.detach().double().requires_grad_() for x in leaves]
        )
        y, *_ = norm_activation(*wide, slope=0.2, kernels=kernels)
        results.append([y, *torch.autograd.grad(y, wide, cotangent.to(y.dtype))])
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_final(dtype):
    x = torch.randn(150, 64, 64, 48, device="cuda", dtype=dtype)
    weight = (0.1 * torch.randn(64, 3, 4, 4, device="cuda")).to(dtype)
    y = final.final_forward(x, weight)
    grad = torch.randn_like(y)
    grads = final.final_backward(grad, x, weight, y)
    doubles = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = torch.conv_transpose2d(*doubles, stride=2, padding=1).tanh()
    wanted = torch.autograd.grad(expected, doubles, grad.double())
    for value, exact in zip((y, *grads), (expected, *wanted), strict=True):
        assert relative_error(value, exact) < TOLERANCE[dtype]
