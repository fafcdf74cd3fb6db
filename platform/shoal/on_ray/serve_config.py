"""Serve configs, strictly: what `shoal serve` and ``serve deploy`` read, and what `app` takes as its ``args``.

Notable: Ray's own schema accepts misspelt keys silently (at every level but a few). `load_serve_config` walks the file
along that schema and refuses them by name.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from shoal import config
from shoal.api import stock
from shoal.api.page import MOUNT
from shoal.api.served import ServedModel
from shoal.config import KvCacheDtype
from shoal.errors import ConfigError, did_you_mean

IMPORT_PATH = "shoal.on_ray.serve:app"
GATEWAY, ENGINE = "Gateway", "EngineReplica"  # the deployments; of several models each has an engine of its own
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServeArgs:
    """The ``args`` of a Shoal application."""

    model: str | None = None  # model directory, the same path on every node; None: $SHOAL_MODEL
    # instead: several, name -> directory, each with its own replicas
    models: dict[str, str] = field(default_factory=dict)
    name: str | None = None  # what requests call the model, commas between several; None: its own name
    min_replicas: int = 1  # engine replicas; 0: none while nobody asks
    max_replicas: int = 1
    cpus: float = 1.0  # cores that Ray reserves for one engine replica
    gpus: float = 0.0  # GPUs of one engine replica; above 0 the model runs on it
    precision: Literal["stored", "auto"] = "stored"  # auto: fp32 where INT8 cannot be trusted, which else is refused
    kv_cache_dtype: KvCacheDtype = "auto"  # int8: keys and values rounded, three to four times as many fit
    engine: Literal["shoal", "vllm"] = (
        "shoal"  # vllm: vLLM 0.32 behind the same gateway, for checkpoints of others as well
    )
    vllm: dict[str, Any] = field(default_factory=dict)  # with engine vllm: its own engine arguments, by vLLM's names
    threads: int | None = None  # compute threads of a replica; None: the machine's cores less one, for HTTP
    max_batch: int = 32  # requests that run at once in one replica
    max_queue: int = 128  # requests that wait while each replica has twice its batch; more are answered 429
    seconds: float = 600.0  # longest time of one request
    api_keys: str | None = None  # file of keys, one a line; None: $SHOAL_API_KEYS, or open to all
    metrics: bool = True  # answer /metrics
    cors: tuple[str, ...] = ()  # origins of other sites whose pages may call the API; ("*",): any
    runs: str | None = None  # folder of training runs to show, on the gateway's node; None: none
    ui: bool = False  # show the pages at /ui
    ui_mount: str = MOUNT  # what puts it there, ``module:function``
    ui_api: str | None = None  # where the page finds the API; None: this server

    def __post_init__(self) -> None:
        if self.models and (self.model or self.name):
            raise ConfigError("args.model and args.models", do="name the model under args.models, or serve it alone")
        odd = next((name for name in self.models if not MODEL_NAME.fullmatch(name)), None)
        if odd is not None:
            raise ConfigError(
                "args.models: name", got=odd, allowed="letters, digits and . _ - (aliases: serve the directory twice)"
            )
        if self.engine != "vllm" and self.vllm:
            raise ConfigError("args.vllm", do="set args.engine to vllm, or leave it out")
        if self.engine == "vllm" and self.precision != "stored":
            raise ConfigError("args.precision", got=self.precision, allowed="stored, where args.engine is vllm")
        if self.engine == "vllm" and self.kv_cache_dtype != "auto":
            where = "auto, where args.engine is vllm: args.vllm has its own"
            raise ConfigError("args.kv_cache_dtype", got=self.kv_cache_dtype, allowed=where)
        for name, least in {"min_replicas": 0, "max_replicas": 1, "max_batch": 1, "max_queue": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"args.{name}", got=getattr(self, name), allowed=f"{least} or more")
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                "args.max_replicas", got=self.max_replicas, allowed=f"min_replicas ({self.min_replicas}) up"
            )
        if self.threads is not None and self.threads < 1:
            raise ConfigError("args.threads", got=self.threads, allowed="1 or more")
        for name in ("cpus", "gpus"):
            if getattr(self, name) < 0:
                raise ConfigError(f"args.{name}", got=getattr(self, name), allowed="0 or more")
        if self.seconds <= 0:
            raise ConfigError("args.seconds", got=self.seconds, allowed="above 0")

    def deployments(self) -> dict[str, str]:
        """Deployment of each model -> its directory, the default model's first; empty while no model is given."""
        if self.models:
            return {f"{ENGINE}-{name}": directory for name, directory in self.models.items()}
        return {ENGINE: self.model} if self.model else {}

    def served(self, directory: str, name: str | None = None) -> ServedModel:
        """The model in `directory` as the routes see it, under `name` (default: its own). Raises CheckpointError for one that
        the engine cannot serve."""
        return stock.load(directory, name) if self.engine == "vllm" else ServedModel.load(directory, name)


@dataclass(frozen=True)
class Weights:
    """The ``user_config`` of an engine's deployment: what can change while its replicas serve."""

    model: str  # model directory, with the config and the tokenizer of the one that the service started with


def parse_replicas(text: str) -> dict[str, int]:
    """``2`` or ``1:4`` as the arguments min_replicas and max_replicas. Raises ConfigError."""
    low, colon, high = text.partition(":")
    if not low.isdecimal() or (colon and not high.isdecimal()):
        raise ConfigError("replicas", got=text, allowed="A number, or MIN:MAX")
    return {"min_replicas": int(low), "max_replicas": int(high or low)}


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
