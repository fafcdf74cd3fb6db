"""Fine-tuning rows: a JSONL of chats or texts in any of the `forms`, encoded once and kept as flat arrays.

Letters: R rows, L ids of all rows together, n patches of all rows together, V numbers in a patch.
"""

from __future__ import annotations

import codecs
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import ModelConfig
from shoal.data.chats import forms
from shoal.data.shards import group_number
from shoal.errors import DataError, RequestError
from shoal.inputs.chat import DEFAULT_TEMPLATE, Encoded, encode_chat
from shoal.inputs.tokenizer import Tokenizer

HELDOUT = "sft-heldout.jsonl"  # the chats that a prepared corpus holds out, if it has some
AUGMENTED = "augmented"  # field of a row that `data.augment` made: how it was changed
MADE = "augmented row among held-out ones"


@dataclass(frozen=True)
class ChatRows:
    """The rows that can be trained on; `refused` counts the others by reason, `refused_at` has the first line of each."""

    ids: np.ndarray  # int32 [L]
    answer: np.ndarray  # bool [L]: written by the assistant
    ends: np.ndarray  # int64 [R]: where each row's ids end
    patches: np.ndarray  # uint8 [n, V]
    patch_ends: np.ndarray  # int64 [R]
    refused: dict[str, int]
    refused_at: dict[str, int]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R], in tokens."""
        return np.diff(self.ends, prepend=0)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids, answer, patches of one row: views."""
        tokens, images = (slice(ends[index - 1] if index else 0, ends[index]) for ends in (self.ends, self.patch_ends))
        return self.ids[tokens], self.answer[tokens], self.patches[images]


def read_chats(
    path: str | Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    template: str = DEFAULT_TEMPLATE,
    limit: int = 0,
    heldout: bool = False,
) -> ChatRows:
    """The rows of a JSONL file, at most `limit` tokens long (0: the training length). `heldout`: to measure on.

    Raises DataError when the file cannot be read, and when none of its rows can be used; for held-out rows, naming the line,
    when one cannot be read or was made by `data.augment`: a measurement on them would mean nothing.
    """
    longest, refused = limit or config.train_length, Refused()
    kept: list[Encoded] = []
    for chat in chats(path, tokenizer, config, template, refused, heldout=heldout):
        if not chat.messages:
            kept += [chat.row.cut(start, longest) for start in range(0, len(chat.row.ids), longest)]
        elif len(chat.row.ids) > longest:
            refused(chat.line, f"longer than {longest} tokens")
        else:
            kept.append(chat.row)
    if made := refused.counts[MADE]:
        raise DataError(f"{path} holds {made} augmented row(s)", do="measure on the rows that were there before")
    for reason, line in refused.first.items() if heldout else ():
        if not reason.startswith("longer than"):
            raise unusable(path, line, reason)
    return flat(kept, config, refused, f"{path} holds no row to train on")


def read_pairs(
    path: str | Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    template: str = DEFAULT_TEMPLATE,
    limit: int = 0,
) -> ChatRows:
    """The preference pairs of a JSONL file as two rows each, the preferred one first; both at most `limit` tokens long (0: the
    training length). Raises DataError when the file cannot be read, and when none of its rows can be used."""
    longest, refused = limit or config.train_length, Refused()
    kept: list[Encoded] = []
    for line, text in numbered(Path(path)):
        with refusing(line, refused):
            row, native = _parsed(text), tokenizer.calls is not None
            told = forms.offered(row) if native and isinstance(row, dict) else None
            sides = [
                encode_chat(messages, tokenizer, config, template=template, add_generation_prompt=False, tools=told)
                for messages in forms.pair(row, native=native)
            ]
            if not all(any(side.answer) for side in sides):
                raise DataError("no answer")
            if max(len(side.ids) for side in sides) > longest:
                raise DataError(f"longer than {longest} tokens")
            if sides[0].ids == sides[1].ids:
                raise DataError("the preferred and the rejected answer are the same")
            kept += sides
    return flat(kept, config, refused, f"{path} holds no pair to learn from", forms.PAIRS)


class Refused:
    """Rows that cannot be used: how many for each reason, and the first line of each."""

    def __init__(self) -> None:
        self.counts, self.first = Counter[str](), dict[str, int]()

    def __call__(self, line: int, reason: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, line)


@contextlib.contextmanager
def refusing(line: int, refuse: Callable[[int, str], None]) -> Iterator[None]:
    """What is wrong with the row of a line, in this block, is told to `refuse`: one that nobody thought of ends no run."""
    try:
        yield
    except (DataError, RequestError) as error:
        refuse(line, error.message.split(":")[0])
    except UnicodeEncodeError:  # half a surrogate
        refuse(line, "text that is no Unicode")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        refuse(line, f"a row that cannot be read, {type(error).__name__}")


def flat(
    kept: Sequence[Encoded], config: ModelConfig, refused: Refused, none: str, allowed: str = forms.KNOWN
) -> ChatRows:
    """The rows `kept` as flat arrays. Raises DataError, which begins with `none` and names the first of those `refused`, where
    there are none."""
    if not kept:
        reason, line = min(refused.first.items(), key=lambda found: found[1], default=("nothing in it", 1))
        raise DataError(none, got=f"line {line}: {reason}", allowed=allowed)
    images = [row.patches for row in kept if row.patches is not None]
    return ChatRows(
        ids=np.concatenate([np.asarray(row.ids, dtype=np.int32) for row in kept]),
        answer=np.concatenate([np.asarray(row.answer, dtype=bool) for row in kept]),
        ends=np.cumsum([len(row.ids) for row in kept]),
        patches=np.concatenate(images) if images else np.zeros((0, config.patch_values), dtype=np.uint8),
        patch_ends=np.cumsum([sum(len(image.values) for image in row.images) for row in kept]),
        refused=dict(sorted(refused.counts.items())),
        refused_at=dict(refused.first),
    )


@dataclass(frozen=True)
class Chat:
    """A row that can be learned from."""

    line: int  # of its file, from 1
    messages: list[dict[str, Any]]  # empty for a text
    row: Encoded
    task: str
    group: int  # see `group_of`
    tools: list[dict[str, Any]] | None = None  # that the chat template is given
    sent: dict[str, Any] | None = None  # of one that is held out: `forms.as_sent`


def chats(
    path: str | Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    template: str,
    refuse: Callable[[int, str], None],
    *,
    heldout: bool = False,
) -> Iterator[Chat]:
    """The rows of a JSONL file that have an answer, one at a time: the one reader of chats, for training and for measuring.
    `refuse` is told the line of every other and why. Raises DataError when the file cannot be read."""
    for line, text in numbered(Path(path)):
        chat = None
        with refusing(line, refuse):
            native = tokenizer.calls is not None
            given = _row(text, heldout=heldout)
            values = forms.to_last_answer(forms.canonical(given, native=native))
            messages = values.get("messages") or []
            if not messages and not values.get("text"):
                raise DataError("no answer")
            told = forms.offered(values) if native and messages else None
            if messages:
                row = encode_chat(
                    messages, tokenizer, config, template=template, add_generation_prompt=False, tools=told
                )
            else:
                ids = [*tokenizer.prompt(values["text"]), tokenizer.ends[0]]
                row = Encoded(ids, [], [True] * len(ids))
            if not any(row.answer):
                raise DataError("answers that the chat template shows otherwise than it asks for them")
            sent = forms.as_sent(given) if heldout and messages else None
            chat = Chat(line, messages, row, task_of(values), group_of(values), told, sent)
        if chat is not None:
            yield chat


def need_forms(path: str | Path, *, pairs: bool = False, some: bool = False) -> None:
    """Raises DataError, with its line, for the first row of a JSONL file that is of no known form, or no preference pair; with
    `some`, where no row is of one."""
    refused = Refused()
    for line, text in numbered(Path(path)):
        with refusing(line, refused):
            row = _parsed(text)
            forms.pair(row) if pairs else forms.canonical(row)
            if some:
                return
    for reason, line in refused.first.items():
        raise DataError(f"{path} line {line}", got=reason, allowed=forms.PAIRS if pairs else forms.KNOWN)


def unusable(path: str | Path, line: int, reason: str) -> DataError:
    """What is wrong with a held-out row."""
    return DataError(f"{path} line {line}", got=reason, do="mend the row, or take it out: it is to be measured on")


def is_augmented(row: Mapping[str, Any]) -> bool:
    """Did `data.augment` make this row? One whose field says null or false is as it was."""
    return bool(row.get(AUGMENTED))


def group_of(row: Mapping[str, Any]) -> int:
    """Which group a row is of, as `shards.group_number` gives it: what its field ``group`` names; without one the rows that ask
    about the same images, or ask the same, are of one; a text is one of its own."""
    if row.get("group") is not None:
        return group_number(str(row["group"]))
    messages = row.get("messages") or [{"content": row.get("text")}]
    asked = [message.get("content") for message in messages if message.get("role") != "assistant"]
    parts = [part for content in asked if isinstance(content, list) for part in content if isinstance(part, dict)]
    images = [part for part in parts if part.get("type") == "image_url"]
    return group_number(json.dumps(images or asked, sort_keys=True))


def labels(path: str | Path) -> Iterator[tuple[str, int]]:
    """Task and group of each row of a JSONL file. Raises DataError when the file cannot be read."""
    for line, text in numbered(Path(path)):
        # who reads the rows themselves says what is wrong with them
        with refusing(line, Refused()):
            values = forms.to_last_answer(forms.canonical(_row(text, heldout=False)))
            yield task_of(values), group_of(values)


def task_of(row: Mapping[str, Any]) -> str:
    """Raises UnicodeEncodeError for a name that no report could hold."""
    task = "chat" if row.get("task") is None else str(row["task"])
    task.encode()
    return task


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a JSONL file that hold something. Raises DataError when it cannot be read."""
    return (text for _, text in numbered(path))


def numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    """`lines` with their numbers, from 1; without the mark that some programs put at the beginning of UTF-8."""
    try:
        with path.open("rb") as stream:
            for number, text in enumerate(stream, 1):
                text = text.removeprefix(codecs.BOM_UTF8) if number == 1 else text
                if text.strip():
                    yield number, text
    except OSError as error:
        raise DataError(f"cannot read {path}", got=error.strerror, do="give a .jsonl of chats") from error


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("broken JSON") from error


def _row(text: bytes, *, heldout: bool) -> Any:
    """What stands in a line."""
    row = _parsed(text)
    if heldout and isinstance(row, dict) and is_augmented(row):
        raise DataError(MADE)
    return row
