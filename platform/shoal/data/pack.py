"""Documents packed into rows of one fixed length, nearly without padding.

A long text is split at row boundaries, and nothing of it is lost. What is shorter than a row waits in a stock of pieces, and
each row is closed with the set of pieces that fits best. An image is never split, nor is it parted from its text.

Notable: the stock is bounded, so memory is flat however large the corpus; the result depends on the order alone.
Letters: T row length, n patches, V numbers in a patch.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import PAD_ID, PATCH_ID

STOCK_ROWS = 64  # rows' worth of pieces to choose from
CANDIDATES = 32  # lengths that are tried for closing a row ...
REPEATS = 8  # ... each at most so often

PADDING = -1  # document id where there is none


@dataclass(frozen=True)
class Row:
    """One training row: `tokens` int32 [T], `docs` int16 [T] (a number for each document, -1 padding), `patches` uint8
    [n, V] or None, the `groups` that its documents are of, by their number, and how many of its tokens came from which
    source."""

    tokens: np.ndarray
    docs: np.ndarray
    patches: np.ndarray | None
    groups: list[int]
    sources: dict[str, int]

    @property
    def used(self) -> int:
        """Tokens that are not padding."""
        return sum(self.sources.values())


@dataclass(frozen=True)
class _Piece:
    ids: np.ndarray
    patches: np.ndarray | None
    source: str
    group: int


class Packer:
    """Rows of `length` tokens out of a stream of documents; use one for each split and modality."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens = 0  # given to `add`
        self.cut = 0  # of them, lost: the text beyond what fits beside an image
        self.padded = 0  # places of rows that hold nothing
        self.lengths: Counter[int] = Counter()  # bits of a document's length in tokens -> documents
        self._stock: defaultdict[int, deque[_Piece]] = defaultdict(deque)  # by length
        self._stocked = 0  # tokens in it

    def add(self, document: Encoded, source: str, group: int) -> Iterator[Row]:
        """Take one document, of `group` (`shards.group_number`); yields the rows that became full."""
        ids, patches = np.asarray(document.ids, dtype=np.int32), document.patches
        self.tokens += len(ids)
        self.lengths[len(ids).bit_length()] += 1
        if patches is not None and len(ids) > self.length:
            self.cut += len(ids) - self.length
            ids = self._beside_image(ids)
        while len(ids) > self.length:
            yield self._row([_Piece(ids[: self.length], None, source, group)])
            ids = ids[self.length :]
        self._stock[len(ids)].append(_Piece(ids, patches, source, group))
        self._stocked += len(ids)
        while self._stocked >= STOCK_ROWS * self.length:
            yield self._close()

    def finish(self) -> Iterator[Row]:
        """The rows that are left; the last ones have more padding."""
        while self._stocked:
            yield self._close()

    def _beside_image(self, ids: np.ndarray) -> np.ndarray:
        """The stretch of a row's length that holds the whole image: the start, or the end when the text comes first."""
        last_patch = np.flatnonzero(ids == PATCH_ID)[-1]
        starts = last_patch + 3 <= self.length  # after the patch come <row> and </img>
        return ids[: self.length] if starts else ids[-self.length :]

    def _close(self) -> Row:
        """A row of the largest piece in stock, and of those that fill what it leaves best."""
        largest = max(self._stock)
        pieces = [self._take(largest)]
        left = self.length - largest
        while left and (chosen := best_fit({n: len(w) for n, w in self._stock.items() if n <= left}, left)):
            pieces += [self._take(n) for n in chosen]
            left -= sum(chosen)
        return self._row(pieces)

    def _take(self, n: int) -> _Piece:
        piece = self._stock[n].popleft()
        if not self._stock[n]:
            del self._stock[n]
        self._stocked -= n
        return piece

    def _row(self, pieces: list[_Piece]) -> Row:
        tokens = np.full(self.length, PAD_ID, dtype=np.int32)
        docs = np.full(self.length, PADDING, dtype=np.int16)
        sources: Counter[str] = Counter()
        at = 0
        for number, piece in enumerate(pieces):
            end = at + len(piece.ids)
            tokens[at:end], docs[at:end] = piece.ids, number
            sources[piece.source] += len(piece.ids)
            at = end
        self.padded += self.length - at
        patches = [piece.patches for piece in pieces if piece.patches is not None]
        return Row(tokens, docs, np.concatenate(patches) if patches else None, [p.group for p in pieces], dict(sources))


def best_fit(available: dict[int, int], space: int) -> list[int]:
    """Lengths, out of `available` (length -> how many there are), whose sum is the largest within `space`.

    Subset sum on a bit mask, bit i standing for "a sum of i can be reached". Lengths of which there are many are used
    first, so that the stock keeps its variety. Exact within CANDIDATES lengths, small to large, and REPEATS of each.
    """
    stride = max(1, -(-len(available) // CANDIDATES))
    lengths = sorted(sorted(available, reverse=True)[::stride], key=lambda n: (-available[n], -n))
    within = (1 << space + 1) - 1
    reach = [1]  # reach[i]: sums reachable with the first i uses
    uses: list[int] = []
    for n in lengths:
        for _ in range(min(available[n], REPEATS, space // n)):
            uses.append(n)
            reach.append((reach[-1] | reach[-1] << n) & within)
            if reach[-1] >> space:  # a perfect fit: nothing better is to come
                break
        if reach[-1] >> space:
            break
    total = reach[-1].bit_length() - 1
    chosen = []
    for index in range(len(uses) - 1, -1, -1):
        if not reach[index] >> total & 1:  # not without this use
            chosen.append(uses[index])
            total -= uses[index]
    return chosen
