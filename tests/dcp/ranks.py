"""Runs a function on real ranks: processes of their own, joined by gloo over a file."""

import os
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(world, case, tmp_path, *args):
    """Calls `case(*args)` on `world` ranks and returns what each gave back, in order.

    An exception of a rank that `case` does not catch fails the test, with that rank's traceback.
    """
    meeting = Path(tmp_path) / f"meeting-{os.urandom(4).hex()}"
    meeting.mkdir()
    # Spawned, not forked: a process group and event loops do not survive a fork.
    mp.start_processes(_rank, (world, case, str(meeting), args), nprocs=world, start_method="spawn")
    results = []
    for rank in range(world):
        outcome = torch.load(meeting / f"{rank}.pt", weights_only=False)
        assert not isinstance(outcome, str), f"rank {rank}:\n{outcome}"
        results.append(outcome[0])
    return results


def _rank(rank, world, case, meeting, args):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=world)
    try:
        outcome = (case(*args),)
    except BaseException:  # noqa: BLE001 - told to the test
        outcome = traceback.format_exc()
    torch.save(outcome, f"{meeting}/{rank}.pt")
    if not isinstance(outcome, str):
        dist.barrier()
        dist.destroy_process_group()
    # gloo's threads may abort a rank that exits while its peers still close their sockets.
    os._exit(0)
