"""Adapters of a service with two gateways and two replicas: one list, whichever is asked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.on_ray import serve
from shoal.on_ray.serve_config import GATEWAY, serve_config
from tests.adapters import merged, write
from tests.on_ray.test_serve import free_port, replicas, told, until
from tests.unit.engine.lively import lively

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]

PROMPT = [*range(30, 60)]
ASKED = 12  # connections of their own: both gateways answer some of them


def test_what_one_gateway_loads_and_drops_the_other_does_too(shared_ray: None, tmp_path: Path) -> None:
    model = lively()
    model.save(tmp_path / "model")
    wanted = {
        name: merged(model, write(tmp_path / "open" / name, model, seed)).generate_naive(PROMPT, 8, ignore_eos=True)
        for seed, name in enumerate(("a", "b"), 1)
    }
    args = ServeArgs(
        model=str(tmp_path / "model"), name="fish", min_replicas=2, max_replicas=2, cpus=0.5, ui=False,
        min_gateways=2, max_gateways=2, adapters_from=str(tmp_path / "open"),
    )  # fmt: skip
    try:
        url = serve.run(serve_config(args, port=free_port()), blocking=False)
        until(lambda: len(replicas(ENGINE)) == 2 == len(replicas(GATEWAY)), 180)
        until(lambda: len({line for line in told(url) if "gateway=" in line and "resumed" in line}) == 2, 180)

        def change(do: str, **body: object) -> int:
            return httpx.post(f"{url}/v1/{do}_lora_adapter", json=body, timeout=180).status_code

        def names() -> set[tuple[str, ...]]:
            cards = [httpx.get(f"{url}/v1/models", timeout=60).json()["data"] for _ in range(ASKED)]
            return {tuple(card["id"] for card in each) for each in cards}

        def said(name: str) -> list[int]:
            body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(
                f"{url}/v1/completions", json=body | {"depth": "full", "return_token_ids": True}, timeout=180
            )
            assert answer.status_code == 200, answer.text
            tokens: list[int] = answer.json()["choices"][0]["token_ids"]
            return tokens

        with ThreadPoolExecutor(2) as pool:
            loads = [pool.submit(change, "load", lora_name="x", lora_path=path) for path in ("a", "b")]
            assert sorted(load.result() for load in loads) == [200, 400], "of two at once one has the name"
        assert names() == {("fish", "x")}
        now = said("x")
        assert now in wanted.values() and [said("x") for _ in range(ASKED)] == [now] * ASKED
        other = next(name for name in wanted if wanted[name] != now)
        assert change("load", lora_name="y", lora_path=other) == 200
        assert change("load", lora_name="x", lora_path=other, load_inplace=True) == 200
        assert names() == {("fish", "x", "y")}
        assert [said("x") for _ in range(ASKED)] == [wanted[other]] * ASKED
        assert change("unload", lora_name="x") == 200
        assert names() == {("fish", "y")}
        statuses = {
            httpx.post(f"{url}/v1/completions", json={"model": "x", "prompt": "x"}, timeout=60).status_code
            for _ in range(ASKED)
        }
        assert statuses == {404} and said("y") == wanted[other]
    finally:
        serve.stop()
