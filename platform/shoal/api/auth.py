"""API keys: who may use the model. Keys come from a file or the environment; only their digests are kept."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import ConfigError

ENVIRONMENT = "SHOAL_API_KEYS"  # keys separated by commas


class ApiKeys:
    """The accepted keys, as SHA-256 digests: no key can be logged, printed or read back."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple({_digest(key) for key in keys})
        if not self._digests:
            raise ConfigError("API keys", got="none", do="give at least one key, or none of the key options")

    @classmethod
    def load(cls, path: str | Path | None = None) -> ApiKeys | None:
        """Keys of a file, one a line (``#`` starts a comment), or else of $SHOAL_API_KEYS; None when neither is given.

        Raises ConfigError when the file cannot be read or holds no key.
        """
        if path is None:
            given = os.environ.get(ENVIRONMENT, "")
            keys = [key.strip() for key in given.split(",") if key.strip()]
            return cls(keys) if keys else None
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read API keys {path}", got=str(error), do="give a file of one key a line"
            ) from error
        return cls(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))

    def allow(self, authorization: str | None) -> bool:
        """Is this ``Authorization`` header one of the keys? Takes the same time whichever key it is, or none."""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self._digests)})"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
