"""What a model's bits per byte are held against, on the same held-out bytes: unigram and 5-gram, fitted to what the model read;
gzip and xz, which see the held-out bytes alone; and zstd with what the model read as its dictionary.

The 5-gram is a byte model with Witten-Bell interpolation (Witten & Bell 1991), counted with numpy; it is a strong
baseline at minutes of training, which is why it stands beside the model's own number.
"""

from __future__ import annotations

import gzip
import lzma
import math

import numpy as np
import zstandard

ORDER = 5
LEVEL = 19  # of zstd: the strongest that needs no more memory to read than to write


def bits_per_byte(train: bytes, heldout: bytes) -> dict[str, float]:
    """Bits per byte of `heldout`, by the name of what needs them. The n-grams are left out where `train`, or `heldout`, is too
    short for them: a model may have read nothing of this kind."""
    per_byte = 8 / max(1, len(heldout))
    found = {"unigram": ngram_bits(train, heldout, 1), "5-gram": ngram_bits(train, heldout, ORDER)}
    found = {name: bits for name, bits in found.items() if not math.isnan(bits)}  # for which JSON has no word
    return found | {
        "gzip": per_byte * len(gzip.compress(heldout, 9)),
        "xz": per_byte * len(lzma.compress(heldout, preset=9 | lzma.PRESET_EXTREME)),
        "zstd with the training text": per_byte * len(zstd(train, heldout)),
    }


def zstd(train: bytes, heldout: bytes) -> bytes:
    """`heldout` compressed by who has read `train`, with a window over both."""
    window = min(zstandard.WINDOWLOG_MAX, max(zstandard.WINDOWLOG_MIN, (len(train) + len(heldout)).bit_length()))
    dictionary = (
        zstandard.ZstdCompressionDict(train, dict_type=zstandard.DICT_TYPE_RAWCONTENT) if len(train) > 8 else None
    )
    how = zstandard.ZstdCompressionParameters.from_level(LEVEL, window_log=window, enable_ldm=True)
    return zstandard.ZstdCompressor(dict_data=dictionary, compression_params=how).compress(heldout)


def ngram_bits(train: bytes, heldout: bytes, order: int) -> float:
    """Bits per byte of `heldout` under the interpolated byte n-gram of `train`:

    p_n(b | c) = (count(c b) + kinds(c) p_{n-1}(b | c')) / (count(c) + kinds(c)),   p_0 = 1/256

    where kinds(c) is how many different bytes followed c. The first ``order - 1`` bytes are not scored.
    """
    a, h = (np.frombuffer(data, dtype=np.uint8).astype(np.int64) for data in (train, heldout))
    if len(a) < order or len(h) < order:
        return float("nan")
    p = np.full(len(h) - order + 1, 1 / 256)
    for n in range(1, order + 1):
        grams, counts = np.unique(_windows(a, n), return_counts=True)
        contexts, start = np.unique(grams >> 8, return_index=True)
        totals, kinds = np.add.reduceat(counts, start), np.diff(np.append(start, len(grams)))
        asked = _windows(h[order - n :], n)
        seen = _lookup(grams, counts, asked)
        total, kind = _lookup(contexts, totals, asked >> 8), _lookup(contexts, kinds, asked >> 8)
        p = np.where(total > 0, (seen + kind * p) / np.maximum(total + kind, 1), p)
    return float(-np.log2(p).mean())


def _windows(values: np.ndarray, n: int) -> np.ndarray:
    """Each run of n bytes as one integer, last byte lowest; the shift leaves the context."""
    key = np.zeros(len(values) - n + 1, dtype=np.int64)
    for offset in range(n):
        key = (key << 8) | values[offset : offset + len(key)]
    return key


def _lookup(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
