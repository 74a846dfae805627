"""Read a photo as the upright RGB picture that viewers show, and say what was done to it."""

from __future__ import annotations

import io
import os
import re
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from train.data.decode import errors_of, existing
from train.data.limits import Limits, MediaError

#: Suffixes that a folder's photos have.
PHOTOS = {
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif"),  # which are refused, but not passed over in silence
}
_ORIENTATION = 0x0112  # EXIF tag
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_KINDS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".gif": "GIF"}


@dataclass(frozen=True)
class Photo:
    """A picture as viewers show it."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    remarks: tuple[str, ...]  # "kind: details", what was done to it or is odd about it


def load_photo(path: str | os.PathLike[str], *, limits: Limits | None = None) -> Photo:
    """Read a picture of any kind that Pillow knows, the first of several.

    It is turned upright by its EXIF orientation and brought to sRGB by its colour profile;
    transparent parts become white, 16 bits a channel 8. Its size is taken from its header and
    checked before it is decoded. Raises ``MediaError``.
    """
    limits = limits or Limits()
    with errors_of(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about sizes and odd metadata
        try:
            with Image.open(existing(path)) as image:
                limits.check_picture(*image.size)
                image.load()
                return _as_shown(image, Path(path).suffix.lower())
        except Image.DecompressionBombError as error:
            # Pillow does not give the size, only a sentence that starts with the pixels' number.
            pixels = re.search(r"\d+", str(error))
            limits.check_picture(int(pixels[0]) if pixels else 2**63, 1)
            raise MediaError("has too many pixels; scale it down") from None
        except Image.UnidentifiedImageError:
            raise MediaError(_what_it_is(Path(path))) from None
        except (ValueError, SyntaxError, IndexError, struct.error, zlib.error) as error:
            raise MediaError(f"a damaged picture ({error})") from None


def read_image(path: str | os.PathLike[str], *, limits: Limits | None = None) -> np.ndarray:
    """Give the pixels of ``load_photo``, without its remarks."""
    return load_photo(path, limits=limits).pixels


def _what_it_is(path: Path) -> str:
    """Say why a file is no picture that Pillow knows."""
    with path.open("rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "a HEIC picture, which cannot be read here; export it as JPEG or PNG"
    if head[4:8] == b"ftyp" or head[:4] in (b"\x1aE\xdf\xa3", b"RIFF"):
        return "not an image but a film or sound; give a photo, as JPEG or PNG"
    return "not an image that can be read (PNG and JPEG are safe choices)"


def _as_shown(image: Image.Image, suffix: str) -> Photo:
    remarks = []
    if _KINDS.get(suffix, image.format) not in (image.format, "JPEG" * (image.format == "MPO")):
        remarks.append(f"wrong extension: {suffix}, but it is a picture of the kind {image.format}")
    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":  # whose others are previews
        remarks.append(f"several pictures: the first of {count} was taken")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        remarks.append("turned: as its EXIF orientation says")
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Photo(_eight_bits(image), (*remarks, "16 bits: reduced to 8"))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            remarks.append("transparent: laid on white")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        image = _to_srgb(image, profile)
    return Photo(np.array(image.convert("RGB")), tuple(remarks))


def _eight_bits(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of a grey picture with deeper pixels, whose white is not written down."""
    grey = np.asarray(image).astype(np.float64)
    most = 65535 if image.mode.startswith("I;16") else grey.max(initial=0)
    white = next((w for w in (1, 255, 65535) if most <= w), most)
    grey = (grey / white * 255).round().clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    except (ImageCms.PyCMSError, OSError):
        return image  # a broken profile is none
