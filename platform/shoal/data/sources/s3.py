"""Where S3 is: one setting for every client. pyarrow streams objects, boto3 copies whole corpora.

Notable: there are no keys here. Both clients look for credentials where AWS tools do: the environment, ``~/.aws``, the role of
the machine. pyarrow does not read AWS_ENDPOINT_URL by itself and boto3 does, which is why it is resolved here, once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from shoal.errors import ConfigError, DataError, ResourceError, first_line

SCHEME = "s3://"
ATTEMPTS = 7  # of one call, with growing pauses (half a minute in all), when S3 answers 503 SlowDown or not at all
SECONDS = 20.0  # that one answer may take
PAUSE = 0.1  # seconds before an object is asked for again that broke off; twice as long each time
_MAKING = threading.Lock()  # one session makes no two clients at once


def is_remote(place: str | Path) -> bool:
    return str(place).startswith(SCHEME)


@contextmanager
def told(uri: str) -> Iterator[None]:
    """Faults of boto3 become a DataError of one line."""
    try:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError as error:
        raise no_boto() from error
    try:
        yield
    except (BotoCoreError, Boto3Error, ClientError) as error:
        raise fault(uri, error) from error


@dataclass(frozen=True)
class S3:
    """An S3 service; empty values are AWS's own. Section ``s3`` of a prepare config, else the environment."""

    endpoint: str = ""  # such as http://127.0.0.1:9000
    region: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if self.endpoint and (parts.scheme not in ("http", "https") or not parts.hostname):
            raise ConfigError("s3.endpoint", got=self.endpoint, allowed="http://HOST[:PORT] or https://HOST[:PORT]")
        if parts.username or parts.password:
            raise ConfigError("s3.endpoint holds a password", do="give credentials in the environment or in ~/.aws")

    def resolved(self) -> S3:
        """With what is not given taken from the environment: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION or
        AWS_DEFAULT_REGION."""
        of = os.environ.get
        return S3(
            self.endpoint or of("AWS_ENDPOINT_URL_S3") or of("AWS_ENDPOINT_URL") or "",
            self.region or of("AWS_REGION") or of("AWS_DEFAULT_REGION") or "",
        )

    def filesystem(self) -> pafs.S3FileSystem:
        """pyarrow's client."""
        return _filesystem(self.resolved())

    def client(self) -> Any:
        """boto3's client. Raises ResourceError where boto3 is not installed."""
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise no_boto() from error
        here = self.resolved()
        retries = {"mode": "standard", "max_attempts": ATTEMPTS}
        config = Config(retries=retries, connect_timeout=SECONDS, read_timeout=SECONDS)
        with _MAKING:
            session = _session(boto3, _credentials())
            return session.client(
                "s3", endpoint_url=here.endpoint or None, region_name=here.region or None, config=config
            )


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an ``s3://`` URI. Raises ConfigError."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or not bucket or "?" in uri:
        raise ConfigError("URI", got=uri, allowed="s3://BUCKET or s3://BUCKET/PREFIX")
    return bucket, key


def got(client: Any, **asked: Any) -> tuple[dict[str, Any], bytes]:
    """What boto3's `client` answers for an object, or a range of it, and the bytes. It asks again by itself where S3 does not
    answer, and not where an answer breaks off in the middle: then this does. Raises what boto3 does."""
    from botocore.exceptions import BotoCoreError

    tries = 0
    while True:
        reply = client.get_object(**asked)
        try:
            return reply, reply["Body"].read()
        except BotoCoreError:
            tries += 1
            if tries >= ATTEMPTS:
                raise
            time.sleep(PAUSE * 2**tries)


def _credentials() -> tuple[object, ...]:
    """What changes where AWS tools would find other credentials: their variables, and the times of their files."""
    told = sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))
    names = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    files = [os.path.expanduser(os.environ.get(name) or usual) for name, usual in names.items()]
    return (*told, *(_changed(file) for file in files))


def _changed(file: str) -> tuple[int, ...]:
    """What is another for another file there; empty where none can be read, by a user without a home, say."""
    with suppress(OSError):
        stats = os.stat(file)
        return stats.st_ino, stats.st_mtime_ns, stats.st_size
    return ()


@lru_cache(maxsize=4)
def _session(boto3: Any, credentials: tuple[object, ...]) -> Any:
    """One for all clients, as it keeps what it has read of its package: the first client of another takes 15 times as long."""
    return boto3.session.Session()


def _forked() -> None:
    """In a fork nobody holds the lock that a thread of its parent held, nor goes on with what that had begun."""
    global _MAKING
    _MAKING = threading.Lock()
    _session.cache_clear()


os.register_at_fork(after_in_child=_forked)


def no_boto() -> ResourceError:
    """What to say where boto3 is not installed."""
    return ResourceError("s3:// needs boto3 to copy corpora", do="pip install 'shoal[s3]'")


def is_fault(error: Exception) -> bool:
    """Whether pyarrow's error is the service's, after all attempts, and not the file's."""
    return "AWS Error" in str(error) and not isinstance(error, FileNotFoundError)


def fault(uri: str, error: Exception) -> DataError:
    """What went wrong at `uri`, as one line that a person can act on; `error` is pyarrow's or boto3's."""
    text = str(error)
    for codes, (what, do) in _FAULTS.items():
        if any(code in text for code in codes):
            return DataError(f"{uri}: {what}", do=do)
    return DataError(f"{uri}: S3 failed", got=first_line(error), do="check endpoint, region and credentials")


_FAULTS = {
    ("NO_SUCH_BUCKET", "NoSuchBucket", "(404)"): ("the bucket does not exist", "check the name and the region"),
    ("ACCESS_DENIED", "AccessDenied", "(403)", "HTTP status 403", "credentials"): (
        "access is denied",
        "check the credentials (environment, ~/.aws or the machine's role)",
    ),
    ("SLOW_DOWN", "SlowDown", "(503)", "HTTP status 503"): (
        f"S3 still asked to slow down after {ATTEMPTS} attempts",
        "wait, and run it again",
    ),
    ("NETWORK_CONNECTION", "Could not connect", "timed out"): (
        "S3 does not answer",
        "check the endpoint and the network",
    ),
}


@lru_cache
def _filesystem(s3: S3) -> pafs.S3FileSystem:
    parts = urlsplit(s3.endpoint)
    options: dict[str, Any] = {"endpoint_override": parts.netloc, "scheme": parts.scheme} if s3.endpoint else {}
    if s3.region or s3.endpoint:  # other services take any region, and must not be asked for AWS's
        options["region"] = s3.region or "us-east-1"
    retry = pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS)
    return pafs.S3FileSystem(retry_strategy=retry, connect_timeout=SECONDS, request_timeout=SECONDS, **options)
