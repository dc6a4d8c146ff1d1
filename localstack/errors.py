"""Why a local server is not there.

LocalServerError
├── UnknownServer    no server of that name (also a ValueError)
├── NotInstalled     its program was not found; the message says how to get it (also a FileNotFoundError)
├── StartFailed      it was started and did not come up; the log's tail is in the notes
└── BucketRefused    it did not create a bucket; the message has its words
"""

from __future__ import annotations


class LocalServerError(Exception):
    """Root of what `localstack` raises."""


class UnknownServer(LocalServerError, ValueError):
    """No recipe has this name."""


class NotInstalled(LocalServerError, FileNotFoundError):
    """The server's program was not found on this machine."""


class StartFailed(LocalServerError):
    """The server exited, or did not answer before the deadline; it is gone again when this is raised."""


class BucketRefused(LocalServerError):
    """The server did not create a bucket, such as one whose name it does not accept."""
