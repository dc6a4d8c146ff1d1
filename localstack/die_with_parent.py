"""Turns itself into another program that the kernel kills when the process that started it dies.

Run by path, with the parent's pid and then the command: `python -I -S die_with_parent.py 1234 weed server ...`.
A program of its own and not a `preexec_fn`, which is not safe in a process with threads. Only Linux has the signal;
elsewhere the command runs without it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != int(parent):  # it died before the line above
        sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
