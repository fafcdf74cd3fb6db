"""Quality of a model: bits per byte by modality and exit, and answers to held-out questions against references.

Answers come through a `Generate` callable (the engine, an HTTP client), so that what is measured is what is served and
this plane needs neither. Questions of training sources are never asked: rows come from the held-out files only.

Letters: B rows, T tokens.
"""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from sacrebleu.metrics.bleu import BLEU

from shoal.config import ModelConfig
from shoal.data.batches import Batch
from shoal.data.chats import AUGMENTED
from shoal.errors import DataError
from shoal.inputs.chat import Encoded, encode_chat
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.net import Net, unit_pixels
from shoal.train.loss import patch_targets


@dataclass(frozen=True)
class Question:
    """A held-out chat row: the prompt up to the assistant's turn, the whole row, and the reference answer."""

    prompt: Encoded
    row: Encoded
    reference: str
    task: str


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    depth: int  # layers it ran with


Generate = Callable[[Sequence[Encoded], int, str], list[Answer]]  # prompts, max_tokens, depth


def questions(
    path: str | Path, tokenizer: Tokenizer, config: ModelConfig, template: str, *, limit: int | None = None
) -> dict[str, list[Question]]:
    """The rows of a held-out JSONL by task, at most `limit` a task, in file order. Raises DataError with the line number
    of a row that is not ``{"messages": [..., {"role": "assistant", ...}]}``."""
    found: dict[str, list[Question]] = {}
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                messages, task = row["messages"], row.get("task", "chat")
                last = messages[-1]
                assert last["role"] == "assistant" and isinstance(last["content"], str)
            except (ValueError, KeyError, IndexError, TypeError, AssertionError) as error:
                raise DataError(
                    f"{path} line {number}", got=str(error)[:80], do="end each row with an assistant message"
                ) from error
            if AUGMENTED in row:
                raise DataError(f"{path} line {number} is augmented", do="measure on the rows that were there before")
            if limit is not None and len(found.get(task, ())) >= limit:
                continue
            prompt = encode_chat(messages[:-1], tokenizer, config, template=template)
            whole = encode_chat(messages, tokenizer, config, template=template, add_generation_prompt=False)
            found.setdefault(task, []).append(Question(prompt, whole, last["content"], task))
    return found


def _opened(path: str | Path) -> TextIO:
    try:
        return open(path, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot read {path}", got=error.strerror, do="give a .jsonl of chats") from error


@torch.inference_mode()
def bits_per_byte(net: Net, batches: Iterable[Batch], exits: Sequence[int]) -> dict[int, float]:
    """Bits per byte of the predicted text at each of `exits`: cross-entropy over every valid target, over its bytes."""
    nats, n_bytes = dict.fromkeys(exits, 0.0), 0
    for batch in batches:
        hidden = net(batch.tokens, batch.patches, batch.grid, docs=batch.docs, exits=exits)
        valid = batch.targets >= 0
        n_bytes += batch.n_bytes
        for e in exits:
            logits = net.head(hidden[e][valid], e)
            nats[e] += float(F.cross_entropy(logits.float(), batch.targets[valid], reduction="sum"))
    return {e: total / math.log(2) / max(1, n_bytes) for e, total in nats.items()}


@torch.inference_mode()
def beside(nets: Sequence[Net], batches: Iterable[Batch]) -> list[tuple[float, float]]:
    """Of each of `nets` at full depth: bits per byte, and the share of places where its likeliest token is the first net's."""
    nats, agreed, places, n_bytes = [0.0] * len(nets), [0] * len(nets), 0, 0
    for batch in batches:
        valid = batch.targets >= 0
        n_bytes, places = n_bytes + batch.n_bytes, places + int(valid.sum())
        likeliest = None
        for i, net in enumerate(nets):
            last = net.config.layers
            hidden = net(batch.tokens, batch.patches, batch.grid, docs=batch.docs)[last]
            logits = net.head(hidden[valid], last).float()
            nats[i] += float(F.cross_entropy(logits, batch.targets[valid], reduction="sum"))
            likeliest = logits.argmax(-1) if likeliest is None else likeliest
            agreed[i] += int((logits.argmax(-1) == likeliest).sum())
    bits = [total / math.log(2) / max(1, n_bytes) for total in nats]
    return [(b, count / max(1, places)) for b, count in zip(bits, agreed, strict=True)]


@torch.inference_mode()
def patch_error(net: Net, batches: Iterable[Batch]) -> dict[str, float]:
    """Mean squared error of the next patch on normalised targets: the model's, and that of always saying zero."""
    total, zero, count = 0.0, 0.0, 0
    for batch in batches:
        if batch.patches is None or not len(batch.patches):
            continue
        where, target = patch_targets(batch.tokens, batch.docs, unit_pixels(batch.patches, net.dtype))
        last = net.config.layers
        hidden = net(batch.tokens, batch.patches, batch.grid, docs=batch.docs)[last]
        guess = net.patch_head(net.exit_norms[str(last)](hidden[where]))
        total += float(F.mse_loss(guess, target, reduction="sum"))
        zero += float(target.square().sum())
        count += target.numel()
    return {"model": total / max(1, count), "zero": zero / max(1, count)}


def exact_match(answers: Sequence[Answer], asked: Sequence[Question]) -> float:
    """Share of answers equal to the reference but for case and outer white space."""
    hits = sum(a.text.strip().lower() == q.reference.strip().lower() for a, q in zip(answers, asked, strict=True))
    return hits / max(1, len(asked))


def majority(references: Iterable[str]) -> tuple[str, float]:
    """The commonest reference and its share: what a model that never looks could score."""
    counts = Counter(r.strip().lower() for r in references)
    answer, hits = counts.most_common(1)[0]
    return answer, hits / counts.total()


def bleu(answers: Sequence[Answer], asked: Sequence[Question]) -> tuple[float, str]:
    """Corpus BLEU 0..100 and the sacrebleu signature that makes it comparable."""
    metric = BLEU()
    score = metric.corpus_score([a.text for a in answers], [[q.reference for q in asked]])
    return float(score.score), str(metric.get_signature())


def parse_rate(answers: Sequence[Answer]) -> float:
    """Share of answers that are Python that parses and is not empty."""

    def parses(text: str) -> bool:
        try:
            return bool(ast.parse(text).body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False

    return sum(parses(a.text) for a in answers) / max(1, len(answers))


def mean_depth(answers: Sequence[Answer], config: ModelConfig) -> float:
    """Mean share of the layers that the answers ran with."""
    return sum(a.depth for a in answers) / max(1, len(answers)) / config.layers


def row_of(metric: str, unit: str, values: dict[str, float], **more: Any) -> dict[str, Any]:
    """One row of the report's quality table."""
    return {
        "metric": metric,
        "unit": unit,
        "values": values,
        "beside": more.pop("beside", {}),
        "note": more.pop("note", ""),
    }
