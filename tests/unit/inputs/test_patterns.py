"""Patterns of a tokenizer that could take forever are refused; those that are in use are not."""

from __future__ import annotations

import gc
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from shoal.errors import CheckpointError, RequestError
from shoal.inputs.patterns import MOST_CONTROLS, need_bounded, why_unbounded
from shoal.inputs.tokenizer import Controls, Tokenizer

USED = {
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "DeepSeek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}  # fmt: skip
SLOW = {
    "repeats of repeats": (r"(a+)+$", "with repeats of what repeats"),
    "... in groups": (r"(?:x|(?:b|[^]]a*)){2,}c", "with repeats of what repeats"),
    "... so many times": (r"(?:\w{1,99}y)*z", "with repeats of what repeats"),
    "... behind a class": (r"[\]\[(](?>(?i:b*)c)+", "with repeats of what repeats"),
    "two ways for each": (r"(a|a)*c", "gives up|takes"),
    "a square": (r"(?:a|b|d|e)*[fg]", "gives up|takes"),
    "a cube": (r"[^q]*[^q]*(?!q)[q ]", "gives up|takes"),
}


def parts(pattern: str) -> str:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    values = json.loads(core.to_str())
    return json.dumps({key: values[key] for key in ("normalizer", "pre_tokenizer")})


@pytest.mark.parametrize("name", USED)
def test_patterns_in_use_are_taken(name: str) -> None:
    assert why_unbounded(parts(USED[name])) is None


@pytest.mark.parametrize("name", SLOW)
def test_a_pattern_that_takes_longer_than_its_text_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.inputs.patterns._SECONDS", 0.2)
    pattern, says = SLOW[name]
    reason = why_unbounded(parts(pattern))
    assert reason is not None and re.search(says, reason) and "\n" not in reason, reason


@pytest.mark.parametrize(("spikes", "taken"), [(1, True), (2, False)])
def test_what_a_thread_is_charged_with_once_refuses_no_pattern(
    spikes: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for as long as the process lives: the answer is kept. Of one text all tries must take longer."""
    now, asked = 0.0, 0

    def clock() -> float:
        nonlocal now, asked
        asked += 1
        if asked > 100 and asked % 2 == 0 and asked <= 100 + 2 * spikes:  # the ends of so many tries
            now += 1.5
        return now

    monkeypatch.setattr("shoal.inputs.patterns.time", SimpleNamespace(thread_time=clock))
    reason = why_unbounded.__wrapped__(parts(USED["Llama 3"]))
    assert (reason is None) == taken and (taken or "a pattern that takes 1.5 s for" in str(reason))


def test_python_collects_nothing_while_a_pattern_is_timed() -> None:
    """A process holds millions of objects, and a look at them all was the pattern's time: of 55 tests, of one worker, once."""
    looks, often = list[str](), gc.get_threshold()
    gc.collect()
    gc.set_threshold(700, 10, 10)  # a process's, where nobody changes it (tests/conftest.py does)
    gc.callbacks.append(lambda phase, _: looks.append(phase))
    try:
        assert why_unbounded.__wrapped__(parts(USED["o200k"])) is None
    finally:
        gc.set_threshold(*often)
        gc.callbacks.pop()
    assert not looks


def core_of(**changes: Any) -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    for key, value in changes.items():
        setattr(core, key, value)
    return core


def test_a_text_grows_no_more_than_a_little() -> None:
    ten = normalizers.Replace("a", "a" * 10)
    need_bounded(
        core_of(normalizer=normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])), "x"
    )
    need_bounded(core_of(normalizer=ten), "x")
    with pytest.raises(
        CheckpointError, match=r"tokenizer x: got 'a normalizer that makes a text 1e\+10 times as long'"
    ):
        need_bounded(core_of(normalizer=normalizers.Sequence([ten] * 10)), "x")


def test_control_tokens_are_no_more_than_a_text_is_searched_for() -> None:
    core = core_of()
    core.add_special_tokens([AddedToken(f"<{n}>", special=True) for n in range(MOST_CONTROLS)])
    need_bounded(core, "x")
    core.add_special_tokens([AddedToken("<one more>", special=True)])
    with pytest.raises(
        CheckpointError, match=f"got '{MOST_CONTROLS + 1} control tokens'; allowed: at most {MOST_CONTROLS}"
    ):
        need_bounded(core, "x")


def test_a_text_at_which_a_pattern_gives_up_is_a_line_of_one_request() -> None:
    """The library panics, which no `except Exception` catches."""
    core = core_of(pre_tokenizer=pre_tokenizers.Split(Regex(r"(x+x+)+y"), behavior="isolated"))
    core.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer = Tokenizer(core, Controls((1,)))
    assert tokenizer.encode("aa") == [0, 0]
    with pytest.raises(RequestError, match="text cannot be cut into tokens") as caught:
        tokenizer.encode("x" * 64)
    assert "\n" not in caught.value.message
