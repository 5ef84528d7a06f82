"""Images as the model should see them: orientation, transparency, colour spaces, broken and huge files."""

import io

import numpy as np
import pytest
from PIL import Image

from verl_avar.evaluation.images import open_images


def stored(image: Image.Image, kind: str, **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue()}


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_an_image_turned_by_exif_stands_upright():
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (0, 0, 20, 20))  # left half
    exif = Image.Exif()
    exif[0x0112] = 6  # show it turned by 90° clockwise
    (seen,) = open_images([stored(image, "PNG", exif=exif)])
    assert seen.size == (20, 40)
    assert seen.getpixel((10, 5)) == (0, 0, 255) and seen.getpixel((10, 35)) == (255, 0, 0)


def test_what_is_transparent_shows_white():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    (seen,) = open_images([stored(image, "PNG")])
    assert seen.mode == "RGB" and seen.getpixel((0, 0)) == (255, 0, 0) and seen.getpixel((3, 3)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_shows_white():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 0, 128, 0])
    image.putpixel((1, 0), 1)
    (seen,) = open_images([stored(image, "PNG", transparency=0)])
    assert seen.getpixel((0, 0)) == (255, 255, 255) and seen.getpixel((1, 0)) == (0, 128, 0)


def test_cmyk_and_grey_become_rgb():
    cmyk, grey = Image.new("CMYK", (8, 8), (255, 0, 0, 0)), Image.new("L", (8, 8), 77)
    seen_cmyk, seen_grey = open_images([stored(cmyk, "JPEG", quality=95), stored(grey, "PNG")])
    red, green, blue = pixels(seen_cmyk).mean((0, 1))
    assert red < 60 and green > 150 and blue > 150  # cyan
    assert seen_grey.getpixel((0, 0)) == (77, 77, 77)


def test_sixteen_bits_are_scaled_not_cut_off():
    values = np.array([[0, 256 * 100, 65535]], dtype=np.uint16)
    (seen,) = open_images([stored(Image.fromarray(values), "PNG")])
    assert [seen.getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_without_a_known_white_are_an_error(kind):
    with pytest.raises(ValueError, match="save it with 8 or 16 bits"):
        open_images([stored(Image.fromarray(np.array([[0, 1, 70000]], dtype=kind)), "TIFF")])


def test_paths_bytes_and_open_images_are_the_same(tmp_path):
    image = Image.new("RGB", (3, 3), "green")
    image.save(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    path = str(tmp_path / "a.png")
    forms = [image, raw, path, {"bytes": raw, "path": None}, {"path": path}, {"bytes": None, "path": path}]
    assert all((pixels(seen) == pixels(image)).all() for seen in open_images(forms))


def test_a_broken_image_is_an_error():
    whole = stored(Image.effect_noise((64, 64), 50), "PNG")["bytes"]
    for bad in (b"no image", whole[: len(whole) // 2], b""):
        with pytest.raises((OSError, KeyError)):
            open_images([{"bytes": bad} if bad else {"bytes": bad, "path": "nowhere.png"}])


def test_an_image_beyond_the_limit_of_pixels_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="image too large"):
        open_images([stored(Image.new("L", (60, 60)), "PNG")])
