"""The README's Python blocks run as they stand, one after another."""

import re
from pathlib import Path

import pytest

import localstack

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_python_blocks_run(moto_server: localstack.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    moto_server.create_bucket("my-bucket")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    assert scope["url"] == "s3://my-bucket/run/step-100"
