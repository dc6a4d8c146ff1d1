"""What a recipe decides and a server carries out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Dialect = Literal["s3", "gcs", "azure"]


@dataclass(frozen=True, slots=True)
class Site:
    """What one instance is given: the program, where to keep data, free ports, a secret that only it accepts."""

    program: Path
    directory: Path
    ports: Sequence[int]
    secret: str


@dataclass(frozen=True, slots=True)
class Launch:
    """One start, decided: nothing has run yet."""

    command: tuple[str, ...]
    # The port that clients talk to.
    port: int
    # What follows the port in the endpoint's URL.
    path: str = ""
    # Settings for the server itself, on top of this process's environment.
    server_env: Mapping[str, str] = field(default_factory=dict)
    # Text files to write into the directory first, by name.
    files: Mapping[str, str] = field(default_factory=dict)
    # Folders to make in the directory first.
    folders: tuple[str, ...] = ()
    # What the server leaves outside its directory, to be removed after it.
    strays: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to find, start and stop one kind of server."""

    name: str
    dialect: Dialect
    # The command that installs it.
    install: str
    # Whether a create that must not overwrite is refused when the object exists.
    conditional_writes: bool
    # Whether data survives `restart()`, and so whether a directory may be given.
    keeps_data: bool
    # Ports it listens on.
    port_count: int
    # Seconds between asking it to stop and killing it; 0 kills at once.
    grace_s: float
    # Its program, or None where it is not installed.
    locate: Callable[[], Path | None]
    # Pure: what to run at a site.
    plan: Callable[[Site], Launch]
