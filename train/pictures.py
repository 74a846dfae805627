"""Pictures on disk."""

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from train.files import write_atomically


def write_picture(path: Path, image: np.ndarray, quality: int = 85) -> None:
    """Write a picture (H, W, 3) uint8 RGB as PNG or, with that quality, JPEG; the suffix says."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if path.suffix == ".jpg" else []
    ok, data = cv2.imencode(path.suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise OSError(f"{path}: the picture could not be encoded")
    write_atomically(path, data.tobytes())


def write_contact_sheet(path: Path, clips: Iterable[np.ndarray], labels: list[str]) -> None:
    """Write the middle frame of clips (T, 3, H, W) uint8, twelve to a row, under their labels."""
    tiles = []
    for frames, label in zip(clips, labels, strict=True):
        image = np.ascontiguousarray(frames[len(frames) // 2].transpose(1, 2, 0))
        tile = np.pad(cv2.resize(image, (144, 192)), ((18, 4), (2, 2), (0, 0)))
        font, white = cv2.FONT_HERSHEY_SIMPLEX, (255,) * 3
        label = label.encode("ascii", "replace").decode()  # OpenCV draws, or survives, nothing else
        cv2.putText(tile, label, (3, 13), font, 0.38, white, 1, cv2.LINE_AA)
        tiles.append(tile)
    columns = min(12, len(tiles))
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    write_picture(path, np.vstack(rows))
