"""A seeded shop of orders, parcels, returns and stock in SQLite, and the four tools that look things up in it and change it.

Made up, all of it. What no model may have seen before it is asked is kept apart by construction: an order's number says which
split it is of (`split_of`), and each split has products and cities of its own; of those that are learned from each shop has
other ones (`names`).
"""

from __future__ import annotations

import json
import random
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from recipes.customer_service.names import some_named
from recipes.splits import DEV, SUITE, TRAIN
from shoal.errors import RequestError, did_you_mean

REASONS = ("broken", "wrong", "unwanted")
STATES = ("packed", "on the way", "delivered", "long delivered", "cancelled")  # of an order, as seeded
TODAY = date(2026, 6, 10)
DAYS = 30  # after its delivery in which an order may go back
ORDERS = 40  # of a state, in a shop
SOLD, PLACES = 10, 6  # products and cities of a shop that is learned from
NOT_SOLD = 0.2  # chance that a product is asked for in vain
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
CARRIERS = ("DHL", "UPS", "GLS", "DPD")

ITEMS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "en": {
        TRAIN: (
            "lamp", "kettle", "chair", "jacket", "phone", "radio", "bike", "printer", "table", "mirror", "clock", "sofa",
            "blanket", "pan", "knife", "bag", "shirt", "coat", "fan", "heater", "desk", "shelf", "guitar", "camera",
            "keyboard", "mouse", "screen", "bottle", "carpet", "ladder",
        ),
        DEV: ("pillow", "bucket", "hammer", "wallet", "mixer"),
        SUITE: ("drone", "tent", "scarf", "tablet", "speaker", "scooter", "helmet", "toaster", "curtain", "violin"),
    },
    "zh": {
        TRAIN: (
            "台灯", "水壶", "椅子", "外套", "手机", "收音机", "自行车", "打印机", "桌子", "镜子", "时钟", "沙发", "毯子",
            "平底锅",
            "菜刀", "背包", "衬衫", "大衣", "风扇", "取暖器", "书桌", "书架", "吉他", "相机", "键盘", "鼠标", "屏幕", "水瓶",
            "地毯",
            "梯子",
        ),
        DEV: ("枕头", "水桶", "锤子", "钱包", "搅拌机"),
        SUITE: ("无人机", "帐篷", "围巾", "平板", "音箱", "滑板车", "头盔", "面包机", "窗帘", "小提琴"),
    },
}  # fmt: skip
CITIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "en": {
        TRAIN: (
            "Hamburg", "Leipzig", "Berlin", "Paris", "Lyon", "Madrid", "Rome", "Vienna", "Prague", "Oslo", "Dublin", "Bonn",
        ),
        DEV: ("Zurich", "Ghent", "Turin", "Porto"),
        SUITE: ("Munich", "Cologne", "Lisbon", "Milan", "Geneva", "Krakow"),
    },
    "zh": {
        TRAIN: ("北京", "上海", "广州", "深圳", "杭州", "南京", "武汉", "成都", "重庆", "西安", "天津", "苏州"),
        DEV: ("厦门", "青岛", "大连", "长沙"),
        SUITE: ("郑州", "昆明", "福州", "合肥", "济南", "沈阳"),
    },
}  # fmt: skip

_ORDER = {"order": {"type": "string"}}
_PRODUCT = {"product": {"type": "string", "pattern": "^[^0-9]+$"}}
_FUNCTIONS: tuple[tuple[str, str, dict[str, Any], list[str]], ...] = (
    ("track_order", "Where a parcel is", {**_ORDER, "route": {"type": "boolean"}}, ["order"]),
    (
        "start_return",
        "Send an order back",
        {**_ORDER, "reason": {"type": "string", "enum": list(REASONS)}},
        ["order", "reason"],
    ),
    ("cancel_order", "Cancel an order", _ORDER, ["order"]),
    ("find_product", "Price and stock", _PRODUCT, ["product"]),
)
TOOLS: list[dict[str, Any]] = [  # as a chat's ``tools``
    {
        "type": "function",
        "function": {
            "name": name,
            "description": told,
            "parameters": {"type": "object", "properties": properties, "required": required},
            "strict": True,
        },
    }
    for name, told, properties, required in _FUNCTIONS
]
_SCHEMA = """
CREATE TABLE orders (id TEXT PRIMARY KEY, item TEXT, price TEXT, state TEXT, carrier TEXT, place TEXT, day TEXT, route TEXT);
CREATE TABLE returns (id TEXT PRIMARY KEY REFERENCES orders, reason TEXT, label TEXT, until TEXT);
CREATE TABLE products (name TEXT PRIMARY KEY, price TEXT, stock INTEGER);
"""


def split_of(order: str) -> str:
    """The split that an order's number is of: a letter and four digits, whose sum says it."""
    return (SUITE, DEV, TRAIN, TRAIN)[sum(map(int, order[1:])) % 4]


def number(split: str, draws: random.Random) -> str:
    """A number for an order of `split`."""
    while True:
        drawn = draws.choice(LETTERS) + f"{draws.randrange(10_000):04d}"
        if split_of(drawn) == split:
            return drawn


class Shop:
    """One shop, in memory. Safe to be asked from several threads."""

    def __init__(self, split: str, language: str, seed: int = 0, *, of: Shop | None = None) -> None:
        """The shop of a split in a language; `of`: as that one is now."""
        self.split, self.language, self.seed = split, language, seed
        self._lock = threading.Lock()
        self._rows = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self._rows.row_factory = sqlite3.Row
        if of is not None:
            self.items: tuple[str, ...] = of.items
            with of._lock:
                of._rows.backup(self._rows)
        else:
            draws = random.Random(f"{split} {language} {seed}")
            # products, of which it need not have any left
            self.items = tuple(some_named(ITEMS, language, split, SOLD, draws))
            self._rows.executescript(_SCHEMA)
            self._fill(some_named(CITIES, language, split, PLACES, draws), draws)

    def copy(self) -> Shop:
        """A shop in the same state, which changes for itself."""
        return Shop(self.split, self.language, self.seed, of=self)

    def call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What a tool gives; ``error`` in it where the shop says no. Raises RequestError for no such tool, and for arguments
        that are not as its parameters want them."""
        tools: dict[str, Callable[..., dict[str, Any]]] = {
            "track_order": self._track, "start_return": self._return, "cancel_order": self._cancel,
            "find_product": self._find,
        }  # fmt: skip
        if name not in tools:
            raise RequestError("tool", got=name, allowed=list(tools), do=did_you_mean(name, tools))
        _check(name, arguments)
        with self._lock:
            return tools[name](**arguments)

    def state(self) -> dict[str, Any]:
        """What calls can change: the state of each order, and what was sent back and why."""
        with self._lock:
            orders = {row["id"]: row["state"] for row in self._rows.execute("SELECT id, state FROM orders")}
            returns = {row["id"]: row["reason"] for row in self._rows.execute("SELECT id, reason FROM returns")}
        return {"orders": orders, "returns": returns}

    def orders(self, state: str) -> list[tuple[str, str]]:
        """Number and product of the orders in a state."""
        with self._lock:
            found = self._rows.execute("SELECT id, item FROM orders WHERE state = ? ORDER BY id", (state,))
            return [(row["id"], row["item"]) for row in found]

    def _fill(self, cities: Sequence[str], draws: random.Random) -> None:
        known: set[str] = set()
        for state in STATES:
            for _ in range(ORDERS):
                while (drawn := number(self.split, draws)) in known:
                    pass
                known.add(drawn)
                ahead = {"delivered": -draws.randrange(1, DAYS), "long delivered": -draws.randrange(DAYS + 1, 90)}
                day = TODAY + timedelta(days=ahead.get(state, draws.randrange(1, 20)))
                route = draws.sample(cities, 3)
                item = draws.choice(self.items)
                row = (drawn, item, _price(draws), state, draws.choice(CARRIERS), route[1], str(day))
                self._rows.execute("INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, json.dumps(route)))
        for item in self.items:
            if draws.random() < NOT_SOLD:
                continue
            stock = draws.choice((0, 0, *range(1, 10)))
            self._rows.execute("INSERT INTO products VALUES (?, ?, ?)", (item, _price(draws), stock))

    def _order(self, order: str) -> sqlite3.Row | None:
        found: sqlite3.Row | None = self._rows.execute("SELECT * FROM orders WHERE id = ?", (order,)).fetchone()
        return found

    def _track(self, order: str, route: bool = False) -> dict[str, Any]:
        row = self._order(order)
        if row is None:
            return {"error": "no such order"}
        if route:
            first, here, following = json.loads(row["route"])
            return {"passed": [first, here], "next": following}
        told = {"item": row["item"], "status": row["state"].removeprefix("long ")}
        if row["state"] == "on the way":
            told |= {"carrier": row["carrier"], "place": row["place"]}
        return told if row["state"] == "cancelled" else {**told, "day": row["day"]}

    def _return(self, order: str, reason: str) -> dict[str, Any]:
        row = self._order(order)
        if row is None:
            return {"error": "no such order"}
        if row["state"] != "delivered":
            return {"error": "too late" if row["state"] == "long delivered" else "not delivered"}
        if self._rows.execute("SELECT 1 FROM returns WHERE id = ?", (order,)).fetchone():
            return {"error": "already sent back"}
        draws = random.Random(f"{order} {self.seed}")
        label, until = f"R{draws.randrange(100_000):05d}", str(TODAY + timedelta(days=draws.randrange(7, 15)))
        self._rows.execute("INSERT INTO returns VALUES (?, ?, ?, ?)", (order, reason, label, until))
        return {"label": label, "until": until}

    def _cancel(self, order: str) -> dict[str, Any]:
        row = self._order(order)
        if row is None:
            return {"error": "no such order"}
        if row["state"] == "cancelled":
            return {"error": "already cancelled"}
        if row["state"] != "packed":
            return {"error": "already sent"}
        self._rows.execute("UPDATE orders SET state = 'cancelled' WHERE id = ?", (order,))
        return {"refund": row["price"]}

    def _find(self, product: str) -> dict[str, Any]:
        row = self._rows.execute("SELECT * FROM products WHERE name = ?", (product,)).fetchone()
        return {"error": "no such product"} if row is None else {"price": row["price"], "stock": row["stock"]}


def _price(draws: random.Random) -> str:
    return f"{draws.randrange(5, 100)}.{draws.choice(('00', '50', '90'))}"


def _check(name: str, arguments: Mapping[str, Any]) -> None:
    """Raises RequestError, which names the argument, for those that a tool's parameters do not allow."""
    _, _, properties, required = next(function for function in _FUNCTIONS if function[0] == name)
    for key in (*arguments, *required):
        where = f"{name}.{key}"
        if key not in properties:
            raise RequestError(f"unknown argument {where}", allowed=list(properties))
        if key not in arguments:
            raise RequestError(f"missing argument {where}", do=f"give {key}")
        value, kind = arguments[key], properties[key]
        if not isinstance(value, bool if kind["type"] == "boolean" else str):
            raise RequestError(where, got=value, allowed=f"a {kind['type']}")
        if value not in kind.get("enum", (value,)):
            raise RequestError(where, got=value, allowed=kind["enum"])
