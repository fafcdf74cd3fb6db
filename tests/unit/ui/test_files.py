"""No file of the server comes out through the pages, whichever of Gradio's endpoints is asked, and nothing without a key where
there are keys."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.testclient import TestClient

pytest.importorskip("gradio")

import gradio as gr
from gradio.routes import App

from ui import guard, login, talk, uploads
from ui.app import PLACES
from ui.assistants import PICTURES
from ui.mount import mount

SECRET = "sk-secret-of-the-server"
META = {"_type": "gradio.FileData"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
CARD = {"id": "fish", "object": "model", "created": 0, "owned_by": "x", "root": "fish", "max_model_len": 64}
CARD |= {"depths": {"full": 4}, "quantization": "none"}


def _client(app: FastAPI, **cookies: str) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1", cookies=cookies, follow_redirects=False)


def _pages(monkeypatch: pytest.MonkeyPatch, key: str | list[str] = "", asked: list[Any] | None = None) -> FastAPI:
    """The pages over an API of two routes, which wants `key` where one is given; `asked`: bodies of chats that it was asked."""
    api = FastAPI()

    def refusal(request: Request) -> JSONResponse | None:
        given = request.headers.get("authorization")
        keys = [f"Bearer {one}" for one in ([key] if isinstance(key, str) else key)]
        return JSONResponse({"error": {"message": "no"}}, 401) if key and given not in keys else None

    @api.get("/v1/models")
    async def models(request: Request) -> Any:
        return refusal(request) or {"object": "list", "data": [CARD]}

    @api.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        (asked if asked is not None else []).append(await request.json())
        return refusal(request) or JSONResponse({"error": {"message": "the model is asleep"}}, 400)

    http = httpx.AsyncClient(transport=httpx.ASGITransport(app=api))
    made = openai.AsyncOpenAI(base_url="http://api/v1", api_key="none", max_retries=0, http_client=http)
    monkeypatch.setattr(talk, "client", lambda base_url: made)
    return mount(FastAPI(), base_url="http://api/v1", model=None)


def _blocks(app: FastAPI) -> gr.Blocks:
    inner = next(route.app for route in app.routes if isinstance(getattr(route, "app", None), App))  # type: ignore[attr-defined]
    blocks: gr.Blocks = inner.get_blocks()
    return blocks


@pytest.fixture
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in the folder that the server runs in, named as a picture is."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "keys.png"
    path.write_text(SECRET)
    return path


@pytest.fixture
def page(secret: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    with _client(_pages(monkeypatch)) as client:
        assert client.get("/ui/").status_code == 200
        yield client


def _upload(client: TestClient, name: str = "a.png", content: bytes = PNG) -> str:
    answer = client.post("/ui/gradio_api/upload", files={"files": (name, content, "image/png")})
    assert answer.status_code == 200, answer.text
    path: str = answer.json()[0]
    return path


def _file(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": META, **more}


def _chat(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*content, {"type": "text", "text": "?"}], "metadata": None}]


def _forms(path: str) -> list[Any]:
    """The ways in which a message can name a file."""
    text = {"type": "text", "text": path}
    files: list[Any] = [
        _file(path),
        _file("x.png", url=path),
        {**_file(path), "meta": {**META, "more": 1}},
        {"path": path},
    ]
    files += [_file(path, url=f"/gradio_api/file={path}"), _file(f"/gradio_api/file={path}"), _file(f"file://{path}")]
    files += [
        _file(path, is_stream=True),
        _file(f"http://127.0.0.1:1/{path}"),
        _file(f"{Path(PICTURES[0]).parent}/../{path}"),
    ]
    parts = [{"type": "file", "file": one, "alt_text": None} for one in files] + [{**text, "path": path}]
    parts.append({"type": "component", "component": "image", "value": path, "constructor_args": {}, "props": {}})
    forms: list[Any] = [*files, [files[0]], {"text": "?", "files": files[:1]}, {"value": files[0]}, path]
    forms += [_chat(part) for part in (*parts, *files)]
    return [
        *forms,
        json.dumps({"id": "x", "messages": [{"role": "user", "text": path, "below": "", "file": files[0]}]}),
    ]


def _said_after(client: TestClient, index: int, data: list[Any], **more: Any) -> list[dict[str, Any]]:
    """All that the server says to an event."""
    body = {"data": data, "fn_index": index, "session_hash": "abc", **more}
    if client.post("/ui/gradio_api/queue/join", json=body).status_code != 200:
        return []
    lines = client.get("/ui/gradio_api/queue/data", params={"session_hash": "abc"}).text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def _served(client: TestClient, said: Any) -> list[str]:
    """The contents of all files that an answer names."""
    paths: list[str] = []

    def walk(value: Any) -> None:
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            walk(one)
        if isinstance(value, dict):
            paths.extend(str(value[name]) for name in ("path", "url") if isinstance(value.get(name), str))

    walk(said)
    named = {path.split("file=")[-1] for path in paths}
    return [client.get(f"/ui/gradio_api/file={path}").text for path in named]


def test_no_event_gives_or_asks_the_content_of_a_file_that_was_not_uploaded(
    secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each event, with and without a button, with the file in each of its inputs, in each form."""
    asked: list[Any] = []
    app = _pages(monkeypatch, asked=asked)
    monkeypatch.setattr(talk, "INSISTED_ON_NOBODY", 0.0)
    before = set(uploads.folder().rglob("*"))
    with _client(app) as client:
        client.get("/ui/")
        events = [(index, fn) for index, fn in _blocks(app).fns.items() if fn.fn is not None]
        assert len(events) > 40
        kinds: set[tuple[Any, ...]] = set()
        for index, fn in events:
            usual = [block.example_payload() if hasattr(block, "example_payload") else None for block in fn.inputs]
            kind = (getattr(fn.fn, "__qualname__", index), *(type(block).__name__ for block in fn.inputs))
            if kind in kinds or fn.cancels:  # the same of another page
                continue
            kinds.add(kind)
            for place, block in enumerate(fn.inputs):
                takes_files = getattr(block, "data_model", None) is not None
                for form in _forms(str(secret)) if takes_files else _forms(str(secret))[:1]:
                    said = _said_after(client, index, [*usual[:place], form, *usual[place + 1 :]])
                    assert SECRET not in json.dumps(said) and SECRET not in _served(client, said)
    new = {path for path in uploads.folder().rglob("*") if path.is_file()} - before
    assert SECRET not in [path.read_bytes().decode(errors="replace") for path in new], "nothing was copied"
    assert "c2stc2VjcmV0" not in json.dumps(asked), "no model was given it"  # SECRET in base64
    assert not any(isinstance(one["messages"][-1]["content"], list) for one in asked)


def test_a_model_is_given_what_its_session_uploaded(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    app = _pages(monkeypatch, asked=asked)
    with _client(app) as client:
        client.get("/ui/")
        index, fn = next((i, fn) for i, fn in _blocks(app).fns.items() if getattr(fn.fn, "__name__", "") == "reply")
        first = _chat({"type": "file", "file": _file(_upload(client)), "alt_text": None})
        data = [first, None, "full", 4, 0, "", 1, "", "", False]
        assert len(data) == len(fn.inputs)
        _said_after(client, index, data)
    picture, words = asked[-1]["messages"][-1]["content"]
    assert words["text"] == "?" and base64.b64decode(picture["image_url"]["url"].partition(",")[2]) == PNG


@pytest.mark.parametrize("form", range(len(_forms("x"))))
def test_what_a_page_sends_names_none_but_its_own_files(form: int, secret: Path) -> None:
    files = uploads.Uploads(PICTURES)
    given = [_forms(str(secret))[form]]
    try:
        said = files.own("somebody", given)
    except ValueError:
        return  # a component

    def paths(value: Any) -> list[str]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        mine = [value["path"]] if isinstance(value, dict) and "path" in value else []
        return [*mine, *(path for one in inner for path in paths(one))]

    assert set(paths(said)) <= {str(uploads.LOST_PICTURE)}
    assert "url" not in json.dumps(said)


def test_a_session_is_given_its_own_upload_and_no_other_is(page: TestClient, secret: Path) -> None:
    path = _upload(page)
    assert page.get(f"/ui/gradio_api/file={path}").content == PNG
    files = page.app.user_middleware[0].kwargs["files"]  # type: ignore[attr-defined]
    mine = login.session_of(page.cookies)
    assert files.own(mine, _file(path))["path"] == path
    page.cookies.clear()
    page.get("/ui/")
    other = login.session_of(page.cookies)
    assert other and other != mine
    assert page.get(f"/ui/gradio_api/file={path}").status_code == 403
    assert files.own(other, _file(path))["path"] == str(uploads.LOST_PICTURE)
    page.cookies.clear()
    assert page.post("/ui/gradio_api/upload", files={"files": ("a.png", PNG)}).status_code == 403


@pytest.mark.parametrize("place", ["{}", "/../../..{}", "file://{}", "%2e%2e/{}", "http://127.0.0.1:1{}"])
def test_no_path_of_the_server_is_served(place: str, page: TestClient, secret: Path) -> None:
    for route in ("gradio_api/file=", "gradio_api/file/", "gradio_api/proxy=", "file=", "assets/../../../", "static/"):
        answer = page.get(f"/ui/{route}{place.format(secret)}")
        assert answer.status_code in (403, 404) and SECRET not in answer.text


def test_no_route_of_gradio_is_answered_that_no_page_asks_for(page: TestClient) -> None:
    """All that Gradio has, and what the next version adds."""
    inner = next(route.app for route in page.app.routes if isinstance(getattr(route, "app", None), App))  # type: ignore[attr-defined]
    wanted = {"/", "/config", "/theme.css", "/manifest.json", "/login", "/logout"}  # the last two are ours
    wanted |= {f"/{folder}/{{path:path}}" for folder in ("assets", "static", "svelte")}
    names = (
        "app_id",
        "info",
        "queue/data",
        "theme.css",
        "startup-events",
        "upload_progress",
        "heartbeat/{session_hash}",
    )
    names += ("file={path_or_url:path}", "queue/join", "cancel", "reset", "upload")
    wanted |= {f"/gradio_api/{name}" for name in names}
    refused = 0
    nested = [getattr(route, "original_router", None) for route in inner.routes]
    for route in [*inner.routes, *(route for router in nested if router for route in router.routes)]:
        path = getattr(route, "path", "/")
        if path in wanted or path.lstrip("/") in {place.path for place in PLACES}:
            continue
        for method in getattr(route, "methods", None) or ("GET",):
            refused += 1
            assert page.request(method, f"/ui{path}").status_code == 404, f"{method} {path}"
    assert refused > 60


def test_without_a_key_nothing_is_there_but_the_login(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _client(_pages(monkeypatch, key="sk-fish")) as client:
        for place in PLACES:
            answer = client.get(f"/ui/{place.path}")
            assert (answer.status_code, answer.headers["location"]) == (303, f"login?to={place.path}")
        for path in ("config", "gradio_api/info", "gradio_api/app_id", "gradio_api/queue/data?session_hash=x"):
            assert client.get(f"/ui/{path}").status_code == 401
        assert client.get(f"/ui/gradio_api/file={PICTURES[0]}").status_code == 401
        for path in ("queue/join", "upload", "cancel", "reset"):
            assert client.post(f"/ui/gradio_api/{path}", json={"data": [], "fn_index": 0}).status_code == 401
        form = client.get("/ui/login?to=compare")
        assert form.status_code == 200 and "to=compare" in form.text
        assert client.post("/ui/login", data={"key": "sk-no"}).headers.get("location") is None
        assert client.get("/ui/").status_code == 303


def test_a_login_is_a_cookie_that_scripts_and_other_sites_do_not_get(
    secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _client(_pages(monkeypatch, key="sk-fish")) as client:
        answer = client.post("/ui/login?to=compare", data={"key": "sk-fish"})
        assert (answer.status_code, answer.headers["location"]) == (303, "./compare")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Secure" not in cookie and "sk-fish" not in cookie
        assert client.get("/ui/compare").status_code == 200
        answer = client.post(
            "/ui/login?to=//evil.example", data={"key": "sk-fish"}, headers={"x-forwarded-proto": "https"}
        )
        assert answer.headers["location"] == "./" and "; Secure" in answer.headers["set-cookie"]
        client.get("/ui/logout")
        assert client.get("/ui/").status_code == 303


def test_the_form_shows_nothing_that_a_link_says(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _client(_pages(monkeypatch, key="sk-fish")) as client:
        assert "<b>" not in client.get('/ui/login?to="><b>').text


@pytest.mark.parametrize("cookie", ["", "%%%", "c2stZmlzaA==\x00", "//79", "CgA="])
def test_a_cookie_that_holds_no_key_is_none(cookie: str) -> None:
    assert login.key_of({login.KEY: cookie}) in ("", "sk-fish")


def test_a_key_that_goes_is_asked_about_again(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["sk-fish"]
    with _client(_pages(monkeypatch, key=keys)) as client:
        client.post("/ui/login", data={"key": "sk-fish"})
        keys[:] = ["sk-other"]
        assert client.get("/ui/").status_code == 200, "it is sure for a while"
        monkeypatch.setattr(guard, "SURE_SECONDS", 0.0)
        assert client.get("/ui/").status_code == 303


def test_an_unknown_api_shows_the_pages_and_takes_no_upload(secret: Path) -> None:
    with _client(mount(FastAPI(), base_url="http://127.0.0.1:1/v1", model=None)) as client:
        assert client.get("/ui/").status_code == 200
        assert client.post("/ui/gradio_api/upload", files={"files": ("a.png", PNG)}).status_code == 503


@pytest.mark.parametrize(
    "path", ["/login", *(f"/gradio_api/{name}" for name in ("queue/join", "cancel", "reset", "upload"))]
)
@pytest.mark.parametrize(("slow", "status"), [(False, 413), (True, 408)], ids=["large", "slow"])
def test_no_body_is_read_without_an_end(
    path: str, slow: bool, status: int, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = _pages(monkeypatch)
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(guard, "MOST_BYTES", 2**16)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    kind = "multipart/form-data; boundary=x" if path.endswith("upload") else "application/json"
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        yield head if path.endswith("upload") else b"["
        while sent < 100:
            sent += 1
            if slow:
                await asyncio.sleep(0.1)
            yield b" " if slow else b"&" * 2**13

    async def post() -> httpx.Response:
        cookies = {login.SESSION: login.new_session()}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://127.0.0.1", cookies=cookies
        ) as http:
            return await http.post(f"/ui{path}", content=body(), headers={"content-type": kind})

    reply = asyncio.run(post())
    assert (reply.status_code, reply.headers["connection"]) == (status, "close"), reply.text
    assert sent < 20


def test_gradio_checks_paths_too(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a file of a message overlooked here, Gradio would still refuse what lies outside its folder."""
    blocks = _blocks(_pages(monkeypatch))
    index = next(i for i, fn in blocks.fns.items() if any(isinstance(b, gr.Chatbot) for b in fn.inputs) and fn.fn)
    fn = blocks.fns[index]
    place = next(i for i, b in enumerate(fn.inputs) if isinstance(b, gr.Chatbot))
    data: list[Any] = [None] * len(fn.inputs)
    data[place] = _chat({"type": "file", "file": _file(str(secret)), "alt_text": None})
    from gradio.context import LocalContext

    async def preprocess() -> None:
        LocalContext.blocks.set(blocks)
        await blocks.preprocess_data(fn, data, None)

    with pytest.raises(Exception, match="not uploaded by a user"):
        asyncio.run(preprocess())


def test_the_pages_own_pictures_are_served(page: TestClient) -> None:
    config = page.get("/ui/config").text
    assert str(PICTURES[0]) in config and str(uploads.folder()) not in config, "of none there is a copy"
    answer = page.get(f"/ui/gradio_api/file={PICTURES[0]}")
    assert answer.content == Path(PICTURES[0]).read_bytes()
