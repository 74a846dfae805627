"""The kernels on a GPU, Triton's and CUDA's; nothing here runs without one."""

import pytest
import torch

from polyfusion import extension
from polyfusion.dispatch import resolve, triton_problem
from polyfusion.ops import final_block, norm_activation
from tests.library.helpers import FORMS, TOLERANCE, make_problem, relative_error

PAPER = {"batch": 16, "frames": 75, "sizes": (256, 128), "outputs": 384, "noise": 10}


pytestmark = pytest.mark.gpu


@pytest.fixture(params=["triton", "cuda"])
def kernels(request):
    """Triton's kernels, which are never missing on a GPU, and CUDA's where they are built."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if request.param == "cuda" and (problem := extension.problem()):
        pytest.skip(problem)
    return request.param


@pytest.fixture(autouse=True)
def ieee(fp32_precision):
    fp32_precision("ieee")


def test_auto_is_triton(kernels):
    assert triton_problem() is None
    assert resolve("auto", [torch.zeros(1, device="cuda")]) == "triton"


def on_gpu(problem, scale=1.0):
    leaves = [(scale * x).detach().cuda().requires_grad_() for x in problem.leaves]
    return problem.with_leaves(leaves)


@pytest.mark.parametrize("framed", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_fusion(form, dtype, framed, kernels):
    sizes = {"frames": 35, "sizes": (37, 9), "outputs": 67, "rank": 34}
    problem = on_gpu(make_problem(form, framed, dtype=dtype, **sizes), 0.5)
    value = problem.fuse(kernels)
    cotangent = torch.randn_like(value)
    expected, expected_gradients = problem.expect(cotangent)
    assert relative_error(value, expected) < TOLERANCE[dtype]
    for gradient, wanted in zip(
        problem.gradients(kernels, cotangent), expected_gradients, strict=True
    ):
        assert relative_error(gradient, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_paper_size(form, kernels):
    rank = 64 if form == "tucker" else 128
    problem = on_gpu(make_problem(form, dtype=torch.bfloat16, rank=rank, **PAPER), 0.2)
    value, wanted = problem.fuse(kernels), problem.fuse("eager")
    cotangent = torch.randn_like(value)
    assert relative_error(value, wanted) < TOLERANCE[torch.bfloat16]
    gradients = [problem.gradients(choice, cotangent) for choice in (kernels, "eager")]
    for gradient, expected in zip(*gradients, strict=True):
        assert relative_error(gradient, expected) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("form", FORMS)
def test_graph_capture(form, kernels):
    """Launches go to the current stream, and nothing synchronises."""
    problem = on_gpu(make_problem(form, dtype=torch.float32))
    cotangent = torch.randn_like(problem.fuse("eager"))
    graph = torch.cuda.CUDAGraph()
    problem.gradients(kernels, cotangent)
    with torch.cuda.graph(graph):
        gradients = problem.gradients(kernels, cotangent)
    with torch.no_grad():
        problem.leaves[0].mul_(2)
    graph.replay()
    for gradient, wanted in zip(gradients, problem.gradients("eager", cotangent), strict=True):
        assert relative_error(gradient, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm(dtype, memory_format, kernels):
    u = torch.randn(150, 72, 16, 12, device="cuda").to(dtype, memory_format=memory_format)
    s = torch.randn(2, 72, 16, 12, device="cuda").to(dtype, memory_format=memory_format)
    leaves = [u, s, torch.rand(72, device="cuda"), torch.randn(72, device="cuda")]
    leaves = [x.requires_grad_() for x in leaves]
    cotangent = torch.randn_like(u)
    results = []
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    for choice, wide in ((kernels, leaves), ("eager", doubles)):
        y, *_ = norm_activation(*wide, slope=0.2, kernels=choice)
        results.append([y, *torch.autograd.grad(y, wide, cotangent.to(y.dtype))])
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_final(dtype, kernels):
    x = torch.randn(150, 64, 64, 48, device="cuda", dtype=dtype, requires_grad=True)
    weight = (0.1 * torch.randn(64, 3, 4, 4, device="cuda")).to(dtype).requires_grad_()
    y = final_block(x, weight, kernels=kernels)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, weight), grad)
    doubles = [leaf.detach().double().requires_grad_() for leaf in (x, weight)]
    expected = torch.conv_transpose2d(*doubles, stride=2, padding=1).tanh()
    wanted = torch.autograd.grad(expected, doubles, grad.double())
    for value, exact in zip((y, *grads), (expected, *wanted), strict=True):
        assert relative_error(value, exact) < TOLERANCE[dtype]
