"""`shoal bench tolerance`: what a tolerance buys. A trained model answers held-out chats in batches of several sizes, in turns:
at full depth, at each fixed exit, as deep as the router says within each tolerance, drafted and verified within each, and as
depth "auto" gets it: drafted where that is measured to pay, and else by the router. Tokens a second after an answer's first,
with their spread over the turns, mean depth, nats spent, how often the router decided, and the scores of the tasks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.turns import show
from shoal.config import AUTO, GROUPS
from shoal.data.chats.heldout import Question
from shoal.engine.engine import Engine
from shoal.engine.events import Completion, Request, Sampling
from shoal.engine.front import settle
from shoal.errors import UsageError
from shoal.evaluate.evaluation import MOST_TOKENS, TASKS, Quality, Sizes, heldout_questions, leave_a_core, score
from shoal.evaluate.intervals import between
from shoal.evaluate.measures import Answer
from shoal.model.model import Model

Rows = list[dict[str, Any]]


@dataclass
class Way:
    """One way to answer, with an engine of its own, which knows its pace from one turn to the next."""

    name: str
    depth: str
    tolerance: float | None = None
    drafts: int | None = 0  # None: as many as are worth it
    engine: Engine | None = None
    rates: dict[str, list[float]] = field(default_factory=dict)  # by task, tokens a second of each turn
    answers: dict[str, list[Completion]] = field(default_factory=dict)  # of the last turn
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of it, by task: `_counts`

    def run(self, task: str, asked: Sequence[Question], temperature: float) -> None:
        """Answer `asked`, and keep what came and how fast."""
        assert self.engine is not None
        sampling = Sampling(
            temperature=temperature, seed=1, max_tokens=TASKS.get(task, MOST_TOKENS), speculative=self.drafts
        )
        requests = [
            Request(question.prompt, sampling, depth=self.depth, quality_tolerance=self.tolerance) for question in asked
        ]
        before = _counts(self.engine)
        self.answers[task] = done = self.engine.generate(requests)
        self.counts[task] = tuple(a - b for a, b in zip(_counts(self.engine), before, strict=True))
        ends = [answer.finished for answer in done if answer.finished is not None]
        after = sum(max(0, end.completion_tokens - 1) for end in ends)
        seconds = sum(end.total_seconds - end.first_token_seconds for end in ends)
        at_once = min(self.engine.scheduler.max_batch, len(ends))
        # 0 where no answer has a second token: then nothing was timed
        self.rates.setdefault(task, []).append(at_once * after / seconds if seconds else 0.0)


def tolerance(
    console: Console, *, model: Path, data: Path, batches: Sequence[int], tolerances: Sequence[float], prompts: int,
    rounds: int, temperature: float,
) -> None:  # fmt: skip
    """The table of each batch size, and all of it as JSON. `model`: a trained model directory with early exits; `data`: the
    directory of its held-out chats; `prompts` of each task."""
    leave_a_core()
    loaded = Model.load(model)
    if len(loaded.config.exits) < 2:
        raise UsageError("--model", got=str(model), allowed="a model with early exits")
    asked, _ = heldout_questions(loaded, data, Sizes(vqa=prompts, bleu=prompts, code=prompts, service=prompts))
    if not asked:
        raise UsageError("--data", got=str(data), allowed="a directory with held-out chats, made by `shoal prepare`")
    rows: Rows = []
    tables: list[Table] = []
    for batch in batches:
        ways = _ways(loaded, tolerances)
        for way in ways:
            way.engine = Engine(loaded, max_batch=batch, units=_units(loaded, asked, batch, rounds))
        for turn in range(rounds + 1):  # one that is not counted
            settle()  # as a server does: a look through all that is in memory takes as long as a turn of short answers
            for task, questions in asked.items():
                for way in ways:
                    way.run(task, questions, temperature)
                    if not turn:
                        way.rates[task] = []
        found = [_row(way, batch, asked) for way in ways]
        tables += _tables(found, batch, list(asked), temperature)
        rows += found
    what = {"bench": "tolerance", "model": str(model), "quantization": loaded.config.quantization}
    show(console, tables, {**what, "prompts": prompts, "rounds": rounds, "temperature": temperature, "rows": rows})


def _counts(engine: Engine) -> tuple[int, ...]:
    """Steps, their rows without those of drafts, drafts, and how many of these stood, since it began."""
    metrics = engine.scheduler.metrics
    return metrics.steps, metrics.rows, metrics.drafts, metrics.drafts_accepted


def _units(model: Model, asked: dict[str, list[Question]], batch: int, rounds: int) -> int:
    """As many as keep every prompt, and the answers of all turns. Who answers longer would else lose prompts that others find
    again, and would be slower for its prefills."""
    page, own = model.config.page, 1 + rounds
    tokens = [(len(one.prompt.ids), TASKS.get(task, MOST_TOKENS)) for task, every in asked.items() for one in every]
    pages = sum(-(-prompt // page) + own * (answer // page + 1) for prompt, answer in tokens)
    return 1 + GROUPS * (pages + batch * max(1 + (prompt + answer) // page for prompt, answer in tokens))


def _ways(model: Model, tolerances: Sequence[float]) -> list[Way]:
    names = list(model.config.exit_names)
    ways = [Way("full", names[-1])] + [Way(name, name) for name in names[:-1]]
    some = [value for value in tolerances if value and model.router is not None]  # without loss no router decides
    ways += [Way(f"router {value:g}", AUTO, value) for value in some]
    ways += [Way(f"verified {value:g}", names[-1], value, None) for value in tolerances]
    return ways + [Way(f"auto {value:g}", AUTO, value, None) for value in some]


def _row(way: Way, batch: int, asked: dict[str, list[Question]]) -> dict[str, Any]:
    quality = Quality()
    done = [answer for answers in way.answers.values() for answer in answers]
    ends = [answer.finished for answer in done if answer.finished is not None]
    tokens = max(1, sum(end.completion_tokens for end in ends))
    for task, questions in asked.items():
        given = way.answers[task]
        answers = [
            Answer(answer.text, len(answer.tokens), answer.depth, len(question.prompt.ids))
            for answer, question in zip(given, questions, strict=True)
        ]
        score(quality, task, answers, questions)
    spent = [(end.spent, max(1, end.completion_tokens)) for end in ends if end.spent is not None]
    return {
        "batch": batch,
        "way": way.name,
        "tokens_per_s": {task: statistics.median(rates) or None for task, rates in way.rates.items()},
        "turns": way.rates,  # tokens a second in each
        "counts": {  # in the last turn
            task: dict(zip(("steps", "rows", "drafts", "stood"), counts, strict=True))
            for task, counts in way.counts.items()
        },
        "cached_tokens": {  # of prompts, in the last turn
            task: sum(answer.finished.cached_tokens for answer in answers if answer.finished is not None)
            for task, answers in way.answers.items()
        },
        "mean_depth": sum(end.mean_depth * end.completion_tokens for end in ends) / tokens,
        "spent": sum(nats for nats, _ in spent) / sum(count for _, count in spent) if spent else None,
        "most_spent": max((nats / count for nats, count in spent), default=None),
        "answers": len(ends),
        # of them, whose depth the router decided: nobody has looked at what these lost
        "by_router": sum(end.spent is None for end in ends) if way.depth == AUTO else None,
        "scores": {task: figure.value for task, figure in quality.figures.items()},
        "intervals": {task: figure.ends for task, figure in quality.figures.items()},  # 95 %, over groups of prompts
    }


def _tables(rows: Rows, batch: int, tasks: list[str], temperature: float) -> list[Table]:
    """Speed, beside full depth, and what it costs; then the scores, with their 95 % intervals over groups of prompts."""
    how = f"{batch} at once, {'greedy' if temperature == 0 else f'temperature {temperature:g}'}"
    short = [task.split()[0] for task in tasks]
    columns = ("way", *short, "mean", "turns", "depth", "spent", "most", "router")
    speed = Table(*columns, title=f"{how}: speed beside full depth, nats a token")
    scores = Table("way", *short, title=f"{how}: scores")
    timed = [task for task in tasks if all(rows[0]["turns"][task])]
    for row in rows:
        ratios = {task: _beside(row, rows[0], task) for task in tasks}
        spent = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("spent", "most_spent")]
        spread = _spread(row, rows[0], timed)
        decided = "-" if row["by_router"] is None else f"{row['by_router']} of {row['answers']}"
        speed.add_row(
            row["way"], *(_figure(ratio) for ratio in ratios.values()), _figure(_mean([ratios[task] for task in timed])),
            "-" if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f}", f"{row['mean_depth']:.2f}", *spent, decided,
        )  # fmt: skip
        scores.add_row(row["way"], *(_score(row, task) for task in tasks))
    return [speed, scores]


def _beside(row: dict[str, Any], full: dict[str, Any], task: str) -> float | None:
    """Tokens a second beside those at full depth; None where the answers of either have one token, which nothing times."""
    own, plain = row["tokens_per_s"][task], full["tokens_per_s"][task]
    return own / plain if own and plain else None


def _mean(ratios: Sequence[float | None]) -> float | None:
    """None where there is none, or one of them is not known: the mean would be of other tasks than another way's."""
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.fmean(known) if known and len(known) == len(ratios) else None


def _figure(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _spread(row: dict[str, Any], full: dict[str, Any], tasks: list[str]) -> tuple[float, float] | None:
    """Least and most of the turns' means over `tasks` of tokens a second beside those at full depth in the same turn; None
    where a turn has a task of which nothing was timed."""
    pairs = [list(zip(row["turns"][task], full["turns"][task], strict=True)) for task in tasks]
    if not pairs or not all(own and plain for pair in pairs for own, plain in pair):
        return None
    ratios = [[own / plain for own, plain in pair] for pair in pairs]
    means = [statistics.fmean(turn) for turn in zip(*ratios, strict=True)]
    return min(means), max(means)


def _score(row: dict[str, Any], task: str) -> str:
    value, ends = row["scores"][task], row["intervals"][task]
    return f"{value:.3g} ({between(ends, '.3g')})"
