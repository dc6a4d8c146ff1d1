"""Only what needs torch pays for it: 2 seconds and 270 MB."""

import subprocess
import sys

import pytest


def loaded(statement: str, *modules: str) -> list[str]:
    """Those of `modules` that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {modules!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return result.stdout.split()


@pytest.mark.parametrize("module", ["ckpt_cloud", "ckpt_cloud.cli", "ckpt_cloud.stores", "ckpt_cloud.catalog"])
def test_importing_leaves_torch_out(module):
    assert loaded(f"import {module}", "torch", "numpy") == []


def test_importing_the_package_loads_no_store_library():
    assert loaded("import ckpt_cloud", "obstore", "fsspec", "boto3", "botocore", "asyncio") == []


def test_torch_comes_with_the_first_use():
    """So that the tests above can fail."""
    assert loaded("import ckpt_cloud; ckpt_cloud.ObjectStoreWriter", "torch") == ["torch"]
