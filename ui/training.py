"""Training runs, live: read from the API's /v1/shoal/runs, which is there when the service was started with ``--runs DIR``."""

from __future__ import annotations

import html
import time
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
import httpx
import openai

from shoal.progress import duration
from ui import look, readings, service, site, talk
from ui.look import Place
from ui.readings import Readings
from ui.site import QUIET, Component, Site
from ui.talk import Card

PLACE = Place("Training", "training", "tools")
EVERY = 3.0  # seconds between two readings
NAMES = {"image": "captions", "chat": "answers"}  # of what is held out, where the kind is not its own name
SMOOTH = 0.9  # of the loss before, in the smoothed curve
NO_ROUTE = look.empty(
    "No runs to show",
    "This service was started without a folder of runs. Start it with <code>shoal serve --model DIR --runs runs</code>.",
)
NO_RUNS = look.empty(
    "No runs yet",
    "Start one with <code>shoal pretrain --preset tiny --data DIR --out runs/first</code>; it appears here by itself.",
)

Run = dict[str, Any]


def build(at: Site) -> None:
    """The page, inside the Blocks that are open."""
    head = at.head(PLACE)
    with gr.Row(equal_height=False, elem_id="training"):
        with gr.Column(scale=1, min_width=260, elem_id="runs", visible=False) as side:
            picked = site.judged_by_the_api(gr.Radio([], label="Runs", elem_id="run"))
        with gr.Column(scale=4, min_width=320):
            body = gr.HTML(look.empty("Reading the runs…", "One moment."), elem_id="curves")

    async def refresh(request: gr.Request, name: str | None) -> tuple[Any, ...]:
        try:
            runs = (await _get(at, request, "/shoal/runs"))["data"]
            run = await _get(at, request, f"/shoal/runs/{_chosen(runs, name)}") if runs else None
            cards = await at.cards(request) if runs else []
        except openai.NotFoundError:
            return at.header(PLACE, request), gr.update(visible=False), gr.skip(), NO_ROUTE
        except openai.OpenAIError as error:
            said = at.header(PLACE, request, talk.reason(error), fault=True)
            return said, gr.update(visible=False), gr.skip(), look.nothing(EVERY)
        if run is None:
            return at.header(PLACE, request), gr.update(visible=False), gr.skip(), NO_RUNS
        choices = gr.update(choices=[(_label(r), r["name"]) for r in runs], value=run["name"])
        metrics, _ = await readings.read_metrics(at)
        told = at.header(PLACE, request, f"{len(runs)} run{'s' * (len(runs) != 1)}, read every {EVERY:g} s")
        return told, gr.update(visible=True), choices, show(run, cards, metrics)

    outputs: list[Component] = [head, side, picked, body]
    at.page.load(refresh, picked, outputs, **QUIET)
    gr.Timer(EVERY).tick(refresh, picked, outputs, **QUIET)
    picked.input(refresh, picked, outputs, **QUIET)


async def _get(at: Site, request: gr.Request, path: str) -> Any:
    answer: httpx.Response = await at.client(request).get(path, cast_to=httpx.Response)
    return answer.json()


def _chosen(runs: list[Run], name: str | None) -> str:
    """`name` while there is such a run, or the run that spoke last."""
    names: list[str] = [run["name"] for run in runs]
    return name if name in names else names[0]


def _label(run: Run) -> str:
    """``quickstart/pretrain · running, 43 %, 02:10 left``."""
    share = "" if run["progress"] is None or run["state"] == "done" else f", {run['progress']:.0%}"
    left = f", {duration(run['eta'])} left" if run["eta"] else ""
    return f"{run['name']} · {run['state']}{share}{left}"


def show(run: Run, cards: Sequence[Card], metrics: Readings) -> str:
    """A run as HTML: where it is, its curves, its held-out quality by depth, its mix; and the depths that the service's models
    answer at."""
    curves = run["curves"]
    loss = _points(curves, "loss")
    parts = [_where(run), look.tiles(_facts(run)), '<div class="figures">']
    parts.append(
        look.curves("Loss, nats a token", "step", {"each update": loss, "smoothed": _smoothed(loss)}, "each update")
    )
    parts += _quality(run["evals"])
    parts.append(look.curves("Speed, tokens/s", "step", {"tokens/s": _points(curves, "tokens_per_second")}))
    parts.append(look.curves("Learning rate", "step", {"rate": _points(curves, "rate")}))
    parts.append(_mix(run))
    parts += [service.depth_bars(metrics.get(card.name, {}), card, len(cards) > 1) for card in cards]
    parts.append("</div>")
    if not loss:
        parts.append(look.empty("No update yet", "The first one takes a moment."))
    return "".join(parts)


def _where(run: Run) -> str:
    """The run's name, and beside it what it is and when it spoke last."""
    start = run["start"] or {}
    known = [run["state"]]
    if run["state"] != "running":
        known.append(time.strftime("%d %b, %H:%M", time.localtime(run["spoke"])))
    if "parameters" in start:
        known.append(f"{start['parameters'] / 1e6:.2f} M parameters")
    if "world" in start:
        known.append(f"{start['world']} worker{'s' * (start['world'] != 1)}")
    return f'<div class="run"><h2>{html.escape(run["name"])}</h2><p class="note">{html.escape(" · ".join(known))}</p></div>'


def _facts(run: Run) -> list[tuple[str, str]]:
    """Where it is in numbers: what is left of it, its last loss, and full depth on what is held out."""
    evals, curves = run["evals"], run["curves"]
    last = next((value for value in reversed(curves["loss"]) if value is not None), None)
    facts = [("Updates", "none" if run["step"] is None else f"{run['step']:,}")]
    if run["state"] == "running":
        facts.append(("Time left", duration(run["eta"]) if run["eta"] is not None else look.UNKNOWN))
    facts.append(("Loss", look.UNKNOWN if last is None else f"{last:.3f}"))
    if evals:
        full = {kind: list(exits.values())[-1] for kind, exits in evals[-1]["bpb"].items()}
        facts += [(f"Bits a byte, {NAMES.get(kind, kind)}", f"{v:.3f}") for kind, v in full.items() if v is not None]
    return facts


def _quality(evals: Sequence[Run]) -> list[str]:
    """Held-out bits a byte by exit: a curve for each kind of data, or a table where there is only one evaluation."""
    kinds = list(dict.fromkeys(kind for record in evals for kind in record["bpb"]))
    lines = {NAMES.get(kind, kind): exits for kind in kinds if (exits := _by_exit(evals, kind))}
    if len(evals) > 1:
        return [look.curves(f"Held-out {name}, bits a byte", "step", exits) for name, exits in lines.items()]
    names = dict.fromkeys(name for exits in lines.values() for name in exits)
    rows = [
        (name, *(f"{exits[name][-1][1]:.3f}" if name in exits else look.UNKNOWN for exits in lines.values()))
        for name in names
    ]
    return [look.table("Held-out bits a byte, by depth", ("", *lines), rows)] if rows else []


def _points(curves: Mapping[str, list[float | None]], name: str) -> list[tuple[float, float]]:
    pairs = zip(curves["step"], curves[name], strict=True)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """An exponential mean, corrected for its start."""
    found, mean, weight = [], 0.0, 0.0
    for step, value in points:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + 1 - SMOOTH
        found.append((step, mean / weight))
    return found


def _by_exit(evals: Sequence[Run], kind: str) -> dict[str, list[tuple[float, float]]]:
    """Exit -> (step, bits a byte on held-out data of `kind`)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in evals:
        for name, value in (record["bpb"].get(kind) or {}).items():
            if value is not None:
                lines.setdefault(name, []).append((record["step"], value))
    return lines


def _mix(run: Run) -> str:
    """Wanted shares by token, with the share of image patches that was really read."""
    wanted = (run["start"] or {}).get("mix") or {}
    curves = run["curves"]
    tokens, patches = (sum(value or 0 for value in curves[name]) for name in ("tokens", "patches"))
    read = f"Read so far: {patches / tokens:.1%} image patches. Rows of images have words, too." if tokens else ""
    if not wanted:
        said = "This run was given none." if "mix" in (run["start"] or {}) else f"{look.UNKNOWN.capitalize()}."
        return look.remark("Mix by token", f"{said} {read}")
    shares = look.shares(wanted)
    return look.bars("Mix by token, as wanted", shares, {name: f"{share:.0%}" for name, share in shares.items()}, read)
