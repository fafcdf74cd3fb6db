"""Chat templates say what jinja makes of them, and whatever they are they end: none of these did, each in its own way."""

from __future__ import annotations

import json
import threading
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shoal.errors import RequestError
from shoal.inputs import template_bounds
from shoal.inputs.template_bounds import STEPS, TooMuch, size
from shoal.inputs.templates import LONGEST, EndlessTemplateError, rendered, variables, why_broken

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": True}
GROW = "{{% set n = namespace(s='ab', l=[1], m=[1], t=(1,), i=7) %}}{{% for i in range(70) %}}{}{{% endfor %}}"
LAUGHS = GROW.format("{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}")
LONG = "('a' * 99999)"
ONE_HASH = f"range(0, 40000 * {2**61 - 1}, {2**61 - 1})"  # Python has the same for all of them

ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "a long body": "{% for a in range(99999) %}{% for b in range(99999) %}"
    + "{% if messages.a %}{% endif %}" * 1000
    + "{% endfor %}{% endfor %}",
    "what a loop leaves out": "{% for a in range(99999) %}{% for b in range(99999) if messages.a %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a text times a number": "{% set n = 10000000000 %}{{ 'a' * n }}",
    "a number times a list": "{{ 1000000000 * [0] }}",
    "a text that is doubled": GROW.format("{% set n.s = n.s ~ n.s %}"),
    "a text added to itself": GROW.format("{% set n.s = n.s + n.s %}"),
    "a block that is doubled": GROW.format("{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}"),
    "a list in a list, printed": LAUGHS + "{{ n.l }}",
    "... as a text": LAUGHS + "{{ n.l | string | length }}",
    "... as JSON": LAUGHS + "{{ n.l | tojson }}",
    "... as a part": LAUGHS + "{{ 'x' ~ n.l }}",
    "... in a format": LAUGHS + "{{ '%s' % (n.l,) }}",
    "... in another": LAUGHS + "{{ '{!r:.1}'.format(n.l) }}",
    "... joined": LAUGHS + "{{ [n.l] | reverse | join }}",
    "... compared": LAUGHS + "{{ n.l == n.m }}",
    "... looked for": LAUGHS + "{{ [n.l] is in([n.m]) }}",
    "... in a namespace": GROW.format("{% set n.l = namespace(a=n.l, b=n.l) %}") + "{{ n.l }}",
    "a tuple's hash": GROW.format("{% set n.t = (n.t, n.t) %}") + "{{ {n.t: 1} }}",
    "a deep tuple's": "{% set n = namespace(t=()) %}{% for i in range(9999) %}{% set n.t = {'a': n.t}.items() | list | first %}"
    "{% endfor %}{{ {n.t: 1} }}",
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "a wide number of a name": "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
    "a width beside it": "{{ '%*d' % (1000000000, 1) }}",
    "a filter's format": "{{ '%.1000000000f' | format(1.5) }}",
    "a wide field": "{{ '{:1000000000}'.format(1) }}",
    "a width in a field": "{{ '{:{}}'.format(1, 1000000000) }}",
    "padding": "{{ 'a'.ljust(10000000000) }}",
    "a filter's padding": "{{ 'a' | center(10000000000) }}",
    "lines moved in": "{{ ('a\n' * 1000) | indent(100000000) }}",
    "JSON moved in": "{{ [[[[1]]]] | tojson(indent=1000000000) }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a square of a square": GROW.format("{% set n.i = n.i * n.i %}"),
    "a number rounded far": "{{ 1.5 | round(1000000000) }}",
    "a number in hexadecimal": "{% set x = ('f' * 4000000) | int(base=16) %}{{ x is divisibleby(x) }}",
    "long glue": "{{ range(99999) | join(" + LONG + ") }}",
    "letters with long glue": "{{ " + LONG + ".join(" + LONG + ") }}",
    "each letter by many": "{{ " + LONG + " | replace('a', 'b' * 99999) }}",
    "between all letters": "{{ " + LONG + ".replace('', 'b' * 99999) }}",
    "filled batches": "{{ [1] | batch(1000000000, 0) | list }}",
    "filled slices": "{{ [1] | slice(1000000000) | list }}",
    "lists added up": "{{ ([[1] * 1000] * 1000) | sum(start=[]) | length }}",
    "sorted again": "{% for i in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "mapped again": "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "a path of many parts": "{{ ([{}] * 99999) | map(attribute='" + "a." * 9999 + "a', default={'a': {}}) | list }}",
    "searched again": "{% for i in range(99999) %}{{ 'b' in " + LONG + " }}{% endfor %}",
    "cut again": "{% set s = 'a' * 999999 %}{% for i in range(99999) %}{% set x = s[1:] %}{% endfor %}",
    "cut in pieces": "{{ ('a ' * 4999999).split() | length }}",
    "changes of lists": "{% for i in range(99999) %}{{ loop.changed(range(99999) | list) }}{% endfor %}",
    "a long text": "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "a path in each of what is mapped": "{{ range(20000) | map('string') | map(attribute='" + "0." * 30000 + "0') | list }}",
    "a path to sort by": "{{ (['a'] * 3000) | sort(attribute='" + "0." * 30000 + "0') }}",
    "a path to the least": "{{ (['a'] * 3000) | min(attribute='" + "0." * 30000 + "0') }}",
    "a search from the end": "{% set s = 'a' * 400000 %}{{ s.rfind('ab' + 'a' * 200000) }}",
    "much to strip": "{{ ('ā' * 300000).strip('ȁ' * 300000 ~ 'ā') }}",
    "much to trim": "{{ ('ā' * 300000) | trim('ȁ' * 300000 ~ 'ā') }}",
    "what is not there": LAUGHS + "{{ {}[n.l].foo }}",
    "numbers of one hash": "{{ " + ONE_HASH + " | unique | list }}",
    "a mapping of them": "{{ dict(" + ONE_HASH + " | batch(2)) }}",
    "a mapping from them": "{{ dict.fromkeys(" + ONE_HASH + ") }}",
    "a namespace of them": "{{ namespace(" + ONE_HASH + " | batch(2)) }}",
    "a mapping that spells them": "{{ {" + f"{2**61 - 1}: 1, {2**62 - 2}: 1" + "} }}",
    "a range that is gone through": "{% for i in range(99999) %}{% set x = range(99999).count('a') %}{% endfor %}",
    "copies": "{% set d = dict.fromkeys(range(50000)) %}{% for i in range(99999) %}{% set x = d.copy() %}{% endfor %}",
    "a long number's other sign": "{% set x = ('f' * 1000000) | int(0, 16) %}{% set y = - - - - x %}",
    "glue of JSON": "{{ ([0] * 99999) | tojson(separators=(" + LONG + ", ':')) }}",
}  # fmt: skip
# What these want, a power of two to 60 and more or 99,999 squared, a tenth of the steps stops as surely as all of them.
BOUNDLESS = {
    name for name, text in ENDLESS.items() if "range(70)" in text or text.count("range(99999)") > 1 or "f(60)" in text
}

FAILING = {
    "a macro in itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a block in itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a loop in itself": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "filters of filters": "{% set n = namespace(g=[1]) %}{% for i in range(9999) %}{% set n.g = n.g | map('string') %}"
    "{% endfor %}{{ n.g | list }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a long sum": "{{ 1" + " + 1" * 9999 + " }}",
    "blocks in blocks": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "a long template": "{{ 1 }}" * LONGEST,
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class in a format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "a class by an attribute": "{{ [''] | map(attribute='__class__') | map(attribute='__mro__') | list }}",
    "a format of a mapping": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "wide tabs": "{{ '\t'.expandtabs(10000000000) }}",
    "an encoding that is slow": "{{ 'x'.encode('punycode') }}",
    "bytes of a number": "{{ (1).to_bytes(10000000000, 'big') }}",
    "a page of nonsense": "{{ lipsum(n=1000000) }}",
    "another template": "{% set a = 1 %}{% include 'x' %}",
    "names in branches": "".join(f"{{% set a{n} = 1 %}}" for n in range(999)) + "{% if a %}{% endif %}" * 999,
    "names in blocks": "".join(f"{{% set a{n} = 1 %}}{{% block b{n} scoped %}}{{% endblock %}}" for n in range(999)),
    "a change of what it is given": "{{ dict.update(messages[0], {'content': 'x'}) }}",
    "a mapping behind its keys": "{{ messages[0].keys().mapping.copy() }}",
    "a namespace with what Python looks at": "{% set n = namespace() %}{% set n.__call__ = 1 %}",
    "a long date": "{{ strftime_now('%9999d' * 9999) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_would_not_end_is_stopped_in_a_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_bounds, "STEPS", STEPS // 10 if name in BOUNDLESS else STEPS)
    with pytest.raises(
        EndlessTemplateError, match=r"^chat template stopped: got 'one that does or writes more"
    ) as caught:
        rendered(ENDLESS[name], ASKED)
    assert "\n" not in caught.value.message and caught.value.param == "messages"
    assert rendered("{{ messages[0].content }}", ASKED) == "Hello", "the next one has steps of its own"


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_cannot_be_run_is_named_in_a_line(name: str) -> None:
    with pytest.raises(RequestError, match=r"^chat template failed") as caught:
        rendered(FAILING[name], ASKED)
    assert "\n" not in caught.value.message and len(caught.value.message) < 300
    assert isinstance(variables(FAILING[name]), frozenset)


def test_what_compiling_cannot_take_is_known_before_a_chat() -> None:
    names = (
        "brackets",
        "a long sum",
        "blocks in blocks",
        "a long template",
        "another template",
        "names in branches",
        "names in blocks",
    )
    for name in names:
        assert why_broken(FAILING[name]) and "\n" not in why_broken(FAILING[name]), name
        assert variables(FAILING[name]) == frozenset()


WORKING = """\
{%- macro shown(value, depth=0) %}
{%- if value is mapping %}{% for key, each in value | dictsort %}{{ '  ' * depth ~ key }}: {{ shown(each, depth + 1) }}
{% endfor %}
{%- elif value is string %}{{ value | tojson }}
{%- elif value is iterable %}[{% for each in value %}{{ shown(each, depth + 1) }}{{ ', ' if not loop.last }}{% endfor %}]
{%- else %}{{ value }}{% endif %}
{%- endmacro %}
{%- macro framed(by) %}{{ by ~ caller() ~ by }}{% endmacro %}
{%- set ns = namespace(found=false, last=-1, text='') %}
{%- set system, rest = (messages[0].content, messages[1:]) if messages[0].role == 'system' else ('None', messages) %}
{{- bos }}{{ '%s|%-12s|%5.2f%%' % (system, 'x', 1.5) }}{{ '{0} {x:>8} {0!r}'.format(system, x=3) }}
{%- for message in rest[::-1] %}
    {%- set index = (rest | length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == 'user' and message.content is string %}
        {%- set ns.found = true %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for tool in tools or [] %}{{ tool | tojson(indent=4) }}{{ tool | tojson(separators=(',', ':'), sort_keys=true) }}
    {{- shown(tool) }}{{ tool.get('name') }}{% endfor %}
{%- for message in rest %}
    {%- if loop.index0 > 2000 %}{% break %}{% endif %}
    {%- set content = message.content | trim %}
    {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
    {%- if message.role not in ['user', 'assistant'] %}{% continue %}{% endif %}
    {{- loop.index }}{{ loop.cycle('a', 'b') }}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.length }}
    {{- message['role'] | upper + ': ' + content | replace('a', 'bb') | indent(2) }}
    {{- content[:5] ~ content[-3:] ~ (content | length) ~ loop.first ~ loop.revindex ~ (content ~ 'x').count('x') }}
    {%- set ns.text = ns.text + (content | string)[:9] %}
    {%- filter lower %}{{ content }}{% endfilter %}
    {%- call framed('>') %}{{ content }}{% endcall %}
{%- endfor %}
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('\\n') }}
{{- messages | rejectattr('role', 'in', ['user']) | list | length }}
{{- messages | map(attribute='role') | unique | sort | list }}
{{- messages | groupby('role') | length }}{{ ns.last }}{{ ns.text | wordcount }}{{ ['b', 'a'] | sort | first }}
{{- {'a': [1, (2, 3)], 1: -2} }}{{ dict(a=1, **{'b': +3}) }}{{ dict([('c', 2)]) }}{{ [2, 1, 2] | unique | list }}
{{- [1, 2, 3] | sum }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 'ab' * 3 }}{{ [1] + [2] }}{{ -3 | abs }}
{{- (messages[0].content | default('none')) ~ (missing | default('d')) }}{{ range(1, 9, 3) | list }}{{ 3.7 | round | int }}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""


def plain(template: str, values: dict[str, Any]) -> str:
    """As jinja's sandbox has it, which transformers uses."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment.from_string(template).render(**values)


TEXT = st.text("aAx \n<>%{}</think", max_size=30)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("system", "user", "assistant", "tool")), "content": TEXT}
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip
TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"enum": ["a", 1, None, 2.5, True]}}}}]


@settings(max_examples=30, deadline=None)
@given(messages=MESSAGES, tools=st.sampled_from((None, TOOLS)))
def test_what_is_counted_says_what_jinja_says(messages: list[dict[str, str]], tools: list[Any] | None) -> None:
    given = {"messages": messages, "tools": tools, "bos": "<s>", "add_generation_prompt": True}
    assert rendered(WORKING, given) == plain(WORKING, given)


@pytest.mark.parametrize(
    ("turns", "length"),
    [(1000, 20), (400, 2500), (2, 400_000)],
    ids=("many turns", "a book in turns", "two long texts"),
)
def test_long_chats_have_steps_enough(turns: int, length: int) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[turn % 2], "content": f"{turn} " + "a word " * (length // 7)} for turn in range(turns)]
    given = {"messages": messages, "tools": TOOLS, "bos": "<s>", "add_generation_prompt": True}
    assert len(rendered(WORKING, given)) > turns * length // 2


def test_what_a_value_holds_is_counted_as_often_as_it_would_be_printed() -> None:
    template_bounds.begin({})
    once = size(["abc"])
    assert size(["abcd"]) == once + 1
    inner: list[Any] = ["abc"]
    assert size([inner, inner]) - size([inner]) == size([[], inner]) - size([[]]) > once
    for _ in range(101):
        inner = [inner]
    with pytest.raises(TooMuch):
        size(inner)
    with pytest.raises(TooMuch):
        size(10**5000)
    template_bounds.end()
    with pytest.raises(TooMuch):
        size("outside of a template there is nothing to spend")


def test_threads_have_steps_of_their_own() -> None:
    """Requests are rendered beside each other."""
    said = list[str]()
    stopped = threading.Event()

    def hostile() -> None:
        while not stopped.is_set():
            with pytest.raises(EndlessTemplateError):
                rendered(ENDLESS["a text that is doubled"], ASKED)

    thread = threading.Thread(target=hostile)
    thread.start()
    try:
        said += [rendered("{% for i in range(9) %}{{ i }}{% endfor %}", ASKED) for _ in range(200)]
    finally:
        stopped.set()
        thread.join()
    assert said == ["012345678"] * 200
