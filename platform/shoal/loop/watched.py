"""The signals that are watched: numbers of a request, taken from captured rows, each with the words that an alarm says it in.

Seconds are not among them: a retraining beside a service slows it, and that is no drift.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from shoal.loop.rows import RERUN

Column = Callable[[pa.Table], np.ndarray]


@dataclass(frozen=True)
class Signal:
    """`of` gives float64 [n], NaN where a request has none; `more` and `less`: what is said where it moved."""

    name: str
    of: Column
    more: str
    less: str


def column(table: pa.Table, name: str) -> np.ndarray:
    """float64 [n] of a column of numbers or truths; NaN where it is null, infinite (too large for the column), or not there."""
    if name not in table.column_names:
        return np.full(len(table), np.nan)
    found = np.asarray(table[name].cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=float)
    return np.where(np.isfinite(found), found, np.nan)


def texts(table: pa.Table, name: str) -> list[str]:
    """A column of texts; "" where it is null, or not there."""
    return [text or "" for text in table[name].to_pylist()] if name in table.column_names else [""] * len(table)


def are_requests(table: pa.Table) -> np.ndarray:
    """bool [n]: which rows are of requests, and neither thumbs, which have a row of their own, nor re-runs."""
    return np.isnan(column(table, "down")) & (np.array(texts(table, "role"), dtype=object) != RERUN)


def _log(name: str) -> Column:
    return lambda table: np.log1p(np.maximum(column(table, name), 0.0))


def _plain(name: str) -> Column:
    return lambda table: column(table, name)


def _bytes_a_token(table: pa.Table) -> np.ndarray:
    return column(table, "prompt_bytes") / np.maximum(column(table, "prompt_tokens"), 1.0)


def _cut(table: pa.Table) -> np.ndarray:
    ends = texts(table, "finish")
    return np.array([float(end == "length") if end else np.nan for end in ends])


def _status(low: int, high: int) -> Column:
    def share(table: pa.Table) -> np.ndarray:
        status = column(table, "status")
        return np.where(np.isnan(status), np.nan, (status >= low) & (status < high))

    return share


WATCHED = (
    Signal("prompt_surprisal", _plain("prompt_surprisal"), "prompts more surprising", "prompts less surprising"),
    Signal("prompt_nll", _plain("prompt_nll"), "prompts harder to the first exit", "prompts easier to the first exit"),
    Signal("router_distance", _log("router_distance"), "prompts further from what the router knows",
           "prompts nearer to what the router knows"),
    Signal("router_bound", _plain("router_bound"), "larger predicted gaps", "smaller predicted gaps"),
    Signal("answer_nll", _plain("answer_nll"), "answers less sure", "answers surer"),
    Signal("layers", _plain("layers"), "deeper answers", "shallower answers"),
    Signal("prompt_tokens", _log("prompt_tokens"), "longer prompts", "shorter prompts"),
    Signal("answer_tokens", _log("answer_tokens"), "longer answers", "shorter answers"),
    Signal("bytes_a_token", _bytes_a_token, "more bytes a token", "fewer bytes a token"),
    Signal("cut", _cut, "more answers cut off by max_tokens", "fewer answers cut off by max_tokens"),
    Signal("tool_valid", _plain("tool_valid"), "more calls of tools that are valid", "more calls of tools that are not"),
    Signal("failed", _status(500, 600), "more failures", "fewer failures"),
    Signal("refused", _status(400, 499), "more requests that are refused", "fewer requests that are refused"),
    Signal("regret", _plain("regret"), "exits that lose more", "exits that lose less"),
    Signal("down", _plain("down"), "more thumbs down", "fewer thumbs down"),
)  # fmt: skip
BY_NAME = {signal.name: signal for signal in WATCHED}
# of captured rows, what signals are made of and whose they are
COLUMNS = [
    *("id", "at", "version", "role", "weights", "slice", "subject", "conversation", "tolerance", "regret_bound"),
    *("prompt_surprisal", "prompt_nll", "router_distance", "router_bound", "answer_nll", "layers", "prompt_tokens"),
    *("answer_tokens", "prompt_bytes", "finish", "tool_valid", "status", "regret"),
]
INPUTS = {"prompt_surprisal", "prompt_nll", "router_distance"}
ROUTERS = {"router_bound", "regret"}


def for_router(moved: Collection[str]) -> bool:
    """Whether a router that is fitted again is all that the signals which `moved` ask for."""
    return not ROUTERS.isdisjoint(moved) and INPUTS.isdisjoint(moved)


def meaning(moved: Collection[tuple[str, float]]) -> tuple[str, str]:
    """What it is, and what to do, of the signals that moved, each with its shift in standard deviations. What became better
    is another use: no fewer failures, thumbs down or doubts ask for a cure."""
    names, fewer = {name for name, _ in moved}, {name for name, shift in moved if shift < 0}
    more = {name for name, shift in moved if shift >= 0}
    if more & {"failed", "refused"} and not names & INPUTS:
        return "operations", "look at the errors: nothing to train"
    if "bytes_a_token" in fewer and any(name == "bytes_a_token" and shift <= -1 for name, shift in moved):
        return "a script or language that the tokenizer does not fit", "prepare and pretrain: another service"
    if names & INPUTS:
        return "a new domain", "curate, then retrain"
    if more & ROUTERS:
        return "the router out of its calibration", "fit the router again"
    if "down" in more:
        return "a world that changed", "get new labels first"
    if "tool_valid" in fewer:
        return "calls of tools that are not valid", "look at them, and at the tools that are offered; then curate"
    if "answer_nll" in more:
        return "answers that the model is less sure of", "look at examples, then curate"
    return "another use", "accept it as the reference, if it is meant"
