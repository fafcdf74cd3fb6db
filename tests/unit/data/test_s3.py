"""The S3 service that tests are given, and the clients of one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest

from shoal.data.sources import s3
from shoal.data.sources.s3 import S3
from tests.s3 import service


def test_a_service_begins_with_no_bucket_whatever_an_earlier_one_was_given() -> None:
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        made.client.put_object(Bucket="ocean", Key="made/index.json", Body=b"{}")
    with service() as made:
        assert made.client.list_buckets()["Buckets"] == []


def signs_as() -> str:
    """The key that a new client signs with."""
    url = S3("http://127.0.0.1:9").client().generate_presigned_url("get_object", Params={"Bucket": "a", "Key": "b"})
    asked = parse_qs(urlsplit(url).query)
    (key,) = asked.get("AWSAccessKeyId") or asked["X-Amz-Credential"]
    return key.partition("/")[0]


def test_clients_share_a_session_until_there_are_other_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the environment, or in another's file or another time of it: what is rotated there is used by the next client."""
    made, new = list[Any](), boto3.session.Session

    def begun() -> Any:
        made.append(new())
        return made[-1]

    monkeypatch.setattr(boto3.session, "Session", begun)
    s3._session.cache_clear()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    file = tmp_path / "AWS_SHARED_CREDENTIALS_FILE"
    for number, key in enumerate(("first", "second")):
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = x\n")
        os.utime(file, (number, number))
        assert signs_as() == signs_as() == key
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "third")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert signs_as() == signs_as() == "third"
    assert len(made) == 3
    s3._session.cache_clear()  # none of this machine's own is one of these


def test_who_may_not_look_for_a_file_of_credentials_has_a_client_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user has no home, or another's."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "~nobody-has-this-name/credentials")
    assert signs_as() == "mine"
    stat = os.stat

    def refused(path: Any, **how: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(os, "stat", refused)
    assert signs_as() == "mine"


def test_a_fork_makes_clients_though_a_thread_of_its_parent_was_making_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    signs_as()
    with s3._MAKING:
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # else it would wait for ever
            try:
                os._exit(0 if signs_as() == "mine" else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
