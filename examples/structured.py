"""An answer that follows a JSON schema, as a pydantic object: python examples/structured.py TEXT"""

import os
import sys
from typing import Literal

import openai
from pydantic import BaseModel, ConfigDict


class Item(BaseModel):
    """Short enough for any model to write to its end: no free text."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["chair", "table", "lamp"]
    colour: Literal["red", "green", "blue", "unknown"]
    bought: bool


def main() -> None:
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    answer = client.chat.completions.parse(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": sys.argv[1]}],
        response_format=Item,
        max_tokens=96,
    )
    print(answer.choices[0].message.parsed)


if __name__ == "__main__":
    main()
