"""`ckpt-cloud verify`."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from rich.filesize import decimal

from ckpt_cloud.cli.output import console
from ckpt_cloud.encryption import Keyring
from ckpt_cloud.verification import Fault, Verification
from ckpt_cloud.verification import verify as check

_DAMAGED = 4
"""Exit status of `cli.app.EXIT_STATUS` for damaged data."""
_SHOWN = 50


def run(url: str, keys: Keyring, demands: dict[str, Any], *, deep: bool, as_json: bool) -> None:
    """Prints what is wrong with the checkpoint at `url`, and ends with a status that says whether anything is."""
    found = check(url, deep=deep, encryption_key=keys, **demands)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode({"ok": found.ok, **msgspec.to_builtins(found)})).decode())
    else:
        _print(found)
    if not found.ok:
        sys.exit(_DAMAGED)


def _print(found: Verification) -> None:
    for fault in found.faults[:_SHOWN]:
        console.print(f"{fault.key}: {_where(fault)}{fault.message}")
    if len(found.faults) > _SHOWN:
        console.print(f"... and {len(found.faults) - _SHOWN} more")
    if found.rewritten:
        console.print(f"{len(found.rewritten)} object(s) were copied or written again since the save")
    how = f"{decimal(found.bytes_read)} read and checked" if found.deep else "sizes only; --deep reads every byte"
    if not found.deep and found.checked_by_store:
        how = f"the store's own checksums of {found.checked_by_store} fit; --deep reads every byte"
    verdict = "whole" if found.ok else f"{len(found.faults)} fault(s)"
    console.print(f"{verdict}: {found.objects} object(s), {decimal(found.size_bytes)}, {how}")


def _where(fault: Fault) -> str:
    return f"bytes {fault.start} to {fault.end}: " if fault.end else ""
