"""The training job as a whole: torchrun and its ranks, what they tell, and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

JOB_SECONDS_MAX = 600.0
GOODBYE_SECONDS = 10.0


class JobFailed(Exception):
    """The job ended on its own with a status other than 0; its log says why."""


class Job:
    """`torchrun -m demo_gpt.train` on some ranks, in a session of its own. Leave the `with` block and it is gone."""

    def __init__(self, ranks: int, arguments: list[str], log: Path) -> None:
        self.log = log
        # torchrun gives every rank a session of its own, so one process group does not hold the job.
        self._groups: list[int] = []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [*command, "--module", "demo_gpt.train", *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        self._groups.append(self._process.pid)
        self._limit = threading.Timer(JOB_SECONDS_MAX, self.kill)

    def __enter__(self) -> Self:
        self._limit.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._limit.cancel()
        if self._process.poll() is None:
            self._ask_to_end()
        if self._process.returncode != 0:
            self.kill()
        if self._process.stdout:
            self._process.stdout.close()

    def events(self) -> Iterator[dict[str, Any]]:
        """What the ranks tell, as it happens, until all have ended."""
        assert self._process.stdout
        for line in self._process.stdout:
            if not line.startswith('{"kind"'):
                continue
            event = json.loads(line)
            if event["kind"] == "started":
                self._groups.append(event["pid"])
            yield event

    def finish(self) -> None:
        """Wait for the end, which must be a good one."""
        if status := self._process.wait():
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
            raise JobFailed(f"the training job ended with status {status}; the end of {self.log}:\n{last}")

    def kill(self) -> None:
        """SIGKILL to torchrun and to every rank at once, as when a machine is lost. torchrun first: it would mourn."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        self._process.wait()

    def _ask_to_end(self) -> None:
        # SIGTERM reaches, through torchrun, also ranks that have not told their process id yet.
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GOODBYE_SECONDS)
