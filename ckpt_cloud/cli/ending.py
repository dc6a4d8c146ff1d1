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
    _tell_programs(error.kind, error.message, status, url=error.url, hint=error.hint)
    sys.exit(status)


def end_unwritten(error: OSError) -> NoReturn:
    """Standard output takes no more, for want of space or of a reader; the command itself may have done its work."""
    # What is buffered cannot be written either: nothing may try again at exit.
    sys.stdout = None
    if isinstance(error, BrokenPipeError):
        sys.exit(NOTHING)
    note(f"error: the result cannot be printed ({error.strerror})")
    sys.exit(WRONG)


def interrupted(left: str) -> NoReturn:
    """Says what an interrupt leaves, and ends the command."""
    note(f"interrupted: {left}")
    _tell_programs("interrupted", left, INTERRUPTED)
    raise typer.Exit(INTERRUPTED) from None


@contextmanager
def interruptible(left: str) -> Iterator[None]:
    """An interrupt ends the command with `left`, which says what it leaves."""
    try:
        yield
    except KeyboardInterrupt:
        interrupted(left)


def confirm(question: str, *, yes: bool) -> None:
    """Asks, unless `yes`; anything but a yes ends the command, which has done nothing."""
    if yes:
        return
    try:
        agreed = typer.confirm(question, err=True)
    except typer.Abort:
        note("")
        agreed = False
    if not agreed:
        note("nothing was done; --yes does not ask")
        _tell_programs("not-confirmed", "nothing was done", NOTHING, hint="--yes does not ask")
        raise typer.Exit(NOTHING)


def _tell_programs(kind: str, message: str, status: int, *, url: str = "", hint: str = "") -> None:
    if "--json" in sys.argv:
        said = {"kind": kind, "message": message, "url": url, "hint": hint}
        print_json({"error": said, "exit_status": status})
