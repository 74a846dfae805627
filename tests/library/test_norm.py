"""Normalisation of u + s with activation: values, gradients of any order, statistics, messages."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from polyfusion import ops
from polyfusion.kernels.eager import norm as eager_norm
from polyfusion.nn import NormActivation
from polyfusion.ops.reference import norm_activation_reference
from tests.library.helpers import NORM_TOLERANCE, relative_error

KERNELS = ("eager", "triton")
# (B, T, C, H, W): odd sizes, channels that are no power of two, one frame, one pixel.
SHAPES = ((2, 3, 5, 4, 3), (1, 1, 17, 3, 5), (3, 4, 130, 1, 1), (2, 5, 8, 6, 4))


def draw(shape, skip, dtype=torch.float64, seed=0):
    """u, s or None, weight, bias; the last two in single precision beside half precision."""
    rng = torch.Generator().manual_seed(seed)
    clips, frames, *rest = shape
    own = torch.promote_types(dtype, torch.float32)

    def normal(*size, dtype=dtype):
        return torch.randn(size, generator=rng, dtype=torch.float64).to(dtype)

    u, s = normal(clips * frames, *rest), normal(clips, *rest) if skip else None
    return [u, s, normal(rest[0], dtype=own), normal(rest[0], dtype=own)]


def value_and_gradients(function, arguments, cotangent):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in arguments]
    value = function(*leaves)
    present = [x for x in leaves if x is not None]
    return [value, *torch.autograd.grad(value, present, cotangent.to(value.dtype))]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", NORM_TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("skip", [True, False], ids=["skip", "alone"])
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients(kernels, dtype, shape, skip):
    slope, constants = 0.2 if shape[2] % 2 else 0.0, shape[2] == 5
    arguments = draw(shape, skip, dtype)
    mean, var = (arguments[2] * 0.1, arguments[3].square() + 0.5) if constants else (None, None)
    cotangent = draw(shape, False, dtype, seed=1)[0]
    exact = [None if x is None else x.double() for x in (*arguments, mean, var)]
    expected = value_and_gradients(
        lambda *x: norm_activation_reference(*x, *exact[4:], slope=slope), exact[:4], cotangent
    )
    found = value_and_gradients(
        lambda *x: ops.norm_activation(*x, mean, var, slope=slope, kernels=kernels)[0],
        arguments,
        cotangent,
    )
    # A channel of few values can have a gradient that is zero but for rounding.
    for value, exactly in zip(found, expected, strict=True):
        scale = 1 + exactly.abs().max()
        error = (value.double() - exactly).abs().max() / scale
        assert error < NORM_TOLERANCE[dtype], error


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("skip", [True, False], ids=["skip", "alone"])
@pytest.mark.parametrize("constants", [True, False], ids=["eval", "train"])
def test_gradients_of_first_and_second_order(kernels, skip, constants):
    arguments = [x for x in draw((2, 2, 2, 2, 1), skip) if x is not None]
    leaves = tuple(x.requires_grad_() for x in arguments)
    statistics = (torch.zeros(2).double(), torch.ones(2).double()) if constants else ()

    def function(u, *rest):
        s, weight, bias = rest if skip else (None, *rest)
        return ops.norm_activation(u, s, weight, bias, *statistics, slope=0.2, kernels=kernels)[0]

    fast = kernels == "triton"  # a random direction instead of every entry: the interpreter is slow
    assert gradcheck(function, leaves, fast_mode=fast)
    assert gradgradcheck(function, leaves, fast_mode=fast)


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "alone"])
def test_maps_added_up_by_planes(monkeypatch, skip):
    """What large maps take on a CPU: gradients of both orders, and a mean far from zero."""
    arguments = [None if x is None else x.requires_grad_() for x in draw((2, 3, 5, 4, 3), skip)]

    def value(*x):
        return ops.norm_activation(*x, slope=0.3, kernels="eager")[0]

    usual = value(*arguments)
    monkeypatch.setattr(eager_norm, "LARGE", 1)
    monkeypatch.setattr(eager_norm, "LARGE_PLANE", 1)
    taken = []
    statistics = eager_norm._plane_statistics

    def watched(*x, **more):
        taken.append(x)
        return statistics(*x, **more)

    monkeypatch.setattr(eager_norm, "_plane_statistics", watched)
    torch.testing.assert_close(value(*arguments), usual)
    assert len(taken) == 1
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert value(*(x if x is None else mode.from_tensor(x) for x in arguments)).shape
    assert len(taken) == 1  # it looks at the values, and there are none
    assert gradcheck(value, arguments)
    assert gradgradcheck(value, arguments)
    for offset in (1.5, 1000):  # by squares, and by squared distances
        u = arguments[0].detach().float() + offset
        mean, var = ops.norm_activation(u, None, *arguments[2:], kernels="eager")[1:]
        exact, close = u.double(), {"rtol": 1e-6, "atol": 0}
        torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), **close)
        torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), **close)


@pytest.mark.parametrize("kernels", KERNELS)
def test_penalty_on_gradients(kernels):
    """A gradient penalty, whose second-order gradients a raw kernel in a backward gets wrong."""

    def penalty(operator):
        u, s, weight, bias = (x.requires_grad_() for x in draw((2, 3, 4, 2, 2), True))
        y = operator(u, s, weight, bias)
        grad_u, grad_s = torch.autograd.grad((y * y.detach()).sum(), (u, s), create_graph=True)
        loss = grad_u.square().sum() + grad_s.square().sum()
        return torch.autograd.grad(loss, (u, s, weight, bias), allow_unused=True)

    found = penalty(lambda *x: ops.norm_activation(*x, kernels=kernels)[0])
    for value, expected in zip(found, penalty(norm_activation_reference), strict=True):
        assert (value is None) == (expected is None)
        assert value is None or relative_error(value, expected) < 1e-10


@pytest.mark.parametrize("batch", [True, False])
def test_registration(batch):
    for skip in (True, False):
        u, s, weight, bias = draw((2, 3, 4, 2, 3), skip, torch.float32)
        if skip:
            u = u.contiguous(memory_format=torch.channels_last)
        statistics = (None, None) if batch else (torch.zeros(4), torch.ones(4))
        leaves = [x if x is None else x.requires_grad_() for x in (u, s, weight, bias)]
        opcheck(
            torch.ops.polyfusion.norm_activation.default,
            (*leaves, *statistics, batch, 1e-5, 0.2, "triton"),
        )


@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_strides_are_those_promised(last):
    """What the compiler is told about the gradients' memory holds: it addresses it directly."""
    form = torch.channels_last if last else torch.contiguous_format
    u, s, weight, bias = draw((2, 3, 4, 2, 3), True, torch.float32)
    u, s = u.contiguous(memory_format=form), s.contiguous(memory_format=form)
    statistics, needs = (torch.zeros(4), torch.ones(4)), [True] * 4
    arguments = (u, u, s, weight, bias, *statistics, True, 1e-5, 0.2, needs, "triton")
    norm_backward_op = torch.ops.polyfusion.norm_activation_backward
    found = norm_backward_op(*arguments)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        promised = norm_backward_op(*fake)
    assert [x.stride() for x in found] == [x.stride() for x in promised]


@pytest.mark.parametrize("kernels", KERNELS)
def test_memory_formats(kernels):
    """Channels-last, sliced and transposed maps give the same values; the format is kept."""
    u, s, weight, bias = draw((2, 3, 6, 5, 4), True, torch.float32)
    expected = ops.norm_activation(u, s, weight, bias, kernels="eager")[0]
    wide = torch.randn(6, 12, 5, 8)
    wide[:, ::2, :, ::2] = u
    for form in (
        u.contiguous(memory_format=torch.channels_last),
        wide[:, ::2, :, ::2],
        u.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ):
        value = ops.norm_activation(form, s, weight, bias, kernels=kernels)[0]
        assert relative_error(value, expected) < 1e-6
        assert value.stride() == torch.empty_like(form).stride()


@pytest.mark.parametrize("skip", [True, False], ids=["skip", "alone"])
def test_statistics_far_from_zero(skip):
    """Mean/std = 1000: sums of squares in float32 are several percent wrong here."""
    u, s, *_ = draw((2, 40, 5, 16, 12), skip, torch.float32)
    u = u + 1000
    total = u.double() if s is None else u.double() + s.double().repeat_interleave(40, 0)
    count, mean, square = ops.norm_statistics(u, s, kernels="triton")
    assert count == u.numel() // 5
    assert relative_error(mean, total.mean((0, 2, 3))) < 1e-7
    exact = total.var((0, 2, 3), correction=0)
    assert relative_error(square / count, exact) < 1e-6


def test_statistics_merge():
    """Parts of unequal size, as on several processes."""
    u = torch.randn(7, 3, 4, 5) * 0.01 + torch.tensor([0.0, 10.0, -5.0]).view(3, 1, 1)
    for kernels in KERNELS:
        parts = [ops.norm_statistics(x, kernels=kernels) for x in (u[:1], u[1:3], u[3:])]
        counts, means, squares = zip(*parts, strict=True)
        merged = ops.merge_statistics(
            torch.tensor(counts), torch.stack(means), torch.stack(squares)
        )
        assert merged[0] == 7 * 20
        assert relative_error(merged[1], u.double().mean((0, 2, 3))) < 1e-6
        exact = u.double().var((0, 2, 3), correction=0)
        assert relative_error(merged[2] / merged[0], exact) < 1e-5


def test_statistics_of_doubles_merge_in_doubles():
    count, mean = torch.tensor([44, 39]), torch.tensor([[-0.75], [1.0]]).double()
    _, merged, _ = ops.merge_statistics(count, mean, mean.square())
    assert abs(merged.item() - (44 * -0.75 + 39) / 83) < 1e-15


@pytest.mark.parametrize("kernels", KERNELS)
def test_count_of_maps_without_channels(kernels):
    assert ops.norm_statistics(torch.zeros(4, 0, 2, 3), kernels=kernels)[0] == 24


@pytest.mark.parametrize("kernels", KERNELS)
def test_sliced_vectors_beside_channels_last_maps(kernels):
    """PyTorch's own normalisation reads the values between them there."""
    u, _, *vectors = draw((2, 3, 4, 2, 2), False)
    vectors += [vectors[0] * 0.1, vectors[1].square() + 0.5]
    u = u.contiguous(memory_format=torch.channels_last)
    sliced = [torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0] for x in vectors]

    def gradients(weight, bias, *given):
        leaves = [x.detach().requires_grad_() for x in (u, weight, bias)]
        y = ops.norm_activation(*leaves[:1], None, *leaves[1:], *given, kernels=kernels)[0]
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        return [y, *first, *second]

    for given in (2, 4):
        pairs = zip(gradients(*sliced[:given]), gradients(*vectors[:given]), strict=True)
        assert all(relative_error(found, expected) < 1e-12 for found, expected in pairs)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_module_is_batch_norm(kernels, slope):
    """Several steps against ``nn.BatchNorm2d``: results, running statistics, evaluation."""
    own = NormActivation(6, slope, kernels)
    plain = torch.nn.BatchNorm2d(6)
    plain.load_state_dict(own.state_dict())
    for step in range(3):
        u = torch.randn(4, 6, 3, 5) * (step + 1) + step
        expected = torch.nn.functional.leaky_relu(plain(u), slope)
        assert relative_error(own(u), expected) < 1e-5
    for (name, value), expected in zip(
        own.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        assert relative_error(value, expected) < 1e-5, name
    expected = torch.nn.functional.leaky_relu(plain.eval()(u), slope)
    assert relative_error(own.eval()(u), expected) < 1e-5


@pytest.mark.parametrize("kernels", KERNELS)
def test_empty_batch(kernels):
    norm = NormActivation(4, kernels=kernels)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    u = torch.zeros(0, 4, 3, 2, requires_grad=True)
    s = torch.zeros(0, 4, 3, 2, requires_grad=True)
    y = norm(u, s)
    assert y.shape == u.shape
    grads = torch.autograd.grad(y.sum(), (u, norm.weight, norm.bias), create_graph=True)
    sum(grad.sum() for grad in grads).backward()
    assert norm.weight.grad is not None
    assert not norm.weight.grad.any()
    assert norm.eval()(u, s).shape == u.shape
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("kernels", KERNELS)
def test_compile_and_inference_mode(kernels):
    norm = NormActivation(4, 0.2, kernels)
    u, s = torch.randn(4, 4, 3, 2, requires_grad=True), torch.randn(2, 4, 3, 2)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(u, s).square().sum(), u)[0]
    expected = torch.autograd.grad(norm(u, s).square().sum(), u)[0]
    assert relative_error(found, expected) < 1e-6
    with torch.inference_mode():
        assert relative_error(norm.eval()(u, s), norm(u, s)) < 1e-6


@pytest.mark.parametrize("kernels", KERNELS)
def test_deterministic(kernels):
    arguments = draw((2, 5, 24, 4, 3), True, torch.float32)
    cotangent = torch.randn_like(arguments[0])
    runs = [
        value_and_gradients(
            lambda *x: ops.norm_activation(*x, kernels=kernels)[0], arguments, cotangent
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(4, 3, 2)}, r"u: expected a tensor \(B·T, C, H, W\)"),
        ({"u": torch.zeros(4, 3, 2, 2, dtype=torch.long)}, "u has dtype torch.int64"),
        ({"s": torch.zeros(3, 3, 2, 2)}, "s has 3 clips, expected a divisor of the 4 frames"),
        ({"s": torch.zeros(2, 5, 2, 2)}, r"s has shape \(2, 5, 2, 2\)"),
        (
            {"s": torch.zeros(2, 3, 2, 2).half()},
            "s is torch.float16 on cpu, expected torch.float32",
        ),
        ({"weight": torch.zeros(4)}, r"weight has shape \(4,\), expected \(3,\)"),
        ({"mean": torch.zeros(3)}, "mean and var: expected both or neither"),
        ({"u": torch.zeros(1, 3, 1, 1), "s": None}, "one value per channel has no variance"),
        ({"kernels": "tritn"}, "kernels='tritn'"),
    ],
)
def test_messages(change, message):
    arguments = {
        "u": torch.zeros(4, 3, 2, 2),
        "s": torch.zeros(2, 3, 2, 2),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
    }
    with pytest.raises(ValueError, match=message):
        ops.norm_activation(**{**arguments, **change})
