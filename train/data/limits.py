"""What reading a media file may cost, and the error that says why a file cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from train.errors import UserError


class MediaError(UserError):
    """A media file cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Limits:
    """Bounds on one media file, checked from its headers before decoding and again meanwhile.

    A few kilobytes can decode to many gigabytes, and a process that the system ends for want of
    memory takes all other work with it. The defaults let 3 s of 4K video or 13 s of 1080p at
    25 frames/s pass.
    """

    decoded_bytes: float = 2.2e9  # upright RGB pictures at the asked rate, and float32 sound
    seconds: float = 600.0  # of picture or sound
    pixels: int = 100_000_000  # of one picture, with square pixels

    def check_bytes(self, count: float) -> None:
        """Raise ``MediaError`` if ``count`` bytes of pictures and sound are too many."""
        if count > self.decoded_bytes:
            raise MediaError(
                f"decodes to {count / 1e9:.2f} GB, more than the limit of "
                f"{self.decoded_bytes / 1e9:.2f} GB; cut it into shorter clips or scale it down"
            )

    def check_seconds(self, seconds: float) -> None:
        """Raise ``MediaError`` if ``seconds`` is too long."""
        if seconds > self.seconds:
            raise MediaError(
                f"lasts {seconds:.0f} s by its time stamps, more than the limit of "
                f"{self.seconds:g} s; cut it into shorter clips"
            )

    def check_picture(self, width: int, height: int) -> None:
        """Raise ``MediaError`` if a picture of this size, in square pixels, is too large."""
        if width * height > self.pixels:
            raise MediaError(
                f"has pictures of {width} x {height} = {width * height / 1e6:.3g} million pixels, "
                f"more than the limit of {self.pixels / 1e6:g} million; scale it down"
            )
