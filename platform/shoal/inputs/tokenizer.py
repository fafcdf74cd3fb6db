"""BPE over bytes: any string to token ids and back, byte for byte.

Notable: special tokens are never read out of text. A user who types ``<|assistant|>`` gets those characters, not the
control token; only `special` and the chat template place control tokens.

Which tokens are control tokens, and what they are for, is data (`Controls`): ours are ids 0 to 8; an open model's are its
source's, under their ids, and stand in ``tokenizer.json`` beside what Hugging Face knows. An open model's may also be of
sentencepiece's alphabet: a mark for each space, and for what it has no piece for a token a byte.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from shoal.config import load
from shoal.errors import CheckpointError, ConfigError, RequestError, first_line
from shoal.inputs.alphabets import BYTE_OF, is_spaced, spaced_bytes
from shoal.inputs.call_formats import FORMATS, CallFormat
from shoal.inputs.patterns import is_panic, need_bounded

PAD, END = "<|pad|>", "<|end|>"  # END closes a document, and every message of a chat
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
IMG, IMG_END, ROW, PATCH = "<img>", "</img>", "<row>", "<patch>"  # PATCH stands where a patch vector is put in
SPECIAL = (PAD, END, SYSTEM, USER, ASSISTANT, IMG, IMG_END, ROW, PATCH)  # ids 0..8, in this order
PAD_ID, END_ID, SYSTEM_ID, USER_ID, ASSISTANT_ID, IMG_ID, IMG_END_ID, ROW_ID, PATCH_ID = range(len(SPECIAL))

# Texts that a tokenizer with a normaliser, a space put in front or an unknown token would not give back.
PROBES = (
    "a",
    " a  b\n\n\tc ",
    "Cafe\u0301 \ufb01ne \u00bd \u2026",
    "\U0001f41f\u200d \u6f6e 12345",
    "\x00\x7f\xff",
    "<|user|></s>",
)


@dataclass(frozen=True)
class Controls:
    """What the control tokens of an open model's tokenizer are for. Which they are, the tokenizer's added tokens say."""

    ends: tuple[int, ...]  # ids that end an answer
    before: tuple[int, ...] = ()  # ids in front of a text that is a prompt by itself; a chat template writes its own
    names: dict[str, str] = field(default_factory=dict)  # as the chat template calls them: bos_token, eos_token, ...
    calls: str = ""  # how the chat template has calls written, of `call_formats.FORMATS`; empty: it knows no tools


class Tokenizer:
    """Token ids for text. Without `controls` it is one of ours: the control tokens of `SPECIAL` are ids 0 to 8."""

    def __init__(self, core: tokenizers.Tokenizer, controls: Controls | None = None) -> None:
        added = core.get_added_tokens_decoder()
        if controls is None:
            for index, name in enumerate(SPECIAL):
                if core.token_to_id(name) != index:
                    raise CheckpointError(f"tokenizer: special token {name}", got=core.token_to_id(name), allowed=index)
            spelt = dict.fromkeys(SPECIAL, (False, False))
        else:
            spelt = {token.content: (token.lstrip, token.rstrip) for token in added.values() if token.special}
        core.encode_special_tokens = True  # text never turns into control tokens
        core.no_truncation()
        core.no_padding()
        self._core, self.controls = core, controls
        self._spelt = spelt  # control token -> does it take the white space before it, and after it?
        self.specials: Sequence[str] = tuple(spelt)
        self._names = {number: token.content for number, token in added.items() if token.content in spelt}
        self._added = {number: token.content for number, token in added.items() if number not in self._names}
        self.ends = (END_ID,) if controls is None else controls.ends
        self.end: str | None = END if controls is None else self._names.get(self.ends[0])
        self.pad: str | None = PAD if controls is None else controls.names.get("pad_token")
        self._spaced = controls is not None and is_spaced(core)
        named = "" if controls is None else controls.calls
        if named and named not in FORMATS:
            raise CheckpointError("tokenizer: controls.calls", got=named, allowed=list(FORMATS))
        self.calls: CallFormat | None = FORMATS.get(named)  # of a chat template that knows tools
        around = () if self.calls is None else (self.calls.open, self.calls.close)
        self._seen = {number for number, name in self._names.items() if name in around}  # in the text of an answer
        # Added tokens that are no control tokens, and frame calls, thoughts or turns: <tool_call>, <think>, and <｜User｜> of
        # DeepSeek's. Words and white space frame nothing.
        self._frames = {} if controls is None else {
            token.content: (token.lstrip, token.rstrip)
            for token in added.values()
            if token.content not in spelt and not token.single_word and not re.fullmatch(r"[\w\s]*", token.content)
        }  # fmt: skip
        self.frames: Sequence[str] = tuple(self._frames)
        self._bytes: dict[int, bytes] = {}  # of the tokens that were asked for: every token of an answer is

    def with_end(self, token: int) -> Tokenizer:
        """This tokenizer of an open model, where the control token `token` ends an answer too."""
        assert self.controls is not None
        return Tokenizer(self._core, replace(self.controls, ends=(*self.controls.ends, token)))

    def with_calls(self, name: str) -> Tokenizer:
        """This tokenizer of an open model, whose chat template has calls written as `name` of `call_formats.FORMATS`."""
        assert self.controls is not None
        return Tokenizer(self._core, replace(self.controls, calls=name)) if name else self

    @classmethod
    def train(cls, texts: Iterable[str], vocab: int) -> Tokenizer:
        """A tokenizer of at most `vocab` tokens (specials and the 256 bytes included) fitted to `texts`."""
        least = 256 + len(SPECIAL)
        if vocab < least:
            raise ConfigError(
                "vocab", got=vocab, allowed=f"{least} or more (256 bytes and {len(SPECIAL)} special tokens)"
            )
        core = _empty_core()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer)
        return cls(core)

    @classmethod
    def bytes_only(cls) -> Tokenizer:
        """One token a byte (265 in all): needs no training, so tests and random models use it."""
        return cls.train([], 256 + len(SPECIAL))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a ``tokenizer.json``. Raises CheckpointError when it is missing or not one of ours."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise CheckpointError(f"cannot read tokenizer {path}", got=str(error)) from error

    @classmethod
    def adopt(cls, path: str | Path, vocab: int) -> Tokenizer:
        """The tokenizer in a ``tokenizer.json``, of at most `vocab` tokens: one of ours as it is, any other byte-level BPE with
        our control tokens in front, so that its own ids move up, and without control tokens of its own.

        Raises CheckpointError when it is of another kind or does not give back every text byte for byte, ConfigError when it
        has too many tokens.
        """
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise CheckpointError(f"cannot read tokenizer {path}", got=str(error)[:160]) from error
        need_bounded(core, path)
        ours = [core.token_to_id(name) for name in SPECIAL] == list(range(len(SPECIAL)))
        tokenizer = cls(core if ours else _with_control_tokens(core, path))
        if len(tokenizer) > vocab:
            raise ConfigError(
                f"tokenizer {path}", got=f"{len(tokenizer)} tokens, control tokens included", allowed=f"at most {vocab}",
                do="choose a preset with a larger vocabulary",
            )  # fmt: skip
        tokenizer._need_byte_level(path)
        return tokenizer

    def _need_byte_level(self, path: str | Path) -> None:
        """Raises CheckpointError unless every token stands for bytes, and every text comes back as it was."""
        pieces = [self._core.id_to_token(token) for token in range(len(SPECIAL), len(self))]
        strange = [piece for piece in pieces if piece is None or not all(c in BYTE_OF for c in piece)]
        missing = set(BYTE_OF) - set(pieces)
        lost = (
            []
            if strange or missing
            else [t for t in (*PROBES, *SPECIAL) if b"".join(map(self.token_bytes, self.encode(t))) != t.encode()]
        )
        if strange or missing or lost:
            got = (
                f"token {strange[0]!r}"
                if strange
                else f"{len(missing)} bytes missing"
                if missing
                else f"{lost[0]!r} changed"
            )
            raise CheckpointError(f"tokenizer {path}", got=got, allowed="a byte-level BPE that leaves text as it is")

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.json, encoding="utf-8")

    @property
    def plain_json(self) -> str:
        """As Hugging Face knows it."""
        text: str = self._core.to_str()
        return text

    @property
    def json(self) -> str:
        if self.controls is None:
            return self.plain_json
        # Without a format of calls as it was written before there was any, so that its fingerprint stays.
        told = {name: value for name, value in asdict(self.controls).items() if value or name != "calls"}
        return json.dumps({**json.loads(self.plain_json), "controls": told}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """The tokenizer that `json` gave. Raises CheckpointError when it is not one of ours."""
        controls: dict[str, Any] | None = None
        if '"controls"' in text:  # else there is nothing to take out, and vocabularies are long
            values = json.loads(text)
            controls = values.pop("controls", None)
            text = json.dumps(values)
        return cls(tokenizers.Tokenizer.from_str(text), None if controls is None else load(Controls, controls))

    @cached_property
    def _inside(self) -> tokenizers.Tokenizer:
        """The core for what does not begin a text, where it puts a space in front of what does and of nothing else."""
        text, first = self.plain_json if self._spaced else "", '"prepend_scheme":"first"'
        if first not in text:
            return self._core
        core = tokenizers.Tokenizer.from_str(text.replace(first, '"prepend_scheme":"never"'))
        core.encode_special_tokens = True
        return core

    @cached_property
    def _letters(self) -> tokenizers.Tokenizer:
        """The core for text in which what frames calls and results is spelt, and meant as the letters that it is."""
        values = json.loads(self._inside.to_str())
        for token in values["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._frames
        core = tokenizers.Tokenizer.from_str(json.dumps(values))
        core.encode_special_tokens = True
        return core

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the whole tokenizer: shards and models that disagree refuse each other by it."""
        return hashlib.sha256(self.json.encode()).hexdigest()

    @cached_property
    def _size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self._core.get_vocab(with_added_tokens=True).values())

    def __len__(self) -> int:
        return self._core.get_vocab_size() if self.controls is None else self._size

    @cached_property
    def sayable(self) -> Sequence[int]:
        """Ids that an answer may hold, or end with: ours but for the other control tokens; of an open model all that stand for
        a token."""
        if self.controls is None:
            return [END_ID, *range(len(SPECIAL), len(self))]
        return sorted(self._core.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control tokens spelt in it are plain characters. Raises RequestError for half a surrogate pair,
        which JSON can spell and UTF-8 cannot."""
        return _ids(self._core, text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._core.encode_batch_fast(list(texts), add_special_tokens=False)]

    def prompt(self, text: str) -> list[int]:
        """Ids of a `text` that is a prompt by itself."""
        before = self.controls.before if self.controls is not None else ()
        return [*before, *self.encode(text)]

    def special(self, name: str) -> int:
        """Id of a control token. Raises KeyError for any other string."""
        if name not in self._spelt:
            raise KeyError(name)
        return next(number for number, known in self._names.items() if known == name)

    @cached_property
    def control_pattern(self) -> str:
        """Regular expression of all control tokens."""
        return any_of(self.specials)

    @cached_property
    def frame_pattern(self) -> str:
        """Regular expression of all control tokens, and of those that frame calls and results in a chat template's text."""
        return any_of((*self.specials, *self._frames))

    def template_ids(self, text: str, back: Mapping[str, str] | None = None) -> list[int]:
        """Ids of a chat template's own text, whose control tokens are meant; with `back`, of which characters stand in it for
        others (`stand_ins`), those are plain characters, whatever they spell."""
        pattern = self.control_pattern if back is None else self.frame_pattern
        ids: list[int] = []
        at, strips = 0, False
        for match in [*re.finditer(pattern, text), None]:
            run = text[at : match.start() if match else len(text)]
            name = match.group() if match else ""
            before, after = self._spelt.get(name) or self._frames.get(name) or (False, False)
            run = run.lstrip() if strips else run
            run = run.rstrip() if before else run
            run = restored(run, back or {})
            spelt = back is not None and re.search(any_of(self._frames), run) is not None
            ids += _ids(self._letters if spelt else self._inside if at else self._core, run)
            if match:
                ids.append(int(self._core.token_to_id(name) or 0))
                at, strips = match.end(), after
        return ids

    def control(self, token: int) -> str | None:
        """The name of a control token; None for any other id."""
        return self._names.get(token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; empty for ids that the tokenizer does not use, and for control tokens but those around
        calls."""
        known = self._bytes.get(token)
        if known is None:
            piece = self._core.id_to_token(token) if token >= 0 and token not in self._names else None
            if token in self._added or token in self._seen:
                known = (self._added.get(token) or self._names[token]).encode()
            elif piece is None:
                known = b""
            else:
                known = spaced_bytes(piece) if self._spaced else bytes(BYTE_OF[c] for c in piece)
            self._bytes[token] = known
        return known

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens left out; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self.token_bytes)


class StreamDecoder:
    """Text as tokens arrive: `push` returns what is complete, and never half a character."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What is left; an incomplete character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _ids(core: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        # as a batch of one: `encode` would hold the interpreter's lock, for seconds where the text is long
        ids: list[int] = core.encode_batch_fast([text], add_special_tokens=False)[0].ids
    except TypeError as error:
        raise RequestError("text is not valid Unicode", got=text[:40]) from error
    except BaseException as error:
        if not is_panic(error):
            raise
        got, do = first_line(error), "leave some of it out: a pattern of the model's tokenizer gives up at it"
        raise RequestError("text cannot be cut into tokens", got=got, do=do) from None
    return ids


def restored(text: str, back: Mapping[str, str]) -> str:
    """`text` with the characters of `back` for what stands for them, also where a template wrote that as JSON's escapes."""
    for there, char in back.items():
        text = text.replace(there, char).replace(escaped(there), char)
    return text


def escaped(char: str) -> str:
    return f"\\u{ord(char):04x}"


def any_of(names: Iterable[str]) -> str:
    """Regular expression of all `names`, of two that begin alike the longer first."""
    return "|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)"


def _empty_core() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    # digits one by one: small vocabularies learn numbers better so, and the pieces stay short
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _with_control_tokens(core: tokenizers.Tokenizer, path: str | Path) -> tokenizers.Tokenizer:
    """`core` with the control tokens of `SPECIAL` as ids 0 to 8 and its own tokens behind them, in their order."""
    values = json.loads(core.to_str())
    model = values["model"]
    if model["type"] != "BPE":
        raise CheckpointError(f"tokenizer {path}", got=model["type"], allowed="a byte-level BPE")
    added = {token["content"] for token in values["added_tokens"]} | set(SPECIAL)
    pieces = [piece for piece in sorted(model["vocab"], key=model["vocab"].__getitem__) if piece not in added]
    values["model"] = {**model, "vocab": {piece: number for number, piece in enumerate((*SPECIAL, *pieces))}}
    values |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    made = tokenizers.Tokenizer.from_str(json.dumps(values))
    made.add_special_tokens(list(SPECIAL))
    return made
