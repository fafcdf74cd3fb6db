"""Makes a site of these pages, in the folder `site`: ``python docs/make_site.py [--serve]`` (`make docs`, `make docs-serve`).

The pages are written for a reader of the repository. So they are copied to ``build/pages`` first, and changed there as a site
needs it: links that lead out of docs/ get a page to lead to, folders an index, and the HTTP reference its content. `mkdocs.yml`
says the rest, to MkDocs (or to Zensical: nothing here is of one of them).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS, PAGES = ROOT / "docs", ROOT / "build" / "pages"
PORT = 8008
OUTSIDE = {  # pages that lie elsewhere, and where they stand in the site
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
}
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
MARK = re.compile(r"<!-- openapi: .* -->\n")
LOADED = re.compile(r'<(?:script|link|img|iframe|source|video)\b[^>]*?\b(?:src|href)="?((?:https?:)?//[^"\s>]+)')


def stage(pages: Path = PAGES) -> None:
    """Writes the pages of the site into `pages`, anew. Raises FileNotFoundError for a link to what the site does not have."""
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("*.py", "*.md", "__pycache__"))
    sources = {path: pages / placed(path.relative_to(ROOT)) for path in sorted(DOCS.rglob("*.md"))}
    sources |= {ROOT / name: pages / where for name, where in OUTSIDE.items() if where != "index.md"}
    for source, target in sources.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(linked(source, target, pages), encoding="utf-8")
    (pages / "decisions" / "index.md").write_text(decisions(), encoding="utf-8")
    reference = pages / "reference" / "http.md"
    reference.write_text(
        MARK.sub(lambda _: http_reference(document()), reference.read_text(encoding="utf-8")), encoding="utf-8"
    )


def placed(path: Path) -> Path:
    """Where a file of the repository (relative to its root) stands in the site."""
    if str(path) in OUTSIDE:
        return Path(OUTSIDE[str(path)])
    if path.parts[0] != "docs":
        raise FileNotFoundError(f"{path} is no page of the site: name it in backquotes, or put it into OUTSIDE")
    inside = path.relative_to("docs")
    if (ROOT / path).is_dir():
        return inside / "index.md"
    return inside.with_name("index.md") if inside.name == "README.md" else inside


def linked(source: Path, target: Path, pages: Path) -> str:
    """The text of the page `source`, its links as they are from `target`."""

    def moved(match: re.Match[str]) -> str:
        before, to, anchor, after = match.groups()
        if "://" in to or to.startswith("mailto:"):
            return match[0]
        path = (source.parent / to).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{source.relative_to(ROOT)}: link to {to}")
        there = pages / placed(path.relative_to(ROOT))
        return before + os.path.relpath(there, target.parent) + (anchor or "") + after

    lines, fenced = [], False
    for line in source.read_text(encoding="utf-8").splitlines():
        fenced ^= line.lstrip().startswith("```")
        lines.append(line if fenced else LINK.sub(moved, line))
    return "\n".join(lines) + "\n"


def decisions() -> str:
    """The index of the decisions, newest first."""
    rows = []
    for path in sorted((DOCS / "decisions").glob("*.md"), reverse=True):
        number, _, title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ").partition(": ")
        rows.append(f"| {number} | [{title}]({path.name}) |")
    head = "# Decisions\n\nChoices that a reader would question: what was decided, why, and what it costs.\n\n"
    return head + "| | |\n|---|---|\n" + "\n".join(rows) + "\n"


# --- the HTTP reference ---------------------------------------------------------------------------------------------


@cache
def document() -> dict[str, Any]:
    """The OpenAPI document of a service, as it answers at /openapi.json."""
    from shoal import Model
    from shoal.api.app import build_app
    from shoal.api.auth import ApiKeys
    from shoal.api.served import ServedModel
    from shoal.api.service import Hosted

    model = Model.from_preset("test")
    served = ServedModel("NAME", model.config, model.tokenizer, model.chat_template)
    nobody: Any = None  # answers: an engine would compile for half a minute what the document does not ask
    app = build_app([Hosted(served, nobody)], api_keys=ApiKeys(["any"]), runs=ROOT)
    return app.openapi()


def http_reference(spec: dict[str, Any]) -> str:
    """Markdown of an OpenAPI document: its paths, then the shapes that they name."""
    return "\n".join([*_paths(spec), "## Shapes", "", *_shapes(spec)]) + "\n"


def _paths(spec: dict[str, Any]) -> Iterator[str]:
    yield from ("## Paths", "")
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            yield from (f"### `{method.upper()} {path}`", "")
            said = operation.get("description") or operation.get("summary", "")
            key = "Needs a key, where the service has keys." if operation.get("security") else "Needs no key."
            yield from (f"{said.strip()}\n\n{key}".strip(), "")
            if parameters := operation.get("parameters"):
                yield from ("| parameter | in | type | |", "|---|---|---|---|")
                yield from (
                    _row(f"`{p['name']}`", p["in"], _type(p.get("schema", {})), p.get("description", ""))
                    for p in parameters
                )
                yield ""
            if body := operation.get("requestBody"):
                for kind, content in body["content"].items():
                    yield from (f"Body, `{kind}`: {_type(content['schema'])}", "")
            yield from ("```sh", curl(spec, path, method), "```", "")
            yield from ("| status | answer | |", "|---|---|---|")
            for status, answer in operation["responses"].items():
                kinds = [f"`{kind}`: {_type(c.get('schema', {}))}" for kind, c in answer.get("content", {}).items()]
                yield _row(status, "; ".join(kinds), answer.get("description", ""))
            yield ""


def curl(spec: dict[str, Any], path: str, method: str) -> str:
    """A command that asks `path` with the example of its body; what a path's braces name is in capitals."""
    address = "http://127.0.0.1:8000" + re.sub(r"\{(\w+)(:path)?\}", lambda name: name[1].upper(), path)
    words = ["curl", *([] if method in ("get", "post") else ["-X", method.upper()]), address]
    body = spec["paths"][path][method].get("requestBody")
    if body is None:
        return " ".join([*words, *(["-X", "POST"] if method == "post" else [])])
    ((kind, content),) = body["content"].items()
    schema = content["schema"]
    if "$ref" in schema:
        schema = spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    example = schema["examples"][0]
    if kind == "multipart/form-data":
        fields = {**example, "file": "@in.jsonl"}
        return " ".join([*words, *(f"-F {name}={value}" for name, value in fields.items())])
    return " ".join([*words, f"-H 'Content-Type: {kind}'", "-d", shlex.quote(json.dumps(example))])


def _shapes(spec: dict[str, Any]) -> Iterator[str]:
    for name, schema in sorted(spec["components"]["schemas"].items()):
        yield from (f"### {name}", "")
        if said := schema.get("description"):
            yield from (said.strip(), "")
        if "properties" not in schema:
            yield from (_type(schema), "")
            continue
        needed = schema.get("required", ())
        yield from ("| field | type | default | |", "|---|---|---|---|")
        for field, of in schema["properties"].items():
            default = "needed" if field in needed else f"`{_json(of['default'])}`" if "default" in of else ""
            yield _row(f"`{field}`", _type(of), default, of.get("description", ""))
        yield ""
        for example in schema.get("examples", ()):
            yield from ("```json", _json(example, indent=2), "```", "")


def _type(schema: dict[str, Any]) -> str:
    """One line for the type of a value."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(map(_type, schema[several])))
    if "contentSchema" in schema:
        return f"JSON of {_type(schema['contentSchema'])}"
    if "const" in schema:
        return f"`{_json(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{_json(value)}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    if kind == "object" and schema.get("properties"):
        return "object of " + ", ".join(f"`{name}`: {_type(of)}" for name, of in schema["properties"].items())
    limits = {
        "minimum": "at least",
        "maximum": "at most",
        "exclusiveMaximum": "below",
        "maxLength": "at most",
        "pattern": "like",
    }
    said = [f"{words} `{schema[key]}`" for key, words in limits.items() if key in schema]
    return " ".join([str(kind), *said])


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def loaded_from_elsewhere(site: Path) -> list[str]:
    """What pages of the built site would fetch from other hosts, each with its page."""
    return [
        f"{page.relative_to(site)}: {found}"
        for page in sorted(site.rglob("*.html"))
        for found in LOADED.findall(page.read_text(encoding="utf-8"))
    ]


def main() -> int:
    """Exit code: 0 done, 1 where a page is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=f"show it at http://127.0.0.1:{PORT} instead")
    options = parser.parse_args()
    stage()
    show = ["serve", "--no-strict", "--dev-addr", f"127.0.0.1:{PORT}"]
    words = show if options.serve else ["build", "--clean", "--strict", "--quiet"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # of the theme; decision 0036 knows
    code = subprocess.run([sys.executable, "-m", "mkdocs", *words], cwd=ROOT, env=quiet, check=False).returncode
    outward = [] if options.serve else loaded_from_elsewhere(ROOT / "site")
    for line in outward:
        print(f"loaded from elsewhere: {line}", file=sys.stderr)
    return code or bool(outward)


if __name__ == "__main__":
    sys.exit(main())
