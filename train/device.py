"""The device a command runs on, and the batches that go there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polyfusion.dispatch import interpreted, resolve
from train.errors import UserError


@dataclass
class Batch:
    """What a step sees.

    Args:
        frames: (B, T, 3, H, W) in [−1, 1].
        speech: (B, (T + 2 C)·s) in [−1, 1], the sound of the frames and of ``context`` more at
            both ends.
        still: (B, 3, H, W), the identity image; the first frame if not given.
        context: C, frames.
        eyes: (B, T) how far the eyes are closed, 0 to 1, where that is known.
        lips: (B, T, 3) shape of the lips, where that is known.
    """

    frames: Tensor
    speech: Tensor
    still: Tensor = None  # type: ignore[assignment]
    context: int = 0
    eyes: Tensor | None = None
    lips: Tensor | None = None

    def __post_init__(self) -> None:
        if self.still is None:
            self.still = self.frames[:, 0]

    @property
    def audio(self) -> Tensor:
        """The sound of the frames alone, (B, T·s)."""
        stride = self.speech.shape[1] // (self.frames.shape[1] + 2 * self.context)
        return self.speech[:, self.context * stride : self.speech.shape[1] - self.context * stride]


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


def lay_out(module: nn.Module, device: torch.device) -> None:
    """On a GPU, give the weights of convolutions the memory format of their maps: channels last.

    Values and shapes stay. On a CPU the stride-2 layers are faster without.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in module.parameters():
        if device.type != "cpu" and weight.ndim in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])


def to_device(items: Mapping[str, Tensor], device: torch.device, context: int = 0) -> Batch:
    """Move a loader's batch and scale its frames to [−1, 1]; channels last in a GPU's memory.

    Args:
        items: ``frames`` (B, T, 3, H, W) and ``still`` (B, 3, H, W) uint8, ``audio`` (B, N), and
            ``eyes`` (B, T) and ``lips`` (B, T, 3) where the set gives them.
        context: frames of ``audio`` beyond both ends of ``frames``.
    """
    moved = {name: value.to(device, non_blocking=True) for name, value in items.items()}
    if device.type != "cpu":
        for name in ("frames", "still"):
            maps = moved[name].flatten(0, -4).contiguous(memory_format=torch.channels_last)
            moved[name] = maps.view(moved[name].shape)
    frames, still = (moved[name].div(127.5).sub_(1) for name in ("frames", "still"))
    return Batch(frames, moved["audio"], still, context, moved.get("eyes"), moved.get("lips"))


def clip_to_device(item: Mapping[str, Tensor], device: torch.device) -> Batch:
    """The batch of one clip, an item of a prepared set."""
    tensors = ("frames", "still", "audio", "eyes", "lips")
    return to_device({name: item[name].unsqueeze(0) for name in tensors if name in item}, device)
