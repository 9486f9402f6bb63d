"""Addresses of buckets: refused in one line wherever a folder is expected."""

from pathlib import Path

import pytest
from helpers import random_adapters

import coremerge_jax as cm
from coremerge_jax.io.untrusted import refuse_url

BUCKETS = ["gs://bucket/a", "s3://bucket/a/0/items", "hdfs://host:9000/a", "file:///tmp/a"]


@pytest.mark.parametrize("url", BUCKETS)
@pytest.mark.parametrize("make", [str, Path])
def test_a_bucket_is_refused(url, make, tmp_path):
    (adapter,) = random_adapters({"x": (3, 4)}, [2], dtype="float32")
    calls = (
        lambda path: cm.open_adapter(path),
        lambda path: cm.open_orbax(path),
        lambda path: cm.open_peft(path),
        lambda path: cm.apply_adapter(adapter, path, tmp_path / "out"),
        lambda path: cm.save_orbax(adapter, tmp_path / "out", like=path),
        refuse_url,
    )
    scheme = url.partition("://")[0]
    for call in calls:
        with pytest.raises(cm.FormatError, match=f"{scheme}://.* no local folder.*copy it .*mount"):
            call(make(url))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["a/b", "owner/name@main", "C:/a", "/a:b/c", "a:b", "", "://x"])
def test_a_path_is_no_address(path):
    refuse_url(path)
    refuse_url(Path(path))


def test_a_folder_of_that_name_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gs:" / "a").mkdir(parents=True)
    refuse_url(Path("gs:/a"))
    with pytest.raises(cm.FormatError, match="gcloud storage cp -r"):
        refuse_url("gs://a")
