"""How soon is it noticed that people ask other things, and how often wrongly? By a trained model's signals.

The model answers each question once, by the engine, with its signals; that is a captured row. Streams are drawn from these rows
by a seed each: 2,000 of the old shop are the reference, then the old shop goes on, or something else comes. So what is random
is which questions come, and in which order. As in a service, the first 1,000 of a stream are what its table of words is counted
from, and have no surprisal themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table

from shoal.bench.loop_shop import questions
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.errors import UsageError
from shoal.inputs.chat import encode_chat
from shoal.loop.detector import REQUESTS, Detector
from shoal.loop.reference import LEARNED, measured
from shoal.loop.rows import Row, table_of
from shoal.loop.surprisal import WANTED, Surprisal
from shoal.machine import aside
from shoal.model.model import Model

QUIET = 5_000  # requests of a stream without drift
LATE = 3_000  # requests of a stream that drifts, until it counts as missed
DOMAINS = ("old", "catalogue", "german")
DRIFTS = {  # name -> what comes, its share of the requests, and the requests within which an alarm is wanted (median of seeds)
    "new catalogue": ("catalogue", 1.0, 200),
    "German": ("german", 1.0, 60),
    "10 % new catalogue": ("catalogue", 0.1, 1_500),
    "10 % German": ("german", 0.1, 1_500),
}
LEAST = 500  # requests of a stream
ANSWER = 32  # tokens of an answer, at most: its signals are of its beginning
SECOND = 1_000  # ms between requests


@dataclass(frozen=True)
class Pool:
    """Captured rows of one domain, and the token ids of what was asked in each."""

    rows: pa.Table
    prompts: list[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)


def pools(model: Model, rows: int, keep: Path | None, say: Callable[[str], None]) -> dict[str, Pool]:
    """What each domain's questions are answered like: `rows` of the old shop, and as many as there are of the others, at most
    `LATE`. `keep`: a folder from which the same command goes on. Raises UsageError for too few."""
    if rows < LEARNED + LEAST:
        raise UsageError("--requests", got=rows, allowed=f"{LEARNED + LEAST} or more")
    found = {}
    for domain in DOMAINS:
        path = None if keep is None else keep / f"{domain}.parquet"
        asked = questions(domain)
        order = np.random.default_rng(0).permutation(len(asked))[: rows if domain == "old" else LATE]
        some = [asked[i] for i in order.tolist()]
        found[domain] = Pool(captured(model, some, path, say), [model.tokenizer.encode(text) for text in some])
    return found


def captured(model: Model, asked: Sequence[str], path: Path | None, say: Callable[[str], None]) -> pa.Table:
    """What a capture would hold of these questions, answered greedily at depth "auto"; from `path`, where they are there."""
    if path is not None and path.exists():
        return pq.read_table(path)
    say(f"answering {len(asked):,} questions")
    sampling = Sampling(temperature=0.0, max_tokens=ANSWER)
    prompts = [
        encode_chat([{"role": "user", "content": text}], model.tokenizer, model.config, template=model.chat_template)
        for text in asked
    ]
    requests = [Request(prompt, sampling, depth="auto", signals=True) for prompt in prompts]
    lines = []
    for number, (text, done) in enumerate(zip(asked, Engine(model).generate(requests), strict=True)):
        end = done.finished
        assert end is not None
        heard = end.signals
        row = Row(
            f"chatcmpl-{number}", number * SECOND, status=200, finish=end.reason, layers=end.depth,
            prompt_tokens=end.prompt_tokens, prompt_bytes=len(text.encode()), answer_tokens=end.completion_tokens,
        )  # fmt: skip
        if heard is not None:
            row.prompt_nll, row.router_bound, row.router_distance = (
                heard.prompt_nll,
                heard.router_bound,
                heard.router_distance,
            )
            row.answer_nll, row.predicted_gaps = heard.answer_nll, list(heard.predicted_gaps)
        lines.append(json.loads(row.line()))
    table = table_of(lines)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside(path) as beside:
            pq.write_table(table, beside)
    return table


def detection(pools: dict[str, Pool], seeds: int, vocab: int) -> dict[str, dict[str, Any]]:
    """Of each kind of stream: requests to the alarm of each seed (None: no alarm), their median and 95 % point, how many rang,
    and the signal with the most evidence then. `vocab`: tokens there are."""
    streams = {"no drift": ("old", 0.0, None), **DRIFTS}
    runs: dict[str, list[tuple[int | None, str]]] = {name: [] for name in streams}
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(pools["old"]))
        first, rest = order[:LEARNED], order[LEARNED:]
        table = Surprisal.counted((pools["old"].prompts[place] for place in first[:WANTED].tolist()), vocab)
        known = {name: _with_surprisal(pool.rows, map(table.of, pool.prompts)) for name, pool in pools.items()}
        unknown = _with_surprisal(pools["old"].rows.take(first[:WANTED]), [None] * len(first[:WANTED]))
        reference = pa.concat_tables([unknown, known["old"].take(first[WANTED:])])
        for name, (domain, share, _) in streams.items():
            stream = known["old"].take(rest)
            if share:
                stream = _mixed(stream, known[domain], share, np.random.default_rng((seed, 1)))
            runs[name].append(_alarm(reference, stream))
    return {
        name: _told(runs[name], wanted=wanted, requests=LATE if share else len(pools["old"]) - LEARNED)
        for name, (_, share, wanted) in streams.items()
    }


def _mixed(old: pa.Table, new: pa.Table, share: float, draws: np.random.Generator) -> pa.Table:
    """`LATE` rows, each of `new` by the chance `share`; drawn with repetition, where they are few."""
    is_new = draws.random(LATE) < share
    news = new.take(draws.integers(0, len(new), int(is_new.sum())))
    olds = old.take(draws.integers(0, len(old), int((~is_new).sum())))
    place = np.empty(LATE, dtype=np.int64)
    place[is_new], place[~is_new] = np.arange(len(news)), len(news) + np.arange(len(olds))
    return pa.concat_tables([news, olds]).take(place)


def _with_surprisal(rows: pa.Table, values: Iterable[float | None]) -> pa.Table:
    """The rows with what a gateway says of their prompts."""
    place = rows.column_names.index("prompt_surprisal")
    return rows.set_column(place, "prompt_surprisal", pa.array(list(values), pa.float32()))


def _alarm(first: pa.Table, stream: pa.Table) -> tuple[int | None, str]:
    """Requests of `stream` until the alarm, None without one, where `first` is the reference; and the signal that said most."""
    reference = measured(_in_order(first), "bench")
    detector = Detector(reference.streams, requests=REQUESTS)
    detector.update(reference.standardised(_in_order(stream)), np.arange(len(stream), dtype=float))
    number = None if detector.alarm is None else int(detector.alarm["number"])
    return number, detector.moved()[0].signal


def _in_order(table: pa.Table) -> pa.Table:
    """As if its rows had come one after the other."""
    at = pa.array(np.arange(len(table)) * SECOND, pa.int64())
    return table.set_column(table.column_names.index("at"), "at", at)


def _told(runs: Sequence[tuple[int | None, str]], *, wanted: int | None, requests: int) -> dict[str, Any]:
    numbers = np.array([np.inf if number is None else number for number, _ in runs])
    rang = [name for number, name in runs if number is not None]
    # percentiles of what rang at all would hide what did not: a missed one counts as the latest
    middle, late = (float(np.quantile(numbers, share, method="higher")) for share in (0.5, 0.95))
    return {
        "requests": requests, "alarms": len(rang), "runs": len(runs),
        "median": middle if np.isfinite(middle) else None, "p95": late if np.isfinite(late) else None,
        "wanted": wanted, "numbers": [number for number, _ in runs],
        "signals": {name: rang.count(name) for name in sorted(set(rang), key=rang.count, reverse=True)},
    }  # fmt: skip


def shown(found: dict[str, dict[str, Any]], seeds: int) -> Table:
    table = Table(title=f"requests to the alarm, {seeds} seeds; one false alarm in {REQUESTS:,} requests is accepted")
    for name in ("stream", "alarms", "median", "95 %", "wanted", "first signal"):
        table.add_column(name, justify="left" if name in ("stream", "first signal") else "right")
    for name, one in found.items():
        wanted = "at most 2 alarms" if one["wanted"] is None else f"median {one['wanted']:,}"
        shown = ["-" if one[key] is None else f"{one[key]:,.0f}" for key in ("median", "p95")]
        of = f"{one['alarms']} of {one['runs']}"
        table.add_row(f"{name}, {one['requests']:,} requests", of, *shown, wanted, ", ".join(one["signals"]))
    return table
