"""The model calls a function of yours, and answers with its result: python examples/tools.py QUESTION

`tool_choice="required"` makes the first answer a call, its arguments guided by their schema; without it the model decides.
"""

import json
import os
import sys
from typing import Any

import openai

ORDERS = {7: "on its way, arrives on Friday", 8: "delivered"}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "track_order",
        "description": "Where an order is.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "enum": list(ORDERS)}},
            "required": ["number"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": sys.argv[1]}]
    asked = client.chat.completions.create(
        model=model, messages=messages, tools=[TOOL], tool_choice="required", temperature=0, max_tokens=96
    ).choices[0].message  # fmt: skip
    messages.append(asked.model_dump(exclude_none=True))
    for call in asked.tool_calls or []:
        assert call.type == "function"
        number = json.loads(call.function.arguments)["number"]
        print(f"call   track_order({number}) -> {ORDERS[number]}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": ORDERS[number]})
    answer = client.chat.completions.create(model=model, messages=messages, tools=[TOOL], max_tokens=64)
    print(f"answer {answer.choices[0].message.content}")


if __name__ == "__main__":
    main()
