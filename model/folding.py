"""Inference: batch normalisation folded into the convolutions, the fusion's last factor into the
first layer. The same function with fewer multiplications and no statistics."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.generator import Generator
from model.talking_face import TalkingFace
from polyfusion.kernels.layout import per_clip
from polyfusion.nn import NormActivation, SkipConvBlock, UpConvBlock
from polyfusion.ops.conv import conv_method, convolve


@torch.no_grad()
def fold(model: TalkingFace) -> TalkingFace:
    """A copy of ``model`` for inference, equal to it in evaluation mode up to rounding.

    A₁ of CP, U of CMF and U₁ of Tucker are multiplied into the generator's first layer, so that the
    fusion returns its k (or k₁) hidden values; dense fusion and concatenation stay as they are.
    """
    folded = copy.deepcopy(model).requires_grad_(False)
    fusion: Any = folded.fusion
    generator = folded.generator
    if not isinstance(generator, Generator):
        raise ValueError("model: already folded")
    weight = generator.first.weight.permute(0, 2, 3, 1).flatten(1)  # (c, h·w·C)
    bias = weight.new_zeros(weight.shape[1])
    out = getattr(fusion, "out", None)
    if out is not None:
        m = fusion.out_features
        if getattr(fusion, "bias", None) is not None:
            bias = fusion.bias @ weight[:m]
            fusion.bias = nn.Parameter(torch.zeros_like(out[0]), requires_grad=False)
        weight = torch.cat([out.T @ weight[:m], weight[m:]])
        fusion.out = nn.Parameter(torch.eye(out.shape[1]).to(out), requires_grad=False)
        fusion.out_features = out.shape[1]
    folded.generator = FoldedGenerator(generator, weight, bias)
    return folded.eval()


class FoldedGenerator(nn.Module):
    """:class:`Generator` in evaluation mode, without its batch normalisations.

    Args:
        generator: what to fold.
        weight: (c, h·w·C), the first layer's, possibly with the fusion's last factor in it.
        bias: (h·w·C,), likewise.
    """

    def __init__(self, generator: Generator, weight: Tensor, bias: Tensor):
        super().__init__()
        channels, *self.size = generator.first.weight.shape[1:]
        pixels = weight.shape[1] // channels
        scale, shift = (x.repeat(pixels) for x in _affine(generator.first.norm))
        self.first_weight = _frozen((weight * scale).T)
        self.first_bias = _frozen(bias * scale + shift)
        blocks = zip(generator.skip_convs, generator.up_convs, strict=True)
        self.stages = nn.ModuleList(
            _FoldedStage(skip_conv, up_conv) for skip_conv, up_conv in blocks
        )
        self.final = generator.final

    def forward(self, z: Tensor, skips: list[Tensor]) -> Tensor:
        """z (B, T, c), skips finest first → frames (B, T, 3, H, W)."""
        x = F.linear(z.flatten(0, 1), self.first_weight, self.first_bias)
        x = x.relu_().unflatten(1, (*self.size, -1)).permute(0, 3, 1, 2)  # channels last in memory
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = stage(x, skip)
        return self.final(x).unflatten(0, z.shape[:2])


class _FoldedStage(nn.Module):
    """A skip convolution block and an up-convolution block, folded."""

    def __init__(self, skip_conv: nn.Module, up_conv: nn.Module):
        super().__init__()
        assert isinstance(skip_conv, SkipConvBlock)
        assert isinstance(up_conv, UpConvBlock)
        scale, shift = _affine(skip_conv.norm)
        self.weight_x = _frozen(skip_conv.weight_x * scale.view(-1, 1, 1, 1))
        self.weight_skip = _frozen(skip_conv.weight_skip * scale.view(-1, 1, 1, 1))
        self.bias_skip = _frozen(shift.view(-1, 1, 1))
        scale, shift = _affine(up_conv.norm)
        self.weight_up = _frozen(up_conv.weight * scale.view(-1, 1, 1))
        self.bias_up = _frozen(shift.view(-1, 1, 1))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        s = _convolve(skip, self.weight_skip, 1, False) + self.bias_skip  # once per clip
        u = _convolve(x, self.weight_x, 1, False)
        per_clip(u, len(s)).add_(s.unsqueeze(1))
        return _convolve(u.relu_(), self.weight_up, 2, True).add_(self.bias_up).relu_()


def _convolve(x: Tensor, weight: Tensor, stride: int, up: bool) -> Tensor:
    """As the generator's blocks do."""
    method = conv_method(x.shape[-2:].numel(), weight, None, "eager")
    return convolve(x, weight, stride, 1, up, method)


def _affine(norm: NormActivation) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch normalisation in evaluation mode."""
    mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * (var + norm.eps).rsqrt()
    return scale, norm.bias - mean * scale


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
