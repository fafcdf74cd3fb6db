"""The scripts of examples/, and the commands and code of the API's pages, each run as a user runs it, with a real engine on
random weights behind a real socket."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from docs.make_site import curl
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


def test_each_command_of_the_http_reference_is_answered(service: Service) -> None:
    """All routes of the document, with an id of each kind where a path or a body wants one; what is deleted comes last."""
    with httpx.Client(base_url=service.url, headers=service.headers, timeout=60) as http, service.openai() as client:
        document = http.get("/openapi.json").json()
        asked: Any = {"model": "fish", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "store": True}
        line = (
            b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "fish", "input": "sea"}}'
        )
        chat = client.chat.completions.create(**asked).id
        file = client.files.create(file=("in.jsonl", line), purpose="batch").id
        batch = client.batches.create(input_file_id=file, endpoint="/v1/embeddings", completion_window="24h").id
        response = client.responses.create(model="fish", input="a", max_output_tokens=3, store=True).id
        known = {"/RESPONSE_ID": f"/{response}", "/FILE_ID": f"/{file}", "/BATCH_ID": f"/{batch}", "/ID": f"/{chat}",
                 "/NAME": "/fish", "runs/support/adapter": "one"}  # fmt: skip
        known |= {"chatcmpl-0123456789abcdef0123456789abcdef": chat}
        routes = [(path, method) for path, operations in document["paths"].items() for method in operations]
        for path, method in sorted(routes, key=lambda route: route[1] == "delete"):
            command = curl(document, path, method)
            for name, value in known.items():
                command = command.replace(name, value)
            command = re.sub(r'"input_file_id": "[^"]*"', f'"input_file_id": "{file}"', command)
            status = run_curl(http, command, line)
            assert status == 200 or (status == 400 and path.endswith("/cancel")), (command, status)


def run_curl(http: httpx.Client, command: str, file: bytes) -> int:
    """The status of what curl would ask."""
    first, *words = shlex.split(command)
    assert first == "curl"
    method, body, form, address = None, None, dict[str, str](), ""
    while words:
        word = words.pop(0)
        if word == "-X":
            method = words.pop(0)
        elif word == "-d":
            body = words.pop(0)
        elif word == "-F":
            name, _, value = words.pop(0).partition("=")
            form[name] = value
        elif word == "-H":
            assert words.pop(0) == "Content-Type: application/json"
        else:
            assert word.startswith("http://127.0.0.1:8000/") and not address
            address = word.removeprefix("http://127.0.0.1:8000")
    if form:
        assert form.pop("file") == "@in.jsonl"
        return http.post(address, data=form, files={"file": ("in.jsonl", file)}).status_code
    if body is not None:
        return http.post(address, content=body, headers={"Content-Type": "application/json"}).status_code
    return http.request(method or "GET", address).status_code


PAGE = (ROOT / "docs/api.md").read_text("utf-8")
BLOCKS = [part.partition("```")[0] for part in PAGE.split("```python\n")[1:]]


@pytest.mark.drill
def test_the_code_of_the_page_about_the_api_runs_from_its_top_to_its_end(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one would paste it: with the address and the name of a service that is there."""
    pytest.importorskip("anthropic", reason="of the extra `clients`")
    names: dict[str, Any] = {}
    for block in BLOCKS:
        code = block.replace("http://127.0.0.1:8000", service.url).replace('"tiny"', '"fish"')
        exec(code.replace('api_key="none"', f'api_key="{KEY}"'), names)
    said = capsys.readouterr().out
    assert len(BLOCKS) == 4 and "And how wide?" in said and "completed BatchRequestCounts" in said
