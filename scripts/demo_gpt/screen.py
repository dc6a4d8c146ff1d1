"""What the demo shows while it runs: lines that stay, and below them, on a terminal, one line that moves."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from demo_gpt.record import Record, Save

BAR_WIDTH = 10


class Screen:
    """Prints on standard output; without a terminal the moving line is printed now and then instead."""

    def __init__(self, plain_every: int) -> None:
        self.console = Console(highlight=False)
        self._plain_every = plain_every
        self._live = Live(console=self.console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def chapter(self, title: str) -> None:
        self._live.update(Text(), refresh=True)
        self.console.print(f"\n[bold]{title}[/]")

    def say(self, text: str) -> None:
        self.console.print(f"  {text}")

    def follow(self, event: dict[str, Any], record: Record, steps: int) -> None:
        """Show an event that `record` has just heard."""
        if event["kind"] == "step":
            line = f"step {event['step']:>3}/{steps}  loss {event['loss']:.3f}"
            if self.console.is_terminal:
                self._live.update(_bar(event["step"], steps).append(f"  {line}  {_last_save(record)}"))
            elif event["step"] % self._plain_every == 0:
                self.say(line)
        if event["kind"] == "saved" and record.saves[event["step"]].committed:
            self.say(f"[green]✓[/] step {event['step']:>3} committed: {_figures(record.saves[event['step']])}")

    def close(self, rows: list[tuple[str, str]], verdict: list[tuple[str, bool]]) -> None:
        """The closing table, and what it proves."""
        self._live.update(Text())
        self._live.stop()
        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_column(style="bold")
        for row in rows:
            table.add_row(*row)
        self.console.print()
        self.console.print(table)
        self.console.print()
        for claim, holds in verdict:
            self.say(f"[green]✓[/] {claim}" if holds else f"[red bold]✗ NOT TRUE: {claim}[/]")


def _bar(step: int, steps: int) -> Text:
    done = BAR_WIDTH * step // steps
    return (
        Text("  ", no_wrap=True, overflow="ellipsis")
        .append("━" * done, "cyan")
        .append("━" * (BAR_WIDTH - done), "bright_black")
    )


def _last_save(record: Record) -> str:
    if not record.saves:
        return ""
    save = record.saves[max(record.saves)]
    moved = f"{save.size_bytes / 1e6:.1f} MB {save.gib_per_s:.2f} GiB/s" if save.committed else "uploading"
    waited = "" if save.blocked_s is None else f" blocked {save.blocked_s:.2f} s"
    return f"save {save.step} {moved}{waited}"


def _figures(save: Save) -> str:
    waited = "" if save.blocked_s is None else f", training blocked {save.blocked_s:.2f} s"
    return f"{save.size_bytes / 1e6:.1f} MB in {save.seconds:.2f} s ({save.gib_per_s:.2f} GiB/s){waited}"
