"""Images to patches: bounded decoding, resizing, and the token span that stands for an image.

Shapes: N patches, V = 3 p^2 numbers in a patch (rows of pixels, then columns, then RGB).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from shoal.config import ModelConfig
from shoal.errors import RequestError
from shoal.inputs.tokenizer import IMG_END_ID, IMG_ID, PATCH_ID, ROW_ID

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 8 * 2**20  # of an encoded image
MAX_PIXELS = 16 * 10**6  # checked on the header, before any pixel is decoded


@dataclass(frozen=True)
class Patches:
    """One image as patches: `values` uint8 [rows * cols, V] in raster order, and the grid."""

    values: np.ndarray
    rows: int
    cols: int

    def tokens(self) -> list[int]:
        """The span that stands for the image: ``<img>``, each row of patches closed by ``<row>``, ``</img>``."""
        return [IMG_ID, *([PATCH_ID] * self.cols + [ROW_ID]) * self.rows, IMG_END_ID]

    def sha256(self) -> str:
        """Identity of the image for the prefix cache: equal placeholder tokens do not make equal images."""
        return hashlib.sha256(f"{self.rows}x{self.cols} ".encode() + self.values.tobytes()).hexdigest()


def decode_image(data: bytes) -> Image.Image:
    """The RGB image in `data`, EXIF turned upright, alpha on white. Raises RequestError (param ``image``), before
    decoding where it can: too many bytes or pixels, a format outside `FORMATS`, a broken file."""
    if len(data) > MAX_BYTES:
        raise RequestError(
            "image is too large", param="image", got=f"{len(data)} bytes", allowed=f"at most {MAX_BYTES}"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise RequestError(
                "image has too many pixels", param="image", got=f"{width}x{height}", allowed=f"at most {MAX_PIXELS}"
            )
        image.load()
        return _on_white(ImageOps.exif_transpose(image))
    except RequestError:
        raise
    except UnidentifiedImageError as error:  # whose text is an address in memory
        raise RequestError("image cannot be decoded", param="image", got="another kind", allowed=FORMATS) from error
    except Exception as error:  # Pillow raises many kinds for broken files
        raise RequestError(
            "image cannot be decoded", param="image", got=f"{type(error).__name__}: {error}"[:160], allowed=FORMATS
        ) from error


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return image.convert("RGB")


def to_patches(image: Image.Image, config: ModelConfig) -> Patches:
    """`image` scaled so that its longest side is `config.image_size`, each side rounded to whole patches."""
    p, size = config.patch, config.image_size
    scale = size / max(image.size)
    cols, rows = (min(size // p, max(1, round(side * scale / p))) for side in image.size)
    pixels = np.asarray(image.resize((cols * p, rows * p), Image.Resampling.BOX), dtype=np.uint8)
    values = pixels.reshape(rows, p, cols, p, 3).transpose(0, 2, 1, 3, 4).reshape(rows * cols, config.patch_values)
    return Patches(np.ascontiguousarray(values), rows, cols)


def patches_of(data: bytes, config: ModelConfig) -> Patches:
    """Encoded image bytes to patches; raises as `decode_image`."""
    return to_patches(decode_image(data), config)


def grid(tokens: np.ndarray | Sequence[int]) -> np.ndarray:
    """Row and column of every patch token, int64 [N, 2], from the token ids alone."""
    ids = np.asarray(tokens)
    at = np.arange(len(ids))
    image_start = np.maximum.accumulate(np.where(ids == IMG_ID, at, 0))
    row_start = np.maximum.accumulate(np.where((ids == IMG_ID) | (ids == ROW_ID), at, 0))
    rows_before = np.concatenate([[0], np.cumsum(ids == ROW_ID)])
    where = np.flatnonzero(ids == PATCH_ID)
    row = rows_before[where] - rows_before[image_start[where]]
    return np.stack([row, where - row_start[where] - 1], axis=1).astype(np.int64)


def from_data_url(url: str) -> bytes:
    """The bytes of a ``data:image/...;base64,`` URL. Nothing is ever fetched. Raises RequestError (param ``image_url``)."""
    head, comma, body = url.partition(",")
    if not url.startswith("data:") or not comma or not head.endswith(";base64"):
        raise RequestError(
            "image_url", param="image_url", got=url[:40], allowed="data:image/png;base64,... (URLs are not fetched)"
        )
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise RequestError("image is too large", param="image_url", got=f"{len(body)} characters of base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("image_url is not valid base64", param="image_url", got=str(error)) from error
