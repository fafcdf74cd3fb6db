"""Right answers for what was asked of a service, and where they come from. A prompt has none of its own: what the model said
itself, and nobody rated, is never one, for a model that learns its own words collapses.

    correction   a person wrote the better answer
    imported     people labelled it elsewhere: Label Studio, Argilla, or a JSONL of chats
    teacher      a larger model answered it
    up           a person said that the model's own answer was right; few of these, and one a person and question

The first that there is counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.data.chats import forms
from shoal.data.chats.augment import asked
from shoal.errors import DataError, first_line
from shoal.loop.capture import Capture
from shoal.loop.texts import Texts
from shoal.loop.votes import Votes

CORRECTION, IMPORTED, TEACHER, UP = "correction", "imported", "teacher", "up"
LABELS = (CORRECTION, IMPORTED, TEACHER, UP)

Messages = list[dict[str, Any]]
Ask = Callable[[Messages], str | None]  # the answer of a teacher; None where it has none


@dataclass(frozen=True)
class Kept:
    """A request whose text was kept: what was asked, up to the answer, which the model gave."""

    id: str
    messages: Messages
    answer: str
    subject: str = ""
    conversation: str = ""
    at: int = 0  # ms since 1970
    scrubbed: bool = False  # something was taken out of the answer: it would teach to say "[email]"
    resumed: bool = False  # begun by one version and ended by another
    key: str = ""  # the hash of its API key; "" without keys

    @property
    def person(self) -> str:
        """Who is held out together; of a talk that nothing else is known of, who begins one like that."""
        users = (message for message in self.messages if message.get("role") == "user")
        return self.subject or self.conversation or asked([next(users, {})]) or self.id


@dataclass(frozen=True)
class Said:
    """What people said of an answer."""

    rating: str = ""  # up or down
    correction: str = ""


@dataclass(frozen=True)
class Labelled:
    """A chat to learn from."""

    messages: Messages
    label: str
    person: str
    id: str = ""  # of the request; "" where it is none of the capture
    at: int = 0
    key: str = ""  # as of `Kept`

    @property
    def question(self) -> str:
        return asked(self.messages[:-1])

    @property
    def answer(self) -> str:
        return str(self.messages[-1]["content"])


@dataclass
class Found:
    """What there was to learn from, and why the rest is none."""

    rows: list[Labelled] = field(default_factory=list)
    texts: int = 0  # requests whose text was kept
    ids: set[str] = field(default_factory=set)  # of these
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> how many

    def leave(self, reason: str, count: int = 1) -> None:
        if count:
            self.left_out[reason] = self.left_out.get(reason, 0) + count


def labelled(
    kept: Iterable[Kept], votes: Mapping[str, Said], imported: Mapping[str, str], ask: Ask | None = None
) -> Found:
    """The best label of each of the requests in `kept`, by what was voted and imported of their ids; `ask` is asked what has no
    better one."""
    found, liked = Found(), set[tuple[str, str]]()
    for one in kept:
        found.texts += 1
        found.ids.add(one.id)
        if one.resumed:
            found.leave("begun by one version and ended by another")
            continue
        vote = votes.get(one.id, Said())
        label, answer = CORRECTION, vote.correction
        if not answer.strip():
            label, answer = IMPORTED, imported.get(one.id, "")
        if not answer.strip() and ask is not None:
            label, answer = TEACHER, ask(one.messages) or ""
        if not answer.strip() and vote.rating == "up":
            label, answer = UP, one.answer
            if one.scrubbed:
                found.leave("liked, but something was taken out of the answer")
                continue
            key = (one.person, asked(one.messages))
            if key in liked:
                found.leave("liked before by the same person")
                continue
            liked.add(key)
        if not answer.strip():
            found.leave("disliked, and nobody said what is right" if vote.rating == "down" else "unrated")
            continue
        messages = [*one.messages, {"role": "assistant", "content": answer}]
        found.rows.append(Labelled(messages, label, one.person, one.id, one.at, one.key))
    return found


# --- of a capture -------------------------------------------------------------------------------------------------------


def kept_texts(capture: Capture) -> list[Kept]:
    """The requests of which texts are stored, but for the forgotten; oldest first. Raises DataError for what cannot be read."""
    rows = capture.rows(columns=["id", "conversation", "resumed"])
    of = {row["id"]: row for row in rows.to_pylist()}
    found = []
    for one in Texts(capture).all():
        choices, row = one["completion"].get("choices") or [{}], of.get(one["id"], {})
        found.append(
            Kept(
                one["id"], [_told(message) for message in one["messages"]],
                str((choices[0].get("message") or {}).get("content") or ""),
                one.get("subject") or "", row.get("conversation") or "", int(one["at"]),
                bool((one.get("scrubbed") or {}).get("answer")), bool(row.get("resumed")), one.get("owner") or "",
            )
        )  # fmt: skip
    return found


def _told(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose parts are one text, as the model read them: what compares questions knows texts alone."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(str(part.get("text") or "") for part in content)}


def said(capture: Capture) -> dict[str, Said]:
    """id of a request -> what people said of its answer; of several the newest, but no correction is lost to a mere thumb."""
    found: dict[str, Said] = {}
    for vote in Votes(capture).all():
        before = found.get(vote.id, Said())
        found[vote.id] = Said(vote.rating or before.rating, vote.correction or before.correction)
    return found


# --- from elsewhere -----------------------------------------------------------------------------------------------------


def read_imports(path: Path, left_out: Counter[str]) -> tuple[dict[str, str], list[Labelled]]:
    """Labels by the id of a request, and chats with answers that are of none; what is not used is counted in `left_out`, by
    reason. Raises DataError, naming the place, for a file of
    no known form."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text) if text.lstrip().startswith("[") else [json.loads(row) for row in text.splitlines() if row]
        )
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}", got=first_line(error), allowed="JSON or JSONL") from error
    by_id: dict[str, str] = {}
    chats: list[Labelled] = []
    for number, row in enumerate(rows, 1):
        try:
            name, messages, answer = _imported(row)
        except (DataError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DataError(
                f"{path}, row {number}", got=first_line(error),
                allowed="a Label Studio task, an Argilla record, or a chat with an answer",
            ) from error  # fmt: skip
        if name and answer:
            by_id[name] = answer
        elif answer and messages:
            whole = [*messages, {"role": "assistant", "content": answer}]
            chats.append(Labelled(whole, IMPORTED, f"{path.name}: {row.get('group') or asked(messages)}"))
        else:
            left_out["imported, but nothing is asked" if answer else "imported, but nobody submitted an answer"] += 1
    return by_id, chats


def _imported(row: Mapping[str, Any]) -> tuple[str, Messages, str]:
    """Id of the request ("" for none), what was asked, and the answer ("" where nobody submitted one)."""
    if "annotations" in row:  # Label Studio
        data = row["data"]
        results = [one for each in row["annotations"] if not each.get("was_cancelled") for one in each["result"]]
        texts = [text for one in results for text in one["value"].get("text", [])]
        return str(data.get("id") or ""), _messages(data), str(texts[-1]) if texts else ""
    if "responses" in row and "fields" in row:  # Argilla
        fields, responses = row["fields"], row["responses"]
        values = (
            responses.items() if isinstance(responses, dict) else ((one.get("question_name"), one) for one in responses)
        )
        texts = [
            each["value"]
            for _, given in values
            for each in (given if isinstance(given, list) else [given])
            if each.get("status", "submitted") == "submitted" and isinstance(each.get("value"), str)
        ]
        return (
            str((row.get("metadata") or {}).get("id") or fields.get("id") or ""),
            _messages(fields),
            texts[-1] if texts else "",
        )
    messages = forms.to_last_answer(forms.canonical(dict(row))).get("messages") or []
    if not messages:
        raise DataError("a chat without an answer")
    *before, answer = map(_told, messages)
    return str(row.get("id") or ""), before, str(answer["content"])


def _messages(fields: Mapping[str, Any]) -> Messages:
    given = fields.get("messages")
    if isinstance(given, list):
        return [_told(message) for message in forms.canonical({"messages": given})["messages"]]
    for name in ("prompt", "text", "instruction", "question"):
        if isinstance(fields.get(name), str) and fields[name].strip():
            return [{"role": "user", "content": fields[name]}]
    return []
