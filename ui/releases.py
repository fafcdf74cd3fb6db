"""The release that a service follows: versions and what the gate said of them, the canary's evidence, the audit log; and the
changes, for keys that may. Read from the API's /v1/shoal/release, which is there when it was started with ``--release DIR``."""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable
from typing import Any

import gradio as gr
import httpx
import openai

from ui import bubbles, look, site, talk
from ui.look import UNKNOWN, Place
from ui.site import QUIET, Component, Site

PLACE = Place("Releases", "releases", "tools")
EVERY = 3.0  # seconds between two readings
NO_ROUTE = look.empty(
    "No release to show",
    "This service follows none. Start it with <code>shoal serve --release DIR</code>; "
    "<code>shoal release add</code> makes one.",
)
# name of the button, last part of the route, what is said once it is done
CHANGES = (
    ("Promote", "promote", "New requests get version {stable} within some seconds."),
    ("Start canary", "canary", "Version {version} is on trial."),
    ("Roll back", "rollback", "Version {stable} serves."),
    (
        "Hold",
        "hold",
        "No step and no promotion by itself. A canary that its checks condemn is taken back all the same.",
    ),
)
GATE = {True: "passed", False: "refused", None: "not asked"}

Told = dict[str, Any]


def build(at: Site) -> None:
    """The page, inside the Blocks that are open."""
    head = at.head(PLACE)
    taken = gr.State()  # what a rollback takes back, as the page shows it
    body = gr.HTML(look.empty("Reading the release…", "One moment."), elem_id="release")
    with gr.Column(visible=False, elem_id="changes") as changes:
        with gr.Row(equal_height=True):
            version = site.judged_by_the_api(
                gr.Dropdown([], label="Version", elem_id="version", scale=1, min_width=180)
            )
            why = gr.Textbox(label="Reason", info="It is kept in the audit log.", elem_id="why", scale=3, min_width=260)
            force = gr.Checkbox(label="Also against the gate", elem_id="force", scale=1, min_width=160)
        with gr.Row():
            buttons = [gr.Button(name, elem_id=path) for name, path, _ in CHANGES]
        done = gr.HTML("", elem_id="done")

    async def refresh(request: gr.Request, picked: str | None) -> tuple[Any, ...]:
        try:
            told = await _get(at, request)
        except openai.NotFoundError:
            return at.header(PLACE, request), NO_ROUTE, gr.update(visible=False), gr.skip(), gr.skip()
        except openai.OpenAIError as error:
            said = at.header(PLACE, request, talk.reason(error), fault=True)
            return said, look.nothing(EVERY), gr.update(visible=False), gr.skip(), gr.skip()
        labels = [each["label"] for each in reversed(told["versions"])]
        chosen = picked if picked in labels else labels[0] if labels else None
        choices = gr.update(choices=labels, value=chosen)
        may = gr.update(visible=told["may_change"])
        return at.header(PLACE, request, sentence(told)), show(told), may, choices, last(told)

    outputs: list[Component] = [head, body, changes, version, taken]
    at.page.load(refresh, version, outputs, **QUIET)
    gr.Timer(EVERY).tick(refresh, version, outputs, **QUIET)
    for button, (_, path, said) in zip(buttons, CHANGES, strict=True):
        pressed = button.click(_changes(at, path, said), [version, why, force, taken], [done, why], **QUIET)
        pressed.then(refresh, version, outputs, **QUIET)


def _changes(at: Site, path: str, said: str) -> Callable[..., Awaitable[tuple[Any, Any]]]:
    async def change(request: gr.Request, version: str | None, why: str, force: bool, taken: str) -> tuple[Any, Any]:
        """What is said below the buttons, and the reason: it stays where the change was refused."""
        if not why.strip():
            return bubbles.fault("Write the reason first."), gr.skip()
        body: dict[str, Any] = {"why": why.strip()}
        if path in ("promote", "canary"):
            body |= {"version": version, "force": bool(force)}
        if path == "rollback":  # a canary that has ended since is not to become the version that serves
            body["version"] = taken
        try:
            answer: httpx.Response = await at.client(request).post(
                f"/shoal/release/{path}", body=body, cast_to=httpx.Response
            )
        except openai.OpenAIError as error:
            return bubbles.fault(talk.reason(error)), gr.skip()
        line = said.format(stable=answer.json()["stable"], version=version)
        return f'<p class="note" role="status">{html.escape(line)}</p>', ""

    return change


async def _get(at: Site, request: gr.Request) -> Told:
    answer: httpx.Response = await at.client(request).get("/shoal/release", cast_to=httpx.Response)
    told: Told = answer.json()
    return told


def last(told: Told) -> str:
    """The version that a rollback takes back: the canary, else what serves."""
    return str(told["stable"] if told["canary"] is None else told["canary"]["version"])


def sentence(told: Told) -> str:
    """What there is to know first."""
    canary = told["canary"]
    if told["held"]:
        return f"Held: {told['held']}"
    if canary is not None:
        share = "gets copies of requests" if not told["share"] else f"answers {told['share']:.0%} of the conversations"
        return f"Version {told['stable']} serves; version {canary['version']} {share}."
    if told["candidate"] is not None:
        return f"Version {told['stable']} serves; version {told['candidate']} is to be decided on."
    return f"Version {told['stable']} serves."


def show(told: Told) -> str:
    """The whole page as HTML."""
    parts = [look.tiles(_facts(told)), _versions(told), '<div class="figures">']
    if told["canary"] is not None:
        parts.append(_canary(told))
    parts += [_gate(version) for version in reversed(told["versions"]) if version["checks"]][:2]
    parts += ["</div>", _log(told)]
    return "".join(parts)


def _facts(told: Told) -> list[tuple[str, str]]:
    names = ("stable", "previous", "candidate")
    share = "none" if told["canary"] is None else "shadow" if not told["share"] else f"{told['share']:.0%}"
    shown = [(name.capitalize(), "none" if told[name] is None else str(told[name])) for name in names]
    return [*shown, ("Canary", share), ("By itself", told["auto"])]


def _versions(told: Told) -> str:
    rows = [
        (
            version["label"],
            _role(version, told),
            GATE[version["passed"]],
            version["made"][:16].replace("T", " "),
            _hours(version),
        )
        for version in reversed(told["versions"])
    ]
    cuts = {version["label"]: f"cut {version['cut'][:12]}" for version in told["versions"] if version["cut"]}
    return look.table("Versions", ("version", "role", "gate", "made", "served"), rows, cuts, words=True)


def _role(version: Told, told: Told) -> str:
    roles = {name: told[name] for name in ("stable", "previous", "candidate")}
    roles["canary"] = told["canary"] and told["canary"]["version"]
    return ", ".join(name for name, number in roles.items() if number == version["number"]) or "none"


def _hours(version: Told) -> str:
    times = [
        f"{begin[5:16].replace('T', ' ')} to {end[5:16].replace('T', ' ') if end else 'now'}"
        for begin, end in version["served"]
    ]
    return "; ".join(times) or "never"


def _canary(told: Told) -> str:
    """Its checks: how many people had something bad of it, and which share of the stable version's."""
    caption = f"Canary: version {told['canary']['version']}, step {told['canary']['step'] + 1} of {len(told['shares'])}"
    evidence = told["evidence"]
    if evidence is None or evidence["version"] != told["canary"]["version"]:
        return look.remark(caption, "Nothing was seen of it yet.")
    rows = [
        (
            check["name"], f"{check['count']} of {check['of']}", f"{check['stable']:.1%}",
            "condemned" if check["condemned"] else "clear" if check["cleared"] else "open",
        )
        for check in evidence["checks"]
    ]  # fmt: skip
    return look.table(caption, ("check", "people", "stable version", "state"), rows)


def _gate(version: Told) -> str:
    """What the gate measured of a version."""
    rows = [
        (
            str(check.get("name", UNKNOWN)),
            _number(check, "value"),
            _interval(check),
            str(check.get("status", UNKNOWN)),
        )
        for check in version["checks"]
    ]
    return look.table(f"Gate: version {version['label']}", ("check", "value", "95 %", "verdict"), rows)


def _number(check: Told, name: str) -> str:
    value = check.get(name)
    return f"{value:.4g}" if isinstance(value, (int, float)) else UNKNOWN


def _interval(check: Told) -> str:
    return UNKNOWN if check.get("low") is None else f"{_number(check, 'low')} to {_number(check, 'high')}"


def _log(told: Told) -> str:
    rows = []
    for entry in told["log"]:
        forced = ", against the gate" if entry["figures"].get("forced") else ""
        version = "" if entry["version"] is None else f" {entry['version']}"
        when = f"{entry['number']}. {entry['at'][:16].replace('T', ' ')}"
        rows.append((when, entry["who"], f"{entry['what']}{version}{forced}", entry["why"]))
    return look.table("Audit log", ("when", "who", "what", "why"), rows, words=True)
