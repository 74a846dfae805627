"""Train our SyncNet, which measures AV offset and confidence without any download.

    python -m train.syncnet --out syncnet.safetensors                    built-in set, minutes
    python -m train.syncnet --data PREPARED --out syncnet.safetensors

For every window of five frames the network has to find its sound among those of the same clip
(multi-way matching: Chung, Chung, Kang, "Perfect match", ICASSP 2019), so that neither the face
nor the voice helps. Afterwards the clips of the other splits are shifted by known amounts and the
network has to find them.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from train.config import PRESETS, check_sizes
from train.data.prepared import DataError, PreparedSet
from train.device import pick_device
from train.errors import UserError, run
from train.files import as_json
from train.metrics.mfcc import mfcc
from train.metrics.sync import FPS, MIN_FRAMES, SAMPLE_RATE, SHIFT, STRIDE, sync_scores
from train.metrics.syncnet import OURS, OurSyncNet, mfcc_windows
from train.metrics.weights import claim_file, freeze, save_network
from train.source import find_data

MARGIN = 10  # frames cut off both ends of a held-out clip, the greatest shift tried


@dataclass(frozen=True)
class SyncNetConfig:
    """Train the SyncNet that measures AV offset and confidence.

    Example: python -m train.syncnet --data data/grid --out syncnet.safetensors
    """

    out: Path
    """File to write the network to (.safetensors)."""
    data: str = "synthetic"
    """Clips to train on: synthetic (the built-in set) or the directory of a prepared set of
    25 frames/s and 16 kHz."""
    steps: int = 400
    """Number of training steps."""
    batch_size: int = 8
    """Number of clips in a step."""
    windows: int = 32
    """Number of consecutive windows of a clip among whose sounds each has to find its own."""
    learning_rate: float = 1e-3
    """Adam's learning rate at the start; it falls to zero along a cosine."""
    limit: int = 2000
    """Greatest number of clips to train on; each takes 0.5 MB of memory."""
    held_out: int = 60
    """Greatest number of clips of other splits to test on."""
    device: str = "auto"
    """Device to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    seed: int = 0
    """Seed of the initialisation, clip order, crops and test shifts."""

    def __post_init__(self) -> None:
        check_sizes(self, ("steps", "batch_size", "limit", "held_out"))
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(f"--learning-rate {self.learning_rate}: expected a positive number")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: expected 0 or more")
        if self.windows < SHIFT:
            raise UserError(f"--windows {self.windows}: expected at least {SHIFT}")


def train_syncnet(config: SyncNetConfig) -> dict[str, float]:
    """Train, test on held-out clips, write ``config.out``; return what the file records.

    ``found`` is the share of held-out clips whose known shift was found exactly, ``within_one``
    that found to a frame. Raises DataError for unsuitable data and UserError for a file that cannot
    be written.
    """
    device = pick_device(config.device)
    claim_file(config.out)
    root = data_root(config.data)
    held_out = load_held_out(root, config.held_out)
    clips = load_clips(root, config.windows, config.limit)
    torch.manual_seed(config.seed)
    network = OurSyncNet().to(device)
    optimizer = torch.optim.Adam(network.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    rng = np.random.default_rng(config.seed)
    print(f"{OURS}: {len(clips)} clips of {root}, {config.steps} steps on {device}", flush=True)
    smoothed = math.log(config.windows)
    with tqdm(total=config.steps, unit="step", dynamic_ncols=True) as bar:
        for _ in range(config.steps):
            chosen = rng.choice(
                len(clips), config.batch_size, replace=len(clips) < config.batch_size
            )
            pictures, sounds = draw_windows([clips[i] for i in chosen], config.windows, rng)
            loss = matching_loss(network, pictures.to(device), sounds.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            smoothed += 0.05 * (loss.item() - smoothed)
            bar.set_postfix_str(f"loss {smoothed:.2f}")
            bar.update()
    if not math.isfinite(smoothed):
        raise UserError("the loss is not finite; try a smaller --learning-rate")
    freeze(network, device)
    result = find_shifts(network, held_out, config.seed, device)
    record = as_json(dataclasses.asdict(config))
    save_network(config.out, OURS, network, {**result, "trained_on": str(root), "config": record})
    print(
        f"held out: the shift of {result['found']:.0%} of {result['clips']:.0f} clips found "
        f"exactly, {result['within_one']:.0%} to a frame; "
        f"mean confidence {result['confidence']:.2f}\n{config.out}"
    )
    return result


def data_root(data: str) -> Path:
    """The directory of a prepared set; ``synthetic`` renders or finds a built-in one of many faces.

    The demo's own has two speakers, in every split: nobody would be left who is unseen.
    """
    if data != "synthetic":
        return Path(data)
    return find_data(
        dataclasses.replace(PRESETS["demo"], synthetic_clips=240, synthetic_speakers=120)
    )


def open_split(root: Path, split: str | None) -> PreparedSet:
    """A split whose rates are SyncNet's; DataError otherwise."""
    data = PreparedSet(root, split)
    if (data.fps, data.sample_rate) != (FPS, SAMPLE_RATE):
        raise DataError(
            f"{root} has {data.fps:g} fps and {data.sample_rate} Hz, SyncNet needs {FPS:g} and "
            f"{SAMPLE_RATE}; prepare it again with --sample-rate {SAMPLE_RATE}"
        )
    return data


def spread(count: int, limit: int) -> list[int]:
    """Up to ``limit`` of the indices 0 .. count - 1, evenly: sets are ordered by speaker."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(int).tolist()


def load_clips(root: Path, windows: int, limit: int) -> list[tuple[Tensor, Tensor]]:
    """Mouths (T, 32, 48) float16 and MFCC windows (K, 13, 20) of the training clips."""
    data, network = open_split(root, "train"), OurSyncNet()
    clips = []
    for index in tqdm(spread(len(data), limit), desc="reading", unit="clip", leave=False):
        item = data[index]
        if len(item["frames"]) < windows + 5:
            continue
        cepstra = mfcc(np.rint(item["audio"].numpy() * 32768), SAMPLE_RATE)
        sounds = mfcc_windows(network.sounds(torch.from_numpy(cepstra).float()))
        clips.append((network.mouths(item["frames"]).half(), sounds))
    if not clips:
        raise DataError(f"{root}: no training clip of {windows + 5} frames")
    return clips


def draw_windows(
    clips: list[tuple[Tensor, Tensor]], windows: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Pictures (B, n, 5, 32, 48) and sounds (B, n, 13, 20) of n consecutive windows per clip.

    Pictures are shifted by up to two pixels and mirrored at random, as faces are.
    """
    pictures, sounds = [], []
    for mouths, cepstra in clips:
        last = min(len(mouths) - 4, len(cepstra)) - windows
        start = int(rng.integers(last + 1))
        picture = mouths[start : start + windows + 4].float()
        if rng.random() < 0.5:
            picture = picture.flip(2)
        down, right = rng.integers(-2, 3, 2)
        padded = F.pad(picture[None], (2, 2, 2, 2), mode="replicate")[0]
        height, width = picture.shape[1:]
        picture = padded[:, 2 + down : 2 + down + height, 2 + right : 2 + right + width]
        pictures.append(picture.unfold(0, 5, 1).permute(0, 3, 1, 2))
        sounds.append(cepstra[start : start + windows])
    return torch.stack(pictures), torch.stack(sounds)


def matching_loss(network: OurSyncNet, pictures: Tensor, sounds: Tensor) -> Tensor:
    """Cross-entropy of finding the right sound by distance, and the right picture, in each clip."""
    clips, windows = pictures.shape[:2]
    lips = network.lips(pictures.flatten(0, 1)).unflatten(0, (clips, windows))
    voice = network.audio(sounds.flatten(0, 1)).unflatten(0, (clips, windows))
    logits = -torch.cdist(lips, voice)  # (B, n, n)
    target = torch.arange(windows, device=logits.device).expand(clips, -1)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target))


def shifted(frames: Tensor, audio: np.ndarray, shift: int) -> tuple[Tensor, np.ndarray]:
    """The inner part of a clip with its sound ``shift`` frames early (negative: late).

    MARGIN frames are cut off both ends, so that real sound fills the whole clip.
    """
    stop = len(frames) - MARGIN
    sound = audio[(MARGIN + shift) * STRIDE : (stop + shift) * STRIDE]
    return frames[MARGIN:stop], sound


def load_held_out(root: Path, limit: int) -> list[tuple[Tensor, np.ndarray]]:
    """Frames (T, 3, H, W) uint8 and audio (N,) of clips that are not of the training split."""
    data = open_split(root, None)
    enough = 2 * MARGIN + MIN_FRAMES
    data.clips = [c for c in data.clips if c["split"] != "train" and c["frames"] >= enough]
    if not data.clips:
        raise DataError(f"{root}: no clip of {enough} frames outside the training split to test on")
    items = (data[index] for index in spread(len(data), limit))
    return [(item["frames"], item["audio"].numpy()) for item in items]


def find_shifts(
    network: OurSyncNet,
    clips: list[tuple[Tensor, np.ndarray]],
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Shift the sound of clips by -10 .. 10 frames and look for it."""
    rng = np.random.default_rng([seed, 1])
    errors, confidences = [], []
    for whole, sound in clips:
        shift = int(rng.integers(-MARGIN, MARGIN + 1))
        frames, audio = shifted(whole, sound, shift)
        scores = sync_scores(
            network, frames.to(device), audio, fps=FPS, sample_rate=SAMPLE_RATE, masked=True
        )
        offset, confidence = scores["av_offset"].value, scores["av_confidence"].value
        if offset is not None and confidence is not None:
            errors.append(abs(offset - shift))
            confidences.append(confidence)
    if not errors:
        raise DataError("the clips outside the training split are silent")
    return {
        "found": float(np.mean(np.equal(errors, 0))),
        "within_one": float(np.mean(np.less_equal(errors, 1))),
        "confidence": float(np.mean(confidences)),
        "clips": float(len(errors)),
    }


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    return run(lambda: train_syncnet(tyro.cli(SyncNetConfig, prog="python -m train.syncnet")))


if __name__ == "__main__":
    sys.exit(main())
