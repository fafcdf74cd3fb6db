"""The shop: what tools give and change, over HTTP and without; conversations cannot see each other's."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from recipes.customer_service.conversations import conversations
from recipes.customer_service.names import Table, named
from recipes.customer_service.service import MOST_SHOPS, Shops, serving
from recipes.customer_service.shop import CITIES, ITEMS, STATES, TOOLS, Shop, split_of
from recipes.splits import DEV, LANGUAGES, SPLITS, SUITE, TRAIN
from shoal.errors import RequestError
from shoal.inputs.tokenizer import Tokenizer


@pytest.fixture
def shop() -> Shop:
    return Shop(SUITE, "en")


def first(shop: Shop, state: str) -> str:
    return shop.orders(state)[0][0]


def test_a_parcel_on_its_way_is_tracked_with_its_route(shop: Shop) -> None:
    order = first(shop, "on the way")
    found = shop.call("track_order", {"order": order})
    assert found["status"] == "on the way" and {"item", "carrier", "place", "day"} <= set(found)
    route = shop.call("track_order", {"order": order, "route": True})
    assert route["passed"][1] == found["place"] and route["next"] not in route["passed"]


def test_what_may_be_cancelled_and_sent_back_is_and_nothing_else(shop: Shop) -> None:
    before = shop.state()
    told = {state: shop.call("cancel_order", {"order": first(shop, state)}) for state in STATES}
    packed = first(before_shop := Shop(SUITE, "en"), "packed")
    assert set(told["packed"]) == {"refund"} and told["cancelled"] == {"error": "already cancelled"}
    assert all(told[state] == {"error": "already sent"} for state in ("on the way", "delivered", "long delivered"))
    assert {id_ for id_, state in shop.state()["orders"].items() if state != before["orders"][id_]} == {packed}
    back = {
        state: before_shop.call("start_return", {"order": first(before_shop, state), "reason": "broken"})
        for state in STATES
    }
    assert set(back["delivered"]) == {"label", "until"} and back["long delivered"] == {"error": "too late"}
    assert all(back[state] == {"error": "not delivered"} for state in ("packed", "on the way", "cancelled"))
    delivered = first(before_shop, "delivered")
    assert before_shop.state()["returns"] == {delivered: "broken"}
    again = before_shop.call("start_return", {"order": delivered, "reason": "wrong"})
    assert again == {"error": "already sent back"} and before_shop.state()["returns"] == {delivered: "broken"}


def test_of_what_is_not_there_it_says_so(shop: Shop) -> None:
    unknown = next(order for order in ("A0000", "B0000", "C0000") if order not in shop.state()["orders"])
    for tool in ("track_order", "cancel_order"):
        assert shop.call(tool, {"order": unknown}) == {"error": "no such order"}
    assert shop.call("find_product", {"product": "moon"}) == {"error": "no such product"}
    found = [shop.call("find_product", {"product": item}) for item in ITEMS["en"][SUITE]]
    assert {"price", "stock"} in [set(one) for one in found]


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        ("track_ordr", {}, "did you mean 'track_order'"),
        ("track_order", {}, "missing argument track_order.order"),
        ("track_order", {"order": 7}, "a string"),
        ("track_order", {"order": "A1234", "route": "yes"}, "a boolean"),
        ("track_order", {"order": "A1234", "rute": True}, "unknown argument track_order.rute"),
        ("start_return", {"order": "A1234", "reason": "ugly"}, "broken"),
    ],
)
def test_a_call_that_is_wrong_is_refused_by_name(
    shop: Shop, tool: str, arguments: dict[str, object], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        shop.call(tool, arguments)


def test_a_shop_is_its_seed_s() -> None:
    for language in LANGUAGES:
        one, same, other = (Shop(TRAIN, language, seed) for seed in (3, 3, 4))
        assert one.state() == same.state() != other.state()


def test_splits_share_no_order_no_product_and_no_city() -> None:
    for language in LANGUAGES:
        shops = {split: Shop(split, language) for split in SPLITS}
        for split, shop in shops.items():
            assert {split_of(order) for order in shop.state()["orders"]} == {split}
        items = [set(ITEMS[language][split]) for split in SPLITS]
        assert sum(map(len, items)) == len(set.union(*items))


@pytest.mark.parametrize("table", [ITEMS, CITIES], ids=["products", "cities"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_name_that_is_learned_from_is_mostly_one_of_its_own_and_never_one_that_is_asked(
    table: Table, language: str
) -> None:
    draws = random.Random(0)
    found = [named(table, language, TRAIN, draws) for _ in range(2000)]
    known = table[language]
    made_up = [name for name in found if name not in known[TRAIN]]
    assert 0.6 < len(made_up) / len(found) < 0.8 and len(set(made_up)) > 0.95 * len(made_up)
    asked = [name for split in (DEV, SUITE) for name in known[split]]
    assert not [name for name in found if any(one in name for one in asked)]
    assert {name[0].isupper() for name in found} == {name[0].isupper() for name in asked}
    for split in (DEV, SUITE):
        assert {named(table, language, split, draws) for _ in range(300)} == set(known[split])


def test_shops_that_are_learned_from_sell_other_things_and_those_that_are_asked_do_not() -> None:
    for language in LANGUAGES:
        one, other = (set(Shop(TRAIN, language, seed).items) for seed in (1, 2))
        assert len(one) == len(other) == 10 and len(one & other) < 5
        assert all(Shop(SUITE, language, seed).items == ITEMS[language][SUITE] for seed in (1, 2))
        assert Shop(TRAIN, language, 1).copy().items == Shop(TRAIN, language, 1).items


@pytest.mark.parametrize(
    "language", ["zh", *(pytest.param(each, marks=pytest.mark.drill) for each in LANGUAGES if each != "zh")]
)
def test_products_that_are_looked_up_are_spelt_in_several_tokens(language: str) -> None:
    """Of thirty that were met over and over each had become a token, so that a call copied none: it chose among them. The
    tokenizer is fitted to a quarter of what is learned, as the recipe does it."""
    learned = [one for one in conversations(TRAIN, TRAIN, 1200, each=25) if one.language == language]
    fitted = learned[: len(learned) // 4]
    tokenizer = Tokenizer.train([str(message["content"]) for one in fitted for message in one.messages], 1536)
    calls = [call["function"] for one in learned for message in one.messages for call in message.get("tool_calls", ())]
    found = [json.loads(one["arguments"])["product"] for one in calls if one["name"] == "find_product"]
    spelt = [len(tokenizer.encode(f" {name}" if language == "en" else name)) for name in found]
    assert len(spelt) > 40 and sum(count > 1 for count in spelt) > 0.4 * len(spelt)


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with serving() as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def test_over_http_it_gives_what_it_gives_without(http: httpx.Client, shop: Shop) -> None:
    assert http.get("/tools").json() == TOOLS
    order = first(shop, "packed")
    for tool in ("track_order", "cancel_order", "cancel_order"):
        assert http.post(f"/shops/en-1/{tool}", json={"order": order}).json() == shop.call(tool, {"order": order})
    assert http.get("/shops/en-1").json() == shop.state()


def test_shops_of_other_names_are_untouched_and_a_forgotten_one_is_new(http: httpx.Client, shop: Shop) -> None:
    fresh, order = shop.state(), first(shop, "packed")
    http.post("/shops/a/cancel_order", json={"order": order})
    assert http.get("/shops/b").json() == fresh != http.get("/shops/a").json()
    assert http.delete("/shops/a").status_code == 200 and http.delete("/shops/a").status_code == 404
    assert http.get("/shops/a").json() == fresh
    chinese = http.get("/shops/zh-train-7").json()
    assert chinese == Shop(TRAIN, "zh").state()


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/shops/a/track_order", b"{", 400),
        ("POST", "/shops/a/track_order", b"[1]", 400),
        ("POST", "/shops/a/track_order", b'{"order": "\\ud800"}', 400),
        ("POST", "/shops/a/track_order", b'{"order": 1e999}', 400),
        ("POST", "/shops/a/track_order", b'{"order": NaN}', 400),
        ("POST", "/shops/a/track_order", b'{"\\ud800": 1}', 400),
        ("POST", "/shops/a/track_order", b'{"order": "\xff"}', 400),
        ("POST", "/shops/a/track_order", b"[" * 50_000, 400),
        ("POST", "/shops/a/track_order", b"{}" + b" " * 200_000, 400),
        ("POST", "/shops/a/open_door", b"{}", 400),
        ("POST", "/elsewhere", b"{}", 404),
        ("GET", "/", b"", 404),
    ],
)
def test_what_it_cannot_read_it_refuses_and_goes_on(
    http: httpx.Client, method: str, path: str, content: bytes, status: int
) -> None:
    answer = http.request(method, path, content=content)
    assert answer.status_code == status and set(answer.json()) == {"error"}
    assert http.get("/tools").status_code == 200


@pytest.mark.parametrize("method", ["GET /tools", "DELETE /shops/a", "POST /shops/a/track_order"])
@pytest.mark.parametrize(
    "head", ["Content-Length: {length}", "Transfer-Encoding: chunked", "Content-Length: 2\r\nContent-Length: {length}"]
)
def test_no_body_is_taken_for_the_next_request(http: httpx.Client, shop: Shop, method: str, head: str) -> None:
    order = first(shop, "packed")
    arguments = json.dumps({"order": order})
    behind = f"POST /shops/b/cancel_order HTTP/1.1\r\nHost: x\r\nContent-Length: {len(arguments)}\r\n\r\n{arguments}"
    with socket.create_connection((http.base_url.host, http.base_url.port or 0), timeout=10) as line:
        line.sendall(f"{method} HTTP/1.1\r\nHost: x\r\n{head.format(length=len(behind))}\r\n\r\n{behind}".encode())
        line.shutdown(socket.SHUT_WR)
        said = b"".join(iter(lambda: line.recv(65536), b""))
    assert said.count(b"HTTP/1.1 ") == 1
    assert http.get("/shops/b").json() == shop.state()


def test_callers_at_once_each_get_a_true_answer(http: httpx.Client, shop: Shop) -> None:
    """One of them cancels; all others are told that it is done."""
    order = first(shop, "packed")
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(http.post, "/shops/a/cancel_order", json={"order": order}) for _ in range(24)]
        said = [json.dumps(each.result().json()) for each in asked]
    assert said.count('{"error": "already cancelled"}') == 23


def test_the_number_of_shops_is_bounded() -> None:
    shops = Shops()
    order = first(shops.get("kept"), "packed")
    shops.get("kept").call("cancel_order", {"order": order})
    for number in range(MOST_SHOPS):
        shops.get(f"shop {number}")
    assert shops.get("kept").state()["orders"][order] == "packed", "the oldest went"


def test_who_asks_a_shop_that_is_forgotten_meanwhile_is_answered() -> None:
    """It was closed under their call, which ended the connection without an answer."""
    shops = Shops()
    asked = shops.get("a")
    order = first(asked, "packed")
    assert shops.forget("a") and not shops.forget("a")
    assert "refund" in asked.call("cancel_order", {"order": order})
    assert shops.get("a").state()["orders"][order] == "packed", "a new one"
