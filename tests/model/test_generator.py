"""The full generator: Triton kernels, eager operators and the published concatenation agree."""

import copy

import pytest
import torch

from model import ModelConfig
from model.generator import Generator
from polyfusion.nn import merge_skip_weight
from polyfusion.ops.reference import generator_reference
from tests.library.helpers import relative_error

SIZES = {
    "shallow": (ModelConfig(height=8, width=12, depth=2, base_channels=6), 2, 3),
    "deep": (ModelConfig(height=32, width=24, depth=3, base_channels=5), 2, 2),
}
FEATURES = 9


def norm_of(block):
    """Weight and bias, and in evaluation what it normalises with."""
    statistics = [] if block.norm.training else [block.norm.running_mean, block.norm.running_var]
    return [block.norm.weight, block.norm.bias, *statistics]


def published(generator, z, skips):
    """The naive formulation on the generator's own parameters: repeated and concatenated skips."""
    stages = [
        (
            [merge_skip_weight(skip_conv.weight_x, skip_conv.weight_skip), *norm_of(skip_conv)],
            [up_conv.weight, *norm_of(up_conv)],
        )
        for skip_conv, up_conv in zip(generator.skip_convs, generator.up_convs, strict=True)
    ]
    first = [generator.first.weight, *norm_of(generator.first)]
    video = generator_reference(z.flatten(0, 1), skips[::-1], first, stages, generator.final.weight)
    return video.unflatten(0, z.shape[:2])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("size", SIZES)
def test_triton_equals_eager_and_the_published_form(size, training):
    """Output, and the gradient of every parameter and input, within 1e-4 in float32."""
    torch.manual_seed(0)
    config, clips, frames = SIZES[size]
    eager = Generator(config, FEATURES, "eager")
    for name, parameter in eager.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    for name, buffer in eager.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0) if "var" in name else buffer.normal_(0.0, 0.3)
    eager.train(training)
    triton, plain = copy.deepcopy(eager), copy.deepcopy(eager).double()
    for block in triton.modules():
        if hasattr(block, "kernels"):
            block.kernels = "triton"

    shapes = [
        (clips, c, config.height >> (i + 1), config.width >> (i + 1))
        for i, c in enumerate(config.channels(config.base_channels))
    ][1:]
    inputs = [torch.randn(clips, frames, FEATURES), *(torch.randn(shape) for shape in shapes)]
    cotangent = torch.randn(clips, frames, 3, config.height, config.width)

    def results(module, form=None):
        dtype = next(module.parameters()).dtype
        leaves = [x.to(dtype).requires_grad_() for x in map(torch.clone, inputs)]
        video = form(module, leaves[0], leaves[1:]) if form else module(leaves[0], leaves[1:])
        names = ["z", *("skip" for _ in shapes), *(name for name, _ in module.named_parameters())]
        grads = torch.autograd.grad(video, [*leaves, *module.parameters()], cotangent.to(dtype))
        return {"video": video} | {
            f"{n} {i}": g for i, (n, g) in enumerate(zip(names, grads, strict=True))
        }

    expected, by_eager, by_triton = results(plain, published), results(eager), results(triton)
    assert len(expected) == 2 + len(shapes) + len(list(eager.parameters()))
    for name, right in expected.items():
        assert right.abs().sum() > 0, name
        assert relative_error(by_eager[name], right) < 1e-4, name
        assert relative_error(by_triton[name], right) < 1e-4, name
        assert relative_error(by_triton[name], by_eager[name]) < 1e-4, name
    for (name, mine), other in zip(triton.named_buffers(), eager.buffers(), strict=True):
        assert torch.allclose(mine.float(), other.float(), atol=1e-5), name
