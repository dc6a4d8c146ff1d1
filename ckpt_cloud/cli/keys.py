"""Encryption keys for commands: from a file, or from the environment, and never from the command line itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ckpt_cloud.encryption import Keyring

VARIABLE = "CKPT_CLOUD_ENCRYPTION_KEY"
"""32 bytes as hexadecimal digits or Base64."""


def given(path: Path | None) -> Keyring:
    """The key in a file, else that in the environment, if there is one."""
    return Keyring(path or os.environ.get(VARIABLE) or None)


@dataclass(frozen=True, slots=True)
class Given:
    """Of a command that reads one checkpoint and writes another; a key in the environment opens, and encrypts nothing.

    Attributes:
        source: opens what is read.
        target: encrypts what is written; None to leave that to what is read.
        decrypt: write in clear what was encrypted.
    """

    source: Keyring
    target: Keyring | None
    decrypt: bool

    @classmethod
    def of(cls, source: Path | None, target: Path | None, target_id: str | None, *, decrypt: bool) -> Self:
        """As the options say."""
        written = None if target is None and target_id is None else Keyring(target, target_id)
        return cls(given(source or target), written, decrypt)
