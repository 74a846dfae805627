"""The layers: sizes of the paper, initialisation, penalty, and the operators they call."""

import math

import pytest
import torch

from polyfusion import nn, ops
from polyfusion.nn.fusion import FUSIONS

COUNTS = {
    "concat": 0,
    "dense": 12_730_752,
    "tensor-train": 4_276_352,
    "tucker": 1_687_744,
    "partial-tucker": 3_186_880,
    "cp": 98_560,
    "cmf": 147_840,
    "cmf-sr": 98_688,
    "cmf-first-order": 98_688,
}


@pytest.mark.parametrize("name", FUSIONS)
def test_parameter_counts_of_the_paper(name):
    with torch.device("meta"):
        layer = nn.make_fusion(name, (256, 128), 384)
    assert sum(p.numel() for p in layer.parameters()) == COUNTS[name]
    assert layer.out_features == 384


@pytest.mark.parametrize("name", FUSIONS)
def test_forward(name):
    layer = nn.make_fusion(name, (6, 5, 4), 8, rank=3)
    views = torch.randn(2, 3, 6), torch.randn(2, 5), torch.randn(2, 4)
    noise = torch.randn(2, 3, 2)
    value = layer(*views, noise=noise)
    assert value.shape == (2, 3, layer.out_features + 2)
    assert torch.equal(value, layer(views, noise=noise))
    assert torch.equal(value[..., -2:], noise)
    assert layer.out_features == (15 if name == "concat" else 8)
    if name != "concat":
        value.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_layers_call_their_operators():
    views = torch.randn(2, 3, 6), torch.randn(2, 5)
    cp = nn.CPFusion((6, 5), 8, rank=3)
    assert torch.equal(cp(views), ops.cp_fusion(views, list(cp.factors), cp.out))
    cmf = nn.CMFFusion((6, 5), 8, rank=3)
    second = list(cmf.second)
    expected = ops.cmf_fusion(views, list(cmf.first), second, cmf.out, cmf.bias)
    assert torch.equal(cmf(views), expected)
    partial = nn.PartialTuckerFusion((6, 5), 8, ranks=(2, 3))
    expected = ops.partial_tucker_fusion(views, partial.core, list(partial.factors))
    assert torch.equal(partial(views), expected)
    train = nn.TensorTrainFusion((6, 5), 8, rank=3)
    assert torch.equal(train(views), ops.tensor_train_fusion(views, list(train.cores)))
    order_one = nn.CMFFirstOrderFusion((6, 5), 8, rank=3)
    expected = ops.cmf_first_order_fusion(
        views, list(order_one.first), order_one.out, order_one.bias
    )
    assert torch.equal(order_one(views), expected)
    shared = nn.CMFFusion((6, 5), 8, rank=3, shared_row_space=True)
    expected = ops.cmf_fusion(views, list(shared.first), None, shared.out, shared.bias)
    assert torch.equal(shared(views), expected)
    assert "shared_row_space=True" in repr(shared)


def test_tucker_ranks():
    assert nn.TuckerFusion((256, 128), 384).ranks == (192, 128, 64)
    assert nn.TuckerFusion((1, 3), 2).ranks == (1, 1, 1)
    assert nn.TuckerFusion((6, 5), 8, ranks=(2, 3, 4)).core.shape == (2, 3, 4)


def test_kernels_reach_the_operator():
    layer = nn.CPFusion((6, 5), 8, rank=3, kernels="triton")
    views = torch.randn(2, 3, 6), torch.randn(2, 5)
    expected = ops.cp_fusion(views, list(layer.factors), layer.out, kernels="eager")
    torch.testing.assert_close(layer(views), expected)


def test_initialisation():
    """Xavier-normal; the bias as a matrix of one column."""
    layer = nn.CMFFusion((256, 128), 384)
    assert layer.bias.std().item() == pytest.approx(math.sqrt(2 / 385), rel=0.15)
    assert layer.first[0].std().item() == pytest.approx(math.sqrt(2 / 384), rel=0.05)
    core = nn.TuckerFusion((256, 128), 384).core
    assert core.std().item() == pytest.approx(math.sqrt(2 / (192 + 128 * 64)), rel=0.05)


def test_penalty():
    layer = nn.CPFusion((6, 5), 8, rank=3)
    norms = [p.norm() for p in layer.parameters()]
    torch.testing.assert_close(layer.frobenius_penalty(), sum(norms))
    squares = sum(p.square().sum() for p in layer.parameters())
    torch.testing.assert_close(layer.frobenius_penalty("sumsq"), squares)
    count = sum(p.numel() for p in layer.parameters())
    torch.testing.assert_close(layer.frobenius_penalty("meansq"), squares / count)
    assert nn.ConcatFusion((6, 5)).frobenius_penalty() == 0
    with pytest.raises(ValueError, match="kind='l1': expected one of 'norm'"):
        layer.frobenius_penalty("l1")


def test_penalty_counts_shared_parameters_once():
    layer = nn.CPFusion((6, 6), 8, rank=3)
    layer.factors[1] = layer.factors[0]
    torch.testing.assert_close(
        layer.frobenius_penalty(), layer.factors[0].norm() + layer.out.norm()
    )


def test_penalty_is_differentiable_at_zero():
    layer = nn.CPFusion((6, 5), 8, rank=3)
    with torch.no_grad():
        layer.out.zero_()
    layer.frobenius_penalty().backward()
    assert torch.equal(layer.out.grad, torch.zeros_like(layer.out))
    assert layer.factors[0].grad.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.make_fusion("sum", (2, 3), 4), "fusion 'sum': expected one of 'cp', 'tucker'"),
        (lambda: nn.CPFusion((2,), 4), r"dims=\(2,\): expected the sizes of at least 2 views"),
        (lambda: nn.CPFusion((2, 3), 4, rank=0), "rank: expected sizes of at least 1"),
        (lambda: nn.CPFusion((2, 3), 0), "out_features: expected sizes"),
        (lambda: nn.TuckerFusion((2, 3), 4, ranks=(2, 2)), r"ranks=\(2, 2\): expected 3 numbers"),
        (lambda: nn.CPFusion((2, 3), 4, kernels="fast"), "kernels='fast'"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_state_dict_round_trip():
    first, second = nn.TuckerFusion((6, 5), 8), nn.TuckerFusion((6, 5), 8)
    second.load_state_dict(first.state_dict())
    views = torch.randn(2, 6), torch.randn(2, 5)
    assert torch.equal(first(views), second(views))
    assert set(first.state_dict()) == {"core", "out", "factors.0", "factors.1"}
