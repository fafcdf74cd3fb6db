"""API keys on their way to gateways: by reference, never themselves, and never lost into a service that is open."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("ray")

from ray.experimental import internal_kv

from shoal import Model
from shoal.api.auth import ApiKeys
from shoal.api.wire import UnauthorizedError
from shoal.errors import ConfigError
from shoal.on_ray import keys, serve
from shoal.on_ray.serve_config import load_serve_config

ONE_GPU = Path(__file__).parents[3] / "serve_configs" / "one_gpu.yaml"


@pytest.fixture(autouse=True)
def held(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """What the head's store holds."""
    kept: dict[bytes, bytes] = {}

    def put(name: str, value: str, *, namespace: bytes) -> None:
        kept[namespace + b"/" + name.encode()] = value.encode()

    def get(name: str, *, namespace: bytes) -> bytes | None:
        return kept.get(namespace + b"/" + name.encode())

    monkeypatch.setattr(internal_kv, "_internal_kv_put", put)
    monkeypatch.setattr(internal_kv, "_internal_kv_get", get)
    monkeypatch.delenv("SHOAL_API_KEYS", raising=False)
    return kept


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "model"
    Model.from_preset("test", seed=3).save(directory)
    return directory


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on what runs is another process, on another node."""
    monkeypatch.delenv("SHOAL_API_KEYS")


def test_keys_of_the_environment_reach_a_gateway_that_has_another(
    monkeypatch: pytest.MonkeyPatch, held: dict[bytes, bytes], model: Path
) -> None:
    monkeypatch.setenv("SHOAL_API_KEYS", "sk-first, sk-second name=bee requests=2")
    args = serve._at_home({"model": str(model)}, "http://127.0.0.1:8000")
    shown = json.dumps(args) + repr(held)
    assert "sk-first" not in shown and "sk-second" not in shown
    elsewhere(monkeypatch)
    bound = serve.app(args)._bound_deployment.init_args[1]
    assert "sk-first" not in repr(asdict(bound))
    found = keys.keys_of(bound.api_keys)
    assert found is not None and found.find("Bearer sk-first").requests is None
    bee = found.find("Bearer sk-second")
    assert bee.name == "bee" and bee.requests is not None and bee.requests.per_minute == 2
    with pytest.raises(UnauthorizedError):
        found.find("Bearer sk-wrong")


def test_keys_that_are_lost_never_mean_open(monkeypatch: pytest.MonkeyPatch, held: dict[bytes, bytes]) -> None:
    monkeypatch.setenv("SHOAL_API_KEYS", "sk-first")
    reference = keys.referred(None)
    held.clear()  # the head was started anew
    elsewhere(monkeypatch)
    with pytest.raises(ConfigError, match="lost"):
        keys.keys_of(reference)


def test_a_deployment_that_was_not_started_by_us_has_the_keys_of_its_cluster(
    monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    """`serve deploy` builds the application on the cluster, whose environment may have keys; its gateways may run elsewhere."""
    monkeypatch.setenv("SHOAL_API_KEYS", "sk-first")
    bound = serve.app({"model": str(model)})._bound_deployment.init_args[1]
    elsewhere(monkeypatch)
    found = keys.keys_of(bound.api_keys)
    assert found is not None and found.find("Bearer sk-first")


def test_a_file_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    (tmp_path / "keys").write_text("sk-first\n")
    monkeypatch.chdir(tmp_path)
    args = serve._at_home({"model": str(model), "api_keys": "keys"}, "http://127.0.0.1:8000")
    assert args["api_keys"] == str(tmp_path / "keys")


@pytest.mark.parametrize("content", [None, "", "# none\n"])
def test_a_deployment_whose_file_has_no_keys_is_refused(tmp_path: Path, model: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    for start in (serve.app, lambda args: serve._at_home(args, ""), lambda args: keys.keys_of(args["api_keys"])):
        with pytest.raises(ConfigError):
            start({"model": str(model), "api_keys": str(file)})  # type: ignore[operator]


@pytest.mark.parametrize("given", ["", " , "])
def test_a_variable_without_keys_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("SHOAL_API_KEYS", given)
    for start in (ApiKeys.load, lambda: keys.referred(None), lambda: keys.keys_of(None)):
        with pytest.raises(ConfigError, match=r"\$SHOAL_API_KEYS"):
            start()  # type: ignore[operator]


def test_a_config_that_asks_for_the_variable_is_refused_without(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """As one_gpu.yaml does: `serve deploy` does not send the variable of the shell that it runs in."""
    args = load_serve_config(ONE_GPU, model=str(model)).applications[0].args
    for start in (serve.app, lambda args: serve._at_home(args, "")):
        with pytest.raises(ConfigError, match=r"SHOAL_API_KEYS.*name a file of keys"):
            start(args)  # type: ignore[operator]
    monkeypatch.setenv("SHOAL_API_KEYS", "sk-first")
    assert str(serve._at_home(args, "")["api_keys"]).startswith(keys.KEPT)


@pytest.mark.parametrize(
    "where",
    ["runtime_env: {env_vars: {SHOAL_API_KEYS: sk-first}}",
     "deployments: [{name: Gateway, ray_actor_options: {runtime_env: {env_vars: {SHOAL_API_KEYS: sk-first}}}}]"],
)  # fmt: skip
def test_keys_that_serve_would_show_are_refused(tmp_path: Path, where: str) -> None:
    path = tmp_path / "clear.yaml"
    path.write_text(ONE_GPU.read_text(encoding="utf-8") + f"    {where}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"env_vars\.SHOAL_API_KEYS.*file of keys") as caught:
        load_serve_config(path)
    assert "sk-first" not in str(caught.value)
