"""The stage that serves a model: on Ray Serve, or from this process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from shoal import repository
from shoal.config import Dtype
from shoal.errors import UsageError
from shoal.stages.stage import Stage, out

LOOPBACK, PORT = "127.0.0.1", 8000
SHOP = "shop"  # in place of an address of tools: the made-up shop of the recipe customer-service
CHOICES = {"precision": ("stored", "auto"), "kv_cache_dtype": ("auto", "int8"), "dtype": get_args(Dtype)}


@dataclass(frozen=True, kw_only=True)
class Serve(Stage):
    """The OpenAI-compatible API at http://HOST:PORT/v1, and the pages at /ui, until Ctrl-C."""

    model: Annotated[str | None, typer.Option(help="Model directory, or s3://BUCKET/PREFIX of one [the config's].")] = (
        None
    )
    release: Annotated[
        Path | None, typer.Option(help="Folder of a release: its stable version is served, and followed. [none]")
    ] = None
    config: Annotated[Path | None, typer.Option(help="Serve config, such as serve_configs/local.yaml.")] = None
    name: Annotated[
        str | None, typer.Option(help="Name that requests use; commas between several [the model's own].")
    ] = None
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1, or the config's].")] = None
    port: Annotated[int | None, typer.Option(help="HTTP port [8000, or the config's].")] = None
    api_keys: Annotated[Path | None, typer.Option(help="File of API keys, one a line. [open to all]")] = None
    shared_prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--shared-prefix-cache",
            help="All keys share the prefix cache, so that a client can find out what others have asked (docs/api.md). "
            "[no, or the config's]",
        ),
    ] = None
    ray: Annotated[bool, typer.Option(help="On Ray Serve; --no-ray serves from this process.")] = True
    allow_public_ray: Annotated[
        bool,
        typer.Option(
            "--allow-public-ray",
            help="Serve although Ray has a public address and no token authentication: whoever reaches its ports runs code "
            "there (docs/how-to/run-on-a-cluster.md). [refused]",
        ),
    ] = False
    replicas: Annotated[str | None, typer.Option(help="Engine replicas, N or MIN:MAX [1, or the config's].")] = None
    gateways: Annotated[
        str | None, typer.Option(help="Processes that speak HTTP, N or MIN:MAX by their load [1, or the config's].")
    ] = None
    metrics: Annotated[bool | None, typer.Option(help="Answer /metrics, to all [yes, or the config's].")] = None
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call the API; repeat, or * for any. [none]")
    ] = None
    seconds: Annotated[
        float | None, typer.Option(help="Longest time of a request, in seconds; then 408 [600, or the config's].")
    ] = None
    precision: Annotated[
        str | None,
        typer.Option(
            help="stored: as the model was written, refused where INT8 fails its self-test; auto: fp32 there, "
            "and the reason is said [stored, or the config's]."
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights and activations on a GPU. auto: bfloat16; float32 for INT8 [auto, or the config's]."
        ),
    ] = None
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="auto: keys and values in the model's precision; int8: rounded, three to four times as many fit "
            "[auto, or the config's]."
        ),
    ] = None
    runs: Annotated[
        Path | None, typer.Option(help="Folder of training runs to show on the pages, read only. [none shown]")
    ] = None
    batches: Annotated[
        Path | None, typer.Option(help="Folder that keeps files and batches (docs/api.md). [both switched off]")
    ] = None
    capture: Annotated[
        str | None,
        typer.Option(
            help="Folder, or s3://BUCKET/PREFIX, that keeps numbers of each request, never its text. [nothing is kept]"
        ),
    ] = None
    capture_texts: Annotated[
        bool | None,
        typer.Option(
            help="Keep texts too, where a request has store: true and its key texts=yes. [no, or the config's]"
        ),
    ] = None
    capture_days: Annotated[int | None, typer.Option(help="Days for which numbers are kept [90, or the config's].")] = (
        None
    )
    capture_texts_days: Annotated[
        int | None, typer.Option(help="Days for which texts are kept [30, or the config's].")
    ] = None
    capture_reruns: Annotated[
        float | None,
        typer.Option(
            help='Share of the requests of depth "auto" that full depth answers again when idle, to measure what the '
            "router loses; 0: none [0.05, or the config's]."
        ),
    ] = None
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DIR, or NAME=s3://BUCKET/PREFIX, of a LoRA adapter of the model, served as NAME; repeat. [none]"
        ),
    ] = None
    adapters_from: Annotated[
        str | None,
        typer.Option(
            help="Folder, or s3://BUCKET/PREFIX, whose adapters requests may load (docs/api.md). [they may not]"
        ),
    ] = None
    policy: Annotated[
        Path | None,
        typer.Option(
            help="File of what is added to every answer, and of depths by workload (docs/api.md). [nothing is]"
        ),
    ] = None
    run_code: Annotated[
        bool | None,
        typer.Option(
            "--run-code",
            help="Let whoever may ask the service run Python in a sandbox, by Run on the chat page (docs/pages.md). "
            "[no, or the config's]",
        ),
    ] = None
    tools: Annotated[
        str | None,
        typer.Option(
            help="Address of a service that executes tools on the page Customer service, or `shop`: the recipe's own, made up "
            "(docs/pages.md). [none are, or the config's]"
        ),
    ] = None
    ui: Annotated[bool | None, typer.Option(help="Show the pages at /ui [yes, or the config's].")] = None
    logs: Annotated[
        Path | None,
        typer.Option(
            help="Folder that keeps the logs of the Ray that is started, a line a request among them. [deleted]"
        ),
    ] = None

    def run(self) -> None:
        self._check()
        with _shop(self) as stage:
            if stage.ray:
                stage._on_ray()
            else:
                stage._here()
        out.print("The service has stopped.")

    def args(self) -> dict[str, Any]:
        """The fields of ServeArgs that are given."""
        from shoal.api.serve_args import parse_adapters, parse_replicas
        from shoal.data.remote import absolute

        given: dict[str, Any] = {
            "model": self.model,
            "release": self.release and str(self.release.absolute()),
            "name": self.name,
            "api_keys": self.api_keys and str(self.api_keys),
            "shared_prefix_cache": self.shared_prefix_cache,
            "metrics": self.metrics,
            "cors": self.cors and tuple(self.cors),
            "seconds": self.seconds,
            "precision": self.precision,
            "dtype": self.dtype,
            "kv_cache_dtype": self.kv_cache_dtype,
            "runs": self.runs and str(self.runs.absolute()),
            "batches": self.batches and str(self.batches.absolute()),
            "capture": self.capture and absolute(self.capture),
            "capture_texts": self.capture_texts,
            "capture_days": self.capture_days,
            "capture_texts_days": self.capture_texts_days,
            "capture_reruns": self.capture_reruns,
            "adapters": parse_adapters(self.adapters) if self.adapters else None,
            "adapters_from": self.adapters_from and absolute(self.adapters_from),
            "policy": self.policy and str(self.policy.absolute()),
            "run_code": self.run_code,
            "tools": self.tools,
            "ui": self.ui,
        }
        replicas = parse_replicas(self.replicas) if self.replicas else {}
        replicas |= parse_replicas(self.gateways, "gateways") if self.gateways else {}
        return {key: value for key, value in given.items() if value is not None} | replicas

    def _check(self) -> None:
        if self.model is None and self.config is None and self.release is None:
            raise UsageError("what to serve", do="give --model DIR or --config FILE, or --release DIR")
        if self.model is not None and self.release is not None:
            raise UsageError("--model and --release", do="leave out --model: the release says which version serves")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in (None, *allowed):
                raise UsageError(f"--{name.replace('_', '-')}", got=getattr(self, name), allowed=allowed)
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise UsageError("--seconds", got=self.seconds, allowed="a number above 0")
        if self.logs is not None and (not self.ray or os.environ.get("RAY_ADDRESS")):
            raise UsageError("--logs", do="leave it out: no Ray is started that would delete its logs")
        if not self.ray and (
            (self.model or self.release) is None or self.config is not None or self.replicas or self.gateways
        ):
            raise UsageError(
                "--no-ray serves one model from this process", do="give --model DIR or --release DIR, and no --config"
            )

    def _here(self) -> None:
        from shoal.api.serve_args import ServeArgs
        from shoal.api.server import run_local

        args = ServeArgs(**{"ui": True} | self.args())
        port = PORT if self.port is None else self.port
        run_local(args, host=self.host or LOOPBACK, port=port, on_ready=partial(_ready, page=args.ui))

    def _on_ray(self) -> None:
        from shoal.api.serve_args import ServeArgs
        from shoal.machine import need_free_port
        from shoal.on_ray.ports import need_closed_ports
        from shoal.on_ray.resources import local_ray
        from shoal.on_ray.serve import run
        from shoal.on_ray.serve_config import load_serve_config, serve_config, shows_page

        if self.config is not None:
            deploy = load_serve_config(self.config, host=self.host, port=self.port, **self.args())
        else:
            args = ServeArgs(**{"ui": True} | self.args())
            deploy = serve_config(args, host=self.host or LOOPBACK, port=self.port or PORT)
        need_free_port(deploy.http_options.host, deploy.http_options.port)
        with local_ray(logs=self.logs):
            if not self.allow_public_ray:
                need_closed_ports()
            run(deploy, on_ready=partial(_ready, page=shows_page(deploy)))


@contextmanager
def _shop(stage: Serve) -> Iterator[Serve]:
    """`stage` with the address of the recipe's shop, which answers until the end of the block, where that is asked for."""
    if stage.tools != SHOP:
        yield stage
        return
    repository.need("recipes")
    from recipes.customer_service.service import serving

    with serving() as url:
        yield replace(stage, tools=url)


def _ready(url: str, page: bool) -> None:
    at = f"   chat page {url}/ui" if page else ""
    out.print(f"API {url}/v1{at}   (Ctrl-C ends it)", highlight=False, soft_wrap=True)
