"""Serve configs, strictly: what `shoal serve` and ``serve deploy`` read. ``args`` in one are the fields of `ServeArgs`.

Notable: Ray's own schema accepts misspelt keys silently (at every level but a few). `load_serve_config` walks the file
along that schema and refuses them by name.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from shoal import config
from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.errors import ConfigError, did_you_mean
from shoal.on_ray import keys

IMPORT_PATH = "shoal.on_ray.serve:app"
GATEWAY = "Gateway"  # the deployment that speaks HTTP
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Weights:
    """The ``user_config`` of an engine's deployment: what can change while its replicas serve."""

    model: str  # model directory, with the config and the tokenizer of the one that the service started with


def serve_config(args: ServeArgs, *, host: str = LOOPBACK, port: int = 8000) -> ServeDeploySchema:
    """The config that serves one model on the Ray that runs here."""
    application = {"name": "shoal", "import_path": IMPORT_PATH, "args": _given(args)}
    values = {"proxy_location": "HeadOnly", "http_options": {"host": host, "port": port}, "applications": [application]}
    return check_serve_config(values, "serve config")


def load_serve_config(
    path: str | Path, *, host: str | None = None, port: int | None = None, **args: Any
) -> ServeDeploySchema:
    """The config in a file; `host`, `port` and `args` (fields of ServeArgs) override it, for the command line.

    Raises ConfigError naming the file and the path of the key that is unknown, missing or of a wrong value.
    """
    values = config.read_file(path)
    check_serve_config(values, str(path))
    given = {key: value for key, value in {"host": host, "port": port}.items() if value is not None}
    values["http_options"] = {**(values.get("http_options") or {}), **given}
    for application in values["applications"]:
        if application["import_path"] == IMPORT_PATH:
            application["args"] = {**(application.get("args") or {}), **args}
    return check_serve_config(values, str(path))


def shows_page(deploy: ServeDeploySchema) -> bool:
    """Whether a checked config puts the chat page on an application."""
    return any(application.args.get("ui", False) for application in deploy.applications)


def check_serve_config(values: Mapping[str, Any], where: str) -> ServeDeploySchema:
    """`values` as Ray's schema, every key known. The host is loopback unless said otherwise (Ray's default is all)."""
    for path, unknown, known in _unknown_keys(ServeDeploySchema, values, ""):
        raise ConfigError(
            f"{where}: unknown key {path}{unknown}", allowed=sorted(known), do=did_you_mean(unknown, known)
        )
    keys.refuse_clear(values)
    try:
        checked = ServeDeploySchema.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {key}", got=_short(first["input"]), do=first["msg"]) from None
    if "host" not in checked.http_options.model_fields_set:
        checked.http_options.host = LOOPBACK
    for application in checked.applications:
        if application.import_path == IMPORT_PATH:
            _check_application(application, where)
    return checked


def _check_application(application: ServeApplicationSchema, where: str) -> None:
    try:
        args = config.load(ServeArgs, application.args, "args")
        known = [GATEWAY, *(args.deployments() or [ENGINE])]
        for deployment in application.deployments:
            if deployment.name not in known:
                raise ConfigError(
                    "deployment", got=deployment.name, allowed=known, do=did_you_mean(deployment.name, known)
                )
            if isinstance(deployment.user_config, Mapping):
                if deployment.name == GATEWAY:
                    raise ConfigError("user_config of Gateway", do="leave it out: only engines have one")
                config.load(Weights, deployment.user_config, f"{deployment.name}.user_config")
    except ConfigError as error:
        raise ConfigError(f"{where}: application {application.name}: {error.message}") from None


def _unknown_keys(model: type[BaseModel], values: Any, path: str) -> Iterator[tuple[str, str, set[str]]]:
    """(path of the mapping, key, the keys known there) of every key of `values` that `model` does not have."""
    if not isinstance(values, Mapping):
        return
    known = {*model.model_fields, *(field.alias for field in model.model_fields.values() if field.alias)}
    for key, value in values.items():
        if key not in known:
            yield path, str(key), known
        elif key == "runtime_env":
            yield from (
                (f"{path}{key}.", str(k), RuntimeEnv.known_fields)
                for k in value or ()
                if k not in RuntimeEnv.known_fields
            )
        elif key == "autoscaling_policy":
            yield from _unknown_keys(AutoscalingPolicy, value, f"{path}{key}.")
        else:
            for inner in _models(model.model_fields[key].annotation):
                several = isinstance(value, list)
                for index, item in enumerate(value if several else [value]):
                    yield from _unknown_keys(inner, item, f"{path}{key}{f'[{index}]' if several else ''}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models inside an annotation: of ``Optional[Union[Dict, M]]`` and ``List[M]`` it is M."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)


def _given(args: ServeArgs) -> dict[str, Any]:
    return {name: value for name, value in asdict(args).items() if value not in (None, {}, ())}


def _short(value: Any) -> str:
    return repr(value)[:80]
