"""One loader for every odd picture: what comes out is upright RGB, or an error that says what and why."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from prefalign.images import ImageError, encode_png, open_image, read_image, sha256


def encoded(image, kind, name="picture", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": name}


def left_red_right_blue(width=40, height=20, mode="RGB"):
    image = Image.new("RGB", (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height))
    return image.convert(mode)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[274] = 6  # rotate 90 degrees clockwise to show
    opened = open_image(encoded(left_red_right_blue(), "JPEG", exif=exif, quality=95))
    assert opened.size == (20, 40)
    top, bottom = opened.getpixel((10, 5)), opened.getpixel((10, 35))
    assert top[0] > 200 > 60 > top[2]
    assert bottom[2] > 200 > 60 > bottom[0]


def test_alpha_is_laid_over_white():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 128))
    opened = open_image(encoded(image, "PNG"))
    assert opened.mode == "RGB"
    assert opened.getpixel((3, 3)) == (255, 255, 255)
    assert opened.getpixel((0, 0)) == (255, 127, 127)


def test_palette_transparency_is_laid_over_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 1), 1)
    opened = open_image(encoded(image, "PNG", transparency=0))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert opened.getpixel((1, 1)) == (200, 0, 0)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_every_mode_becomes_rgb(mode):
    opened = open_image(encoded(left_red_right_blue(mode=mode), "TIFF"))
    assert opened.mode == "RGB"
    assert opened.getpixel((5, 10)) != opened.getpixel((35, 10)) or mode == "1"


def test_cmyk_jpeg_keeps_its_colours():
    opened = open_image(encoded(left_red_right_blue(mode="CMYK"), "JPEG", quality=95))
    assert opened.getpixel((5, 10))[0] > 200
    assert opened.getpixel((35, 10))[2] > 200


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    opened = np.asarray(open_image(encoded(Image.fromarray(values), "PNG")))
    assert opened.shape == (8, 8, 3)
    assert abs(int(opened[4, 0, 0]) - int(values[4, 0]) // 256) <= 1


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    opened = open_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert opened.getpixel((4, 4))[0] > 200


def test_truncated_picture_is_named():
    whole = encoded(left_red_right_blue(200, 200), "JPEG", name="cut.jpg")
    with pytest.raises(ImageError, match=r"'cut\.jpg' is damaged .*Fetch it again") as error:
        open_image({"bytes": whole["bytes"][: len(whole["bytes"]) // 2], "path": "cut.jpg"})
    assert error.value.reason == "truncated_image"


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"\x00" * 64, b"PK\x03\x04rubbish"])
def test_other_files_are_named(content):
    with pytest.raises(ImageError, match=r"'page\.jpg' is not an image that Pillow can read") as error:
        open_image({"bytes": content, "path": "page.jpg"})
    assert error.value.reason == "not_an_image"


def test_empty_file():
    with pytest.raises(ImageError, match="is an empty file"):
        open_image({"bytes": b"", "path": "x.png"})


def test_huge_picture_is_refused_before_decoding():
    # a PNG header that declares 60,000 x 60,000 pixels and holds no data for them
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00"))
    with pytest.raises(ImageError, match=r"'bomb\.png'.*pixels") as error:
        open_image({"bytes": bomb, "path": "bomb.png"})
    assert error.value.reason == "huge_image"


def test_pixel_limit_names_the_size():
    with pytest.raises(ImageError, match=r"has 40 x 20 pixels, above the limit of 799"):
        open_image(encode_png(left_red_right_blue()), max_pixels=799)


def test_thin_picture_is_refused():
    with pytest.raises(ImageError, match="is 2 x 500 pixels"):
        open_image(encode_png(Image.new("RGB", (2, 500))))


def test_read_image_keeps_the_original_bytes(tmp_path):
    file = tmp_path / "a.jpg"
    left_red_right_blue().save(file)
    image = read_image(file)
    assert image["bytes"] == file.read_bytes()
    assert image["path"] == "a.jpg"
    assert sha256(image) != sha256(encode_png(left_red_right_blue()))


def test_missing_picture(tmp_path):
    with pytest.raises(ImageError, match=r"picture 'gone\.png' is not in photos/.*data\.images"):
        read_image(tmp_path / "photos" / "gone.png")


def test_floating_point_picture_is_refused():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    with pytest.raises(ImageError, match="floating-point values.*Save it with 8 bits") as error:
        open_image(encoded(Image.fromarray(values), "TIFF"))
    assert error.value.reason == "float_image"


@pytest.mark.parametrize("name", ["loop.png", "x" * 5000, "nul\x00.png"])
def test_unreadable_picture(tmp_path, name):
    if name == "loop.png":
        (tmp_path / name).symlink_to(tmp_path / name)
    with pytest.raises(ImageError, match="cannot be read .*Check its permissions.*base64 text is not read") as error:
        read_image(tmp_path / name)
    assert error.value.reason == "unreadable_image"
    assert len(str(error.value)) < 400


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_picture_without_permission(tmp_path):
    file = tmp_path / "a.png"
    left_red_right_blue().save(file)
    file.chmod(0)
    with pytest.raises(ImageError, match="Permission denied") as error:
        read_image(file)
    assert error.value.reason == "unreadable_image"
