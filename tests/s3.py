"""An S3 service on loopback (moto's), behind a door that can answer 503 SlowDown for a while, break answers off, and hold them
back."""

import http.client
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from moto import backends
from moto.server import ThreadedMotoServer

from shoal.data.place import Bucket
from shoal.data.sources.s3 import S3

SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
)
# Two fifths of what moto takes to answer were this: twice a request it asks the disk which of 190 names are its folders.
_SERVICES = frozenset(backends.list_of_moto_modules())
backends.list_of_moto_modules = lambda: _SERVICES
HOP = ("transfer-encoding", "content-length", "connection", "server", "date")  # headers that are the door's own


def at_once(method: str, path: str, port: int) -> None:
    """An answer is sent as it comes."""


@dataclass
class Service:
    """Where the service is, and how it behaves."""

    endpoint: str = ""
    slow: int = 0  # requests that are still answered 503
    refused: int = 0  # that were
    cut: int = 0  # objects whose bytes still break off in the middle
    # what is done, of a request and the client's port, once its answer is there and before it is sent
    before: Callable[[str, str, int], None] = at_once
    s3: S3 = field(default_factory=S3)  # through the door, as the environment says
    inside: S3 = field(default_factory=S3)  # past it: half the time, where thousands of requests are made

    @cached_property
    def client(self) -> Any:
        """boto3's, past the door. To make one takes a tenth of a second."""
        return self.inside.client()


@contextmanager
def service() -> Iterator[Service]:
    """A service with no bucket; its address and keys are in the environment, as a user's are."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    with urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"", timeout=60):
        pass  # all services of a process have one store: what an earlier one was given goes
    made = Service(inside=S3(f"http://{host}:{port}"))
    door = ThreadingHTTPServer(("127.0.0.1", 0), _door(made, (host, port)))
    threading.Thread(target=door.serve_forever, daemon=True).start()
    made.endpoint = f"http://127.0.0.1:{door.server_address[1]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield made
    door.shutdown()
    door.server_close()
    moto.stop()


def upload(folder: Path, uri: str, service: S3) -> None:
    """Copy the complete corpus in `folder` to `uri`."""
    bucket = Bucket(uri, service)
    for path in folder.iterdir():
        if path.is_file() and not path.name.startswith("."):
            bucket.put(path, path.name)


def _door(made: Service, behind: tuple[str, int]) -> type[BaseHTTPRequestHandler]:
    class Door(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            if made.slow > 0:
                made.slow, made.refused = made.slow - 1, made.refused + 1
                self.send(503, {"Content-Type": "application/xml"}, SLOW_DOWN)
                return
            connection = http.client.HTTPConnection(*behind)
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            data = response.read()
            headers = {key: value for key, value in response.getheaders() if key.lower() not in HOP}
            made.before(self.command, self.path, self.client_address[1])
            if made.cut > 0 and self.command == "GET" and response.getheader("etag") and data:
                made.cut -= 1
                self.send(response.status, headers, data[: len(data) // 2], str(len(data)))
                self.close_connection = True
                return
            with suppress(ConnectionError):  # who asked may have died meanwhile
                self.send(response.status, headers, data, response.getheader("content-length"))
            connection.close()

        def send(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            head = self.command == "HEAD"
            self.send_header("Content-Length", length or ("0" if head else str(len(data))))
            self.end_headers()
            if not head:
                self.wfile.write(data)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            """Not to the test's output."""

    return Door
