"""A chat template is a program of other people's: what it does is counted, so that it ends, whatever it is.

Jinja's sandbox keeps a template from the machine, not from taking forever: loops in loops, macros that call themselves, a text
that is doubled again and again. Here all that takes longer for longer values is paid for in steps before it is done:

    a loop, a macro, a block      what its body has of expressions, each time it runs     (`_Paying`, in the template's code)
    printing, comparing, ``~``    all that a value holds, lists within lists too          (`size`)
    operators, calls, filters     what they read, and what they make where that is more   (`BoundedEnvironment`, `paid_filter`)

A step is some 100 ns. Memory follows, since nothing is made that was not paid for. What a hash may be chosen for is no key of a
mapping (`_need_key`), and names and branches are not so many that compiling takes their product (`_need_small`).
"""

# long: what costs steps, and how many, is one table that must have no gap
from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import ignore_case, make_attrgetter
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace, pass_context, pass_environment
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

STEPS, STEPS_EACH = 5_000_000, 64  # that a template may take, and more for each character that it is given
TEXT, TEXT_EACH = 2**20, 8  # characters that it may write, and more for each that it is given
_DEEPEST = 100  # lists within lists
_BITS = 10_000  # of a whole number
_CALL, _ITEM, _PART = 8, 4, 8  # steps of a call, of an item, of a character that may become a text of its own
_WIDE = re.compile(r"\d{5}|%[-#0 +.\d]*\*")  # in a format: widths of 10,000 or more, and those that are given beside it
_LEVELS = 16  # of what is written as JSON, each indented more
_FAR = 32  # characters that a search from the end, or of what to strip, compares in a step
_KEY_BITS = 60  # of a number that is a key: its hash is itself
_COPIES = 100_000  # names that a template sets, for each of its branches, in whose code jinja writes all of them

_TEXT_METHODS = frozenset((
    "capitalize", "casefold", "center", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper",
    "join", "ljust", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rjust", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title",
    "upper", "zfill",
))  # fmt: skip
_PADS, _SPLITS = ("center", "ljust", "rjust", "zfill"), ("split", "rsplit", "splitlines")
_SEARCHES = ("lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip")  # up to the product of both texts
_WHOLE = ("copy", "count", "index")  # methods that go through a mapping or a range

# Filters: those that take as long for any value, that look at a value's items alone, and, left out, those for pages, whose
# time follows from no length. All others read all that a value holds.
_OWN = frozenset(["attr", "count", "d", "default", "first", "items", "last", "length"])
_SHALLOW = frozenset(["batch", "list", "map", "reject", "rejectattr", "reverse", "select", "selectattr", "slice"])
_LEFT_OUT = (
    "filesizeformat", "forceescape", "pprint", "random", "striptags", "urlencode", "urlize", "wordwrap", "xmlattr",
)  # fmt: skip
_READING_TESTS = frozenset((
    "!=", "<", "<=", "==", ">", ">=", "divisibleby", "eq", "equalto", "even", "ge", "greaterthan", "gt", "in", "le",
    "lessthan", "lower", "lt", "ne", "odd", "upper",
))  # fmt: skip
# filters whose names no template can spell
_SPENT, _READ, _LOOKED, _EACH, _KEY = " spent", " read", " looked", " each", " key"
_VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
_LISTS: Any = (list, tuple, *_VIEWS)
_COUNTED: Any = (str, dict, range, *_LISTS)
_BRANCHES = (
    nodes.If, nodes.For, nodes.With, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock, nodes.Block,
)  # fmt: skip


class TooMuch(Exception):
    """A template that wants to do more than it may."""


class _Left(threading.local):
    steps = text = 0  # outside of a template there is nothing to spend


_left = _Left()


def begin(given: object) -> None:
    """Let the template that this thread runs next have the steps for what it is `given`."""
    _left.steps = 2**62
    chars = size(given)
    _left.steps, _left.text = STEPS + STEPS_EACH * chars, TEXT + TEXT_EACH * chars


def end() -> None:
    _left.steps = _left.text = 0


def spend(steps: int) -> None:
    """Raises TooMuch where so many `steps` are not left."""
    _left.steps -= steps
    if _left.steps < 0:
        raise TooMuch


def size(value: object) -> int:
    """Characters and items of all that a `value` holds, as often as it would print them; spent as steps. Raises TooMuch, for
    lists within lists beyond any use too, and for numbers of thousands of digits."""
    total, waiting = 0, list[tuple[Any, int]]([(value, 0)])
    while waiting:
        item, depth = waiting.pop()
        inner: Iterable[object] = ()
        own = _items(item) + _ITEM
        spend(own)  # before a list of them is made
        total += own
        if isinstance(item, dict):
            inner = [*item, *item.values()]
        elif isinstance(item, Namespace):
            inner = [getattr(item, "_Namespace__attrs")]  # noqa: B009, mypy knows no such attribute
        elif isinstance(item, _LISTS):
            inner = item
        elif isinstance(item, int) and item.bit_length() > _BITS:
            raise TooMuch
        if inner and depth >= _DEEPEST:
            raise TooMuch
        waiting += [(each, depth + 1) for each in inner]
    return total


def _items(value: Any) -> int:
    """Of the value itself alone."""
    return 1 + len(value) if isinstance(value, _COUNTED) else 1


def _ended(value: Any) -> Any:
    """`value`, an iterator as a list of what it gives."""
    return list(value) if hasattr(value, "__next__") else value


def _paid(value: Any, steps: int = _ITEM) -> Any:
    """`value`, an iterator as one whose items are paid for, each with so many `steps`."""

    def items(iterator: Iterator[Any]) -> Iterator[Any]:
        for item in iterator:
            spend(steps)
            yield item

    return items(value) if hasattr(value, "__next__") else value


@pass_context  # so that none of these is done while a template is compiled
def _spent(_: Context, steps: int) -> None:
    spend(steps)


@pass_context
def _read(_: Context, value: Any) -> Any:
    value = _ended(value)
    size(value)
    return value


@pass_context
def _looked(_: Context, value: Any) -> Any:
    spend(_items(value))
    return value


@pass_context
def _each(_: Context, value: Any, steps: int) -> Any:
    spend(_items(value) * (_ITEM + steps))
    return _paid(value)


def _need_key(value: Any) -> Any:
    """`value`. Raises TooMuch for one that is no key: of tuples and large numbers so many as one likes have one hash, and a
    mapping of them takes the square of their number."""
    if isinstance(value, tuple) or (isinstance(value, int) and value.bit_length() > _KEY_BITS):
        raise TooMuch
    return value


@pass_context
def _key(_: Context, value: Any) -> Any:
    value = _ended(value)
    size(value)
    return _need_key(value)


class _Dict:
    """``dict`` as templates have it: no class, by whose methods what it is given could be changed."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        pairs = args[0] if args else ()
        pairs = list(pairs.items() if isinstance(pairs, dict) else map(tuple, pairs))
        for pair in pairs:
            _need_key(pair[0] if pair else None)
        return dict(pairs, *args[1:], **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: object = None) -> dict[Any, Any]:
        return dict.fromkeys(map(_need_key, keys), value)


class _Namespace(Namespace):
    """One in which no name says what an object is to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja's, so that `self` may be a name in it
        made = _Dict()(*args[1:], **kwargs)
        for name in made:
            _need_plain(name)
        Namespace.__init__(args[0], made)

    def __setitem__(self, name: str, value: Any) -> None:
        _need_plain(name)
        Namespace.__setitem__(self, name, value)


def _need_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace: {name[:80]!r} begins with an underscore")


@pass_environment
def _unique(
    environment: Any, value: Iterable[Any], case_sensitive: bool = False, attribute: Any = None
) -> Iterator[Any]:
    """Jinja's, with keys alone in its set."""
    key_of, seen = make_attrgetter(environment, attribute, None if case_sensitive else ignore_case), set()
    for item in value:
        key = _need_key(key_of(item))
        if key not in seen:
            seen.add(key)
            yield item


def _formatted(text: str, values: object) -> int:
    """Steps of ``text % values``."""
    if _WIDE.search(text):
        raise TooMuch
    return text.count("%") * (_CALL + size(values)) + sum(map(int, re.findall(r"\d+", text))) + len(text)


def _replaced(text: str, more: Sequence[Any]) -> int:
    """Steps of ``text.replace(*more)``."""
    if len(more) < 2 or not all(isinstance(each, str) for each in more[:2]):
        return 0
    return (text.count(more[0]) if more[0] else len(text) + 1) * len(more[1])


def paid_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is called `name`, paid for."""
    own = int(hasattr(function, "jinja_pass_arg"))  # arguments that are none of the template's

    @wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:
        value, more = args[own], [*args[own + 1 :], *kwargs.values()]
        spend(_CALL)
        if name in _SHALLOW:
            steps = 1 + _letters(more)  # of a path, whose parts are looked up in each item
            value = _paid(value, _ITEM * steps)
            spend(_items(value) * (_PART if isinstance(value, str) else 1) * steps)
            spend(sum(abs(each) for each in more if isinstance(each, int)) if name in ("batch", "slice") else 0)
        elif name not in _OWN:
            value = _ended(value)
            spend(_price(name, value, more))
        return _paid(function(*args[:own], value, *args[own + 1 :], **kwargs))

    return paying


def _letters(more: Iterable[Any]) -> int:
    """Characters of the texts among arguments."""
    return sum(len(each) for each in more if isinstance(each, str))


def _price(name: str, value: Any, more: Sequence[Any]) -> int:
    """Steps of a filter that reads all of its value, beside those for reading it."""
    read = size(value) + sum(map(size, more))
    numbers = sum(abs(each) for each in more if isinstance(each, int))
    texts = _letters(more)
    if name == "round" and numbers > _DEEPEST:
        raise TooMuch
    if name == "center":
        return numbers
    if name == "indent":
        return read * (numbers + texts)
    if name == "tojson":  # separators are written once for each item, what indents it for each level too
        glue = sum(_letters(each) for each in more if isinstance(each, (list, tuple)))
        return read * ((numbers + texts) * _LEVELS + glue)
    if name == "trim":
        return read * texts // _FAR
    if name == "replace":
        return _replaced(str(value), more)
    if name == "format":
        return _formatted(str(value), more)
    path = 0 if isinstance(value, str) else _items(value) * texts  # looked up in each item; or the glue of a join
    if name == "sum" and any(isinstance(each, (list, tuple)) for each in more):  # lists are copied for each
        return _items(value) * read + path
    return path + (_LEVELS * read if name in ("dictsort", "groupby", "sort", "unique") else 0)


def _paid_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def paying(*args: Any, **kwargs: Any) -> Any:
        spend(_CALL)
        if name in _READING_TESTS:
            args = tuple(_ended(each) for each in args)
            for each in (*args, *kwargs.values()):
                size(each)
        return function(*args, **kwargs)

    return paying


class _Formatter(SandboxedFormatter):
    """``"{}".format``, a field at a time."""

    def convert_field(self, value: Any, conversion: Any) -> Any:
        size(value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        if _WIDE.search(format_spec):
            raise TooMuch
        spend(_CALL + size(value) + len(format_spec) + sum(map(int, re.findall(r"\d+", format_spec))))
        return super().format_field(value, format_spec)


class _Escaping(_Formatter, SandboxedEscapeFormatter):
    pass


class _Paying(NodeTransformer):
    """Puts what is to be paid into a template's own code."""

    def _through(self, name: str, node: Any, *args: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)

    def _read(self, node: Any) -> Any:
        plain = isinstance(node, (nodes.Const, nodes.TemplateData))
        return node if plain else self._through(_READ, node)

    def _body(self, node: Any) -> Any:
        """What is run again and again, with its length paid for first, each time."""
        steps = _length(node.body)
        self.generic_visit(node)
        number = nodes.Const(steps, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(self._through(_SPENT, number), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body

    def visit_For(self, node: nodes.For) -> Any:
        steps = _length([node.test] if node.test is not None else [])
        self._body(node)
        node.iter = self._through(_EACH, node.iter, nodes.Const(steps, lineno=node.lineno))
        return node

    def _all_read(self, node: Any) -> Any:
        self.generic_visit(node)
        node.nodes = [self._read(each) for each in node.nodes]
        return node

    visit_Output = visit_Concat = _all_read

    def _of_others(self, node: Any) -> Any:
        raise TemplateSyntaxError("no other templates are read", node.lineno)

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _of_others

    def visit_Compare(self, node: nodes.Compare) -> Any:
        self.generic_visit(node)
        node.expr = self._read(node.expr)
        for operand in node.ops:
            operand.expr = self._read(operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> Any:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._through(_LOOKED, node.node)
        return node

    def visit_Pair(self, node: nodes.Pair) -> Any:  # its key has a hash, for which all of it is read
        self.generic_visit(node)
        plain = isinstance(node.key, nodes.Const) and isinstance(node.key.value, str)
        node.key = node.key if plain else self._through(_KEY, node.key)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> Any:  # it may become a key
        self.generic_visit(node)
        plain = node.ctx != "load" or all(isinstance(each, nodes.Const) for each in node.items)
        return node if plain else self._through(_READ, node)


def _length(body: Sequence[nodes.Node]) -> int:
    """Nodes of a body, but for the bodies within it, which pay for themselves."""
    count, waiting = 0, list(body)
    while waiting:
        node = waiting.pop()
        count += 1
        if isinstance(node, nodes.For):
            waiting += [node.iter, *node.else_]
        elif isinstance(node, nodes.CallBlock):
            waiting.append(node.call)
        elif not isinstance(node, (nodes.Macro, nodes.Block)):
            waiting += node.iter_child_nodes()
    return count


def _need_small(source: nodes.Template) -> None:
    """Raises TemplateSyntaxError for a template whose names, for each of its branches, are more than any has."""
    stored = sum(node.ctx != "load" for node in source.find_all(nodes.Name))
    stored += sum(1 for _ in source.find_all(nodes.Macro))
    if stored * sum(1 for _ in source.find_all(_BRANCHES)) > _COPIES:
        raise TemplateSyntaxError(f"{stored} names that are set, in too many branches", 1)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which a template has so many steps between `begin` and `end`."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    intercepted_unops = frozenset(("+", "-"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        kept = {name: each for name, each in self.filters.items() if name not in _LEFT_OUT}
        self.filters = {name: paid_filter(name, each) for name, each in kept.items()}
        self.filters |= {_SPENT: _spent, _READ: _read, _LOOKED: _looked, _EACH: _each, _KEY: _key}
        self.filters["unique"] = paid_filter("unique", _unique)
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: _paid_test(name, each) for name, each in tests.items()}
        self.globals.pop("lipsum")
        self.globals |= {"dict": _Dict(), "namespace": _Namespace}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        _need_small(source)
        tree = _Paying().visit(source)
        tree.set_environment(self)
        return super()._generate(tree, *args, **kwargs)

    def concat(self, pieces: Iterable[str]) -> str:
        made, room = list[str](), _left.text
        for piece in pieces:
            room -= len(piece)
            if room < 0:
                raise TooMuch
            made.append(piece)
        spend(1 + (_left.text - room) // _ITEM)
        return "".join(made)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        spend(_CALL)
        if operator == "%" and isinstance(left, str):
            spend(_formatted(left, right))
        elif operator == "+" and isinstance(left, (str, list, tuple)):
            several = _ITEM if isinstance(left, str) else 1  # letters are copied at once
            spend((_items(left) + _items(right)) // several)
        elif operator == "*" and isinstance(left, (str, list, tuple)) and isinstance(right, int):
            spend(_items(left) * max(right, 1))
        elif operator == "*" and isinstance(right, (str, list, tuple)) and isinstance(left, int):
            spend(_items(right) * max(left, 1))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _BITS:
                raise TooMuch
        return super().call_binop(context, operator, left, right)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        spend(_CALL)
        if isinstance(arg, int) and arg.bit_length() > _BITS:
            raise TooMuch
        return super().call_unop(context, operator, arg)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, (str, int)):  # all of it is read, for its hash or to say that it is not there
            size(argument)
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _TEXT_METHODS
        return not isinstance(obj, (int, float, bytes, type, *_VIEWS)) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        text = getattr(value, "__self__", None)
        if not isinstance(text, str) or value.__name__ != "format":
            return None
        kind, formatter = type(text), _Formatter(self)
        if isinstance(text, Markup):
            formatter = _Escaping(self, escape=text.escape)

        def formatted(*args: Any, **kwargs: Any) -> str:
            spend(len(text) * _ITEM)
            return kind(formatter.vformat(text, args, kwargs))

        return formatted

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        spend(_CALL + len(args) + len(kwargs))
        if isinstance(obj, LoopContext):
            spend(sum(map(_items, args)) * _ITEM)
            args = tuple(map(_paid, args))
        elif not isinstance(obj, (Macro, BlockReference)):  # what a macro does with a value it pays for itself
            args = tuple(map(_ended, args))
            for each in (*args, *kwargs.values()):
                size(each)
            _pay_for_method(getattr(obj, "__self__", None), getattr(obj, "__name__", ""), args)
        return super().call(context, obj, *args, **kwargs)


def _pay_for_method(owner: object, name: str, args: Sequence[Any]) -> None:
    if isinstance(owner, str):
        spend(len(owner) * (_PART if name in _SPLITS else 1))
        if name in _SEARCHES:
            spend(len(owner) * _letters(args) // _FAR)
        elif name in _PADS:
            spend(sum(abs(each) for each in args if isinstance(each, int)))
        elif name == "replace":
            spend(_replaced(owner, args))
        elif name == "join" and args:
            spend(_items(args[0]) * len(owner))
    elif isinstance(owner, (list, tuple)):
        size(owner)
    elif name in _WHOLE:
        spend(_items(owner))
