"""What a user can get wrong, or rarely does: named, right, or refused; never silently wrong."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from polyfusion import ops
from polyfusion.dispatch import transformed
from tests.library.helpers import FORMS, Problem, make_problem, relative_error

BACKENDS = ("eager", "triton")
SPEECH, IDENTITY = torch.zeros(2, 3, 4), torch.zeros(2, 5)
VIEWS, FACTORS = [SPEECH, IDENTITY], [torch.zeros(5, 6), torch.zeros(6, 6)]
OUT, CORE = torch.zeros(7, 6), torch.zeros(6, 6, 6)
X, SKIP = torch.zeros(4, 3, 2, 2), torch.zeros(2, 3, 2, 2)
W1, W3, W4 = torch.zeros(3, 3), torch.zeros(3, 3, 3, 3), torch.zeros(3, 3, 4, 4)
ONE = torch.ones(3)


def _train(core):
    return ops.tensor_train_fusion(VIEWS, [OUT, core, torch.zeros(2, 6)])


def _skip(**change):
    names = ("x", "skip", "weight_x", "weight_skip", "norm_weight", "norm_bias")
    given = dict(zip(names, (X, SKIP, W3, W3, ONE, ONE), strict=True))
    return ops.skip_conv_block(**{**given, **change})


def _up(**change):
    return ops.up_conv_block(
        **{"x": X, "weight": W4, "norm_weight": ONE, "norm_bias": ONE, **change}
    )


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 2, 2), (0, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_constant_channel_has_no_squares(kernels, shape, dtype):
    u = torch.full(shape, 0.75, dtype=dtype)
    count, mean, square = ops.norm_statistics(u, u[:1] if shape[0] else None, kernels=kernels)
    assert count == shape[0] * shape[2] * shape[3]
    assert mean.tolist() == [1.5 if count else 0.0] * 3
    assert square.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.cp_fusion(None, FACTORS, OUT), "views: .* got NoneType"),
        (lambda: ops.cp_fusion((v for v in VIEWS), FACTORS, OUT), "views: .* got generator"),
        (lambda: ops.cp_fusion(VIEWS, None, OUT), "factors: .* got NoneType"),
        (lambda: ops.cp_fusion(VIEWS, (f for f in FACTORS), OUT), "factors: .* got generator"),
        (
            lambda: ops.cp_fusion([SPEECH.to_sparse(), IDENTITY], FACTORS, OUT),
            r"views\[0\].*layout",
        ),
        (lambda: ops.cp_fusion(VIEWS, FACTORS, OUT.to_sparse()), "out has layout torch.sparse_coo"),
        (lambda: ops.tucker_fusion(VIEWS, CORE, 1.0, OUT), "factors: .* got float"),
        (lambda: ops.concat_fusion({0: SPEECH, 1: IDENTITY}), "views: .* got dict"),
        (lambda: _train(torch.zeros(())), r"cores\[1\] has shape \(\)"),
        (lambda: ops.tensor_train_fusion(VIEWS, None), "cores: .* got NoneType"),
        (lambda: ops.norm_activation(X, 1.0, ONE, ONE), "s: expected a tensor"),
        (lambda: ops.norm_activation(X, None, None, ONE), "weight: expected a tensor"),
        (lambda: ops.norm_activation(X, None, ONE, [1, 1, 1]), "bias: .* got list"),
        (lambda: ops.norm_activation(X.to_sparse(), None, ONE, ONE), "u has layout"),
        (lambda: ops.norm_activation(X, None, ONE, ONE, eps=-1.0), "eps=-1.0"),
        (lambda: ops.norm_activation(X, None, ONE, ONE, eps=float("nan")), "eps=nan"),
        (lambda: ops.norm_activation(X, None, ONE, ONE, eps=10**400), "eps=1000"),
        (lambda: ops.norm_activation(X, None, ONE, ONE, slope=None), "slope=None"),
        (lambda: ops.merge_statistics(2, ONE[None], ONE[None]), "count: expected a tensor"),
        (lambda: ops.merge_statistics(ONE, SKIP, ONE[None]), "mean: expected a tensor"),
        (lambda: ops.merge_statistics(ONE > 0, W1, W1), "count is torch.bool"),
        (lambda: ops.merge_statistics(ONE.to("meta"), W1, W1), "count is .* on meta"),
        (lambda: ops.merge_statistics(ONE.to(torch.float8_e5m2), W1, W1), "count is .*float8"),
        (lambda: ops.merge_statistics(ONE, W1.long(), W1.long()), "mean has dtype torch.int64"),
        (lambda: ops.merge_statistics(ONE, W1, W1.double()), "square has dtype torch.float64"),
        (lambda: _skip(norm_weight=None), "norm_weight: .* got NoneType"),
        (lambda: _skip(skip=None), "skip: .* got NoneType"),
        (lambda: _skip(weight_skip=None), "weight_skip: .* got NoneType"),
        (lambda: _skip(weight_x=W3[:0]), "weight_x has shape .* at least 1"),
        (lambda: _skip(x=X[..., :0]), "x has shape .* at least 1"),
        (lambda: _up(padding=-1), "padding=-1"),
        (lambda: _up(padding=0.5), "padding=0.5"),
        (lambda: _up(stride=0), "stride=0"),
        (lambda: _up(stride=-2), "stride=-2"),
        (lambda: _up(stride=10**400), "stride=1000"),
        (lambda: _up(norm_bias=None), "norm_bias: .* got NoneType"),
        (lambda: _up(weight=W4.to_sparse()), "weight has layout"),
        (lambda: ops.final_block(X, None), "weight: .* got NoneType"),
        (lambda: ops.final_block(X, W4[:, :0]), "weight has shape .* at least 1"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter")
def test_the_interpreter_refuses_tensors_without_values():
    with pytest.raises(ops.KernelsUnavailable, match="kernels='triton': the tensors are on meta"):
        ops.norm_statistics(X.to("meta"), kernels="triton")


def _agrees_with_the_oracle(problem, kernels):
    value = problem.fuse(kernels)
    cotangent = torch.ones_like(value)
    expected, gradients = problem.expect(cotangent)
    assert relative_error(value, expected) < 1e-12
    found = torch.autograd.grad(value, problem.leaves, cotangent)
    for one, other in zip(found, gradients, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("framed", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize(
    "empty",
    [
        {"batch": 0},
        {"frames": 0},
        {"sizes": (0, 4)},
        {"sizes": (0, 0)},
        {"rank": 0},
        {"outputs": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", FORMS)
def test_empty_sizes(form, framed, empty, kernels):
    _agrees_with_the_oracle(make_problem(form, framed, **{"frames": 3, **empty}), kernels)


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("ranks", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_ranks_of_tucker(ranks, kernels):
    shapes = [(2, 3, 4), (2, 5), ranks, (5, ranks[1]), (6, ranks[2]), (7, ranks[0])]
    a, b, core, first, second, out = (
        torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes
    )
    _agrees_with_the_oracle(Problem("tucker", [[a, b], core, [first, second], out], None), kernels)


def _operators():
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.double)

    b, factors, out = draw(2, 5), [draw(5, 6), draw(6, 6)], draw(3, 6)
    u, s, w3, w4 = draw(4, 3, 2, 2), draw(2, 3, 2, 2), draw(3, 3, 3, 3), draw(3, 3, 4, 4)
    norm, given = (draw(3), draw(3)), (draw(3), draw(3).square())
    return {
        "cp_fusion": (lambda x, k: ops.cp_fusion([x, b], factors, out, kernels=k), draw(2, 3, 4)),
        "norm_activation": (lambda x, k: ops.norm_activation(x, s, *norm, kernels=k)[0], u),
        "given": (lambda x, k: ops.norm_activation(x, s, *norm, *given, kernels=k)[0], u),
        "skip": (lambda x, k: ops.skip_conv_block(x, s, w3, w3, *norm, kernels=k)[0], u),
        "up": (lambda x, k: ops.up_conv_block(x, w4, *norm, kernels=k)[0], u),
        "final_block": (lambda x, k: ops.final_block(x, w4, kernels=k), u),
    }


def _dual(call, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, tangent))).tangent


def _transforms(call, x):
    """What a transform gives, and what it should be, from ordinary reverse mode."""
    tangent = x.square()
    jacobian = torch.autograd.functional.jacobian(call, x)
    along = (jacobian * tangent).flatten(-x.ndim).sum(-1)
    wanted = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(wanted).square().sum(), wanted)
    return {
        "jvp": (lambda: jvp(call, (x,), (tangent,))[1], along),
        "dual": (lambda: _dual(call, x, tangent), along),
        "dual of a leaf": (lambda: _dual(call, x.clone().requires_grad_(), tangent), along),
        "vmap": (lambda: vmap(call)(torch.stack([x, -x])), torch.stack([call(x), call(-x)])),
        "jacrev": (lambda: jacrev(call)(x), jacobian),
        "jacfwd": (lambda: jacfwd(call)(x), jacobian),
        "grad": (lambda: grad(lambda x: call(x).square().sum())(x), gradient),
    }


@pytest.mark.parametrize("name", _operators())
def test_transforms_of_the_plain_forms(name):
    call, x = _operators()[name]
    for transform, (found, expected) in _transforms(lambda x: call(x, "eager"), x).items():
        value = found()
        assert value is not None, transform
        assert relative_error(value, expected) < 1e-11, transform


@pytest.mark.slow
@pytest.mark.parametrize("name", _operators())
def test_fused_kernels_refuse_transforms(name):
    call, x = _operators()[name]
    for found, _ in _transforms(lambda x: call(x, "triton"), x).values():
        with pytest.raises(NotImplementedError, match=r"polyfusion::\w+ .*kernels='eager'"):
            found()


def test_fused_kernels_serve_what_a_transform_does_not_reach():
    call, x = _operators()["cp_fusion"]
    expected = call(x, "triton")
    with forward_ad.dual_level():
        assert transformed()
        assert torch.equal(call(x, "triton"), expected)
    assert not transformed()


def test_own_convolutions_refuse_transforms():
    x, weight, one = X.double() + 1, W3.double() + 1, ONE.double()

    def call(x):
        return ops.skip_conv_block(x, x[:2], weight, weight, one, one, conv="taps")[0]

    with pytest.raises(NotImplementedError, match=r"polyfusion::conv .*conv=None"):
        jvp(call, (x,), (x,))
