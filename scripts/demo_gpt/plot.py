"""The two loss curves as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

GREY, BLUE, ORANGE, RED = "#b8bec8", "#2563c9", "#e07b1a", "#c62838"


@dataclass(frozen=True, slots=True)
class Curves:
    """Losses by step, and where the story turns."""

    reference: dict[int, float]
    killed: dict[int, float]
    resumed: dict[int, float]
    committed: list[int]
    killed_at: int
    resumed_from: int
    ranks: tuple[int, int]
    tolerance: float


def draw(curves: Curves, path: Path) -> None:
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 6.2), sharex=True, height_ratios=(3.2, 1), layout="constrained"
    )
    _losses(top, curves)
    _differences(bottom, curves)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eceef2")
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _losses(axes: Axes, curves: Curves) -> None:
    before, after = curves.ranks
    axes.plot(*_xy(curves.reference), color=GREY, lw=6, solid_capstyle="round", label=f"never stopped, {before} ranks")
    axes.plot(*_xy(curves.killed), color=BLUE, lw=3.5, label=f"until SIGKILL, {before} ranks")
    axes.plot(*_xy(curves.resumed), color=ORANGE, lw=1.6, label=f"resumed, {after} ranks")
    low, high = min(curves.reference.values()), max(curves.reference.values())
    axes.set_ylim(low - 0.12 * (high - low), high + 0.06 * (high - low))
    floor = axes.get_ylim()[0]
    axes.plot(
        curves.committed, [floor] * len(curves.committed), "^", color="#3f7d4e", ms=8, clip_on=False, label="committed"
    )
    axes.axvline(curves.killed_at, color=RED, lw=1, ls="--")
    axes.axvline(curves.resumed_from, color=ORANGE, lw=1, ls="--")
    _note(axes, curves.killed_at, f"  killed while saving step {curves.killed_at}", RED, "left")
    _note(axes, curves.resumed_from, f"resumed from step {curves.resumed_from}  ", ORANGE, "right")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title("Killed in the middle of a save, resumed on other ranks: the same curve", loc="left", weight="bold")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.86))


def _note(axes: Axes, step: int, text: str, colour: str, side: str) -> None:
    axes.text(step, 0.93, text, color=colour, ha=side, transform=axes.get_xaxis_transform())


def _differences(axes: Axes, curves: Curves) -> None:
    for losses, colour in ((curves.killed, BLUE), (curves.resumed, ORANGE)):
        apart = {step: max(abs(loss - curves.reference[step]), 1e-9) for step, loss in losses.items()}
        axes.semilogy(*_xy(apart), ".", color=colour, ms=5)
    axes.axhline(curves.tolerance, color=RED, lw=1)
    axes.text(1, curves.tolerance, "allowed", color=RED, ha="right", va="bottom", transform=axes.get_yaxis_transform())
    axes.set_ylim(5e-10, curves.tolerance * 8)
    axes.set_yticks([1e-9, 1e-7, 1e-5, 1e-3], ["0", "$10^{-7}$", "$10^{-5}$", "$10^{-3}$"])
    axes.set_ylabel("difference")
    axes.set_xlabel("step")
    axes.set_xticks([0, *curves.committed])


def _xy(losses: dict[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]
