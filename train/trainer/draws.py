"""What is random in a step of the GAN, drawn on the CPU before the step and sent to it as one."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model import ModelConfig
from model.encoders import draw_noise
from model.eyes import draw_eye_closure


class Choice(NamedTuple):
    """Random positions, (B,) int64 each: S(x), the start of S_snip and of the shifted audio."""

    frame: Tensor
    snippet: Tensor
    shifted: Tensor


@dataclass
class Draws:
    """Random numbers of a step.

    Args:
        frame, snippet, shifted: the positions of a :class:`Choice`.
        noise: (B, T, n), what the noise encoder is given.
        eyes: (B, T) how far the eyes are closed, for a model that wants it and is not told.
    """

    frame: Tensor
    snippet: Tensor
    shifted: Tensor
    noise: Tensor
    eyes: Tensor | None = None

    def to(self, device: torch.device) -> "Draws":
        """Send all of them in one transfer, which the host does not wait for."""
        names = [name for name, value in vars(self).items() if value is not None]
        sent = send([getattr(self, name) for name in names], device)
        return Draws(**dict(zip(names, sent, strict=True)))


def draw(config: ModelConfig, batch: int, frames: int, eyes: bool, rng: torch.Generator) -> Draws:
    """Draw on the CPU, so that every device sees the same; ``eyes`` if they have to be drawn."""
    positions = choose(batch, frames, config.snippet_frames, rng)
    noise = draw_noise(config, batch, frames, rng)
    closure = draw_eye_closure(batch, frames, config.fps, rng) if eyes else None
    return Draws(*positions, noise, closure)


def choose(batch: int, frames: int, snippet: int, rng: torch.Generator) -> Choice:
    """Draw a frame, a snippet start and an out-of-sync audio start for every clip.

    The out-of-sync audio is at least a snippet away, unless the clip is too short for that: then
    it is as far away as the clip allows.
    """
    starts = frames - snippet + 1
    frame = torch.randint(frames, (batch,), generator=rng)
    start = torch.randint(starts, (batch,), generator=rng)
    shifted = torch.empty_like(start)
    for i, s in enumerate(start.tolist()):
        distance = (torch.arange(starts) - s).abs()
        far = (distance >= min(snippet, int(distance.max()))).nonzero().squeeze(1)
        shifted[i] = far[torch.randint(len(far), (1,), generator=rng)]
    return Choice(frame, start, shifted)


def send(values: list[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on ``device``, by one copy out of pinned memory; on the CPU they stay.

    Their bytes lie one after the other, the largest elements first, so that all are aligned.
    """
    if device.type == "cpu":
        return values
    order = sorted(range(len(values)), key=lambda i: -values[i].element_size())
    packed = torch.cat([values[i].contiguous().view(-1).view(torch.uint8) for i in order])
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([values[i].nbytes for i in order])
    sent = list(values)
    for i, part in zip(order, parts, strict=True):
        sent[i] = part.view(values[i].dtype).view(values[i].shape)
    return sent
