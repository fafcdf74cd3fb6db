"""An argument that must have been said is chosen among what was, and a tool that needs one of which none was is not called."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from shoal.api.bodies import ChatRequest
from shoal.api.said import MOST, may_be_called
from shoal.api.tools import Offer
from shoal.engine.events import Guide
from shoal.engine.guided import Grammars, StrayError
from shoal.errors import RequestError
from shoal.inputs.tokenizer import Tokenizer
from shoal.inputs.tools import functions
from tests.unit.api.test_tools import follows, tool
from tests.unit.open_weights.taught import tokenizer
from tests.unit.open_weights.test_call_formats import FAMILIES, offer
from tests.unit.open_weights.test_strict_calls import FORMATS, asked, letters, reads, spellings

ORDER = {"type": "string", "x-said": "[A-Z][0-9]{4}"}
TRACK = tool("track", order=ORDER)
FIND = tool("find", strict=True, product={"type": "string", "pattern": "^[^0-9]+$"})
SAID = [{"role": "user", "content": "Where are A1234 and B2345?"}]
SILENT = [{"role": "user", "content": "Where is my order?"}]
CALL = '<tool_call>{"name": "track", "arguments": {"order": "A1234"}}</tool_call>'
FOUND = '<tool_call>{"name": "find", "arguments": {"product": "lamp"}}</tool_call>'


def guide(messages: list[dict[str, Any]], tools: list[dict[str, Any]], **fields: Any) -> Guide:
    found = Offer(ChatRequest.model_validate({"model": "m", "messages": messages, "tools": tools, **fields})).guide
    assert found is not None
    return found


def choosable(messages: list[dict[str, Any]], **schema: Any) -> list[Any]:
    given = tool("track", order={**ORDER, **schema})
    body = ChatRequest.model_validate({"model": "m", "messages": messages, "tools": [given]})
    functions_ = {one.function.name: one.function for one in body.tools}
    called = may_be_called(functions_, body.messages)
    found: list[Any] = called["track"].parameters["properties"]["order"]["enum"] if called else []
    return found


def test_what_was_said_may_be_called_and_nothing_else() -> None:
    free = guide(SAID, [TRACK, FIND])
    for good in ("Which one?", CALL, CALL.replace("A1234", "B2345"), f"Let me see. {CALL}\n{CALL}", FOUND):
        assert follows(free, good), good
    for bad in (
        CALL.replace("A1234", "C3456"),
        CALL.replace("A1234", ""),
        CALL.replace('"A1234"', '"A1234", "more": "C3456"'),
        CALL.replace("1234", "\\u00312345"),
        FOUND.replace("lamp", "C3456"),
        FOUND.replace("lamp", "C\\u0033456"),
        FOUND.replace('"lamp"', '"lamp", "order": "C3456"'),
        f"Which? {CALL.replace('A1234', 'C3456')}",
    ):
        assert not follows(free, bad), bad


def test_where_none_was_said_the_tool_is_not_called_and_words_are_free() -> None:
    both, alone = guide(SILENT, [TRACK, FIND]), guide(SILENT, [TRACK])
    for asks in (both, alone):
        assert follows(asks, "What is your order's number?") and follows(asks, "A < b <tool_cal")
        assert not follows(asks, CALL) and not follows(asks, f"I look: {CALL}")
    assert follows(both, FOUND) and not follows(alone, FOUND)


def test_who_says_it_is_not_the_model() -> None:
    """Its own words, and its own calls, are no evidence; a customer's, an operator's and a tool's are."""
    call = {"id": "c", "type": "function", "function": {"name": "track", "arguments": '{"order": "D4567"}'}}
    chat = [
        {"role": "system", "content": "Signed in: A1234."},
        {"role": "user", "content": [{"type": "text", "text": "What of B2345"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "Is it C3456?", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": '{"orders": ["E5678"]}'},
        {"role": "developer", "content": "or F6789"},
    ]
    assert choosable(chat) == ["A1234", "B2345", "E5678", "F6789"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("订单A1234的包裹", ["A1234"]),
        ("a label R01234, xA1234, A12345, A1234_", []),
        ("A1234, B2345;C3456 (A1234)", ["B2345", "C3456", "A1234"]),  # what was said last stands last
        ("order\0A1234", ["A1234"]),
        ("half of a pair \ud800 A1234", ["A1234"]),
        ("", []),
    ],
)
def test_a_value_stands_as_a_word(text: str, found: list[str]) -> None:
    assert choosable([{"role": "user", "content": text}]) == found


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("#[0-9]+", "Where is order #1234, and #12?", ["#1234", "#12"]),
        ("#[0-9]+", "order#1234", ["#1234"]),
        ("#[0-9]+", "#1234_", []),
        (r"Nr\. ?[0-9]+", "Nr. 12, Nr.13, aNr.14", ["Nr. 12", "Nr.13"]),
        ("№ ?[0-9]+", "№ 12 и №13", ["№ 12", "№13"]),
        ("单[0-9]{4}", "我的订单1234到了吗", ["单1234"]),
        ("[0-9]{4}号", "订单1234号在哪。a1234号", ["1234号"]),
        ("[0-9]+%", "20% off, or 5%off", ["20%", "5%"]),
        ("ÄB[0-9]+", "die ÄB12", ["ÄB12"]),
        ("-?[0-9]+", "between -3 and 4", ["-3", "3", "4"]),  # either was said
        ("[0-9.]+", "1.5, or 2.", ["1.5", "2", "2."]),
    ],
)
def test_a_value_that_begins_or_ends_in_no_letter_of_words_is_found(pattern: str, text: str, found: list[str]) -> None:
    """At such an end there is no edge of a word, which is no reason for the number not to have been said."""
    assert choosable([{"role": "user", "content": text}], **{"x-said": pattern}) == found


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        ("[A-Z][a-z]+( [A-Z][a-z]+)?", "I am Dear Anna Smith", ["Dear Anna", "Anna Smith", "Smith"]),
        ("[0-9]{4} [0-9]{4}", "1234 5678 9012 34", ["1234 5678", "5678 9012"]),
        ("[a-z]+ [a-z]+", "red lamp shade", ["red lamp", "lamp shade"]),
        ("#[0-9]+[# ]#?[0-9]+", "#1 #2 #3", ["#1 #2", "#2 #3"]),
        ("[0-9-]+", "on 2026-06-10", ["2026-06-10"]),  # a part of what was said is another date
        ("(?m)^[A-Z][a-z]+( [A-Z][a-z]+)?", "for\nAnna Smith Jones", ["Anna Smith"]),  # no line begins with Smith
    ],
)
def test_of_values_that_overlap_each_was_said(pattern: str, text: str, found: list[str]) -> None:
    """Looked for one after the other, the first takes the second's beginning away: nobody could name Anna Smith."""
    assert choosable([{"role": "user", "content": text}], **{"x-said": pattern}) == found


@pytest.mark.parametrize(
    ("most", "text", "found"),
    [
        (2, "Is the red-hot lamp sold?", [
            "Is", "Is the", "the", "the red-hot", "red-hot", "red-hot lamp", "lamp", "lamp sold", "sold",
        ]),
        (2, "A lamp, a tent\nor pots", ["A", "A lamp", "lamp", "a", "a tent", "tent", "or", "or pots", "pots"]),
        (3, "有面包机吗。", ["有", "有面", "面", "有面包", "面包", "包", "面包机", "包机", "机", "包机吗", "机吗", "吗"]),
        (1, "เอา กาแฟ", ["เ", "อ", "ก", "า", "แ", "ฟ"]),
        (2, "买一个iPhone 15", ["买", "买一", "一", "一个", "个", "个iPhone", "iPhone", "iPhone 15", "15"]),
        (1, "l\u2019eau, o'clock -x- हिन्दी 'a'", ["l\u2019eau", "o'clock", "x", "हिन्दी", "a"]),
        (1, "a b a", ["b", "a"]),  # what was said last stands last
        (8, "?!", []),
        (1, "a" * 201 + " b", ["b"]),
        (1, "x" * 100 + " a" * 1990, ["a"]),  # what half of is looked at is not half of what was said
    ],
)  # fmt: skip
def test_any_run_of_words_that_was_said(most: int, text: str, found: list[str]) -> None:
    """A thing that has no form of its own: with spaces alone between its words, in a script without spaces by its letters."""
    assert choosable([{"role": "user", "content": text}], **{"x-said": {"words": most}}) == found


def test_of_runs_the_last_are_kept_and_a_long_chat_takes_no_longer() -> None:
    chat = [{"role": "user", "content": " ".join(f"w{number}" for number in range(1500))}] * 30
    found = choosable(chat, **{"x-said": {"words": 8}})
    assert len(found) == MOST and found[-1] == "w1499" and found[-2] == "w1498 w1499"
    assert choosable([{"role": "user", "content": "字" * 300_000}], **{"x-said": {"words": 8}}) == [
        "字" * count for count in range(8, 0, -1)
    ]


def test_a_product_is_one_that_was_said() -> None:
    """As a customer spells it, in the shop of customer service and anywhere."""
    find = tool("find", strict=True, product={"type": "string", "x-said": {"words": 4}})
    free = guide([{"role": "user", "content": "Do you sell a garden lamp?"}], [find])
    assert follows(free, FOUND) and follows(free, FOUND.replace("lamp", "garden lamp"))
    for bad in ("tent", "lam", "a  garden lamp", "lamp?", ""):
        assert not follows(free, FOUND.replace("lamp", bad)), bad
    both = tool("find", strict=True, product={"type": "string", "pattern": "^[^0-9]+$", "x-said": {"words": 4}})
    free = guide([{"role": "user", "content": "Do you sell a lamp A1234?"}], [both])
    assert follows(free, FOUND) and not follows(free, FOUND.replace("lamp", "lamp A1234"))
    # An expression, which matches nothing here.
    spelt = tool("track", order={"type": "string", "x-said": "{'words': 4}"})
    free = guide([{"role": "user", "content": "A garden lamp?"}], [find, spelt])
    assert follows(free, FOUND) and not follows(free, CALL.replace("A1234", "lamp"))
    number = tool("find", strict=True, product={"type": "integer", "x-said": {"words": 1}})
    asks = guide([{"role": "user", "content": "Send 12 of them"}], [number])
    assert follows(asks, FOUND.replace('"lamp"', "12")) and not follows(asks, FOUND.replace('"lamp"', "13"))


def test_of_a_thousand_values_and_more_the_last_are_kept() -> None:
    many = " ".join(f"A{number:04d}" for number in range(1500))
    assert choosable([{"role": "user", "content": many}]) == [f"A{number:04d}" for number in range(500, 1500)]


def test_the_argument_s_own_schema_holds_too() -> None:
    numbers = [{"role": "user", "content": "7, 008 and 12"}]
    assert choosable(numbers, **{"type": "integer", "x-said": "[0-9]+"}) == [7, 8, 12]
    assert choosable(SAID, enum=["B2345", "C3456"]) == ["B2345"]
    assert choosable(SAID, enum=["C3456"]) == []


def test_an_argument_that_is_not_needed_is_left_out_where_nothing_was_said() -> None:
    optional = tool("track", order=ORDER, city={"type": "string"})
    optional["function"]["parameters"]["required"] = ["city"]
    silent, said = guide(SILENT, [optional]), guide(SAID, [optional])
    city, both = CALL.replace('"order": "A1234"', '"city": "Ulm"'), CALL.replace('"A1234"', '"A1234", "city": "Ulm"')
    assert follows(silent, city) and not follows(silent, both)
    assert follows(said, city) and follows(said, both) and not follows(said, both.replace("A1", "B9"))


def test_a_forced_call_is_guided_and_refused_where_none_can_be_made() -> None:
    named = {"type": "function", "function": {"name": "track"}}
    assert follows(guide(SAID, [TRACK], tool_choice=named), '{"order": "A1234"}')
    assert not follows(guide(SAID, [TRACK], tool_choice=named), '{"order": "C3456"}')
    either = guide(SILENT, [TRACK, FIND], tool_choice="required")
    assert follows(either, FOUND[11:-12]) and not follows(either, CALL[11:-12])
    for tools, choice in (([TRACK], "required"), ([TRACK, FIND], named)):
        with pytest.raises(RequestError, match="nothing was said that a call needs") as refused:
            guide(SILENT, tools, tool_choice=choice)
        assert refused.value.param == "tool_choice"


def test_beside_a_format_too() -> None:
    body = {"model": "m", "tools": [TRACK], "response_format": {"type": "json_object"}}
    for messages, called in ((SAID, True), (SILENT, False)):
        offer = Offer(ChatRequest.model_validate({**body, "messages": messages}))
        both = offer.or_answer(Guide("json_object"))
        assert follows(both, '{"any": 1}') and follows(both, CALL) == called
        assert not follows(both, CALL.replace("A1234", "C3456"))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "boolean", "x-said": {"words": 1}}, "beside type string or integer"),
        ({"type": "boolean", "x-said": "a"}, "beside type string or integer"),
        ({"x-said": "a"}, "beside type string or integer"),
        ({"type": "string", "x-said": True}, "a regular expression, or .*1 to 8.*, beside"),
        ({"type": "string", "x-said": {"words": 0}}, "a regular expression, or"),
        ({"type": "string", "x-said": {"words": 9}}, "a regular expression, or"),
        ({"type": "string", "x-said": {"words": True}}, "a regular expression, or"),
        ({"type": "string", "x-said": {"words": 2, "letters": 3}}, "a regular expression, or"),
        ({"type": "string", "x-said": "(?=a)"}, "a regular expression of RE2"),
        ({"type": "string", "x-said": "(a"}, "a regular expression of RE2"),
        ({"type": "array", "items": {"type": "string", "x-said": "a"}}, "at a property of parameters itself"),
        ({**ORDER, "x-said-in-text": 1}, "matches one letter or more"),
        ({**ORDER, "x-said-in-text": ""}, "matches one letter or more"),
        ({**ORDER, "x-said-in-text": "[0-9]*"}, "matches one letter or more"),
        ({**ORDER, "x-said-in-text": "(?=a)"}, "x-said-in-text.*a regular expression of RE2"),
        ({"type": "string", "x-said-in-text": "[0-9]+"}, "allowed: beside x-said"),
        ({**ORDER, "oneOf": [{"x-said-in-text": "[0-9]+"}]}, "allowed: beside x-said"),
    ],
)
def test_a_mark_that_cannot_be_followed_is_refused(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as refused:
        Offer(ChatRequest.model_validate({"model": "m", "messages": SAID, "tools": [tool("track", order=schema)]}))
    assert refused.value.param == "tools"


def test_a_client_s_expression_takes_time_in_proportion_to_the_text() -> None:
    """In Python's own this one takes 2 to the power of 5000 steps."""
    text = [{"role": "user", "content": "a" * 5000 + "!"}]
    assert choosable(text, **{"x-said": "(a+)+b"}) == []


def test_the_model_does_not_read_the_marks() -> None:
    for given in (TRACK, WORDS):
        (shown,) = functions([given["function"]])
        assert shown["parameters"]["properties"] == {"order": {"type": "string"}}
        assert "x-said" in json.dumps(given)


# ---- in words --------------------------------------------------------------------------------------------------------

WORDS = tool("track", order={**ORDER, "x-said-in-text": "[A-Z][0-9]+"})


def begins(text: str, messages: list[dict[str, Any]] = SAID, tools: tuple[Any, ...] = (WORDS, FIND)) -> bool:
    """Is there an answer that begins so?"""
    its = Tokenizer.bytes_only()
    try:
        return bool(Grammars(its, 300).compile(guide(messages, [*tools])).allowed(its.encode(text)).any())
    except StrayError:
        return False


def test_no_word_is_what_nobody_said_whichever_letters_it_has() -> None:
    """All 9,331 texts of up to five of these letters, against the rule in Python's words."""
    given, its = tool("track", order={**ORDER, "x-said-in-text": "[AB][12]+"}), Tokenizer.bytes_only()
    asks = guide([{"role": "user", "content": "A1, and B12, but xB2"}], [given])
    grammar = Grammars(its, 300).compile(asks)
    wrong = re.compile(r"(?<![A-Za-z0-9_])(?!(A1|B12)(?![A-Za-z0-9_]))[AB][12]")
    for text in map("".join, itertools.chain(*(itertools.product("AB12 x", repeat=n) for n in range(6)))):
        try:
            allowed = bool(grammar.allowed(its.encode(text))[its.ends[0]])
        except StrayError:
            allowed = False
        assert allowed == (wrong.search(text) is None), text


@pytest.mark.parametrize(
    ("pattern", "said", "goes_on"), [("#[0-9]+", "#12", " "), ("单[0-9]+", "单12", "的"), ("[0-9]+号", "12号", "在")]
)
def test_in_words_too_it_is_held_to_what_was_said_wherever_it_begins(pattern: str, said: str, goes_on: str) -> None:
    given = tool("track", order={**ORDER, "x-said": pattern, "x-said-in-text": pattern})
    messages, other = [{"role": "user", "content": f"到{said}吗"}], said.replace("2", "3")
    for before in ("", "It is ", "订", "order" if said[0] == "#" else "("):
        assert begins(f"{before}{said}{goes_on}", messages, (given,)), before
        assert not begins(f"{before}{other}{goes_on}", messages, (given,)), before


def test_what_was_not_said_is_stopped_at_its_first_digit_and_not_at_its_last() -> None:
    """So an answer that its length cuts has none either, and none goes on as another number."""
    assert begins("A") and begins("A12") and begins("A1234") and begins("A1234.") and begins("订单A1234的")
    assert begins("On 2026-06-10 for 12.50, DHL and x9, v2")  # are of no such form
    for bad in ("A9", "A13", "A12345", "A1234B", "Q9", "订单Q9", "-Q9", "A1234,Q9", "Where?\nQ9"):
        assert not begins(bad), bad
    for silent in ((WORDS, FIND), (WORDS,)):
        assert begins("Which one? Q", SILENT, silent) and not begins("Q9", SILENT, silent)


def test_words_around_a_call_and_the_call_itself_hold_to_it() -> None:
    free = guide(SAID, [WORDS, FIND])
    for good in (CALL, f"A1234: {CALL}", f"B2345 {CALL} and A1234 {FOUND}."):
        assert follows(free, good), good
    for bad in (f"C3456: {CALL}", f"{CALL} C3456", CALL.replace("A1234", "C3456"), f"A12 {CALL}"):
        assert not follows(free, bad), bad


def test_a_mark_in_words_may_have_slashes_lines_and_hyphens() -> None:
    for pattern, said, other in (
        ("ord/[0-9]+", "ord/12", "ord/13"),
        ("a\n[0-9]+", "a\n12", "a\n13"),
        (r"T\/[0-9]", "T/1", "T/2"),
    ):
        given = tool("track", order={**ORDER, "x-said-in-text": pattern})
        asks = guide([{"role": "user", "content": said}], [given])
        assert follows(asks, f"It is {said}.") and not follows(asks, f"It is {other}."), pattern


def test_without_the_mark_a_grammar_is_what_it_was() -> None:
    for messages, tools in itertools.product((SAID, SILENT), ([], [FIND])):
        plain, marked = (str(guide(messages, [one, *tools]).spec) for one in (TRACK, WORDS))
        assert plain != marked and plain == marked.replace(" & ~UNSAID_0", "").partition("\nUNSAID_0")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_open_model_says_what_nobody_said(family: str) -> None:
    for messages, tools in ((SAID, [WORDS]), (SAID, [WORDS, FIND]), (SILENT, [WORDS]), (SILENT, [WORDS, FIND])):
        answers = reads(family, asked(family, {"messages": messages, "tools": tools}))
        form = offer(family).format
        for text in ("It is Q9876.", "Q9", "B2345Q", f'Q9876 {form.begin("find")}{{"product": "lamp"}}{form.end}'):
            assert not any(answers(ids)[0] for ids in spellings(family, text, form.open)), text
        assert answers(letters(family, "Which one?"))[0] and answers(letters(family, "It is A1234."))[0] == (
            messages is SAID
        )


@pytest.mark.parametrize("fields", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_spelling_of_an_open_model_has_a_call_with_what_was_not_said(family: str, fields: dict[str, Any]) -> None:
    """By control tokens, by bare JSON and in lists; alone and beside a tool that may be called."""
    form = offer(family).format
    for messages, said in ((SAID, True), (SILENT, False)):
        for tools in ([TRACK], [TRACK, FIND]):
            answers = reads(family, asked(family, {**fields, "messages": messages, "tools": tools}))
            for value in ("A1234", "C3456"):
                text = form.begin("track") + json.dumps({"order": value}) + form.end
                for one in (text, form.open + text):
                    found = [answers(ids)[1] for ids in spellings(family, one, form.open)]
                    assert (said and value == "A1234") or not any(found)
            right = form.begin("track") + '{"order": "A1234"}' + form.end
            called = [answers(tokenizer(family).template_ids(one))[1] for one in (right, form.open + right)]
            assert ([("track", {"order": "A1234"})] in called) == said
