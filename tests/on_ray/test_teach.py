"""Rows answered by a served model over a Ray Dataset: a real server with a key, an interrupted run, and rows that train."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from shoal import Engine, Model, Request, Sampling
from shoal.api.answers import Choice
from shoal.clients.teacher import TEACHER, Ask
from shoal.data.chats.rows import read_chats
from shoal.errors import DataError, ResourceError
from shoal.inputs.chat import encode_chat
from shoal.on_ray.resources import local_ray
from shoal.on_ray.teach import KEY_VARIABLE, teach
from tests.flows.conftest import KEY, running

pytestmark = [pytest.mark.ray, pytest.mark.drill]


def test_a_teacher_answers_what_is_left_of_an_interrupted_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    model = Model.from_preset("test", seed=3)
    texts = [f"How deep is sea {number}?" for number in range(12)]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "old"}]} for text in texts
    ]
    rows.append({"messages": [{"role": "user", "content": "long " * 200}]})  # the teacher's context is shorter
    prompts = [encode_chat([{"role": "user", "content": text}], model.tokenizer, model.config) for text in texts]
    sampling = Sampling(temperature=0, max_tokens=8)
    own = Engine(model).generate([Request(prompt, sampling, depth="middle") for prompt in prompts])
    said = {text: answer.text for text, answer in zip(texts, own, strict=True) if answer.text.strip()}
    assert len(said) > 5
    source, out = tmp_path / "questions.jsonl", tmp_path / "taught.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n")
    with running(model, max_batch=4, max_queue=4) as service, local_ray():
        ask = Ask(f"{service.url}/v1", "fish", max_tokens=8, depth="middle")
        with pytest.raises(DataError, match="refused all questions"):  # and no answer that was cut off is a target
            teach(source, out, ask, concurrency=2)
        # a random model never ends an answer itself
        monkeypatch.setattr(Choice, "reason", property(lambda choice: "stop"))
        left_out = {"cut_off": 0, "empty": len(texts) - len(said), "repeated": 0}
        counts = teach(source, out, ask, concurrency=2)
        assert counts == {"answered": len(said), "kept": 0, "refused": 2, **left_out}
        lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
        with pytest.raises(DataError, match="exists"):
            teach(source, out, ask)
        out.unlink()
        torn = "".join(lines[:5]) + lines[5][:20]
        Path(f"{out}.partial").write_text(torn, encoding="utf-8")  # where it was interrupted
        assert teach(source, out, ask, concurrency=2) == {
            "answered": len(said) - 5,
            "kept": 5,
            "refused": 2,
            **left_out,
        }
        monkeypatch.setenv(KEY_VARIABLE, "another")  # of this process; those that ask were started with the first
        with pytest.raises(DataError, match=r"refused all questions, .*401"):
            teach(source, tmp_path / "none.jsonl", ask, concurrency=1)
    taught = {row["messages"][0]["content"]: row for row in map(json.loads, out.read_text("utf-8").splitlines())}
    assert {text: row["messages"][-1]["content"] for text, row in taught.items()} == said
    assert {(row[TEACHER]["depth_used"], row[TEACHER]["answered_by"]) for row in taught.values()} == {
        ("middle", "fish")
    }
    assert len(read_chats(out, model.tokenizer, model.config)) > 0


@pytest.mark.usefixtures("shared_ray")
def test_a_teacher_that_is_not_there_is_said_as_that(tmp_path: Path) -> None:
    """By the worker that asked it, in a line: Ray Data had an error of its own in its place."""
    source = tmp_path / "questions.jsonl"
    source.write_text(json.dumps({"messages": [{"role": "user", "content": "how deep?"}]}) + "\n", encoding="utf-8")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        with pytest.raises(ResourceError, match=f"no answer from {url}/chat/completions") as caught:
            teach(source, tmp_path / "taught.jsonl", Ask(url, "fish"), concurrency=1)
    assert type(caught.value) is ResourceError and "\n" not in str(caught.value)
