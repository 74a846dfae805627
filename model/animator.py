"""Animate a photo by speech, from Python.

from model import Animator
animate = Animator()
animate("face.jpg", "speech.m4a").save("talk.mp4")
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from model.config import Kernels
from model.folding import fold
from model.portrait import Paste, Portrait, aligned_portrait, find_portrait
from model.streaming import Stream, look_ahead
from model.talking_face import TalkingFace
from train.data.limits import Limits, MediaError
from train.data.photo import load_photo
from train.data.recording import Recording, Source, Wave, as_wave
from train.data.video import AAC_RATE, open_video
from train.device import pick_device
from train.errors import UserError
from train.run.checkpoint import load_run
from train.run.samples import to_uint8

#: The run that is used if no other is named.
CHECKPOINT = Path(__file__).parent / "weights" / "small"
#: Sound is read in pieces, so its length costs no memory.
LIMITS = Limits(decoded_bytes=2**40, seconds=24 * 3600.0)

Picture = str | os.PathLike[str] | np.ndarray | Portrait
Progress = Callable[[int, int], None]


class Animator:
    """Makes people in photos say what is heard.

    Args:
        checkpoint: directory of a run, or of an exported one; by default the weights that ship.
        kernels: kernels that compute the fused operators.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    What a user can do wrong raises ``train.errors.UserError``, whose message is one line.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] = CHECKPOINT,
        *,
        kernels: Kernels = "auto",
        device: str = "auto",
    ) -> None:
        self.device = pick_device(device)
        config, model = load_run(Path(checkpoint), self.device, kernels)
        self.alignment, self.places, self.kernels = config.alignment, config.places, kernels
        if isinstance(model, TalkingFace) and kernels in ("auto", "eager"):
            model = fold(model)
        self.model = model
        self.size = config.model.height, config.model.width
        self.sample_rate = config.model.sample_rate
        self.stride = config.model.samples_per_frame
        #: Of the sound: a rate that does not divide it would let the picture run ahead.
        self.fps = self.sample_rate / self.stride
        #: Seconds of sound after a frame that have to be there before it can be made.
        self.latency = look_ahead(model) / self.fps  # type: ignore[arg-type]

    def portrait(
        self, image: Picture, *, aligned: bool = False, face: int | None = None
    ) -> Portrait:
        """Find and align the face that is to talk.

        Args:
            image: path of a photo, or pixels (H, W, 3) or (H, W) uint8 RGB.
            aligned: whether it shows the face alone, in the place that alignment gives it.
            face: number of the face, 1 the largest; by default the largest.
        """
        if isinstance(image, Portrait):
            return image
        remarks: tuple[str, ...] = ()
        name = "image"
        if isinstance(image, np.ndarray):
            pixels = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
            if pixels.shape[2:] != (3,) or pixels.dtype != np.uint8:
                raise UserError(f"image: expected (H, W, 3) uint8, got {image.shape} {image.dtype}")
        else:
            name, photo = str(image), load_photo(image)
            pixels, remarks = photo.pixels, photo.remarks
        if aligned and face is not None:
            raise UserError("--face with --aligned: a face that is cut out is the only one")
        try:
            if aligned:
                found = aligned_portrait(pixels, self.size)
            else:
                found = find_portrait(pixels, self.size, self.alignment, face, self.places)
        except UserError as error:
            raise type(error)(f"{name}: {error}") from None
        return Portrait(found.still, found.photo, found.place, remarks + found.remarks)

    def __call__(
        self,
        image: Picture,
        audio: str | os.PathLike[str] | np.ndarray | Source,
        *,
        sample_rate: int | None = None,
        aligned: bool = False,
        face: int | None = None,
        paste: bool = False,
        seed: int = 0,
    ) -> "Animation":
        """Animate a photo. Frames are made when they are asked for.

        Args:
            image, aligned, face: as of :meth:`portrait`.
            audio: path of a sound or video file, or samples (N,) or (N, channels).
            sample_rate: Hz, of samples.
            paste: put the face back into its photo.
            seed: of blinks and noise.
        """
        sound: Source
        if isinstance(audio, np.ndarray):
            if sample_rate is None:
                raise UserError("sample_rate: samples need it")
            sound = Wave(audio, sample_rate)
        elif isinstance(audio, str | os.PathLike):
            sound = Recording(audio, LIMITS)
        else:
            sound = audio
        name = f"{audio}: " if isinstance(audio, str | os.PathLike) else ""
        if sound.seconds * self.sample_rate < self.stride:
            raise MediaError(
                f"{name}lasts {sound.seconds:.3f} s; a frame alone takes {1 / self.fps:.3f} s"
            )
        portrait = self.portrait(image, aligned=aligned, face=face)
        return Animation(self, portrait, sound, Paste(portrait) if paste else None, seed)

    def stream(
        self,
        image: Picture,
        chunks: Iterable[np.ndarray],
        *,
        aligned: bool = False,
        face: int | None = None,
        seed: int = 0,
    ) -> Iterator[np.ndarray]:
        """Make frames while sound arrives, :attr:`latency` seconds behind it.

        They are those of the whole sound at once, however it is cut into chunks.

        Args:
            image, aligned, face: as of :meth:`portrait`.
            chunks: samples (N,) or (N, channels) at :attr:`sample_rate`.
            seed: of blinks and noise.

        Yields:
            Frames (k, h, w, 3) uint8 RGB that have become ready.
        """
        portrait = self.portrait(image, aligned=aligned, face=face)
        still = torch.from_numpy(portrait.still).permute(2, 0, 1).to(self.device)
        stream = Stream(self.model, still.float() / 127.5 - 1, seed)  # type: ignore[arg-type]
        for chunk in chunks:
            wave = torch.from_numpy(as_wave(chunk))
            for frames in stream.push(wave):
                yield to_uint8(frames).transpose(0, 2, 3, 1)
        try:
            for frames in stream.finish():
                yield to_uint8(frames).transpose(0, 2, 3, 1)
        except ValueError as error:
            raise MediaError(str(error)) from None


class Animation:
    """A photo that talks. Iterate to get its frames (k, H, W, 3) uint8 RGB as they are made."""

    def __init__(
        self, animator: Animator, portrait: Portrait, sound: Source, paste: Paste | None, seed: int
    ) -> None:
        self.portrait, self.sound, self.seed = portrait, sound, seed
        self.fps = animator.fps
        #: What was done to the inputs or is odd about them, as "kind: details".
        self.remarks = portrait.remarks + sound.remarks
        #: Frames that there will be, to within one.
        self.total = max(1, int(sound.seconds * animator.fps))
        self._animator, self._paste = animator, paste

    def __iter__(self) -> Iterator[np.ndarray]:
        chunks = self.sound.pieces(self._animator.sample_rate)
        for frames in self._animator.stream(self.portrait, chunks, seed=self.seed):
            yield frames if self._paste is None else self._paste(frames)

    @property
    def frames(self) -> np.ndarray:
        """All frames, (T, H, W, 3) uint8 RGB, made anew."""
        return np.concatenate([*self])

    def audio(self, sample_rate: int = AAC_RATE) -> np.ndarray:
        """All the sound, (N,) float32 in [-1, 1], mono."""
        return np.concatenate([*self.sound.pieces(sample_rate)])

    def save(self, path: str | os.PathLike[str], *, progress: Progress | None = None) -> int:
        """Write an MP4 (H.264 and AAC) while the frames are made; return how many there were.

        ``progress`` is told after every piece how many are made, and how many there will be. The
        file appears when it is complete; one that exists is replaced.
        """
        shape = self.portrait.still if self._paste is None else self._paste.photo
        sound, heard, made = self.sound.pieces(AAC_RATE), 0, 0
        height, width = shape.shape[:2]
        with open_video(path, height, width, self.fps, sound=True) as video:
            for frames in self:
                video.show(frames)
                made += len(frames)
                while heard < made / self.fps * AAC_RATE:
                    wave = next(sound, None)
                    if wave is None:
                        break
                    heard += len(wave)
                    video.hear(wave)
                if progress is not None:
                    progress(made, max(made, self.total))
            for wave in sound:
                video.hear(wave)
        return made
