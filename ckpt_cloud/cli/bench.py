"""`ckpt-cloud bench`: a quick look at how fast a state is saved and loaded; the one command that needs torch."""

from __future__ import annotations

import os
import time
import warnings
from typing import Any

import torch
from rich.table import Table

from ckpt_cloud import api, bridge
from ckpt_cloud.cli.ending import interruptible
from ckpt_cloud.cli.output import console, print_json
from ckpt_cloud.collector import delete
from ckpt_cloud.errors import CheckpointNotFound, ChecksumMismatch
from ckpt_cloud.events import Report
from ckpt_cloud.format.layout import COMMIT_KEY, mint_id
from ckpt_cloud.options import MIB, StoreOptions
from ckpt_cloud.reader import ObjectStoreReader
from ckpt_cloud.stores import open_store, parse_url
from ckpt_cloud.writer import ObjectStoreWriter


def run(root: str, *, size_mib: int, tensors: int, as_json: bool) -> None:
    """Saves a state of random numbers below `root`, loads it, compares, and deletes it."""
    name = f"ckpt-cloud-bench-{mint_id(time.time_ns() // 1_000_000, os.urandom(10))}"
    url = parse_url(root).child(name).url
    with interruptible("what was saved is deleted"):
        try:
            saved, loaded = _save_and_load(url, size_mib * MIB, tensors, progress=not as_json)
        finally:
            _delete(url)
    if as_json:
        print_json({"url": url, "bytes": size_mib * MIB, "save": saved.as_dict(), "load": loaded.as_dict()})
        return
    table = Table("", "MiB/s", "seconds", "requests", "retries", "amplification", box=None)
    for what, report in (("save", saved), ("load", loaded)):
        rate = report.bytes_needed / MIB / report.blocked_s
        counts = f"{report.requests}", f"{report.retries}", f"{report.amplification:.2f}"
        table.add_row(what, f"{rate:.1f}", f"{report.blocked_s:.2f}", *counts)
    console.print(table)


def _save_and_load(url: str, size: int, tensors: int, *, progress: bool) -> tuple[Report, Report]:
    state = _state(size, tensors)
    other: dict[str, Any] = {key: torch.zeros_like(value) for key, value in state.items()}
    with warnings.catch_warnings():
        # torch says on each call that there is no process group.
        warnings.simplefilter("ignore", UserWarning)
        writer = ObjectStoreWriter(url, progress=progress)
        api.save(dict(state), storage_writer=writer, no_dist=True)
        reader = ObjectStoreReader(url, progress=progress)
        api.load(other, storage_reader=reader, no_dist=True)
    wrong = [key for key, value in state.items() if not torch.equal(value, other[key])]
    if wrong:
        raise ChecksumMismatch(f"{', '.join(wrong[:5])} came back other than saved", url)
    return writer.report, reader.report


def _state(size: int, tensors: int) -> dict[str, torch.Tensor]:
    each = max(1, size // tensors // 4)
    return {f"layer{number}.weight": torch.rand(each) for number in range(tensors)}


def _delete(url: str) -> None:
    try:
        delete(url)
    except CheckpointNotFound:
        return
    # Nobody saves under this name again: no register needs to tell that it was deleted.
    bridge.run(open_store(parse_url(url), StoreOptions()).delete([COMMIT_KEY]))
