"""Every command on real checkpoints, called as a shell would: what it prints, how it ends, what it leaves."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.testing
from torch.distributed.checkpoint._extension import ZStandard

import ckpt_cloud
from ckpt_cloud.cli.app import app
from ckpt_cloud.cli.nearby import best, near_schemes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

COMMANDS = ["bench", "cp", "diff", "doctor", "gc", "ls", "resolve", "rm", "show", "uploads", "verify"]


def command(*args, stdin=None):
    """In a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(Path(ckpt_cloud.__file__).parents[1])}
    call = [sys.executable, "-m", "ckpt_cloud.cli", *map(str, args)]
    return subprocess.run(call, capture_output=True, text=True, check=False, input=stdin or "", env=env, timeout=120)


def invoke(*args, stdin=None):
    """In this process; an error that is ours comes out."""
    return typer.testing.CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def state(value, size=8):
    return {"model": {"w": torch.full((size, 2), float(value)), "b": torch.ones(3)}, "step": value}


@pytest.fixture
def root(tmp_path):
    for step in (10, 20):
        writer = ckpt_cloud.ObjectStoreWriter(
            tmp_path / f"run/step-{step}", metrics={"loss": 1 / step}, user_metadata={"commit": "abc"}
        )
        ckpt_cloud.save(state(step), storage_writer=writer)
    return tmp_path / "run"


def test_ls_shows_metrics(root):
    assert "loss 0.05" in invoke("ls", root).stdout
    listed = json.loads(invoke("ls", root, "--json").stdout)
    assert [info["metrics"] for info in listed] == [{"loss": 0.1}, {"loss": 0.05}]


def test_ls_of_nothing(root, tmp_path):
    done = command("ls", tmp_path / "rum")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"did you mean file://{root}?" in done.stderr
    assert json.loads(command("ls", tmp_path / "x", "--json").stdout) == []


def test_show_is_a_tree(root):
    done = invoke("show", root / "step-10", "--objects")
    assert re.search(r"├── model .* 2 entries", done.stdout)
    assert re.search(r"│ +├── w .*float32 +8 × 2", done.stdout)
    assert "loss=0.1" in done.stdout
    assert "commit=abc" in done.stdout
    assert "0.safetensors" in done.stdout
    assert "├── w" not in invoke("show", root / "step-10", "--depth", "1").stdout
    shown = json.loads(invoke("show", root / "step-10", "--json").stdout)
    assert (shown["metrics"], shown["user_metadata"]) == ({"loss": 0.1}, {"commit": "abc"})


@pytest.mark.parametrize(
    ("asked", "there", "found"),
    [
        ("step-11", ["step-9", "step-100", "step-12", "other"], "step-12"),
        ("step-1000", ["step-9", "step-900"], "step-900"),
        ("stpe-10", ["step-10", "notes"], "step-10"),
        ("pretraned", ["pretrained", "finetuned"], "pretrained"),
    ],
)
def test_what_is_near(asked, there, found):
    assert best(asked, there)[0] == found


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (("show", "{root}/step-11"), 1, "did you mean file://{root}/step-10 "),
        (("show", "{root}"), 1, "did you mean file://{root}/step-20 "),
        (("cp", "{root}/stepp-10", "{root}/copy"), 1, "did you mean file://{root}/step-"),
        (("rm", "{root}/step-21", "--yes"), 1, "did you mean file://{root}/step-20"),
        (("diff", "{root}/step-10", "{root}/step-29"), 1, "did you mean file://{root}/step-20"),
        (("ls", "s4://bucket/run"), 2, "did you mean s3://bucket/run?"),
        (("ls", "s3:/bucket/run"), 2, "lost a slash"),
        (("show", "gss://bucket/run"), 2, "did you mean gs://bucket/run?"),
        (("frobnicate",), 2, "No such command"),
        (("show", "x", "--nonsense"), 2, "No such option"),
        (("bench", "gopher://x", "--size", "1"), 2, "unknown scheme"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_end_in_a_message_and_a_status(root, args, status, said):
    done = command(*(arg.format(root=root) for arg in args))
    assert said.format(root=root) in done.stderr
    assert done.returncode == status
    assert "Traceback" not in done.stderr


def test_what_is_not_wrong_is_not_corrected():
    """The bucket is, and the scheme stays as it was."""
    assert near_schemes("s3://<bucket>/run") == []
    assert near_schemes("s3:/bucket/run") == ["s3://bucket/run"]


def test_an_error_is_json_too(root):
    done = command("show", root / "step-11", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["kind"] == "checkpoint-not-found"
    assert json.loads(done.stdout)["exit_status"] == 1


def test_diff(root, tmp_path):
    assert invoke("diff", root / "step-10", root / "step-10", "--values").exit_code == 0
    changed = json.loads(invoke("diff", root / "step-10", root / "step-20", "--values", "--json").stdout)
    assert set(changed["changed"]) == {"model.w", "step"}
    other = {"model": {"w": torch.ones(9, 2), "b": torch.ones(3, dtype=torch.float64), "new": torch.ones(1)}}
    ckpt_cloud.save(other, checkpoint_id=tmp_path / "other")
    done = invoke("diff", root / "step-10", tmp_path / "other")
    assert done.exit_code == 1
    for line in ("- step", "+ model.new", "~ model.w: 8 × 2 → 9 × 2", "~ model.b: float32 → float64"):
        assert line in done.stdout


def test_cp_copies_what_loads_bit_for_bit(root, tmp_path):
    done = command("cp", root / "step-20", tmp_path / "copy", "--read-back", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["report"]["objects"] == 1
    loaded = state(0)
    ckpt_cloud.load(loaded, checkpoint_id=tmp_path / "copy")
    assert loaded["step"] == 20
    assert loaded["model"]["w"].eq(20).all()
    shown = json.loads(invoke("show", tmp_path / "copy", "--json").stdout)
    assert (shown["metrics"], shown["user_metadata"]) == ({"loss": 0.05}, {"commit": "abc"})
    assert command("cp", root / "step-10", tmp_path / "copy").returncode == 1, "nothing is replaced unasked"
    assert command("cp", root / "step-10", tmp_path / "copy", "--overwrite").returncode == 0
    ckpt_cloud.load(loaded, checkpoint_id=tmp_path / "copy")
    assert loaded["step"] == 10


def test_cp_of_a_damaged_checkpoint_publishes_nothing(root, tmp_path):
    (pack,) = (root / "step-10").glob("data/*/0.safetensors")
    pack.write_bytes(pack.read_bytes()[:-1] + b"\xff")
    done = command("cp", root / "step-10", tmp_path / "copy")
    assert done.returncode == 4
    assert "differs from what was saved" in done.stderr
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]


INTERRUPTED = """
import os, signal, sys, threading
from ckpt_cloud.testing import Faults
from ckpt_cloud.cli import main
faults = Faults()
faults.hang("put", key="*.safetensors", times=None)

def interrupt():
    faults.wait_for("put", key="*.safetensors")
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
with faults.everywhere():
    main()
"""


def test_an_interrupted_cp_leaves_nothing_and_says_so(root, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(ckpt_cloud.__file__).parents[1])}
    call = [sys.executable, "-c", INTERRUPTED, "cp", str(root / "step-10"), str(tmp_path / "copy")]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=env, timeout=60)
    assert done.returncode == 130, done.stderr
    assert "interrupted: nothing was published" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_rm_shows_asks_and_deletes(root):
    refused = command("rm", root / "step-10", stdin="n\n")
    assert refused.returncode == 1
    assert "committed, saved" in refused.stderr
    assert "2 object(s)" in refused.stderr
    assert "nothing was done" in refused.stderr
    assert ckpt_cloud.latest(root).endswith("step-20")
    assert command("rm", root / "step-20", stdin="y\n").returncode == 0
    assert ckpt_cloud.latest(root).endswith("step-10")
    deleted = json.loads(command("rm", root / "step-10", "--yes", "--json").stdout)["deleted"]
    assert [each["objects"] for each in deleted] == [2]
    assert ckpt_cloud.latest(root) is None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_rm_deletes_the_checkpoints_of_single_ranks(tmp_path):
    url = str(tmp_path / "it")
    ckpt_cloud.save({"w": torch.ones(5000)}, checkpoint_id=url, use_collectives=False)
    done = command("rm", url, "--yes")
    assert done.returncode == 0, done.stderr
    assert "1 single rank(s)" in done.stderr
    assert [path.name for path in (tmp_path / "it").rglob("*") if path.is_file()] == ["COMMIT"]


def test_doctor_tries_measures_and_advises(tmp_path):
    done = invoke("doctor", tmp_path / "run", "--size", "1")
    assert done.exit_code == 0, done.output
    for name in ("list", "write", "read", "conditional create", "delete", "multipart upload"):
        assert re.search(rf"^ {name} +ok", done.stdout, re.MULTILINE), name
    assert "requests in flight" in done.stdout
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing is left"
    found = json.loads(invoke("doctor", tmp_path / "run", "--size", "0", "--json").stdout)
    assert {check["outcome"] for check in found["checks"]} == {"ok"}
    assert found["speeds"] == []


def test_doctor_on_a_cloud(s3_url):
    found = json.loads(invoke("doctor", s3_url, "--size", "6", "--json").stdout)
    assert {check["outcome"] for check in found["checks"]} == {"ok"}
    assert [speed["requests"] for speed in found["speeds"]] == [4, 16, 32]
    assert found["unfinished_uploads"]


def test_doctor_reads_lifecycle_rules(moto_in_process):
    import boto3

    client = boto3.client("s3", endpoint_url=moto_in_process.endpoint_url)
    client.create_bucket(Bucket="with-rules")
    said = json.loads(invoke("doctor", "s3://with-rules/run", "--size", "0", "--json").stdout)
    assert said["unfinished_uploads"] == "never ended by the store"
    assert any("AbortIncompleteMultipartUpload" in line for line in said["advice"])
    rule = {
        "ID": "tidy",
        "Status": "Enabled",
        "Filter": {"Prefix": ""},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 2},
    }
    client.put_bucket_lifecycle_configuration(Bucket="with-rules", LifecycleConfiguration={"Rules": [rule]})
    said = json.loads(invoke("doctor", "s3://with-rules/run", "--size", "0", "--json").stdout)
    assert said["unfinished_uploads"] == "ended by the store after 2 day(s)"


def test_doctor_names_what_does_not_work(tmp_path, store_faults):
    store_faults.fail("delete", error=ckpt_cloud.errors.PermissionDenied, times=None)
    done = invoke("doctor", tmp_path / "run", "--size", "1")
    assert done.exit_code == 2
    assert re.search(r"^ delete +failed", done.stdout, re.MULTILINE)
    assert re.search(r"^ write +ok", done.stdout, re.MULTILINE)
    assert "→ delete failed" in done.stdout


def test_doctor_of_a_store_that_is_not_there(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    found = json.loads(invoke("doctor", "s3://bucket/run", "--json").stdout)
    assert [check["outcome"] for check in found["checks"]][:2] == ["failed", "skipped"]


def test_bench_leaves_nothing(tmp_path):
    done = command("bench", tmp_path / "run", "--size", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["save"]["bytes_needed"] == found["load"]["bytes_needed"] == 4 << 20
    assert ckpt_cloud.list_checkpoints(tmp_path / "run") == []


def test_every_command_takes_json_and_has_an_example():
    for name in COMMANDS:
        shown = invoke(name, "--help").stdout
        assert "--json" in shown, name
        assert f"ckpt-cloud {name}" in shown, name


def test_shell_completion(tmp_path):
    env = {**os.environ, "_CKPT_CLOUD_COMPLETE": "complete_bash", "COMP_WORDS": "ckpt-cloud d", "COMP_CWORD": "1"}
    env["PYTHONPATH"] = str(Path(ckpt_cloud.__file__).parents[1])
    code = "import sys; sys.argv[0] = 'ckpt-cloud'; from ckpt_cloud.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env, timeout=60
    )
    assert set(done.stdout.split()) == {"diff", "doctor"}


def test_a_mistyped_step_is_told_from_the_others(root):
    """Of several URLs the one that is not there is the one whose neighbours are named."""
    near = f"did you mean file://{root}/step-"
    for call in (("diff", "step-10", "step-2"), ("diff", "step-21", "step-10"), ("rm", "step-10", "step-22")):
        done = command(call[0], *(root / step for step in call[1:]))
        assert done.returncode == 1
        assert near in done.stderr, done.stderr
        assert done.stderr.count("did you mean") == 1
        assert "/data" not in done.stderr
    assert near in command("verify", root / "step-21").stderr
    assert near in command("convert", root / "step-21", root / "x", "--to", "torch").stderr


@pytest.mark.parametrize("call", [("gc",), ("gc", "--delete", "--yes"), ("uploads",)])
def test_what_tidies_up_notices_a_mistyped_root(root, call):
    done = command(*call, f"{root}x")
    assert done.returncode == 1
    assert f"did you mean file://{root}?" in done.stderr


def test_resolve_leaves_no_register_at_a_mistyped_url(root):
    for place in (root / "step-21", root):
        done = command("resolve", place)
        assert done.returncode == 1
        assert "did you mean" in done.stderr
    assert sorted(path.name for path in root.iterdir()) == ["step-10", "step-20"]


def test_refusals_are_json_too(root):
    done = command("rm", root / "step-10", "--json")
    assert (done.returncode, json.loads(done.stdout)["error"]["kind"]) == (1, "not-confirmed")
    assert "[y/N]:\nnothing was done" in done.stderr


@pytest.fixture
def single_ranks(tmp_path):
    """What two ranks saved without coordination."""
    for rank in range(2):
        ckpt_cloud.save(state(rank), checkpoint_id=tmp_path / f"single/rank-{rank:05}")
    return tmp_path / "single"


def test_single_ranks_are_copied_and_deleted_together(single_ranks, root, tmp_path):
    copied = command("cp", single_ranks, tmp_path / "copy", "--json")
    assert copied.returncode == 0, copied.stderr
    assert json.loads(copied.stdout)["attempt"] == ""
    assert command("verify", "--deep", tmp_path / "copy").returncode == 0
    for rank in range(2):
        loaded = state(9)
        ckpt_cloud.load(loaded, checkpoint_id=tmp_path / f"copy/rank-{rank:05}")
        assert loaded["step"] == rank

    again = command("cp", single_ranks, tmp_path / "copy")
    assert (again.returncode, "give --overwrite" in again.stderr) == (1, True)
    assert command("cp", single_ranks, tmp_path / "copy", "--overwrite").returncode == 0
    hidden = command("cp", single_ranks, root / "step-10", "--overwrite")
    assert hidden.returncode == 1
    assert "of all ranks is already here" in hidden.stderr

    deleted = command("rm", tmp_path / "copy", "--yes")
    assert "of 2 single rank(s), 8 object(s)" in deleted.stderr
    assert {info.state for info in ckpt_cloud.list_checkpoints(tmp_path / "copy")} == {"deleted"}


def test_output_that_cannot_be_written_is_no_traceback(root):
    call = [sys.executable, "-m", "ckpt_cloud.cli", "ls", str(root)]
    env = {**os.environ, "PYTHONPATH": str(Path(ckpt_cloud.__file__).parents[1])}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: the result cannot be printed (No space left on device)\n")
    piped = " ".join([*call, "|", "true"])
    done = subprocess.run(["bash", "-c", piped], stderr=subprocess.PIPE, text=True, check=True, env=env, timeout=60)
    assert done.stderr == ""


def test_any_command_that_is_interrupted_says_so(root):
    script = INTERRUPTED.replace(
        'faults.hang("put", key="*.safetensors", times=None)', 'faults.hang("get", times=None)'
    )
    script = script.replace('faults.wait_for("put", key="*.safetensors")', 'faults.wait_for("get")')
    env = {**os.environ, "PYTHONPATH": str(Path(ckpt_cloud.__file__).parents[1])}
    for call in (("show", root / "step-10"), ("ls", root, "--json"), ("verify", root / "step-10")):
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, call)],
            capture_output=True,
            text=True,
            check=False,
            env=env,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (130, "interrupted: nothing was changed\n"), done.stderr
        if "--json" in call:
            assert json.loads(done.stdout)["error"]["kind"] == "interrupted"


def test_ls_hides_what_is_gone(root):
    ckpt_cloud.delete(root / "step-10")
    done = command("ls", root)
    assert (done.returncode, done.stderr) == (0, "1 deleted or aborted; --all shows them\n")
    assert "step-10" not in done.stdout
    assert "step-10" in command("ls", root, "--all").stdout
    assert len(json.loads(command("ls", root, "--json").stdout)) == 2
    ckpt_cloud.delete(root / "step-20")
    assert command("ls", root).returncode == 1


def test_ls_takes_no_probes_for_a_checkpoint(root):
    """What a doctor that was killed leaves lies under `data/`, right beside the checkpoints."""
    (root / "data/01a21531c95e76e4a862da8bcf80f971").mkdir(parents=True)
    (root / "data/01a21531c95e76e4a862da8bcf80f971/probe").write_bytes(b"x")
    assert [info.name for info in ckpt_cloud.list_checkpoints(root)] == ["step-10", "step-20"]


def test_ls_of_a_checkpoint_says_what_it_is(root):
    done = command("ls", root / "step-10")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"is a checkpoint itself: ckpt-cloud show {root}/step-10" in done.stderr


class TestCoded:
    """Compressed checkpoints, and those that went through DCP's transforms."""

    @pytest.fixture
    def urls(self, tmp_path):
        state = {"w": torch.zeros(300_000), "v": torch.arange(9000), "item": "0123456789" * 8000}
        changed = {**state, "v": state["v"].clone().fill_(7)}
        transfer = ckpt_cloud.TransferOptions(frame_size=4096)
        zstd = {"compression": "zstd", "transfer": transfer}
        kinds = {
            "plain": (state, {}),
            "zstd": (state, zstd),
            "changed": (changed, zstd),
            "stream": (state, {"extensions": [ZStandard()]}),
        }
        for name, (kept, options) in kinds.items():
            ckpt_cloud.save(kept, storage_writer=ckpt_cloud.ObjectStoreWriter(tmp_path / name, **options))
        return {name: tmp_path / name for name in kinds}

    def test_show(self, urls):
        shown = invoke("show", urls["zstd"], "--objects").stdout
        assert re.search(r"w .*1.2 MB.*zstd: \d", shown)
        told = json.loads(invoke("show", urls["zstd"], "--json").stdout)["tensors"]["w"]
        assert told["codecs"] == ["zstd"]
        assert told["coded_bytes"] < 10_000 < told["bytes"]
        told = json.loads(invoke("show", urls["stream"], "--json").stdout)["tensors"]["w"]
        assert told["codecs"] == ["stream.zstd/1"]
        assert "codecs" not in json.loads(invoke("show", urls["plain"], "--json").stdout)["tensors"]["w"]

    def test_show_as_a_page(self, urls, tmp_path):
        for name in ("zstd", "stream"):
            assert invoke("show", urls[name], "--html", tmp_path / "page.html").exit_code == 0

    def test_diff_compares_what_was_saved(self, urls):
        assert invoke("diff", urls["plain"], urls["zstd"], "--values").exit_code == 0
        changed = invoke("diff", urls["zstd"], urls["changed"], "--values")
        assert changed.exit_code == 1
        assert "~ v: values" in changed.stdout
        assert "~ w" not in changed.stdout
        assert (
            "? w: sharded differently or transformed" in invoke("diff", urls["zstd"], urls["stream"], "--values").stdout
        )

    def test_verify_and_copy(self, urls, tmp_path):
        for name in ("zstd", "stream"):
            assert invoke("verify", urls[name], "--deep").exit_code == 0
            assert invoke("cp", urls[name], tmp_path / f"copy of {name}").exit_code == 0
            assert invoke("verify", tmp_path / f"copy of {name}", "--deep").exit_code == 0
