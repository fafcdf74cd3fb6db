"""What all pages share: their names, the line on top, the theme, and how figures are drawn. System fonts, nothing fetched."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import jinja2

from shoal import page

HERE = Path(__file__).parent
CSS, ICON = HERE / "style.css", HERE / "icon.svg"
SCRIPTS = (
    HERE / "mend.js",
    HERE / "stream.js",
    HERE / "chat.js",
    HERE / "kept.js",
    HERE / "vote.js",
    HERE / "program.js",
)
# not in `CSS`, which Gradio binds to the middle of the page, and reads when it has shown its own list of pages
FIRST = """<style>.nav-holder { display: none !important; }
#away { position: sticky; top: 0; z-index: 100; padding: 8px 16px; text-align: center; font: 0.92rem system-ui, sans-serif;
  background: #fffbeb; color: #78350f; border-bottom: 1px solid #b45309; }
.dark #away { background: #451a03; color: #fde68a; }
#away:empty { display: none; }
@media (prefers-reduced-motion: reduce) {
  *, ::before, ::after {
    transition: none !important; animation-duration: 0.01ms !important; animation-iteration-count: 1 !important;
  }
}</style>"""
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")
MONO = ("ui-monospace", "monospace")
UNKNOWN = "not known"  # where this side cannot tell; a zero would be a claim
NONE_YET = "none yet"  # where nothing has been counted
SOON = "measuring"  # what takes two readings
WIDE = 3  # columns of a table that a phone has room for

THEME = gr.themes.Base(
    primary_hue="cyan", secondary_hue="cyan", neutral_hue="slate", radius_size="md", font=FONTS, font_mono=MONO
).set(
    body_background_fill="#f6f9fa",
    body_background_fill_dark="#0b1418",
    body_text_color_subdued="*neutral_600",  # darker than Gradio's: WCAG AA on the page and on white
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color_dark="*neutral_300",
    input_placeholder_color_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    input_placeholder_color="*neutral_600",
    block_border_width="0px",
    block_shadow="none",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_text_color="white",
    checkbox_border_color="*neutral_500",  # WCAG 1.4.11, 3 to 1: a choice that is not made can be seen, in the dark too
    checkbox_border_color_dark="*neutral_400",
    checkbox_label_background_fill="transparent",
    checkbox_label_background_fill_hover="*primary_50",
    checkbox_label_background_fill_selected="*primary_50",
)

_TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(page.__file__).parent), autoescape=True)


@dataclass(frozen=True)
class Place:
    """A page: its name, its path below the first page's (empty: the first), and the pages it stands beside."""

    name: str
    path: str
    group: str


def header(
    places: Sequence[Place], here: Place, root: str, said: str = "", *, fault: bool = False, keyed: bool = False
) -> str:
    """The line on top of a page: who this is, the other pages below `root`, and what is `said` of the model, or why it cannot
    be (`fault`). `keyed`: with a link to leave the key that the browser logged in with."""
    groups = dict.fromkeys(place.group for place in places)
    links = "".join(
        f'<span class="group">{"".join(_link(p, here, root) for p in places if p.group == group)}</span>'
        for group in groups
    )
    kind = 'class="about fault" role="alert"' if fault else 'class="about"'
    about = f"<p {kind}>{html.escape(said)}</p>" if said else ""
    links += f'<span class="group"><a href="{html.escape(root)}/logout">Log out</a></span>' if keyed else ""
    nav = f'<nav aria-label="Pages">{links}</nav>'
    return f'<div class="top"><span class="name">Shoal</span>{nav}</div><h1 class="unseen">{here.name}</h1>{about}'


def _link(place: Place, here: Place, root: str) -> str:
    current = ' aria-current="page"' if place == here else ""
    return f'<a href="{html.escape(root)}/{place.path}"{current}>{html.escape(place.name)}</a>'


def titled(name: str) -> str:
    """JavaScript that names the browser's tab."""
    return f"() => {{ document.title = '{name} · Shoal'; }}"


def empty(title: str, text: str) -> str:
    """What a page says instead of nothing; `text` may hold markup of ours."""
    return f'<div class="empty"><h2>{html.escape(title)}</h2><p>{text}</p></div>'


def nothing(seconds: float) -> str:
    """What a page shows of a service that has not told; the line on top says why. It is asked again after `seconds`."""
    return empty("Nothing to show", f"The service is asked again every {seconds:g} s.")


def tiles(facts: Iterable[tuple[str, str]], kinds: Mapping[str, str] | None = None) -> str:
    """(name, value) pairs as a row of tiles; `kinds`: value -> ``good`` or ``bad``, where it is one of these."""
    kinds = {UNKNOWN: "unknown", NONE_YET: "unknown", SOON: "unknown", **(kinds or {})}
    cells = "".join(
        f'<div class="tile {kinds.get(value, "")}"><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>'
        for name, value in facts
    )
    return f'<dl class="tiles">{cells}</dl>'


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    below: Mapping[str, str] | None = None,
    *,
    words: bool = False,
) -> str:
    """A table whose first column names its rows, and the others are numbers. `head` may be empty; `below`: name of a row ->
    what stands small below it; `words`: the others are no numbers, and lines may break between words."""
    top = "".join(f'<th scope="col">{html.escape(name)}</th>' if name else "<td></td>" for name in head)
    small = {name: f"<small>{html.escape(text)}</small>" for name, text in (below or {}).items()}
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}{small.get(first, "")}</th>'
        f"{''.join(f'<td>{html.escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    name = html.escape(caption)
    # a wide table scrolls on a phone, which a keyboard can do only where the focus can be
    scrolls = f' tabindex="0" role="region" aria-label="{name}"' if len(head) > WIDE else ""
    return (
        f'<div class="figure {"words" if words else "numbers"}"><div class="aside"{scrolls}><table><caption>{name}</caption>'
        f"{f'<thead><tr>{top}</tr></thead>' if head else ''}<tbody>{body}</tbody></table></div></div>"
    )


def bars(caption: str, shares: Mapping[str, float], values: Mapping[str, str], note: str = "") -> str:
    """A bar for each name, as long as its share of the whole, with its value beside it."""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        f'<td><div class="bar"><i style="width:{100 * share:.1f}%"></i></div></td><td>{html.escape(values[name])}</td></tr>'
        for name, share in shares.items()
    )
    if not rows:
        return remark(caption, note)
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return (
        f'<div class="figure bars"><table><caption>{html.escape(caption)}</caption><tbody>{rows}</tbody></table>'
        f"{below}</div>"
    )


def remark(caption: str, text: str) -> str:
    return f'<div class="figure"><h2>{html.escape(caption)}</h2><p class="note">{html.escape(text)}</p></div>'


def shares(counts: Mapping[str, float]) -> dict[str, float]:
    """Of the whole; all zero when there is nothing."""
    whole = sum(counts.values())
    return {name: count / whole if whole else 0.0 for name, count in counts.items()}


def curves(title: str, x_label: str, lines: Mapping[str, Sequence[tuple[float, float]]], faint: str = "") -> str:
    """A chart of `lines`, name -> points, with the last value of each as its legend; the line `faint` is drawn thin."""
    drawn = {name: points for name, points in lines.items() if points}
    if not drawn:
        return ""
    kinds = {name: _drawn_as(points, name == faint) for name, points in drawn.items()}
    svg = _TEMPLATES.get_template("chart.html").module.plot(page.chart(title, x_label, kinds))  # type: ignore[attr-defined]
    legend = "".join(
        f'<li class="{kinds[name][0]}">{html.escape(name)} <b>{short(points[-1][1])}</b></li>'
        for name, points in drawn.items()
    )
    return f'<div class="figure">{svg}<ul class="legend" aria-label="Last values">{legend}</ul></div>'


def _drawn_as(points: Sequence[tuple[float, float]], faint: bool) -> tuple[str, Sequence[tuple[float, float]]]:
    """(CSS class, points): a line, or a dot, which is a line from the only point to itself."""
    return ("line one", [*points, *points]) if len(points) == 1 else ("faint" if faint else "line", points)


def short(value: float) -> str:
    """Three digits that count, or whole thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
