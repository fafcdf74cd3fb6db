import math
import random

import pytest
import zstandard

from shoal.evaluate.baselines import bits_per_byte, ngram_bits, zstd


def test_uniform_bytes_cost_eight_bits():
    data = random.Random(0).randbytes(200_000)
    assert ngram_bits(data, random.Random(1).randbytes(20_000), 1) == pytest.approx(8.0, abs=0.01)


def test_unigram_is_the_entropy():
    data = bytes(random.Random(0).choices(b"aab", k=50_000))
    entropy = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_bits(data, data, 1) == pytest.approx(entropy, abs=0.01)


def test_by_hand_on_three_letters():
    """Train "abab", score "aba" at order 2: p(b|a) from counts 2 of 2 with one kind, backing off to the unigram."""
    unigram_a = (2 + 2 / 256) / (4 + 2)
    unigram_b = unigram_a
    b_after_a = (2 + 1 * unigram_b) / (2 + 1)
    a_after_b = (1 + 1 * unigram_a) / (1 + 1)
    want = -(math.log2(b_after_a) + math.log2(a_after_b)) / 2
    assert ngram_bits(b"abab", b"aba", 2) == pytest.approx(want)


def test_a_probability_distribution_sums_to_one():
    train = b"the quick brown fox jumps over the lazy dog " * 3
    total = sum(2 ** -ngram_bits(train, b"quic" + bytes([b]), 5) for b in range(256))
    assert total == pytest.approx(1.0)


def test_order_helps_on_structure():
    data = b"for i in range(10):\n    print(i)\n" * 200
    result = bits_per_byte(data, data[:500])
    assert result["5-gram"] < result["unigram"] / 5 and result["gzip"] < result["unigram"]


def test_zstd_has_read_the_training_text_and_the_others_have_not():
    """What was seen before costs next to nothing, however random; xz and gzip cannot know it."""
    draws = random.Random(5)
    train, fresh = draws.randbytes(300_000), draws.randbytes(20_000)
    seen = train[1000:21_000]  # farther back than gzip could see
    assert bits_per_byte(train, seen)["zstd with the training text"] < 0.02
    other = bits_per_byte(train, fresh)
    assert min(other["zstd with the training text"], other["xz"], other["gzip"]) >= 8.0
    assert bits_per_byte(train, seen)["xz"] >= 8.0
    compressed = zstd(train, seen)
    plain = zstandard.ZstdCompressionDict(train, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    assert zstandard.ZstdDecompressor(dict_data=plain, max_window_size=2**27).decompress(compressed) == seen
    assert bits_per_byte(b"", b"abc" * 50)["zstd with the training text"] < 8


@pytest.mark.parametrize("train", [b"", b"abc"])
def test_what_was_fitted_to_nothing_is_left_out(train: bytes) -> None:
    """A model that read no code is held against what needs no training; "NaN" is no JSON."""
    found = bits_per_byte(train, b"the tide turns and the tide returns" * 9)
    assert all(math.isfinite(bits) for bits in found.values()) and {"gzip", "xz"} <= found.keys()
    assert "5-gram" not in found and ("unigram" in found) == bool(train)
