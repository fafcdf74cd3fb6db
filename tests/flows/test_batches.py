"""Files and batches by the official client over real HTTP: a real engine, keys, restarts, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from shoal import Engine, Model, Request
from shoal.api import auth, json_text
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.batches import worker
from shoal.api.batches.inside import Inside, Reply
from shoal.api.batches.lines import Log
from shoal.api.batches.store import Store
from shoal.api.limits import Limits
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.events import LATER
from shoal.engine.front import AsyncEngine
from tests.clocks import tells
from tests.serving import Thread, in_a_thread

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "cancelled", "expired")
WAIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_preset("test", seed=3)


@contextmanager
def serving(model: Model, folder: Path, keys: str | Path | None = None, **options: Any) -> Iterator[Thread]:
    """A service whose files and batches are in `folder`; `keys` with commas, or a file of them."""
    limits = Limits(seconds=60, **options)
    served = ServedModel("fish", model.config, model.tokenizer, model.chat_template)
    engine = AsyncEngine(Engine(model, max_batch=4, max_queue=4))
    accepted = ApiKeys.load(keys) if isinstance(keys, Path) else ApiKeys(keys.split(",")) if keys else None
    app = build_app([Hosted(served, engine)], api_keys=accepted, limits=limits, batches=folder, at_once=4)
    with in_a_thread(app, [engine]) as thread:
        yield thread


def client_of(thread: Thread, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{thread.url}/v1", api_key=key, max_retries=0, timeout=60)


def chat(name: str, tokens: int = 4, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"How deep is sea {name}?"}]
    body = {"model": "fish", "messages": messages, "max_tokens": tokens, "temperature": 0, **more}
    return {"custom_id": name, "method": "POST", "url": CHAT, "body": body}


def jsonl(*rows: Any) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def started(client: openai.OpenAI, content: bytes, endpoint: Any = CHAT) -> Any:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def ended(client: openai.OpenAI, batch: Any) -> Any:
    until = time.monotonic() + WAIT_SECONDS
    while batch.status not in ENDED:
        assert time.monotonic() < until, batch
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    return batch


def until(what: Any) -> Any:
    """The first true value of `what()`."""
    end = time.monotonic() + WAIT_SECONDS
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def rows(client: openai.OpenAI, file_id: str | None) -> dict[str | None, Any]:
    """The lines of a file by their custom_id."""
    assert file_id is not None
    found = [json.loads(line) for line in client.files.content(file_id).read().splitlines()]
    assert len({row["id"] for row in found}) == len(found)
    return {row["custom_id"]: row for row in found}


def counts(batch: Any) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


def test_files_are_kept_listed_read_and_deleted(model: Model, tmp_path: Path) -> None:
    with serving(model, tmp_path) as thread:
        client = client_of(thread)
        content = jsonl(chat("a")) + bytes(range(256)) * 4000
        files = [client.files.create(file=(f"../{i}.jsonl", content), purpose="batch") for i in range(3)]
        assert [(f.filename, f.bytes, f.purpose, f.status) for f in files] == [
            (f"../{i}.jsonl", len(content), "batch", "processed") for i in range(3)
        ]
        type(files[0]).model_validate(files[0].model_dump(warnings="error"))
        ids = [file.id for file in files]
        assert [file.id for file in client.files.list()] == ids[::-1]
        assert [file.id for file in client.files.list(order="asc", limit=2)] == ids, "the client follows the pages"
        assert [file.id for file in client.files.list(limit=1, after=ids[1]).data] == [ids[0]]
        assert not client.files.list(purpose="batch_output").data
        assert client.files.content(ids[0]).read() == content
        assert client.files.delete(ids[0]).deleted
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(ids[0])
        assert client.files.retrieve(ids[1]) == files[1]
    left = sorted(path.name for path in (tmp_path / "open" / "files").iterdir())
    assert left == sorted(ids[1:]) and not list((tmp_path / "aside").iterdir())


def test_each_endpoint_answers_as_a_live_request_does(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for its priority, its turn, and its time, which is the batch's."""
    prepare, asked = Engine.prepare, list[Request]()
    embed, priorities = AsyncEngine.embed, list[int]()

    async def embedded(self: AsyncEngine, *given: Any, priority: int = 0, **more: Any) -> list[list[float]]:
        priorities.append(priority)
        return await embed(self, *given, priority=priority, **more)

    monkeypatch.setattr(AsyncEngine, "embed", embedded)

    def noted(self: Engine, request: Request) -> Any:
        asked.append(request)
        return prepare(self, request)

    monkeypatch.setattr(Engine, "prepare", noted)
    bodies: dict[str, dict[str, Any]] = {
        CHAT: chat("x", store=True)["body"],
        "/v1/completions": {"model": "fish", "prompt": "the sea", "max_tokens": 4, "temperature": 0},
        "/v1/embeddings": {"model": "fish", "input": ["the sea", "a fish"]},
        "/v1/responses": {"model": "fish", "input": "the sea", "max_output_tokens": 4, "temperature": 0},
    }
    with serving(model, tmp_path) as thread:
        client = client_of(thread)
        for url, body in bodies.items():
            live = httpx.post(thread.url + url, json=body).json()
            line = {"custom_id": "x", "method": "POST", "url": url, "body": body}
            batch = ended(client, started(client, jsonl(line), url))
            type(batch).model_validate(batch.model_dump(warnings="error"))
            assert (batch.status, counts(batch), batch.error_file_id) == ("completed", (1, 1, 0), None)
            response = rows(client, batch.output_file_id)["x"]["response"]
            told = response["body"]
            for name in ("id", "created", "created_at", "completed_at", "output", "usage"):
                live.pop(name, None), told.pop(name, None)
            assert response["status_code"] == 200 and told == live
            assert response.get("unused") == (["store"] if url == CHAT else None), "no hint is ignored in silence"
        assert [batch.endpoint for batch in client.batches.list(limit=1)] == [*bodies][::-1], "all pages"
        assert [file.purpose for file in client.files.list()].count("batch_output") == 4
    assert [request.priority > LATER for request in asked] == [False, True] * 3
    assert [priority > LATER for priority in priorities] == [False, True]
    assert all(
        request.deadline is not None and (request.deadline > 3600) == bool(request.priority) for request in asked
    )
    assert len({request.payer for request in asked}) == 2


def test_the_example_of_the_documentation_runs(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text("utf-8").partition("## Files and batches")[2]
    example = page.partition("```python\n")[2].partition("```")[0]
    with serving(model, tmp_path) as thread:
        assert "http://127.0.0.1:8000" in example
        exec(example.replace("http://127.0.0.1:8000", thread.url), {})
    said = capsys.readouterr().out
    assert (
        said.startswith("completed BatchRequestCounts(completed=3, failed=0, total=3)") and said.count("custom_id") == 3
    )


def test_a_line_that_is_no_request_is_told_with_its_number(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are answered: with a byte order mark, CRLF, empty lines, and no line feed at the end."""
    good = [json.dumps(chat(name)).encode() for name in ("first", "crlf", "last")]
    content = b"\xef\xbb\xbf" + good[0] + b"\n\r\n" + good[1] + b"\r\n"
    content += jsonl(
        b"{broken",
        b"[1]",
        b"\xff\xfe",
        {**chat("method"), "method": "GET"},
        {**chat("url"), "url": "/v1/embeddings"},
        {**chat("field"), "customid": "x"},
        {**chat("x"), "custom_id": 7},
        {**chat("nobody"), "body": "text"},
        chat("streams", stream=True),
        chat("first"),
        chat("depth", depth="nowhere"),
        b'{"custom_id": "half", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "\\ud800"}}',
        b"x" * 5000,
        b'{"custom_id": "' + b":" * 1100 + b'"}',
    )
    content += good[2]
    wrong = {
        4: ("invalid_line", "JSON"), 5: ("invalid_line", "object"), 6: ("invalid_line", "JSON"),
        7: ("invalid_line", "method"), 8: ("mismatched_endpoint", "url"), 9: ("invalid_line", "did you mean"),
        10: ("invalid_line", "custom_id"), 11: ("invalid_line", "body"), 12: ("invalid_line", "stream"),
        13: ("duplicate_custom_id", "custom_id"), 15: ("invalid_line", "JSON"), 16: ("line_too_long", "line"), 
       17: ("invalid_line", "colons"),
    }  # fmt: skip
    monkeypatch.setattr(json_text, "MOST_COLONS", 1000)
    with serving(model, tmp_path, body_bytes=4096) as thread:
        client = client_of(thread)
        batch = ended(client, started(client, content))
        assert (batch.status, counts(batch)) == ("completed", (17, 3, 14))
        answers = rows(client, batch.output_file_id)
        assert {*answers} == {"first", "crlf", "last"}
        told = [json.loads(line) for line in client.files.content(batch.error_file_id).read().splitlines()]
        refused = {row["error"]["line"]: row["error"] for row in told if row["error"]}
        assert {*refused} == {*wrong}
        for number, (code, what) in wrong.items():
            error = refused[number]
            assert error["code"] == code and what in error["message"] and f"line {number}:" in error["message"]
        (failed,) = [row for row in told if not row["error"]]
        assert failed["custom_id"] == "depth" and failed["response"]["status_code"] == 400
        assert failed["response"]["body"]["error"]["param"] == "depth"


@pytest.mark.parametrize(
    ("content", "code"), [(b"\n \r\n", "empty_file"), (jsonl(*map(chat, "abc")), "too_many_requests")]
)
def test_a_batch_that_cannot_be_run_says_why(content: bytes, code: str, model: Model, tmp_path: Path) -> None:
    with serving(model, tmp_path, batch_lines=2) as thread:
        client = client_of(thread)
        batch = ended(client, started(client, content))
        assert batch.status == "failed" and batch.failed_at and batch.errors.data[0].code == code
        assert batch.output_file_id is None and batch.error_file_id is None


def test_a_restart_goes_on_and_asks_nothing_twice(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle, with an answer torn in its append, and again between the end and the files."""
    asked: list[bytes] = []
    gate = asyncio.Event()
    once = Inside._once

    async def counted(self: Inside, path: str, body: bytes, *given: Any) -> Reply:
        if len(asked) == 5 and not gate.is_set():
            await asyncio.Event().wait()  # until the service stops
        asked.append(body)
        return await once(self, path, body, *given)

    monkeypatch.setattr(Inside, "_once", counted)
    names = [str(number) for number in range(12)]
    with serving(model, tmp_path) as thread:
        client = client_of(thread)
        batch = started(client, jsonl(*map(chat, names)))
        until(lambda: counts(client.batches.retrieve(batch.id)) == (12, 5, 0))
        client.files.delete(batch.input_file_id)  # it has what it reads
    gate.set()
    place = tmp_path / "open" / "batches" / batch.id
    kept = (place / "answers.jsonl").read_bytes()
    (place / "answers.jsonl").write_bytes(kept + kept.splitlines()[0][:40])
    assert kept.count(b"\n") == 5 and len(asked) == 5
    publish = Store.publish

    def fails(self: Store, *given: Any) -> None:
        publish(self, *given)
        raise OSError(errno.ENOSPC, "No space left on device")  # and nothing of what follows is done until the end

    monkeypatch.setattr(Store, "publish", fails)
    monkeypatch.setattr(worker, "DISK_SECONDS", 1000.0)
    with serving(model, tmp_path) as thread:
        client = client_of(thread)
        until(lambda: client.files.list(purpose="batch_output").data)
        assert client.batches.retrieve(batch.id).status == "finalizing"
        assert client.batches.retrieve(batch.id).output_file_id is None, "not before it has ended"
    monkeypatch.setattr(Store, "publish", publish)
    with serving(model, tmp_path) as thread:
        client = client_of(thread)
        batch = ended(client, batch)
        assert (batch.status, counts(batch)) == ("completed", (12, 12, 0))
        assert {*rows(client, batch.output_file_id)} == {*names}
        assert [file.id for file in client.files.list()] == [batch.output_file_id], "one file, though made twice"
    assert len(asked) == len({*asked}) == 12
    assert [path.name for path in place.iterdir()] == ["batch.json"]


@pytest.mark.drill
def test_many_cancel_and_read_at_once(model: Model, tmp_path: Path) -> None:
    with serving(model, tmp_path) as thread:
        client = client_of(thread)
        batch = started(client, jsonl(*(chat(str(i), 200, ignore_eos=True) for i in range(40))))
        until(lambda: counts(client.batches.retrieve(batch.id))[1] > 0)

        async def burst() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{thread.url}/v1", api_key="none", max_retries=0) as many:
                calls = [each(batch.id) for each in (many.batches.cancel, many.batches.retrieve) * 6]
                return [found.status for found in await asyncio.gather(*calls)]

        statuses = asyncio.run(burst())
        assert {*statuses} <= {"in_progress", "cancelling", "cancelled"} and "in_progress" not in statuses[::2]
        batch = ended(client, batch)
        assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
        total, done, failed = counts(batch)
        assert total == 40 and 0 < done < 40 and failed == 0
        assert len(rows(client, batch.output_file_id)) == done
        assert client.batches.cancel(batch.id).status == "cancelled"
        whole = ended(client, started(client, jsonl(chat("a"))))
        with pytest.raises(openai.BadRequestError, match="completed"):
            client.batches.cancel(whole.id)


def test_a_key_sees_and_pays_its_own(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of its limits a batch takes half, one place at least."""
    monkeypatch.setattr(auth, "GRACE_SECONDS", 0.1)
    keys = tmp_path / "keys"
    keys.write_text("sk-a name=a tokens=100000\nsk-b name=b at_once=2\n")
    with serving(model, tmp_path / "kept", keys) as thread:
        a, b = (client_of(thread, key) for key in ("sk-a", "sk-b"))
        batch = ended(a, started(a, jsonl(chat("a"))))
        assert batch.status == "completed"
        left = httpx.get(f"{thread.url}/v1/models", headers={"Authorization": "Bearer sk-a"}).headers
        usage = rows(a, batch.output_file_id)["a"]["response"]["body"]["usage"]["total_tokens"]
        assert int(left["x-ratelimit-remaining-tokens"]) <= 100000 - usage + 30 * usage, "it refills as time goes"
        assert not b.files.list().data and not b.batches.list().data
        for call in (b.files.retrieve, b.files.content, b.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(batch.output_file_id)
        for call in (b.batches.retrieve, b.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                call(batch.id)
        with pytest.raises(openai.NotFoundError):
            b.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
        other = started(b, jsonl(*(chat(str(i), 100, ignore_eos=True) for i in range(30))))
        until(lambda: counts(b.batches.retrieve(other.id))[1] > 0)
        assert b.chat.completions.create(**chat("live")["body"]).choices, "the other place is free"
        keys.write_text("sk-a name=a tokens=100000\n")  # b's key goes
        with pytest.raises(openai.AuthenticationError):
            b.batches.retrieve(other.id)
        place = next((tmp_path / "kept").glob(f"*/batches/{other.id}")) / "batch.json"
        until(lambda: json.loads(place.read_text())["status"] == "failed")
        state = json.loads(place.read_text())
        assert state["errors"]["data"][0]["code"] == "invalid_api_key"
        keys.write_text("sk-b name=b\n")
        done = ended(b, other)
        assert done.status == "failed" and len(rows(b, done.output_file_id)) == counts(done)[1] > 0, "what it paid for"


class Half:
    """A file on a disk that takes half of a line."""

    def __init__(self, file: Any, end: int) -> None:
        self._file, self._end = file, end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if self._file.tell() > self._end:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._file.write(data[: len(data) // 2]))


def test_a_full_disk_loses_no_answer(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for: nothing is asked again, and no line is torn."""
    append, asked, failures, alone = Log.append, list[int](), iter(range(3)), threading.Lock()

    def full(self: Log, number: int, line: bytes) -> None:
        asked.append(number)
        with alone:  # appends come in several threads
            if next(failures, None) is None:
                return append(self, number, line)
            file, self._file = self._file, Half(self._file, self._end)  # type: ignore[assignment]
            try:
                return append(self, number, line)
            finally:
                self._file = file

    monkeypatch.setattr(Log, "append", full)
    monkeypatch.setattr(worker, "DISK_SECONDS", 0.05)
    with serving(model, tmp_path) as thread:
        client = client_of(thread)
        batch = ended(client, started(client, jsonl(*(chat(str(i)) for i in range(6)))))
        assert counts(batch) == (6, 6, 0) and len(rows(client, batch.output_file_id)) == 6
    assert len(asked) == 9


def test_what_is_late_expires_and_is_told(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, tmp_path) as thread:
        client = client_of(thread)
        batch = started(client, jsonl(*(chat(str(i), 200, ignore_eos=True) for i in range(40))))
        until(lambda: counts(client.batches.retrieve(batch.id))[1] > 0)
        tells(monkeypatch, "shoal.api.batches.worker", time=lambda: batch.expires_at + 1.0)
        batch = ended(client, batch)
    assert batch.status == "expired" and batch.expired_at
    with serving(model, tmp_path) as thread:
        client = client_of(thread)
        total, done, failed = counts(batch)
        assert total == 40 == done + failed and 0 < done < 40
        late = rows(client, batch.error_file_id)
        assert {row["error"]["code"] for row in late.values()} == {"batch_expired"} and len(late) == failed
        assert not {*late} & {*rows(client, batch.output_file_id)}


@pytest.mark.drill
def test_two_services_on_one_folder_run_a_batch_once(model: Model, tmp_path: Path) -> None:
    """Whichever is asked; and where the one that runs it ends, the other goes on."""
    with serving(model, tmp_path) as second:
        with serving(model, tmp_path) as first:
            one, two = client_of(first), client_of(second)
            for client in (one, two):
                batch = started(client, jsonl(*(chat(str(i)) for i in range(4))))
                batch = ended(two if client is one else one, batch)
                assert counts(batch) == (4, 4, 0) and len(rows(client, batch.output_file_id)) == 4
            # enough that a busy machine does not come through them while `first` ends
            slow = started(one, jsonl(*(chat(str(i), 200, ignore_eos=True) for i in range(2000))))
            until(lambda: counts(one.batches.retrieve(slow.id))[1] > 0)
        # `first` came second and ran nothing; now a third takes over from `second`
        with serving(model, tmp_path) as third:
            assert two.batches.cancel(slow.id).status in ("cancelling", "cancelled")
            assert ended(client_of(third), slow).status == "cancelled"


def upload(url: str, content: bytes, kind: str = "multipart/form-data; boundary=b") -> httpx.Response:
    return httpx.post(f"{url}/v1/files", content=content, headers={"Content-Type": kind})


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    more = "" if filename is None else f'; filename="{filename}"'
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


FILE, PURPOSE, END = part("file", b"{}\n", "x"), part("purpose", b"batch"), b"--b--\r\n"


WRONG: list[tuple[bytes, int, str | None, str]] = [
    (FILE + END, 400, "purpose", "missing"),
    (PURPOSE + END, 400, "file", "missing"),
    (PURPOSE + FILE, 400, None, "cut off"),
    (FILE + FILE + PURPOSE + END, 400, "file", "twice"),
    (part("purpose", b"fine-tune") + FILE + END, 400, "purpose", "batch"),
    (part("purposes", b"batch") + FILE + END, 400, "purposes", "did you mean"),
    (part("expires_after[seconds]", b"3600") + PURPOSE + FILE + END, 400, "expires_after", "deleted"),
    (part("file", b"", "x") + PURPOSE + END, 400, "file", "empty"),
    (part("purpose", b"b" * 2000) + FILE + END, 400, "purpose", "1024"),
    (part("file", b"x" * 3000, "x") + PURPOSE + END, 413, "file", "2048"),
    (part("file", b"x" * 200_000, "x") + PURPOSE + END, 413, None, "too large"),
    (b"no form at all", 400, None, "form"),
    (b"", 400, None, "cut off"),
]


def test_a_wrong_form_is_told_and_leaves_nothing(model: Model, tmp_path: Path) -> None:
    with serving(model, tmp_path, file_bytes=2048) as thread:
        for content, status, param, says in WRONG:
            answer = upload(thread.url, content)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (status, param) and says in error["message"], error
            assert upload(thread.url, content, "application/json").status_code in (413, 415)
            assert upload(thread.url, FILE + PURPOSE + END).status_code == 200, "and the next is taken"
    assert not list((tmp_path / "aside").iterdir())


def test_names_lead_nowhere_else_and_queries_are_read_strictly(model: Model, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "about.json").write_text("{}")
    with serving(model, tmp_path / "kept") as thread, httpx.Client(base_url=thread.url) as http:
        for name in ("..%2f..%2f..%2fsecret", "file-..", "%2e%2e", "file-" + "0" * 31 + "%0a", "file-" + "0" * 32):
            for path in (f"/v1/files/{name}", f"/v1/files/{name}/content", f"/v1/batches/{name}"):
                assert http.get(path).status_code == 404
            assert http.delete(f"/v1/files/{name}").status_code == 404
            gone = name == "file-" + "0" * 32  # who reads pages goes on behind one that was deleted
            assert http.get(f"/v1/files?after={name}").status_code == (200 if gone else 404)
        for query in ("limit=0", "limit=101", "limit=x", "limit=1&limit=2", "before=x"):
            assert http.get(f"/v1/batches?{query}").status_code == 400
        assert http.get("/v1/files?order=up").status_code == 400 == http.get("/v1/files?purpose=x").status_code
        body = {"input_file_id": "file-" + "0" * 32, "endpoint": CHAT, "completion_window": "24h"}
        assert http.post("/v1/batches", json=body).status_code == 404
        for field, value in {"endpoint": "/v1/models", "completion_window": "1h", "output_expires_after": {}}.items():
            answer = http.post("/v1/batches", json=body | {field: value})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert (tmp_path / "secret" / "about.json").exists()


def test_what_a_key_holds_is_bounded(model: Model, tmp_path: Path) -> None:
    options = {"held_files": 3, "open_batches": 1, "held_batches": 2}
    with serving(model, tmp_path, **options) as thread:
        client = client_of(thread)
        slow = started(client, jsonl(*(chat(str(i), 200, ignore_eos=True) for i in range(40))))
        with pytest.raises(openai.ConflictError, match="too many batches wait"):
            client.batches.create(input_file_id=slow.input_file_id, endpoint=CHAT, completion_window="24h")
        client.batches.cancel(slow.id)
        ended(client, slow)
        for file in client.files.list():
            client.files.delete(file.id)
        later = [ended(client, started(client, jsonl(chat("a")))) for _ in range(2)]
        assert [batch.id for batch in client.batches.list()] == [batch.id for batch in later[::-1]], "one is forgotten"
        with pytest.raises(openai.ConflictError, match="too many files"):
            client.files.create(file=("x", b"{}"), purpose="batch")


def test_without_a_folder_the_routes_say_so(model: Model) -> None:
    served = ServedModel("fish", model.config, model.tokenizer, model.chat_template)
    engine = AsyncEngine(Engine(model))
    with in_a_thread(build_app([Hosted(served, engine)]), [engine]) as thread:
        client = client_of(thread)
        for call in (client.files.list, client.batches.list, lambda: client.files.create(file=b"{}", purpose="batch")):
            with pytest.raises(openai.NotFoundError, match=r"switched off: start the service with --batches DIR"):
                call()
