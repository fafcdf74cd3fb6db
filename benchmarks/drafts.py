"""What a model's own drafts gain it at batch 1, without changing a token: the part `drafts` of `shoal bench decode --model`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.table import Table

from benchmarks.speed import Bench, Rows
from benchmarks.turns import in_turns
from shoal.config import FULL
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.errors import UsageError
from shoal.inputs.chat import encode_chat
from shoal.model.model import Model

AHEAD = (0, 1, 2, 4)  # drafts a step
QUESTIONS = ("What is the capital of France?", "Give me three tips for a good night's sleep.", "Why is the sky blue?")


def need_exits(model: Model) -> None:
    """Raises UsageError for a model that has no early exit to draft at."""
    if len(model.config.exits) == 1:
        raise UsageError("--parts", got="drafts", allowed="others, of a model without early exits; see `shoal adapt`")


def drafts_of(bench: Bench) -> tuple[Table, Rows]:
    """Tokens a second of greedy answers to `QUESTIONS`, one after the other, without drafts and with some; by precision. Raises
    UsageError for a model that has no early exit to draft at."""
    need_exits(bench.model)
    runs: dict[tuple[str, int], Callable[[], float]] = {}
    asked = {}
    for label, model in bench.both.items():
        engine = Engine(model, speculative_max_batch=1)
        for ahead in AHEAD:
            asked[label, ahead] = runs[label, ahead] = Asked(engine, ahead, bench.tokens)
    medians = in_turns(runs, bench.rounds)
    title = f"drafts of the exit after {bench.config.exits[0]} of {bench.config.layers} layers, batch 1"
    table = Table("", "drafts", "tokens/s", "ratio", "accepted", "same tokens", title=title)
    rows = []
    for (label, ahead), found in medians.items():
        of, plain = asked[label, ahead], asked[label, 0]
        ratio, stood, same = found / medians[label, 0], of.accepted / max(1, of.drafts), of.said == plain.said
        table.add_row(label, str(ahead), f"{found:.1f}", f"{ratio:.2f}", f"{stood:.0%}", "yes" if same else "no")
        rows.append(
            {"what": label, "drafts": ahead, "tokens_per_s": found, "ratio": ratio, "accepted": stood, "same": same}
        )
    return table, rows


@dataclass
class Asked:
    """`QUESTIONS`, answered greedily one after the other; called, the tokens a second, prefill included."""

    engine: Engine
    ahead: int  # drafts a step
    tokens: int  # of an answer
    said: list[list[int]] = field(default_factory=list)  # last
    drafts: int = 0
    accepted: int = 0

    def __call__(self) -> float:
        model, metrics = self.engine.model, self.engine.scheduler.metrics
        sampling = Sampling(temperature=0.0, max_tokens=self.tokens, ignore_eos=True, speculative=self.ahead)
        drafts, accepted = metrics.drafts, metrics.drafts_accepted
        start = time.perf_counter()
        done = [self.engine.generate([Request(_asking(model, text), sampling, depth=FULL)])[0] for text in QUESTIONS]
        spent = time.perf_counter() - start
        self.said = [answer.tokens for answer in done]
        self.drafts += metrics.drafts - drafts
        self.accepted += metrics.drafts_accepted - accepted
        return sum(len(tokens) for tokens in self.said) / spent


def _asking(model: Model, text: str) -> list[int]:
    told = [{"role": "user", "content": text}]
    return encode_chat(told, model.tokenizer, model.config, template=model.chat_template, answers=False).ids
