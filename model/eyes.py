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
SPREAD = 0.25  # the usual standard deviation of the closing over a clip with a blink
CLOSING = 0.3  # share of a blink in which the lids fall; they rise in the rest, more slowly


class Blinks:
    """The blinks of one face, drawn while its frames are made.

    They start as a Poisson process with a pause of 0.6 s after each, 0.3 a second on average, and
    last 0.24 to 0.4 s. None starts in the first 0.6 s, so that a clip starts with open eyes.
    """

    def __init__(self, fps: float, rng: torch.Generator | None = None):
        self.fps, self.rng = fps, rng
        self._shown = 0  # frames
        self._clock = 0.0  # s, the end of the last blink drawn
        self._blinks: list[tuple[float, float]] = []  # start and end of those not over yet

    def draw(self, frames: int) -> Tensor:
        """(frames,) float64 on the CPU: how far the eyes are closed in the next frames, 0 to 1."""
        times = (torch.arange(self._shown, self._shown + frames, dtype=torch.float64) + 0.5) / (
            self.fps
        )
        self._shown += frames
        end_of_frames = self._shown / self.fps
        while self._clock < end_of_frames:
            waiting = 1 / RATE - sum(SECONDS) / 2 - PAUSE
            waited = waiting * math.log1p(-torch.rand((), generator=self.rng).item())
            start = self._clock + PAUSE - waited
            span = SECONDS[1] - SECONDS[0]
            self._clock = start + SECONDS[0] + span * torch.rand((), generator=self.rng).item()
            self._blinks.append((start, self._clock))
        closure = torch.zeros(frames, dtype=torch.float64)
        for start, end in self._blinks:
            torch.maximum(closure, _blink((times - start) / (end - start)), out=closure)
        self._blinks = [blink for blink in self._blinks if blink[1] > end_of_frames]
        return closure


def draw_eye_closure(
    batch: int, frames: int, fps: float, rng: torch.Generator | None = None
) -> Tensor:
    """(B, T) on the CPU: how far the eyes are closed, 0 (open) to 1, by :class:`Blinks`."""
    closure = torch.zeros(batch, frames)
    for row in closure:
        row.copy_(Blinks(fps, rng).draw(frames))
    return closure


def _blink(x: Tensor) -> Tensor:
    """Closure over a blink, x from 0 to 1: a smooth fall, then a slower rise; 0 outside."""
    falling, rising = x / CLOSING, (1 - x) / (1 - CLOSING)
    y = torch.minimum(falling, rising).clamp(0, 1)
    return y * y * (3 - 2 * y)
