"""Values of the types that clients declare: each field once, each member of a union."""

from __future__ import annotations

import collections.abc
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin

from pydantic import BaseModel
from typing_extensions import is_typeddict

Ask = Callable[[str, Any], bool]  # path, and a whole body; whether it was taken
Put = Callable[[Any], Any]  # a value into a whole body
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
VALUES: dict[str, Any] = {  # what no type says
    "url": f"data:image/png;base64,{PIXEL}",
    "image_url": f"data:image/png;base64,{PIXEL}",
    "data": PIXEL,
    "arguments": "{}",
    "input_schema": {"type": "object"},
    "schema": {"type": "object"},
}
SCALARS = {str: "x", int: 1, float: 1.0, bool: True}


def walk(kind: Any, path: str, ask: Ask, put: Put, skip: frozenset[str], name: str = "") -> None:
    """Asks for a value of each member of `kind`, then for one with each of its fields, and so on in those that were taken."""
    members = _members(kind)
    for member in members:
        if get_origin(member) is Literal:
            for value in get_args(member):
                ask(f"{path}={value}", put(value))
        elif _is_object(member):
            whole = example(member)
            here = f"{path}<{whole.get('type') or whole.get('role') or member.__name__}>" if len(members) > 1 else path
            if not ask(here, put(whole)):
                continue
            for field, (of, needed) in _fields(member).items():
                plain = needed and len(_members(of)) == 1 and _members(of)[0] in SCALARS
                if field not in skip and not plain:
                    walk(of, f"{here}.{field}", ask, _inside(put, whole, field), skip, field)
        elif (one := _item(member)) is not None:
            walk(one, f"{path}[]", ask, lambda value: put([value]), skip)
        else:
            ask(path, put(example(member, name)))


def example(kind: Any, name: str = "", *, full: bool = False) -> Any:
    """A value of the first member of `kind`, with the fields that it needs; `full`: with all."""
    member = _members(kind)[0]
    if name in VALUES and not _is_object(member):
        return VALUES[name]
    if get_origin(member) is Literal:
        return get_args(member)[0]
    if _is_object(member):
        return {f: example(of, f) for f, (of, needed) in _fields(member).items() if needed or full}
    if (one := _item(member)) is not None:
        return [example(one)]
    return SCALARS.get(member, {})


def each(kind: Any) -> Iterator[tuple[str, Any]]:
    """The members of a union, each by its type and as a value with all of its fields."""
    for member in _members(kind):
        value = example(member, full=True)
        yield str(value.get("type", member.__name__)), value


def _inside(put: Put, whole: dict[str, Any], field: str) -> Put:
    return lambda value: put({**whole, field: value})


def _is_object(kind: Any) -> bool:
    return is_typeddict(kind) or (isinstance(kind, type) and issubclass(kind, BaseModel))


def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """The type of each field, and whether it is needed."""
    if issubclass(kind, BaseModel):
        return {
            field.alias or name: (field.annotation, field.is_required()) for name, field in kind.model_fields.items()
        }
    found = {}
    for name, of in typing.get_type_hints(kind, include_extras=True).items():
        needed = False
        while get_origin(of) in (Required, NotRequired, Annotated):
            needed |= get_origin(of) is Required
            of = get_args(of)[0]
        found[name] = (of, needed)
    return found


def _members(kind: Any) -> list[Any]:
    while get_origin(kind) in (Annotated, Required, NotRequired):
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, types.UnionType):
        return [member for one in get_args(kind) if one is not type(None) for member in _members(one)]
    return [kind]


def _item(kind: Any) -> Any:
    """What a list of `kind` holds; None for what is no list."""
    if get_origin(kind) in (list, collections.abc.Iterable, collections.abc.Sequence):
        return get_args(kind)[0]
    return str if "SequenceNotStr" in str(kind) else None
