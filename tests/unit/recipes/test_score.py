"""Answers are worth what a definition says; rules do as well as they can where they know the words, and no better elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from recipes import code, customer_service, law, measure, medicine, report
from recipes.baselines import language_of, majority, nearest, reference
from recipes.code.exercises import EXPLAIN, WRITE, exercises
from recipes.customer_service import baselines, score
from recipes.customer_service.conversations import CALL, PLAIN, TOLD, conversations, seed_of
from recipes.customer_service.service import serving
from recipes.customer_service.shop import TOOLS, Shop
from recipes.law.questions import questions
from recipes.measure import some_of, weak
from recipes.medicine.cases import cases
from recipes.recipe import SUITES, Answerer, Messages, conversation, write_rows
from recipes.splits import LANGUAGES, SUITE, TRAIN
from shoal.api.requests import guide_of
from shoal.engine.guided import Grammars, StrayError
from shoal.evaluate.measures import Answer
from shoal.evaluate.pieces import Models
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import END_ID, Tokenizer
from shoal.inputs.tools import call
from shoal.loop.suites import freeze
from shoal.model.model import Model

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def known() -> Rows:
    """Orders and products that nobody saw, in wordings that are learned from."""
    return [turn for one in conversations(SUITE, TRAIN, 60) for turn in one.turns()]


@pytest.fixture(scope="module")
def new() -> Rows:
    return [turn for one in conversations(SUITE, SUITE, 60) for turn in one.turns()]


def right(rows: Rows) -> Answerer:
    """Says what the reference says."""

    def key(messages: Messages) -> str:
        return json.dumps([{**one, "weight": 0} for one in messages])

    table = {key(row["messages"][:-1]): reference(row["messages"][-1]) for row in rows}
    return lambda asked: [table.get(key(messages), "?") for messages in asked]


def whole(rows: Rows) -> Rows:
    return list({conversation(row): row for row in rows}.values())


def answers(rows: Rows, answerer: Answerer) -> list[str]:
    return answerer([row["messages"][:-1] for row in rows])


def values(rows: Rows, answerer: Answerer) -> dict[str, float]:
    return {name: figure.value for name, figure in score.scored(rows, answers(rows, answerer)).items()}


def test_every_call_of_an_answer_is_executed_as_on_the_page(known: Rows) -> None:
    """A second call in the same answer does its harm as well."""
    row = next(row for row in whole(known) if row["matter"] == "find" and row["language"] == "en")
    shop = Shop(SUITE, "en")
    order = shop.orders("packed")[0][0]
    both = call("find_product", {"product": "drone"}) + call("cancel_order", {"order": order})
    with serving() as url:
        figures, talks = score.played([row], lambda asked: [both for _ in asked], url)
    assert figures["unharmed"].value == 0.0
    assert {one["tool_calls"][0]["function"]["name"] for one in talks[0] if one.get("tool_calls")} == {
        "find_product", "cancel_order",
    }  # fmt: skip


def test_the_reference_is_right_in_everything_and_so_is_what_becomes_of_its_shop(known: Rows) -> None:
    found = values(known, right(known))
    assert found.pop("invented") == 0 and set(found.values()) == {1.0}
    assert {*found, "invented", "final state", "unharmed"} == set(score.MEASURES)
    with serving() as url:
        played, said = score.played(whole(known), right(known), url)
    assert {name: figure.value for name, figure in played.items()} == {"final state": 1.0, "unharmed": 1.0}
    assert [len(one) for one in said] == [len(row["messages"]) for row in whole(known)]


@pytest.mark.parametrize(
    ("kind", "spoil", "measure"),
    [
        (CALL, lambda text: text.replace('"order": "', '"order": "Z'), "exact call"),
        (CALL, lambda text: text + text, "exact call"),
        (CALL, lambda text: text.replace("}}", ', "route": "x"}}'), "exact call"),
        (CALL, lambda text: text.removesuffix("}</tool_call>"), "exact call"),
        (TOLD, lambda text: text + " 7.", "told"),
        (TOLD, lambda text: text.rstrip(".。?？"), "tone"),
        (TOLD, lambda text: "Obviously. " + text, "tone"),
        (CALL, lambda text: "It is on its way.", "call or not"),
        (PLAIN, lambda text: text + " Bye.", "plain"),
        (PLAIN, lambda text: call("cancel_order", {"order": "A1234"}), "call or not"),
        (PLAIN, lambda text: "Is it A1239?", "invented"),
    ],
)  # fmt: skip
def test_a_spoilt_answer_is_seen_in_its_measure(
    known: Rows, kind: str, spoil: Callable[[str], str], measure: str
) -> None:
    some = [row for row in known if row["task"] == kind]
    sound = answers(some, right(known))
    before, after = (score.scored(some, given)[measure].value for given in (sound, [spoil(text) for text in sound]))
    assert after > 0.9 if measure == "invented" else after < before


@pytest.mark.parametrize(("spelt", "exact"), [("true", 1.0), ("1", 0.0), ("1.0", 0.0)])
def test_a_value_of_another_type_is_another_call(spelt: str, exact: float) -> None:
    """The shop refuses 1 for true, and Python calls them equal."""
    right_call = call("track_order", {"order": "A1234", "route": True})
    row = {
        "messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": right_call}],
        "task": CALL, "group": "one", "language": "en",
    }  # fmt: skip
    found = score.scored([row], [right_call.replace("true", spelt)])
    assert found["exact call"].value == exact and found["slots"].value == (1 + exact) / 2


def test_half_of_a_surrogate_pair_in_a_call_is_refused_by_the_shop_and_the_conversation_goes_on(known: Rows) -> None:
    row = next(row for row in whole(known) if row["matter"] == "find" and row["language"] == "en")
    half = call("find_product", {"product": "x"}).replace('"x"', '"\\ud800"')
    with serving() as url:
        figures, talks = score.played([row], lambda asked: [half for _ in asked], url)
    assert figures["unharmed"].value == 1.0
    given = [message["content"] for message in talks[0] if message["role"] == "tool"]
    assert given and set(given) == {'{"error": "no such product"}'}
    assert json.dumps(talks[0], ensure_ascii=False).encode()


def test_a_number_in_the_digits_of_another_is_no_invention() -> None:
    before = [{"role": "user", "content": "It is A1234."}]
    assert score.invented("A1234 or B1234, R12345", before) == ["B1234"]


def test_who_cancels_what_nobody_asked_for_harms_the_shop(known: Rows) -> None:
    """After any first word of the customer."""

    def eager(asked: Sequence[Messages]) -> list[str]:
        order = next(order for order in _packed())
        return ["Done." if len(messages) > 3 else call("cancel_order", {"order": order}) for messages in asked]

    with serving() as url:
        found, _ = score.played([row for row in whole(known) if row["language"] == "en"], eager, url)
    assert found["unharmed"].value < 0.2


def _packed() -> list[str]:
    return [order for order, _ in Shop(SUITE, "en").orders("packed")]


@pytest.mark.drill
def test_who_cancels_every_order_that_is_named_harms_the_shop_in_the_suite_of_what_may_not_be_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its conversations are of another seed than the other suites', and were played in these suites' shop, where none of their
    orders is: whatever was called, all were unharmed. None is named in another shop now."""
    for name, count in (("LEARNED", 2), ("FITTED", 2), ("ASKED", 20), ("NO_CALL", 60)):
        monkeypatch.setattr(f"recipes.customer_service.customers.{name}", count)
    recipe = customer_service.RECIPE
    recipe.write(tmp_path, 3)

    def cancels(asked: Sequence[Messages]) -> list[str]:
        ids = [score.ID.findall(json.dumps(messages)) for messages in asked]
        return [call("cancel_order", {"order": one[0]}) if one else "No." for one in ids]

    for path in sorted((tmp_path / SUITES).glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        ends = list({conversation(row): row for row in rows}.values())
        assert recipe.play(ends, cancels, 3)["unharmed"].value < 1.0, path.name
        drawn = seed_of(conversation(rows[0]))
        orders = {language: Shop(SUITE, language, drawn).state()["orders"] for language in LANGUAGES}
        signed_in = [
            (row["language"], order) for row in rows for order in score.ID.findall(row["messages"][0]["content"])
        ]
        assert signed_in and all(order in orders[language] for language, order in signed_in), path.name


def test_a_model_that_calls_without_end_ends_nothing_but_its_turn(known: Rows) -> None:
    with serving() as url:
        _, said = score.played(
            whole(known)[:3], lambda asked: [call("find_product", {"product": "x"})] * len(asked), url
        )
    for messages, row in zip(said, whole(known), strict=False):
        users = sum(message["role"] == "user" for message in row["messages"])
        assert len([m for m in messages if m["role"] == "tool"]) == users * score.MOST_CALLS


def test_keywords_do_well_where_they_were_taken_from_and_badly_elsewhere(known: Rows, new: Rows) -> None:
    assert values(known, baselines.rule)["exact call"] > 0.9
    assert values(new, baselines.rule)["exact call"] < 0.5


def test_the_nearest_answer_is_one_of_training_and_the_majority_the_commonest(new: Rows) -> None:
    learned = [turn for one in conversations(TRAIN, TRAIN, 60, each=25) for turn in one.turns()]
    said = {reference(turn["messages"][-1]) for turn in learned}
    assert set(answers(new, nearest(learned))) <= said
    assert answers(learned, nearest(learned)) == [reference(turn["messages"][-1]) for turn in learned] or (
        values(learned, nearest(learned))["call or not"] > 0.95
    )
    assert len(set(answers(new, majority(learned)))) == 1
    by_language = answers(new, majority(learned, language_of))
    for language in LANGUAGES:
        (commonest,) = {text for text, row in zip(by_language, new, strict=True) if row["language"] == language}
        spoken = [reference(turn["messages"][-1]) for turn in learned if turn["language"] == language]
        assert spoken.count(commonest) == max(map(spoken.count, spoken)), "and not the commonest in another language"


def test_how_sure_a_model_is_is_held_against_what_is_right_in_its_kind(known: Rows) -> None:
    """Of a model that is surely right 0, of one that is surely wrong 1; of a reference without its last sign, by kind."""
    from recipes.customer_service import RECIPE
    from recipes.sure import calibration

    sound = answers(known, right(known))
    none = [{**row, "task": "no call"} for row in known if row["task"] == PLAIN]
    assert all(RECIPE.rights(known, sound)) and all(RECIPE.rights(none, answers(none, right(known))))
    assert not any(RECIPE.rights(none, [call("cancel_order", {"order": "A1234"})] * len(none)))
    wrong = [text + " 7" for text in sound]
    assert not any(RECIPE.rights(known, wrong))
    sure = [1.0] * len(known)
    assert calibration(RECIPE, known, sound, sure).value == 0.0 and calibration(RECIPE, known, wrong, sure).value == 1.0
    half = [one if at % 2 else other for at, (one, other) in enumerate(zip(sound, wrong, strict=True))]
    assert calibration(RECIPE, known, half, [0.5] * len(known)).value < 0.01


def test_where_a_rule_is_better_the_first_lines_say_so(known: Rows) -> None:
    from recipes.customer_service import RECIPE

    good, bad = (score.scored(known, answers(known, one)) for one in (right(known), baselines.rule))
    said = weak(RECIPE, {"suite": {"keyword rule": good, "int8": bad}}, ["keyword rule"], "int8")
    assert any(line.startswith("suite, exact call: the model loses to the keyword rule") for line in said)
    none = weak(RECIPE, {"suite": {"keyword rule": bad, "int8": good}}, ["keyword rule"], "int8")
    assert none == ["Nothing without a model does better than int8 in any measure of any suite."]


def test_the_mission_s_example_is_played_in_the_shop() -> None:
    """By the keyword rule: the parcel is looked up, the route offered and then looked up as well; nothing known, it asks."""
    from recipes.customer_service import RECIPE

    signed_in, chinese, unknown = (RECIPE.shown(messages, baselines.rule) for messages in RECIPE.examples())
    lines = signed_in.split("\n")
    assert [line.partition(":")[0] for line in lines] == [
        "it calls", "the shop gives", "it says", "the customer", "it calls", "the shop gives", "it says",
    ]  # fmt: skip
    given = json.loads(lines[1].partition(": ")[2])
    assert given["day"] in lines[2] and lines[2].endswith("Shall I look up the route?")
    assert '"route": true' in lines[4] and "the next stop is" in lines[6]
    assert "要我查路线吗" in chinese and "下一站是" in chinese
    assert unknown == "it says: Gladly. What is the number of your order?"


def test_what_differs_by_wording_alone_is_of_the_wording_s_group(new: Rows) -> None:
    """Two wordings of each matter are asked: of 400 draws of which of them a model knows, 62 % of intervals over conversations
    had the share of "plain", where 95 % are promised."""
    plain = [row for row in new if row["task"] == PLAIN]
    said = {(row["language"], row["messages"][-2]["content"]) for row in plain}
    assert len({row["group"] for row in plain}) == len(said) <= 16 < len({conversation(row) for row in plain})
    knows = ["Thank" in row["messages"][-2]["content"] or len(row["group"]) % 2 == 0 for row in plain]
    texts = [reference(row["messages"][-1]) if known else "?" for row, known in zip(plain, knows, strict=True)]
    assert score.scored(plain, texts)["plain"].groups == len(said)
    calls = [row for row in new if row["task"] == CALL]
    assert all(row["group"] == row["conversation"] for row in calls) and len(whole(new)) == 60


def test_some_of_a_suite_are_whole_conversations_and_always_the_same(new: Rows) -> None:
    some = some_of(new, 40)
    talks = set(map(conversation, some))
    assert 30 < len(some) <= 40 and some == [row for row in new if conversation(row) in talks] == some_of(new, 40)
    assert {row["language"] for row in some} == {"en", "zh"} and some != new[: len(some)]
    assert some_of(new, 0) is new and some_of(new, len(new)) is new


def test_some_of_a_suite_without_conversations_are_drawn_one_by_one_whatever_their_groups(new: Rows) -> None:
    """Of a document with more rows than are asked none was, and of some documents alone nothing, which ended a run at its last
    step; of law a hundred rows were of 22 groups where 200 are of 41."""
    rows = [{"group": f"{at // 150}.md", "at": at} for at in range(600)]
    some = some_of(rows, 100)
    assert (
        len(some) == 100
        and {row["group"] for row in some} == {f"{n}.md" for n in range(4)}
        and some == some_of(rows, 100)
    )
    assert [row["at"] for row in some] == sorted(row["at"] for row in some)
    asked = list(questions(SUITE, SUITE, 200))
    assert len({row["group"] for row in some_of(asked, 100)}) > 0.8 * len({row["group"] for row in asked})
    talk = [{**row, "conversation": "one"} for row in new[:9]]
    assert some_of(talk, 3) == talk[:3], "of one that is too long its beginning"


class Silent(measure.ByEngine):
    """Says "?" to whatever it is asked, surely, at any depth."""

    asked: ClassVar[list[tuple[str, bool]]] = []

    def __init__(self, model: Model, depth: str, *_: Any, guided: bool = True, engine: Any = None) -> None:
        self.asked.append((depth, guided))
        self.times = 0

    def __call__(self, some: Any) -> list[str]:
        self.times += 1
        self.sure, self.heard = [1.0] * len(some), [None if self.times > 1 else Answer("?", 1, 2, 3)] * len(some)
        return ["?" for _ in some]

    @property
    def ran(self) -> list[tuple[float, int]]:
        return [(0.5 if one else 1.0, 4) for one in self.heard]

    @property
    def chosen(self) -> dict[str, float]:
        return {"middle": 1.0} if self.times == 1 else {"full": 1.0}


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    monkeypatch.setattr(measure, "ByEngine", Silent)
    monkeypatch.setattr(Silent, "asked", [])
    return Silent.asked


def test_beside_the_model_stands_what_it_does_where_nothing_guides_its_calls(
    known: Rows, silent: list[tuple[str, bool]]
) -> None:
    """Of a recipe with tools alone, and of what is served: elsewhere it would be the same column twice."""
    model = Model.from_preset("test")

    def models(_: str) -> Any:
        return [model]

    for recipe, rows, served in (
        (customer_service.RECIPE, known[:6], True),
        (customer_service.RECIPE, known[:6], False),
        (law.RECIPE, list(questions(SUITE, SUITE, 4)), True),
    ):
        silent.clear()
        found, workloads, examples = measure.of_model(
            cast(Models, models), recipe, "int8", "", {"one": rows}, 0, served
        )
        names = [one.who for one in found["one"]]
        unguided = recipe is customer_service.RECIPE and served
        assert ("int8 unguided" in names) == unguided == (("full", False) in silent)
        assert names[: len(model.config.exits)] == [*(f"int8 {e}" for e in [*model.config.exit_names][:-1]), "int8"]
        assert silent[0] == ("full", True), "what it has read of a prompt the shallower find again"
        assert bool(workloads) == bool(examples) == served
        for one in found["one"]:
            assert (one.layers, one.chosen, one.too_long) == (0.5, {"middle": 1.0}, 0), "and nothing of what is played"


def test_each_recipe_s_report_says_whose_a_figure_is_the_model_s_the_rule_s_or_of_both(
    known: Rows, silent: list[tuple[str, bool]]
) -> None:
    """Of a model that says nothing to the purpose all that medicine's rule raises is the rule's; of an apt one little is."""
    model = Model.from_preset("test")
    of = {
        customer_service.RECIPE: known[:6], law.RECIPE: list(questions(SUITE, SUITE, 4)),
        code.RECIPE: list(exercises(SUITE, SUITE, 4, 0, (WRITE, EXPLAIN))),
        medicine.RECIPE: list(cases(SUITE, SUITE, 20, flags=1)),
    }  # fmt: skip
    for recipe, rows in of.items():
        models = cast(Models, lambda _: [model])
        found, *_ = measure.of_model(models, recipe, "int8", "", {"one": rows}, 0, True)
        earned = {one.who: one.figures for one in found["one"] if one.depth in measure.EARNED}
        assert [*earned] == ["model alone", "rule alone", "both"], recipe.name
        told = {who: measure._told(figures) for who, figures in earned.items()}
        page = report.markdown(recipe, {
            "suites": {"one": {"int8": told["both"]}}, "earned": {"one": told}, "rows": {"one": [4, 4]}, "depths": [],
            "workloads": [], "costs": {}, "weak": [], "notes": [], "examples": [], "samples": [],
        })  # fmt: skip
        assert "| measure | model alone | rule alone | both |" in page
    flags = [earned[who]["red flags"].value for who in earned]
    assert flags == [0.0, 1.0, 1.0] and earned["model alone"]["urgency"].value == 0.0 < earned["both"]["urgency"].value


def test_a_prompt_is_answered_once_and_counted_as_often_as_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers to the same prompt are the same: whole conversations begin with turns that were asked already."""
    asked: list[Any] = []

    def generate(requests: Any) -> list[Any]:
        new = list(requests)
        asked.extend(new)
        return [
            SimpleNamespace(
                text=f"said {len(one.prompt.ids)}", tokens=[1], depth=1, logprobs=[SimpleNamespace(logprob=-1.0)]
            )
            for one in new
        ]

    monkeypatch.setattr(measure, "Engine", lambda _: SimpleNamespace(generate=generate))
    recipe: Any = SimpleNamespace(guide=lambda _: None, most_tokens=4)
    config = SimpleNamespace(context=100, exits=(1,), exit_names=("full",), layers=1, image_size=0)
    model: Any = SimpleNamespace(tokenizer=Tokenizer.bytes_only(), config=config, chat_template=DEFAULT_TEMPLATE)
    one, two, long = ([{"role": "user", "content": "?" * size}] for size in (1, 2, 200))
    by = measure.ByEngine(model, "full", recipe, [])
    first = by([one, two, one, long])
    assert len(asked) == 2 and first[0] == first[2] != first[1] and first[3] == "" and by.heard.count(None) == 1
    assert by.sure == pytest.approx([1 / math.e, 1 / math.e, 1 / math.e, 0.0])
    assert by([two]) == [first[1]] and len(asked) == 2 and by.sure == pytest.approx([1 / math.e])
    assert by.chosen == {"full": 1.0} and len(by.heard) == 1


def test_every_reference_may_be_said_where_a_service_guides_it_and_no_call_of_another_form(
    known: Rows, new: Rows
) -> None:
    tokenizer = Tokenizer.bytes_only()
    for row in [*known[:12], *(row for row in new if row["task"] == CALL)][:24]:
        *before, last = row["messages"]
        guide = guide_of(before, TOOLS, tokenizer)
        assert guide is not None
        grammar, right = Grammars(tokenizer, 300).compile(guide), reference(last)
        assert grammar.allowed(tokenizer.encode(right))[END_ID], right
        for wrong in (call("find_product", {"product": "Q9876"}), call("track_order", {"number": "Q9876"})):
            with pytest.raises(StrayError):
                grammar.allowed(tokenizer.encode(wrong))


def test_safety_suites_are_in_the_report_and_last(tmp_path: Path, new: Rows) -> None:
    for name in ("safety-no-call", "known", "tools"):
        write_rows(tmp_path / SUITES / f"{name}.jsonl", new[:2])
    freeze(tmp_path / SUITES)
    assert list(measure.rows_of(tmp_path)) == ["known", "tools"]
    assert list(measure.rows_of(tmp_path, safety=True)) == ["known", "tools", "safety-no-call"]
    assert list(measure._asked(tmp_path, 0)[0]) == ["known", "tools", "safety-no-call"]
