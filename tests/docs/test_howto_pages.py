"""The tutorial, how-to and migration pages run as they stand, each as a user's own script, on a real S3 server."""

import importlib.util
import os
import re
import secrets
import shlex
import subprocess
import sys

import pytest
from doc_pages import ROOT, blocks_of, python_of

import ckpt_cloud

NEEDS = {
    "howto/plain-loop.md": (),
    "howto/lightning.md": ("lightning", "s3fs"),
    "migrate/fsspec-writer.md": ("s3fs",),
    "migrate/s3torchconnector.md": ("s3torchconnector",),
    "migrate/torch-save.md": (),
}
"""Pages that run as one process, and the packages that they need; in CI scripts/docs installs what the tests lack."""


@pytest.fixture
def bucket(moto_server, monkeypatch, nobodys_cloud):
    """A bucket of its own on a server that the environment leads to."""
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"page-{secrets.token_hex(4)}"
    moto_server.create_bucket(bucket)
    return bucket


def run(arguments, directory, status=0, **variables):
    done = subprocess.run(
        arguments,
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def torchrun(ranks, script, directory, **kwargs):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), script]
    return run(command, directory, **kwargs)


@pytest.mark.parametrize("page", NEEDS)
def test_page_runs(page, bucket, tmp_path):
    for package in NEEDS[page]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --group docs --group bench")
    script = tmp_path / "script.py"
    script.write_text(python_of(page).replace("my-bucket", bucket))
    run([sys.executable, script], tmp_path)
    if page.startswith("howto"):
        found = ckpt_cloud.list_checkpoints(f"s3://{bucket}/{script_root(page)}")
        assert "committed" in {info.state for info in found}


def script_root(page):
    """Where the page's script saves, under its bucket."""
    return re.search(r"s3://my-bucket/([\w-]+)", python_of(page))[1]


@pytest.mark.slow
def test_accelerate_resumes(bucket, tmp_path):
    pytest.importorskip("accelerate", reason="pip install --group docs")
    script = tmp_path / "with_accelerate.py"
    script.write_text(python_of("howto/accelerate.md").replace("my-bucket", bucket))
    assert "at step 8, saved 8" in run([sys.executable, script], tmp_path)
    assert "at step 12, saved 12" in torchrun(2, script, tmp_path)


WITH_FSDP = """
import runpy, sys
from accelerate import DistributedType
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor

init = AcceleratorState.__init__

def sharding_on_cpus_too(self, *args, fsdp_plugin=None, **kwargs):
    fresh = not AcceleratorState._shared_state
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None:
        assert self.distributed_type is DistributedType.MULTI_CPU
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

AcceleratorState.__init__ = sharding_on_cpus_too
scope = runpy.run_path("with_accelerate.py")
assert all(isinstance(parameter, DTensor) for parameter in scope["model"].parameters())
"""
"""Runs the page's script with what `accelerate launch --use_fsdp --fsdp_version 2` sets, where Accelerate itself would
leave FSDP out, and sees to it that the model was sharded."""


@pytest.mark.slow
def test_accelerate_with_fsdp2_resumes(bucket, tmp_path):
    """Two ranks with shards, two more steps of them, then one process without: the same checkpoints."""
    pytest.importorskip("accelerate", reason="pip install --group docs")
    script = tmp_path / "with_accelerate.py"
    script.write_text(python_of("howto/accelerate.md").replace("my-bucket", bucket))
    (tmp_path / "with_fsdp.py").write_text(WITH_FSDP)
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "true"}
    assert "at step 4, saved 4" in torchrun(2, "with_fsdp.py", tmp_path, **launched)
    assert "at step 8, saved 8" in torchrun(2, "with_fsdp.py", tmp_path, **launched)
    held = ckpt_cloud.ObjectStoreReader(f"s3://{bucket}/accelerate/step-8").read_metadata().state_dict_metadata
    assert len(held["model.0.weight"].chunks) == 2
    assert "at step 16, saved 16" in run([sys.executable, script], tmp_path)


@pytest.mark.slow
def test_sharded_lightning_resumes(bucket, tmp_path):
    pytest.importorskip("lightning", reason="pip install --group docs")
    script = tmp_path / "sharded.py"
    script.write_text(python_of("howto/lightning-sharded.md").replace("my-bucket", bucket))
    begun = torchrun(2, script, tmp_path)
    assert "begins after step 0 on 2 ranks" in begun
    assert "at step 16 of epoch 4" in begun
    resumed = torchrun(1, script, tmp_path, STEPS="18")
    assert "begins after step 12 on 1 ranks" in resumed
    assert "at step 18 of" in resumed
    names = [info.name for info in ckpt_cloud.list_checkpoints(f"s3://{bucket}/lightning-sharded")]
    assert names == ["step-6", "step-12", "step-18"]


@pytest.mark.slow
def test_fsdp2_resumes(bucket, tmp_path):
    script = tmp_path / "fsdp2.py"
    script.write_text(python_of("howto/fsdp2.md").replace("my-bucket", bucket))
    assert f"at step 4, saved s3://{bucket}/fsdp2/step-4" in torchrun(2, script, tmp_path)
    assert f"at step 8, saved s3://{bucket}/fsdp2/step-8" in torchrun(1, script, tmp_path)


@pytest.mark.slow
def test_tutorial(bucket, tmp_path):
    """Its commands in their order: four ranks of which one is killed, then two that go on."""
    (tmp_path / "train.py").write_text(python_of("tutorial.md").replace("demo", bucket))
    shown = [block.code for block in blocks_of(ROOT / "docs/tutorial.md") if block.language == "sh"]
    commands = [line.replace("demo", bucket) for code in shown for line in code.splitlines()]
    killed, resumed = (line for line in commands if "torchrun" in line)
    assert killed == "DIE_AT=40 torchrun --nproc-per-node 4 train.py"
    assert resumed == "torchrun --nproc-per-node 2 train.py"

    assert "begins after step 0 on 4 ranks" in torchrun(4, "train.py", tmp_path, status=1, DIE_AT="40")
    states = {info.name: info.state for info in ckpt_cloud.list_checkpoints(f"s3://{bucket}/first-run")}
    assert states.pop("step-40", "incomplete") == "incomplete"
    assert states == dict.fromkeys(["step-10", "step-20", "step-30"], "committed")

    output = torchrun(2, "train.py", tmp_path)
    assert "begins after step 30 on 2 ranks" in output
    assert "step 60: loss" in output
    for line in commands:
        if line.startswith("ckpt-cloud"):
            assert run([sys.executable, "-m", "ckpt_cloud.cli", *shlex.split(line)[1:]], tmp_path)


def test_torchtitan_page_names_what_there_is():
    """Its code compiles (test_docs_blocks.py); every name of ours in it exists, and what it overrides is explained."""
    code = python_of("howto/torchtitan.md")
    ours = set(re.findall(r"ckpt_cloud\.(\w+)", code))
    assert len(ours) >= 5
    assert ours <= set(ckpt_cloud.__all__)
    page = (ROOT / "docs/howto/torchtitan.md").read_text()
    overridden = re.findall(r"def (\w+)\(", code)
    assert [name for name in overridden if f"`{name}`" not in page] == []
