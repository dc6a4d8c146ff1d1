"""Speeds as a picture: one panel for each case, one bar for each backend, the bare transport as a line."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench_dcp.backends import OURS
from bench_dcp.runs import LIMIT, Runs, speed

GREY, BLUE, ORANGE = "#b8bec8", "#2563c9", "#e07b1a"
_PANELS = {
    "save": "Save, into a sink",
    "load": "Load, from SeaweedFS",
    "cloud save": "Save, 30 ms and 90 MB/s per connection",
    "cloud load": "Load, 30 ms and 90 MB/s per connection",
    "small save": "Save 20,000 small tensors",
    "small load": "Load 20,000 small tensors",
}


def draw(runs: Runs, path: Path) -> bool:
    """Draws what was measured; False, and no file, if none of it is a matter of speed."""
    panels = [case for case in _PANELS if runs.of(case, OURS)]
    if not panels:
        return False
    rows = (len(panels) + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(11, 2.4 * rows), layout="constrained", squeeze=False)
    for axes, case in zip(grid.flat, panels, strict=False):
        _panel(axes, runs, case)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _panel(axes: Axes, runs: Runs, case: str) -> None:
    in_seconds = case.startswith("small")
    clients = [who for who in runs.cases()[case] if not who.startswith(LIMIT)][::-1]
    values = [runs.median(case, who, lambda f: f["wall_s"] if in_seconds else speed(f)) or 0.0 for who in clients]
    bars = axes.barh(clients, values, color=[BLUE if who == OURS else GREY for who in clients], height=0.62)
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=9)
    limit = runs.limit(case)
    if limit is not None:
        fastest = runs.median(case, limit, speed) or 0.0
        axes.axvline(fastest, color=ORANGE, lw=1.5, ls="--")
        # Beside the slowest bar, the last, is room.
        axes.text(fastest, 0, f"bare {limit}  ", color=ORANGE, fontsize=8, ha="right", va="center")
        values.append(fastest)
    axes.set_xlim(0, 1.14 * max(values))
    axes.set_title(f"{_PANELS[case]}, {'seconds' if in_seconds else 'GiB/s'}", loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
