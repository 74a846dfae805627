"""Inference: batch normalisation folded into the convolutions, the fusion's last factor into the
first layer. The same function with fewer multiplications and no statistics."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.generator import Generator
from model.packed import PackedConv
from model.talking_face import TalkingFace
from polyfusion.kernels.layout import per_clip
from polyfusion.nn import NormActivation


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
    folded.identity = FoldedIdentity(folded.identity, generator)  # type: ignore[assignment]
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
        self.skip_convs, self.up_convs = nn.ModuleList(), nn.ModuleList()
        block: Any
        for block in generator.skip_convs:
            scale, _shift = _affine(block.norm)  # the shift is the skip's
            weight = block.weight_x * scale.view(-1, 1, 1, 1)
            self.skip_convs.append(PackedConv(weight, None))
        for block in generator.up_convs:
            scale, shift = _affine(block.norm)
            weight = block.weight * scale.view(-1, 1, 1)
            self.up_convs.append(PackedConv(weight, shift, stride=2, up=True, relu=True))
        self.final = generator.final

    def forward(self, z: Tensor, skips: list[Tensor]) -> Tensor:
        """z (B, T, c), what :class:`FoldedIdentity` gives for skips → frames (B, T, 3, H, W)."""
        x = F.linear(z.flatten(0, 1), self.first_weight, self.first_bias)
        x = x.relu_().unflatten(1, (*self.size, -1)).permute(0, 3, 1, 2)  # channels last in memory
        for skip_conv, up_conv, skip in zip(
            self.skip_convs, self.up_convs, reversed(skips), strict=True
        ):
            u = skip_conv(x)
            per_clip(u, len(skip)).add_(skip.unsqueeze(1))
            x = up_conv(u.relu_())
        return self.final(x).unflatten(0, z.shape[:2])


class FoldedIdentity(nn.Module):
    """The identity encoder, whose skips are convolved as the generator does it, with their biases.

    So they are convolved once per still, however many times the generator is called for it.
    """

    def __init__(self, encoder: nn.Module, generator: Generator):
        super().__init__()
        self.encoder = encoder
        head: Any = encoder.head  # lies as its maps do, or it is laid out so in every call
        head.weight.data = head.weight.data.contiguous(memory_format=torch.channels_last)
        self.skip_convs = nn.ModuleList()
        block: Any
        for block in reversed(generator.skip_convs):
            scale, shift = _affine(block.norm)
            weight = block.weight_skip * scale.view(-1, 1, 1, 1)
            self.skip_convs.append(PackedConv(weight, shift))

    def forward(self, still: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Still (B, 3, H, W) → z_d (B, d) and what the generator adds to its maps, finest first."""
        code, skips = self.encoder(still)
        return code, [conv(skip) for conv, skip in zip(self.skip_convs, skips, strict=True)]


def _affine(norm: NormActivation) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) of a batch normalisation in evaluation mode."""
    mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    scale = norm.weight * (var + norm.eps).rsqrt()
    return scale, norm.bias - mean * scale


def _frozen(x: Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)
