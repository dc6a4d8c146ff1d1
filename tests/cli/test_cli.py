"""The command line as a user calls it: in a process of its own, on local checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckpt_cloud

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run with two committed checkpoints, one that died, and a directory that is none."""
    root = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        state = {"w": torch.full((4, 3), float(step)), "half": torch.ones(5, dtype=torch.bfloat16), "step": step}
        ckpt_cloud.save(state, checkpoint_id=root / f"step-{step}")
    dead = root / "step-3" / "data" / ("0" * 32)
    dead.mkdir(parents=True)
    (dead / "0.safetensors").write_bytes(b"half")
    (root / "empty").mkdir()
    return root


def command(*args: object) -> subprocess.CompletedProcess[str]:
    code = "from ckpt_cloud.cli import main; import sys; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False, input=""
    )


def test_ls_shows_every_checkpoint_with_its_state(root):
    done = command("ls", root, "--json")
    assert done.returncode == 0, done.stderr
    states = {info["name"]: info["state"] for info in json.loads(done.stdout)}
    assert states == {"step-1": "committed", "step-2": "committed", "step-3": "incomplete"}


def test_ls_prints_a_table(root):
    lines = command("ls", root).stdout.splitlines()
    assert len(lines) == 1 + 3
    assert lines[-1].split()[:2] == ["step-2", "committed"]


def test_show_says_what_a_checkpoint_holds(root):
    shown = json.loads(command("show", root / "step-2", "--json").stdout)
    assert shown["tensors"]["w"] == {"dtype": "float32", "shape": [4, 3], "bytes": 48, "shards": 1}
    assert shown["tensors"]["half"]["bytes"] == 10
    assert set(shown["items"]) == {"step"}
    assert [entry["key"].endswith("/0.safetensors") for entry in shown["objects"]] == [True]


HOSTILE = "a\x1b[2J\x1b]0;title\x07\r\x9b31m\u202e[bold]"


@pytest.mark.parametrize(
    "words", [["ls"], ["show", "1"], ["diff", "1", "2"], ["convert", "1", "m", "--to", "safetensors"]]
)
def test_names_in_a_bucket_do_not_speak_to_the_terminal(tmp_path, words):
    """Whoever can write to the bucket chooses them."""
    for step in (1, 2):
        noted = {"user_metadata": {HOSTILE: HOSTILE}, "metrics": {HOSTILE: 1.0}} if step == 1 else {}
        writer = ckpt_cloud.ObjectStoreWriter(tmp_path / str(step), **noted)
        ckpt_cloud.save({HOSTILE * step: torch.ones(3), f"item{HOSTILE}": step}, storage_writer=writer)
    paths = [tmp_path / word if word in ("1", "2", "m") else word for word in words[1:]]
    done = command(words[0], *(paths or [tmp_path]))
    assert done.returncode in (0, 1)
    shown = done.stdout + done.stderr
    assert not set(shown) & set(HOSTILE) - set("a[2J]0;title31mbold\n"), shown
    assert "a\\x1b[2J" in shown


def test_show_prints_a_table(root):
    text = command("show", root / "step-2").stdout
    assert "4 × 3" in text
    assert "bfloat16" in text
    assert "1 object(s)" in text


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (("show", "step-9"), 1, "no checkpoint is here"),
        (("show", "step-3"), 1, "data but no COMMIT"),
        (("show", "gopher://x/y"), 2, "unknown scheme"),
        (("ls", "s3:/bucket/run"), 2, "lost a slash"),
        (("show",), 2, "Missing argument"),
    ],
)
def test_mistakes_end_in_a_message_and_a_status(root, args, status, said):
    url = [str(root / arg) if arg.startswith("step-") else arg for arg in args]
    done = command(*url)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_damage_has_a_status_of_its_own(root, tmp_path):
    damaged = tmp_path / "damaged"
    ckpt_cloud.save({"w": torch.ones(2)}, checkpoint_id=damaged)
    manifest = next(damaged.glob("data/*/manifest"))
    manifest.write_bytes(manifest.read_bytes()[:-1])
    assert command("show", damaged).returncode == 4


def test_version_and_help():
    assert command("--version").stdout.strip() == ckpt_cloud.__version__
    shown = command("--help").stdout
    assert "ls" in shown
    assert "show" in shown


def test_looking_does_not_pay_for_torch(root):
    code = f"""
import sys
sys.argv = ["ckpt-cloud", "show", {str(root / "step-1")!r}]
from ckpt_cloud.cli import main
try:
    main()
except SystemExit as left:
    assert not left.code
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent, stdout=subprocess.DEVNULL)


def test_gc_tells_first_and_deletes_when_told(tmp_path):
    for value in (1.0, 2.0):
        writer = ckpt_cloud.ObjectStoreWriter(tmp_path / "it", overwrite=True)
        ckpt_cloud.save({"w": torch.full((4,), value)}, storage_writer=writer)
    assert "--delete would delete 0" in command("gc", tmp_path).stdout, "all of it is young"
    told = command("gc", tmp_path, "--older-than", "0")
    assert "--delete would delete 2 object(s)" in told.stdout
    assert len(list(tmp_path.glob("it/data/*/*"))) == 4
    assert command("gc", tmp_path, "--older-than", "0", "--delete").returncode == 1, "it asks"
    assert len(list(tmp_path.glob("it/data/*/*"))) == 4
    assert "Deleted 2 object(s)" in command("gc", tmp_path, "--older-than", "0", "--delete", "--yes").stdout
    assert len(list(tmp_path.glob("it/data/*/*"))) == 2
    collected = json.loads(command("gc", tmp_path, "--older-than", "0", "--json").stdout)
    assert (collected["dry_run"], collected["objects"]) == (True, [])
    (tmp_path / "it/COMMIT").write_text("{}")
    assert "skipped" in command("gc", tmp_path, "--older-than", "0").stderr


def test_rm_asks(tmp_path):
    ckpt_cloud.save({"w": torch.ones(4)}, checkpoint_id=tmp_path / "it")
    assert command("rm", tmp_path / "it").returncode == 1
    assert ckpt_cloud.latest(tmp_path)
    assert command("rm", tmp_path / "it", "--yes").returncode == 0
    assert ckpt_cloud.latest(tmp_path) is None
    assert command("rm", tmp_path / "nothing", "-y").returncode == 1


def test_resolve_prints_what_is_there(tmp_path):
    ckpt_cloud.save({"w": torch.ones(4)}, checkpoint_id=tmp_path / "it")
    assert command("resolve", tmp_path / "it").stdout.startswith("committed ")
    (tmp_path / "dead/data/01a21531c95e76e4a862da8bcf80f971").mkdir(parents=True)
    (tmp_path / "dead/data/01a21531c95e76e4a862da8bcf80f971/0.safetensors").write_bytes(b"x")
    assert json.loads(command("resolve", tmp_path / "dead", "--json").stdout)["state"] == "aborted"
    ckpt_cloud.delete(tmp_path / "it")
    assert json.loads(command("resolve", tmp_path / "it", "--json").stdout)["state"] == "deleted"
    assert command("resolve", tmp_path / "none").returncode == 1
    assert not (tmp_path / "none").exists()
