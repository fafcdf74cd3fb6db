"""Where the patches of a prompt's images stand, by counting."""

from __future__ import annotations

import numpy as np

from shoal.engine.images import PromptImages
from shoal.inputs.chat import Encoded
from shoal.inputs.media import Patches
from shoal.inputs.tokenizer import PATCH_ID


def test_of_each_stretch_of_a_prompt_the_patches_and_the_images_are_found() -> None:
    """An image that begins before the stretch begins there with another of its patches; one that comes twice is named twice."""
    rng = np.random.default_rng(0)
    one, other = (Patches(rng.integers(0, 256, (r * c, 48), dtype=np.uint8), r, c) for r, c in ((2, 3), (1, 2)))
    given = [one, other, one]
    ids = [50, *one.tokens(), *other.tokens(), 60, 61, *one.tokens()]
    images = PromptImages.of(Encoded(ids, given))
    assert images is not None
    assert (images.values == np.concatenate([image.values for image in given])).all()
    assert images.grid.tolist() == [[r, c] for image in given for r in range(image.rows) for c in range(image.cols)]
    numbers = [(image, patch) for image, each in enumerate(given) for patch in range(len(each.values))]
    patches = iter(range(len(numbers)))
    standing = [next(patches) if token == PATCH_ID else None for token in ids]
    for start in range(len(ids) + 1):
        for end in range(start, len(ids) + 1):
            there = [patch for patch in standing[start:end] if patch is not None]
            assert list(range(len(numbers)))[images.between(start, end)] == there
            firsts = dict(reversed([numbers[patch] for patch in there]))
            assert images.runs(start, end) == [(given[image].sha256(), firsts[image]) for image in sorted(firsts)]


def test_a_prompt_without_images_has_none() -> None:
    assert PromptImages.of(Encoded([50, 60])) is None
