"""A recipe of a user's own data: `begun` makes its folder of rows or of documents, and `Own` is the recipe in such a folder.

FOLDER/recipe.yaml    its name, what it is in a sentence, tokens of an answer, length of a row; to be edited
       learn.jsonl    eight of ten groups, by a hash of the group: rows that ask the same are on one side
       dev.jsonl      one of ten: what the router is fitted to
       asked.jsonl    one of ten: the frozen suite
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.baselines import MAJORITY, NEAREST, RULE, language_of, majority, nearest, rows_to_compare
from recipes.recipe import DEV, SUITES, Answerer, Lesson, Messages, Recipe, Row, write_rows
from recipes.shape import shaped
from shoal import config
from shoal.api.policy import ChatPage, Policy
from shoal.data.chats import forms
from shoal.data.chats.rows import group_of, is_augmented, numbered, unusable
from shoal.errors import ConfigError, DataError, ShoalError, UsageError
from shoal.evaluate.intervals import Figure, of_share
from shoal.inputs import tools
from shoal.machine import sha256_of, write_aside

SETTINGS, LEARN, ASKED = "recipe.yaml", "learn.jsonl", "asked.jsonl"
LEAST_GROUPS = 60  # fewer leave nothing to measure on
LENGTHS = (256, 384, 640, 1024)  # tokens of a row
BYTES_A_TOKEN = 2  # at least, in most texts of the kind that the tokenizer is fitted to
DOCUMENTS = (".txt", ".md")
_ENDS = " .!?。"  # of NFKC, in which "！" is "!"
_WORD = re.compile(r"[\u3400-\u9fff]|\w+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


@dataclass(frozen=True)
class Settings:
    name: str
    told: str
    most_tokens: int
    row_tokens: int

    def __post_init__(self) -> None:
        """Raises ConfigError for what no model has."""
        if not self.name.strip() or "/" in self.name:
            raise ConfigError("name", got=self.name[:80], allowed="a name, without /")
        if self.row_tokens not in LENGTHS:
            raise ConfigError("row_tokens", got=self.row_tokens, allowed=LENGTHS)
        if not 1 <= self.most_tokens < self.row_tokens:
            raise ConfigError("most_tokens", got=self.most_tokens, allowed=f"1 to {self.row_tokens - 1}")


class Own(Recipe):
    lessons = (Lesson(LEARN, 1.0),)
    measures = ("exact", "overlap", "answered")
    served = "overlap"
    headline = ((Path(ASKED).stem, ("exact", "overlap")),)

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError for settings that are not whole, naming the key."""
        values = config.read_file(folder / SETTINGS)
        told = config.load(Settings, values, str(folder / SETTINGS))
        self._folder = folder
        self.name, self.told, self.most_tokens = told.name, told.told, told.most_tokens
        self.preset = shaped(told.name, told.row_tokens, max(1024, 2 * told.row_tokens), vocab=1536)

    def write(self, folder: Path, seed: int) -> None:
        (folder / SUITES).mkdir(parents=True, exist_ok=True)
        for name, to in ((LEARN, folder), (DEV, folder), (ASKED, folder / SUITES)):
            shutil.copyfile(self._folder / name, to / name)

    def source(self) -> str:
        """Of settings and rows, which may be edited: a run of others is another run."""
        parts = "".join(sha256_of(self._folder / name) for name in (SETTINGS, LEARN, DEV, ASKED))
        return hashlib.sha256(parts.encode()).hexdigest()[:16]

    def rivals(self, folder: Path) -> Mapping[str, Answerer]:
        rows = rows_to_compare(folder / LEARN)
        return {MAJORITY: majority(rows, language_of), RULE: keywords(rows), NEAREST: nearest(rows)}

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        """exact: the reference, letter by letter; overlap: F1 of words, or of characters of Chinese; answered: anything."""
        groups = [str(row["group"]) for row in rows]
        right, said = [_wanted(row) for row in rows], [answer.strip() for answer in answers]
        return {
            "exact": of_share(self.rights(rows, answers), groups),
            "overlap": of_share([overlap(mine, wanted) for mine, wanted in zip(said, right, strict=True)], groups),
            "answered": of_share([bool(mine) for mine in said], groups),
        }

    def rights(self, rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
        return [answer.strip() == _wanted(row) for row, answer in zip(rows, answers, strict=True)]

    def policy(self) -> Policy:
        """On the first chat page, what stands before most of what is learned from."""
        systems = Counter(
            str(row["messages"][0]["content"]) if row["messages"][0]["role"] == "system" else ""
            for row in rows_to_compare(self._folder / LEARN)
        )
        return Policy(page=ChatPage("", systems.most_common(1)[0][0]))

    def workload(self, row: Row) -> str:
        return str(row.get("task") or self.name)


def _wanted(row: Row) -> str:
    return str(row["messages"][-1]["content"]).strip()


def overlap(said: str, right: str) -> float:
    """F1 of the words that both have, as often as both have them."""
    mine, wanted = Counter(_WORD.findall(said.lower())), Counter(_WORD.findall(right.lower()))
    both = sum((mine & wanted).values())
    return 2 * both / max(1, sum(mine.values()) + sum(wanted.values()))


def keywords(rows: Sequence[Row]) -> Answerer:
    """Says what was said in training to the rarest word of what is asked now."""
    told: dict[str, Counter[str]] = {}
    for row in rows:
        for word in set(_WORD.findall(str(row["messages"][-2]["content"]).lower())):
            told.setdefault(word, Counter())[str(row["messages"][-1]["content"])] += 1
    usual = Counter(str(row["messages"][-1]["content"]) for row in rows).most_common(1)[0][0]

    def one(messages: Messages) -> str:
        known = [word for word in _WORD.findall(str(messages[-1]["content"]).lower()) if word in told]
        rarest = min(known, key=lambda word: sum(told[word].values()), default=None)
        return usual if rarest is None else told[rarest].most_common(1)[0][0]

    return lambda asked: [one(messages) for messages in asked]


def begun(source: Path, folder: Path) -> dict[str, Any]:
    """Make a recipe's folder of a JSONL of chats, or of a folder of documents, and return how many rows each part has, and
    ``left_out``: how many rows, files and paragraphs are not used, by reason. Raises UsageError for a folder that is there,
    DataError for what cannot be read, or is too little."""
    if folder.exists():
        raise UsageError("--out", got=str(folder), allowed="a folder that is not there yet")
    if not source.exists():
        raise UsageError("--from", got=str(source), allowed="a .jsonl of chats, or a folder of .txt and .md")
    parts: dict[str, list[Row]] = {LEARN: [], DEV: [], ASKED: []}
    left_out = Counter[str]()
    # group of the last row that is nobody's copy: `shoal augment` writes a copy behind its row
    before: int | None = None
    for row in _of_documents(source, left_out) if source.is_dir() else _of_rows(source):
        copied = is_augmented(row) and row.get("group") is None
        group = before if copied and before is not None else _group(row)
        before = before if is_augmented(row) else group
        part = _part(group)
        if part != LEARN and is_augmented(row):
            left_out["changed copy of a row that is not learned from"] += 1
            continue
        if _size(row) > (most := BYTES_A_TOKEN * LENGTHS[-1]):
            left_out[f"longer than {most} bytes"] += 1
            continue
        parts[part].append({**row, "group": str(row.get("group", group))})
    if apart := _apart(parts):
        left_out["asks what a row of another part asks"] += apart
    groups = {row["group"] for some in parts.values() for row in some}
    longest = max((_size(row) for some in parts.values() for row in some), default=0)
    if len(groups) < LEAST_GROUPS or not all(parts.values()):
        do = "give more: what is asked is measured on what is not learned from"
        raise DataError(f"{source}: questions that differ", got=len(groups), allowed=f"{LEAST_GROUPS} or more", do=do)
    answers = max(len(str(row["messages"][-1]["content"]).encode()) for some in parts.values() for row in some)
    row_tokens = next(length for length in LENGTHS if longest <= BYTES_A_TOKEN * length)
    name = re.sub(r"[^a-z0-9-]+", "-", folder.name.lower()).strip("-") or "own"
    told = Settings(name, f"made of {source.name}", min(256, max(16, answers // BYTES_A_TOKEN)), row_tokens)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        beside.chmod(0o755)  # others may read it, as what `mkdir` makes
        for part, rows in parts.items():
            write_rows(beside / part, rows)
        write_aside(beside / SETTINGS, "".join(f"{key}: {json.dumps(value)}\n" for key, value in asdict(told).items()))
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {**{Path(part).stem: len(rows) for part, rows in parts.items()}, "left_out": dict(left_out)}


def _size(row: Row) -> int:
    return len("".join(str(message["content"]) for message in row["messages"]).encode())


def _apart(parts: dict[str, list[Row]]) -> int:
    """Take what is learned from out of what is fitted to and asked, and what is fitted to out of what is asked: rows of
    different groups may ask the same. Returns how many went."""
    known, gone = set[int](), 0
    for part in (LEARN, DEV, ASKED):
        asked = [_asks(row) for row in parts[part]]
        kept = [row for row, question in zip(parts[part], asked, strict=True) if question not in known]
        gone += len(parts[part]) - len(kept)
        known |= set(asked)
        parts[part] = kept
    return gone


def _group(row: Row) -> int:
    """The group that a row names, or what it asks."""
    return _asks(row) if row.get("group") is None else group_of(row)


def _asks(row: Row) -> int:
    """A number for what a row asks, in whatever case, width and spaces, and whatever it ends with; of a document's for the
    whole paragraph, whatever its file is called."""
    messages: Messages = row["messages"]
    if row.get("task") == "documents":
        asked, answered = (str(message["content"]) for message in messages[-2:])
        begins = asked.removeprefix(f"{Path(str(row['group'])).stem}: ")
        messages = [{"role": "user", "content": f"{begins} {answered}"}]
    return group_of({"messages": [{**one, "content": _plain(str(one["content"]))} for one in messages]})


def _plain(text: str) -> str:
    """A text without what makes no other question of it: "ＷＨＥＮ" is "when", and a "?" at the end, or none, is neither."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(_ENDS)


def _part(group: int) -> str:
    """Of every ten groups eight are learned from, one is what the router is fitted to, and one is asked."""
    return {8: DEV, 9: ASKED}.get(group % 10, LEARN)


def _of_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Chats up to their last answer, with texts alone."""
    for number, line in numbered(path):
        try:
            row = json.loads(line)
            messages = forms.to_last_answer(forms.canonical(row)).get("messages") or []
            parts = [tools.parts(one["content"]) for one in messages]
            if any(part.get("type") != "text" for some in parts for part in some):
                raise DataError("a part that is no text")
            plain = [
                {**one, "content": "".join(p["text"] for p in some)} for one, some in zip(messages, parts, strict=True)
            ]
            kept = {key: row[key] for key in ("task", "group", "augmented") if row.get(key) is not None}
            json.dumps([plain, kept], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # half a surrogate
            raise unusable(path, number, "text that is no Unicode") from error
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError, ShoalError) as error:
            raise unusable(path, number, str(error) or type(error).__name__) from error
        if len(plain) < 2 or not plain[-1]["content"].strip():
            raise unusable(path, number, "no chat with an answer")
        yield {**kept, "messages": plain}


def _of_documents(folder: Path, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Of each paragraph what it begins with, and as the answer how it goes on; a document is a group. What is not used is
    counted in `left_out`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [path for path in files if path.suffix.lower() in DOCUMENTS]
    left_out.update(f"suffix {path.suffix or '(none)'} is not read" for path in files if path not in set(found))
    if not found:
        raise DataError(f"{folder} holds no documents", allowed=" and ".join(DOCUMENTS))
    for path in found:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {path}", got=str(error), do="give UTF-8, or take it away") from error
        for paragraph in re.split(r"\n\s*\n", text):
            sentences = [one for one in _SENTENCE.split(" ".join(paragraph.split())) if one]
            if len(sentences) == 1:
                left_out["paragraph of one sentence"] += 1
            elif sentences:
                turns = [("user", f"{path.stem}: {sentences[0]}"), ("assistant", " ".join(sentences[1:]))]
                messages = [{"role": role, "content": said} for role, said in turns]
                yield {"messages": messages, "task": "documents", "group": str(path.relative_to(folder))}
