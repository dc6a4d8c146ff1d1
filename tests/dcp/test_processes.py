"""Processes that end, fork or are interrupted around a save."""

import subprocess
import sys
import textwrap

import pytest

import ckpt_cloud

SETUP = """
import warnings; warnings.simplefilter("ignore")
import os, signal, sys, threading
import torch, ckpt_cloud
state = {f"t{i}": torch.ones(1500, 1500).t() for i in range(12)}
url = sys.argv[1]
"""


def run(code, url):
    script = SETUP + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, timeout=100, check=False)


def test_a_process_that_ends_first_waits_for_its_async_save(file_url):
    done = run("ckpt_cloud.async_save(state, checkpoint_id=url); print('main ends')", file_url)
    assert (done.returncode, done.stdout) == (0, "main ends\n"), done.stderr
    assert ckpt_cloud.latest(file_url.rpartition("/")[0]) == file_url


def test_a_child_forked_after_use_is_told(file_url):
    done = run(
        """
        ckpt_cloud.save(state, checkpoint_id=url)
        child = os.fork()
        if child == 0:
            try:
                ckpt_cloud.load(state, checkpoint_id=url)
            except ckpt_cloud.CkptCloudError as error:
                print(error, flush=True)
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        file_url,
    )
    assert "forked" in done.stdout, done.stderr
    assert "spawn" in done.stdout
    assert done.stdout.endswith("7\n")


def test_a_child_forked_before_use_works(file_url):
    done = run(
        """
        child = os.fork()
        if child == 0:
            ckpt_cloud.save(state, checkpoint_id=url)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ckpt_cloud.load(state, checkpoint_id=url)
        """,
        file_url,
    )
    assert done.returncode == 0, done.stderr


def test_an_interrupt_in_a_save_is_an_interrupt(file_url):
    """Sent by the first part that is staged, so in the middle of it."""
    done = run(
        """
        def interrupt(event):
            if isinstance(event, ckpt_cloud.BytesMoved):
                os.kill(os.getpid(), signal.SIGINT)

        try:
            ckpt_cloud.save(state, storage_writer=ckpt_cloud.ObjectStoreWriter(url, on_event=interrupt))
        except KeyboardInterrupt:
            print("interrupted")
        """,
        file_url,
    )
    assert done.stdout == "interrupted\n", done.stderr
    with pytest.raises(ckpt_cloud.errors.CheckpointNotFound):
        ckpt_cloud.load({}, checkpoint_id=file_url)


@pytest.mark.parametrize(
    "to", ["ckpt-cloud", *(pytest.param(other, marks=pytest.mark.slow) for other in ("dcp", "safetensors", "torch"))]
)
def test_an_interrupt_in_a_conversion_leaves_nothing(tmp_path, to):
    """Sent when a later window is read, while the one before it is being written."""
    done = run(
        """
        from pathlib import Path

        from ckpt_cloud.interop import objects, own_format
        from ckpt_cloud.interop.pull import Puller

        objects.WINDOW_BYTES = own_format.BATCH_BYTES = 8 << 20
        own_format.chunks.__defaults__ = (8 << 20,)
        ckpt_cloud.save({str(n): torch.ones(3 << 20) for n in range(8)}, checkpoint_id=f"{url}/ours")
        reads, pull = [], Puller.pull

        def interrupt(self, pulls):
            reads.append(pulls)
            if len(reads) == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return pull(self, pulls)

        Puller.pull = interrupt
        try:
            ckpt_cloud.convert(f"{url}/ours", f"{url}/out", to=TO)
        except KeyboardInterrupt:
            print("interrupted")
        root = Path(url.removeprefix("file://"))
        print([str(path) for path in root.rglob("*") if path.is_file() and "/out" in str(path)])
        """.replace("TO)", f"{to!r})"),
        f"file://{tmp_path}/root",
    )
    assert done.stdout == "interrupted\n[]\n", done.stderr
