"""What one service is to be: `ServeArgs`, which the service of one process and that on Ray Serve both take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from shoal.api import stock
from shoal.api.capture import CaptureArgs
from shoal.api.page import MOUNT
from shoal.api.policy import Policy
from shoal.api.served import MODEL_NAME, MOST_ADAPTERS, ServedModel
from shoal.config import Dtype, KvCacheDtype
from shoal.data import models
from shoal.data.sources.s3 import is_remote
from shoal.errors import ConfigError
from shoal.loop.release import Release

ENGINE = "EngineReplica"  # deployment of the engine; of several models each has one of its own


@dataclass(frozen=True)
class ServeArgs:
    """The ``args`` of a Shoal application in a Serve config, and what `run_local` serves."""

    # model directory, the same path on every node, or s3://BUCKET/PREFIX of one; None: $SHOAL_MODEL
    model: str | None = None
    release: str | None = None  # instead: folder of a release, whose stable version is served, and followed
    # instead: several, name -> directory, each with its own replicas
    models: dict[str, str] = field(default_factory=dict)
    name: str | None = None  # what requests call the model, commas between several; None: its own name
    min_replicas: int = 1  # engine replicas; 0: none while nobody asks
    max_replicas: int = 1
    min_gateways: int = 1  # processes that speak HTTP; between the two by their load
    max_gateways: int = 1
    cpus: float = 1.0  # cores that Ray reserves for one engine replica
    gpus: float = 0.0  # GPUs of one engine replica; above 0 the model runs on it
    precision: Literal["stored", "auto"] = "stored"  # auto: fp32 where INT8 cannot be trusted, which else is refused
    dtype: Dtype = "auto"  # on a GPU: auto is bfloat16, and float32 where weights are INT8
    # of a GPU's memory, all that an engine may take; None: 0.9 of what `gpus` reserves of it, half of that where a release is
    # followed, so that two versions fit
    gpu_share: float | None = None
    kv_cache_dtype: KvCacheDtype = "auto"  # int8: keys and values rounded, three to four times as many fit
    # vllm: vLLM 0.32 behind the same gateway, for checkpoints of others as well
    engine: Literal["shoal", "vllm"] = "shoal"
    vllm: dict[str, Any] = field(default_factory=dict)  # with engine vllm: its own engine arguments, by vLLM's names
    threads: int | None = None  # compute threads of a replica; None: the machine's cores less one, for HTTP
    max_batch: int = 32  # requests that run at once in one replica
    max_queue: int = 128  # requests that wait in a replica that has twice its batch; more are answered 429
    seconds: float = 600.0  # longest time of one request
    # file of keys, one a line; "$SHOAL_API_KEYS": that variable of who starts it; None: the same if it is set, or open to all
    api_keys: str | None = None
    # all keys share the prefix cache: a client sees by the time, and in ``cached_tokens``, what others have asked
    shared_prefix_cache: bool = False
    metrics: bool = True  # answer /metrics
    cors: tuple[str, ...] = ()  # origins of other sites whose pages may call the API; ("*",): any
    runs: str | None = None  # folder of training runs to show, on the gateway's node; None: none
    # folder that keeps files and batches, on a file system that all gateways see; None: they are switched off
    batches: str | None = None
    # folder that keeps numbers of requests (docs/how-to/capture-requests.md); None: nothing is kept
    capture: str | None = None
    capture_texts: bool = False  # also texts of requests with `store: true`, of keys with texts=yes
    capture_days: int = 90  # for which numbers are kept
    capture_texts_days: int = 30  # and texts
    capture_reruns: float = 0.05  # share of "auto" requests that full depth answers again when idle; 0: none
    # LoRA adapters of the model, name -> directory, or s3://BUCKET/PREFIX of one
    adapters: dict[str, str] = field(default_factory=dict)
    # folder, or s3://BUCKET/PREFIX, whose adapters requests may load; None: they may not
    adapters_from: str | None = None
    # file of what the operator adds to answers (docs/api.md, "Policy"), the same path wherever a gateway runs; None: nothing
    policy: str | None = None
    run_code: bool = False  # run programs of clients, as the page's Run does, in the sandbox (shoal.sandbox)
    # address of a service that executes tools for the chat pages (api/executed.py); None: none are
    tools: str | None = None
    ui: bool = False  # show the pages at /ui
    ui_mount: str = MOUNT  # what puts it there, ``module:function``
    ui_api: str | None = None  # where the page finds the API; None: this server

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            # of these no bound below holds, or none is reached
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"args.{name}", got=str(value), allowed="a finite number")
        for name in ("release", "runs", "batches"):
            if is_remote(value := getattr(self, name) or ""):  # else it would be a folder called ``s3:``
                allowed, do = "a path", "give a path that all gateways see: this is not kept in S3"
                raise ConfigError(f"args.{name}", got=value, allowed=allowed, do=do)
        if self.models and (self.model or self.name):
            raise ConfigError("args.model and args.models", do="name the model under args.models, or serve it alone")
        odd = next((name for name in self.models if not MODEL_NAME.fullmatch(name)), None)
        if odd is not None:
            raise ConfigError(
                "args.models: name", got=odd, allowed="letters, digits and . _ - (aliases: serve the directory twice)"
            )
        if (self.adapters or self.adapters_from) and (self.models or self.engine == "vllm"):
            what = "adapters" if self.adapters else "adapters_from"
            raise ConfigError(f"args.{what}", do="serve one model with them (args.model), with args.engine shoal")
        others = ("models", "adapters", "adapters_from")
        if self.release and (beside := next((name for name in others if getattr(self, name)), None)):
            do = "a release is one model: leave out one of the two"
            raise ConfigError(f"args.release and args.{beside}", do=do)
        if self.release and self.engine == "vllm":
            raise ConfigError("args.release", do="serve it with args.engine shoal: vLLM holds the memory of one model")
        if len(self.adapters) > MOST_ADAPTERS:
            raise ConfigError("args.adapters", got=len(self.adapters), allowed=f"at most {MOST_ADAPTERS}")
        if self.engine != "vllm" and self.vllm:
            raise ConfigError("args.vllm", do="set args.engine to vllm, or leave it out")
        if self.engine == "vllm" and self.precision != "stored":
            raise ConfigError("args.precision", got=self.precision, allowed="stored, where args.engine is vllm")
        if self.gpu_share is not None and not 0 < self.gpu_share <= 1:
            raise ConfigError("args.gpu_share", got=self.gpu_share, allowed="above 0, at most 1")
        if self.dtype not in get_args(Dtype):
            raise ConfigError("args.dtype", got=self.dtype, allowed=list(get_args(Dtype)))
        if self.dtype != "auto" and (self.engine == "vllm" or not self.gpus):
            where = "auto, where args.gpus is 0, or args.engine is vllm (args.vllm has its own)"
            raise ConfigError("args.dtype", got=self.dtype, allowed=where)
        if self.engine == "vllm" and self.kv_cache_dtype != "auto":
            where = "auto, where args.engine is vllm: args.vllm has its own"
            raise ConfigError("args.kv_cache_dtype", got=self.kv_cache_dtype, allowed=where)
        least_of = {"min_replicas": 0, "max_replicas": 1, "min_gateways": 1, "max_batch": 1, "max_queue": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ConfigError(f"args.{name}", got=getattr(self, name), allowed=f"{least} or more")
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                "args.max_replicas", got=self.max_replicas, allowed=f"min_replicas ({self.min_replicas}) up"
            )
        self._check_gateways()
        if self.threads is not None and self.threads < 1:
            raise ConfigError("args.threads", got=self.threads, allowed="1 or more")
        for name in ("cpus", "gpus"):
            if getattr(self, name) < 0:
                raise ConfigError(f"args.{name}", got=getattr(self, name), allowed="0 or more")
        if self.capture is None and self.capture_texts:
            raise ConfigError("args.capture_texts", do="give args.capture as well, or leave it out")
        self.captured  # noqa: B018  # its days are checked now
        if self.seconds <= 0:
            raise ConfigError("args.seconds", got=self.seconds, allowed="above 0")

    def _check_gateways(self) -> None:
        if self.max_gateways < self.min_gateways:
            allowed = f"min_gateways ({self.min_gateways}) up"
            raise ConfigError("args.max_gateways", got=self.max_gateways, allowed=allowed)

    @property
    def captured(self) -> CaptureArgs | None:
        """What is kept of requests; None: nothing. Raises ConfigError."""
        if self.capture is None:
            return None
        return CaptureArgs(
            self.capture, self.capture_texts, self.capture_days, self.capture_texts_days, self.capture_reruns
        )

    @property
    def engine_share(self) -> float:
        """Of a GPU's memory, what one engine may take: `gpu_share`, or its default."""
        return self.gpu_share or 0.9 * (min(1.0, self.gpus) or 1.0) / (2 if self.release else 1)

    def begin_capture(self) -> None:
        """Makes the folder of what is captured, if anything is: before a model is loaded, which is slow. Raises DataError."""
        if self.captured:
            self.captured.open()

    def at_stable(self) -> ServeArgs:
        """With the stable version of `release` as the model; itself without a release. Raises UsageError where there is none,
        ConfigError where another model is given as well."""
        if not self.release:
            return self
        model = str(Release(self.release).stable().served)
        if self.model not in (None, model):
            raise ConfigError("args.model and args.release", do="leave out args.model: the release says which serves")
        return replace(self, model=model)

    def deployments(self) -> dict[str, str]:
        """Deployment of each model -> its directory, the default model's first; empty while no model is given."""
        if self.models:
            return {f"{ENGINE}-{name}": directory for name, directory in self.models.items()}
        return {ENGINE: self.model} if self.model else {}

    def served(self, directory: str, name: str | None = None) -> ServedModel:
        """The model in `directory`, or at ``s3://...``, as the routes see it, under `name` (default: its own). Raises
        CheckpointError for one that the engine cannot serve, ConfigError for a `policy` that is none of this model's."""
        place = models.here(directory, weights=False)
        found = stock.load(str(place), name) if self.engine == "vllm" else ServedModel.load(place, name)
        found = replace(found, shared_prefix_cache=self.shared_prefix_cache)
        if self.policy is None:
            return found
        policy = Policy.load(self.policy)
        policy.check(found.config)
        return replace(found, policy=policy)


def parse_replicas(text: str, what: str = "replicas") -> dict[str, int]:
    """``2`` or ``1:4`` as the arguments min_replicas and max_replicas, or of `what` else there are so many. Raises
    ConfigError."""
    low, colon, high = text.partition(":")
    if not low.isdecimal() or (colon and not high.isdecimal()):
        raise ConfigError(what, got=text, allowed="A number, or MIN:MAX")
    return {f"min_{what}": int(low), f"max_{what}": int(high or low)}


def parse_adapters(given: Sequence[str]) -> dict[str, str]:
    """Each ``NAME=DIR`` as name -> directory. Raises ConfigError."""
    found: dict[str, str] = {}
    for each in given:
        name, equals, directory = each.partition("=")
        if not equals or not directory or name in found:
            raise ConfigError("--adapters", got=each, allowed="NAME=DIR, each name once")
        found[name] = directory
    return found
