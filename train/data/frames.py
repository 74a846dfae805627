"""Where decoded pictures are kept: all of them, or a piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


class Frames:
    """An array of pictures that grows in place: its memory is needed once, not twice."""

    def __init__(self) -> None:
        self.count = 0
        self._data = np.empty((0,), np.uint8)
        self._shape: tuple[int, ...] = ()

    @property
    def held(self) -> int:
        """How many pictures are in memory."""
        return self.count

    @property
    def nbytes(self) -> int:
        return self.held * int(np.prod(self._shape))

    def append(self, image: np.ndarray) -> None:
        self._shape = image.shape
        if self.nbytes + image.size > self._data.size:
            self._data.resize((self._data.size * 5 // 4 + 8 * image.size,), refcheck=False)
        self._data[self.nbytes : self.nbytes + image.size].reshape(image.shape)[:] = image
        self.count += 1

    def array(self) -> np.ndarray:
        """All pictures that are held, (T, H, W, 3)."""
        return self._data[: self.nbytes].reshape((self.held, *self._shape))


class FramesInPieces(Frames, Generic[T]):
    """Hands every ``length`` pictures to ``work``, in memory that the next ones take."""

    def __init__(self, work: Callable[[np.ndarray], T], length: int) -> None:
        super().__init__()
        self.items: list[tuple[int, int, T]] = []
        self._work, self._length, self._first = work, length, 0

    @property
    def held(self) -> int:
        return self.count - self._first

    def append(self, image: np.ndarray) -> None:
        super().append(image)
        if self.held == self._length:
            self._hand_on()

    def finish(self, least: int) -> None:
        """Hand on what is left, if it is no fewer than ``least`` pictures."""
        if self.held >= max(1, least):
            self._hand_on()

    def _hand_on(self) -> None:
        self.items.append((self._first, self.held, self._work(self.array())))
        self._first = self.count
