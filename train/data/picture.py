"""Turns a decoded video frame into the upright RGB picture with square pixels that players show."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange, Colorspace

from train.data.limits import Limits, MediaError

_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED
_HDR = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_*
_QUARTER_TURNS = {  # counterclockwise degrees
    90: (True, False, True),
    -90: (True, True, False),
    180: (False, True, True),
    -180: (False, True, True),
}
# Untagged pictures below this width and up to this height are BT.601, larger ones BT.709.
HD_WIDTH, SD_HEIGHT = 1280, 576
UNIFORM = 4.0  # levels of standard deviation below which a picture shows nothing


class Pictures:
    """Converts the frames of one video stream, as PyAV gives them.

    Applied are the pixel aspect ratio, the colour matrix and range (BT.601 for untagged standard
    definition, BT.709 for untagged larger pictures, as players do), and the display matrix:
    quarter turns and mirroring, exactly. ``remarks`` says which.
    """

    def __init__(self, stream: Any, limits: Limits) -> None:
        self.aspect = Fraction(stream.sample_aspect_ratio or 1)
        self.limits = limits
        self.remarks: list[str] = []
        self._given: tuple[int, int] | None = None
        self._turn: tuple[bool, bool, bool] = (False, False, False)
        self._latest: tuple[Any, np.ndarray] | None = None  # the frame converted last
        self._blank = 0  # pictures at the start that show nothing
        self._shown = False  # whether one has shown something
        transfer = _HDR.get(stream.codec_context.color_trc)
        if transfer:
            self.remarks.append(f"HDR: {transfer} is not mapped to the contrast of other screens")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of a stored picture in square pixels; ``MediaError`` if too large."""
        if self.aspect > 1:
            width = round(width * self.aspect)
        elif self.aspect < 1:
            height = round(height / self.aspect)
        self.limits.check_picture(width, height)
        return width, height

    def convert(self, frame: Any) -> np.ndarray:
        """Give (H, W, 3) uint8 RGB; all pictures of a stream have the same size."""
        if self._latest is None or self._latest[0] is not frame:
            self._latest = frame, self._convert(frame)
        image = self._latest[1]
        if not self._shown:
            self._shown = not _blank(image)
            self._blank += not self._shown
        return image

    def _convert(self, frame: Any) -> np.ndarray:
        turn = _turn(frame)
        if self._given is None:
            self._given, self._turn = (frame.width, frame.height), turn
            self._describe(frame)
        elif self._given != (frame.width, frame.height) or self._turn != turn:
            raise MediaError("the picture size or its rotation changes within the clip")
        width, height = self.size(frame.width, frame.height)
        image = frame.reformat(
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=Colorspace.ITU709 if _untagged_hd(frame) else None,
            dst_color_range=ColorRange.JPEG,
            threads=1,
        ).to_ndarray()
        transposed, flip_x, flip_y = turn
        if transposed:
            image = image.swapaxes(0, 1)
        return image[:: -1 if flip_y else 1, :: -1 if flip_x else 1]

    def finish(self) -> list[str]:
        """Give all remarks, once every picture is converted."""
        if self._blank and self._shown:
            self.remarks.append(f"grey start: the first {self._blank} frames show nothing")
        return self.remarks

    def _describe(self, frame: Any) -> None:
        transposed, flip_x, flip_y = self._turn
        if transposed ^ flip_x ^ flip_y:
            self.remarks.append("mirrored: as the file's metadata say")
        if transposed or (flip_x and flip_y):
            degrees = 180 if not transposed else 90 if flip_x else 270
            self.remarks.append(f"rotated: by {degrees} degrees, as the file's metadata say")
        if self.size(frame.width, frame.height) != self._given:
            self.remarks.append(f"scaled: pixels of {self.aspect} made square")
        if _untagged_hd(frame):
            self.remarks.append("colours: the matrix is not given, BT.709 was assumed")


def _turn(frame: Any) -> tuple[bool, bool, bool]:
    """The display matrix as (transposed, then flipped left to right, then upside down)."""
    try:
        data = frame.side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:  # PyAV does not know another kind of side data that the frame has
        return _QUARTER_TURNS.get(frame.rotation, (False, False, False))
    if data is None:
        return False, False, False
    matrix = np.frombuffer(bytes(data), dtype=np.int32).astype(float)
    a, b, c, d = matrix[[0, 1, 3, 4]]
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if min(straight, crossed) > 0.01 * max(straight, crossed):
        raise MediaError(
            f"is to be shown turned by {np.degrees(np.arctan2(b, a)):.0f} degrees, and only "
            "quarter turns are known; re-encode it upright"
        )
    if crossed > straight:  # x = c * row + ..., y = b * column + ...
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def _untagged_hd(frame: Any) -> bool:
    tagged = frame.colorspace != _UNSPECIFIED or frame.format.is_rgb
    return not tagged and (frame.width >= HD_WIDTH or frame.height > SD_HEIGHT)


def _blank(image: np.ndarray) -> bool:
    """Whether a picture is of one colour, or mostly the grey of pictures that cannot be decoded."""
    some = image[::4, ::4].reshape(-1, 3).astype(float)
    grey = (np.abs(some - 128) <= 12).all(axis=1).mean()
    return bool(some.std(axis=0).max() < UNIFORM or grey > 0.8)
