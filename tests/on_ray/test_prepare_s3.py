"""S3 in and out on Ray: boto3 puts more than 1,000 keys, pyarrow lists them, Ray Data reads them, and the corpus goes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import ray.data

from shoal import presets
from shoal.data import remote
from shoal.data.batches import PretrainBatches
from shoal.data.documents import SourceSpec
from shoal.data.operators.pipeline import Operators
from shoal.errors import DataError
from shoal.on_ray.prepare import prepare
from shoal.on_ray.resources import local_ray
from tests.s3 import Service, service

pytestmark = [pytest.mark.ray, pytest.mark.drill]

KEYS = 1_050  # a listing has pages of 1,000
ITEM = "the answer that no model may have read before it is asked for it in the exam"
ASK = {"mix": {"text": 1.0}, "preset": presets.get("test"), "seed": 0}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service() as made, pytest.MonkeyPatch.context() as patch:  # Ray's processes take the environment from here
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        client = made.inside.client()
        client.create_bucket(Bucket="ocean")

        def put(number: int) -> None:
            seen = f"wind {number * 7 % 23}, waves {number % 5}, sails {number * number % 11} set"
            text = f"Log {number}: {seen}, all well aboard.\n"
            client.put_object(Bucket="ocean", Key=f"raw/{number % 10}/{number:04}.txt", Body=text.encode())

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(put, range(KEYS)))
        client.put_object(Bucket="ocean", Key="raw/7/bad.txt", Body=b"\xff")
        client.put_object(Bucket="ocean", Key="raw/7/exam.txt", Body=f"I know {ITEM}, said he.".encode())
        client.put_object(Bucket="ocean", Key="sets/exam.jsonl", Body=json.dumps({"prompt": ITEM}).encode())
        with local_ray():
            yield made


def test_boto3_pyarrow_and_ray_data_see_the_same_objects(s3: Service) -> None:
    files = s3.s3.filesystem().get_file_info(pafs.FileSelector("ocean/raw", recursive=True))
    keys = sorted(info.path for info in files if info.type == pafs.FileType.File)
    assert len(keys) == KEYS + 2
    read = ray.data.read_binary_files(
        "ocean/raw", filesystem=s3.inside.filesystem(), include_paths=True, override_num_blocks=4
    )
    rows = {row["path"].removeprefix("s3://"): row["bytes"] for row in read.iter_rows()}
    assert sorted(rows) == keys and rows["ocean/raw/7/0017.txt"].startswith(b"Log 17:")


@pytest.mark.smoke
def test_a_corpus_is_made_from_s3_to_s3_and_trained_on(s3: Service) -> None:
    source, out = SourceSpec("logs", "s3://ocean/raw/7", "CC0-1.0"), "s3://ocean/made"
    operators = Operators(evaluation=("s3://ocean/sets",), languages=("en", "de"))  # what actors hold
    s3.slow = 2  # for a while
    report = prepare(out, sources=[source], **ASK, operators=operators)
    counts = [report["documents"][split]["text"] for split in ("train", "heldout")]
    dropped = report["drops"]
    assert dropped["read"] == {"not UTF-8": 1}
    assert dropped["decontamination"] == {"holds next to nothing but evaluation items": 1}
    assert dropped.keys() == {"read", "decontamination"} and sum(counts) == KEYS // 10
    assert not list((remote.cache() / "prepare").iterdir())
    before = s3.s3.client().head_object(Bucket="ocean", Key="made/index.json")["LastModified"]
    assert prepare(out, sources=[source], **ASK, operators=operators) == report  # it is there
    assert s3.s3.client().head_object(Bucket="ocean", Key="made/index.json")["LastModified"] == before
    assert len(PretrainBatches(remote.local(out), batch_rows=4).at(0)[0].modalities) == 4
    with pytest.raises(DataError, match="another request: got 'other evaluation sets, operators'"):
        prepare(out, sources=[source], **ASK)


def test_a_bucket_that_is_not_there_is_told_before_any_work(s3: Service, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text that is long enough to be kept as a document of its own\n")
    told: list[str] = []
    for source, out in [("s3://nobody-made-this/x", str(tmp_path / "out")), (str(tmp_path), "s3://nobody-made-this/x")]:
        with pytest.raises(DataError, match="the bucket does not exist"):
            prepare(out, sources=[SourceSpec("s", source)], **ASK, on_progress=lambda *line: told.append(line[0]))
    assert not told
