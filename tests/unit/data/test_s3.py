"""The S3 service that tests are given, and the clients of one."""

from __future__ import annotations

import os
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
