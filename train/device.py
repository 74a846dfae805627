"""The device a command runs on, and the batches that go there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polyfusion.ops._dispatch import interpreted, resolve
from train.errors import UserError


@dataclass
class Batch:
    """What a step sees. frames (B, T, 3, H, W) in [−1, 1]; audio (B, T·s) in [−1, 1]."""

    frames: Tensor
    audio: Tensor

    @property
    def still(self) -> Tensor:
        """The identity image: the clip's first frame (B, 3, H, W)."""
        return self.frames[:, 0]


def pick_device(name: str) -> torch.device:
    """``auto``, or the device named; :class:`UserError` if it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not usable here ({reason}); use --device cpu") from None
    return device


def in_interpreter(kernels: str, device: torch.device) -> bool:
    """Whether this choice of kernels means Triton's interpreter on ``device``.

    Raises ``KernelsUnavailable`` if the choice cannot work there.
    """
    return resolve(kernels, [torch.empty(0, device=device)]) == "triton" and interpreted()


def to_device(items: Mapping[str, Tensor], device: torch.device) -> Batch:
    """Move a loader's batch and scale its frames to [−1, 1].

    Args:
        items: ``frames`` (B, T, 3, H, W) uint8 and ``audio`` (B, T·s).
    """
    frames = items["frames"].to(device, non_blocking=True)
    audio = items["audio"].to(device, non_blocking=True)
    return Batch(frames.float().div_(127.5).sub_(1), audio)


def clip_to_device(item: Mapping[str, Tensor], device: torch.device) -> Batch:
    """The batch of one clip, an item of a prepared set."""
    return to_device({name: item[name].unsqueeze(0) for name in ("frames", "audio")}, device)
