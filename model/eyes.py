"""When eyes close: blinks drawn at random, for videos whose eyes nobody recorded.

An L1 against the real frames forbids blinks that the sound does not foretell: the best guess is an
eye that never closes. With the closing of the eyes as an input the same L1 teaches what a closing
eye looks like, and at inference the closing is drawn.
"""

import math

import torch
from torch import Tensor

RATE = 0.3  # blinks a second
SECONDS = (0.24, 0.4)  # from the first frame that closes to the first that is open again
PAUSE = 0.6  # s between two blinks, and before the first
CLOSING = 0.3  # share of a blink in which the lids fall; they rise in the rest, more slowly


def draw_eye_closure(
    batch: int, frames: int, fps: float, rng: torch.Generator | None = None
) -> Tensor:
    """(B, T) on the CPU: how far the eyes are closed, 0 (open) to 1, frame by frame.

    Blinks start as a Poisson process with a pause of 0.6 s after each, 0.3 a second on average, and
    last 0.24 to 0.4 s. None starts in the first 0.6 s, so that a clip starts with open eyes.
    """
    waiting = 1 / RATE - sum(SECONDS) / 2 - PAUSE
    times = (torch.arange(frames, dtype=torch.float64) + 0.5) / fps
    closure = torch.zeros(batch, frames, dtype=torch.float64)
    for row in closure:
        clock = 0.0
        while clock < frames / fps:
            start = clock + PAUSE - waiting * math.log1p(-torch.rand((), generator=rng).item())
            span = SECONDS[1] - SECONDS[0]
            end = start + SECONDS[0] + span * torch.rand((), generator=rng).item()
            torch.maximum(row, _blink((times - start) / (end - start)), out=row)
            clock = end
    return closure.float()


def _blink(x: Tensor) -> Tensor:
    """Closure over a blink, x from 0 to 1: a smooth fall, then a slower rise; 0 outside."""
    falling, rising = x / CLOSING, (1 - x) / (1 - CLOSING)
    y = torch.minimum(falling, rising).clamp(0, 1)
    return y * y * (3 - 2 * y)
