"""One prompt at every depth, and what the router would choose: python examples/depths.py PROMPT"""

import os
import sys

import openai


def main() -> None:
    client = openai.OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    )
    model = client.models.list().data[0].id
    for depth in ("shallow", "middle", "full", "auto"):
        answer = client.completions.create(
            model=model, prompt=sys.argv[1], max_tokens=32, temperature=0, extra_body={"depth": depth}
        )
        used = answer.usage.model_extra["depth"] if answer.usage and answer.usage.model_extra else "?"
        print(f"{depth:8} ({used}): {answer.choices[0].text!r}")


if __name__ == "__main__":
    main()
