"""The one way pictures enter: encoded bytes on disk and between stages, RGB `PIL.Image` for a model.

Nothing in this package calls `PIL.Image.open` anywhere else, so orientation, transparency, animation and size are
settled once and identically for generation, training and evaluation.
"""

from __future__ import annotations

import errno
import hashlib
import io
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000
MAX_BYTES = 128 * 1024 * 1024
MAX_ASPECT_RATIO = 200
SYSTEM_ERRORS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
"""What is wrong with the machine, not with one picture or row: never put down to the row."""


class EncodedImage(TypedDict):
    """A picture as `datasets.Image` stores it: the original file's bytes and its name (never a machine path)."""

    bytes: bytes
    path: str | None


class ImageError(ValueError):
    """A picture that cannot be used; `reason` is the word it is counted under in a manifest."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_image(path: str | Path) -> EncodedImage:
    """Read a file's bytes without decoding them.

    Raises:
        ImageError: `missing_image` if there is no such file, `huge_image` above `MAX_BYTES`, `unreadable_image` for a file
            that may not be read or a text that is no file name.
        OSError: for what is wrong with the machine (`SYSTEM_ERRORS`).
    """
    path = Path(path)
    name = path.name if len(path.name) <= 100 else f"{path.name[:60]}... ({len(path.name)} characters)"
    missing = ImageError("missing_image", f"picture {name!r} is not in {path.parent.name[:60] or '.'}/. Check the path "
                         "in the row, or say where pictures are with `data.images`.")  # fmt: skip
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise missing
        if status.st_size > MAX_BYTES:
            raise ImageError("huge_image", f"picture {name!r} is {status.st_size / 2**20:.0f} MiB; files above "
                             f"{MAX_BYTES // 2**20} MiB are refused. Re-encode it smaller.")  # fmt: skip
        return {"bytes": path.read_bytes(), "path": path.name}
    except (FileNotFoundError, NotADirectoryError):
        raise missing from None
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise
        why = error.strerror if isinstance(error, OSError) else "not a file name"
        raise ImageError("unreadable_image", f"picture {name!r} cannot be read ({why}). Check its permissions, and that the "
                         "row holds a file's path; base64 text is not read.") from error  # fmt: skip


def encode_png(image: Image.Image, name: str | None = None) -> EncodedImage:
    """Encode an RGB picture as PNG (lossless)."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": name}


def sha256(image: EncodedImage) -> str:
    """Hex SHA-256 of the encoded bytes: the picture's identity in provenance."""
    return hashlib.sha256(image["bytes"]).hexdigest()


def pixels_sha256(image: Image.Image) -> str:
    """Hex SHA-256 of a decoded picture's mode, size and pixels."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


def open_image(image: EncodedImage, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to RGB: EXIF orientation applied, alpha laid over white, first frame of animations, CMYK and palette converted.

    Args:
        image: encoded picture.
        max_pixels: width x height above which the picture is refused before it is decoded.

    Returns:
        An RGB picture that owns its pixels.

    Raises:
        ImageError: with `reason` one of `empty_image`, `not_an_image`, `truncated_image`, `huge_image`, `thin_image`,
            `float_image`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = repr(image["path"]) if image["path"] else "(unnamed)"
    if not image["bytes"]:
        raise ImageError("empty_image", f"picture {name} is an empty file. Fetch it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(image["bytes"]))
    except Image.DecompressionBombError as error:
        raise ImageError("huge_image", f"picture {name} declares more pixels than can be decoded safely ({error}). "
                         "Reduce it before use.") from error  # fmt: skip
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageError("not_an_image", f"picture {name} is not an image that Pillow can read (it starts with "
                         f"{image['bytes'][:8]!r}). Convert it to JPEG, PNG or WebP.") from error  # fmt: skip
    width, height = opened.size
    if width * height > max_pixels:
        raise ImageError("huge_image", f"picture {name} has {width} x {height} pixels, above the limit of {max_pixels:,}. "
                         "A model shrinks it anyway: reduce it first, or raise `max_pixels`.")  # fmt: skip
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError("thin_image", f"picture {name} is {width} x {height} pixels; image processors refuse sides "
                         f"more than {MAX_ASPECT_RATIO} to 1. Crop it.")  # fmt: skip
    if opened.mode == "F":
        raise ImageError("float_image", f"picture {name} holds floating-point values, whose black and white nothing says; "
                         "converted as they are they would be clipped to 0 to 255. Save it with 8 bits per channel.")  # fmt: skip
    try:
        opened.seek(0)
        oriented = ImageOps.exif_transpose(opened)
        oriented.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError("truncated_image", f"picture {name} is damaged ({error}). Fetch it again.") from error
    if "A" in oriented.getbands() or "transparency" in oriented.info:
        with_alpha = oriented.convert("RGBA")
        white = Image.new("RGBA", with_alpha.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    if oriented.mode in ("I;16", "I;16B", "I;16L", "I"):
        # Pillow clips 16-bit grey to 8 bits on conversion; scale it instead
        return oriented.point(lambda value: value / 256).convert("L").convert("RGB")
    return oriented.convert("RGB")
