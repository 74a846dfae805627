"""The U-Net generator: joint representation and the still's skips → frames. Spec: IJCV 2019, §3."""

import itertools

from torch import Tensor, nn

from model.composition import COMPOSITIONS
from model.config import ModelConfig
from polyfusion.nn import FinalBlock, FirstBlock, SkipConvBlock, UpConvBlock


class Generator(nn.Module):
    """z (B, T, c) and skips [(B, C_i, H_i, W_i)], finest first → maps (B, T, C, H, W) in [−1, 1].

    The maps are the frames (C = 3), or what :class:`model.composition.Composition` makes them of.

    The skips are constant over a clip: each is convolved once per clip and never repeated.
    """

    def __init__(self, config: ModelConfig, in_dim: int, kernels: str = "auto"):
        super().__init__()
        widths = config.channels(config.base_channels)[::-1]  # coarsest first: 1024, …, 64
        self.first = FirstBlock(in_dim, widths[0], config.bottom, kernels=kernels)
        self.skip_convs = nn.ModuleList(SkipConvBlock(c, kernels=kernels) for c in widths[:-1])
        self.up_convs = nn.ModuleList(
            UpConvBlock(i, o, kernels=kernels) for i, o in itertools.pairwise(widths)
        )
        maps = COMPOSITIONS[config.composition]
        self.final = FinalBlock(widths[-1], maps, kernels=kernels)

    def forward(self, z: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.first(z.flatten(0, 1))  # (B·T, 1024, 4, 3)
        for skip_conv, up_conv, skip in zip(
            self.skip_convs, self.up_convs, reversed(skips), strict=True
        ):
            x = up_conv(skip_conv(x, skip))
        return self.final(x).unflatten(0, z.shape[:2])
