"""Photos of every kind are read as viewers show them."""

import cv2
import numpy as np
import pytest
from PIL import Image

from train.data.limits import MediaError
from train.data.photo import load_photo

RAMP = np.linspace(20, 230, 60).round().astype(np.uint8)
GREY = np.repeat(RAMP[None], 40, axis=0)  # (40, 60), darker on the left
COLOUR = np.stack([GREY, GREY[:, ::-1], np.full_like(GREY, 90)], axis=2)


def rgba() -> Image.Image:
    alpha = np.full_like(GREY, 255)
    alpha[:, :10] = 0
    return Image.fromarray(np.dstack([COLOUR, alpha]))


def animation() -> dict:
    other = Image.fromarray(255 - COLOUR)
    return {"save_all": True, "append_images": [other], "loop": 0}


def turned() -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    return {"exif": exif}


ON_WHITE = np.where(np.arange(60)[None, :, None] < 10, 255, COLOUR)
THREE = np.repeat(GREY[..., None], 3, axis=2)
#: name of the file: the picture, options of saving it, what is shown, the remark
KINDS = {
    "plain.png": (Image.fromarray(COLOUR), {}, COLOUR, ""),
    "grey.jpg": (Image.fromarray(GREY), {}, THREE, ""),
    "palette.png": (Image.fromarray(THREE).quantize(), {}, THREE, ""),
    "16 bits.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, THREE, "16 bits"),
    "16 bits.tif": (Image.fromarray(GREY.astype(np.uint16) * 257), {}, THREE, "16 bits"),
    "float.tif": (Image.fromarray(GREY / np.float32(255)), {}, THREE, "16 bits"),
    "прозрачный.png": (rgba(), {}, ON_WHITE, "transparent: laid on white"),
    "透明 1.webp": (rgba(), {"lossless": True}, ON_WHITE, "transparent: laid on white"),
    "print.jpg": (Image.fromarray(COLOUR).convert("CMYK"), {}, COLOUR, ""),
    "turned.jpg": (Image.fromarray(COLOUR), turned(), np.rot90(COLOUR, -1), "turned: as its EXIF"),
    "film.gif": (Image.fromarray(COLOUR), animation(), COLOUR, "the first of 2"),
    "film.webp": (Image.fromarray(COLOUR), animation(), COLOUR, "the first of 2"),
    "really a jpeg.png": (Image.fromarray(COLOUR), {"format": "JPEG"}, COLOUR, "wrong extension"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_shown_as_it_is(tmp_path, name):
    image, options, expected, remark = KINDS[name]
    image.save(tmp_path / name, **options)
    photo = load_photo(tmp_path / name)
    assert photo.pixels.dtype == np.uint8
    assert photo.pixels.shape == expected.shape
    assert np.abs(photo.pixels.astype(int) - expected).mean() < 5
    assert (remark in "; ".join(photo.remarks)) if remark else not photo.remarks


def test_sixteen_bits_of_colour(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), COLOUR[..., ::-1].astype(np.uint16) * 257)
    assert np.abs(load_photo(tmp_path / "deep.png").pixels.astype(int) - COLOUR).max() <= 1


def broken(name: str) -> bytes:
    """Content of a file that is no usable picture."""
    if name == "phone.heic":
        return b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic"
    if name == "film.jpg":
        return b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00"
    whole = cv2.imencode(name[-4:], np.random.default_rng(0).integers(0, 255, (90, 90, 3)))[1]
    return whole.tobytes()[: len(whole) // 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("phone.heic", "a HEIC picture, which cannot be read here; export it as JPEG or PNG"),
        ("film.jpg", "a film or sound; give a photo"),
        ("half.jpg", "truncated|damaged"),
        ("half.png", "truncated|damaged"),
    ],
)
def test_what_is_no_picture_is_named_in_one_line(tmp_path, name, message):
    (tmp_path / name).write_bytes(broken(name))
    with pytest.raises(MediaError, match=message) as caught:
        load_photo(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
