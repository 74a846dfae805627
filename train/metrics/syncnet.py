"""The two-stream networks behind AV offset and confidence: the published one and ours.

Both turn five frames and the 0.2 s of sound that go with them into one embedding each; distance
between them is small where lips and sound agree (Chung and Zisserman, "Out of time: automated lip
sync in the wild", ACCV-W 2016). ``train.metrics.sync`` holds the procedure.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.metrics.quality import grey
from train.metrics.score import MetricError
from train.metrics.weights import freeze, load_network, load_state

WINDOW = 5  # frames seen at once, at 25 frames/s
STEPS = 20  # MFCC frames of the same 0.2 s
PER_FRAME = 4  # MFCC frames to a video frame

OURS = "our SyncNet"
PUBLISHED = "SyncNet (syncnet_v2)"
TRAIN_COMMAND = "python -m train.syncnet --out FILE"

# The published pipeline tracks an S3FD face box (centre x, y, half its larger side s) and crops
# rows y - s .. y + 1.8 s and columns x - 1.4 s .. x + 1.4 s. Aligned clips have their face at a
# known place instead: this is where that box lies, in pixels of a 128 x 96 frame.
FACE_X, FACE_Y, FACE_HALF = 48.6, 66.0, 50.0
PADDING = 110  # grey level of what lies outside the frame
INPUT = 224
BATCH = 10  # windows at a time; the first layer's output takes 23 MB each


def _conv(kind: type, norm: type, *args: Any, **options: Any) -> list[nn.Module]:
    return [kind(*args, **options), norm(args[1]), nn.ReLU(inplace=True)]


def _head() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(inplace=True), nn.Linear(512, 1024)
    )


class SyncNet(nn.Module):
    """The architecture and the tensor names of joonson/syncnet_python: 13 631 616 parameters.

    ``embed_video`` bypasses face detection and tracking: it takes aligned frames, pads them with
    grey and resizes the fixed face box to 224 x 224.
    """

    title = PUBLISHED

    def __init__(self) -> None:
        super().__init__()

        def audio(i: int, o: int, kernel: Any = 3, padding: int = 1) -> list[nn.Module]:
            return _conv(nn.Conv2d, nn.BatchNorm2d, i, o, kernel, padding=padding)

        def lips(i: int, o: int, kernel: Any, **options: Any) -> list[nn.Module]:
            return _conv(nn.Conv3d, nn.BatchNorm3d, i, o, kernel, **options)

        inner = {"padding": (0, 1, 1)}
        self.netcnnaud = nn.Sequential(
            *audio(1, 64),
            nn.MaxPool2d(1),  # without effect; the published layers are numbered with it
            *audio(64, 192),
            nn.MaxPool2d(3, (1, 2)),
            *audio(192, 384),
            *audio(384, 256),
            *audio(256, 256),
            nn.MaxPool2d(3, 2),
            *audio(256, 512, (5, 4), 0),
        )
        self.netcnnlip = nn.Sequential(
            *lips(3, 96, (WINDOW, 7, 7), stride=(1, 2, 2)),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *lips(96, 256, (1, 5, 5), stride=(1, 2, 2), **inner),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *lips(256, 256, (1, 3, 3), **inner),
            *lips(256, 256, (1, 3, 3), **inner),
            *lips(256, 256, (1, 3, 3), **inner),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *lips(256, 512, (1, 6, 6)),
        )
        self.netfcaud, self.netfclip = _head(), _head()

    def audio_stream(self, windows: Tensor) -> Tensor:
        """(N, 13, 20) MFCC windows to (N, 1024)."""
        return self.netfcaud(self.netcnnaud(windows.unsqueeze(1)).flatten(1))

    def lip_stream(self, windows: Tensor) -> Tensor:
        """(N, 3, 5, 224, 224) windows, BGR 0..255, to (N, 1024)."""
        return self.netfclip(self.netcnnlip(windows).flatten(1))

    def embed_video(self, frames: Tensor) -> Tensor:
        """(T - 4, 1024) from aligned frames (T, 3, H, W) uint8 RGB of any size."""
        crops = face_crop(frames).flip(1)  # BGR, as OpenCV reads
        windows = crops.unfold(0, WINDOW, 1).permute(0, 1, 4, 2, 3)  # (T - 4, 3, 5, 224, 224)
        return torch.cat([self.lip_stream(part) for part in windows.split(BATCH)])

    def embed_audio(self, cepstra: Tensor) -> Tensor:
        """(K, 1024) from MFCC (M, 13); K = floor((M - 20) / 4) + 1 windows, one per frame."""
        return self.audio_stream(mfcc_windows(cepstra))


def face_crop(frames: Tensor) -> Tensor:
    """(T, 3, 224, 224) float 0..255: the face box of aligned frames (T, 3, H, W) uint8.

    Areas outside the frame are grey 110; bilinear resizing with antialiasing.
    """
    height, width = frames.shape[-2:]
    down, right = height / 128, width / 96
    top, bottom = round((FACE_Y - FACE_HALF) * down), round((FACE_Y + 1.8 * FACE_HALF) * down)
    left, end = (round((FACE_X + side * 1.4 * FACE_HALF) * right) for side in (-1, 1))
    padded = F.pad(
        frames.float(), (-left, end - width, -top, bottom - height), value=PADDING
    )  # negative padding crops
    return F.interpolate(padded, (INPUT, INPUT), mode="bilinear", antialias=True)


def mfcc_windows(cepstra: Tensor) -> Tensor:
    """(K, 13, 20) from MFCC (M, 13), one window per video frame."""
    return cepstra.unfold(0, STEPS, PER_FRAME)


def load_published(path: Path | str, device: torch.device | str = "cpu") -> SyncNet:
    """The published network from its state dict (``syncnet_v2.model``); never unpickles code.

    MetricError if the file is missing or holds another network.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MetricError(f"{path}: no such file; give the path of syncnet_v2.model") from None
    except Exception as error:  # the restricted unpickler raises whatever a bad file leads to
        line = (str(error).splitlines() or ["empty file"])[0][:100]
        raise MetricError(f"{path}: not a PyTorch state dict ({line})") from None
    if not isinstance(state, dict):
        raise MetricError(f"{path}: expected a state dict, found {type(state).__name__}")
    network = SyncNet()
    load_state(network, state, Path(path), PUBLISHED)
    freeze(network, device)
    return network


class OurSyncNet(nn.Module):
    """A small network for the same procedure, which ``python -m train.syncnet`` trains.

    It sees the lower half of the frame in grey, 32 x 48, without the clip's mean picture, and MFCC
    normalised over the clip, so that neither face nor voice but their movement counts.
    """

    title = OURS
    height, width = 32, 48

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        widths = (WINDOW, 32, 64, 96, 128)
        lips: list[nn.Module] = []
        for i, o in pairwise(widths):
            lips += _conv(nn.Conv2d, nn.BatchNorm2d, i, o, 3, stride=2, padding=1)
        self.lips = nn.Sequential(*lips, nn.Flatten(), nn.Linear(128 * 2 * 3, dim))
        self.audio = nn.Sequential(
            *_conv(nn.Conv1d, nn.BatchNorm1d, 13, 64, 3, padding=1),
            *_conv(nn.Conv1d, nn.BatchNorm1d, 64, 64, 3, stride=2, padding=1),
            *_conv(nn.Conv1d, nn.BatchNorm1d, 64, 96, 3, stride=2, padding=1),
            nn.Flatten(),
            nn.Linear(96 * 5, dim),
        )

    def mouths(self, frames: Tensor) -> Tensor:
        """(T, 32, 48) float from aligned frames (T, 3, H, W) uint8: variance 1, mean picture 0."""
        lower = grey(frames[..., frames.shape[-2] // 2 :, :]).float().unsqueeze(1)
        small = F.interpolate(lower, (self.height, self.width), mode="area")[:, 0]
        small = small - small.mean(0)
        return small / small.std().clamp_min(1.0)

    def sounds(self, cepstra: Tensor) -> Tensor:
        """(M, 13) float: MFCC (M, 13) with mean 0 and variance 1 over the clip."""
        centred = cepstra - cepstra.mean(0)
        return centred / centred.std(0).clamp_min(1e-3)

    def embed_video(self, frames: Tensor) -> Tensor:
        """(T - 4, E) from aligned frames (T, 3, H, W) uint8 RGB of any size."""
        return self.lips(self.mouths(frames).unfold(0, WINDOW, 1).permute(0, 3, 1, 2))

    def embed_audio(self, cepstra: Tensor) -> Tensor:
        """(K, E) from MFCC (M, 13)."""
        return self.audio(mfcc_windows(self.sounds(cepstra)))


def load_ours(path: Path | str, device: torch.device | str = "cpu") -> OurSyncNet:
    """The network that ``python -m train.syncnet`` wrote; MetricError if it is not one."""
    network = OurSyncNet()
    load_network(Path(path), OURS, network, TRAIN_COMMAND)
    freeze(network, device)
    return network
