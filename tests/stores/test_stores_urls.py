"""What a URL means, what is refused, and what of it is never shown."""

import os
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt_cloud.errors import InvalidURL, StoreUnavailable
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.redaction import redacted
from ckpt_cloud.stores import Location, open_store, parse_url, supports


@pytest.mark.parametrize(
    ("url", "scheme", "bucket", "path", "normal"),
    [
        ("s3://bucket/run/step-1", "s3", "bucket", "run/step-1", "s3://bucket/run/step-1"),
        ("s3://bucket/run/step-1/", "s3", "bucket", "run/step-1", "s3://bucket/run/step-1"),
        ("s3://bucket", "s3", "bucket", "", "s3://bucket"),
        ("s3://bucket/", "s3", "bucket", "", "s3://bucket"),
        ("S3://bucket/run", "s3", "bucket", "run", "s3://bucket/run"),
        ("s3://bucket/with space/100%/a%2Fb/ü#1", "s3", "bucket", "with space/100%/a%2Fb/ü#1", None),
        ("s3://bucket/a..b/...", "s3", "bucket", "a..b/...", None),
        ("s3://bucket/user@host", "s3", "bucket", "user@host", None),
        ("az://$web/run", "az", "$web", "run", None),
        ("gs://my.bucket_1/run", "gs", "my.bucket_1", "run", None),
        ("memory://name/run", "memory", "name", "run", "memory://name/run"),
        ("memory://name", "memory", "name", "", "memory://name"),
        ("file:///data/run", "file", "", "/data/run", "file:///data/run"),
        ("file:///data/run/", "file", "", "/data/run", "file:///data/run"),
        ("file://localhost/data/run", "file", "", "/data/run", "file:///data/run"),
        ("file:///data/../other/./run", "file", "", "/other/run", "file:///other/run"),
        ("/data/run", "file", "", "/data/run", "file:///data/run"),
        ("/data/my run #1?/100%", "file", "", "/data/my run #1?/100%", None),
        (Path("/data/run"), "file", "", "/data/run", "file:///data/run"),
        (PurePosixPath("/data/run"), "file", "", "/data/run", "file:///data/run"),
    ],
)
def test_what_a_url_means(url, scheme, bucket, path, normal):
    location = parse_url(url)
    assert location == Location(scheme, bucket, path)
    assert location.url == (normal or str(url).replace("/data", "file:///data", 1 if scheme == "file" else 0))
    assert parse_url(location.url) == location
    assert supports(url)


def test_a_relative_path_is_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_url("run/step-1").path == f"{tmp_path}/run/step-1"
    assert parse_url("run/../other").path == f"{tmp_path}/other"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file://",
        "s3://",
        "s3:///run",
        "memory://",
        "memory:///run",
        "s3:/bucket/run",
        Path("s3://bucket/run"),
        "nosuch://host/run",
        "://bucket/run",
        "s3://bucket/../other",
        "s3://bucket/run/..",
        "s3://bucket/./run",
        "s3://bucket/run//step",
        "s3://bucket/run\0",
        "s3://buck\0et/run",
        "s3://bucket/run\nstep",
        "s3://bucket/run\tstep",
        "s3://bucket/run\x7f",
        "/data/run\0",
        "/data/run\nstep",
        "s3://AKIA:hunter2@bucket/run",
        "s3://AKIA:hunter2/x@bucket/run",
        "s3://AKIA@bucket/run",
        "s3://bucket/run?versionId=hunter2",
        "s3://bucket?x=hunter2",
        "s3://{bucket}/run",
        "s3://<bucket>/run",
        "s3://$BUCKET/run",
        "az://$CONTAINER/run",
        "gs://buck et/run",
        "az://b\u00fccher/run",
        "s3://bucket%2Frun",
        "https://bucket.s3.amazonaws.com/run?X-Amz-Signature=hunter2",
    ],
)
def test_refused(url):
    with pytest.raises(InvalidURL) as refused:
        parse_url(url)
    assert isinstance(refused.value, ValueError)
    assert "hunter2" not in f"{refused.value} {refused.value!r} {refused.value.args}"
    assert not supports(url)


@pytest.mark.parametrize("url", [None, 5, b"s3://bucket/run"])
def test_not_a_url_at_all(url):
    assert not supports(url)
    with pytest.raises(TypeError):
        parse_url(url)


@given(
    st.text(max_size=30)
    | st.tuples(st.sampled_from(["s3://", "memory://", "file:///"]), st.text(max_size=20)).map("".join)
)
def test_any_text_is_a_location_or_refused(text):
    try:
        location = parse_url(text)
    except InvalidURL:
        return
    assert parse_url(location.url) == location
    assert ".." not in location.path.split("/")
    if location.scheme != "s3":  # S3's needs credentials
        assert open_store(location, StoreOptions()).url == location.url


@pytest.mark.parametrize("url", ["s3://bucket/run", "s3://bucket", "memory://name", "file:///data"])
def test_children_lie_below(url):
    location = parse_url(url)
    child = location.child("step-1")
    assert child == parse_url(f"{url.rstrip('/')}/step-1")
    assert os.path.dirname(child.path) == location.path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/key", "s3://bucket/key"),
        ("https://user:hunter2@host/key", "https://host/key"),
        ("https://hunter2@host", "https://host"),
        ("https://user:hunter2@hunter2@host/key", "https://host/key"),
        ("s3://AKIA:hunter/hunter2+/x=@bucket/key", "s3://bucket/key"),
        ("https://host/key?X-Amz-Signature=hunter2&x=1", "https://host/key?…"),
        ("https://host/key?sig=hunter2 failed", "https://host/key?… failed"),
        ("GET 'https://host/key?sig=hunter2': reset", "GET 'https://host/key?…': reset"),
        ("two: https://a:hunter2@x/1?hunter2 and https://b:hunter2@y/2", "two: https://x/1?… and https://y/2"),
        ("http://127.0.0.1:8333/bucket/me@home", "http://127.0.0.1:8333/bucket/me@home"),
        ("mail me@example.org", "mail me@example.org"),
        ("/local/path/a@b", "/local/path/a@b"),
    ],
)
def test_secrets_of_urls_are_not_shown(text, shown):
    assert redacted(text) == shown
    error = StoreUnavailable(text, text)
    assert "hunter2" not in f"{error} {error!r}"


@given(st.from_regex(r"[A-Za-z0-9+/=]{4,40}", fullmatch=True), st.sampled_from(["s3", "https", "abfss"]))
def test_a_password_never_survives(password, scheme):
    secret = f"Zz{password}zZ"
    assert secret not in redacted(f"{scheme}://user:{secret}@host/path")
    assert secret not in redacted(f"{scheme}://host/path?token={secret}")
