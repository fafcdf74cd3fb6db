"""A source's tokenizer and chat template as ours: the same ids, its control tokens known, nothing moved or left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from shoal.config import ModelConfig
from shoal.errors import CheckpointError, RequestError
from shoal.inputs.alphabets import BYTE_OF, is_spaced
from shoal.inputs.call_formats import format_of
from shoal.inputs.chat import encode_chat
from shoal.inputs.patterns import need_bounded, need_close
from shoal.inputs.templates import EndlessTemplateError, why_broken
from shoal.inputs.tokenizer import Controls, Tokenizer
from shoal.open_weights.told import is_whole

LARGEST = 2**28  # bytes of a tokenizer.json; the largest that are known have an eighth of it
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
_MEND, _ENDLESS = "mend it, or give one with --chat-template FILE", "more than any chat needs: it does not end"
_PROBE = "a"  # a text to see what a tokenizer puts around one


def of_folder(
    directory: Path,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    told: Mapping[str, Any],
    template: str | None,
) -> tuple[Tokenizer, str]:
    """Tokenizer and chat template of a Hugging Face directory; `told` is its tokenizer_config.json. Raises CheckpointError for
    what is missing, and for a tokenizer whose tokens do not stand for bytes."""
    path = directory / TOKENIZER
    if not path.is_file():
        others = [name for name in ("tokenizer.model", "vocab.json") if (directory / name).exists()]
        got = f"{others[0]}, which it is not read from" if others else "none"
        raise CheckpointError(
            f"{path} is missing", got=got, do="save the tokenizer as tokenizer.json with transformers"
        )
    if path.stat().st_size > LARGEST:
        raise CheckpointError(f"tokenizer {path}", got=f"{path.stat().st_size} bytes", allowed=f"at most {LARGEST}")
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise CheckpointError(f"cannot read tokenizer {path}", got=str(error)[:160]) from error
    special = {**read_json(directory / "special_tokens_map.json", missing=True), **told}
    names = {key: text for key in special if key.endswith("_token") and (text := _content(special[key]))}
    return made(core, names, _ends(config, generation), path), _template(directory, told, template)


def made(core: tokenizers.Tokenizer, names: Mapping[str, str], ends: tuple[int, ...], what: object) -> Tokenizer:
    """Our tokenizer over `core`, whose control tokens a template knows by `names`. Raises CheckpointError where tokens do
    not stand for bytes, where text alone makes a control token, or when nothing ends an answer."""
    need_close(core, what)
    _need_byte_level(core, what)
    _need_known_tokens(core, what)
    need_bounded(core, what)
    for name, text in names.items():
        need_whole(f"{name} of tokenizer {what}", text)
    size = 1 + max(core.get_vocab(with_added_tokens=True).values())
    named = core.token_to_id(names["eos_token"]) if "eos_token" in names else None
    # a config.json may have the id of its class's own vocabulary
    ends = tuple(end for end in ends if 0 <= end < size) or (() if named is None else (named,))
    if not ends:
        do = "give one whose generation_config.json or tokenizer_config.json has an eos_token"
        raise CheckpointError(f"tokenizer {what}", got="no token that ends an answer", do=do)
    around = core.encode(_PROBE, add_special_tokens=True).ids
    inside = core.encode(_PROBE, add_special_tokens=False).ids
    count = len(around) - len(inside)
    if around[count:] != inside:
        raise CheckpointError(f"tokenizer {what}", got="tokens put behind a text", allowed="tokens put in front of it")
    tokenizer = Tokenizer(core, Controls(ends, tuple(around[:count]), dict(names)))
    if (spelt := _reached(tokenizer)) is not None:
        do = (
            "save it with control tokens that are no pieces of text: no merge ends in one, and ignore_merges finds none"
        )
        raise CheckpointError(f"tokenizer {what}", got=f"pieces that make {spelt!r} of a user's text", do=do)
    return tokenizer


def closing(tokenizer: Tokenizer, template: str, config: ModelConfig) -> Tokenizer:
    """`tokenizer` with what `template` closes an answer with as an end: a base model knows the end of a text alone, and
    fine-tuned on chats it would learn to close its answer and then go on. Raises CheckpointError for a template that no chat
    can be written with."""
    need_whole("the chat template", template)
    broken = why_broken(template)
    if broken:
        raise CheckpointError("the chat template", got=broken, do=_MEND)
    chat = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
    try:
        row = encode_chat(chat, tokenizer, config, template=template, add_generation_prompt=False)
    except EndlessTemplateError as error:
        raise CheckpointError("the chat template", got=_ENDLESS, do=_MEND) from error
    except RequestError:  # of a template that wants other chats
        return tokenizer
    written = [token for token, answer in zip(row.ids, row.answer, strict=True) if answer]
    end = next((token for token in written if tokenizer.control(token) is not None), None)
    if end is None or written[-1] in tokenizer.ends:
        return tokenizer
    return tokenizer.with_end(end)


def calling(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """`tokenizer` with the way in which `template` has calls of tools written, where it knows tools. Raises CheckpointError for
    a template that does not end with them."""
    assert tokenizer.controls is not None
    try:
        return tokenizer.with_calls(format_of(template, tokenizer.controls.names))
    except EndlessTemplateError as error:
        raise CheckpointError("the chat template", got=f"{_ENDLESS}, given tools", do=_MEND) from error


def _reached(tokenizer: Tokenizer) -> str | None:
    """A control token that a tokenizer's own pieces make of text which spells it; None where all stay text."""
    around = ("{}", " {} ", "a{}a")  # where pieces join otherwise
    texts = {name: tokenizer.encode_batch([each.format(name) for each in around]) for name in tokenizer.specials}
    return next((name for name, rows in texts.items() if any(tokenizer.special(name) in row for row in rows)), None)


def _need_byte_level(core: tokenizers.Tokenizer, what: object) -> None:
    """Raises CheckpointError unless every token stands for bytes."""
    kind = json.loads(core.to_str())["model"]["type"]
    added = {token.content for token in core.get_added_tokens_decoder().values()}
    pieces = [piece for piece in core.get_vocab(with_added_tokens=False) if piece not in added]
    strange = next((piece for piece in pieces if not all(char in BYTE_OF for char in piece)), None)
    if kind != "BPE" or (strange is not None and not is_spaced(core)):
        got = f"token {strange!r}, and not one for each byte" if kind == "BPE" else kind
        raise CheckpointError(f"tokenizer {what}", got=got, allowed="a BPE over bytes, or one that falls back on them")


def _need_known_tokens(core: tokenizers.Tokenizer, what: object) -> None:
    """Raises CheckpointError for a token around texts that the list beside it lacks, at which the library would panic; and for
    a control token that is one beside white space alone, since a template's are meant wherever they stand."""
    alone = next(
        (token.content for token in core.get_added_tokens_decoder().values() if token.special and token.single_word),
        None,
    )
    if alone is not None:
        got = f"control token {alone!r} with single_word"
        raise CheckpointError(f"tokenizer {what}", got=got, do="save it without, as all known ones are")
    made = json.loads(core.to_str())["post_processor"] or {}
    for each in made.get("processors", [made]):
        pieces = [*each.get("single", []), *each.get("pair", [])] if each.get("type") == "TemplateProcessing" else []
        for name in (piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece):
            if name not in each["special_tokens"]:
                raise CheckpointError(
                    f"tokenizer {what}", got=f"{name!r} around texts, and no id of it", do="save it again"
                )


def need_whole(what: str, text: str) -> None:
    """Raises CheckpointError for a text with half a letter, which JSON can spell and no file in UTF-8 can hold."""
    half = next((letter for letter in text if "\ud800" <= letter <= "\udfff"), None)
    if half is not None:
        raise CheckpointError(what, got=f"{half!r}, which is half a letter", do="write it anew")


def _content(token: object) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _ends(config: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    told = next((found for said in (generation, config) if (found := said.get("eos_token_id")) not in (None, [])), None)
    ids = [number for number in (told if isinstance(told, list) else [told]) if number is not None]
    if not all(map(is_whole, ids)):
        raise CheckpointError("eos_token_id", got=told, allowed="the number of a token, or a list of them")
    return tuple(ids)


def _template(directory: Path, told: Mapping[str, Any], given: str | None) -> str:
    if given is not None:
        return given
    path, found = directory / TEMPLATE, told.get("chat_template")
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}", got=str(error)[:160], do=_MEND) from error
    if isinstance(found, list):  # several with names
        if not all(isinstance(each, dict) and isinstance(each.get("template"), str) for each in found):
            allowed = 'texts with names, {"name", "template"} each'
            raise CheckpointError("tokenizer_config.json: chat_template", got=found, allowed=allowed)
        named = {str(each.get("name")): each["template"] for each in found}
        found = named.get("default")
        with_tools = named.get("tool_use")
        if isinstance(found, str) and isinstance(with_tools, str) and not why_broken(with_tools):
            # With tools transformers takes that one.
            used, found = (each.removesuffix("\n") for each in (with_tools, found))
            found = f"{{% if tools %}}{used}{{% else %}}{found}{{% endif %}}"
    if not isinstance(found, str):
        do = "give one with --chat-template FILE, as for a base model"
        raise CheckpointError(
            f"{directory} has no chat template", got=f"none in {TEMPLATE} or tokenizer_config.json", do=do
        )
    return found


def read_json(path: Path, *, missing: bool = False) -> dict[str, Any]:
    """The mapping in a JSON file of somebody else's, empty where it may be `missing` and is. Raises CheckpointError."""
    if missing and not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}", got=str(error)[:160]) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}", got=type(values).__name__, allowed="a mapping")
    return values
