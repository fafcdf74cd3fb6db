"""Quality of a model: bits per byte by modality and exit, and answers to held-out questions against references, each with its
95 % interval over documents or conversations.

Answers are given, by whom does not matter (the engine, an HTTP client), so that what is measured is what is served. Questions
of training sources are never asked: rows come from the held-out files only.

Letters: B rows, T tokens, G groups, n places where something is predicted.
"""

from __future__ import annotations

import ast
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics.bleu import BLEU

from shoal.data.batches import Batch, heldout_batches, heldout_groups
from shoal.data.chats.heldout import Question
from shoal.evaluate.intervals import UNKNOWN, Figure, of_part, of_quotient, of_share, of_sums
from shoal.model.net import Net, unit_pixels
from shoal.train.loss import patch_targets


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    depth: int  # layers it ran with
    prompt: int = 0  # tokens of the prompt

    @property
    def run(self) -> int:
        """Tokens that the model ran: the prompt's, and the answer's but for the last, which nothing followed."""
        return self.prompt + max(0, self.tokens - 1)


@dataclass(frozen=True)
class HeldoutRows:
    """Held-out rows of one modality, with the group of each document in them."""

    directory: Path
    modality: str
    limit: int | None = None  # of more rows, as many, evenly spaced
    batch_rows: int = 8
    split: str = "heldout"  # or train
    # which of those rows; whole batches, but for the last
    part: slice = field(default_factory=lambda: slice(None), hash=False)

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Batches, and the group of each place, int64 [B, T] (of padding: any)."""
        how: dict[str, Any] = {"split": self.split, "limit": self.limit, "part": self.part}
        groups = heldout_groups(self.directory, self.modality, **how)
        for batch in heldout_batches(self.directory, self.modality, self.batch_rows, **how):
            rows = [np.asarray([*next(groups), 0])[docs] for docs in batch.docs.numpy()]
            yield batch, np.stack(rows)


class Sums:
    """Sums of k numbers over the places of each group, a batch after the other: to be pickled, and put together in order, so
    that they are the same to the last bit however many processes added them up."""

    def __init__(self, parts: Iterable[Sums] = ()) -> None:
        some = list(parts)
        self._added: list[tuple[np.ndarray, np.ndarray]] = [added for part in some for added in part._added]
        self.places: int = sum(part.places for part in some)

    def add(self, groups: np.ndarray, numbers: np.ndarray) -> None:
        """`groups` [n], `numbers` [n, k]."""
        self.places += len(groups)
        kinds, inverse = np.unique(groups, return_inverse=True)
        sums = np.zeros((len(kinds), numbers.shape[1]))
        np.add.at(sums, inverse, numbers)
        self._added.append((kinds, sums))

    @property
    def columns(self) -> list[np.ndarray]:
        """k times [G], groups in the order of their numbers."""
        of: dict[int, np.ndarray] = {}
        for kinds, sums in self._added:
            for kind, some in zip(kinds.tolist(), sums, strict=True):
                of[kind] = of.get(kind, 0) + some
        return list(np.stack([of[kind] for kind in sorted(of)], axis=1)) if of else []


def bits_per_byte(
    net: Net, rows: Iterable[tuple[Batch, np.ndarray]], exits: Sequence[int], lengths: np.ndarray
) -> dict[int, Figure]:
    """Bits per byte of the predicted text at each of `exits`: cross-entropy over every valid target, over its bytes; nothing
    where no text is predicted, as by images without any. `lengths` [vocab]: bytes of each token."""
    return bits_of([bit_sums(net, rows, exits, lengths)], exits)


@torch.inference_mode()
def bit_sums(net: Net, rows: Iterable[tuple[Batch, np.ndarray]], exits: Sequence[int], lengths: np.ndarray) -> Sums:
    """What `bits_of` needs of some rows: bits at each of `exits`, and bytes."""
    sums = Sums()
    for batch, groups in ((batch.to(net.device), groups) for batch, groups in rows):
        hidden = net(batch.tokens, batch.patches, batch.grid, docs=batch.docs, exits=exits)
        valid = batch.targets >= 0
        targets = batch.targets[valid]
        nats = [F.cross_entropy(net.head(hidden[e][valid], e).float(), targets, reduction="none") for e in exits]
        bits = [some.cpu().numpy().astype(float) / math.log(2) for some in nats]
        sums.add(groups[valid.cpu().numpy()], np.stack([*bits, lengths[targets.cpu().numpy()]], axis=1))
    return sums


def bits_of(parts: Iterable[Sums], exits: Sequence[int]) -> dict[int, Figure]:
    """`bits_per_byte` of the rows of all `parts`, in their order."""
    sums = Sums(parts)
    *bits, n_bytes = sums.columns or [np.zeros(0)]
    if not n_bytes.sum():
        return {}
    return {e: of_quotient(some, n_bytes, sums.places) for e, some in zip(exits, bits, strict=True)}


@dataclass(frozen=True)
class Beside:
    """A net at full depth beside another."""

    bpb: Figure
    rise: Figure  # its bits over the other's, less 1
    agreement: Figure  # share of places where its likeliest token is the other's


@torch.inference_mode()
def beside(nets: Sequence[Net], rows: Iterable[tuple[Batch, np.ndarray]], lengths: np.ndarray) -> list[Beside]:
    """Each of `nets` at full depth beside the first. `lengths` [vocab]: bytes of each token."""
    sums = Sums()
    for batch, groups in ((batch.to(nets[0].device), groups) for batch, groups in rows):
        valid = batch.targets >= 0
        targets = batch.targets[valid]
        numbers, first = [lengths[targets.cpu().numpy()], np.ones(len(targets))], None
        for net in nets:
            last = net.config.layers
            hidden = net(batch.tokens, batch.patches, batch.grid, docs=batch.docs)[last]
            logits = net.head(hidden[valid], last).float()
            likeliest = logits.argmax(-1)
            first = likeliest if first is None else first
            nats = F.cross_entropy(logits, targets, reduction="none").cpu().numpy().astype(float)
            numbers += [nats / math.log(2), (likeliest == first).cpu().numpy()]
        sums.add(groups[valid.cpu().numpy()], np.stack(numbers, axis=1))
    n_bytes, places, *each = sums.columns
    found = []
    for bits, agreed in zip(each[::2], each[1::2], strict=True):
        rise = of_quotient(bits, each[0], sums.places)
        low, high = rise.interval
        rise = replace(rise, value=rise.value - 1, interval=(low - 1, high - 1))
        found.append(Beside(of_quotient(bits, n_bytes, sums.places), rise, of_part(agreed, places)))
    return found


def patch_error(net: Net, rows: HeldoutRows) -> dict[str, Figure]:
    """Mean squared error of the next patch on normalised targets: the model's, and that of always saying zero;
    nothing where no image has a second patch."""
    return patch_error_of([patch_sums(net, rows)])


@torch.inference_mode()
def patch_sums(net: Net, rows: HeldoutRows) -> Sums:
    """What `patch_error_of` needs of some rows."""
    sums = Sums()
    for batch, groups in ((batch.to(net.device), groups) for batch, groups in rows):
        if not len(batch.patches):
            continue
        where, target = patch_targets(batch.tokens, batch.docs, unit_pixels(batch.patches, net.dtype))
        last = net.config.layers
        hidden = net(batch.tokens, batch.patches, batch.grid, docs=batch.docs)[last]
        guess = net.patch_head(net.exit_norms[str(last)](hidden[where]))
        errors = [(guess - target).square().sum(1), target.square().sum(1), torch.full((len(target),), target.shape[1])]
        numbers = torch.stack([e.double().cpu() for e in errors], dim=1).numpy()
        sums.add(groups[where.cpu().numpy()], numbers)
    return sums


def patch_error_of(parts: Iterable[Sums]) -> dict[str, Figure]:
    """`patch_error` of the rows of all `parts`, in their order."""
    sums = Sums(parts)
    if not sums.columns:
        return {}
    model, zero, count = sums.columns
    return {"model": of_quotient(model, count, sums.places), "zero": of_quotient(zero, count, sums.places)}


def exact_match(answers: Sequence[Answer], asked: Sequence[Question]) -> Figure:
    """Share of answers equal to the reference but for case and outer white space."""
    pairs = zip(answers, asked, strict=True)
    hits = [a.text.strip().lower() == q.reference.strip().lower() for a, q in pairs]
    return of_share(hits, [q.group for q in asked])


def majority(references: Iterable[str]) -> tuple[str, float]:
    """The commonest reference and its share: what a model that never looks could score."""
    counts = Counter(r.strip().lower() for r in references)
    answer, hits = counts.most_common(1)[0]
    return answer, hits / counts.total()


def bleu(texts: Sequence[str], asked: Sequence[Question]) -> tuple[Figure, str]:
    """Corpus BLEU 0..100 of `texts`, one for each question, and the sacrebleu signature that makes it comparable."""
    metric, references = BLEU(), [q.reference for q in asked]
    score = float(metric.corpus_score(list(texts), [references]).score)
    of = BLEU(effective_order=True)  # a sentence's counts are the same, whatever its own score would be
    each = [of.sentence_score(text, [reference]) for text, reference in zip(texts, references, strict=True)]
    sums: dict[int, np.ndarray] = {}
    for q, one in zip(asked, each, strict=True):
        counts = np.array([*one.counts, *one.totals, one.sys_len, one.ref_len], dtype=float)
        sums[q.group] = sums.get(q.group, 0) + counts

    def scores(totals: np.ndarray) -> np.ndarray:
        order = (totals.shape[1] - 2) // 2
        rows = [(row[:order], row[order:-2], *row[-2:]) for row in totals.astype(int).tolist()]
        return np.array(
            [BLEU.compute_bleu(c, t, int(sys), int(ref), smooth_method="exp").score for c, t, sys, ref in rows]
        )

    each_group = np.stack(list(sums.values())) if sums else np.zeros((0, 1))
    interval = of_sums(each_group, scores, each_group[:, -1]) if sums else UNKNOWN
    return Figure(score, interval, len(asked), len(sums)), str(metric.get_signature())


def another(asked: Sequence[Question]) -> list[str]:
    """To each question the reference of one of another group: what well-formed answers score that never saw the question."""
    by_group = sorted(range(len(asked)), key=lambda i: asked[i].group)
    given = [""] * len(asked)
    for place, i in enumerate(by_group):
        turned = (
            by_group[(place + step) % len(asked)] for step in range(len(asked) // 2, len(asked) + len(asked) // 2)
        )
        given[i] = next((asked[j].reference for j in turned if asked[j].group != asked[i].group), "")
    return given


def parse_rate(answers: Sequence[Answer], asked: Sequence[Question]) -> Figure:
    """Share of answers that are Python that parses and is not empty."""

    def parses(text: str) -> bool:
        try:
            return bool(ast.parse(text).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False

    return of_share([parses(a.text) for a in answers], [q.group for q in asked])


def mean_depth(answers: Sequence[Answer]) -> float:
    """Layers that a token ran with, mean over all tokens of the prompts and answers."""
    return sum(a.depth * a.run for a in answers) / max(1, sum(a.run for a in answers))


def row_of(
    metric: str, unit: str, figures: Mapping[str, Figure | float], *, of: str = "", **more: Any
) -> dict[str, Any]:
    """One row of the report's quality table: of each model its value, with the interval where there is one, and on how many
    rows and documents or conversations they were measured. `of`: what the rows are called."""
    values = {name: f.value if isinstance(f, Figure) else f for name, f in figures.items()}
    measured = [f for f in figures.values() if isinstance(f, Figure)]
    row = {
        "metric": metric,
        "unit": unit,
        "values": values,
        "beside": more.get("beside", {}),
        "note": more.get("note", ""),
    }
    if measured:
        row["intervals"] = {name: f.ends for name, f in figures.items() if isinstance(f, Figure)}
        row |= {"rows": measured[0].rows, "groups": measured[0].groups, "of": of}
    return row
