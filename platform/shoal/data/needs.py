"""What preparing a corpus takes, on paper: parts, tasks, files, and the memory of the command that asks for it, which holds a
line for each source file, task, shard and object, and nothing for each document. And what a rank of a training run holds of it.

Bytes of memory are what Python allocates; `tests/unit/on_ray/test_needs.py` holds each against what is truly made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.data import order
from shoal.data.identities import HELDOUT
from shoal.data.parts import LEAST_PARTS, MOST_PARTS, PART_BYTES, PART_FILES, SAMPLED_WHOLE
from shoal.data.shards import BATCH_BYTES, SHARD_BYTES
from shoal.data.sources.files import CUT_BYTES
from shoal.data.tables import SPAN_DOCUMENTS

A_PART, A_SPAN = 12, 2  # files in the work folder: of a part, and of a task that looks at a span
DRAWN = 2  # of the former, where the tokenizer's sample is drawn in the parts
SMALL = 6  # files of a corpus beside its shards, at most: tokenizer, chats of two splits, report and its page, index
# Requests to S3: bytes that one puts, of a larger file; of a kept result, which is looked for and put, and of the lease before
A_PUT, A_RESULT = 8 * 2**20, 3
# Bytes of a document in the tables of its part: fingerprint, group, signature and its bands' keys, what is dropped
TABLES = (20, 22, 568, 1)
# Bytes that the command holds: what it imports, with Ray (measured and logged), and of each ...
ITSELF = 560_000_000
FILE, PIECE = 610, 460  # source file as it is listed, with a name of 20 characters; piece of one that is cut
PART = 630  # of a part: its keys, and what its task is asked
SHARD = 800
OBJECT = 130  # of the names in S3, where it is made there
WRITTEN = 2900  # ... and of each shard, for a while, as the index is written
READ = 1700  # of a shard, in each rank of a training run, as the index is read; two thirds stay
PLACE, SORTED = 8, 44  # of a row of a span of the order: where it stays, and besides of the span that is drawn


@dataclass(frozen=True)
class Work:
    """Of preparing so many bytes of source files."""

    files: int  # source files
    pieces: int  # of them, where they are cut
    parts: int
    spans: int  # of keys that are looked at together

    @classmethod
    def of(cls, size: float, file: float, documents: float) -> Work:
        """`size`: bytes in all; `file`: of each file, whose kind can be cut."""
        files = max(1, round(size / file))
        cuts = math.ceil(size / files / CUT_BYTES)
        piece = size / files / cuts
        most = max(min(PART_BYTES, size // LEAST_PARTS + 1), size // MOST_PARTS)
        together = min(max(1, int(most // piece)), PART_FILES)
        parts = math.ceil(files * cuts / together)
        return cls(files, files * cuts, parts, max(1, math.ceil(documents / SPAN_DOCUMENTS)))

    def tasks(self, bands: int) -> int:
        """`bands`: tasks that look for near copies, of each span. A part is read, settled, packed, and of many its sample is
        drawn; a span is looked at for equal documents, for near ones, and for the held-out side. One fits the tokenizer, one
        draws the chats."""
        of_part = 3 + (self.parts > SAMPLED_WHOLE)
        return of_part * self.parts + (2 + bands) * self.spans + 2

    def meanwhile(self, bands: int) -> int:
        """Files, or objects, in the work folder before it goes; one of them the tokenizer's."""
        of_part = A_PART - (0 if self.parts > SAMPLED_WHOLE else DRAWN)
        return of_part * self.parts + A_SPAN * (2 + bands) * self.spans + 1

    def shards(self, stored: float, row: int, most: int = SHARD_BYTES) -> int:
        """Of `stored` bytes in rows of `row` bytes, of one modality: files of each part and split, of about `most` bytes."""
        batch = math.ceil(min(BATCH_BYTES, most) / row) * row
        full = math.ceil(most / batch) * batch
        return self.parts * sum(math.ceil(stored / self.parts * share / full) for share in (1 - HELDOUT, HELDOUT))

    def requests(self, documents: float, text: float, shards: int, stored: float, bands: int) -> int:
        """That tasks make to put what they make of `text` bytes, in S3, `stored` bytes of `shards` of them; of what they read
        none, since that is as the cache has it."""
        small = 2 + (self.parts > SAMPLED_WHOLE)  # chats, what of them is asked, and where it is drawn the sample
        of_part = put_requests(text / self.parts) + sum(put_requests(of * documents / self.parts) for of in TABLES)
        of_part += small * put_requests(0) + A_RESULT * (3 + (self.parts > SAMPLED_WHOLE))
        of_span = (2 + bands) * (put_requests(0) + A_RESULT)
        return self.parts * of_part + self.spans * of_span + shards * put_requests(stored / shards)

    def command(self, shards: int, objects: int) -> dict[str, int]:
        """Bytes of the command's memory by what they are for, when they are most. `objects`: in S3, 0 where it is a folder."""
        return {
            "itself": ITSELF,
            "files": self.files * FILE if self.pieces == self.files else self.pieces * PIECE,
            "parts": self.parts * PART,
            "shards": shards * SHARD,
            "objects": objects * OBJECT,
            "their index": shards * WRITTEN,
        }


def put_requests(size: float) -> int:
    """That boto3 makes to put a file of so many bytes, with the one that asks for its tag."""
    return 2 if size < A_PUT else math.ceil(size / A_PUT) + 3


def of_a_rank(rows: float, shards: int) -> dict[str, float]:
    """Bytes that each rank of a training run holds of a corpus of one modality by what they are for, when they are most: of the
    order of its rows `order.SPANS` spans, and one more that is drawn."""
    span = rows / 2 ** order.span_bits(math.ceil(rows))
    return {"index": shards * READ, "order": (PLACE * order.SPANS + SORTED) * span}
