"""What is kept of each request to a served model, in numbers: one `Row`, which is a line of a journal, then a row of parquet.

Never its text, nor its key. What is not known of a request is null. New columns come at the end, so that older parts are read
by newer readers; a column that changes its sense makes another `capture.VERSION`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

TEXT, WHOLE, SMALL, NUMBER, FLAG = pa.string(), pa.int32(), pa.int16(), pa.float32(), pa.bool_()
NUMBERS = pa.list_(NUMBER)
RERUN, SHADOW = "rerun", "shadow"
COPIES = (RERUN, SHADOW)  # roles of rows beside that of the request with the same id


def _column(kind: pa.DataType) -> Any:
    """A field that is null while it is not known, of that type in parquet."""
    return dataclasses.field(default=None, metadata={"type": kind})


@dataclass(slots=True)
class Row:
    """One request that has ended, however it ended. Times are in seconds, losses in nats a token."""

    id: str = dataclasses.field(metadata={"type": TEXT})  # the answer's (chatcmpl-...); of a refused one the request's
    at: int = dataclasses.field(metadata={"type": pa.int64()})  # when it ended, in ms since 1970, UTC

    # who and what
    request_id: str | None = _column(TEXT)
    model: str | None = _column(TEXT)  # as served, not as an alias
    version: str | None = _column(TEXT)  # of a release; null where the model is no version of one
    role: str | None = _column(TEXT)  # stable, canary, or one of `COPIES`
    weights: str | None = _column(TEXT)  # first 16 hexadecimal digits of the sha256 of the weights
    route: str | None = _column(TEXT)  # /v1/chat/completions, ...
    slice: str | None = _column(TEXT)  # `metadata.workload`, else the key's name; "other" from the ninth on
    subject: str | None = _column(TEXT)  # keyed hash of the key's name and `user`, 32 hexadecimal digits
    conversation: str | None = _column(TEXT)  # keyed hash of the chat's first turn and its subject, 16 digits

    # what was asked
    depth_asked: str | None = _column(TEXT)  # auto, or the name of an exit
    tolerance: float | None = _column(NUMBER)
    temperature: float | None = _column(NUMBER)
    max_tokens: int | None = _column(WHOLE)
    stream: bool | None = _column(FLAG)
    guided: bool | None = _column(FLAG)
    tools: int | None = _column(SMALL)  # how many are offered
    images: int | None = _column(SMALL)

    # sizes and times
    prompt_tokens: int | None = _column(WHOLE)
    prompt_bytes: int | None = _column(WHOLE)  # of the text that its tokens stand for
    cached_tokens: int | None = _column(WHOLE)
    answer_tokens: int | None = _column(WHOLE)
    queue_s: float | None = _column(NUMBER)
    first_s: float | None = _column(NUMBER)
    total_s: float | None = _column(NUMBER)
    status: int | None = _column(SMALL)  # of HTTP; 499: the client left
    finish: str | None = _column(TEXT)  # stop, length, tool_calls
    error: str | None = _column(TEXT)  # its code
    resumed: str | None = _column(TEXT)  # "canary->stable", where it went on with other weights

    # confidence
    prompt_surprisal: float | None = _column(NUMBER)  # nats of the most surprising tokens, see `surprisal.Learned`
    prompt_nll: float | None = _column(NUMBER)  # of its tokens, at the first exit
    answer_nll: float | None = _column(NUMBER)  # of a sample of the answer's tokens, at its depth: mean
    answer_nll_max: float | None = _column(NUMBER)  # and most
    layers: int | None = _column(SMALL)  # that it ran with
    # [A], of each early exit, by the router
    predicted_gaps: list[float] | None = dataclasses.field(default=None, metadata={"type": NUMBERS})
    # predicted 0.8-quantile of the gap at the exit that was chosen; 0: full
    router_bound: float | None = _column(NUMBER)
    router_distance: float | None = _column(NUMBER)  # mean of ((x - center) / spread)^2 over the features x it reads
    drafts_accepted: int | None = _column(WHOLE)

    # outcome
    tool_calls: int | None = _column(SMALL)
    # each call names a tool that was offered, with an object of arguments; false too of one that is not even read as a call
    tool_valid: bool | None = _column(FLAG)
    stored: bool | None = _column(FLAG)  # its text is kept as well

    # of a re-run at full depth (role rerun), beside `tolerance`, which the router was to keep
    regret: float | None = _column(NUMBER)  # nats a token that the exit which answered loses along full depth's answer
    regret_bound: float | None = _column(NUMBER)  # `router_bound` of the request
    # [A], the same of each early exit
    gaps: list[float] | None = dataclasses.field(default=None, metadata={"type": NUMBERS})

    def line(self, frame: int = 0) -> bytes:
        """It as a line of a journal: JSON of what is known; with which `frame` of its gateway's it is [none]."""
        known = {name: _plain(value) for name in NAMES if (value := getattr(self, name)) is not None}
        known |= {"frame": frame} if frame else {}
        return (_encoded(known) + "\n").encode()


# what pyarrow raises for a number that is too large, another kind of value, and half of a surrogate pair
UNFIT = (pa.ArrowException, ValueError, TypeError, OverflowError)
NAMES = tuple(field.name for field in dataclasses.fields(Row))
SCHEMA = pa.schema([(field.name, field.metadata["type"]) for field in dataclasses.fields(Row)])


_encoded = json.JSONEncoder(separators=(",", ":")).encode  # made once: `dumps` makes one for each line


def _plain(value: Any) -> Any:
    """`value` as JSON has it: a number that is not finite is none."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return [_plain(each) for each in value] if isinstance(value, list) else value


def table_of(lines: list[dict[str, Any]]) -> pa.Table:
    """Lines of a journal, read from JSON, as a table of `SCHEMA`. Keys that it does not have are left out, and a value that its
    column cannot hold is not known: no row may keep those beside it from being read."""
    try:
        return pa.Table.from_pylist(lines, SCHEMA)
    except UNFIT:
        columns = [_fitting([line.get(column.name) for line in lines], column.type) for column in SCHEMA]
        return pa.table(columns, schema=SCHEMA)


def _fitting(values: list[Any], kind: pa.DataType) -> pa.Array:
    """`values` as a column, null where one does not fit."""

    def fits(value: Any) -> bool:
        try:
            pa.array([value], kind)
        except UNFIT:
            return False
        return True

    return pa.array([value if fits(value) else None for value in values], kind)
