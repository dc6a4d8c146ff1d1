"""The pages on the manager and the command line say what is there, and their code runs."""

import re
import secrets
from pathlib import Path

import pytest
import torch
import typer.main

import ckpt_cloud
from ckpt_cloud.cli import ending
from ckpt_cloud.cli.app import app
from ckpt_cloud.manager import policies, save_policies

DOCS = Path(__file__).parents[2] / "docs"
CLI, MANAGER = (DOCS / "cli.md").read_text(), (DOCS / "manager.md").read_text()

COMMANDS = typer.main.get_command(app).commands


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_python_blocks_run(moto_server, monkeypatch, tmp_path):
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    # The server is shared, and other pages have a bucket of this name too.
    bucket = f"pages-{secrets.token_hex(4)}"
    moto_server.create_bucket(bucket)
    scope = {}
    assert len(blocks(MANAGER)) >= 3
    for block in blocks(MANAGER):
        exec(compile(block.replace("my-bucket", bucket), "docs/manager.md", "exec"), scope)
    assert (tmp_path / "traces/save-10.json").exists()
    ckpt_cloud.save({"w": torch.ones(3)}, checkpoint_id=f"s3://{bucket}/run/step-100")
    for block in blocks(CLI):
        elsewhere = block.replace("/tmp/ckpt-cloud-docs", str(tmp_path / "copies")).replace("my-bucket", bucket)
        exec(compile(elsewhere, "docs/cli.md", "exec"), scope)


def test_every_command_and_option_is_there():
    rows = dict(re.findall(r"^\| `(\w+) [^`]*` \| (.*) \|$", CLI, re.MULTILINE))
    assert set(rows) == set(COMMANDS)
    everywhere = {"--json", "--yes", "--help"}
    for name, command in COMMANDS.items():
        options = {max(each.opts, key=len) for each in command.params if each.param_type_name == "option"}
        missing = [option for option in options - everywhere if option not in rows[name]]
        assert not missing, f"{name}: {missing}"


def test_every_exit_status_is_there():
    said = {int(status) for status in re.findall(r"^\| (\d+) \|", CLI, re.MULTILINE)}
    names = ("DONE", "NOTHING", "WRONG", "AGAIN", "DAMAGED", "INTERRUPTED")
    assert said == {getattr(ending, name) for name in names}


def test_every_policy_is_there():
    public = {each.__name__ for each in policies.Policy.__subclasses__()} - {"AnyOf", "KeepAll"}
    public |= {each.__name__ for each in save_policies.SavePolicy.__subclasses__()} - {"AnySave"}
    assert public <= set(re.findall(r"^\| `(\w+)\(", MANAGER, re.MULTILINE))
