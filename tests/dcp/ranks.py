"""Runs functions on real ranks: processes of their own, joined by gloo over a file.

Ranks are kept for the next function, since importing torch takes each of them seconds.
"""

import gc
import io
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner import SavePlanner

DEADLINE_S = 100
KEPT = 4
"""More ranks than this are not kept."""

_pools = {}


def run(world, case, tmp_path, *args):
    """Calls `case(*args)` on `world` ranks and returns what each gave back, in order.

    An exception of a rank that `case` does not catch fails the test, with that rank's traceback.
    """
    if world not in _pools:
        _pools[world] = _Pool(world)
    pool = _pools[world]
    try:
        results = pool.run(case, args)
    except BaseException:
        del _pools[world]
        pool.kill()
        raise
    if world > KEPT:
        del _pools[world]
        pool.close()
    return results


def close():
    """Ends all ranks that were kept."""
    while _pools:
        _pools.popitem()[1].close()


class _Pool:
    def __init__(self, world):
        # Spawned, not forked: a process group and event loops do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.meeting = tempfile.mkdtemp(prefix="ckpt-ranks-")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            # No daemon: the ranks start processes of their own.
            process = context.Process(target=_rank, args=(rank, world, self.meeting, theirs), daemon=False)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, case, args):
        for pipe in self.pipes:
            pipe.send((case, args, dict(os.environ)))
        results = [None] * len(self.pipes)
        waiting = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        deadline = time.monotonic() + DEADLINE_S
        while waiting:
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(waiting.values())} did not answer within {DEADLINE_S} s"
            for pipe in ready:
                rank = waiting.pop(pipe)
                results[rank] = self._answer(rank, pipe)
        return results

    def _answer(self, rank, pipe):
        try:
            outcome = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
        except EOFError:
            raise AssertionError(f"rank {rank} died with {self.processes[rank].exitcode}") from None
        assert not isinstance(outcome, str), f"rank {rank}:\n{outcome}"
        return outcome[0]

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(20)
        self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()
        shutil.rmtree(self.meeting, ignore_errors=True)


def _rank(rank, world, meeting, pipe):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=world)
    while True:
        try:
            case, args, environment = pipe.recv()
        except EOFError:
            # gloo's threads may abort a rank that exits while its peers still close their sockets.
            os._exit(0)
        os.environ.clear()
        os.environ.update(environment)
        try:
            outcome = (case(*args),)
            _forget()
            dist.barrier()
        except BaseException:  # noqa: BLE001 - told to the test
            outcome = traceback.format_exc()
        data = io.BytesIO()
        torch.save(outcome, data)
        pipe.send_bytes(data.getbuffer())


def _forget():
    """What DCP keeps in this process from one call to the next."""
    for name in vars(SavePlanner):
        if name.startswith("_cached"):
            getattr(SavePlanner, name).clear()
    executor = sys.modules.get("torch.distributed.checkpoint._async_process_executor")
    if executor is not None:
        executor._CHECKPOINT_PROCESS = None
        # A failure's traceback may still hold it.
        gc.collect()
