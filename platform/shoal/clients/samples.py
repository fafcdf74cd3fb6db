"""Questions to a running service, through the official `openai` client as a stranger would ask them: of held-out rows one about
text, one for code, one about an image, which the quickstart prints and puts into its report; or any texts."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from shoal.data.chats.rows import HELDOUT, group_of
from shoal.errors import ResourceError
from shoal.evaluate.halves import asked_groups

SECONDS = 60.0  # for one answer
# what is shown -> task of the held-out rows
KINDS = {"text": "customer service", "code": "code", "image": "image question"}
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
    rows = _first_rows(data / HELDOUT)
    with _client(url) as (client, model):
        return [
            _ask(client, model, kind, rows[task]["messages"], MOST_TOKENS[kind])
            for kind, task in KINDS.items()
            if task in rows
        ]


def questions(url: str, texts: Sequence[str], most_tokens: int) -> Iterator[Sample]:
    """Answers at `url` (which ends in /v1) to each of `texts`, the likeliest tokens, as they come. Raises as `ask`."""
    with _client(url) as (client, model):
        for text in texts:
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
            yield _ask(client, model, "chat", messages, most_tokens)


@contextmanager
def _client(url: str) -> Iterator[tuple[Any, str]]:
    """A client of the service at `url`, and the name of its first model. Raises ResourceError when it does not answer."""
    import openai

    try:
        with openai.OpenAI(base_url=url, api_key="none", timeout=SECONDS, max_retries=1) as client:
            yield client, client.models.list().data[0].id
    except openai.OpenAIError as error:
        raise ResourceError(f"the service at {url} did not answer", got=str(error)[:200]) from error


def show(sample: Sample, console: Console, most: int = 100) -> None:
    """The sample as three lines, its texts cut to `most` characters."""
    seen = f"  ({_size(sample.image)} image)" if sample.image else ""
    for line in (
        f"  {sample.kind:5s} > {_short(sample.question, most)}{seen}",
        f"        < {_short(sample.answer, most)}",
        f"          depth {sample.depth}, {sample.tokens_per_s:.0f} tokens/s",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _ask(client: Any, model: str, kind: str, messages: list[dict[str, Any]], most: int) -> Sample:
    """The answer to all but the last of `messages`, which is the reference."""
    *prompt, reference = messages
    start = time.perf_counter()
    answer = client.chat.completions.create(
        model=model, messages=prompt, temperature=0, max_tokens=most, timeout=SECONDS
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
    """The first row of each task in a held-out file, of those that the router was not fitted to."""
    found: dict[str, dict[str, Any]] = {}
    asked = asked_groups(path)
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if group_of(row) in asked:
                found.setdefault(row["task"], row)
    return found


def _short(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def _size(url: str) -> str:
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return f"{image.width}x{image.height}"
