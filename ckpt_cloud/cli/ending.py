"""How commands end: exit status, errors without tracebacks, interrupts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from ckpt_cloud.cli.output import note, print_json
from ckpt_cloud.errors import ChooseAnother, CkptCloudError, Damaged, FixRequest, TryAgain

DONE, NOTHING, WRONG, AGAIN, DAMAGED, INTERRUPTED = 0, 1, 2, 3, 4, 130
EXIT_STATUS: tuple[tuple[type[CkptCloudError], int], ...] = (
    (ChooseAnother, NOTHING),
    (FixRequest, WRONG),
    (TryAgain, AGAIN),
    (Damaged, DAMAGED),
)


def end_with(error: CkptCloudError) -> NoReturn:
    """Prints the error, as JSON too where that was asked for, and ends the process with its exit status."""
    status = next((status for kind, status in EXIT_STATUS if isinstance(error, kind)), NOTHING)
    note(f"error: {error}")
    if "--json" in sys.argv:
        said = {"kind": error.kind, "message": error.message, "url": error.url, "hint": error.hint}
        print_json({"error": said, "exit_status": status})
    sys.exit(status)


@contextmanager
def interruptible(left: str) -> Iterator[None]:
    """An interrupt ends the command with `left`, which says what it leaves."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"interrupted: {left}")
        raise typer.Exit(INTERRUPTED) from None


def confirm(question: str, *, yes: bool) -> None:
    """Asks, unless `yes`; anything but a yes ends the command, which has done nothing."""
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        agreed = False
    if not agreed:
        note("nothing was done; --yes does not ask")
        raise typer.Exit(NOTHING)
