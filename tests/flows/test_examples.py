"""The scripts of examples/, each run as a user runs it, with a real engine on random weights behind a real socket."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal import Engine, Model, Request, Sampling
from tests.flows.conftest import KEY, Service, running

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Of a model whose context holds the text of tools."""
    with running(Model.from_preset("tiny", seed=3), max_queue=4, max_batch=4) as started:
        yield started


Run = Callable[[str, str], str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], service: Service) -> Run:
    """A function of an example's name and its argument: what it prints."""

    def run(name: str, word: str) -> str:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{service.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", word])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_all_of_them_are_run_here_and_named_in_their_readme() -> None:
    told = re.findall(r"^python examples/(\w+)\.py ", (ROOT / "examples/README.md").read_text(), re.MULTILINE)
    assert sorted(told) == EXAMPLES == ["depths", "offline", "streaming", "structured", "tools"]


def test_offline_writes_what_each_prompt_gets_alone(run: Run, service: Service, tmp_path: Path) -> None:
    service.model.save(tmp_path / "model")
    lines = run("offline", str(tmp_path / "model")).splitlines()
    engine = Engine(service.model)
    for line, prompt in zip(lines, ["def add(a, b):", "Where is my order?", "Once upon a time"], strict=True):
        (alone,) = engine.generate([Request(prompt, Sampling(max_tokens=24, temperature=0))])
        assert line == f"{prompt!r} -> {alone.text!r}  ({len(alone.tokens)} tokens, {alone.depth} layers)"


def test_streaming_counts_what_it_wrote(run: Run) -> None:
    *text, last = run("streaming", "Where is my order?").split("\n")[:-1]
    count = re.fullmatch(r"\((\d+) tokens\)", last)
    assert count and 1 <= int(count[1]) <= 64 and "".join(text)


def test_structured_gives_an_object_of_the_schema(run: Run) -> None:
    assert re.fullmatch(
        r"kind='(chair|table|lamp)' colour='(red|green|blue|unknown)' bought=(True|False)\n",
        run("structured", "I bought a red chair."),
    )


def test_tools_calls_with_an_order_that_there_is_and_answers(run: Run) -> None:
    call, answer = run("tools", "Where is order 7?").split("\n", 1)
    assert call in (
        "call   track_order(7) -> on its way, arrives on Friday",
        "call   track_order(8) -> delivered",
    )
    assert answer.startswith("answer ")


def test_depths_names_the_layers_that_each_ran(run: Run, service: Service) -> None:
    lines = run("depths", "def add(a, b):").splitlines()
    said = [re.match(r"(\w+) +\((.*?)\): ", line) for line in lines]
    names = service.model.config.exit_names
    assert [match[1] for match in said if match] == ["shallow", "middle", "full", "auto"]
    assert [match[2] for match in said if match] == [*names, "full"], json.dumps(lines)
