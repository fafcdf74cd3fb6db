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
from pathlib import Path
from typing import Any

from shoal.api.calls import rewritten
from shoal.api.requests import guide_of
from shoal.config import AUTO, FULL
from shoal.data.chats import forms
from shoal.engine.engine import Engine
from shoal.engine.events import Guide, Request, Sampling
from shoal.evaluate.answering import interleaved_speed, machine
from shoal.evaluate.evaluation import Progress
from shoal.evaluate.intervals import Figure
from shoal.evaluate.measures import Answer, mean_depth
from shoal.inputs.chat import Encoded, encode_chat
from shoal.loop import suites
from shoal.loop.suites import SAFETY
from shoal.model import files
from shoal.model.model import Model
from shoal.recipes.picks import Picks
from shoal.recipes.recipe import CALIBRATION, SUITES, Answerer, Messages, Recipe, Row
from shoal.recipes.sure import calibration

SPEED_TOKENS = 64  # of an answer whose speed is measured
UNGUIDED = "unguided"  # column of the served model's answers where no grammar guides the calls of its tools
SAMPLES = 6  # answers that the report shows of each suite


class ByEngine:
    """A model that answers at a depth, `guided` as a service guides it; `depth_share`: the layers that its answers so far ran,
    of all; `too_long`: how many of the questions so far do not fit the context, and are answered by nothing."""

    def __init__(
        self, model: Model, depth: str, recipe: Recipe, tools: Sequence[Mapping[str, Any]], *, guided: bool = True
    ) -> None:
        self._model, self._depth, self._tools, self._guided = model, depth, list(tools), guided
        self._engine, self._guide = Engine(model), recipe.guide
        self._sampling = Sampling(temperature=0.0, max_tokens=recipe.most_tokens, logprobs=0 if recipe.sure else None)
        self._answers: list[Answer] = []
        # what was answered to a prompt, and how surely: whole conversations begin as turns that were asked
        self._known: dict[tuple[tuple[int, ...], bytes], tuple[str, float, Answer]] = {}
        self.too_long = 0
        self.sure: list[float] = []  # probability that the model gave each answer that was last asked for

    def __call__(self, asked: Sequence[Messages]) -> list[str]:
        prompts = [self._prompt(messages) for messages in asked]
        keys = [(tuple(one.ids), b"" if one.patches is None else one.patches.tobytes()) for one in prompts]
        requests = {}
        for key, prompt, messages in zip(keys, prompts, asked, strict=True):
            fits = len(prompt.ids) + self._sampling.max_tokens <= self._model.config.context
            if fits and key not in self._known:
                sampling = dataclasses.replace(self._sampling, guided=self._guide_of(messages))
                requests[key] = Request(prompt, sampling, depth=self._depth)
        for key, done in zip(requests, self._engine.generate(requests.values()), strict=True):
            logprobs = [one.logprob for one in done.logprobs]
            answer = Answer(done.text, len(done.tokens), done.depth, len(key[0]))
            self._known[key] = self._in_our_words(done.text), math.exp(sum(logprobs)) if logprobs else 0.0, answer
        found = [self._known.get(key) for key in keys]
        self.too_long += found.count(None)
        self._answers += [one[2] for one in found if one is not None]
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
    def depth_share(self) -> float:
        return mean_depth(self._answers) / self._model.config.layers

    @property
    def chosen(self) -> dict[str, float]:
        """The share of the answers so far that each exit gave, the shallowest first."""
        exits = dict(zip(self._model.config.exits, self._model.config.exit_names, strict=True))
        counts = Counter(exits[answer.depth] for answer in self._answers)
        return {name: counts[name] / max(1, len(self._answers)) for name in exits.values()}


def measured(
    recipe: Recipe, models: Mapping[str, Path], folder: Path, seed: int, tell: Progress, *, most_rows: int = 0
) -> dict[str, Any]:
    """The report: ``suites`` (name -> who answers -> measure), ``languages`` (the same of each language, where there are
    several), ``depths`` (of each model and exit; of "auto" which it chose), ``costs`` (bytes, tokens a second), ``samples``,
    ``weak``, sentences about what is weak, and ``notes``, about what was not asked. The last of `models` is the one that is
    served. `most_rows`: of a suite, whole conversations; 0: all. Raises DataError for suites that changed."""
    asked, notes = _asked(folder, most_rows)
    loaded = {label: Model.load(path) for label, path in models.items()}
    rivals, found = recipe.rivals(folder), dict[str, dict[str, dict[str, Figure]]]()
    served = [*loaded][-1]
    picks = Picks(recipe)
    depths: list[dict[str, Any]] = []
    languages: list[dict[str, Any]] = []
    samples: list[dict[str, str]] = []
    total, steps = len(asked) * (len(rivals) + sum(1 + len(one.config.exits) for one in loaded.values())), 0
    for name, rows in asked.items():
        found[name] = {}
        for rival, answerer in rivals.items():
            tell(f"{rival} on {name}", steps, total)
            found[name][rival], answers = _all(recipe, rows, answerer, seed)
            languages += by_language(recipe, name, rival, rows, answers)
            steps += 1
        for label, model in loaded.items():
            for depth in _depths(model):
                tell(f"{label} at {depth} on {name}", steps, total)
                answerer = ByEngine(model, depth, recipe, rows[0].get("tools", []))
                figures, answers = _all(recipe, rows, answerer, seed, play=depth in (AUTO, FULL))
                # a depth is picked by what is known: a safety suite asks one kind of thing alone
                if not name.startswith(SAFETY):
                    picks.saw(rows, answers, depth, answerer.depth_share if label == served else None)
                steps += 1
                if depth in (AUTO, FULL):
                    found[name][_column(label, depth)] = figures
                    languages += by_language(recipe, name, _column(label, depth), rows, answers)
                row = {"suite": name, "model": label, "depth": depth, "layers": answerer.depth_share}
                depths.append(row | ({"chosen": answerer.chosen} if depth == AUTO else {}) | _told(figures))
                if answerer.too_long and depth == FULL:
                    notes.append(
                        f"{name}: {answerer.too_long} prompts do not fit {label}'s context, and have no answer."
                    )
        found[name] |= _unguided(recipe, rows, served, loaded[served], seed)
        samples += _samples(name, rows, answers)
    suites.use(
        folder / SUITES, {"recipe": recipe.name, "models": [files.weights_sha256(path) for path in models.values()]}
    )
    return {
        "recipe": recipe.name,
        "machine": machine(),
        "rows": {name: [len(rows), len({row["group"] for row in rows})] for name, rows in asked.items()},
        "weak": weak(recipe, found, list(rivals), _column(served, _served_at(recipe, loaded[served]))),
        "notes": notes,
        "suites": {name: {who: _told(figures) for who, figures in by.items()} for name, by in found.items()},
        "languages": languages,
        "depths": depths,
        "workloads": picks.all(),
        "costs": _costs(loaded, models),
        "samples": samples,
        "examples": _examples(recipe, loaded[served], next(iter(asked.values()))[0].get("tools", [])),
    }


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
        f"{name}: {len(asked[name])} of {len(rows)} answers are asked for, of conversations drawn by chance."
        for name, rows in every.items()
        if len(asked[name]) < len(rows)
    ]
    return asked, notes


def some_of(rows: Sequence[Row], most: int) -> Sequence[Row]:
    """At most so many rows of a suite, whole conversations, always the same ones and in order; `most` 0, or fewer rows: all."""
    if not most or len(rows) <= most:
        return rows
    sizes = Counter(row["group"] for row in rows)
    drawn = random.Random(0).sample([*sizes], len(sizes))
    left, kept = most, set()
    for group in drawn:
        if sizes[group] <= left:
            kept.add(group)
            left -= sizes[group]
    return [row for row in rows if row["group"] in kept]


def _costs(loaded: dict[str, Model], models: Mapping[str, Path]) -> dict[str, Any]:
    """Of each model the bytes of its weights, and tokens a second at batch 1 and 8."""
    speeds = interleaved_speed(loaded, tokens=SPEED_TOKENS)
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


def _all(
    recipe: Recipe, rows: Sequence[Row], answerer: Answerer, seed: int, *, play: bool = True
) -> tuple[dict[str, Figure], list[str]]:
    """All measures of who answers, of whole conversations too where they are to `play`, and the answers to `rows`."""
    answers = answerer([row["messages"][:-1] for row in rows])
    # the last row of a conversation holds all of it
    figures = recipe.score(rows, answers)
    sure = getattr(answerer, "sure", None)  # of a model; a rule does not say
    if recipe.sure and sure is not None:
        figures[CALIBRATION] = calibration(recipe, rows, answers, sure)
    whole = list({row["group"]: row for row in rows}.values()) if play else []
    return figures | (recipe.play(whole, answerer, seed) if whole else {}), answers


def _unguided(recipe: Recipe, rows: Sequence[Row], label: str, model: Model, seed: int) -> dict[str, dict[str, Figure]]:
    """The measures of a model at full depth where nothing guides its calls of tools, by column; none where nothing does
    anyway."""
    tools = rows[0].get("tools", [])
    if guide_of(rows[0]["messages"][:-1], tools, model.tokenizer) is None:
        return {}
    return {f"{label} {UNGUIDED}": _all(recipe, rows, ByEngine(model, FULL, recipe, tools, guided=False), seed)[0]}


def _depths(model: Model) -> list[str]:
    return [*model.config.exit_names, *([AUTO] if model.router is not None else [])]


def _served_at(recipe: Recipe, model: Model) -> str:
    """The depth at which questions that name none are answered: the policy's full depth, or the router's."""
    return FULL if recipe.policy().depth == FULL else _depths(model)[-1]


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


def _examples(recipe: Recipe, model: Model, tools: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What the model answers to the recipe's own examples at full depth, good or bad, and what comes of that."""
    answerer = ByEngine(model, FULL, recipe, tools)
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
