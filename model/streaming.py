"""A talking face while its sound arrives.

A network hears a little of what comes after a frame (:func:`look_ahead`), so a stream is late by
that much; what it has heard before is kept by its recurrent parts. Both are settled here, by
putting parts with a memory into the places of those that start afresh: what a frame is made of is
still said by ``TalkingFace.forward`` alone.
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.encoders import AudioEncoder, NoiseEncoder
from model.eyes import Blinks
from model.speech2vid import Speech2Vid
from model.talking_face import TalkingFace

PIECE = 25  # frames made at once, which bounds the memory


def look_ahead(model: TalkingFace | Speech2Vid) -> int:
    """Frames of sound after a frame that have to be there before it can be made."""
    frames = model.context
    if isinstance(model, Speech2Vid):
        return frames
    stride = model.config.samples_per_frame
    if isinstance(model.audio, AudioEncoder):
        frames = math.ceil((model.config.window - stride) / 2 / stride)
    return frames if model.lips is None else max(frames, model.lips.audio.context)


class Stream:
    """Frames of one still, made as soon as the sound that they need is there.

    However the sound is cut into pieces, the frames are the same up to rounding, and those of
    ``model(still, audio)`` with the same noise and blinks. (Speech2Vid's columns of 10 ms are the
    same only where a frame lasts a multiple of that, as at 25 frames/s.)

    Args:
        model: in evaluation mode; it stays as it is, and may serve other streams.
        still: (3, H, W) in [−1, 1].
        seed: of the noise and the blinks.
        piece: most frames to make at once.
    """

    def __init__(
        self, model: TalkingFace | Speech2Vid, still: Tensor, seed: int = 0, piece: int = PIECE
    ):
        config = model.config
        self.stride, self.piece, self.ahead = config.samples_per_frame, piece, look_ahead(model)
        self.made = 0  # frames
        self._still = still.unsqueeze(0)
        self._rng = torch.Generator().manual_seed(seed)
        # Noise and blinks are drawn in turns: one source for both would tie them to the pieces.
        self._blinks = Blinks(config.fps, torch.Generator().manual_seed(seed))
        self._model: TalkingFace | Speech2Vid = model
        if isinstance(model, TalkingFace):
            with torch.no_grad():
                parts: dict[str, nn.Module] = {
                    "identity": _SameStill(model.identity(self._still)),
                    "noise": _NoiseAfterNoise(model.noise),
                }
            if isinstance(model.audio, AudioEncoder):
                parts["audio"] = _SpeechAfterSpeech(model.audio)
            self._model = copy.copy(model)
            self._model._modules = {**model._modules, **parts}  # nobody else's
        self._heard = 0  # samples
        self._buffer = still.new_zeros(self.ahead * self.stride)  # silence before the sound

    def push(self, audio: Tensor) -> Iterator[Tensor]:
        """Hear more sound, (N,) in [−1, 1]; frames (k, 3, H, W) in [−1, 1] that are now ready."""
        self._heard += len(audio)
        self._buffer = torch.cat([self._buffer, audio.to(self._buffer)])
        ready = len(self._buffer) // self.stride - 2 * self.ahead
        yield from self._make(ready)

    def finish(self) -> Iterator[Tensor]:
        """Make the frames that waited for sound: none comes any more.

        ``ValueError`` if all the sound was shorter than a frame.
        """
        if self._heard < self.stride:
            raise ValueError(
                f"sound of {self._heard} samples: expected at least one frame, {self.stride}"
            )
        left = self._heard // self.stride - self.made
        size = (left + 2 * self.ahead) * self.stride
        self._buffer = nn.functional.pad(self._buffer, (0, size - len(self._buffer)))
        yield from self._make(left)

    @torch.no_grad()
    def _next(self, count: int) -> Tensor:
        """The next ``count`` frames, whose sound has arrived."""
        audio = self._buffer[None, : (count + 2 * self.ahead) * self.stride]
        self._buffer = self._buffer[count * self.stride :]
        self.made += count
        if isinstance(self._model, Speech2Vid):
            return self._model(self._still, audio, context=self.ahead)[0]
        config = self._model.config
        eyes = config.eyes_gain * self._blinks.draw(count)[None] if config.eyes else None
        return self._model(self._still, audio, self._rng, context=self.ahead, eyes=eyes)[0]

    def _make(self, count: int) -> Iterator[Tensor]:
        while count > 0:
            frames = self._next(min(count, self.piece))
            count -= len(frames)
            yield frames


class _SameStill(nn.Module):
    """The identity encoder, of one still."""

    def __init__(self, code: tuple[Tensor, list[Tensor]]):
        super().__init__()
        self.code = code

    def forward(self, still: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.code


class _NoiseAfterNoise(nn.Module):
    """The noise encoder, which goes on where it stopped."""

    def __init__(self, encoder: NoiseEncoder):
        super().__init__()
        self.encoder = encoder
        self.state: Tensor | None = None

    def sample(self, batch: int, frames: int, rng: torch.Generator | None = None) -> Tensor:
        # Frame by frame: many numbers drawn at once are others than those drawn one by one.
        return torch.cat([self.encoder.sample(batch, 1, rng) for _ in range(frames)], 1)

    def forward(self, noise: Tensor) -> Tensor:
        codes, self.state = self.encoder.rnn(noise, self.state)
        return torch.tanh(codes)


class _SpeechAfterSpeech(nn.Module):
    """The encoder of raw windows, which goes on where it stopped."""

    def __init__(self, encoder: AudioEncoder):
        super().__init__()
        self.encoder = encoder
        self.state: Tensor | None = None

    def forward(self, audio: Tensor, context: int = 0) -> Tensor:
        """``context`` frames of sound at both ends belong to windows and get no feature."""
        encoder = self.encoder
        first = context * encoder.stride - (encoder.window - encoder.stride) // 2
        count = audio.shape[1] // encoder.stride - 2 * context
        windows = audio[:, first:].unfold(1, encoder.window, encoder.stride)[:, :count]
        features = encoder.windows(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
        codes, self.state = encoder.rnn(features, self.state)
        return codes
