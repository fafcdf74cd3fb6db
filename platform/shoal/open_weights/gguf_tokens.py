"""The tokenizer that a ``.gguf`` describes: its tokens, their kinds, and what cuts a text; put together as Hugging Face has it.

Two ways of writing a vocabulary: "gpt2", a BPE over bytes whose merges are listed, and "llama", sentencepiece's, which has
scores in place of merges: those neighbours are joined first whose token has the highest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from shoal.errors import CheckpointError
from shoal.inputs.alphabets import SPACE, is_spaced
from shoal.open_weights.told import texts

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # kinds of tokens
_MOST_MERGES = 2**21  # ways to make a token of two; the largest vocabularies have some 600,000
_LONGEST = 512  # characters of a token that is made of two others, at each of its places

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> pre_tokenizers.PreTokenizer:
    """The pieces of Llama 3's and Qwen's vocabularies, which differ in how many `digits` stay together."""
    pieces = pre_tokenizers.Split(Regex(_LETTERS + digits + _REST), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


_PIECES: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _digits,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}


def core_of(meta: Mapping[str, Any], names: Mapping[str, str], what: object) -> tokenizers.Tokenizer:
    """The tokenizer of a file with the metadata `meta`, whose control tokens are called by `names`. Raises CheckpointError for
    one of another form, and for one that lacks what its form needs."""
    tokens, kind, pre = (meta.get(f"tokenizer.ggml.{key}") for key in ("tokens", "model", "pre"))
    if not tokens:
        raise CheckpointError(f"{what} has no tokenizer", do="import the Hugging Face checkpoint")
    if kind != "llama" and (kind != "gpt2" or pre not in list(_PIECES)):
        got = f"{kind} {pre}" if kind == "gpt2" else kind
        raise CheckpointError(f"tokenizer of {what}", got=got, allowed=["llama", *(f"gpt2 {name}" for name in _PIECES)])
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocab[token] != number)
        raise CheckpointError(f"tokenizer of {what}", got=f"token {twice!r} twice", do="fetch the file again")
    kinds = _numbers(meta, "token_type", len(tokens), what) or [_NORMAL] * len(tokens)
    core = _spaced(meta, vocab, kinds, names, what) if kind == "llama" else _of_bytes(meta, vocab, what)
    special = (_CONTROL, _UNKNOWN) if kind == "llama" else (_CONTROL,)
    core.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, n in zip(tokens, kinds, strict=True)
            if n in special
        ]
    )
    own = [token for token, n in zip(tokens, kinds, strict=True) if n == _USER_DEFINED]
    core.add_tokens([AddedToken(token, normalized=False) for token in own])
    bos = names.get("bos_token")
    if meta.get("tokenizer.ggml.add_bos_token", kind == "llama") and bos is not None:  # llama.cpp's default
        core.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, core.token_to_id(bos))]
        )
    return core


def _numbers(meta: Mapping[str, Any], key: str, count: int, what: object) -> Sequence[Any] | None:
    """A number for each token. Raises CheckpointError where they are not as many, or none."""
    found = meta.get(f"tokenizer.ggml.{key}")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != count:
        got = f"{len(found)} numbers for {count} tokens" if isinstance(found, list) else found
        raise CheckpointError(f"{what}: tokenizer.ggml.{key}", got=got, allowed="a number for each token")
    if (
        odd := next((each for each in found if isinstance(each, bool) or not isinstance(each, (int, float))), None)
    ) is not None:
        raise CheckpointError(f"{what}: tokenizer.ggml.{key}", got=odd, allowed="a number for each token")
    return found


def _of_bytes(meta: Mapping[str, Any], vocab: Mapping[str, int], what: object) -> tokenizers.Tokenizer:
    pre, key = meta["tokenizer.ggml.pre"], f"{what}: tokenizer.ggml.merges"
    merges = texts(key, meta.get("tokenizer.ggml.merges") or [])
    pairs = [(merge.partition(" ")[0], merge.partition(" ")[2]) for merge in merges]
    for left, right in pairs:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CheckpointError(key, got=f"{left} {right}", allowed="two tokens, which together are one too")
    core = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=pairs, ignore_merges=pre == "llama-bpe"))
    core.normalizer = normalizers.NFC() if pre == "qwen2" else None
    core.pre_tokenizer, core.decoder = _PIECES[pre](), decoders.ByteLevel()
    return core


def _spaced(
    meta: Mapping[str, Any], vocab: Mapping[str, int], kinds: Sequence[int], names: Mapping[str, str], what: object
) -> tokenizers.Tokenizer:
    """As transformers makes it of such a file: a space in front of a text, and of nothing else."""
    scores = _numbers(meta, "scores", len(vocab), what)
    if scores is None or not all(math.isfinite(score) for score in scores):
        got = "none" if scores is None else "some that are not finite"
        raise CheckpointError(
            f"{what}: tokenizer.ggml.scores", got=got, allowed="one a token, as this form joins by them"
        )
    plain = {token: scores[number] for token, number in vocab.items() if kinds[number] == _NORMAL}
    if (longest := max(map(len, plain), default=0)) > _LONGEST:
        raise CheckpointError(f"tokenizer of {what}", got=f"a token of {longest} characters", allowed=f"{_LONGEST}")
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab=dict(vocab),
            merges=_merges(plain, vocab, what),
            unk_token=names.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if not is_spaced(core):
        raise CheckpointError(
            f"tokenizer of {what}", got="no token for some bytes", allowed="one that falls back on them"
        )
    leads = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first" if leads else "never", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if leads else []
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return core


def _merges(scores: Mapping[str, float], vocab: Mapping[str, int], what: object) -> list[tuple[str, str]]:
    """Every way to make a token of two, the best token's first. Tokens that are no text (control tokens, those of a byte) are
    not in `scores`: a user who spells one must not have it made of its letters. Raises CheckpointError for more than
    `_MOST_MERGES`, as of tokens that are one letter again and again."""
    found = []
    for token, score in scores.items():
        pairs = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in pairs if pair[0] in scores and pair[1] in scores]
        found += [(score, *pair) for pair in sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
        if len(found) > _MOST_MERGES:
            raise CheckpointError(
                f"tokenizer of {what}", got=f"{len(found)} ways to join tokens, or more", allowed=_MOST_MERGES
            )
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]
