"""The CUDA kernels, emulated on the host, against the oracles: value and every gradient.

Sizes are odd and beyond one tile (32 rows, 64 columns), so every edge is met; dense sizes take the
16-byte loads.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from polyfusion import extension, ops
from polyfusion.build import BuildError
from polyfusion.ops.norm import norm_activation
from tests.library.helpers import FORMS, TOLERANCE, make_problem, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FRAMED = {"TB": (True, False), "BT": (False, True), "TT": (True, True), "BB": (False, False)}
ODD = {"frames": 35, "sizes": (37, 9), "outputs": 67, "rank": 66, "noise": 3}
EVEN = {"frames": 5, "sizes": (64, 16), "outputs": 128, "rank": 32, "noise": 8}


@pytest.fixture(autouse=True)
def emulated(poisoned_memory):
    """CPU tensors are served by the CUDA kernels, as host code."""
    try:
        context = extension.emulation()
        context.__enter__()
    except BuildError as error:
        pytest.skip(f"the kernels cannot be compiled as host code: {error}")
    yield
    context.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def ieee(fp32_precision):
    fp32_precision("ieee")


@pytest.fixture
def tf32(ieee, fp32_precision):
    fp32_precision("tf32")


def check(problem, tolerance=None):
    dtype = problem.leaves[0].dtype
    tolerance = tolerance or TOLERANCE[dtype]
    value = problem.fuse("cuda")
    rng = torch.Generator().manual_seed(7)
    cotangent = torch.randn(value.shape, generator=rng, dtype=torch.float64).to(dtype)
    expected, expected_gradients = problem.expect(cotangent)
    assert value.dtype == dtype
    assert relative_error(value, expected) < tolerance
    gradients = problem.gradients("cuda", cotangent)
    for i, (gradient, wanted) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert gradient.dtype == dtype
        assert relative_error(gradient, wanted) < tolerance, f"gradient {i}"


@pytest.mark.parametrize("framed", FRAMED.values(), ids=FRAMED)
@pytest.mark.parametrize("form", FORMS)
def test_views_per_frame_and_per_clip(form, framed):
    check(make_problem(form, framed, dtype=torch.float32))


@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dtypes_and_tiles(form, dtype, sizes):
    if form == "tucker":  # k_1 k_2 k_3 would be large
        sizes = {**sizes, "rank": 34 if sizes is ODD else 16}
    problem = make_problem(form, dtype=dtype, **sizes)
    check(problem.with_leaves([(0.5 * x).detach().requires_grad_() for x in problem.leaves]))


@pytest.mark.parametrize("form", FORMS)
def test_tensor_float_32(form, tf32):
    check(make_problem(form, dtype=torch.float32, **EVEN), tolerance=2e-3)
    rounded = relative_error(
        make_problem(form, dtype=torch.float32, **EVEN).fuse("cuda"),
        make_problem(form, dtype=torch.float32, **EVEN).fuse("eager"),
    )
    assert rounded > TOLERANCE[torch.float32], "tf32 is not used"


@pytest.mark.parametrize(
    "sizes",
    [{"frames": 1}, {"batch": 1}, {"noise": 0}, {"batch": 0}, {"frames": 0}, {"outputs": 1}],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_small_and_empty(form, sizes):
    check(make_problem(form, dtype=torch.float32, **sizes))


@pytest.mark.parametrize("form", FORMS)
def test_strides(form):
    """Operands may be slices and transposes; a cotangent may be expanded."""

    def strided(x):
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x.detach()
        return wide[..., 1::2].requires_grad_()

    problem = make_problem(form, dtype=torch.float32)
    problem = problem.with_leaves([strided(x) for x in problem.leaves])
    check(problem)
    value = problem.fuse("cuda")
    ones = torch.ones(()).expand(value.shape)
    _, expected = problem.expect(ones)
    for gradient, wanted in zip(problem.gradients("cuda", ones), expected, strict=True):
        assert relative_error(gradient, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_needed(form):
    """Gradients of some operands only: those of frozen views and weights are not computed."""
    problem = make_problem(form, dtype=torch.float32)
    value, (_, expected) = problem.fuse("cuda"), problem.expect(torch.ones(problem.fuse().shape))
    for i, leaf in enumerate(problem.leaves):
        (gradient,) = torch.autograd.grad(value, [leaf], torch.ones_like(value), retain_graph=True)
        assert relative_error(gradient, expected[i]) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("form", FORMS)
def test_deterministic(form):
    problem = make_problem(form, dtype=torch.float32, **ODD | {"rank": 18})
    cotangent = torch.ones_like(problem.fuse("cuda"))
    first, second = (problem.gradients("cuda", cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    problem = make_problem(form, dtype=torch.float32)
    operator = getattr(torch.ops.polyfusion, f"{form.split('-')[0]}_fusion")
    arguments = [[] if x is None else x for x in problem.arguments]
    opcheck(operator.default, (*arguments, problem.noise, "cuda"))


def test_autocast():
    problem = make_problem("cp", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = problem.fuse("cuda")
    assert value.dtype == torch.bfloat16
    assert relative_error(value, problem.fuse("eager")) < TOLERANCE[torch.bfloat16]


def test_second_order():
    """The backward operator is differentiable with these kernels too."""
    problem = make_problem("cp", dtype=torch.float32)

    def penalty(kernels):
        (gradient,) = torch.autograd.grad(
            problem.fuse(kernels).square().sum(), problem.leaves[0], create_graph=True
        )
        return torch.autograd.grad(gradient.square().sum(), problem.leaves[1:5])

    for value, wanted in zip(penalty("cuda"), penalty("eager"), strict=True):
        assert relative_error(value, wanted) < 1e-5


def test_what_the_kernels_refuse():
    with pytest.raises(ops.KernelsUnavailable, match="not in torch\\.float64"):
        make_problem("cp").fuse("cuda")
    with pytest.raises(ops.KernelsUnavailable, match="fuse 2 views, got 3"):
        make_problem("cp", (True, False, False), dtype=torch.float32).fuse("cuda")
    with pytest.raises(RuntimeError, match="rank 4000 needs more shared memory"):
        make_problem("cp", rank=4000, dtype=torch.float32).fuse("cuda")


MAPS = {
    "skip": (2, 3, 5, 4, 3, True),
    "no skip": (1, 2, 17, 3, 5, False),
    "wide": (3, 2, 70, 8, 6, True),
    "one value": (1, 1, 3, 1, 1, True),
    "no frames": (2, 0, 3, 2, 2, True),
    "no clips": (0, 1, 3, 2, 2, True),
}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def make_maps(shape, dtype, memory_format, offset=0.0):
    """u, s or None, weight, bias, and a gradient."""
    clips, frames, channels, height, width, skip = shape
    rng = torch.Generator().manual_seed(3)

    def draw(*shape):
        x = torch.randn(shape, generator=rng, dtype=torch.float64)
        return x.to(dtype).contiguous(memory_format=memory_format)

    u = draw(clips * frames, channels, height, width) + offset
    s = draw(clips, channels, height, width) if skip else None
    weight = torch.rand(channels, generator=rng) + 0.5
    bias = torch.randn(channels, generator=rng)
    return u, s, weight, bias, draw(*u.shape)


def expect_norm(u, s, weight, bias, statistics, eps, slope):
    if s is not None:
        u = (u.unflatten(0, (s.shape[0], -1)) + s.unsqueeze(1)).flatten(0, 1)
    mean, var = statistics or (u.mean((0, 2, 3)), u.var((0, 2, 3), unbiased=False))
    x = (u - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + eps).sqrt()
    return F.leaky_relu(x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1), slope), mean, var


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "batch"),
    [("skip", True), ("no skip", True), ("wide", True), ("skip", False), ("one value", False)],
)
def test_norm(name, batch, dtype, memory_format):
    """With the statistics of the batch, or with constants."""
    u, s, weight, bias, grad = make_maps(MAPS[name], dtype, memory_format)
    eps, slope, tolerance = 1e-3, 0.2, TOLERANCE[dtype]
    given = (None, None) if batch else (torch.linspace(-1, 1, len(bias)), torch.rand(len(bias)))
    leaves = [x for x in (u, s, weight, bias) if x is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y, *statistics = norm_activation(
        u, s, weight, bias, *given, eps=eps, slope=slope, kernels="cuda"
    )
    grads = torch.autograd.grad(y, leaves, grad)
    assert y.dtype == dtype
    assert y.stride() == grads[0].stride() == u.stride()

    doubles = [
        None if x is None else x.detach().double().requires_grad_() for x in (u, s, weight, bias)
    ]
    constants = None if batch else [x.double() for x in given]
    expected, *expected_statistics = expect_norm(*doubles, constants, eps, slope)
    assert relative_error(y, expected) < tolerance
    for value, wanted in zip(statistics, expected_statistics, strict=True):
        assert relative_error(value, wanted) < TOLERANCE[torch.float32]
    wanted = torch.autograd.grad(expected, [x for x in doubles if x is not None], grad.double())
    for value, exact in zip(grads, wanted, strict=True):
        assert relative_error(value, exact) < tolerance


@pytest.mark.parametrize("name", ["no frames", "no clips"])
def test_norm_of_nothing(name):
    u, s, weight, bias, grad = make_maps(MAPS[name], torch.float32, torch.contiguous_format)
    leaves = [x.requires_grad_() for x in (u, s, weight, bias)]
    y, mean, var = norm_activation(*leaves, kernels="cuda")
    assert y.shape == u.shape
    for value in (mean, var, *torch.autograd.grad(y, leaves, grad)):
        assert (value == 0).all()


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_statistics_with_a_large_mean(memory_format):
    """Sums of squares in float32 would be 6 % wrong here."""
    u, *_ = make_maps((2, 8, 5, 8, 7, False), torch.float32, memory_format, offset=1000.0)
    _, mean, var = norm_activation(u, None, torch.ones(5), torch.zeros(5), kernels="cuda")
    assert relative_error(mean, u.double().mean((0, 2, 3))) < 1e-7
    assert relative_error(var, u.double().var((0, 2, 3), unbiased=False)) < 2e-7


@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 3, 4, 3), (1, 64, 3, 6, 17), (2, 70, 4, 5, 33), (18, 2, 3, 1, 1), (0, 4, 3, 2, 2)],
    ids=str,
)
def test_final(shape, dtype, request):
    tolerance = 2e-3 if dtype == "tf32" else TOLERANCE[dtype]
    if dtype == "tf32":
        request.getfixturevalue("tf32")
        dtype = torch.float32
    frames, channels, outputs, height, width = shape
    x, *_ = make_maps((frames, 1, channels, height, width, False), dtype, torch.contiguous_format)
    weight = torch.randn(channels, outputs, 4, 4).mul(0.1).to(dtype)
    y = ops.final_block(x.requires_grad_(), weight.requires_grad_(), kernels="cuda")
    grad = torch.randn(y.shape).to(dtype)
    grads = torch.autograd.grad(y, (x, weight), grad)
    doubles = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = torch.tanh(F.conv_transpose2d(*doubles, stride=2, padding=1))
    wanted = torch.autograd.grad(expected, doubles, grad.double())
    for value, exact in zip((y, *grads), (expected, *wanted), strict=True):
        assert relative_error(value, exact) < tolerance


def test_opcheck_of_maps():
    u, s, weight, bias, _ = make_maps(MAPS["skip"], torch.float32, torch.channels_last)
    leaves = [x.requires_grad_() for x in (u, s, weight, bias)]
    final_weight = torch.randn(5, 3, 4, 4, requires_grad=True)
    opcheck(torch.ops.polyfusion.final_block.default, (u, final_weight, "cuda"))
    schema = torch.ops.polyfusion.norm_activation.default._schema
    rest = {"batch": True, "eps": 1e-5, "slope": 0.2, "kernels": "cuda"}
    given = [rest.get(x.name) for x in schema.arguments[4:]]
    opcheck(torch.ops.polyfusion.norm_activation.default, (*leaves, *given))
