"""What an operator adds to a model's answers, whatever a client asks: a notice, urgency that a rule may only raise, and the
depth of a workload; and what a chat page says to the model. `shoal serve --policy FILE` reads it; `api/noticed.py` puts it to
answers.

    notice: {en: ..., zh: ...}      before every answer, in the language of who asks
    depth: full                     of requests that name none [auto]
    workloads: {tracking: shallow}  instead, where `metadata.workload` of a request says so
    urgency:                        what the words of who asks call for at least
      field: urgency                of answers that are JSON
      levels: [today, emergency]    the least first
      told: {emergency: {en: "Red flag: {words}. ...", zh: ...}}    before an answer with a flag of that level
      unless_after: {en: [no], zh: [没有]}    words that take back what stands right behind them
      flags: [{name: chest pain, level: emergency, words: [chest + pain, 胸痛]}]
    page: {path: medicine, system: ..., examples: [...]}    words of the page that the model was made for

Notable: a flag's words are beginnings of words, whatever their case, or parts of a sentence in a script without spaces; all
that `+` joins must stand in one sentence, in any order. A line that ends is no end of a sentence, nor is a point of "2.5 p.m."
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import field as made
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from shoal import config
from shoal.config import AUTO, ModelConfig
from shoal.errors import ConfigError, RequestError

LANGUAGES = ("en", "zh")
WORKLOAD = "workload"  # of `metadata`
LOOK_BACK = 40  # characters before a word that may take it back
_CJK = re.compile(r"[\u3400-\u9fff]")
# ends a sentence of text that is `plain`; points are looked at once, not from each of them on, and that of "3 p.m." is none
_SENTENCE = re.compile(r"[!?;。]+|(?<!\.)(?<!\b\w)\.+(?=\s|$)|\n\s*\n")
_END = "\0"  # of a sentence: part of no word, and no space
_SPACE = re.compile(r"[^\S\n]+")
_LINE = re.compile(r"\s*\n\s*")
_PATH = re.compile(r"[a-z0-9-]{0,64}")


@dataclass(frozen=True)
class Flag:
    name: str
    level: str
    words: tuple[str, ...]  # one is enough


@dataclass(frozen=True)
class Raised:
    """A flag that was found, and the words of the rule that found it."""

    flag: Flag
    words: str


@dataclass(frozen=True)
class Urgency:
    """Levels, the least first, and what raises an answer to one of them."""

    field: str
    levels: tuple[str, ...]
    flags: tuple[Flag, ...]
    told: dict[str, dict[str, str]]
    red_flags: str = "red_flags"  # field of the flags' names
    unless_after: dict[str, tuple[str, ...]] = made(default_factory=dict)

    def __post_init__(self) -> None:
        if len(set(self.levels)) < max(2, len(self.levels)):
            raise ConfigError("urgency.levels", got=self.levels, allowed="two or more, each once, the least first")
        if not self.flags:
            raise ConfigError("urgency.flags", got="none", do="give some, or leave urgency out")
        for flag in self.flags:
            where = f"urgency.flags: {flag.name}"
            if flag.level not in self.levels:
                raise ConfigError(f"{where}: level", got=flag.level, allowed=self.levels)
            if flag.level not in self.told:
                raise ConfigError(f"urgency.told.{flag.level}", got="nothing", do="say what stands before the answer")
            if not flag.words or not all(part.strip() for words in flag.words for part in words.split("+")):
                raise ConfigError(
                    f"{where}: words", got=flag.words, allowed="texts, + between what must stand together"
                )
        for level, texts in self.told.items():
            if level not in self.levels:
                raise ConfigError("urgency.told", got=level, allowed=self.levels)
            _check_texts(f"urgency.told.{level}", texts)

    def found(self, text: str) -> list[Raised]:
        """The flags in what somebody said, each once; in time proportional to the text, whatever stands in it."""
        said = _Sentences(text)
        found = [(flag, next((w for w in flag.words if self._stand(w, said)), "")) for flag in self.flags]
        return [Raised(flag, words.replace(" + ", " ")) for flag, words in found if words]

    def least(self, raised: Sequence[Raised]) -> str | None:
        """The highest level of those flags; None without any."""
        return max((one.flag.level for one in raised), key=self.levels.index, default=None)

    def higher(self, level: Any, least: str | None) -> Any:
        """`level`, or `least` where that is higher or `level` is none."""
        if least is None or (level in self.levels and self.levels.index(level) >= self.levels.index(least)):
            return level
        return least

    def _stand(self, words: str, said: _Sentences) -> bool:
        """Do all of them stand in one sentence, and nothing takes them back?"""
        some = [said.places(part, self._denied) for part in words.split("+") if said.may_have(part)]
        if len(some) <= words.count("+"):
            return False
        if len(some) == 1:
            return next(some[0], None) is not None
        return bool(set.intersection(*map(set, some)))

    @cached_property
    def _denied(self) -> re.Pattern[str]:
        """What ends in a word that takes back what is said next. At the end of a line it does so where other words lead up to
        it; else it is an answer, as in a form ("fever: no"), and what the next line says is another matter."""
        words = [plain(word) for some in self.unless_after.values() for word in some]
        spelt = [re.escape(w) if _CJK.search(w) else rf"(?<!\w){re.escape(w)}(?!\w)" for w in words]
        one = f"(?:{'|'.join(spelt)})" if spelt else "(?!)"
        return re.compile(rf"{one} ?\Z|(?:(?<=\w)|(?<=\w )){one}\n\Z")


@dataclass(frozen=True)
class ChatPage:
    """A chat page of this model: `path`, by which its address ends ("": the first page); `system`, what it says to the model
    before a conversation, as the model was taught ("": nothing); first messages as `examples` [the page's own]."""

    path: str
    system: str = ""
    examples: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _PATH.fullmatch(self.path):
            raise ConfigError(
                "page.path", got=self.path[:80], allowed="small letters, digits and -, as in customer-service"
            )
        if not all(one.strip() for one in self.examples):
            raise ConfigError("page.examples", got=self.examples, allowed="texts that are not empty")


@dataclass(frozen=True)
class Policy:
    notice: dict[str, str] = made(default_factory=dict)
    depth: str | int = AUTO
    workloads: dict[str, str | int] = made(default_factory=dict)
    urgency: Urgency | None = None
    page: ChatPage | None = None

    def __post_init__(self) -> None:
        if self.notice:
            _check_texts("notice", self.notice)
        if self.urgency is not None and not self.notice:
            raise ConfigError(
                "urgency", do="give a notice as well: raised urgency alone would look like an examination"
            )

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """The policy in a YAML or JSON file. Raises ConfigError naming the key."""
        try:
            return config.load(cls, config.read_file(path))
        except ConfigError as error:
            raise ConfigError(f"policy {path}: {error.message}") from None

    def check(self, model: ModelConfig) -> None:
        """Raises ConfigError for a depth that the model does not have."""
        for where, depth in {"depth": self.depth, **{f"workloads.{n}": d for n, d in self.workloads.items()}}.items():
            try:
                model.asked(depth)
            except RequestError as error:
                allowed = [AUTO, *model.exit_names, *model.exits]
                raise ConfigError(f"policy: {where}", got=depth, allowed=allowed) from error

    def depth_of(self, workload: str | None) -> str | int:
        """Of a request of that workload that names none."""
        return self.depth if workload is None else self.workloads.get(workload, self.depth)

    def without(self, text: str) -> str:
        """What an assistant said, without what a policy of these notices had put before it."""
        if any(text.startswith(notice) for notice in self.notice.values()):
            return text.partition("\n\n")[2]
        return text


def plain(text: str) -> str:
    """A text as flags are looked for in it: one form of each letter, small, one space between words, nothing unseen within."""
    seen = "".join(one for one in unicodedata.normalize("NFKC", text) if unicodedata.category(one) != "Cf")
    return _SPACE.sub(" ", seen.casefold().replace("\u2019", "'"))


def language_of(text: str) -> str:
    return "zh" if _CJK.search(text) else "en"


class _Sentences:
    """What somebody said, sentence by sentence."""

    def __init__(self, text: str) -> None:
        some = (_LINE.sub("\n", one.strip()) for one in _SENTENCE.split(plain(text).replace(_END, " ")))
        kept = [one for one in some if one]
        self._text = _END.join(kept)
        self._starts = [0]
        for one in kept:
            self._starts.append(self._starts[-1] + len(one) + 1)

    def may_have(self, part: str) -> bool:
        """Whether the longest word of `part` is in it: known in a hundredth of the time that an expression takes."""
        return _begins(part)[1] in self._text

    def places(self, part: str, denied: re.Pattern[str]) -> Iterator[int]:
        """The number of the sentence each time that `part` begins a word there, or is part of one in a script without spaces,
        and `denied` does not take it back."""
        for found in _begins(part)[0].finditer(self._text):
            at = found.start()
            number = bisect(self._starts, at) - 1
            if not denied.search(self._text[max(self._starts[number], at - LOOK_BACK) : at]):
                yield number


@lru_cache(4096)
def _begins(part: str) -> tuple[re.Pattern[str], str]:
    """An expression for where `part` begins, and the longest of its words."""
    wanted = plain(part.strip())
    bare = re.escape(wanted).replace(r"\ ", r"\s")  # between two words a line may end
    pattern = re.compile(bare if _CJK.search(wanted) else rf"(?<!\w){bare}", re.ASCII)
    return pattern, max(wanted.split(), key=len, default="")


def _check_texts(where: str, texts: dict[str, str]) -> None:
    for language, text in texts.items():
        if language not in LANGUAGES:
            raise ConfigError(where, got=language, allowed=LANGUAGES)
        if not text.strip() or "\n" in text:
            raise ConfigError(f"{where}.{language}", got=text[:60], allowed="a text in one line")
    if not texts:
        raise ConfigError(where, got="nothing", allowed=LANGUAGES)
