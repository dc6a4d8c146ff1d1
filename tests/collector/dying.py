"""One rank of a save that may be killed at any moment.

Imported once, by the server that ranks are forked from; so it imports all that a save would, and uses nothing.
"""

import os
import warnings
from datetime import timedelta
from pathlib import Path

import boto3  # noqa: F401
import botocore.credentials  # noqa: F401
import obstore.store  # noqa: F401
import torch
import torch.distributed as dist
import torch.distributed.checkpoint

import ckpt_cloud
import ckpt_cloud.api
import ckpt_cloud.stores.s3

WORLD = 4
ELEMENTS = 1_500_000
"""Of each rank; in 4 bytes, an upload of two parts."""


def state(value, ranks):
    """Of one rank, or of all."""
    own = {f"rank-{rank}": torch.full((ELEMENTS,), float(value)) for rank in ranks}
    return {**own, "shared": torch.full((1000,), float(value)), "step": value}


def run(environment, rank, meeting, url, value, overwrite, ready):
    """Saves, and leaves how it ended in a file; a rank that is killed leaves none."""
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    where = Path(meeting)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=25)
    )
    writer = ckpt_cloud.ObjectStoreWriter(
        url,
        overwrite=overwrite,
        transfer=ckpt_cloud.TransferOptions(part_size=5 << 20, pack_size=5 << 20, memory_budget=64 << 20),
        commit=ckpt_cloud.CommitOptions(deadline_s=10),
        retry=ckpt_cloud.RetryOptions(deadline_s=15, first_contact_s=5, max_backoff_s=0.5),
    )
    mine = state(value, [rank])
    dist.barrier()
    ready.wait()
    try:
        ckpt_cloud.save(mine, storage_writer=writer)
    except ckpt_cloud.CkptCloudError as error:
        outcome = type(error).__name__
    except BaseException as error:  # noqa: BLE001 - told to the test
        outcome = f"untyped {type(error).__name__}: {error}"
    else:
        outcome = "saved"
    (where / f"{rank}.tmp").write_text(outcome)
    (where / f"{rank}.tmp").rename(where / f"{rank}.txt")
    os._exit(0)
