"""API keys: who may use the model, and how much of it a minute. Keys come from a file or the environment; only their digests
are kept.

A file has one key a line, ``#`` starts a comment; after the key its name in logs and its limits may follow:

    sk-3kf9...  name=search  requests=60  tokens=20000        a minute; tokens are those of prompt and answer
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from shoal.api.wire import RateLimitError, UnauthorizedError
from shoal.errors import ConfigError, did_you_mean

ENVIRONMENT = "SHOAL_API_KEYS"  # as in a file, with commas in place of line ends
SETTINGS = ("name", "requests", "tokens")

Clock = Callable[[], float]


class Bucket:
    """So much a minute, refilled evenly; at most a minute's worth is saved up. What is spent beyond it is a debt."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def spend(self, amount: int) -> None:
        self._refill()
        self._level -= amount

    def wait(self) -> float:
        """Seconds until one more may be spent; 0: now."""
        self._refill()
        return max(0.0, (1 - self._level) * 60 / self.per_minute)

    def state(self) -> tuple[int, float]:
        """How much may be spent now, and the seconds until it is full again."""
        self._refill()
        return max(0, math.floor(self._level)), (self.per_minute - self._level) * 60 / self.per_minute

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now


@dataclass(frozen=True)
class Key:
    """One accepted key, as its SHA-256 digest: it cannot be logged, printed or read back."""

    name: str
    digest: bytes
    requests: Bucket | None = None
    tokens: Bucket | None = None

    def admit(self) -> None:
        """Counts a request. Raises RateLimitError for one too many, or when its tokens are spent."""
        for what, bucket in self._buckets():
            seconds = bucket.wait()
            if seconds > 0:
                raise RateLimitError(
                    f"too many {what} with this key", retry_after=seconds, allowed=f"{bucket.per_minute} a minute"
                )
        if self.requests is not None:
            self.requests.spend(1)

    def spend(self, tokens: int) -> None:
        """Counts tokens as they are read or written. A request that runs goes on; the next one waits for what it overdrew."""
        if self.tokens is not None:
            self.tokens.spend(tokens)

    def headers(self) -> dict[str, str]:
        """What the key may still do now, in OpenAI's headers; nothing of what is not limited."""
        found: dict[str, str] = {}
        for what, bucket in self._buckets():
            left, seconds = bucket.state()
            told = {"limit": str(bucket.per_minute), "remaining": str(left), "reset": f"{seconds:.3f}s"}
            found |= {f"x-ratelimit-{which}-{what}": value for which, value in told.items()}
        return found

    def _buckets(self) -> list[tuple[str, Bucket]]:
        return [(what, b) for what, b in (("requests", self.requests), ("tokens", self.tokens)) if b is not None]


class ApiKeys:
    """The accepted keys."""

    def __init__(self, lines: Iterable[str], *, clock: Clock = time.monotonic) -> None:
        """`lines` as in a file. Raises ConfigError when they hold no key, one twice, or a setting that is not known; it names
        the line's number, never the key."""
        keys = [_key(line, number, clock) for number, line in enumerate(lines, 1) if _stripped(line)]
        if not keys:
            raise ConfigError("API keys", got="none", do="give at least one key, or none of the key options")
        if len({key.digest for key in keys}) < len(keys):
            raise ConfigError("API keys", got="one key twice", do="give each key on one line, with all its settings")
        self._keys = tuple(keys)

    @classmethod
    def load(cls, path: str | Path | None = None) -> ApiKeys | None:
        """Keys of a file, or else of $SHOAL_API_KEYS; None when neither is given. Raises ConfigError when the file cannot be
        read or holds no key."""
        if path is None:
            given = os.environ.get(ENVIRONMENT, "")
            return cls(given.split(",")) if given.strip(", ") else None
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read API keys {path}", got=str(error), do="give a file of one key a line"
            ) from error
        return cls(lines)

    def find(self, authorization: str | None) -> Key:
        """The key in an ``Authorization`` header. Takes the same time whichever key it is, or none. Raises
        UnauthorizedError."""
        if authorization is None:
            raise UnauthorizedError("no API key", do="send it as 'Authorization: Bearer KEY'")
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip())
        matches = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]
        if scheme.lower() != "bearer" or not matches:
            raise UnauthorizedError("wrong API key", do="send one of this server's keys as 'Authorization: Bearer KEY'")
        return matches[0]

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._keys)})"


def _stripped(line: str) -> str:
    return "" if line.lstrip().startswith("#") else line.strip()


def _key(line: str, number: int, clock: Clock) -> Key:
    secret, *settings = line.split()
    where = f"API keys, line {number}"
    given: dict[str, str] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in SETTINGS or name in given or not value:
            hint = did_you_mean(name, SETTINGS)  # the setting itself may be part of a key
            raise ConfigError(f"{where}: a setting", allowed="name=TEXT requests=N tokens=N, each once", do=hint)
        given[name] = value
    for name in ("requests", "tokens"):
        if name in given and not (given[name].isdecimal() and int(given[name][:12]) > 0):
            raise ConfigError(f"{where}: {name}", allowed="a whole number above 0, a minute")
    digest = _digest(secret)
    buckets = [Bucket(int(given[n][:12]), clock) if n in given else None for n in ("requests", "tokens")]
    return Key(given.get("name", f"key-{digest.hex()[:6]}"), digest, *buckets)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
