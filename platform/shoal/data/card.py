"""The data card: what a finished corpus holds, as plain values (``report.json``) and as a page (``report.html``).

Notable: the samples are read back out of the shards, so they show what a model will be given, cuts and small images included.
Letters: T row length, V numbers in a patch, n patches of a row.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shoal import page
from shoal.data.documents import MODALITIES
from shoal.data.order import Mix, RowOrder
from shoal.data.pack import PADDING
from shoal.data.parts import Packed
from shoal.data.shards import SPLITS, Index, Rows
from shoal.inputs import media
from shoal.inputs.tokenizer import PATCH_ID, Tokenizer
from shoal.machine import write_aside

REPORT, CARD = "report.json", "report.html"
MIXED = 1000  # rows that the realised mix is counted over
AT_ONCE = 16  # of them
SAMPLES = 3  # of each modality
SAMPLE_CHARACTERS = 600

Counts = dict[str, dict[str, int]]


def report(
    directory: Path, index: Index, packed: Packed, tokenizer: Tokenizer, chats: Counts, seconds: float
) -> dict[str, Any]:
    """What a person wants to know of a corpus whose shards lie in `directory`; all of it plain values. `chats`: split -> task
    -> rows; `seconds`: what making it took."""
    rows = _by_modality(index, "rows")
    epoch = sum(rows["train"].values())
    places = index.length * (epoch + sum(rows["heldout"].values()))
    by_row = Mix(index.row_mix("train", index.mix)).shares
    return {
        "documents": index.documents,
        "tokens": _by_modality(index, "tokens"),
        "text_bytes": _by_modality(index, "text_bytes"),
        "rows": rows,
        "row_length": index.length,
        "vocabulary": index.vocab,
        "seed": index.seed,
        "sources": _sources(index, packed),
        "drops": index.drops,
        "first": packed.first,
        "changes": {operator: dict(sorted(of.items())) for operator, of in sorted(packed.changes.items())},
        "packing": {"padding": packed.packing["padded"] / places, "cut_tokens": packed.packing["cut"]},
        "lengths": _histogram(packed.lengths),
        "mix": index.mix,
        "realised_mix": realised_mix(directory, index),
        "left_out": sorted(name for name, share in index.request["mix"].items() if share and name not in index.mix),
        "passes": {m: round(share * epoch / rows["train"][m], 2) for m, share in by_row.items()},  # in one epoch
        "chats": chats,
        "samples": samples(directory, index, tokenizer),
        "seconds": round(seconds, 1),
    }


def write(directory: Path, report: Mapping[str, Any], name: str = "") -> None:
    """Write ``report.json`` and ``report.html``. `name`: of the corpus [the directory's]."""
    write_aside(directory / REPORT, json.dumps(report, indent=1) + "\n")
    page.write(
        Path(__file__).with_name("card.html"),
        directory / CARD,
        r={"title": f"Data card of {name or directory.name}", **report},
        facts=_facts(report),
        modalities=[m for m in MODALITIES if m in report["mix"] or m in report["tokens"]["heldout"]],
        lengths=_length_rows(report["lengths"]),
    )


def realised_mix(directory: Path, index: Index) -> dict[str, float]:
    """Shares by token of the first `MIXED` rows that training reads, counted in the shards."""
    rows = {modality: Rows(directory, index, "train", modality) for modality in index.mix}
    counts = {modality: len(of) for modality, of in rows.items()}
    order = RowOrder(index.row_mix("train", index.mix), counts, index.seed)

    def held(at: tuple[str, int]) -> int:
        modality, row = at
        return int((rows[modality][row][1] != PADDING).sum())

    read = [order.at(position) for position in range(MIXED)]
    tokens: Counter[str] = Counter()
    with ThreadPoolExecutor(AT_ONCE) as threads:  # where the shards are in S3, a row takes an answer
        for (modality, _), count in zip(read, threads.map(held, read), strict=True):
            tokens[modality] += count
    return {modality: count / tokens.total() for modality, count in sorted(tokens.items())}


def samples(directory: Path, index: Index, tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The first documents of some training rows of each modality, evenly spaced: ``modality``, ``text``, ``image`` (a data
    URL, or empty)."""
    found = []
    for modality in MODALITIES:
        rows = Rows(directory, index, "train", modality)
        for number in range(min(SAMPLES, len(rows))):
            tokens, docs, patches = rows[number * len(rows) // SAMPLES if len(rows) > SAMPLES else number]
            ids = tokens[docs == 0]
            text = tokenizer.decode(ids.tolist())
            shown = text[:SAMPLE_CHARACTERS] + ("…" if len(text) > SAMPLE_CHARACTERS else "")
            found.append({"modality": modality, "text": shown, "image": _thumbnail(ids, patches, index.patch)})
    return found


def _thumbnail(ids: np.ndarray, patches: np.ndarray, p: int) -> str:
    """The first document's image, put together again out of its patches; ids [t], patches uint8 [n, V]."""
    count = int((ids == PATCH_ID).sum())
    if not count:
        return ""
    rows, cols = (media.grid(ids).max(axis=0) + 1).tolist()
    pixels = patches[:count].reshape(rows, cols, p, p, 3).transpose(0, 2, 1, 3, 4).reshape(rows * p, cols * p, 3)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _by_modality(index: Index, what: str) -> Counts:
    """Split -> modality -> sum of ``rows``, ``tokens`` or ``text_bytes``."""
    return {split: {m: n for m in MODALITIES if (n := index.total(what, split, m))} for split in SPLITS}


def _sources(index: Index, packed: Packed) -> dict[str, dict[str, Any]]:
    """Source -> its licences, documents by split, and tokens, also by modality."""
    found: dict[str, dict[str, Any]] = {}
    for (split, _, source, license), count in sorted(packed.documents.items()):
        empty = {"licenses": [], "documents": dict.fromkeys(SPLITS, 0), "tokens": 0, "by_modality": {}}
        of = found.setdefault(source, empty)
        of["documents"][split] += count
        of["licenses"] = sorted({*of["licenses"], license})
    for shard in index.shards:
        for source, tokens in shard.sources.items():
            of = found[source]
            of["tokens"] += tokens
            of["by_modality"][shard.modality] = of["by_modality"].get(shard.modality, 0) + tokens
    return found


def _histogram(lengths: Mapping[tuple[str, int], int]) -> Counts:
    """Documents by length in tokens, as modality -> "64-127" -> documents; `lengths`: (modality, bits of the length) -> n."""
    found: Counts = {}
    for (modality, bits), count in sorted(lengths.items()):
        found.setdefault(modality, {})[f"{2 ** (bits - 1)}-{2**bits - 1}"] = count
    return found


def left_out(report: Mapping[str, Any]) -> list[str]:
    """A line for each reason for which files, rows or documents are not used, with the first of them."""
    lines = []
    for operator, reasons in report["drops"].items():
        for reason, count in reasons.items():
            first = report.get("first", {}).get(operator, {}).get(reason)
            lines.append(f"left out: {count:,} ({operator}), {reason}" + (f"; the first is {first}" if first else ""))
    return lines


# ---- what the page shows


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    documents, tokens = (sum(sum(report[what][s].values()) for s in SPLITS) for what in ("documents", "tokens"))
    # that drops chats
    dropped = sum(sum(of.values()) for operator, of in report["drops"].items() if operator != "recipe")
    return [
        (page.number(documents, "count"), "documents kept"),
        (page.number(dropped, "count"), "left out, with a reason"),
        (page.number(tokens, "count"), "tokens"),
        (page.number(report["packing"]["padding"], "share"), "of all places in rows are padding"),
    ]


def _length_rows(lengths: Counts) -> list[dict[str, Any]]:
    """One row a bucket, shortest first, with each modality's count and its share of that modality's largest bucket."""
    buckets = sorted({bucket for of in lengths.values() for bucket in of}, key=lambda bucket: int(bucket.split("-")[0]))
    most = {modality: max(of.values()) for modality, of in lengths.items()}
    return [
        {
            "bucket": bucket,
            "of": {m: (of.get(bucket, 0), 100 * of.get(bucket, 0) / most[m]) for m, of in lengths.items()},
        }
        for bucket in buckets
    ]
