"""The page on stores names every option of `StoreOptions`, and its defaults are the code's."""

import dataclasses
import re
from pathlib import Path

import ckpt_cloud
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores.resolve import DEFAULT_ENGINES

PAGE = (Path(__file__).parents[2] / "docs/stores.md").read_text()


def test_every_option_is_there():
    named = set(re.findall(r"`(\w+)(?:=[^`]*)?`", PAGE)) | set(re.findall(r"`(\w+)=", PAGE))
    internal = {"secrets_dropped"}
    assert {field.name for field in dataclasses.fields(StoreOptions)} - internal - named - {
        "engine",
        "filesystem",
    } == set()
    assert 'engine="fsspec"' in PAGE
    assert "filesystem=fs" in PAGE


def test_the_default_engines():
    rows = {"s3": "s3://bucket/path", "gcs": "gs://bucket/path", "azure": "az://container/path", "file": "file:///path"}
    for dialect, url in rows.items():
        (row,) = [line for line in PAGE.splitlines() if line.startswith("|") and url in line]
        assert row.split("|")[3].strip().partition(" ")[0] == DEFAULT_ENGINES[dialect]


def test_the_defaults_of_retries():
    retry = ckpt_cloud.RetryOptions()
    said = re.search(r"RetryOptions\((.*?)\)", PAGE)[1]
    for pair in said.split(", "):
        name, _, value = pair.partition("=")
        assert getattr(retry, name) == float(value)


def test_python_blocks_run():
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/stores.md", "exec"), {})
