"""API keys on Ray: how they come to gateways that run in other processes, on other nodes, and at other times than who starts
the service.

A deployment carries a reference and never a key, since Serve shows and logs what its arguments are:

    a file              read by each gateway itself, and again when it changes
    kept:NAME           what stood in $SHOAL_API_KEYS of who started the service, as digests, in the key-value store of the
                        cluster's head
    $SHOAL_API_KEYS     in a config: the variable must be set where the service is started

A gateway that has a reference and finds no key there does not start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.experimental import internal_kv

from shoal.api.auth import ENVIRONMENT, ApiKeys, Counts
from shoal.errors import ConfigError

VARIABLE = f"${ENVIRONMENT}"
KEPT = "kept:"

_PLACE = b"shoal-api-keys"


def referred(given: str | None) -> str | None:
    """`given` of a config as a reference that every gateway can follow, in the process that starts the service; None: open to
    all. Raises ConfigError for a file without keys, and for a variable without any that is set or asked for."""
    if given is None or given == VARIABLE:
        keys = ApiKeys.from_environment()
        if keys is None and given is not None:
            raise ConfigError(f"args.api_keys: {VARIABLE}", got="not set here", do="set it, or name a file of keys")
        return None if keys is None else _keep(keys)
    if given.startswith(KEPT):
        return given
    ApiKeys.load(given)  # refused now, in one line, and not by every gateway
    return str(Path(given).resolve())


def keys_of(reference: str | None, shared: Counts | None = None) -> ApiKeys | None:
    """The keys, in the gateway, `shared` with the others there are. Without a reference those of its own environment: of a Ray
    that was started with them. Raises ConfigError when there are none where there have to be."""
    if reference is None or not reference.startswith(KEPT):
        return ApiKeys.load(reference, shared=shared)
    held = internal_kv._internal_kv_get(reference.removeprefix(KEPT), namespace=_PLACE)
    if held is None:
        raise ConfigError(
            "API keys", got="lost with the Ray that held them", do="start the service anew, with its keys"
        )
    return ApiKeys(held.decode().splitlines(), shared=shared)


def forget() -> None:
    """Drops what `referred` keeps on the Ray that is running."""
    for name in internal_kv._internal_kv_list(b"", namespace=_PLACE):
        internal_kv._internal_kv_del(name, namespace=_PLACE)


def refuse_clear(values: Any) -> None:
    """Raises ConfigError for a config with the keys themselves in an ``env_vars``: Serve shows it to all who may ask."""
    for where, held in _mappings(values, ""):
        if where.endswith("env_vars") and ENVIRONMENT in held:
            raise ConfigError(f"{where}.{ENVIRONMENT}", do="take it out, and name a file of keys in args.api_keys")


def _keep(keys: ApiKeys) -> str:
    text = "\n".join(keys.lines)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    internal_kv._internal_kv_put(name, text, namespace=_PLACE)
    return KEPT + name


def _mappings(values: Any, path: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    if isinstance(values, Mapping):
        yield path, values
        for key, value in values.items():
            yield from _mappings(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from _mappings(value, f"{path}[{index}]")
