"""Pictures: pixels end where they belong, and equal pixels give equal bytes."""

import numpy as np
import pytest
from PIL import Image

from diffstill.pictures import SHOWN_SIDE, contact_sheet, save_png, to_image


def noise(*shape):
    return np.random.default_rng(0).integers(0, 255, shape, np.uint8)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_holds_the_pixels(channels, mode, tmp_path):
    pixels = noise(channels, 5, 7)
    save_png(to_image(pixels), tmp_path / "deep" / "a.png")
    with Image.open(tmp_path / "deep" / "a.png") as image:
        assert (image.mode, image.size) == (mode, (7, 5))
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, channels), pixels.transpose(1, 2, 0))


def test_equal_pixels_give_equal_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        save_png(to_image(noise(3, 8, 8)), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(("side", "scale"), [(8, 6), (32, 2), (48, 1), (100, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet_shows_every_image_in_its_place(side, scale, channels):
    rows, gap = noise(2, 3, channels, side, side), 2
    sheet = np.asarray(contact_sheet(rows, gap)).reshape(2 * (side * scale + 2 * gap), 3 * (side * scale + 2 * gap), channels)
    cell = side * scale + 2 * gap
    assert scale == max(1, round(SHOWN_SIDE / side))
    for row in range(2):
        for column in range(3):
            framed = sheet[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            shown = framed[gap:-gap, gap:-gap]
            np.testing.assert_array_equal(shown[::scale, ::scale], rows[row, column].transpose(1, 2, 0))
            np.testing.assert_array_equal(shown[scale - 1 :: scale, scale - 1 :: scale], shown[::scale, ::scale])
            assert (framed[:gap] == 255).all()
            assert (framed[:, -gap:] == 255).all()


def test_large_images_are_reduced_on_a_contact_sheet():
    image = np.zeros((3, 256, 256), np.uint8)
    image[0, :, 128:] = 200  # the right half is red
    sheet = np.asarray(contact_sheet(np.stack([image, image])[None]))
    assert sheet.shape == (128 + 4, 2 * (128 + 4), 3)
    assert sheet[66, 32].tolist() == [0, 0, 0]
    assert sheet[66, 100].tolist() == [200, 0, 0]
