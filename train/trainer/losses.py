"""The objective, eqs (9)-(12) of the paper, on logits."""

from torch import Tensor
from torch.nn import functional as F

from model.lips import SPREAD


def real_loss(logits: Tensor) -> Tensor:
    """−E log D, for a discriminator's real samples. logits (B,)."""
    return F.softplus(-logits).mean()


def fake_loss(logits: Tensor) -> Tensor:
    """−E log(1 − D), for a discriminator's fake samples. logits (B,)."""
    return F.softplus(logits).mean()


def generator_loss(logits: Tensor, saturating: bool = False) -> Tensor:
    """What G minimises on its own samples: −E log D, or the literal E log(1 − D)."""
    return -fake_loss(logits) if saturating else real_loss(logits)


def bottom_half(frames: Tensor) -> Tensor:
    """Rows H/2 and below of frames (…, H, W): the mouth's half."""
    return frames[..., frames.shape[-2] // 2 :, :]


def top_half(frames: Tensor) -> Tensor:
    """Rows above H/2 of frames (…, H, W)."""
    return frames[..., : frames.shape[-2] // 2, :]


def mouth_box(frames: Tensor) -> Tensor:
    """Rows 0.59 to 0.85 H and columns 0.27 to 0.75 W: where alignment puts the mouth."""
    height, width = frames.shape[-2:]
    rows = slice(round(0.59 * height), round(0.85 * height))
    return frames[..., rows, round(0.27 * width) : round(0.75 * width)]


def eyes_box(frames: Tensor) -> Tensor:
    """Rows 0.27 to 0.43 H and columns 0.19 to 0.83 W: where alignment puts the eyes."""
    height, width = frames.shape[-2:]
    rows = slice(round(0.27 * height), round(0.43 * height))
    return frames[..., rows, round(0.19 * width) : round(0.83 * width)]


def eyes_loss(generated: Tensor, real: Tensor, closure: Tensor) -> Tensor:
    """Mean absolute error in the eyes' box, of each frame as far as its eyes are closed.

    Frames (B, T, 3, H, W), closure (B, T) from 0 to 1. Eyes are open in most frames, so in a plain
    mean a network that ignores the others loses next to nothing.
    """
    error = (eyes_box(generated) - eyes_box(real)).abs().mean((2, 3, 4))
    return (closure * error).mean()


def lips_loss(foretold: Tensor, measured: Tensor) -> Tensor:
    """Mean squared error of shapes of lips (B, T, 3), in units of their usual deviation."""
    return ((foretold - measured) / SPREAD).square().mean()


def l1_loss(generated: Tensor, real: Tensor) -> Tensor:
    """Mean absolute error; eq (12) takes it over the bottom half of the frames."""
    return (generated - real).abs().mean()
