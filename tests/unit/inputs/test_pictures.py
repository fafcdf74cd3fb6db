"""What a picture's pixels become, whatever its file holds them as: against files made here byte by byte, from numbers."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from shoal.errors import RequestError
from shoal.inputs import media

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6  # the colour types of a PNG
CHANNELS = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
COLOURS = [(10, 20, 30), (200, 100, 50), (0, 255, 0), (7, 7, 7)]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(kind: int, bits: int, pixels: list[tuple[int, ...]], clear: bytes = b"") -> bytes:
    """A PNG one pixel high; `clear`: its chunk tRNS."""
    row = 0
    for value in (channel for pixel in pixels for channel in pixel):
        row = row << bits | value
    used = len(pixels) * CHANNELS[kind] * bits
    line = b"\0" + (row << -used % 8).to_bytes(-(-used // 8), "big")
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", len(pixels), 1, bits, kind, 0, 0, 0))]
    chunks += [chunk(b"PLTE", bytes(channel for colour in COLOURS for channel in colour))] if kind == PALETTE else []
    chunks += [chunk(b"tRNS", clear)] if clear else []
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IDAT", zlib.compress(line)), chunk(b"IEND", b"")])


def expected(kind: int, bits: int, pixel: tuple[int, ...]) -> list[float]:
    """Red, green and blue of a pixel on white, from 0 to 255."""
    if kind == PALETTE:
        return [float(channel) for channel in COLOURS[pixel[0]]]
    light = [255 * channel / (2**bits - 1) for channel in pixel]
    alpha = light.pop() / 255 if kind in (GREY_ALPHA, COLOUR_ALPHA) else 1.0
    return [channel * alpha + 255 * (1 - alpha) for channel in (light * 3)[:3]]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (GREY, 1), (GREY, 2), (GREY, 4), (GREY, 8), (GREY, 16), (COLOUR, 8), (COLOUR, 16), (PALETTE, 2), (PALETTE, 4),
        (PALETTE, 8), (GREY_ALPHA, 8), (GREY_ALPHA, 16), (COLOUR_ALPHA, 8), (COLOUR_ALPHA, 16),
    ],
)  # fmt: skip
def test_a_png_of_every_kind_keeps_its_light(kind: int, bits: int) -> None:
    steps = range(4) if kind == PALETTE else np.linspace(0, 2**bits - 1, 9).astype(int).tolist()
    pixels = [tuple(steps[(at + 3 * channel) % len(steps)] for channel in range(CHANNELS[kind])) for at in range(9)]
    seen = np.asarray(media.decode_image(png(kind, bits, pixels)))[0]
    assert np.abs(seen - np.array([expected(kind, bits, pixel) for pixel in pixels])).max() <= 2


@pytest.mark.parametrize(
    ("kind", "bits", "clear", "other"),
    [
        (GREY, 1, (0,), (1,)), (GREY, 2, (1,), (2,)), (GREY, 4, (3,), (9,)), (GREY, 8, (7,), (8,)),
        (GREY, 16, (0x1234,), (0x1235,)), (COLOUR, 8, (1, 2, 3), (1, 2, 4)),
        (COLOUR, 16, (0x1234, 0x8000, 0xFFFF), (0x1334, 0x8000, 0xFFFF)),
    ],
)  # fmt: skip
def test_a_transparent_colour_is_white_at_every_depth_and_no_other_is(
    kind: int, bits: int, clear: tuple[int, ...], other: tuple[int, ...]
) -> None:
    data = png(kind, bits, [clear, other], struct.pack(f">{len(clear)}H", *clear))
    seen = np.asarray(media.decode_image(data))[0]
    assert seen[0].tolist() == [255, 255, 255]
    assert np.abs(seen[1] - np.array(expected(kind, bits, other))).max() <= 1


def test_a_palette_may_be_partly_transparent() -> None:
    seen = np.asarray(media.decode_image(png(PALETTE, 4, [(0,), (1,), (2,)], bytes([0, 128]))))[0]
    half = [round(c * 128 / 255 + 255 * 127 / 255) for c in COLOURS[1]]
    assert np.abs(seen - np.array([[255, 255, 255], half, COLOURS[2]])).max() <= 1


def test_a_jpeg_of_four_inks_is_seen_as_printed() -> None:
    out = io.BytesIO()
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(out, "JPEG", quality=100)
    seen = np.asarray(media.decode_image(out.getvalue()))[8, 8]
    assert np.abs(seen.astype(int) - [0, 255, 255]).max() <= 3  # cyan


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255  # the upper left
    # how a camera stores it: the first row and column of the file are these sides of the picture (EXIF 2.32, 4.6.5.A)
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T, 6: upright[:, ::-1].T,
        7: upright[::-1, ::-1].T, 8: upright[::-1].T,
    }  # fmt: skip
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    turned = Image.fromarray(np.ascontiguousarray(stored[orientation])).convert("RGB")
    turned.save(out, kind, exif=exif, quality=100)
    seen = np.asarray(media.decode_image(out.getvalue()).convert("L"))
    assert seen.shape == upright.shape and np.abs(seen.astype(int) - upright).max() < 40


def test_broken_exif_data_cost_no_picture() -> None:
    turn = struct.pack(">HHI4s", 0x0112, 3, 1, b"\0\6\0\0")
    broken = struct.pack(">HHI4s", 0x0100, 2, 4, b"abcd")  # letters where a width should be
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + broken + turn + bytes(4)
    out = io.BytesIO()
    Image.new("RGB", (24, 12), (9, 9, 9)).save(out, "JPEG", exif=exif)
    assert media.decode_image(out.getvalue()).size == (12, 24)


@pytest.mark.parametrize("channels", [(), (3,), (4,)])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_picture_that_another_program_decoded_keeps_its_light(bits: int, channels: tuple[int, ...]) -> None:
    """vLLM hands over Pillow's pictures, or arrays: 16 bits were cut to their lower half, or became white."""
    light = np.linspace(0, 2**bits - 1, 9).astype(int).reshape(1, 9)
    numbers = np.broadcast_to(light[(..., *[None] * len(channels))], (2, 9, *channels)).copy()
    if channels == (4,):
        numbers[..., 3] = 2**bits - 1
    seen = np.asarray(media.as_rgb(numbers.astype(np.uint8 if bits == 8 else np.uint16)))
    assert seen.shape == (2, 9, 3) and np.abs(seen[0, :, 0] - np.linspace(0, 255, 9)).max() <= 2


def test_a_decoded_picture_is_what_decoding_it_here_gives() -> None:
    for kind, bits in ((GREY, 16), (GREY_ALPHA, 8), (COLOUR_ALPHA, 16), (COLOUR, 8)):
        data = png(kind, bits, [tuple((at * 0x1234 + 77) % 2**bits for _ in range(CHANNELS[kind])) for at in range(9)])
        theirs = media.as_rgb(Image.open(io.BytesIO(data)))
        assert np.array_equal(np.asarray(theirs), np.asarray(media.decode_image(data)))


@pytest.mark.parametrize("numbers", [np.ones((4, 4, 3)), np.ones((4, 4, 3), np.int16), np.ones((3, 8, 8), np.uint8)])
def test_numbers_that_are_no_pixels_are_refused(numbers: np.ndarray) -> None:
    with pytest.raises(RequestError, match="image"):
        media.as_rgb(numbers)
