"""Text as a page shows it: an answer as Markdown that loads nothing and obeys nothing, a request as a command for a shell."""

from __future__ import annotations

import html
import json
import re
from typing import Any

# what the first line of an answer in Python begins with
CODE = ("def ", "class ", "import ", "from ", "async def ", "@")
DRAWN = ("mermaid",)  # kinds of fences that Gradio makes a drawing of, which may load what it names

_FENCE = re.compile(r"^ {0,3}(`{3,})[ \t]*([\w+#.-]{0,20})[ \t]*$", re.MULTILINE)
_SPELT = re.compile(r"!\[|`{3,}|~{3,}")  # what begins a picture or a fence


def markdown(text: str) -> str:
    """`text` as the page's Markdown: Python gets a fence, and HTML is shown instead of obeyed, in and around fences. A model's
    words may be hostile: no picture is loaded, and only fences that are made here are fences."""
    if text.lstrip().startswith(CODE) and not _FENCE.search(text):
        return _fenced("python", text.strip())
    shown: list[str] = []
    prose: list[str] = []
    lines = iter(text.split("\n"))
    for line in lines:
        opening = _FENCE.fullmatch(line)
        if not opening:
            prose.append(line)
            continue
        shown += [_prose(prose)] if prose else []
        prose, code = [], []
        for inside in lines:  # to its end, or to that of an answer that is still coming
            if inside.strip() == opening[1]:
                break
            code.append(inside)
        shown.append(_fenced(opening[2].lower(), "\n".join(code)))
    return "\n".join([*shown, *([_prose(prose)] if prose else [])])


def _fenced(kind: str, code: str) -> str:
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{'' if kind in DRAWN else kind}\n{code}\n{fence}"


def _prose(lines: list[str]) -> str:
    """Markdown without HTML, pictures and fences."""
    text = html.escape("\n".join(lines), quote=False)
    return _SPELT.sub(lambda found: found[0].replace("[", "\\[").replace("`", "\\`").replace("~", "\\~"), text)


def curl(url: str, body: dict[str, Any], *, key: bool) -> str:
    """The shell command that sends `body` to `url`, which ends in /v1; with `key`, an API key from the environment.

    Pictures would fill the page, so the command reads them from files of this name: picture-1.png, picture-2.jpeg...
    """
    text, pictures = json.dumps(body, ensure_ascii=False, indent=2), []
    for message in body["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                pictures.append(part["image_url"]["url"])
    if pictures:
        text = text.replace("\\", "\\\\").replace("$", "\\$").replace("`", "\\`")  # the shell reads what follows
    for number, picture in enumerate(pictures, 1):
        kind, _, _ = picture.partition(",")
        name = f"picture-{number}.{kind.removeprefix('data:image/').removesuffix(';base64')}"
        text = text.replace(picture, f"{kind},$(base64 -w0 {name})", 1)
    lines = [f"curl --no-buffer {url}/chat/completions", "-H 'Content-Type: application/json'"]
    lines += ['-H "Authorization: Bearer $SHOAL_API_KEY"'] if key else []
    end = "JSON" if pictures else "'JSON'"
    return " \\\n  ".join([*lines, f"--data-binary @- <<{end}"]) + f"\n{text}\nJSON"
