"""The peer of the whole system: the same networks as one would write them from the papers.

Plain modules; the identity and every skip map are repeated for each frame and concatenated. Weights
are copied from our modules, so that both compute the same. Their training is in
:mod:`bench.plain_trainer`.
"""

import copy

import torch
from torch import Tensor, nn

from model import TalkingFace
from model.convolution import HalvingConv2d
from polyfusion.nn import CMFFusion, NormActivation, merge_skip_weight
from polyfusion.ops import reference


class PlainNorm(nn.BatchNorm2d):
    """Batch normalisation, then a (leaky) ReLU."""

    def __init__(self, norm: NormActivation):
        super().__init__(norm.channels, norm.eps, norm.momentum)
        self.activation = nn.LeakyReLU(norm.slope) if norm.slope else nn.ReLU()
        self.load_state_dict(norm.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class PlainSkipConv(nn.Sequential):
    """3×3 transposed convolution of the concatenation of a frame's map and its skip."""

    def __init__(self, block: nn.Module):
        c, skip = block.weight_x.shape[0], block.weight_skip.shape[1]
        conv = nn.ConvTranspose2d(c + skip, c, 3, 1, 1, bias=False)
        conv.weight.data.copy_(merge_skip_weight(block.weight_x.data, block.weight_skip.data))
        super().__init__(conv, PlainNorm(block.norm))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        frames = x.shape[0] // skip.shape[0]
        return super().forward(torch.cat([x, skip.repeat_interleave(frames, 0)], 1))


class PlainUpConv(nn.Sequential):
    """Transposed convolution, batch normalisation, ReLU."""

    def __init__(self, block: nn.Module):
        i, o, size, _ = block.weight.shape
        conv = nn.ConvTranspose2d(i, o, size, block.stride, block.padding, bias=False)
        conv.weight.data.copy_(block.weight.data)
        super().__init__(conv, PlainNorm(block.norm))


class PlainFirst(nn.Sequential):
    """z as a map of one pixel, transposed convolution, batch normalisation, ReLU."""

    def __init__(self, block: nn.Module):
        i, o, *size = block.weight.shape
        conv = nn.ConvTranspose2d(i, o, tuple(size), bias=False)
        conv.weight.data.copy_(block.weight.data)
        super().__init__(conv, PlainNorm(block.norm))

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z[:, :, None, None])


class PlainFinal(nn.Sequential):
    """Transposed convolution to an image, tanh."""

    def __init__(self, block: nn.Module):
        i, o, *_ = block.weight.shape
        conv = nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False)
        conv.weight.data.copy_(block.weight.data)
        super().__init__(conv, nn.Tanh())


class PlainGenerator(nn.Module):
    """The U-Net on concatenated skips."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.first = PlainFirst(generator.first)
        self.skip_convs = nn.ModuleList(map(PlainSkipConv, generator.skip_convs))
        self.up_convs = nn.ModuleList(map(PlainUpConv, generator.up_convs))
        self.final = PlainFinal(generator.final)

    def forward(self, z: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.first(z.flatten(0, 1))
        for skip_conv, up_conv, skip in zip(
            self.skip_convs, self.up_convs, reversed(skips), strict=True
        ):
            x = up_conv(skip_conv(x, skip))
        return self.final(x).unflatten(0, z.shape[:2])


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of PyTorch's own modules: every fused normalisation is batch normalisation and an
    activation, every halving convolution is ``Conv2d``."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NormActivation):
                setattr(parent, name, PlainNorm(child))
            if isinstance(child, HalvingConv2d):
                child.__class__ = nn.Conv2d
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()
    return module


def published_fusion(layer: nn.Module, views: list[Tensor], noise: Tensor | None) -> Tensor:
    """The published form of a fusion layer of :mod:`polyfusion.nn`."""
    form = type(layer).__name__
    if form == "CPFusion":
        return reference.cp_fusion_published(views, list(layer.factors), layer.out, noise)
    if form == "TuckerFusion":
        factors = list(layer.factors)
        return reference.tucker_fusion_published(views, layer.core, factors, layer.out, noise)
    if isinstance(layer, CMFFusion):
        second = None if layer.second is None else list(layer.second)
        return reference.cmf_fusion_published(
            views, list(layer.first), second, layer.out, layer.bias, noise
        )
    if form == "DenseFusion":
        return reference.dense_fusion_reference(views, layer.weight, noise)
    return torch.cat([*reference.repeat_frames(views), *([] if noise is None else [noise])], -1)


class PlainTalkingFace(nn.Module):
    """Encoders, published fusion, generator on repeated identity."""

    def __init__(self, model: TalkingFace):
        super().__init__()
        self.identity, self.audio, self.noise, self.fusion = (
            plain_copy(part) for part in (model.identity, model.audio, model.noise, model.fusion)
        )
        self.generator = PlainGenerator(model.generator)

    def forward(
        self,
        still: Tensor,
        audio: Tensor,
        rng: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        speech = self.audio(audio)
        identity, skips = self.identity(still)
        if noise is None:
            noise = self.noise.sample(*speech.shape[:2], rng)
        noise = self.noise(noise.to(speech.dtype))
        return self.generator(published_fusion(self.fusion, [speech, identity], noise), skips)
