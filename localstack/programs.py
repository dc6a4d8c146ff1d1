"""Where the servers' programs are."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def find(name: str, *, beside: tuple[Path, ...] = ()) -> Path | None:
    """The executable `name`: on PATH, next to this Python (an environment that is not activated), or in `beside`."""
    folders = (None, str(Path(sys.executable).parent), *map(str, beside))
    for folder in folders:
        found = shutil.which(name, path=folder)
        if found:
            return Path(found).absolute()
    return None
