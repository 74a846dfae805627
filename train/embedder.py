"""Train our identity embedder, which measures ACD without any download.

    python -m train.embedder --out embedder.safetensors                  built-in set, minutes
    python -m train.embedder --data PREPARED --out embedder.safetensors

It learns to tell the speakers of the training split apart (additive-margin softmax on unit
vectors: Wang et al., 2018), whatever they say, under changes of light, place and sharpness.
Afterwards it is tested on speakers whom it has never seen.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from train.config import check_sizes
from train.data.prepared import DataError, PreparedSet
from train.device import pick_device
from train.errors import UserError, run
from train.files import as_json
from train.metrics.identity import OURS, OurEmbedder
from train.metrics.weights import claim_file, freeze, save_network
from train.syncnet import data_root, spread

EVERY = 5  # frames between two pictures of a clip: neighbours look the same
UNSEEN_CLIPS = 120  # to test on
SCALE, MARGIN = 16.0, 0.2  # of the softmax on cosines


@dataclass(frozen=True)
class EmbedderConfig:
    """Train the identity embedder that measures ACD.

    Example: python -m train.embedder --data data/grid --out embedder.safetensors
    """

    out: Path
    """File to write the network to (.safetensors)."""
    data: str = "synthetic"
    """Clips to train on: synthetic (the built-in set) or the directory of a prepared set."""
    steps: int = 400
    """Number of training steps."""
    batch_size: int = 64
    """Number of pictures in a step."""
    learning_rate: float = 1e-3
    """Adam's learning rate at the start; it falls to zero along a cosine."""
    limit: int = 4000
    """Greatest number of clips to train on; each takes 0.14 MB of memory."""
    device: str = "auto"
    """Device to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the initialisation, order of the pictures and changes made to them."""

    def __post_init__(self) -> None:
        check_sizes(self, ("steps", "batch_size", "limit"))
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(f"--learning-rate {self.learning_rate}: expected a positive number")


def train_embedder(config: EmbedderConfig) -> dict[str, float]:
    """Train, test on unseen speakers, write ``config.out``; return what the file records.

    ``same`` and ``different`` are mean L2 distances between pictures of one speaker and of two,
    ``equal_error`` the share of pairs confused where both kinds are confused equally often. Raises
    DataError for unsuitable data and UserError for a file that cannot be written.
    """
    device = pick_device(config.device)
    claim_file(config.out)
    root = data_root(config.data)
    unseen = open_unseen(root)
    pictures, labels, _ = load_pictures(PreparedSet(root, "train"), config.limit)
    speakers = len(labels.unique())
    if speakers < 2:
        raise DataError(f"{root}: one speaker in the training split; two are needed to tell apart")
    torch.manual_seed(config.seed)
    network = OurEmbedder().to(device)
    classes = torch.nn.Parameter(torch.randn(speakers, OurEmbedder.dim, device=device))
    optimizer = torch.optim.Adam([*network.parameters(), classes], config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    rng = torch.Generator().manual_seed(config.seed)
    share = 1.0 / labels.bincount()[labels]  # speakers are drawn equally often
    print(
        f"{OURS}: {len(pictures)} pictures of {speakers} speakers of {root}, "
        f"{config.steps} steps on {device}",
        flush=True,
    )
    smoothed = 0.0
    with tqdm(total=config.steps, unit="step", dynamic_ncols=True) as bar:
        for step in range(config.steps):
            chosen = torch.multinomial(share, config.batch_size, True, generator=rng)
            batch = augment(network.reduce(pictures[chosen]), rng).to(device)
            cosine = network.embed(batch) @ F.normalize(classes, dim=1).T
            target = labels[chosen].to(device)
            margin = MARGIN * F.one_hot(target, speakers)
            loss = F.cross_entropy(SCALE * (cosine - margin), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            smoothed += (loss.item() - smoothed) * max(0.05, 1 / (step + 1))
            bar.set_postfix_str(f"loss {smoothed:.2f}")
            bar.update()
    if not math.isfinite(smoothed):
        raise UserError("the loss is not finite; try a smaller --learning-rate")
    freeze(network, device)
    result = verify(network, unseen, device)
    record = as_json(dataclasses.asdict(config))
    save_network(config.out, OURS, network, {**result, "trained_on": str(root), "config": record})
    print(
        f"unseen speakers ({result['speakers']:.0f}): distance {result['same']:.2f} to oneself, "
        f"{result['different']:.2f} to others, equal error rate {result['equal_error']:.1%}\n"
        f"{config.out}"
    )
    return result


def open_unseen(root: Path) -> PreparedSet:
    """The clips of speakers outside the training split; DataError unless they can be told apart."""
    data = PreparedSet(root, None)
    seen = {clip["speaker"] for clip in data.clips if clip["split"] == "train"}
    data.clips = [clip for clip in data.clips if clip["speaker"] not in seen]
    data.speakers = sorted({clip["speaker"] for clip in data.clips})
    if len(data.speakers) < 2:
        raise DataError(f"{root}: expected at least two speakers outside the training split")
    if len(data.clips) == len(data.speakers) and all(c["frames"] <= EVERY for c in data.clips):
        raise DataError(
            f"{root}: one picture of every speaker outside the training split; expected clips of "
            f"more than {EVERY} frames, or several of a speaker"
        )
    return data


def load_pictures(data: PreparedSet, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every fifth picture (N, 3, 64, 48) uint8, with its speaker's and its clip's number (N,)."""
    network = OurEmbedder()
    pictures, labels, clips = [], [], []
    for index in tqdm(spread(len(data), limit), desc="reading", unit="clip", leave=False):
        frames = torch.from_numpy(data.clip(index).frames[::EVERY])
        reduced = (network.reduce(frames) * 127.5 + 127.5).round().clamp(0, 255).byte()
        pictures.append(reduced)
        labels += [data.speakers.index(data.clips[index]["speaker"])] * len(reduced)
        clips += [index] * len(reduced)
    numbers = torch.tensor(labels).unique(return_inverse=True)[1]
    return torch.cat(pictures), numbers, torch.tensor(clips)


def augment(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """Other light, place, side and sharpness for pictures (N, 3, H, W) in [-1, 1]."""
    count = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=rng)

    mirrored = torch.rand(count, 1, 1, 1, generator=rng) < 0.5
    pictures = torch.where(mirrored, pictures.flip(3), pictures)
    soft = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    pictures = torch.lerp(pictures, soft, uniform(0, 1, 1, 1, 1))
    grid = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(pictures.shape), False)
    zoom = uniform(0.95, 1.05, 1, 1, 1)
    moved = zoom * grid + uniform(-0.06, 0.06, 1, 1, 2)
    pictures = F.grid_sample(pictures, moved, padding_mode="border", align_corners=False)
    pictures = pictures * uniform(0.85, 1.15, 1, 1, 1) * uniform(0.95, 1.05, 3, 1, 1)
    return pictures + uniform(-0.15, 0.15, 1, 1, 1)


@torch.no_grad()
def verify(network: OurEmbedder, unseen: PreparedSet, device: torch.device) -> dict[str, float]:
    """Distances within and between speakers who are not in the training split.

    Pairs of one speaker come from different clips where there are any.
    """
    pictures, labels, clips = load_pictures(unseen, UNSEEN_CLIPS)
    features = torch.cat([network(part.to(device)) for part in pictures.split(256)]).cpu()
    distance = torch.cdist(features, features)
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    distance = distance[first, second]
    alike, apart = labels[first] == labels[second], clips[first] != clips[second]
    same = distance[alike & apart] if (alike & apart).any() else distance[alike]
    different = distance[~alike]
    thresholds = torch.linspace(0, 2, 401)
    missed = 1 - torch.searchsorted(same.sort().values, thresholds) / len(same)
    confused = torch.searchsorted(different.sort().values, thresholds) / len(different)
    crossing = int((missed - confused).abs().argmin())
    return {
        "same": float(same.mean()),
        "different": float(different.mean()),
        "equal_error": float(0.5 * (missed + confused)[crossing]),
        "speakers": float(len(labels.unique())),
    }


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    return run(lambda: train_embedder(tyro.cli(EmbedderConfig, prog="python -m train.embedder")))


if __name__ == "__main__":
    sys.exit(main())
