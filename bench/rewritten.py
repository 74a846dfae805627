"""The rewritten form in plain PyTorch: what a GPU's kernels are held against.

Whatever is constant over a clip is computed once per clip, as in our operators, by convolutions and
batch normalisations of PyTorch's own, which cuDNN runs and which ``torch.compile`` sees into. (Our
``kernels="eager"`` is made for a CPU: it saves memory by loops in Python.) Weights are copied from
our modules, so that both compute the same.
"""

import copy

import torch.nn.functional as F
from torch import Tensor, nn

from bench.straightforward import PlainFinal, PlainFirst, PlainNorm, PlainUpConv, plain_copy
from model import TalkingFace


class SharedSkipNorm(PlainNorm):
    """u + s, with s once per clip, batch normalisation, activation."""

    def forward(self, u: Tensor, s: Tensor) -> Tensor:
        return super().forward((u.unflatten(0, (len(s), -1)) + s.unsqueeze(1)).flatten(0, 1))


class SharedSkipConv(nn.Module):
    """3×3 convolution of a frame's map, and of its clip's skip once, then their norm."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.weight_x, self.weight_skip = copy.deepcopy((block.weight_x, block.weight_skip))
        self.norm = SharedSkipNorm(block.norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        u = F.conv2d(x, self.weight_x, padding=1)
        return self.norm(u, F.conv2d(skip, self.weight_skip, padding=1))


class SharedGenerator(nn.Module):
    """The U-Net whose skips are convolved once per clip."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.first = PlainFirst(generator.first)
        self.skip_convs = nn.ModuleList(map(SharedSkipConv, generator.skip_convs))
        self.up_convs = nn.ModuleList(map(PlainUpConv, generator.up_convs))
        self.final = PlainFinal(generator.final)

    def forward(self, z: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.first(z.flatten(0, 1))
        for skip_conv, up_conv, skip in zip(
            self.skip_convs, self.up_convs, reversed(skips), strict=True
        ):
            x = up_conv(skip_conv(x, skip))
        return self.final(x).unflatten(0, z.shape[:2])


def rewritten(model: TalkingFace) -> TalkingFace:
    """A copy of the system with plain modules in it."""
    plain: TalkingFace = plain_copy(model)
    plain.generator = SharedGenerator(model.generator)
    return plain
