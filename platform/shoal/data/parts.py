"""A corpus prepared in parts, so that many processes can work on it: each part is read and cleaned alone, then it is decided
over all documents what is kept and on which side of the held-out split (`identities`), then each part is packed alone.

Notable: what comes out depends on the sources, the seed and the tokenizer alone, not on how many processes there were.
Between the two passes the cleaned documents of a part lie in one Arrow file, with its tables beside it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import xxhash

from shoal.config import ModelConfig
from shoal.data.chats.recipes import ChatFiles, chats_of, fits
from shoal.data.documents import Document, Modality, Skipped
from shoal.data.encode import encode
from shoal.data.identities import Drops, Identities, Identity
from shoal.data.operators.clean import fingerprint
from shoal.data.operators.near import SIGNATURES, Signatures
from shoal.data.operators.pipeline import Operators, Pipeline
from shoal.data.pack import Packer
from shoal.data.place import here
from shoal.data.shards import TOKENIZER, Shard, ShardWriter, group_number, token_bytes
from shoal.data.sources.files import File, cut
from shoal.data.sources.read import need_seen, read
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import aside

PART_BYTES = 32 * 2**20  # of source files in a part, at most, but that a corpus has ...
MOST_PARTS = 8192  # ... about so many parts at most, since spans of keys are read out of every one ...
LEAST_PARTS = 12  # ... and of a corpus, so that several processes have work to the end
PART_FILES = 2048
BATCH = 256  # documents encoded at once ...
BATCH_SIZE = 2**20  # ... and characters and image bytes of them: encoding holds some 250 bytes a token
SAMPLE_BYTES = 4 * 2**20  # of each modality, that the tokenizer is fitted to; of a corpus of more parts than ...
SAMPLED_WHOLE = 64  # ... these, whose openings would say little, as many are drawn in the parts (decision 0017):
SAMPLE_A_TOKEN = 2**14  # for each token of the vocabulary, at most ...
SAMPLE_TEXT = 2**16  # ... and of one document

Item = TypeVar("Item")
First = dict[str, dict[str, str]]  # operator -> reason -> the first that was left out for it, as `Skipped.place`


@dataclass
class Found:
    """What reading a part gave, beside the documents in its file and their identities."""

    # of the texts in UTF-8, by modality: what a tokenizer's sample may take of them, of each at most `SAMPLE_TEXT`
    text_bytes: Counter[str] = field(default_factory=Counter)
    documents: int = 0
    drops: Drops = field(default_factory=dict)
    first: First = field(default_factory=dict)
    changes: Drops = field(default_factory=dict)  # operator -> what it changed -> times
    # file -> other files that its rows name -> their stamps
    named: dict[int, dict[str, str]] = field(default_factory=dict)

    def holds(self, files: Sequence[File]) -> bool:
        """Whether what was found in `files` holds still: the files that their rows name are the same."""
        return all(files[n].store.stamp(path) == was for n, of in self.named.items() for path, was in of.items())


@dataclass
class Packed:
    """What packing a part gave."""

    shards: list[Shard] = field(default_factory=list)
    drops: Drops = field(default_factory=dict)
    first: First = field(default_factory=dict)
    # by split, modality, source, licence
    documents: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    packing: Counter[str] = field(default_factory=Counter)  # tokens, cut, padded, as in `Packer`
    lengths: Counter[tuple[str, int]] = field(default_factory=Counter)  # by modality and bits of the length in tokens
    changes: Drops = field(default_factory=dict)

    def dropped(self, drops: Mapping[str, Counter[str]], first: Mapping[str, Mapping[str, str]] = {}) -> None:
        for operator, reasons in drops.items():
            self.drops.setdefault(operator, Counter()).update(reasons)
        for operator, of in first.items():
            self.first[operator] = {**of, **self.first.get(operator, {})}

    def changed(self, changes: Mapping[str, Counter[str]]) -> None:
        for operator, what in changes.items():
            self.changes.setdefault(operator, Counter()).update(what)

    def add(self, part: Packed) -> None:
        """Count `part` in."""
        self.shards += part.shards
        self.dropped(part.drops, part.first)
        self.documents.update(part.documents)
        self.packing.update(part.packing)
        self.lengths.update(part.lengths)


def split_files(files: Sequence[File], *, least: int | None = None) -> list[list[File]]:
    """The files in parts of about equal size, in order; the largest ones cut. `least`: parts, where there is so much
    [LEAST_PARTS]."""
    files = [piece for file in files for piece in cut(file)]
    sizes = [file.size for file in files]
    most = max(min(PART_BYTES, sum(sizes) // (least or LEAST_PARTS) + 1), sum(sizes) // MOST_PARTS)
    parts: list[list[File]] = []
    room = 0
    for file, size in zip(files, sizes, strict=True):
        if not parts or room < size or len(parts[-1]) == PART_FILES:
            parts.append([])
            room = most
        parts[-1].append(file)
        room -= size
    return parts


def read_part(
    files: Sequence[File], path: Path, pipeline: Pipeline | None = None, *, seed: int = 0, near_copies: bool = True
) -> Found:
    """Read the files of a part and run the operators [the default ones]; the documents go to `path`, and beside it their
    identities, drawn by `seed`, and what near copies are found by, where they are looked for. Raises DataError where this
    machine does not see a source."""
    for spec in {id(file.spec): file.spec for file in files}.values():
        need_seen(spec)
    pipeline = pipeline or Pipeline(Operators())
    found, identities, near = Found(), Identities(seed), Signatures()
    pipeline.take_changes()  # of a part that failed
    with aside(path) as beside, pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, _SCHEMA) as writer:

        def kept() -> Iterator[Document]:
            for heldout, item in ((file.spec.heldout, item) for file in files for item in read(file)):
                document = pipeline(item) if isinstance(item, Document) else item
                if isinstance(document, Skipped):
                    found.drops.setdefault(document.operator, Counter())[document.reason] += 1
                    found.first.setdefault(document.operator, {}).setdefault(document.reason, document.place)
                    continue
                if near_copies:
                    near.add(len(identities), document)
                identities.add(Identity(fingerprint(document), document.group, document.modality, heldout))
                found.text_bytes[document.modality] += len(_begins(document.text, SAMPLE_TEXT).encode())
                yield document

        for some in batched(kept(), _size):
            writer.write_batch(_batch(some))
    if near_copies:
        near.write(path.with_suffix(SIGNATURES))
    identities.write(path)
    found.documents = len(identities)
    found.changes = pipeline.take_changes()
    found.named = {number: dict(file.named) for number, file in enumerate(files) if file.named}
    return found


def sample(paths: Iterable[Path], splits: Iterable[Sequence[str | None]]) -> list[str]:
    """Texts to fit a tokenizer to: of the training documents only, the first SAMPLE_BYTES of each modality in UTF-8, spread
    over all parts."""
    ways = [(path, of) for path, of in zip(paths, splits, strict=True) if "train" in of]
    texts: list[str] = []
    held: Counter[str] = Counter()  # bytes
    for number, (path, of) in enumerate(ways, 1):
        share = SAMPLE_BYTES * number // len(ways)  # of each modality, up to this part
        for document, split in zip(documents(path), of, strict=True):
            room = share - held[document.modality]
            if split == "train" and room > 0:
                some = _begins(document.text, room)
                texts += [some] if some else []
                held[document.modality] += len(some.encode())
    return texts


def shares(text_bytes: Mapping[str, int], vocab: int) -> dict[str, float]:
    """Which share of the documents of each modality `draw_sample` is to draw, by the bytes that it may take of their texts, for
    a vocabulary of so many tokens."""
    most = max(SAMPLE_BYTES, vocab * SAMPLE_A_TOKEN)
    return {modality: min(1.0, most / count) for modality, count in text_bytes.items() if count}


def draw_sample(
    path: Path, splits: Sequence[str | None], shares: Mapping[str, float], seed: int, out: Path
) -> Counter[str]:
    """Write to `out` the texts of a part that a tokenizer is fitted to, where the corpus is too large to be read for it: of the
    training documents of each modality the share that is given, drawn by a hash of the document, so that it is the same
    whoever draws. Bytes by modality."""
    drawn: Counter[str] = Counter()
    with aside(out) as beside, pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_stream(sink, _TEXTS) as writer:

        def texts() -> Iterator[str]:
            for document, split in zip(documents(path), splits, strict=True):
                draw = xxhash.xxh3_64_intdigest(document.id.encode(), seed=seed) / 2**64
                if split == "train" and document.text and draw < shares.get(document.modality, 0):
                    some = _begins(document.text, SAMPLE_TEXT)
                    drawn[document.modality] += len(some.encode())
                    yield some

        for some in batched(texts(), len):
            writer.write_batch(pa.record_batch([pa.array(some, pa.large_string())], _TEXTS))
    return drawn


def _begins(text: str, size: int) -> str:
    """The first of `text`, of at most `size` bytes in UTF-8; of a letter that is cut nothing is taken."""
    return text[:size].encode()[:size].decode(errors="ignore")


def sampled(paths: Iterable[Path]) -> Iterator[str]:
    """The texts that `draw_sample` wrote to files."""
    for path in paths:
        with pa.memory_map(str(here(path))) as source:
            for batch in pa.ipc.open_stream(source):
                yield from batch.column("text").to_pylist()


def pack_part(
    path: Path, splits: Sequence[str | None], directory: Path, config: ModelConfig, number: int, seed: int = 0
) -> Packed:
    """Encode and pack the kept documents of a part into shards in `directory`, where the tokenizer lies; and make chats of
    the documents that a recipe fits, of which some are drawn by `seed` and saved beside `path`. `number` sets the part's files
    apart."""
    chats = ChatFiles(seed)
    out, tokenizer = Packed(), _tokenizer(here(directory / TOKENIZER).read_text(encoding="utf-8"))
    lengths, licenses = token_bytes(tokenizer), _licenses(path)
    packers: dict[tuple[str, Modality], tuple[Packer, ShardWriter]] = {}
    for split, document, encoded in _encoded(path, splits, tokenizer, config):
        if isinstance(encoded, Skipped):
            out.dropped(
                {encoded.operator: Counter([encoded.reason])}, {encoded.operator: {encoded.reason: encoded.place}}
            )
            continue
        key = (split, document.modality)
        if key not in packers:
            writer = ShardWriter(directory, *key, lengths, licenses, part=number)
            packers[key] = (Packer(config.train_length), writer)
        packer, writer = packers[key]
        for row in packer.add(encoded, document.source, group_number(document.group)):
            writer.add(row)
        out.documents[(*key, document.source, document.license)] += 1
        for chat in chats_of(document, split):
            if fits(chat, tokenizer, config):
                chats.add(split, [chat])
            else:
                out.dropped({"recipe": Counter(["too long"])})
    for (_, modality), (packer, writer) in packers.items():
        for row in packer.finish():
            writer.add(row)
        writer.close()
        out.shards += writer.shards
        out.packing.update(tokens=packer.tokens, cut=packer.cut, padded=packer.padded)
        out.lengths.update({(modality, bits): count for bits, count in packer.lengths.items()})
    chats.save(path)
    return out


def documents(path: Path) -> Iterator[Document]:
    """The documents of a part, in order."""
    with pa.memory_map(str(here(path))) as source:
        for batch in pa.ipc.open_stream(source):
            for row in batch.to_pylist():
                questions = tuple((q, a) for q, a in row.pop("questions"))
                yield Document(**row, questions=questions)


def batched(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in lists of at most `BATCH`, none of which goes on once it holds `BATCH_SIZE`."""
    batch: list[Item] = []
    held = 0
    for item in items:
        batch.append(item)
        held += size(item)
        if len(batch) == BATCH or held >= BATCH_SIZE:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _encoded(
    path: Path, splits: Sequence[str | None], tokenizer: Tokenizer, config: ModelConfig
) -> Iterator[tuple[str, Document, Any]]:
    kept = ((split, d) for split, d in zip(splits, documents(path), strict=True) if split)
    for batch in batched(kept, lambda pair: _size(pair[1])):
        results = encode([document for _, document in batch], tokenizer, config)
        yield from ((*pair, result) for pair, result in zip(batch, results, strict=True))


@lru_cache(maxsize=1)
def _tokenizer(text: str) -> Tokenizer:
    """One for all parts that a process packs: `tokenizers` 0.23 keeps 4 MB of each that has encoded."""
    return Tokenizer.from_json(text)


def _licenses(path: Path) -> dict[str, str]:
    """Source -> the licences of its documents in this part, as text."""
    found: dict[str, set[str]] = defaultdict(set)
    with pa.memory_map(str(here(path))) as stream:
        for batch in pa.ipc.open_stream(stream):
            for source, license in zip(batch["source"].to_pylist(), batch["license"].to_pylist(), strict=True):
                found[source].add(license)
    return {source: ", ".join(sorted(names)) for source, names in found.items()}


_TEXTS = pa.schema({"text": pa.large_string()})
_SCHEMA = pa.schema({
    **{name: pa.large_string() for name in ("id", "group", "source", "license", "modality", "origin", "text")},
    "image": pa.large_binary(),
    "caption": pa.bool_(),
    "questions": pa.list_(pa.list_(pa.large_string())),
})  # fmt: skip


def _batch(some: Sequence[Document]) -> pa.RecordBatch:
    columns = {name: [getattr(document, name) for document in some] for name in _SCHEMA.names}
    return pa.record_batch({n: pa.array(values, _SCHEMA.field(n).type) for n, values in columns.items()}, _SCHEMA)


def _size(document: Document) -> int:
    return len(document.text) + len(document.image or b"")
