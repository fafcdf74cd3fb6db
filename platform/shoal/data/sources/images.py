"""Images looked at by their headers: format, size and pixels, before anything is decoded."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from shoal.data.documents import Document, Skipped
from shoal.inputs.media import FORMATS, MAX_PIXELS

LEAST_SIDE = 4  # pixels: less is a spacer or a tracking mark
MOST_LONG = 32  # times as long as wide, at most: more is a rule or a strip, and becomes one row of patches


def check(document: Document) -> Document | Skipped:
    """The document, or why its image is not used. One without an image passes."""
    fault = image_fault(document.image) if document.image is not None else None
    return Skipped(document.origin, document.source, fault, operator="image") if fault else document


def image_fault(data: bytes) -> str | None:
    """Why an image is not used, or None; only its header is read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a bomb: it is refused here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        return "image has too many pixels"
    except Exception:  # Pillow raises many kinds for what is no image
        return "image cannot be decoded"
    if width * height > MAX_PIXELS:
        return "image has too many pixels"
    if min(width, height) < LEAST_SIDE:
        return f"image is smaller than {LEAST_SIDE} pixels"
    if max(width, height) > MOST_LONG * min(width, height):
        return f"image is more than {MOST_LONG} times as long as wide"
    return None
