"""HTML as a reader sees it.

Notable: read in one pass, since the standard library's parser takes minutes for 80 kB of ``<a <a <a``. A tag, a comment or a
script that never ends takes the rest of the page with it, as in a browser.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

BLOCKS = frozenset({
    "address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "details", "dialog", "dir",
    "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head",
    "header", "hgroup", "hr", "legend", "li", "listing", "main", "menu", "nav", "ol", "optgroup", "option", "p", "pre",
    "search", "section", "select", "summary", "table", "tbody", "textarea", "tfoot", "thead", "title", "tr", "ul",
})  # fmt: skip
CELLS = frozenset({"td", "th"})
AS_WRITTEN = frozenset({"listing", "pre", "textarea"})  # their white space is the author's
HIDDEN = frozenset({"iframe", "noembed", "noframes", "noscript", "script", "style"})  # up to the end tag all is theirs
SHOWN_RAW = frozenset({"textarea", "title"})  # as well, but it is shown

_TAG = re.compile(r"""<(/?)([a-z][^\s/>]*+)(?:[^>=]|=\s*+(?:"[^"]*+"|'[^']*+')?+)*+>""", re.IGNORECASE | re.ASCII)
_OPENING = re.compile(r"<(?=[a-z/!?])", re.IGNORECASE | re.ASCII)  # any other < is a character
_END_OF = {name: re.compile(rf"</{name}(?=[\s/>])", re.IGNORECASE | re.ASCII) for name in HIDDEN | SHOWN_RAW}
_NO_CHARACTER = re.compile(r"&#[0-9]{4000,};?")  # Python refuses to read such a number


def html_text(source: str) -> str:
    """The visible text of an HTML page: one line a block, blank lines left out; cells of a row with a tab between them; what
    is preformatted as it is written, blank lines too."""
    page = _Page()
    for tag, text in _pieces(source):
        if tag:
            page.tag(tag)
        else:
            page.write(html.unescape(_NO_CHARACTER.sub("\ufffd", text)))
    page.end_line()
    return "\n".join(page.lines)


def _pieces(source: str) -> Iterator[tuple[str, str]]:
    """(tag, "") or ("", text), in order: ``p`` for <p ...>, ``/p`` for </p>; never what is hidden or a comment."""
    at = 0
    while opening := _OPENING.search(source, at):
        start = opening.start()
        yield "", source[at:start]
        tag = _TAG.match(source, start)
        if tag:
            name, at = tag[2].lower(), tag.end()
            yield tag[1] + name, ""
            if not tag[1] and name in _END_OF:
                end = _END_OF[name].search(source, at)
                if name in SHOWN_RAW:
                    yield "", source[at : end.start() if end else len(source)]
                at = end.start() if end else len(source)
        elif source[start + 1 : start + 3].lstrip("/")[:1].isalpha():
            return  # a tag that does not end
        else:
            comment = source.startswith("<!--", start) and not source.startswith(("<!-->", "<!--->"), start)
            closing = "-->" if comment else ">"
            closed = source.find(closing, start + (4 if comment else 1))
            at = closed + len(closing) if closed >= 0 else len(source)
    yield "", source[at:]


class _Page:
    """The lines of a page as its pieces come."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._line: list[str] = []
        self._cells = 0  # of the row so far
        self._as_written = 0  # how many such elements are open
        self._opened = False  # the last of them just now: a line end there is not shown
        self._template = 0

    def tag(self, name: str) -> None:
        plain = name.removeprefix("/")
        step = -1 if name.startswith("/") else 1
        if plain == "template":
            self._template = max(0, self._template + step)
        if plain in BLOCKS:
            self.end_line()
        if plain == "tr":
            self._cells = 0
        if name in CELLS:
            self._line += ["\t"] * (self._cells > 0)
            self._cells += 1
        if plain in AS_WRITTEN:
            self._as_written = max(0, self._as_written + step)
            self._opened = step > 0

    def write(self, text: str) -> None:
        if self._template:
            return
        if not self._as_written:
            self._line.append(re.sub(r"\s+", " ", text))
            return
        lines = text.replace("\r\n", "\n").split("\n")
        if self._opened and len(lines) > 1 and not lines[0]:
            del lines[0]
        self._opened = self._opened and lines == [""]
        for line in lines[:-1]:
            self.lines.append("".join([*self._line, line]).rstrip())
            self._line.clear()
        self._line.append(lines[-1])

    def end_line(self) -> None:
        line = "".join(self._line)
        self._line.clear()
        if not self._as_written:
            line = "\t".join(" ".join(cell.split()) for cell in line.split("\t"))
        if line.strip():
            self.lines.append(line.rstrip())
