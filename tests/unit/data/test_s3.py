"""The S3 service that tests are given."""

from tests.s3 import service


def test_a_service_begins_with_no_bucket_whatever_an_earlier_one_was_given() -> None:
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        made.client.put_object(Bucket="ocean", Key="made/index.json", Body=b"{}")
    with service() as made:
        assert made.client.list_buckets()["Buckets"] == []
