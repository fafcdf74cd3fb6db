"""The rule that a model is held against: twenty keywords, and regular expressions.

It is asked as a model is, and answers as a model does (`recipe.Answerer`). It knows the wordings that are learned from, and
those alone: its keywords are words of theirs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from recipes.customer_service.score import ID
from recipes.customer_service.words import JOINED, SAID
from recipes.recipe import Messages
from shoal.inputs.tools import call

_MATTERS = (  # the first that is in a text is what it is about
    ("cancel", re.compile(r"cancel|\bstop\b|取消|停止|作废", re.I)),
    ("return", re.compile(r"return|back|退|收回", re.I)),
    (
        "find",
        re.compile(
            r"do you have|how much|in stock|do you sell|cost|looking for|price|多少钱|有货|你们卖|价格|我在找|有(.+)吗",
            re.I,
        ),
    ),
    (
        "track",
        re.compile(r"arriv|where is|track|been sent|waiting|status|什么时候|在哪|查一下|发货|在等|还没有到|状态", re.I),
    ),
)
_REASONS = (
    ("broken", re.compile(r"broken|not work|damaged|defective|stopped working|坏了|不能用|破了|毛病", re.I)),
    ("wrong", re.compile(r"wrong|not what i ordered|different|发错|寄错|不是我订|另一个", re.I)),
    (
        "unwanted",
        re.compile(
            r"not like|changed my mind|not need|no longer want|gift|mistake|不喜欢|改主意|不需要|不想要|重复|买错", re.I
        ),
    ),
)
_YES = re.compile(r"^(yes|please do|sure|好|请查|可以)", re.I)
_NO = re.compile(r"^(no\b|not now|不)", re.I)
_THANKS = re.compile(r"thank|谢", re.I)
_HUMAN = re.compile(r"person|human|colleague|agent|manager|人工|真人|同事|客服|经理", re.I)
_PRODUCT = re.compile(
    r"(?:\ba|\bthe) ([a-z]+)(?: cost| in stock|\?|\.)"
    r"|有(\S+?)吗|卖(\S+?)吗|找(\S+?)。|^(\S+?)(?:多少钱|有货|什么价格)",
    re.I,
)


def rule(asked: Sequence[Messages]) -> list[str]:
    """Says what keywords and regular expressions find."""
    return [_ruled(messages) for messages in asked]


def _ruled(messages: Messages) -> str:
    said = [str(message["content"]) for message in messages if message["role"] == "user"]
    answers = SAID["zh" if re.search(r"[\u4e00-\u9fff]", "".join(said)) else "en"]
    last, text = messages[-1], said[-1]
    if last["role"] == "tool":
        return _put(messages, answers)
    matter = next((m for one in reversed(said) for m in (_first(_MATTERS, one),) if m), "")
    if not _first(_MATTERS, text) and not ID.search(text):
        if _HUMAN.search(text):
            return answers["human"]
        if _THANKS.search(text) and len(text) < 24 and not _YES.search(text):
            return answers["fine"] if _NO.search(text) else answers["welcome"]
        if _NO.search(text):
            return answers["fine"]
        if _YES.search(text) and (order := _order(messages, said)):
            return call("track_order", {"order": order, "route": True})
    if not matter:
        return answers["other"]
    if matter == "find":
        found = _PRODUCT.search(text)
        return call("find_product", {"product": next(filter(None, found.groups()))}) if found else answers["other"]
    order = _order(messages, said)
    if not order:
        signed = ID.findall(str(messages[0]["content"]))
        if len(signed) == 2:
            return answers["which?"].format(
                orders=JOINED["en" if answers is SAID["en"] else "zh"][1].join(sorted(signed))
            )
        return answers["form?"] if re.search(r"\d{4}", text) else answers["number?"]
    if matter == "cancel":
        return call("cancel_order", {"order": order})
    if matter == "track":
        return call("track_order", {"order": order})
    reason = next((r for one in reversed(said) for r in (_first(_REASONS, one),) if r), "")
    return call("start_return", {"order": order, "reason": reason}) if reason else answers["reason?"]


def _first(table: Sequence[tuple[str, re.Pattern[str]]], text: str) -> str:
    return next((name for name, pattern in table if pattern.search(text)), "")


def _order(messages: Messages, said: Sequence[str]) -> str:
    """The order that is talked about: the last number that the customer gave; else the signed-in one with a product that is
    named, or the only one."""
    if given := [found for text in said for found in ID.findall(text)]:
        return str(given[-1])
    signed = re.findall(r"([A-Z]\d{4}) ([^,.]+)", str(messages[0]["content"]))
    named = [order for order, product in signed if product in " ".join(said)]
    return named[0] if len(named) == 1 else signed[0][0] if len(signed) == 1 else ""


def _put(messages: Messages, answers: Mapping[str, str]) -> str:
    """What a tool gave, in words."""
    given, asked = json.loads(messages[-1]["content"]), messages[-2]["tool_calls"][0]["function"]
    places = {**json.loads(asked["arguments"]), **given}
    places["item"] = places.get("item", places.get("product"))
    language = "en" if answers is SAID["en"] else "zh"
    if "passed" in given:
        return answers["route"].format(**{**places, "passed": JOINED[language][0].join(given["passed"])})
    by_key = (
        ("error", str(given.get("error"))),
        ("status", str(given.get("status"))),
        ("label", "returned"),
        ("refund", "refunded"),
    )
    situation = next((name for key, name in by_key if key in given), "found" if given.get("stock") else "sold out")
    return answers[situation].format(**places)
