"""What a recipe's models are worth on its frozen suites: each measure of each at full depth and under the router beside what
answers without a model, and of each exit.

Answers are made by the engine, greedily, from messages as a service shows them to a model: what is measured is what is served.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recipes.picks import Picks, layers_of
from recipes.recipe import CALIBRATION, SUITES, Answerer, Messages, Recipe, Row, conversations_of
from recipes.sure import calibration
from shoal.api.calls import rewritten
from shoal.api.requests import guide_of
from shoal.config import AUTO, FULL
from shoal.data.chats import forms
from shoal.engine.engine import Engine
from shoal.engine.events import Guide, Request, Sampling
from shoal.evaluate import pieces
from shoal.evaluate.answering import interleaved_speed, machine
from shoal.evaluate.evaluation import Progress
from shoal.evaluate.intervals import Figure
from shoal.evaluate.measures import Answer
from shoal.evaluate.pieces import Models, Piece, Run, wherever
from shoal.inputs.chat import Encoded, encode_chat
from shoal.loop import suites
from shoal.loop.suites import SAFETY
from shoal.model import files
from shoal.model.model import Model

SPEED_TOKENS = 64  # of an answer whose speed is measured
UNGUIDED = "unguided"  # column of the served model's answers where no grammar guides the calls of its tools
# who earned a figure of the served model at full depth: the model, which no grammar guides and whose answers no rule changes;
# the service's rules where a model says nothing; both, as it is served
ALONE, RULE_ALONE, BOTH = EARNED = ("model alone", "rule alone", "both")
SAMPLES = 6  # answers that the report shows of each suite
Suites = Mapping[str, Sequence[Row]]  # rows that are asked, by suite


@dataclass(frozen=True)
class Came:
    """What a model at a depth, or `who` answers without one, came to on a suite: figures, the same of each language, some of
    the answers; of a model the share of its layers that ran, which exit the router chose how often, and prompts too long."""

    who: str  # column of the report
    figures: dict[str, Figure]
    languages: list[dict[str, Any]]
    samples: list[dict[str, str]]
    depth: str = ""
    layers: float = 0.0
    chosen: Mapping[str, float] | None = None
    too_long: int = 0


class ByEngine:
    """A model that answers at a depth, `guided` as a service guides it. Of what was last asked for: `heard`, None for a prompt
    that does not fit the context and is answered by nothing; `sure`, the model's own probability of each answer."""

    def __init__(
        self, model: Model, depth: str, recipe: Recipe, tools: Sequence[Mapping[str, Any]], *, guided: bool = True,
        engine: Engine | None = None,
    ) -> None:  # fmt: skip
        """`engine`: of `model`; one that has read the same prompts for another depth finds them again [one of its own]."""
        self._model, self._depth, self._tools, self._guided = model, depth, list(tools), guided
        self._engine, self._guide = engine or Engine(model), recipe.guide
        self._sampling = Sampling(temperature=0.0, max_tokens=recipe.most_tokens, logprobs=0)
        # what was answered to a prompt, and how surely: whole conversations begin as turns that were asked
        self._known: dict[tuple[tuple[int, ...], bytes], tuple[str, float, Answer]] = {}
        self.heard: list[Answer | None] = []
        self.sure: list[float] = []

    def __call__(self, asked: Sequence[Messages]) -> list[str]:
        prompts = [self._prompt(messages) for messages in asked]
        keys = [(tuple(one.ids), b"" if one.patches is None else one.patches.tobytes()) for one in prompts]
        requests = {}
        for key, prompt, messages in zip(keys, prompts, asked, strict=True):
            fits = len(prompt.ids) + self._sampling.max_tokens <= self._model.config.context
            if fits and key not in self._known:
                sampling = dataclasses.replace(self._sampling, guided=self._guide_of(messages))
                requests[key] = Request(prompt, sampling, depth=self._depth)
        # what a long prompt has read is found again by those that it begins as: the turns of its conversation
        order = sorted(requests, key=lambda key: len(key[0]), reverse=True)
        for key, done in zip(order, self._engine.generate([requests[key] for key in order]), strict=True):
            logprobs = [one.logprob for one in done.logprobs]
            answer = Answer(done.text, len(done.tokens), done.depth, len(key[0]))
            self._known[key] = self._in_our_words(done.text), math.exp(sum(logprobs)) if logprobs else 0.0, answer
        found = [self._known.get(key) for key in keys]
        self.heard = [None if one is None else one[2] for one in found]
        self.sure = [0.0 if one is None else one[1] for one in found]
        return ["" if one is None else one[0] for one in found]

    def _guide_of(self, messages: Messages) -> Guide | None:
        if not self._guided:
            return None
        return self._guide(messages) or guide_of(messages, self._tools, self._model.tokenizer)

    def _prompt(self, messages: Messages) -> Encoded:
        """As a service shows it: by a chat template that knows tools, or with tools in our words."""
        tokenizer, row = self._model.tokenizer, {"messages": list(messages), "tools": self._tools}
        native = tokenizer.calls is not None
        return encode_chat(
            forms.canonical(row, native=native)["messages"],
            tokenizer,
            self._model.config,
            template=self._model.chat_template,
            answers=False,
            tools=forms.offered(row) if native else None,
        )

    def _in_our_words(self, text: str) -> str:
        """An answer with its calls as all others who are asked write them, however the model was taught to."""
        form = self._model.tokenizer.calls
        return text if form is None or not self._tools else rewritten(text, self._tools, form)

    @property
    def ran(self) -> list[tuple[float, int]]:
        """Of each answer the share of the layers that its tokens ran, and how many these were."""
        layers = self._model.config.layers
        return [(0.0, 0) if one is None else (one.depth / layers, one.run) for one in self.heard]

    @property
    def chosen(self) -> dict[str, float]:
        """The share of the answers that each exit gave, the shallowest first."""
        exits = dict(zip(self._model.config.exits, self._model.config.exit_names, strict=True))
        counts = Counter(exits[answer.depth] for answer in self.heard if answer is not None)
        return {name: counts[name] / max(1, counts.total()) for name in exits.values()}


def measured(
    recipe: Recipe, models: Mapping[str, Path], folder: Path, seed: int, tell: Progress, *, most_rows: int = 0,
    run: Run = pieces.here,
) -> dict[str, Any]:  # fmt: skip
    """The report: ``suites`` (name -> who answers -> measure), ``earned`` (name -> each of `EARNED` -> measure), ``languages``
    (of each language, where there are several), ``depths`` (of each model and exit; of "auto" which it chose), ``costs``
    (bytes, tokens a second), ``samples``, ``weak``, sentences about what is weak, and ``notes``, about what was not asked. The
    last of `models` is the one that is served. `most_rows`: of a suite, whole conversations; 0: all. `run` asks, a model a
    piece. Raises DataError for suites that changed."""
    asked, notes = _asked(folder, most_rows)
    served, by = [*models][-1], dict[str, dict[str, list[Came]]]()
    places = {label: wherever(path) for label, path in reversed([*models.items()])}  # the slowest first
    todo = [Piece(of_model, (recipe, label, place, asked, seed, label == served)) for label, place in places.items()]
    results = run([*todo, Piece(of_rivals, (recipe, wherever(folder), asked, seed))])
    for number, label in enumerate([*places, ""]):
        tell(f"{label or 'what is beside it'} on {', '.join(asked)}", number, len(places) + 1)
        by[label], *more = next(results)
        if label == served:
            workloads, examples = more
    list(results)  # none: it ends, and lets its processes go
    suites.use(
        folder / SUITES, {"recipe": recipe.name, "models": [files.weights_sha256(path) for path in models.values()]}
    )
    every = {name: [(label, one) for label in ("", *models) for one in by[label][name]] for name in asked}
    columns = {
        name: [one for _, one in some if one.depth in ("", FULL, AUTO, UNGUIDED)] for name, some in every.items()
    }
    depths = [
        {"suite": name, "model": label, "depth": one.depth, "layers": one.layers}
        | ({"chosen": one.chosen} if one.depth == AUTO else {})
        | _told(one.figures)
        for name, some in every.items()
        for label, one in some
        if one.depth not in ("", UNGUIDED, *EARNED)
    ]
    notes += [
        f"{name}: {one.too_long} prompts do not fit {one.who}'s context, and have no answer."
        for name, some in columns.items()
        for one in some
        if one.too_long and one.depth == FULL
    ]
    found = {name: {one.who: one.figures for one in some} for name, some in columns.items()}
    last = {name: [one for one in some if one.depth != UNGUIDED][-1] for name, some in columns.items()}
    at = _column(served, FULL) if recipe.policy().depth == FULL else last[next(iter(asked))].who
    return {
        "recipe": recipe.name, "headline": recipe.headline, "depth": recipe.policy().depth, "machine": machine(),
        "rows": {name: [len(rows), len({row["group"] for row in rows})] for name, rows in asked.items()},
        "weak": weak(recipe, found, [one.who for one in columns[next(iter(asked))] if not one.depth], at), "notes": notes,
        "suites": {name: {who: _told(figures) for who, figures in some.items()} for name, some in found.items()},
        "earned": {
            name: {one.who: _told(one.figures) for one in some if one.depth in EARNED} for name, some in by[served].items()
        },
        "languages": [row for some in columns.values() for one in some for row in one.languages], "depths": depths,
        "workloads": workloads, "costs": _costs(models), "samples": [row for one in last.values() for row in one.samples],
        "examples": examples,
    }  # fmt: skip


def of_model(
    models: Models, recipe: Recipe, label: str, place: str, asked: Suites, seed: int, served: bool
) -> tuple[dict[str, list[Came]], list[dict[str, Any]], list[dict[str, str]]]:
    """What the model at `place` came to on each suite at each depth, the shallowest first; of the one that is `served` also
    unguided, the depths to pick (`Picks.all`), and its answers to the recipe's examples."""
    (model,) = models(place)
    engine, picks, found = Engine(model), Picks(recipe), dict[str, list[Came]]()
    for name, rows in asked.items():
        tools, came = rows[0].get("tools", []), dict[str, tuple[Came, list[str], list[tuple[float, int]]]]()
        depths = _depths(model)
        for depth in sorted(depths, key=lambda depth: depth != FULL):  # whose pages are those of all others
            answerer = ByEngine(model, depth, recipe, tools, engine=engine)
            play = depth in (AUTO, FULL)
            came[depth] = _came(recipe, name, _column(label, depth), rows, answerer, seed, play=play)
        found[name] = [dataclasses.replace(came[depth][0], depth=depth) for depth in depths]
        # a depth is picked by what is known: a safety suite asks one kind of thing alone
        for depth in depths if served and not name.startswith(SAFETY) else ():
            picks.saw(rows, came[depth][1], depth, came[depth][2])
        if served:
            asked_of, alone = [row["messages"][:-1] for row in rows], came[FULL][1]
            free = partial(ByEngine, model, FULL, recipe, tools, guided=False, engine=engine)
            if guide_of(asked_of[0], tools, model.tokenizer) is not None:
                one, alone, _ = _came(recipe, name, f"{label} {UNGUIDED}", rows, free(), seed)
                found[name].append(dataclasses.replace(one, depth=UNGUIDED, languages=[]))
            elif any(map(recipe.guide, asked_of)):
                alone = free()(asked_of)
            found[name] += _earned(recipe, rows, alone, came[FULL][0])
    return found, picks.all() if served else [], _examples(recipe, model, engine, asked) if served else []


def _earned(recipe: Recipe, rows: Sequence[Row], alone: Sequence[str], both: Came) -> list[Came]:
    """Whose the figures are: a Came of each of `EARNED`. `alone`: what the model answers where nothing guides it."""
    figures = {ALONE: recipe.score_alone(rows, alone), RULE_ALONE: recipe.score(rows, [""] * len(rows))}
    return [
        dataclasses.replace(both, who=who, depth=who, figures=figures.get(who, both.figures), languages=[], samples=[])
        for who in EARNED
    ]


def of_rivals(models: Models, recipe: Recipe, folder: str, asked: Suites, seed: int) -> tuple[dict[str, list[Came]]]:
    """What comes of each suite without a model."""
    del models
    rivals = recipe.rivals(Path(folder))
    return ({
        name: [_came(recipe, name, rival, rows, answerer, seed)[0] for rival, answerer in rivals.items()]
        for name, rows in asked.items()
    },)  # fmt: skip


def by_language(
    recipe: Recipe, suite: str, who: str, rows: Sequence[Row], answers: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The measures of answers to the rows of each language; none where all rows are of one, or of none that is known."""
    languages = list(dict.fromkeys(str(row["language"]) for row in rows if "language" in row))
    for language in languages if len(languages) > 1 else ():
        places = [place for place, row in enumerate(rows) if row.get("language") == language]
        figures = recipe.score([rows[place] for place in places], [answers[place] for place in places])
        yield {"suite": suite, "who": who, "language": language, "rows": len(places), **_told(figures)}


def _asked(folder: Path, most_rows: int) -> tuple[dict[str, Sequence[Row]], list[str]]:
    """The rows of each suite that are asked, and a sentence for each of which that is not all."""
    every = rows_of(folder, safety=True)
    asked = {name: some_of(rows, most_rows) for name, rows in every.items()}
    notes = [
        f"{name}: {len(asked[name])} of {len(rows)} answers are asked for, drawn by chance, those of a conversation together."
        for name, rows in every.items()
        if len(asked[name]) < len(rows)
    ]
    return asked, notes


def some_of(rows: Sequence[Row], most: int) -> Sequence[Row]:
    """At most so many rows of a suite, always the same ones and in order: those of a conversation together, and others one by
    one, as a group says nothing of what is read; `most` 0, or fewer rows: all."""
    if not most or len(rows) <= most:
        return rows
    of = conversations_of(rows)
    sizes = Counter(of)
    drawn = random.Random(0).sample([*sizes], len(sizes))
    left, kept = most, set[object]()
    for one in drawn:
        if sizes[one] <= left or not kept:
            kept.add(one)
            left -= sizes[one]
    return [row for row, one in zip(rows, of, strict=True) if one in kept][:most]


def _costs(models: Mapping[str, Path]) -> dict[str, Any]:
    """Of each model the bytes of its weights, and tokens a second at batch 1 and 8."""
    speeds = interleaved_speed({label: Model.load(path) for label, path in models.items()}, tokens=SPEED_TOKENS)
    return {
        label: {
            "bytes": files.weight_bytes(path),
            **{f"tokens_per_s_{b}": v[len(v) // 2] for b, v in speeds[label].items()},
        }
        for label, path in models.items()
    }


def weak(
    recipe: Recipe, found: Mapping[str, Mapping[str, Mapping[str, Figure]]], rivals: Sequence[str], model: str
) -> list[str]:
    """A sentence for each suite and measure in which something without a model does better than `model`, or one that says that
    there is none."""
    said = []
    for suite, by in found.items():
        for measure in recipe.measures:
            mine = by[model].get(measure)
            sign = -1 if measure in recipe.least_is_best else 1
            better = [r for r in rivals if mine and measure in by[r] and sign * (by[r][measure].value - mine.value) > 0]
            if mine and better:
                best = max(better, key=lambda r: sign * by[r][measure].value)
                said.append(
                    f"{suite}, {measure}: the model loses to the {best}, {mine.value:.1%} to {by[best][measure].value:.1%}."
                )
    return said or [f"Nothing without a model does better than {model} in any measure of any suite."]


def _came(
    recipe: Recipe, suite: str, who: str, rows: Sequence[Row], answerer: Answerer, seed: int, *, play: bool = True
) -> tuple[Came, list[str], list[tuple[float, int]]]:
    """All measures of who answers, of whole conversations too where they are to `play`; the answers to `rows`, and what these
    ran of a model (`ByEngine.ran`). What is played is no row of the suite, and of those alone is told what ran."""
    answers = answerer([row["messages"][:-1] for row in rows])
    figures, ran, more = recipe.score(rows, answers), list[tuple[float, int]](), dict[str, Any]()
    if isinstance(answerer, ByEngine):
        figures[CALIBRATION], ran = calibration(recipe, rows, answers, answerer.sure), answerer.ran
        more = {"layers": layers_of(ran), "chosen": answerer.chosen, "too_long": answerer.heard.count(None)}
    # the last row of a conversation holds all of it
    whole = list(dict(zip(conversations_of(rows), rows, strict=True)).values()) if play else []
    figures |= recipe.play(whole, answerer, seed) if whole else {}
    languages = list(by_language(recipe, suite, who, rows, answers)) if play else []
    return Came(who, figures, languages, _samples(suite, rows, answers), **more), answers, ran


def _depths(model: Model) -> list[str]:
    return [*model.config.exit_names, *([AUTO] if model.router is not None else [])]


def _column(label: str, depth: str) -> str:
    return label if depth == FULL else f"{label} {depth}"


def _told(figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {
        name: {"value": one.value, "interval": one.ends, "rows": one.rows, "groups": one.groups}
        for name, one in figures.items()
    }


def _samples(suite: str, rows: Sequence[Row], answers: Sequence[str]) -> list[dict[str, str]]:
    """Some answers of a suite, evenly spaced, good or bad."""
    some = range(0, len(rows), max(1, len(rows) // SAMPLES))
    return [
        {"suite": suite, "asked": str(rows[at]["messages"][-2].get("content")), "answered": answers[at]}
        for at in some[:SAMPLES]
    ]


def _examples(recipe: Recipe, model: Model, engine: Engine, asked: Suites) -> list[dict[str, str]]:
    """What the model answers to the recipe's own examples at full depth, good or bad, and what comes of that."""
    answerer = ByEngine(model, FULL, recipe, next(iter(asked.values()))[0].get("tools", []), engine=engine)
    return [
        {"asked": str(messages[-1]["content"]), "answered": recipe.shown(messages, answerer)}
        for messages in recipe.examples()
    ]


def rows_of(folder: Path, *, safety: bool = False) -> dict[str, list[Row]]:
    """The rows of a run's frozen suites, and last of the `safety` ones. Raises DataError for one that changed."""
    every = suites.read(folder / SUITES)
    frozen = [suite for suite in every if suite.kind != SAFETY]
    frozen += [suite for suite in every if suite.kind == SAFETY and safety]
    return {
        suite.name: [json.loads(line) for line in (folder / SUITES / suite.file).read_text("utf-8").splitlines()]
        for suite in frozen
    }
