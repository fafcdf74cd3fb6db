"""What keeps a control token that a user spells, or has a chat template put together, from being one.

A template may compute with a text: cut it, leave a part out (``<|im_/thinkend|>`` without ``/think``), write it in small
letters, put its own next to it. So while it runs, another character, of Yi, stands for each that control tokens have beside
letters, digits and white space, but in what the template looks for itself, such as ``</think>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shoal.errors import RequestError
from shoal.inputs.templates import literals
from shoal.inputs.tokenizer import Tokenizer, any_of, escaped

# Letters, which stay what they are where a template writes a value as Python or JSON does. In a chat they are Yi.
_LETTERS = range(0xA000, 0xA48D)


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value, however deep, in no order, names of fields too."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, Mapping):
            waiting += (*each, *each.values())
        elif isinstance(each, (list, tuple)):
            waiting += each


class StandIns:
    """Characters for those of control tokens, of which none is in a `template` or in the `values` that it is given."""

    def __init__(self, tokenizer: Tokenizer, template: str, values: Iterable[Any]) -> None:
        names = (*tokenizer.specials, *tokenizer.frames)
        odd = {char for name in names for char in name if not (char.isalnum() or char.isspace() or char == "_")}
        wanted = sorted(odd | {name[0] for name in names})
        whole = "\n".join([template, *texts_in(list(values))])
        held = set(whole)
        free = (char for char in map(chr, _LETTERS) if char not in held and escaped(char) not in whole)
        found = dict(zip(wanted, free, strict=False))
        if len(found) < len(wanted):
            raise RequestError("messages", param="messages", got="every letter of Yi", do="leave some out")
        self._found = found
        self._odd = str.maketrans({char: found[char] for char in odd})
        self._chars = f"[{re.escape(''.join(sorted(odd)))}]" if odd else "(?!)"
        looked_for = [text for text in literals(template) if odd & {*text} and any(map(str.isalnum, text))]
        self._said = self._pattern(tokenizer.control_pattern, (*looked_for, *tokenizer.frames))
        self._given = self._pattern(tokenizer.frame_pattern, looked_for)
        self.back = {there: char for char, there in found.items()}

    def _pattern(self, spelt: str, kept: Iterable[str]) -> re.Pattern[str]:
        free = any_of(text for text in kept if not re.search(spelt, text))
        return re.compile(f"(?P<spelt>{spelt})|(?P<kept>{free})|{self._chars}")

    def put(self, value: Any, said: bool = False) -> Any:
        """`value` with stand-ins in all its texts, names of fields too. What the assistant `said` is in tokens of its own, and
        may be a call that was never read as one: there what frames calls and thoughts stays."""
        if isinstance(value, str):
            return (self._said if said else self._given).sub(self._one, value)
        if isinstance(value, Mapping):
            return {self.put(name): self.put(each) for name, each in value.items()}
        return [self.put(each) for each in value] if isinstance(value, (list, tuple)) else value

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Likewise of a message."""
        rest: dict[str, Any] = self.put({**message, "content": None})
        return {**rest, "content": self.put(message["content"], said=message["role"] == "assistant")}

    def _one(self, match: re.Match[str]) -> str:
        text = match.group()
        if match.lastgroup == "kept":
            return text
        return self._found[text[0]] + text[1:].translate(self._odd)
