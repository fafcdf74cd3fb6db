"""A model directory as the HTTP side reads it: no weights needed, and refused with the file at fault."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal import config, presets
from shoal.api.bodies import ChatRequest, CompletionRequest
from shoal.api.json_text import value_of
from shoal.api.limits import Limits
from shoal.api.messages.bodies import MessagesRequest
from shoal.api.messages.calls import messages_call
from shoal.api.requests import chat_call, completion_call
from shoal.api.responses.bodies import ResponsesRequest
from shoal.api.responses.calls import responses_call
from shoal.api.responses.events import ResponseAnswer
from shoal.api.served import ServedModel
from shoal.engine.events import Sampling
from shoal.errors import CheckpointError, ConfigError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import described


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    card = {"format": "shoal-model", "version": 1, "name": "fish", "model": config.dump(presets.get("test").model)}
    (tmp_path / "config.json").write_text(json.dumps(card))
    Tokenizer.bytes_only().save(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path


def test_a_directory_without_weights_is_enough(directory: Path) -> None:
    served = ServedModel.load(directory)
    assert (served.name, served.config, served.chat_template) == ("fish", presets.get("test").model, "{{ messages }}")
    assert len(served.tokenizer) == 265
    assert ServedModel.load(directory, "shark").name == "shark"
    assert [served.depth_name(layers) for layers in (1, 2, 4, 0)] == ["shallow", "middle", "full", "none"]


def test_a_name_may_be_several(directory: Path) -> None:
    served = ServedModel.load(directory, "shark, big,sea/shark")
    assert (served.name, served.aliases) == ("shark", ("big", "sea/shark"))
    for empty in ("", "shark,", " , "):
        with pytest.raises(ConfigError, match="name"):
            ServedModel.load(directory, empty)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_missing_file_is_named(directory: Path, missing: str) -> None:
    (directory / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        ServedModel.load(directory)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version 1"),
        ({"model": {"vocab": 300, "layrs": 4}}, "did you mean 'layers'"),
        ({"model": {**config.dump(presets.get("test").model), "vocab": 200}}, "tokens'; allowed: at most 200"),
        ({"name": 3}, "lacks a name"),
        (
            {"model": {**config.dump(presets.get("test").model), "quantization": "w8a8"}, "int8_scheme": 2},
            "int8_scheme",
        ),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(directory: Path, change: dict[str, object], says: str) -> None:
    card = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(CheckpointError, match=says) as told:
        ServedModel.load(directory)
    with pytest.raises(CheckpointError) as whole:  # who loads the weights reads it by the same reader
        described.read(directory)
    assert whole.value.message == told.value.message


@pytest.mark.drill
def test_the_gateway_needs_no_torch(directory: Path) -> None:
    code = f"""
import sys
from shoal.api.app import build_app
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
build_app([Hosted(ServedModel.load({str(directory)!r}), None)])
assert not {{"torch", "ray", "gradio"}} & set(sys.modules)
import shoal.on_ray.serve
assert "torch" not in sys.modules, "on Ray Serve, where engines are processes of their own"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


DRAWN: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}
CHAT = {"model": "fish", "messages": [{"role": "user", "content": "x"}], "max_tokens": 8}


def drawn(sampling: Sampling) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in DRAWN}


def test_a_silent_request_is_drawn_as_the_source_says_by_every_protocol(served: ServedModel) -> None:
    """And what a request says, its defaults and nulls included, holds as OpenAI's clients mean it."""
    ours = dataclasses.replace(served, sampling=DRAWN)
    responses = ResponsesRequest.model_validate({"model": "fish", "input": "x"})
    calls = [
        chat_call(ChatRequest.model_validate(CHAT), ours, Limits()),
        chat_call(ChatRequest.model_validate({**CHAT, "temperature": None, "top_k": None}), ours, Limits()),
        completion_call(CompletionRequest.model_validate({"model": "fish", "prompt": "x"}), ours, Limits()),
        messages_call(MessagesRequest.model_validate(CHAT), ours, Limits()),
        responses_call(responses, ours, Limits()),
    ]
    for call in calls:
        assert drawn(call.requests[0].sampling) == DRAWN
    told = value_of(ResponseAnswer(calls[-1], ours, responses)._asked)
    assert (told["temperature"], told["top_p"]) == (0.6, 0.95), "what an answer repeats is what it was drawn with"
    said: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
    given = [
        chat_call(ChatRequest.model_validate({**CHAT, **said}), ours, Limits()),
        messages_call(MessagesRequest.model_validate({**CHAT, **said}), ours, Limits()),
        responses_call(ResponsesRequest.model_validate({"model": "fish", "input": "x", **said}), ours, Limits()),
    ]
    for call in given:
        assert drawn(call.requests[0].sampling) == {**DRAWN, **said}
    for top_k in (0, -1):
        call = chat_call(ChatRequest.model_validate({**CHAT, "top_k": top_k}), ours, Limits())
        assert call.requests[0].sampling.top_k == 0
    silent = chat_call(ChatRequest.model_validate(CHAT), served, Limits())
    assert drawn(silent.requests[0].sampling) == drawn(Sampling()), "a model of our own has no say"


def test_what_a_source_says_of_drawing_is_read_and_checked(directory: Path) -> None:
    def source(**generation: Any) -> None:
        (directory / described.SOURCE).write_text(json.dumps({"generation_config": generation}))

    source(**DRAWN, do_sample=True, eos_token_id=[1, 2], typical_p=None)
    assert ServedModel.load(directory).sampling == DRAWN
    source(do_sample=False, temperature=0.6)
    assert ServedModel.load(directory).sampling == {"temperature": 0}, "not to be sampled, whatever stands beside it"
    source(temperature=None, top_k=-1)
    assert ServedModel.load(directory).sampling == {"top_k": -1}
    for wrong, says in (
        ({"temperature": -1}, r"source\.json: generation_config\.temperature: got -1"),
        ({"top_p": "0.9"}, r"source\.json: generation_config\.top_p: got '0\.9'"),
        ({"top_k": 2.5}, r"generation_config\.top_k"),
        ({"repetition_penalty": True}, r"generation_config\.repetition_penalty"),
    ):
        source(**wrong)
        with pytest.raises(CheckpointError, match=says) as told:
            ServedModel.load(directory)
        assert "\n" not in told.value.message
