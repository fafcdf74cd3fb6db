"""How long an answer to the gate's questions may be: as long as its suite says, and where that is too short, it says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from shoal.cli import main
from shoal.data.chats.heldout import Question
from shoal.evaluate.measures import Answer
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.loop.gate import _asked, _Seen
from shoal.loop.suites import MANIFEST, Suite, freeze, read
from shoal.model.model import Model

RIGHT = ["x" * 80, "y" * 80, "z" * 80, "short"]  # a byte a token, of which 64 are allowed where nobody says


def write(folder: Path, right: Sequence[str] = RIGHT) -> Path:
    folder.mkdir()
    chats = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": said}] for n, said in enumerate(right)
    ]
    (folder / "shop.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return folder


def asked(
    suite: Suite, folder: Path, monkeypatch: pytest.MonkeyPatch, template: str = DEFAULT_TEMPLATE
) -> tuple[list[int], str]:
    """How many tokens an answer may have, of both models, and what the check says."""
    most: list[int] = []

    def silent(model: Model, some: Sequence[Question], tokens: int, *_: Any) -> tuple[list[Answer], list[str]]:
        most.append(tokens)
        return [Answer("", 0, 1, 1) for _ in some], []

    monkeypatch.setattr("shoal.loop.gate._answers", silent)
    model = Model.from_preset("test")
    model.chat_template = template
    (check,) = _asked(suite, folder, model, model, 0.03, _Seen(False), None)
    return most, check.told


def test_an_answer_may_have_as_many_tokens_as_its_suite_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut is never right, of neither model, so that no candidate would be worse."""
    (suite,) = freeze(write(tmp_path / "a"), 96)
    assert read(tmp_path / "a") == [suite] and suite.most_tokens == 96
    most, told = asked(suite, tmp_path / "a", monkeypatch)
    assert most == [96, 96] and "references" not in told


def test_where_nobody_says_and_references_are_longer_the_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (suite,) = freeze(write(tmp_path / "a"))
    assert "most_tokens" not in (tmp_path / "a" / MANIFEST).read_text() and read(tmp_path / "a") == [suite]
    most, told = asked(suite, tmp_path / "a", monkeypatch)
    assert most == [64, 64] and told.endswith(
        "; 3 references have more than the 64 tokens of an answer (--freeze --most-tokens)"
    )


@pytest.mark.parametrize("behind", ["", "\n"])
def test_what_a_template_writes_behind_an_answer_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: str
) -> None:
    """As ChatML's line's end: a reference of just as many tokens as an answer may have was said to be longer."""
    (suite,) = freeze(write(tmp_path / "a", ["x" * 63, "y" * 64, "z" * 65]))
    template = DEFAULT_TEMPLATE.replace("<|end|>\n", f"<|end|>{{{{ {behind!r} }}}}\n")
    assert template != DEFAULT_TEMPLATE
    _, told = asked(suite, tmp_path / "a", monkeypatch, template)
    assert "; 1 references have more than the 64 tokens" in told


def test_the_command_freezes_with_it_and_only_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "a")
    assert main(["gate", "--suites", str(folder), "--model", "a", "--against", "b", "--most-tokens", "96"]) == 2
    assert "--most-tokens" in capsys.readouterr().err
    assert main(["gate", "--suites", str(folder), "--freeze", "--most-tokens", "96"]) == 0
    assert [suite.most_tokens for suite in read(folder)] == [96]
