"""More of a domain's fine-tuning chats: some rows again in other words, with slips, or with other names in their code.

    "paraphrase"  the user's questions by template and synonym (`data.wording`)
    "typos"       slips in the user's questions
    "rename"      local names of Python code, in all messages alike (`data.rename`)

Notable: every row stays as it is, byte for byte; a changed copy follows it, and says so in its field ``augmented``. What is
done to a row depends on its messages and the seed alone. Where nothing can be changed, nothing is added. Rows to evaluate on
are never changed, and no copy asks what a held-out row asks. A line that an answer repeats word for word stays as it is: of a
quote whose text was changed a model would learn to say what is not there.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypeGuard

import xxhash

from shoal.data.chats.rename import renamed
from shoal.data.chats.rows import AUGMENTED, is_augmented, lines
from shoal.data.chats.wording import SYNONYMS, Synonyms, paraphrased, with_typos
from shoal.errors import DataError, UsageError
from shoal.machine import aside

EVALUATION = frozenset({"heldout", "test", "eval", "evaluation", "validation"})  # values of a row's field ``split``
WAYS = ("paraphrase", "typos", "rename")
QUOTED = 16  # characters of a line, at least, for it to be a quote where an answer has it too

Row = dict[str, Any]


@dataclass(frozen=True)
class Augmenter:
    """Makes the changed copies of rows; `share`: of the rows, how many get one."""

    share: float
    seed: int = 0
    synonyms: Synonyms = field(default_factory=dict)  # beside the general ones
    heldout: frozenset[str] = frozenset()  # questions that no copy may ask, as `asked` gives them

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise UsageError("--share", got=self.share, allowed="0 to 1")

    def copy(self, row: Row) -> Row | None:
        """A changed copy of a row, or None: not drawn, to evaluate on, or nothing that can be changed."""
        messages = row.get("messages")
        if not _is_chat(messages) or row.get("split") in EVALUATION or is_augmented(row):
            return None
        draw = xxhash.xxh3_64_intdigest(json.dumps(messages, sort_keys=True).encode(), seed=self.seed)
        if draw / 2**64 >= self.share or asked(messages) in self.heldout:
            return None
        first = draw % len(WAYS)
        for way in WAYS[first:] + WAYS[:first]:
            changed = self._changed(messages, way, draw)
            if changed is not None and asked(changed) not in self.heldout:
                return {**row, "messages": changed, AUGMENTED: way}
        return None

    def _changed(self, messages: list[Row], way: str, draw: int) -> list[Row] | None:
        texts = list(_texts(messages))
        if way == "rename":
            new = renamed([text for _, text in texts], draw)
        else:
            change: Callable[[str], str | None] = lambda text: with_typos(text, draw)  # noqa: E731
            if way == "paraphrase":
                synonyms = {**SYNONYMS, **self.synonyms}
                change = lambda text: paraphrased(text, draw, synonyms)  # noqa: E731
            answers = [text for role, text in texts if role == "assistant"]
            made = [_around(text, answers, change) if role == "user" else None for role, text in texts]
            new = [m or text for m, (_, text) in zip(made, texts, strict=True)] if any(made) else None
        return _with_texts(messages, iter(new)) if new is not None else None


def augment(data: Path, out: Path, augmenter: Augmenter) -> dict[str, Any]:
    """Write the rows of `data` and their changed copies to `out`; how many rows and copies there are, by which way, and for how
    many rows none could be made ("failed"): one row that nobody thought of ends no run.

    Raises DataError when `data` cannot be read or `out` is the same file.
    """
    if out.exists() and out.samefile(data):
        raise DataError(f"{out} is the file that is read", do="give another --out")
    copies: Counter[str] = Counter()
    rows = failed = 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with aside(out) as beside, beside.open("wb") as stream:
        for line in lines(data):
            rows += 1
            stream.write(line.rstrip(b"\r\n") + b"\n")
            try:
                row = _row(line)
                copy = augmenter.copy(row) if row is not None else None
                made = json.dumps(copy, ensure_ascii=False).encode("utf-8", "surrogatepass")
            except Exception:  # of a row, which stays as it is
                failed += 1
                continue
            if copy is not None:
                copies[copy[AUGMENTED]] += 1
                stream.write(made + b"\n")
    return {"rows": rows, "copies": copies.total(), "by_way": dict(sorted(copies.items())), "failed": failed}


def questions(path: Path) -> frozenset[str]:
    """What the rows of a held-out file ask."""
    rows = (_row(line) for line in lines(path))
    return frozenset(asked(row["messages"]) for row in rows if row is not None and _is_chat(row.get("messages")))


def asked(messages: list[Row]) -> str:
    """The users' words of a chat, without case, spaces and punctuation: equal for what a reader would call the same."""
    return "".join(c for role, text in _texts(messages) if role == "user" for c in text.casefold() if c.isalnum())


def asked_about(messages: list[Row]) -> str:
    """`asked`, and of which images: the same words about another are another question."""
    parts = (part for message in messages if isinstance(message.get("content"), list) for part in message["content"])
    images = [part["image_url"] for part in parts if isinstance(part, dict) and "image_url" in part]
    return asked(messages) + (hashlib.sha256(json.dumps(images).encode()).hexdigest() if images else "")


def _row(line: bytes) -> Row | None:
    """The object of a line; None for what training will refuse and count."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_chat(messages: Any) -> TypeGuard[list[Row]]:
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) for m in messages)


def _around(text: str, answers: list[str], change: Callable[[str], str | None]) -> str | None:
    """`text` changed around its lines that an answer has word for word; None where nothing is."""

    def quoted(line: str) -> bool:
        return len(line.strip()) >= QUOTED and any(line.strip() in answer for answer in answers)

    pieces = [(kept, "\n".join(some)) for kept, some in groupby(text.split("\n"), quoted)]
    made = [None if kept else change(piece) for kept, piece in pieces]
    if not any(one is not None for one in made):
        return None
    return "\n".join(piece if new is None else new for new, (_, piece) in zip(made, pieces, strict=True))


def _texts(messages: list[Row]) -> Iterator[tuple[str, str]]:
    """Role and text of everything that is text in a chat, in order."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield str(message.get("role")), text


def _with_texts(messages: list[Row], texts: Iterator[str]) -> list[Row]:
    """`messages` with `texts` in the places that `_texts` found."""

    def put(part: Any) -> Any:
        if isinstance(part, str):
            return next(texts)
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            return {**part, "text": next(texts)}
        return part

    out = []
    for message in messages:
        content = message.get("content")
        new = [put(part) for part in content] if isinstance(content, list) else put(content)
        out.append({**message, "content": new} if "content" in message else message)
    return out
