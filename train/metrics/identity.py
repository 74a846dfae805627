"""ACD, average content distance: does the face in the video stay who it is in the still?

The authors (IJCV 2019) take the Euclidean distance between OpenFace (Amos et al., 2016) features of
the still and of every generated frame; MoCoGAN (CVPR 2018) the distance between all pairs of
frames. Any embedder can be plugged in; ``python -m train.embedder`` makes one without downloads.

Traps. Compare within one embedder only. The magnitudes in the paper (1e-4) cannot be plain
distances of OpenFace's 128-d unit vectors: some normalisation is unreported, perhaps that of
``acd_squared`` below. A frozen picture has the best ACD of all, so read it beside the other
metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.metrics.score import MetricError, Score, check_frames
from train.metrics.weights import freeze, load_network

Embedder = Callable[[Tensor], Tensor]  # (N, 3, H, W) uint8 RGB, aligned, to (N, E)

OURS = "our identity embedder"
TRAIN_COMMAND = "python -m train.embedder --out FILE"
BATCH = 64


@torch.no_grad()
def identity_scores(embed: Embedder, still: Tensor, frames: Tensor) -> dict[str, Score]:
    """ACD of one video, in three definitions.

    Args:
        embed: turns aligned pictures into features.
        still: (3, H, W) uint8, the picture that the video was made from.
        frames: (T, 3, H, W) uint8, generated; T > 1 for the pairwise distance.

    Returns: ``acd``, mean L2 distance to the still's features; ``acd_squared``, mean squared
        distance over the number of features E (of 128-d unit vectors: between 0 and 4/128);
        ``acd_pairwise``, mean L2 distance between the features of two different frames.
    """
    frames = check_frames(frames)
    if len(frames) != 1:
        raise MetricError(f"identity_scores takes one clip, got {len(frames)}")
    if still.shape != frames.shape[2:]:
        raise MetricError(
            f"still of {tuple(still.shape)} and frames of {tuple(frames.shape[2:])}: expected one "
            "size"
        )
    pictures = torch.cat([check_frames(still[None], "still")[0], frames[0]])
    features = torch.cat([embed(part) for part in pictures.split(BATCH)]).double()
    if features.ndim != 2 or len(features) != len(pictures):
        raise MetricError(
            f"embedder: expected ({len(pictures)}, E) features, got {tuple(features.shape)}"
        )
    anchor, shown = features[0], features[1:]
    distance = (shown - anchor).norm(dim=1)
    pairwise = Score(None, "one frame has no pairs")
    if len(shown) > 1:
        pairwise = Score.of(torch.pdist(shown).mean())
    return {
        "acd": Score.of(distance.mean()),
        "acd_squared": Score.of(distance.square().mean() / features.shape[1]),
        "acd_pairwise": pairwise,
    }


class OurEmbedder(nn.Module):
    """Aligned pictures (N, 3, H, W) uint8 to unit vectors (N, 128); a small convolutional network.

    Pictures are reduced to 64 x 48 and their corners, where the backdrop is, are left out.
    """

    title = OURS
    height, width, dim = 64, 48, 128
    oval: Tensor

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        layers: list[nn.Module] = []
        for i, o in pairwise(widths):
            layers += [nn.Conv2d(i, o, 3, 2, 1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.project = nn.Linear(widths[-1] * (self.height // 16) * (self.width // 16), self.dim)
        y = torch.linspace(-1, 1, self.height)[:, None]
        x = torch.linspace(-1, 1, self.width)
        self.register_buffer("oval", (x**2 + (0.9 * y - 0.1) ** 2 < 0.95).float())

    def reduce(self, pictures: Tensor) -> Tensor:
        """(N, 3, 64, 48) float in [-1, 1] from uint8 of any size."""
        pictures = pictures.float() / 127.5 - 1
        if pictures.shape[-2:] == (self.height, self.width):
            return pictures
        size = (self.height, self.width)
        return F.interpolate(pictures, size, mode="bilinear", antialias=True)

    def embed(self, reduced: Tensor) -> Tensor:
        """Unit vectors (N, 128) of what ``reduce`` returns."""
        return F.normalize(self.project(self.features(reduced * self.oval)), dim=1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.embed(self.reduce(pictures))


def load_embedder(path: Path | str, device: torch.device | str = "cpu") -> OurEmbedder:
    """The network that ``python -m train.embedder`` wrote; MetricError if it is not one."""
    network = OurEmbedder()
    load_network(Path(path), OURS, network, TRAIN_COMMAND)
    freeze(network, device)
    return network
