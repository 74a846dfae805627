"""Inference: batch normalisation folded into the convolutions, the fusion's last factor into the
first layer. The same function with fewer multiplications and no statistics."""

import copy

import torch
from torch import Tensor, nn

from model.generator import Generator
from model.talking_face import TalkingFace
from polyfusion.nn import NormActivation


@torch.no_grad()
def fold(model: TalkingFace) -> TalkingFace:
    """A copy of ``model`` for inference, equal to it in evaluation mode up to rounding.

    A₁ of CP, U of CMF and U₁ of Tucker are multiplied into the generator's first layer, so that the
    fusion returns its k (or k₁) hidden values; dense fusion and concatenation stay as they are.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    fusion = folded.fusion
    weight = folded.generator.first.weight.flatten(1)  # (c, C·h·w)
    bias = weight.new_zeros(weight.shape[1])
    out = getattr(fusion, "out", None)
    if out is not None:
        m = fusion.out_features
        if hasattr(fusion, "bias"):
            bias = fusion.bias @ weight[:m]
            fusion.bias = nn.Parameter(torch.zeros_like(out[0]), requires_grad=False)
        weight = torch.cat([out.T @ weight[:m], weight[m:]])
        fusion.out = nn.Parameter(torch.eye(out.shape[1]).to(out), requires_grad=False)
        fusion.out_features = out.shape[1]
    folded.generator = FoldedGenerator(folded.generator, weight, bias)
    return folded


class FoldedGenerator(nn.Module):
    """:class:`Generator` in evaluation mode, without its batch normalisations.

    Args:
        generator: what to fold.
        weight: (c, C·h·w), the first layer's, possibly with the fusion's last factor in it.
        bias: (C·h·w,), likewise.
    """

    def __init__(self, generator: Generator, weight: Tensor, bias: Tensor):
        super().__init__()
        self.size = generator.first.weight.shape[1:]  # (C, h, w)
        scale, shift = (
            x.repeat_interleave(self.size[1:].numel()) for x in _affine(generator.first)
        )
        self.first = nn.Linear(*weight.shape, device="meta")
        self.first.weight = _frozen((weight * scale).T)
        self.first.bias = _frozen(bias * scale + shift)
        self.convs, self.skip_convs, self.up_convs = (nn.ModuleList() for _ in range(3))
        for block in generator.skip_convs:
            scale, shift = _affine(block)
            self.convs.append(_conv(nn.Conv2d, block.weight_x * _rows(scale), None))
            self.skip_convs.append(_conv(nn.Conv2d, block.weight_skip * _rows(scale), shift))
        for block in generator.up_convs:
            scale, shift = _affine(block)
            self.up_convs.append(_conv(nn.ConvTranspose2d, block.weight * _maps(scale), shift))
        self.final = generator.final

    def forward(self, z: Tensor, skips: list[Tensor]) -> Tensor:
        """z (B, T, c), skips finest first → frames (B, T, 3, H, W)."""
        clips = z.shape[:2]
        x = self.first(z.flatten(0, 1)).relu_().unflatten(1, self.size)
        for conv, skip_conv, up_conv, skip in zip(
            self.convs, self.skip_convs, self.up_convs, reversed(skips), strict=True
        ):
            u = conv(x).unflatten(0, clips)
            u += skip_conv(skip).unsqueeze(1)  # once per clip
            x = up_conv(u.relu_().flatten(0, 1)).relu_()
        return self.final(x).unflatten(0, clips)


def _affine(block: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a block's batch normalisation in evaluation mode."""
    norm = block.norm
    assert isinstance(norm, NormActivation)
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _conv(kind: type, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A 3×3 convolution or a 4×4 stride-2 transposed one with these parameters."""
    stride = 2 if kind is nn.ConvTranspose2d else 1
    conv = kind(1, 1, weight.shape[-1], stride, 1, bias=bias is not None, device="meta")
    conv.in_channels, conv.out_channels = weight.shape[1], weight.shape[0]
    if kind is nn.ConvTranspose2d:
        conv.in_channels, conv.out_channels = weight.shape[:2]
    conv.weight = _frozen(weight)
    if bias is not None:
        conv.bias = _frozen(bias)
    return conv


def _rows(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1, 1)


def _maps(scale: Tensor) -> Tensor:
    return scale.view(-1, 1, 1)


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
