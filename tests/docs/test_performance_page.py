"""The defaults that the page on performance names are those of the options, and its advice works."""

import re

import pytest
import torch
from doc_pages import ROOT, python_of

import ckpt_cloud
from ckpt_cloud import TransferOptions

PAGE = ROOT / "docs" / "performance.md"
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def test_settings_are_shown_with_their_defaults():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) ?(\w*) \|", PAGE.read_text(), re.MULTILINE)
    shown = {name: int(number) * UNITS[unit] for name, number, unit in rows}
    assert {"part_size", "max_requests", "memory_budget", "range_size", "gap_size"} < set(shown)
    defaults = TransferOptions()
    assert shown == {name: getattr(defaults, name) for name in shown}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_stager_that_keeps_its_memory(tmp_path):
    state = {"weight": torch.zeros(1000)}
    scope = {"ckpt_cloud": ckpt_cloud, "state": state, "url": f"{tmp_path}/first"}
    advice, closing = python_of("performance.md").split("keeps_memory.close()")
    exec(advice, scope)
    state["weight"] += 1
    again = ckpt_cloud.async_save(state, checkpoint_id=f"{tmp_path}/second", async_stager=scope["keeps_memory"])
    again.result()
    scope["keeps_memory"].close()
    assert closing.strip().startswith("#")
    for name, value in (("first", 0), ("second", 1)):
        loaded = {"weight": torch.full((1000,), -1.0)}
        ckpt_cloud.load(loaded, checkpoint_id=f"{tmp_path}/{name}")
        assert loaded["weight"].eq(value).all()
