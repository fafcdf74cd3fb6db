"""The site of the documentation, up to where MkDocs takes over (`make docs` builds it, strictly): its pages are staged so that
every link leads to a page, and the HTTP reference says all that the service's own document does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import make_site

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "pages"
    make_site.stage(folder)
    return folder


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_every_link_of_a_staged_page_leads_to_a_staged_file(pages: Path) -> None:
    followed = 0
    for page in pages.rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", prose(page)):
            if "://" not in target:
                assert (page.parent / target).is_file(), f"{page.relative_to(pages)}: {target}"
                followed += 1
    assert followed > 80


def test_a_link_to_what_the_site_does_not_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_site, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").touch()
    page = tmp_path / "docs" / "page.md"
    for target in ("missing.md", "../code.py"):
        page.write_text(f"# A\n\n[b]({target})\n")
        with pytest.raises(FileNotFoundError):
            make_site.linked(page, page, tmp_path)
    page.write_text("# A\n\n```sh\n[b](missing.md)\n```\n\n[c](https://example.org/c)\n")
    assert make_site.linked(page, page, tmp_path) == page.read_text()


def test_every_page_is_in_the_navigation_or_in_an_index(pages: Path) -> None:
    """And the menu leads to nothing else. (A strict build says so too.)"""

    def names(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for each in (entry.values() if isinstance(entry, dict) else entry) for name in names(each)]

    shown = set(names(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    found = {str(page.relative_to(pages)) for page in pages.rglob("*.md")}
    assert shown == {name for name in found if not re.match(r"decisions/\d", name)}
    listed = set(re.findall(r"\]\((\d[\w-]+\.md)\)", (pages / "decisions/index.md").read_text()))
    assert listed == {path.name for path in (ROOT / "docs/decisions").glob("*.md")}


def test_the_http_reference_has_every_path_shape_and_field(pages: Path) -> None:
    text = (pages / "reference/http.md").read_text(encoding="utf-8")
    document = make_site.document()
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"### `{method.upper()} {path}`\n" in text
    parts = {part.partition("\n")[0]: part for part in text.split("\n### ")}
    for name, schema in document["components"]["schemas"].items():
        for field in schema.get("properties", {}):
            assert f"\n| `{field}` |" in parts[name], f"{name}.{field}"
        assert set(re.findall(r"\(#(\w+)\)", parts[name])) <= {other.lower() for other in parts}
    row = next(line for line in parts["ChatRequest"].splitlines() if line.startswith("| `quality_tolerance`"))
    assert "at least `0`" in row and "prompts like its calibration's" in row
