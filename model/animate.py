"""Make a photo say what a recording says.

    python -m model.animate --image face.jpg --audio speech.m4a --out talk.mp4

Any common picture, sound or video will do. Several photos (a folder of them) or several recordings
give a video each, in the folder --out. The weights that ship are used unless --checkpoint names a
run of python -m train.
"""

import inspect
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from tqdm import tqdm

from model.animator import CHECKPOINT, Animation, Animator
from model.config import Kernels
from train.data.photo import PHOTOS
from train.data.splits import natural
from train.errors import UserError, one_line, run

SMALL = 10_000_000  # parameters, up to which a network gains nothing from several threads


@dataclass(frozen=True)
class AnimateConfig:
    """Make a photo say what a recording says."""

    image: Path
    """Photo of a face seen from the front, or a folder of photos."""
    audio: tuple[Path, ...]
    """Sound or video files with the speech."""
    out: Path = Path("talk.mp4")
    """MP4 to write, or a folder if there are several to make."""
    checkpoint: Path = CHECKPOINT
    """Directory of the run, or of the exported run, whose network to use."""
    aligned: bool = False
    """Take the photos as they are: each shows the face alone, as train.prepare aligns it."""
    face: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Number of the face to animate where there are several, 1 the largest."""
    paste: bool = False
    """Put the talking face back into its photo."""
    seed: int = 0
    """Seed of the blinks and of the noise."""
    overwrite: bool = False
    """Replace files that exist, without asking."""
    kernels: Kernels = "auto"
    """Kernels that compute the fused operators. An explicit choice works or says why not."""
    device: str = "auto"
    """Device to compute on: auto (a GPU if there is one), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if not self.audio:
            raise UserError("--audio: give at least one recording")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: expected a number from 0 to 2^63 - 1")


def animate(config: AnimateConfig, ask: Callable[[str], str] | None = None) -> list[Path]:
    """Make and return the videos; :class:`UserError` for what cannot be done.

    Of several, those that can be made are, and the error counts the others. ``ask`` puts a
    question to the user and returns the answer; without it nothing that exists is replaced.
    """
    photos = _photos(config.image)
    outs = _outs(config, photos)
    for out in outs.values():
        _claim(out, config.overwrite, ask)
    animator = Animator(config.checkpoint, kernels=config.kernels, device=config.device)
    choose_threads(animator)
    made, failed = [], 0
    for photo in photos:
        try:
            portrait = animator.portrait(photo, aligned=config.aligned, face=config.face)
        except UserError as error:
            failed += _failed(error, len(outs), of=len(config.audio))
            continue
        _say(photo, portrait.remarks)
        for audio in config.audio:
            try:
                video = animator(portrait, audio, paste=config.paste, seed=config.seed)
                _say(audio, video.sound.remarks)
                _make(video, outs[photo, audio])
                made.append(outs[photo, audio])
            except UserError as error:
                failed += _failed(error, len(outs))
    if failed:
        raise UserError(f"{failed} of {len(outs)} videos could not be made, for the reasons above")
    return made


def choose_threads(animator: Animator) -> None:
    """Take one thread for a small network, unless the user has chosen.

    With the weights that ship a second one made it 10 % faster on two idle cores, and three to ten
    times slower on two that also had other work: each layer waits for the thread that comes last.
    """
    parameters = sum(p.numel() for p in animator.model.parameters())
    if animator.device.type == "cpu" and parameters < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _make(animation: Animation, out: Path) -> None:
    """Make one video, with a bar, and say how fast that was."""
    began = time.monotonic()
    with tqdm(total=animation.total, unit="frame", dynamic_ncols=True, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        frames = animation.save(out, progress=show)
    took, seconds = time.monotonic() - began, frames / animation.fps
    print(
        f"{out}: {frames} frames, {seconds:.2f} s, made in {took:.2f} s, "
        f"{seconds / took:.1f} times as fast as they play"
    )


def _say(path: Path, remarks: tuple[str, ...]) -> None:
    for remark in remarks:
        print(f"{path}: {remark}")


def _failed(error: UserError, videos: int, of: int = 1) -> int:
    """Say why videos cannot be made and go on; raise if there are no others."""
    if videos == 1:
        raise error
    print(f"error: {one_line(error)}", file=sys.stderr)
    return of


def _photos(image: Path) -> list[Path]:
    """The photo, or those of a folder."""
    if not image.is_dir():
        return [image]
    photos = sorted((p for p in image.iterdir() if p.suffix.lower() in PHOTOS), key=natural)
    if not photos:
        raise UserError(f"--image {image}: no photos in this folder ({', '.join(sorted(PHOTOS))})")
    return photos


def _outs(config: AnimateConfig, photos: list[Path]) -> dict[tuple[Path, Path], Path]:
    """Where each photo's video with each recording goes; folders are made."""
    pairs = [(photo, audio) for photo in photos for audio in config.audio]
    out = config.out
    if len(set(pairs)) < len(pairs):
        raise UserError("--audio: a recording is given twice")
    if len(pairs) == 1 and not out.is_dir():
        if out.suffix.lower() != ".mp4":
            raise UserError(f"--out {out}: expected a name that ends in .mp4, or a folder")
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: there is no folder {out.parent}")
        if any(out.resolve() == audio.resolve() for audio in config.audio):
            raise UserError(f"--out {out}: it is the recording; choose another name")
        return {pairs[0]: out}
    if out.suffix.lower() == ".mp4":
        raise UserError(f"--out {out}: {len(pairs)} videos need a folder, not a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make this folder ({error.strerror})") from None
    names = [f"{photo.stem}-{audio.stem}.mp4" for photo, audio in pairs]
    if len(set(names)) < len(names):  # a.jpg and a.png
        names = [f"{photo.name}-{audio.name}.mp4" for photo, audio in pairs]
    if len(set(names)) < len(names):
        raise UserError("--audio: recordings of the same name in different folders")
    return {pair: out / name for pair, name in zip(pairs, names, strict=True)}


def _claim(out: Path, overwrite: bool, ask: Callable[[str], str] | None) -> None:
    """Make sure that ``out`` can be written, and may be, before there is anything to write."""
    if out.is_dir():
        raise UserError(f"--out {out}: a folder is in the way")
    allowed = overwrite or not out.exists()
    if not allowed and ask is not None:
        allowed = ask(f"{out} exists; replace it? [y/N] ").strip().lower() in ("y", "yes")
    if not allowed:
        raise UserError(f"{out}: exists; --overwrite replaces it")
    probe = out.with_name(f".{out.stem}.probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None


def main() -> int:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    ask = input if sys.stdin is not None and sys.stdin.isatty() else None
    return run(
        lambda: animate(
            tyro.cli(
                AnimateConfig,
                prog="python -m model.animate",
                description=inspect.cleandoc(__doc__ or ""),
                config=(tyro.conf.FlagCreatePairsOff,),
            ),
            ask,
        ),
        "videos that were finished are kept",
    )


if __name__ == "__main__":
    sys.exit(main())
