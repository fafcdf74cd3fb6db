"""API keys: who may use the model, and how much of it a minute. Keys come from a file or the environment; only their digests
are kept.

A file has one key a line, ``#`` starts a comment; after the key its name and its limits may follow. In place of a key its
SHA-256 digest may stand. A name says whose stored responses are whose, so no two keys have the same:

    sk-3kf9...  name=search  requests=60  tokens=20000        a minute; tokens are those of prompt and answer
    sk-81hc...  name=shop  texts=yes                          its requests may have their texts stored
    sk-5qd2...  name=desk  tenant=shop                        finds in the prefix cache what other keys of its tenant left
    sha256:b0b2d9...  name=batch  at_once=8                   requests that run at the same time
    sk-9x1ab...  name=ann  admin=yes                          may change which version of a release serves

Notable: a service that was told to have keys never becomes open. A file that changes is read again with the next request; a new
one that cannot be read changes nothing, and the log says so. One that is read while somebody writes over it is without some of
its keys: no request has them then, but what is kept for them (batches, what is left of a minute) is for `GRACE_SECONDS` more.
Its places are kept for as long as requests of it run.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from shoal.api.wire import RateLimitError, UnauthorizedError
from shoal.errors import ConfigError, did_you_mean

ENVIRONMENT = "SHOAL_API_KEYS"  # as in a file, with commas in place of line ends
RATES = ("requests", "tokens")  # a minute
MAY = ("texts", "admin")  # what a key is allowed only where its line says yes
COUNTS = (*RATES, "at_once")
SETTINGS = ("name", "tenant", *COUNTS, *MAY)
AGAIN_SECONDS = 1.0  # between two tries to read a file that cannot be read
GRACE_SECONDS = 10.0  # a key that came back within them was never gone

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")

Clock = Callable[[], float]
Stamp = tuple[int, ...]  # of a file: it changes with the file

log = logging.getLogger("shoal.api")


class Bucket:
    """So much a minute, refilled evenly; at most a minute's worth is saved up. What is spent beyond it is a debt."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def spend(self, amount: int) -> None:
        self._refill()
        self._level -= amount

    @property
    def level(self) -> float:
        """What is left; below 0 a debt."""
        self._refill()
        return self._level

    @level.setter
    def level(self, value: float) -> None:
        self._level, self._at = value, self._clock()

    def wait(self, beside: float = 0.0) -> float:
        """Seconds until one more may be spent `beside` what is to stay; 0: now."""
        self._refill()
        needed = min(1 + beside, float(self.per_minute))
        return max(0.0, (needed - self._level) * 60 / self.per_minute)

    def state(self) -> tuple[int, float]:
        """How much may be spent now, and the seconds until it is full again."""
        self._refill()
        return max(0, math.floor(self._level)), (self.per_minute - self._level) * 60 / self.per_minute

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now


@dataclass
class Places:
    """So many requests at the same time."""

    most: int
    taken: int = 0
    elsewhere: int = 0  # taken at other gateways

    @property
    def all_taken(self) -> int:
        """Here and elsewhere."""
        return self.taken + self.elsewhere


class Counts(Protocol):
    """What counts a key's requests and tokens for several gateways together (`api.quotas`)."""

    async def admit(self, key: Key) -> None:
        """As `Key.admit`."""

    def leave(self, key: Key) -> None:
        """A request of `key` has ended."""

    def refund(self, key: Key) -> None:
        """A request of `key` that was admitted was refused after all."""

    def spend(self, key: Key, tokens: int) -> None:
        """`key` has read or written `tokens`."""


@dataclass(frozen=True)
class Key:
    """One accepted key, as its SHA-256 digest: it cannot be logged, printed or read back."""

    name: str
    digest: bytes
    requests: Bucket | None = None
    tokens: Bucket | None = None
    places: Places | None = None
    texts: bool = False  # may its requests have their texts stored?
    admin: bool = False  # may change what is served
    tenant: str = ""  # keys of one tenant share the prefix cache; "": a tenant of its own
    shared: Counts | None = None  # where several gateways serve it

    @property
    def cache_salt(self) -> str:
        """Whose part of the prefix cache its requests use: as `Request.cache_salt`."""
        return f"tenant {self.tenant}" if self.tenant else f"key {self.digest.hex()[:32]}"

    async def admitted(self) -> None:
        """`admit`, in the count of all gateways."""
        if self.shared is None or not self.limited:
            self.admit()
        else:
            await self.shared.admit(self)

    @property
    def limited(self) -> bool:
        return self.places is not None or bool(self._buckets())

    def admit(self) -> None:
        """Counts a request, until `leave`. Raises RateLimitError for one too many, or when its tokens are spent."""
        if self.places is not None and self.places.all_taken >= self.places.most:
            what = "too many requests at once with this key"
            raise RateLimitError(what, retry_after=1.0, allowed=f"{self.places.most} at once")
        for what, bucket in self._buckets():
            seconds = bucket.wait()
            if seconds > 0:
                raise RateLimitError(
                    f"too many {what} with this key", retry_after=seconds, allowed=f"{bucket.per_minute} a minute"
                )
        if self.requests is not None:
            self.requests.spend(1)
        if self.places is not None:
            self.places.taken += 1

    def spare(self, share: float) -> float:
        """Seconds to wait until more than `share` of each of its limits is free: what may wait takes no more than that, or one
        place, from what may not. 0: now."""
        if self.places is not None and self.places.all_taken >= max(1, math.floor(self.places.most * (1 - share))):
            return AGAIN_SECONDS
        return max((bucket.wait(bucket.per_minute * share) for _, bucket in self._buckets()), default=0.0)

    def leave(self) -> None:
        """A request that was admitted has ended."""
        if self.places is not None:
            self.places.taken -= 1
            if self.shared is not None:
                self.shared.leave(self)

    def refund(self, tokens: int) -> None:
        """A request that was admitted, and has spent `tokens`, was refused after all: it counts no more."""
        if self.requests is not None:
            self.requests.spend(-1)
            if self.shared is not None:
                self.shared.refund(self)
        if tokens:
            self.spend(-tokens)

    def spend(self, tokens: int) -> None:
        """Counts tokens as they are read or written. A request that runs goes on; the next one waits for what it overdrew."""
        if self.tokens is not None:
            self.tokens.spend(tokens)
            if self.shared is not None:
                self.shared.spend(self, tokens)

    def headers(self) -> dict[str, str]:
        """What the key may still do now, in OpenAI's headers; and nothing about what is not limited."""
        found: dict[str, str] = {}
        for what, bucket in self._buckets():
            left, seconds = bucket.state()
            told = {"limit": str(bucket.per_minute), "remaining": str(left), "reset": f"{seconds:.3f}s"}
            found |= {f"x-ratelimit-{which}-{what}": value for which, value in told.items()}
        return found

    @cached_property
    def line(self) -> str:
        """It as a line of a file, by its digest."""
        limits = [f"{what}={bucket.per_minute}" for what, bucket in self._buckets()]
        limits += [] if self.places is None else [f"at_once={self.places.most}"]
        limits += [f"{what}=yes" for what in MAY if getattr(self, what)]
        limits += [f"tenant={self.tenant}"] if self.tenant else []
        return " ".join([f"sha256:{self.digest.hex()}", f"name={self.name}", *limits])

    def _buckets(self) -> list[tuple[str, Bucket]]:
        return [(what, b) for what, b in (("requests", self.requests), ("tokens", self.tokens)) if b is not None]


class ApiKeys:
    """The accepted keys."""

    def __init__(self, lines: Iterable[str], *, clock: Clock = time.monotonic, shared: Counts | None = None) -> None:
        """`lines` as in a file; `shared`: what counts for several gateways. Raises ConfigError when they hold no key, a key
        twice, or an unknown setting; the error names the number of the line, never the key."""
        self._clock, self._shared = clock, shared
        self._keys = _keys(lines, clock, shared)
        self._file: Path | None = None  # that they are read again from
        self._stamp: Stamp | None = None  # of the file when it was last read
        self._failed: Stamp | None = ()  # of the file that could not be read, as was told; (): none
        self._again = -math.inf  # when it may be tried again
        self._gone: dict[str, tuple[float, Key]] = {}  # keys that the file has no more, by digest, and since when

    @classmethod
    def load(
        cls, path: str | Path | None = None, *, clock: Clock = time.monotonic, shared: Counts | None = None
    ) -> ApiKeys | None:
        """Keys of a file, which is read again when it changes, or else those of $SHOAL_API_KEYS; None when neither is given.
        Raises ConfigError when the file cannot be read, and when either holds no key."""
        if path is None:
            return cls.from_environment(clock=clock, shared=shared)
        stamp = _stamp(Path(path))  # before the reading: what is written meanwhile is read again
        keys = cls(_read(Path(path)), clock=clock, shared=shared)
        keys._file, keys._stamp = Path(path), stamp
        return keys

    @classmethod
    def from_environment(cls, *, clock: Clock = time.monotonic, shared: Counts | None = None) -> ApiKeys | None:
        """Keys of $SHOAL_API_KEYS; None where it is not set. Raises ConfigError when it is set and holds none: what filled it
        failed, and the service would be open."""
        given = os.environ.get(ENVIRONMENT)
        if given is None:
            return None
        if not given.strip(", "):
            raise ConfigError(f"${ENVIRONMENT}", got="no key", do="put keys into it, or unset it to be open to all")
        return cls(given.split(","), clock=clock, shared=shared)

    @property
    def limited(self) -> bool:
        """Whether any key is."""
        return any(key.limited for key in self._keys)

    @property
    def lines(self) -> list[str]:
        """The keys as lines of a file, each by its digest."""
        return [key.line for key in self._keys]

    def find(self, authorization: str | None) -> Key:
        """The key in an ``Authorization`` header. Takes the same time whichever key it is, or none. Raises
        UnauthorizedError."""
        self._renew()
        if authorization is None:
            raise UnauthorizedError("no API key", do="send it as 'Authorization: Bearer KEY', or as 'x-api-key: KEY'")
        scheme, _, given = authorization.partition(" ")
        digest = _digest(given.strip())
        matches = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]
        if scheme.lower() != "bearer" or not matches:
            raise UnauthorizedError("wrong API key", do="send one of this server's keys as 'Authorization: Bearer KEY'")
        return matches[0]

    def known(self, digest: str) -> Key | None:
        """The key of this digest, in hexadecimal digits, for what may wait; None where it has been none of the accepted ones
        for `GRACE_SECONDS`."""
        self._renew()
        since, gone = self._gone.get(digest, (-math.inf, None))
        if gone is not None and self._clock() < since + GRACE_SECONDS:
            return gone
        return next((key for key in self._keys if key.digest.hex() == digest), None)

    def _renew(self) -> None:
        """Read the file again if it has changed. What is left of a key's minute stays, where its line is the same."""
        if self._file is None or (stamp := _stamp(self._file)) == self._stamp:
            return
        if stamp == self._failed and self._clock() < self._again:
            return
        try:
            keys = _keys(_read(self._file), self._clock, self._shared)
        except ConfigError as error:  # it may be for a moment, as where files are all in use: a key that went must go
            self._again = self._clock() + AGAIN_SECONDS
            if stamp != self._failed:
                log.error("the API keys of %s stay as they were: %s", self._file, error)
            self._failed = stamp
            return
        self._stamp = stamp
        now = self._clock()
        last = {
            digest: (at, key)
            for digest, (at, key) in self._gone.items()
            if now < at + GRACE_SECONDS or (key.places is not None and key.places.taken)
        }
        last |= {key.digest.hex(): (now, key) for key in self._keys}
        known = {key.line: key for _, key in last.values()}
        self._keys = tuple(known.get(key.line, key) for key in keys)
        there = {key.digest.hex() for key in keys}
        self._gone = {digest: gone for digest, gone in last.items() if digest not in there}
        log.warning("read API keys again from %s: %d", self._file, len(keys))

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._keys)})"


def _read(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        got = error.strerror if isinstance(error, OSError) else "not UTF-8"  # a decoder's own text quotes what it read
        raise ConfigError(f"cannot read API keys {path}", got=got, do="give a file of one key a line") from error


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _keys(lines: Iterable[str], clock: Clock, shared: Counts | None) -> tuple[Key, ...]:
    keys = {number: parsed(line, number, clock, shared) for number, line in enumerate(lines, 1) if _stripped(line)}
    if not keys:
        raise ConfigError("API keys", got="none", do="give at least one key, or none of the key options")
    digests: dict[bytes, int] = {}
    names: dict[str, int] = {}
    for number, key in keys.items():
        if (first := digests.setdefault(key.digest, number)) != number:
            what = f"API keys, lines {first} and {number}: one key twice"
            raise ConfigError(what, do="give each key on one line, with all its settings")
        if (first := names.setdefault(key.name, number)) != number:  # whose a stored response is, its key's name says
            what = f"API keys, lines {first} and {number}: one name for two keys"
            raise ConfigError(
                what, got=f"name={key.name}", do="give each its own: keys of one name would share all stored"
            )
    return tuple(keys.values())


def _stripped(line: str) -> str:
    return "" if line.lstrip().startswith("#") else line.strip()


def parsed(line: str, number: int, clock: Clock, shared: Counts | None = None) -> Key:
    """The key of a line of a file, which is its `number`th. Raises ConfigError."""
    secret, *settings = line.split()
    where = f"API keys, line {number}"
    given: dict[str, str] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in SETTINGS or name in given or not value:
            hint = did_you_mean(name, SETTINGS)  # the setting itself may be part of a key
            raise ConfigError(
                f"{where}: a setting",
                allowed="name=TEXT tenant=TEXT requests=N tokens=N at_once=N texts=yes admin=yes, each once",
                do=hint,
            )
        given[name] = value
    wrong = next((n for n in MAY if given.get(n, "yes") not in ("yes", "no")), None)
    if wrong is not None:
        raise ConfigError(f"{where}: {wrong}", allowed="yes or no")
    wrong = next((n for n in COUNTS if n in given and not _is_count(given[n])), None)
    if wrong is not None:
        allowed = "a whole number above 0, of 12 digits at most" + ", a minute" * (wrong in RATES)
        raise ConfigError(f"{where}: {wrong}", allowed=allowed)
    known = _DIGEST.fullmatch(secret)
    if known is None and secret.startswith("sha256:"):  # a digest is no secret, so it must not become a key
        raise ConfigError(f"{where}: a digest", allowed="sha256: and 64 digits of 0-9a-f")
    digest = bytes.fromhex(known[1]) if known else _digest(secret)
    requests, tokens = (Bucket(int(given[name]), clock) if name in given else None for name in RATES)
    places = Places(int(given["at_once"])) if "at_once" in given else None
    may = {what: given.get(what) == "yes" for what in MAY}
    name, tenant = given.get("name", f"key-{digest.hex()[:6]}"), given.get("tenant", "")
    return Key(name, digest, requests, tokens, places, **may, tenant=tenant, shared=shared)


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) <= 12 and int(text) > 0  # Python refuses to read thousands of digits


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
