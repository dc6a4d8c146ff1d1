"""The defaults that the page on performance names are those of the options."""

import re
from pathlib import Path

from ckpt_cloud import TransferOptions

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def test_settings_are_shown_with_their_defaults():
    rows = re.findall(r"^\| `(\w+)` \| (\d+) ?(\w*) \|", PAGE.read_text(), re.MULTILINE)
    shown = {name: int(number) * UNITS[unit] for name, number, unit in rows}
    assert {"part_size", "max_requests", "memory_budget", "range_size", "gap_size"} < set(shown)
    defaults = TransferOptions()
    assert shown == {name: getattr(defaults, name) for name in shown}
