"""What the fused kernels do not keep for the backward, shown by the CUDA kernels on the host."""

import pytest
import torch

from polyfusion import extension, ops
from polyfusion.build import BuildError
from polyfusion.nn import FinalBlock, SkipConvBlock, UpConvBlock
from polyfusion.ops import recompute
from tests.library.helpers import relative_error


@pytest.fixture(autouse=True, scope="module")
def emulated():
    """CPU tensors are served by the CUDA kernels, as host code."""
    try:
        context = extension.emulation()
        context.__enter__()
    except BuildError as error:
        pytest.skip(f"the kernels cannot be compiled as host code: {error}")
    yield
    context.__exit__(None, None, None)


def test_each_layer_keeps_one_map(monkeypatch):
    """In training a layer keeps what it normalised, and nothing else of that size."""
    blocks = [
        SkipConvBlock(32, kernels="cuda"),
        UpConvBlock(32, 16, kernels="cuda"),
        SkipConvBlock(16, kernels="cuda"),
        FinalBlock(16, kernels="cuda"),
    ]
    x, skips = torch.randn(8, 32, 16, 12), (torch.randn(1, 32, 16, 12), torch.randn(1, 16, 32, 24))
    kept = {}
    monkeypatch.setattr(recompute, "_hooked", lambda: False)  # the hooks below only watch

    def keep(tensor):
        if tensor.numel() > 30_000:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = blocks[2](blocks[1](blocks[0](x, skips[0])), skips[1])
        blocks[3](y)
    small, large = 8 * 32 * 16 * 12, 8 * 16 * 32 * 24
    # x and three times u; the image is kept behind hooks of the last layer's own.
    assert sorted(kept.values()) == [small, small, large, large]


def test_recomputed_activation_outlives_its_own_backward():
    """A second use of an activation can run its backward after the first has freed the layer."""
    norm_source, one, other = (
        SkipConvBlock(4, kernels="cuda"),
        UpConvBlock(4, 2, kernels="cuda"),
        UpConvBlock(4, 3, kernels="cuda"),
    )
    y = norm_source(torch.randn(3, 4, 4, 3), torch.randn(1, 4, 4, 3))
    first, second = one(y), other(y)
    first.sum().backward()
    (gradient,) = torch.autograd.grad(second.square().sum(), other.weight)
    y = y.detach().requires_grad_()
    (expected,) = torch.autograd.grad(other(y).square().sum(), other.weight)
    assert relative_error(gradient, expected) < 1e-5


def activation(channels=4):
    """u, the normalisation's weight, y made of them, and the weight of a layer to follow."""
    u = torch.randn(3, channels, 4, 3, requires_grad=True)
    weight = torch.randn(channels, requires_grad=True)
    y, *_ = ops.norm_activation(u, None, weight, torch.zeros(channels), kernels="cuda")
    return u, weight, y, torch.randn(channels, 2, 4, 4, requires_grad=True)


@pytest.mark.parametrize("changed", [0, 1], ids=["u", "weight"])
def test_a_source_that_changed_is_not_recomputed_from(changed):
    *sources, y, weight = activation()
    result = ops.final_block(y, weight, kernels="cuda")
    with torch.no_grad():
        sources[changed].mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.sum(), weight)


def test_an_activation_that_changed_is_kept_as_it_is():
    *_, y, weight = activation()
    with torch.no_grad():
        y.mul_(2)
    (gradient,) = torch.autograd.grad(ops.final_block(y, weight, kernels="cuda").sum(), weight)
    (expected,) = torch.autograd.grad(
        ops.final_block(y.detach(), weight, kernels="cuda").sum(), weight
    )
    assert relative_error(gradient, expected) < 1e-6


def test_an_activation_can_be_used_after_its_graph_is_freed():
    *_, y, weight = activation()
    y.sum().backward()
    expected = ops.final_block(y.detach(), weight, kernels="cuda")
    with torch.no_grad():
        assert torch.equal(ops.final_block(y, weight, kernels="cuda"), expected)
    assert torch.equal(ops.final_block(y, weight, kernels="cuda"), expected)
