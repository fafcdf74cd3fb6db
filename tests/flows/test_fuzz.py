"""schemathesis over the service's own OpenAPI document: whatever it sends, never a 5xx, and every answer as documented."""

from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.flows.conftest import Service

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
FEW, MANY = 12, 80  # examples of an operation, in every run and in a drill


@pytest.fixture(scope="module")
def document(service: Service) -> Any:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def test_what_the_document_allows_is_answered_as_it_says(document: Any, service: Service) -> None:
    ask_all(GenerationMode.POSITIVE, document, service, FEW)


@pytest.mark.drill
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_whatever_comes_is_answered_as_documented(mode: GenerationMode, document: Any, service: Service) -> None:
    """Bodies that the document allows, and bodies that it does not."""
    ask_all(mode, document, service, MANY)


def ask_all(mode: GenerationMode, document: Any, service: Service, examples: int) -> None:
    """Ask each operation so many times; of what may be asked one at least must be answered."""
    known = {**a_file_and_a_batch(service), **stored_answers(service)}
    for operation in [found.ok() for found in document.get_all_operations()]:
        wanted = 200 if mode is GenerationMode.POSITIVE else 400
        statuses = fuzz(operation, mode, service, known, examples)
        if operation.path.endswith("/{response_id}/cancel"):
            wanted = 400  # whichever is asked for: none runs in the background
        if mode is GenerationMode.POSITIVE or operation.body.items:  # else only a name can be wrong, which is a 404
            assert wanted in statuses or operation.method.upper() != "POST", (operation.label, statuses)
    service.until_idle()


def a_file_and_a_batch(service: Service) -> dict[str, str]:
    """By the names that requests have for them. The batch is cancelled, which may be asked again."""
    body = {"model": "fish", "prompt": "the sea", "max_tokens": 100, "ignore_eos": True}
    lines = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i in range(200)]
    with service.openai() as client:
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("in.jsonl", content), purpose="batch").id
        batch = client.batches.create(input_file_id=file, endpoint="/v1/completions", completion_window="24h").id
        client.batches.cancel(batch)
        file = client.files.create(file=("in.jsonl", b"{}"), purpose="batch").id  # what is made of it ends at once
    return {"file_id": file, "batch_id": batch, "input_file_id": file}


def stored_answers(service: Service) -> dict[str, str]:
    """An answer whose texts are stored, that can be voted on, and a response that can be gone on from, by the same."""
    with service.openai() as client:
        asked: Any = {"model": "fish", "messages": [{"role": "user", "content": "the sea"}], "max_tokens": 3}
        chat = client.chat.completions.create(**asked, store=True)
        response = client.responses.create(model="fish", input="the sea", max_output_tokens=3, store=True)
    return {"id": chat.id, "response_id": response.id}


def fuzz(operation: Any, mode: GenerationMode, service: Service, known: dict[str, str], examples: int) -> set[int]:
    """The statuses that were answered, each answer checked."""
    statuses = set[int]()

    # the same each time: what CI finds, the next run finds too
    @hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        can_be_served(case, known, mode)
        reply = case.call(headers=service.headers, timeout=30)
        case.validate_response(reply, checks=CHECKS)
        if reply.status_code >= 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
        statuses.add(reply.status_code)

    try:
        ask()
    except hypothesis.errors.Unsatisfiable:  # a route that takes nothing: no request to it is outside the document
        assert operation.body.items == [] or mode is GenerationMode.POSITIVE
    return statuses


def can_be_served(case: Any, known: dict[str, str], mode: GenerationMode) -> None:
    """Most random requests would end at a name that nothing has, or at a length that no context holds."""
    body = case.body
    if isinstance(body, dict):
        if isinstance(body.get("model"), str) and len(body["model"]) % 4:
            body["model"] = "fish"
        if isinstance(body.get("input_file_id"), str) and len(body["input_file_id"]) % 4:
            body["input_file_id"] = known["input_file_id"]
        if case.path.endswith("_lora_adapter") and mode is GenerationMode.POSITIVE and len(body["lora_name"]) % 4:
            body["lora_name"] = "one"
            if "lora_path" in body:
                body |= {"lora_path": "one", "load_inplace": True}
        if case.path.endswith("/feedback") and isinstance(body.get("id"), str) and len(body["id"]) % 4:
            body["id"] = known["id"]
        if isinstance(body.get("previous_response_id"), str) and len(body["previous_response_id"]) % 4:
            body["previous_response_id"] = known["response_id"]
        if case.path == "/tokenize" and mode is GenerationMode.POSITIVE and len(body) % 4:  # one of the two is wanted
            body |= {"prompt": body.get("prompt") or "the sea", "messages": None}
        if type(body.get("max_tokens")) is int:
            body["max_tokens"] %= 20
    for name in case.path_parameters or {}:
        asked = case.method in ("POST", "GET") and len(str(case.path_parameters[name])) % 4
        if name in known and (asked or case.method == "POST") and mode is GenerationMode.POSITIVE:
            case.path_parameters[name] = known[name]
