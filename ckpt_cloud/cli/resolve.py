"""`ckpt-cloud resolve`."""

from __future__ import annotations

from ckpt_cloud.cli.ending import interruptible
from ckpt_cloud.cli.output import console, print_json
from ckpt_cloud.collector import resolve


def run(url: str, *, as_json: bool) -> None:
    """Settles what became of a save, and prints what is there."""
    with interruptible("nothing is settled; run it again"):
        info = resolve(url)
    if as_json:
        print_json(info)
    else:
        console.print(f"{info.state} {info.attempt}")
