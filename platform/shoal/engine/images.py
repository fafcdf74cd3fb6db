"""The patches of a prompt's images, and where they stand. Letters: n patches, p pixels of a patch's side."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from shoal.engine.pages import PatchRun
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import PATCH_ID


@dataclass(frozen=True)
class PromptImages:
    """The patches of a prompt and where they stand."""

    values: np.ndarray  # uint8 [n, 3p^2]
    grid: np.ndarray  # int64 [n, 2]: row and column
    at: list[int]  # position of each patch, rising
    names: list[str]  # sha256 of each image
    firsts: list[int]  # number of each image's first patch among all, rising; and how many patches there are

    @classmethod
    def of(cls, prompt: Encoded) -> PromptImages | None:
        values = prompt.patches
        if values is None:
            return None
        grid = media.grid(prompt.ids)
        at = np.flatnonzero(np.asarray(prompt.ids) == PATCH_ID).tolist()
        counts = [len(image.values) for image in prompt.images]
        firsts = [*accumulate(counts, initial=0)]
        return cls(values, grid, at, [image.sha256() for image in prompt.images], firsts)

    def between(self, start: int, end: int) -> slice:
        """The patches that stand at positions `start` .. `end` - 1."""
        return slice(bisect.bisect_left(self.at, start), bisect.bisect_left(self.at, end))

    def runs(self, start: int, end: int) -> list[PatchRun]:
        """The images whose patches stand at positions `start` .. `end` - 1, in order, each with the number of its first patch
        there. An image that comes twice is named twice."""
        span = self.between(start, end)
        images = range(bisect.bisect_right(self.firsts, span.start) - 1, bisect.bisect_left(self.firsts, span.stop))
        return [(self.names[i], max(span.start - self.firsts[i], 0)) for i in images] if span.stop > span.start else []
