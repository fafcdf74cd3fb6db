"""Adapters over HTTP: each a model of its own, loaded and dropped while the others are served."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal import Engine, Model
from shoal.api.adapters import loaded
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.served import MOST_ADAPTERS, ServedModel
from shoal.api.service import Hosted
from shoal.data.place import Bucket
from shoal.engine.front import AsyncEngine
from shoal.errors import ConfigError
from shoal.open_weights.served_adapter import read
from tests.adapters import merged, write
from tests.s3 import service
from tests.serving import Thread, in_a_thread
from tests.unit.engine.lively import lively

PROMPT = list(range(30, 80))


@dataclass
class Served:
    http: httpx.Client
    model: Model
    folder: Path  # that requests may load from
    thread: Thread
    engine: Engine

    def load(self, name: str, path: str, **more: Any) -> httpx.Response:
        return self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})

    def unload(self, name: str) -> httpx.Response:
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def says(self, name: str, **more: Any) -> dict[str, Any]:
        fields = {
            "model": name,
            "prompt": PROMPT,
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
            "depth": "full",
        }
        answer = self.http.post("/v1/completions", json={**fields, "return_token_ids": True, **more})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def tokens(self, name: str, **more: Any) -> list[int]:
        found: list[int] = self.says(name, **more)["choices"][0]["token_ids"]
        return found

    def cards(self) -> dict[str, dict[str, Any]]:
        return {card["id"]: card for card in self.http.get("/v1/models").json()["data"]}


@contextmanager
def served(
    root: Path, *names: str, loads: bool = True, keys: ApiKeys | None = None, at: str = "", place: str = ""
) -> Iterator[Served]:
    """A lively model with the adapters `names` of seeds 1, 2 ..., which are `at` another address than they were written to, and
    loads from `place`."""
    model, folder = lively(), root / "open"
    folder.mkdir(parents=True)
    own = Engine(model, units=600)
    engine = AsyncEngine(own, read_adapter=read)
    fish = ServedModel("fish", model.config, model.tokenizer, model.chat_template, aliases=("carp",))
    directories = {
        name: f"{at}/{name}" if at else str(write(root / name, model, seed)) for seed, name in enumerate(names, 1)
    }
    adapters = asyncio.run(loaded(engine, directories))
    source = (place or folder) if loads else None
    app = build_app([Hosted(fish, engine)], adapters=adapters, adapters_from=source, api_keys=keys)
    with in_a_thread(app, [engine]) as thread, httpx.Client(base_url=thread.url, timeout=60) as http:
        yield Served(http, model, folder, thread, own)


def wanted(service: Served, directory: Path, tokens: int = 8) -> list[int]:
    return merged(service.model, directory).generate_naive(PROMPT, tokens, ignore_eos=True)


def test_each_name_says_what_its_merged_model_says(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    with served(tmp_path, *names) as service:
        cards = service.cards()
        assert [*cards] == ["fish", "carp", *names]
        assert [cards[name]["parent"] for name in cards] == [None, None, *["fish"] * 4]
        assert service.http.get("/v1/models/b").json() == cards["b"]
        with ThreadPoolExecutor(5) as pool:
            got = dict(zip(["fish", *names], pool.map(service.tokens, ["fish", *names]), strict=True))
        assert got["fish"] == service.model.generate_naive(PROMPT, 8, ignore_eos=True)
        assert {name: got[name] for name in names} == {name: wanted(service, tmp_path / name) for name in names}
        assert len({tuple(tokens) for tokens in got.values()}) == 5
        assert service.says("a")["model"] == "a"
        missing = service.http.post("/v1/completions", json={"model": "e", "prompt": "x"})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_vectors_and_other_routes_use_it(tmp_path: Path) -> None:
    with served(tmp_path, "a") as service:

        def vector(name: str) -> list[float]:
            found: list[float] = service.http.post("/v1/embeddings", json={"model": name, "input": "sea"}).json()[
                "data"
            ][0]["embedding"]
            return found

        assert vector("a") == pytest.approx(merged(service.model, tmp_path / "a").embed("sea").tolist(), abs=1e-6)
        assert vector("a") != pytest.approx(vector("fish"), abs=1e-3)
        pair = {"text_1": "sea", "text_2": "deep water"}
        scores = [
            service.http.post("/v1/score", json={"model": n, **pair}).json()["data"][0]["score"] for n in ("a", "fish")
        ]
        assert scores[0] != pytest.approx(scores[1], abs=1e-4)
        chat = [{"role": "user", "content": "hello"}]
        texts = []
        for name in ("a", "fish"):
            body = {"model": name, "messages": chat, "temperature": 0, "max_tokens": 12, "depth": "shallow"}
            texts.append(
                service.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            )
            answer = service.http.post("/v1/responses", json={"model": name, "input": "hello", "max_output_tokens": 4})
            assert answer.status_code == 200 and answer.json()["model"] == name
        assert texts[0] != texts[1]
        assert service.http.post("/tokenize", json={"model": "a", "prompt": "sea"}).json()["count"] == 3


def test_one_is_loaded_dropped_and_loaded_anew(tmp_path: Path) -> None:
    """What was loaded under a name before leaves nothing behind, its pages in the prefix cache least of all."""
    with served(tmp_path) as service:
        for seed in (1, 2):
            directory = write(service.folder / "runs" / "new", service.model, seed)
            done = service.load("new", "runs/new")
            assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'new' added successfully.")
            assert service.cards()["new"]["parent"] == "fish"
            first, again = service.says("new"), service.says("new")
            cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, again)]
            assert cached[0] == 0 and cached[1] > 0
            assert first["choices"][0]["token_ids"] == again["choices"][0]["token_ids"] == wanted(service, directory)
            taken = service.load("new", "runs/new")
            assert (taken.status_code, taken.json()["error"]["param"]) == (400, "lora_name")
            gone = service.unload("new")
            assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
            assert "new" not in service.cards()
            assert service.http.post("/v1/completions", json={"model": "new", "prompt": "x"}).status_code == 404
            assert service.unload("new").status_code == 404
        service.load("new", "runs/new")
        write(service.folder / "runs" / "new", service.model, 3)
        assert service.load("new", "runs/new", load_inplace=True).status_code == 200
        assert service.tokens("new") == wanted(service, service.folder / "runs" / "new")


def test_two_names_of_the_same_weights_go_one_by_one(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        directory = write(service.folder / "a", service.model, 1)
        assert service.load("one", "a").status_code == service.load("two", str(directory)).status_code == 200
        assert service.unload("one").status_code == 200
        assert service.tokens("two") == wanted(service, directory)


def test_a_stream_ends_with_the_adapter_that_it_began_with(tmp_path: Path) -> None:
    with served(tmp_path, "a") as service:
        body = {
            "model": "a", "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True, "depth": "full",
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        tokens, dropped = [], False
        with service.http.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    if not dropped:
                        dropped = True
                        assert service.unload("a").status_code == 200
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    tokens += choices[0].get("token_ids") or [] if choices else []
        assert tokens == wanted(service, tmp_path / "a", 60)
        assert service.http.post("/v1/completions", json={"model": "a", "prompt": "x"}).status_code == 404


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        outside = write(tmp_path / "outside", service.model, 1)
        (service.folder / "link").symlink_to(outside)
        inside = write(service.folder / "inside", service.model, 1)
        (inside / "adapter_model.safetensors").unlink()
        (inside / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
        shutil.copytree(outside, service.folder / "good")
        (service.folder / "itself").symlink_to("itself")
        for path in (
            "../outside",
            str(outside),
            "link",
            "inside",
            "good/../../outside",
            ".",
            "",
            "/",
            "nothing",
            "a\0b",
            "x" * 5000,
            "x" * 300,
            "itself",
        ):
            refused = service.load("new", path)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_path"), path
            assert str(tmp_path) not in refused.text or path == str(outside), "where the folder lies is the operator's"
        for name in ("fish", "carp", "a/b", "", "a b", "x" * 65, "../a"):
            refused = service.load(name, "good")
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "lora_name"), name
        assert [*service.cards()] == ["fish", "carp"]
        assert service.load("new", "good").status_code == 200


def test_what_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    with served(tmp_path, "a") as service:
        write(service.folder / "other", service.model, 1, base_model_name_or_path="somebody/else")
        refused = service.load("new", "other")
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "lora_path") and str(tmp_path) not in error["message"]
        assert "base_model_name_or_path: got 'somebody/else'" in error["message"]
        assert service.load("a", "other", load_inplace=True).status_code == 400
        assert service.tokens("a") == wanted(service, tmp_path / "a")


def test_there_is_a_most(tmp_path: Path) -> None:
    with served(tmp_path) as service:
        write(service.folder / "a", service.model, 1, rank=1, only=lambda name: "groups.0" in name)
        for number in range(MOST_ADAPTERS):
            assert service.load(f"a{number}", "a").status_code == 200
        assert f"at most {MOST_ADAPTERS}" in service.load("more", "a").json()["error"]["message"]
        assert service.unload("a0").status_code == 200 and service.load("more", "a").status_code == 200


def test_loading_is_off_unless_a_folder_is_named_and_behind_the_keys(tmp_path: Path) -> None:
    with served(tmp_path, "a", loads=False) as service:
        for answer in (service.load("new", "a"), service.unload("a")):
            assert answer.status_code == 404 and "--adapters-from" in answer.json()["error"]["message"]
        assert service.tokens("a") == wanted(service, tmp_path / "a")
    other = tmp_path / "keyed"
    other.mkdir()
    with served(other, keys=ApiKeys(["secret"])) as service:
        assert service.load("new", "a").status_code == service.unload("a").status_code == 401


@pytest.mark.parametrize("name", ["fish", "carp", "no good"])
def test_a_service_does_not_start_with_a_name_that_is_taken_or_none(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adapters: "), served(tmp_path, name):
        pass


@pytest.mark.drill
def test_adapters_in_s3_are_served_as_those_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a service starts with, and those that requests load; what is wrong says where it is and nothing of a cache."""
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        model, root = lively(), "s3://ocean/adapters"
        for seed, name in enumerate(("a", "b"), 1):
            for path in write(tmp_path / name, model, seed).iterdir():
                Bucket(f"{root}/{name}", made.inside).put(path, path.name)
        with served(tmp_path / "one", "a", at=root, place=f"{root}/") as service_:
            assert service_.tokens("a") == wanted(service_, tmp_path / "a")
            assert service_.load("b", "b").status_code == 200
            assert service_.tokens("b") == wanted(service_, tmp_path / "b")
            missing = service_.load("c", "c")
            assert missing.status_code == 400 and missing.json()["error"]["param"] == "lora_path"
            assert "c lacks adapter_config.json" in missing.text and "s3://" not in missing.text
            write(tmp_path / "other", model, 1, base_model_name_or_path="somebody/else")
            for path in (tmp_path / "other").iterdir():
                Bucket(f"{root}/other", made.inside).put(path, path.name)
            refused = service_.load("other", f"{root}/other").json()["error"]["message"]
            assert "other/adapter_config.json: base_model_name_or_path" in refused and str(tmp_path) not in refused
            Bucket(f"{root}/b", made.inside).put(tmp_path / "a" / "adapter_config.json", "adapter_model.safetensors")
            broken = service_.load("d", "b").json()["error"]["message"]
            assert broken.startswith("cannot read b/adapter_model.safetensors"), broken
            assert service_.tokens("b") == wanted(service_, tmp_path / "b")
