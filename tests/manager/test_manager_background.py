"""Saves in the background: one at a time, errors that surface, an end that is clean, SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import ckpt_cloud
from ckpt_cloud.errors import AttemptAborted, InvalidOption, SaveInFlight, StoreUnavailable
from ckpt_cloud.manager.preemption import Preemption

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def data_operations(faults):
    return [op.key for op in faults.operations if op.operation == "put" and op.key.endswith("safetensors")]


def test_the_state_may_change_while_it_is_saved(manage, made, store_faults):
    manager = manage()
    given = made(1)
    store_faults.hang("put", key="*.safetensors")
    assert manager.async_save(1, given, {"loss": 1.0})
    given["model"]["w"].zero_()
    given["n"] = 0
    store_faults.release()
    manager.wait()
    found = made(0)
    assert manager.restore(found) == 1
    assert (float(found["model"]["w"][0]), found["n"]) == (1.0, 1)
    assert manager.best("loss") == 1


def test_another_save_waits(manage, made, store_faults):
    manager = manage()
    store_faults.hang("put", key="*.safetensors")
    manager.async_save(1, made(1))
    store_faults.wait_for("put", key="*.safetensors")
    threading.Timer(0.2, store_faults.release).start()
    assert manager.async_save(2, made(2))
    assert manager.latest() in (1, 2), "the first was committed before the second began"
    manager.wait()
    assert manager.all_steps() == [1, 2]


def test_another_save_is_skipped(manage, made, store_faults):
    manager = manage(when_busy="skip")
    store_faults.hang("put", key="*.safetensors")
    assert manager.async_save(1, made(1))
    store_faults.wait_for("put", key="*.safetensors")
    assert not manager.async_save(2, made(2))
    store_faults.release()
    manager.wait()
    assert manager.async_save(3, made(3))
    manager.wait()
    assert manager.all_steps() == [1, 3]


def test_another_save_is_refused(manage, made, store_faults):
    manager = manage(when_busy="refuse")
    store_faults.hang("put", key="*.safetensors")
    manager.async_save(1, made(1))
    store_faults.wait_for("put", key="*.safetensors")
    with pytest.raises(SaveInFlight, match="step 1"):
        manager.async_save(2, made(2))
    store_faults.release()
    manager.save(3, made(3))
    assert manager.all_steps() == [1, 3]


@pytest.mark.parametrize("call", ["async_save", "save", "wait", "close"])
def test_an_error_in_the_background_surfaces_at_the_next_call(manage, made, store_faults, call):
    manager = manage()
    manager.save(1, made(1))
    store_faults.fail("put", key="*.safetensors")
    manager.async_save(2, made(2))
    with pytest.raises(StoreUnavailable):
        getattr(manager, call)(*([3, made(3)] if call.endswith("save") else []))
    if call != "close":
        manager.save(4, made(4))
        assert manager.all_steps() == [1, 4]


def test_leaving_the_block_waits(manage, made, store_faults, root):
    store_faults.hang("put", key="*.safetensors")
    with manage() as manager:
        manager.async_save(1, made(1))
        threading.Timer(0.2, store_faults.release).start()
    assert ckpt_cloud.latest(root) == f"{root}/step-1"


def test_the_error_of_the_block_is_not_hidden_by_that_of_the_save(manage, made, store_faults):
    store_faults.fail("put", key="*.safetensors")

    def train():
        with manage() as manager:
            manager.async_save(1, made(1))
            _ = 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        train()
    assert any("a fault that the test asked for" in note for note in caught.value.__notes__)


def test_the_figures_of_a_save(manage, made, tmp_path):
    told = []
    manager = manage(on_finished=told.append, trace_dir=tmp_path)
    report = manager.save(1, made(1))
    assert report.blocked_s >= report.seconds > 0
    manager.async_save(2, made(2))
    manager.wait()
    manager.restore(made(0))
    assert [(each.kind, each.step, each.rank) for each in told] == [("save", 1, 0), ("save", 2, 0), ("load", 2, 0)]
    assert all(each.report.bytes_moved > 0 and each.url.endswith(f"step-{each.step}") for each in told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["load-2.json", "save-1.json", "save-2.json"]


def test_a_callback_that_fails_does_not_fail_the_save(manage, made, caplog):
    def fail(finished):
        raise KeyError("no such dashboard")

    manage(on_finished=fail).save(1, made(1))
    assert "no such dashboard" in caplog.text


def test_sigterm_is_noted_and_the_old_handler_comes_back(manage, made):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("theirs"))
    try:
        with manage(sigterm_grace_s=60) as manager:
            assert not manager.should_stop()
            os.kill(os.getpid(), signal.SIGTERM)
            assert manager.should_stop()
            assert seen == ["theirs"], "an earlier handler is called too"
            manager.save(1, made(1))
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["theirs", "theirs"]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert manage(check=False).latest() == 1


@pytest.mark.parametrize("how", ["save", "close", "async_save"])
def test_a_save_that_outlasts_the_grace_period_is_aborted(manage, made, store_faults, root, how):
    manager = manage(sigterm_grace_s=0.5)
    manager.save(1, made(1))
    store_faults.hang("put", key="*.safetensors", times=None)
    try:
        if how == "close":
            manager.async_save(2, made(2))
            store_faults.wait_for("put", key="*.safetensors")
        os.kill(os.getpid(), signal.SIGTERM)
        if how == "async_save":
            manager.async_save(2, made(2))
        end = {"save": lambda: manager.save(2, made(2)), "close": manager.close, "async_save": manager.wait}[how]
        with pytest.raises(AttemptAborted):
            end()
    finally:
        store_faults.release()
    manager.close()
    found = made(0)
    assert manage(check=False).restore(found) == 1
    assert found["n"] == 1


def test_handlers_need_the_main_thread():
    raised = []

    def make():
        try:
            Preemption(1.0, lambda: None)
        except InvalidOption as error:
            raised.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert raised


LOOP = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import ckpt_cloud

def main(root):
    state = {"w": torch.zeros(100_000), "step": 0}
    with ckpt_cloud.CheckpointManager(root, keep=ckpt_cloud.LastN(2), sigterm_grace_s=60) as manager:
        begun = manager.restore(state) or 0
        for step in range(begun + 1, 100_000):
            state["w"] += 1
            state["step"] = step
            manager.async_save(step, state)
            if step == begun + 3:
                print("running", flush=True)
            if manager.should_stop():
                break
    print("ended", step, flush=True)

main(sys.argv[1])
"""


def test_a_job_that_is_preempted_leaves_its_last_step(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(ckpt_cloud.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", LOOP, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=env
    ) as job:
        assert job.stdout.readline() == "running\n"
        job.terminate()
        said, _ = job.communicate(timeout=90)
    assert job.returncode == 0
    last = int(said.split()[1])
    assert ckpt_cloud.latest(tmp_path / "run").endswith(f"/step-{last}")


def test_a_job_that_ends_without_closing_is_reminded_and_leaves_no_half_commit(tmp_path):
    code = """
import sys, torch, warnings
warnings.simplefilter("ignore")
import ckpt_cloud
manager = ckpt_cloud.CheckpointManager(sys.argv[1])
manager.async_save(7, {"w": torch.ones(1_000_000)})
"""
    env = {**os.environ, "PYTHONPATH": str(Path(ckpt_cloud.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=env,
        timeout=90,
        check=False,
    )
    assert "was not closed" in done.stderr
    (info,) = ckpt_cloud.list_checkpoints(tmp_path / "run")
    if info.state == "committed":
        state = {"w": torch.zeros(1_000_000)}
        ckpt_cloud.load(state, checkpoint_id=info.url)
        assert state["w"].eq(1).all()
    else:
        assert info.state == "incomplete"


def test_a_trace_is_of_the_format_that_perfetto_reads(manage, made, tmp_path):
    manage(trace_dir=tmp_path).save(1, made(1))
    trace = json.loads((tmp_path / "save-1.json").read_text())
    names = {row["args"]["name"] for row in trace["traceEvents"] if row["ph"] == "M"}
    assert {"rank 0", "phases", "upload 1"} <= names
    phases = {row["name"] for row in trace["traceEvents"] if row.get("cat") == "phase"}
    assert phases == {"set up", "write", "commit"}
