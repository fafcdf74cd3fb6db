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
from functools import cached_property
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.Image import Transpose

from shoal.config import ModelConfig
from shoal.errors import RequestError
from shoal.inputs.tokenizer import IMG_END_ID, IMG_ID, PATCH_ID, ROW_ID

FORMATS = ("PNG", "JPEG", "WEBP")  # of a corpus, and
SHOWN = (*FORMATS, "GIF")  # of what a request shows, which stands still
MAX_BYTES = 8 * 2**20  # of an encoded image
MAX_PIXELS = 16 * 10**6  # checked on the header, before any pixel is decoded
# what makes a picture upright, by its EXIF orientation
TURNS: dict[Any, Transpose] = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip


@dataclass(frozen=True)
class Patches:
    """One image as patches: `values` uint8 [rows * cols, V] in raster order, and the grid. `values` are a copy that cannot be
    written: the image's identity is computed once."""

    values: np.ndarray
    rows: int
    cols: int

    def __post_init__(self) -> None:
        values = np.array(self.values)
        values.flags.writeable = False
        object.__setattr__(self, "values", values)

    def tokens(self) -> list[int]:
        """The span that stands for the image: ``<img>``, each row of patches closed by ``<row>``, ``</img>``."""
        return [IMG_ID, *([PATCH_ID] * self.cols + [ROW_ID]) * self.rows, IMG_END_ID]

    def sha256(self) -> str:
        """Identity of the image for the prefix cache: equal placeholder tokens do not make equal images."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        return hashlib.sha256(f"{self.rows}x{self.cols} ".encode() + self.values.tobytes()).hexdigest()


def decode_image(data: bytes) -> Image.Image:
    """The RGB image in `data`, EXIF turned upright, alpha on white. Raises RequestError (param ``image``), before
    decoding where it can: too many bytes or pixels, a format outside `SHOWN`, a broken file."""
    if len(data) > MAX_BYTES:
        raise RequestError(
            "image is too large", param="image", got=f"{len(data)} bytes", allowed=f"at most {MAX_BYTES}"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=SHOWN)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise RequestError(
                "image has too many pixels", param="image", got=f"{width}x{height}", allowed=f"at most {MAX_PIXELS}"
            )
        if image.format == "GIF" and getattr(image, "is_animated", False):
            raise RequestError("image moves", param="image", got="an animated GIF", allowed=f"stills of {SHOWN}")
        raw = str(image.tile[0][3]) if image.tile else ""  # how the file holds a pixel: loading forgets it
        image.load()
        return _upright(_on_white(image, raw), image)
    except RequestError:
        raise
    except UnidentifiedImageError as error:  # whose text is an address in memory
        raise RequestError("image cannot be decoded", param="image", got="another kind", allowed=SHOWN) from error
    except Exception as error:  # Pillow raises many kinds for broken files
        raise RequestError(
            "image cannot be decoded", param="image", got=f"{type(error).__name__}: {error}"[:160], allowed=SHOWN
        ) from error


def as_rgb(image: Any) -> Image.Image:
    """A picture that somebody else decoded as `decode_image` gives it: one of Pillow's, or numbers [H, W], [H, W, 3] or
    [H, W, 4] of 8 or 16 bits without a sign. Raises RequestError (param ``image``) for others."""
    if isinstance(image, Image.Image):
        return _upright(_on_white(image, ""), image)
    numbers = np.asarray(image)
    shaped = numbers.ndim == 2 or (numbers.ndim == 3 and numbers.shape[2] in (3, 4))
    if numbers.dtype not in (np.uint8, np.uint16) or not shaped or not numbers.size:
        got = f"{numbers.dtype} {list(numbers.shape)}"
        allowed = "uint8 or uint16, [H, W], [H, W, 3] or [H, W, 4]"
        raise RequestError("image", param="image", got=got, allowed=allowed)
    deep = numbers.dtype == np.uint16
    return _on_white(Image.fromarray((numbers >> 8 if deep else numbers).astype(np.uint8)), "")


def _on_white(image: Image.Image, raw: str) -> Image.Image:
    """The RGB image, what is transparent in it white. `raw`: Pillow's name of the pixels in the file.

    Of 16 bits a channel the upper eight are taken, as Pillow does for all kinds but grey, where its `convert` would make white
    of all that is not black. It leaves a file's transparent colour as it is spelt there, so that is brought to eight bits too.
    """
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):  # grey of 16 bits
        deep = np.asarray(image)
        alpha = np.where(deep == clear, 0, 255).astype(np.uint8)
        image = Image.merge("LA", [Image.fromarray(each) for each in ((deep >> 8).astype(np.uint8), alpha)])
    elif raw in ("L;2", "L;4") and clear is not None:  # 255 is the brightest of 2, 4 and 8 bits
        image.info["transparency"] = clear * (85 if raw == "L;2" else 17)
    elif raw == "RGB;16B" and clear is not None:
        image.info["transparency"] = tuple(channel >> 8 for channel in clear)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return image.convert("RGB")


def _upright(image: Image.Image, told: Image.Image) -> Image.Image:
    """`image` turned as the EXIF data of `told` say. Data that cannot be read cost the turn and not the picture."""
    try:
        turn = TURNS.get(told.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises many kinds for broken data
        return image
    return image.transpose(turn) if turn is not None else image


def to_patches(image: Image.Image, config: ModelConfig) -> Patches:
    """`image` scaled so that its longest side is `config.image_size`, each side rounded to whole patches."""
    p, size = config.patch, config.image_size
    scale = size / max(image.size)
    cols, rows = (min(size // p, max(1, round(side * scale / p))) for side in image.size)
    pixels = np.asarray(image.resize((cols * p, rows * p), Image.Resampling.BOX), dtype=np.uint8)
    values = pixels.reshape(rows, p, cols, p, 3).transpose(0, 2, 1, 3, 4).reshape(rows * cols, config.patch_values)
    return Patches(values, rows, cols)


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
    body = "".join(body.split())  # base64 has line feeds where MIME's rules wrote it
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise RequestError("image is too large", param="image_url", got=f"{len(body)} characters of base64")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("image_url is not valid base64", param="image_url", got=str(error)) from error
