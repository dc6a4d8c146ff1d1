"""Encryption keys for commands: from a file, or from the environment, and never from the command line itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ckpt_cloud.encryption import Keyring

VARIABLE = "CKPT_CLOUD_ENCRYPTION_KEY"
"""32 bytes as hexadecimal digits or Base64."""


def given(path: Path | None) -> Keyring:
    """The key in a file, else that in the environment, if there is one."""
    return Keyring(path or os.environ.get(VARIABLE) or None)


def demanded(trusted_keys: list[str] | None, *, encryption: bool) -> dict[str, Any]:
    """Arguments for what reads a checkpoint."""
    return {"trusted_keys": trusted_keys or None, "require_encryption": encryption or None}


@dataclass(frozen=True, slots=True)
class Given:
    """Of a command that reads one checkpoint and writes another; a key in the environment opens, and encrypts nothing.

    Attributes:
        source: opens what is read.
        target: encrypts what is written; None to leave that to what is read.
        decrypt: write in clear what was encrypted.
        demands: arguments that say what the checkpoint that is read must be.
    """

    source: Keyring
    target: Keyring | None
    decrypt: bool
    demands: dict[str, Any]

    @classmethod
    def of(
        cls,
        source: Path | None,
        target: Path | None,
        target_id: str | None,
        demands: dict[str, Any],
        *,
        decrypt: bool,
    ) -> Self:
        """As the options say."""
        written = None if target is None and target_id is None else Keyring(target, target_id)
        return cls(given(source or target), written, decrypt, demands)
