"""The shop over HTTP, on this machine alone: what executes a tool's call for an evaluation, a page or a program.

    GET    /tools               the tools, as a chat takes them
    GET    /system              what a model is told of a customer who is signed in, with an order on its way; of each language
    POST   /shops/NAME/TOOL     call one in the shop NAME, with a JSON object of arguments; 400 says what was wrong with them
    GET    /shops/NAME          what calls have changed there
    DELETE /shops/NAME          forget it

A shop is made when its name is first used, as a copy of the seeded one: conversations do not see what others have changed.
A name may begin with a language and a split, as in ``zh-suite-7``; else it is of English and of `SUITE`.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from recipes.customer_service.shop import TOOLS, Shop
from recipes.customer_service.words import ORDERS, SYSTEM
from recipes.splits import LANGUAGES, SPLITS, SUITE
from shoal.errors import RequestError

HOST = "127.0.0.1"
MOST_SHOPS = 1_000  # of more, the one that was not used for longest goes
MOST_BYTES = 100_000  # of a body
SECONDS = 10.0  # that a client may be silent within a request


class Shops:
    """Shops by name. One that is forgotten ends with the last who still asks it."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._seeded: dict[tuple[str, str], Shop] = {}
        self._open: OrderedDict[str, Shop] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, name: str) -> Shop:
        """The shop of that name; a new one where there is none."""
        with self._lock:
            if name not in self._open:
                self._open[name] = self._of(name).copy()
            self._open.move_to_end(name)
            while len(self._open) > MOST_SHOPS:
                self._open.popitem(last=False)
            return self._open[name]

    def forget(self, name: str) -> bool:
        with self._lock:
            return self._open.pop(name, None) is not None

    def _of(self, name: str) -> Shop:
        words = name.split("-")
        language = next((word for word in words if word in LANGUAGES), LANGUAGES[0])
        split = next((word for word in words if word in SPLITS), SUITE)
        if (split, language) not in self._seeded:
            self._seeded[split, language] = Shop(split, language, self._seed)
        return self._seeded[split, language]


@contextmanager
def serving(seed: int = 0, port: int = 0) -> Iterator[str]:
    """The address of a service that answers until the end of the block; `port` 0: a free one."""
    shops = Shops(seed)
    server = _Server(shops, port)
    thread = threading.Thread(target=server.serve_forever, name="shop", daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, shops: Shops, port: int) -> None:
        self.shops = shops
        super().__init__((HOST, port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SECONDS
    wbufsize = -1  # head and body in one packet: the second would wait for the first one's acknowledgement, 40 ms
    disable_nagle_algorithm = True

    def parse_request(self) -> bool:
        """A body that is not read would be taken for the next request: the connection ends with this one."""
        parsed = super().parse_request()
        if parsed and ("Transfer-Encoding" in self.headers or (self.command != "POST" and self._length() != "0")):
            self.close_connection = True
        return parsed

    def do_GET(self) -> None:
        match self._path():
            case ["tools"]:
                self._answer(200, TOOLS)
            case ["system"]:
                systems = {language: self._signed_in(language) for language in LANGUAGES}
                self._answer(200, {"system": systems[LANGUAGES[0]], "systems": systems})
            case ["shops", name]:
                self._answer(200, self._shops.get(name).state())
            case _:
                self._answer(404, {"error": f"nothing at {self.path[:80]}"})

    def do_DELETE(self) -> None:
        match self._path():
            case ["shops", name] if self._shops.forget(name):
                self._answer(200, {})
            case _:
                self._answer(404, {"error": f"nothing at {self.path[:80]}"})

    def do_POST(self) -> None:
        try:
            arguments = self._body()
            match self._path():
                case ["shops", name, tool]:
                    self._answer(200, self._shops.get(name).call(tool, arguments))
                case _:
                    self._answer(404, {"error": f"nothing at {self.path[:80]}"})
        except RequestError as error:
            self._answer(400, {"error": str(error)})

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: its lines would stand between those of the command."""

    def _signed_in(self, language: str) -> str:
        order, item = self._shops.get(f"{language}-system").orders("on the way")[0]
        return SYSTEM + ORDERS.format(orders=f"{order} {item}")

    @property
    def _shops(self) -> Shops:
        assert isinstance(self.server, _Server)
        return self.server.shops

    def _path(self) -> list[str]:
        return [part for part in self.path.partition("?")[0].split("/") if part]

    def _length(self, missing: str = "0") -> str:
        """Of the body; not one where there are two."""
        return ", ".join(self.headers.get_all("Content-Length", [missing]))

    def _body(self) -> dict[str, Any]:
        """The arguments. Raises RequestError, after which the connection is closed where the body was not read."""
        length = "chunked" if "Transfer-Encoding" in self.headers else self._length("")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            self.close_connection = True
            raise RequestError("Content-Length", got=length or "none", allowed=f"0 to {MOST_BYTES}")
        try:
            found = json.loads(self.rfile.read(int(length)) or b"{}")
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()  # what no answer could repeat
        except (ValueError, RecursionError) as error:
            raise RequestError("body", got="no JSON", allowed="a JSON object of arguments") from error
        if not isinstance(found, dict):
            raise RequestError("body", got=type(found).__name__, allowed="a JSON object of arguments")
        return found

    def _answer(self, status: int, told: object) -> None:
        body = json.dumps(told, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
