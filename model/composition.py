"""How the generator's last maps and the still become a frame.

The published generator draws every pixel. On people it has never seen it does better to keep what
the still shows and to draw what moves: ``mask`` blends a drawing with the still, and ``warp`` moves
the still's pixels first, so that lips and jaw travel with their own texture and only what the still
does not show (teeth, the inside of the mouth, eyelids) has to be drawn.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Maps that the last layer makes for each way: colours, a mask, and a displacement (x, y).
COMPOSITIONS = {"direct": 3, "mask": 4, "warp": 6}
#: Blending weight of a last layer that says 0, and of one that says 1: sigmoid(SLOPE · m + OFFSET).
SLOPE, OFFSET = 4.0, -2.0
#: Pixels over which a displacement is averaged: neighbours move together, texture is not torn.
SMOOTH = 4
#: Largest displacement, as a share of the frame's height and width. Lips move by less than 10 %.
REACH = 0.06


class Composition(nn.Module):
    """Still (B, 3, H, W) and maps (B, T, C, H, W) in (−1, 1) → frames (B, T, 3, H, W) in [−1, 1].

    With colours c, mask m and displacement d: ``direct`` is c; ``mask`` is s + σ(m) (c − s), s the
    still; ``warp`` is the same with s the still at x + d, sampled bilinearly. The mask starts at
    12 % and never reaches 0: one that closed too early can open again.

    Args:
        kind: one of :data:`COMPOSITIONS`.
    """

    def __init__(self, kind: str):
        super().__init__()
        if kind not in COMPOSITIONS:
            names = ", ".join(map(repr, COMPOSITIONS))
            raise ValueError(f"composition {kind!r}: expected one of {names}")
        self.kind = kind
        #: In training the mean of the last mask, the share of the frames that was drawn.
        self.drawn: Tensor | None = None

    @property
    def channels(self) -> int:
        """Maps that the generator's last layer has to make."""
        return COMPOSITIONS[self.kind]

    def forward(self, still: Tensor, maps: Tensor) -> Tensor:
        if self.kind == "direct":
            return maps
        colours, mask = maps[:, :, :3], torch.sigmoid(SLOPE * maps[:, :, 3:4] + OFFSET)
        self.drawn = mask.mean() if self.training else None
        shown = still.unsqueeze(1)
        if self.kind == "warp":
            shown = displace(still, REACH * _smooth(maps[:, :, 4:6]))
        return shown + mask * (colours - shown)


def _smooth(maps: Tensor) -> Tensor:
    """Maps (B, T, C, H, W) averaged over squares and interpolated between these."""
    small = F.avg_pool2d(maps.flatten(0, 1), SMOOTH)
    large = F.interpolate(small, maps.shape[-2:], mode="bilinear", align_corners=False)
    return large.unflatten(0, maps.shape[:2])


def displace(still: Tensor, displacement: Tensor) -> Tensor:
    """The still (B, 3, H, W) seen at x + d: (B, T, 3, H, W), the border's colour beyond it.

    ``displacement`` (B, T, 2, H, W) is (x, y) in shares of the width and height. float32 inside:
    half precision cannot place a pixel.
    """
    frames, height, width = (displacement.shape[i] for i in (1, 3, 4))
    like: Any = {"device": still.device, "dtype": torch.float32}
    y = (torch.arange(height, **like) + 0.5) / height
    x = (torch.arange(width, **like) + 0.5) / width
    at = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (H, W, 2), 0 to 1
    grid = 2 * (at + displacement.float().permute(0, 1, 3, 4, 2)) - 1
    # The frames of a clip lie one below the other in one tall picture, so no still is repeated.
    sampled = F.grid_sample(
        still.float(), grid.flatten(1, 2), padding_mode="border", align_corners=False
    )
    return sampled.unflatten(2, (frames, height)).transpose(1, 2).to(still.dtype)
