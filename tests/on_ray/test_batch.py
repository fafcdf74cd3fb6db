"""A file of requests over Ray Data: the answers of a live request, an interrupted run, lines that are none; and the routes of
batches on Ray Serve."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from ray.serve._private.constants import SERVE_NAMESPACE

from shoal import Engine, Model, Request, Sampling, cli
from shoal.api.serve_args import ServeArgs
from shoal.errors import DataError
from shoal.on_ray import serve
from shoal.on_ray.batch import batch
from shoal.on_ray.serve_config import serve_config

pytestmark = [pytest.mark.ray, pytest.mark.drill]


def line(name: str, **more: Any) -> str:
    body = {"model": "fish", "prompt": f"sea {name}", "max_tokens": 6, "temperature": 0, "depth": "middle", **more}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body})


def read(path: Path) -> dict[str | None, Any]:
    return {row["custom_id"]: row for row in map(json.loads, path.read_text("utf-8").splitlines())}


@pytest.mark.usefixtures("shared_ray")
def test_a_file_is_answered_as_live_requests_are_and_goes_on_where_it_was_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model.from_preset("test", seed=3)
    model.save(tmp_path / "model")
    names = [str(number) for number in range(40)]
    sampling = Sampling(temperature=0, max_tokens=6)
    own = Engine(model).generate([Request(f"sea {name}", sampling, depth="middle") for name in names])
    said = {name: answer.text for name, answer in zip(names, own, strict=True)}
    vector = {"custom_id": "v", "method": "POST", "url": "/v1/embeddings", "body": {"model": "fish", "input": "sea"}}
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = ["{broken", line("0"), line("deep", depth="nowhere")]
    source.write_text("\ufeff" + "\r\n".join([*map(line, names), *bad, json.dumps(vector)]), encoding="utf-8")
    given: dict[str, Any] = {"name": "fish", "workers": 2}
    assert batch(source, out, tmp_path / "model", **given) == {"answered": 41, "failed": 3, "kept": 0}
    answers, errors = read(out), read(Path(f"{out}.errors"))
    assert {name: answers[name]["response"]["body"]["choices"][0]["text"] for name in names} == said
    assert len(answers["v"]["response"]["body"]["data"]) == 1
    assert errors[None]["error"]["line"] == 41 and errors["0"]["error"]["code"] == "duplicate_custom_id"
    assert errors["deep"]["response"]["body"]["error"]["param"] == "depth"
    with pytest.raises(DataError, match=r"out.jsonl exists"):
        batch(source, out, tmp_path / "model", **given)
    out.rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"out.jsonl.errors exists"):  # what failed would count as asked
        batch(source, out, tmp_path / "model", **given)
    (tmp_path / "away").rename(out)
    # interrupted in the middle of a line, after the errors had their name
    whole = out.read_text("utf-8").splitlines(keepends=True)
    out.unlink()
    partial = Path(f"{out}.partial")
    partial.write_text("".join(whole[:30]) + whole[30][:25], encoding="utf-8")
    with pytest.raises(DataError, match="another model or name"):  # and its lines' refusals would stand
        batch(source, out, tmp_path / "model", workers=2)
    assert batch(source, out, tmp_path / "model", **given) == {"answered": 41, "failed": 3, "kept": 33}
    assert {name: row["response"]["body"]["choices"] for name, row in read(out).items() if name != "v"} == {
        name: answers[name]["response"]["body"]["choices"] for name in names
    }
    assert out.read_text("utf-8").startswith("".join(whole[:30])), "what was answered is not asked again"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    # of another file
    partial.write_text(whole[0], encoding="utf-8")
    out.unlink()
    source.write_text(line("new") + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="another file"):
        batch(source, out, tmp_path / "model", **given)
    partial.unlink()
    Path(f"{out}.errors").unlink()
    words = ["batch", str(source), str(out), "--model", str(tmp_path / "model"), "--name", "fish", "--json"]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["answered"] == 1 == len(read(out))


@pytest.mark.usefixtures("shared_ray")
def test_on_ray_serve_a_batch_goes_on_though_its_gateway_is_killed(tmp_path: Path) -> None:
    model = Model.from_preset("test", seed=3)
    model.save(tmp_path / "model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    kept = tmp_path / "kept"
    args = ServeArgs(str(tmp_path / "model"), name="fish", batches=str(kept), max_batch=2)
    names = [str(number) for number in range(60)]
    try:
        url = serve.run(serve_config(args, port=port), blocking=False)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=20, timeout=60)
        content = "\n".join(line(name, max_tokens=60, ignore_eos=True) for name in names)
        file = client.files.create(file=("in.jsonl", content.encode()), purpose="batch")
        made = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        answers = kept / "open" / "batches" / made.id / "answers.jsonl"
        until(lambda: answers.exists() and answers.read_bytes().count(b"\n") > 2)
        before = answers.read_bytes()
        (name,) = [
            actor["name"]
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["namespace"] == SERVE_NAMESPACE and "Gateway" in actor["name"]
        ]
        ray.kill(ray.get_actor(name, namespace=SERVE_NAMESPACE))
        until(lambda: client.batches.retrieve(made.id).status == "completed")
        found = client.batches.retrieve(made.id)
        assert found.request_counts is not None and found.output_file_id is not None
        assert (found.request_counts.completed, found.request_counts.failed) == (60, 0)
        whole = client.files.content(found.output_file_id).read()
        assert whole.startswith(before[: before.rfind(b"\n") + 1]), "what was answered is not asked again"
        assert sorted(json.loads(each)["custom_id"] for each in whole.splitlines()) == sorted(names)
    finally:
        serve.stop()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 240
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)
