"""LangChain's own standard tests of a chat model, over the service at $SHOAL_TEST_URL: run by `test_langchain_standard`, in a
process of their own, since they bring plugins of pytest that nothing else here wants."""

from __future__ import annotations

import io
import os
from typing import Any

import httpx
import pytest
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from PIL import Image

# what a model of random weights does not do, by the test that asks for it
QUALITY = {
    "test_tool_calling": "calls a tool with the number that it was told",
    "test_tool_calling_async": "calls a tool with the number that it was told",
    "test_tool_calling_with_no_arguments": "calls a tool unasked",
    "test_bind_runnables_as_tools": "writes a word into a field",
    "test_json_mode": "names the fields that the prompt asks for",
    "test_agent_loop": "calls a tool unasked",
    "test_unicode_tool_call_integration": "calls a tool unasked",
}
NOT_OURS = {
    "test_serdes": "it is a snapshot of ChatOpenAI, which its own package keeps",
    "test_image_tool_message": "OpenAI's chats take no image in a message of role tool",
}


class Shoal:
    @property
    def chat_model_class(self) -> type[ChatOpenAI]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        key = os.environ["SHOAL_TEST_KEY"]
        return {"model": "fish", "base_url": f"{os.environ['SHOAL_TEST_URL']}/v1", "api_key": key}

    @pytest.fixture(autouse=True)
    def _listed(self, request: pytest.FixtureRequest) -> None:
        for reasons, why in ((QUALITY, "of random weights, no model "), (NOT_OURS, "")):
            if reason := reasons.get(request.node.originalname):
                request.applymarker(pytest.mark.xfail(reason=why + reason, strict=True))


class TestUnit(Shoal, ChatModelUnitTests):
    pass


class TestIntegration(Shoal, ChatModelIntegrationTests):
    @property
    def chat_model_params(self) -> dict[str, Any]:
        # a model of random weights does not end what it writes between quotes, unless quotes are what it likes
        bias = {int(os.environ["SHOAL_TEST_QUOTE"]): 12}
        return {
            **super().chat_model_params,
            "max_tokens": 200,
            "temperature": 0,
            "stream_usage": True,
            "logit_bias": bias,
        }

    @property
    def model_override_value(self) -> str:
        return "carp"

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @pytest.fixture(autouse=True)
    def _picture(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that lies on the internet."""
        file = io.BytesIO()
        Image.new("RGB", (32, 24), "navy").save(file, "PNG")
        answer = httpx.Response(200, content=file.getvalue(), request=httpx.Request("GET", "https://x"))
        monkeypatch.setattr(httpx, "get", lambda *_, **__: answer)
