"""Three questions to a running service, through the official `openai` client as a stranger would ask them: one about text,
one for code, one about an image. The quickstart prints the answers and puts them into its report."""

from __future__ import annotations

import base64
import io
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from shoal.errors import ResourceError

SECONDS = 60.0  # for one answer
KINDS = {
    "text": "customer service",
    "code": "code",
    "image": "image question",
}  # what is shown -> task of the held-out rows
MOST_TOKENS = {"text": 48, "code": 96, "image": 8}


@dataclass(frozen=True)
class Sample:
    kind: str
    question: str
    image: str | None  # data: URL
    reference: str
    answer: str
    depth: str  # exit name
    tokens_per_s: float

    def as_row(self) -> dict[str, Any]:
        return asdict(self)


def ask(url: str, data: Path) -> list[Sample]:
    """Answers at `url` (which ends in /v1) to the first held-out row of each kind in `data`. Raises ResourceError when the
    service does not answer."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", timeout=SECONDS, max_retries=1)
    rows = _first_rows(data / "sft-heldout.jsonl")
    try:
        model = client.models.list().data[0].id
        return [_ask(client, model, kind, rows[task]["messages"]) for kind, task in KINDS.items() if task in rows]
    except openai.OpenAIError as error:
        raise ResourceError(f"the service at {url} did not answer", got=str(error)[:200]) from error


def show(sample: Sample, console: Console) -> None:
    """The sample as three lines."""
    seen = f"  ({_size(sample.image)} image)" if sample.image else ""
    for line in (
        f"  {sample.kind:5s} > {_short(sample.question)}{seen}",
        f"        < {_short(sample.answer)}",
        f"          depth {sample.depth}, {sample.tokens_per_s:.0f} tokens/s",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _ask(client: Any, model: str, kind: str, messages: list[dict[str, Any]]) -> Sample:
    *prompt, reference = messages
    start = time.perf_counter()
    answer = client.chat.completions.create(
        model=model, messages=prompt, temperature=0, max_tokens=MOST_TOKENS[kind], timeout=SECONDS
    )
    took = time.perf_counter() - start
    content = prompt[-1]["content"]
    parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return Sample(
        kind=kind,
        question=" ".join(part["text"] for part in parts if part["type"] == "text"),
        image=next((part["image_url"]["url"] for part in parts if part["type"] == "image_url"), None),
        reference=reference["content"],
        answer=answer.choices[0].message.content or "",
        depth=str(getattr(answer.usage, "depth", "")),
        tokens_per_s=answer.usage.completion_tokens / took,
    )


def _first_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The first row of each task in a held-out file."""
    found: dict[str, dict[str, Any]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            found.setdefault(row["task"], row)
    return found


def _short(text: str, most: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _size(url: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return f"{image.width}x{image.height}"
