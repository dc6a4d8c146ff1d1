"""One server process: started in a session of its own, stopped by its pid, never outliving its parent."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

_GUARD = Path(__file__).with_name("die_with_parent.py")


class Child:
    """A running command; `exited` is set once it is gone and reaped."""

    def __init__(self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: Path) -> None:
        self._command = [sys.executable, "-I", "-S", str(_GUARD), str(os.getpid()), *command]
        self._cwd, self._env, self._log = cwd, dict(env), log
        self.exited = threading.Event()
        started: queue.SimpleQueue[subprocess.Popen[bytes] | OSError] = queue.SimpleQueue()
        # Linux sends the parent's death signal when the *thread* that started the child ends, so the thread that
        # starts it stays with it until it exits.
        threading.Thread(target=self._attend, args=(started,), name="localstack-child", daemon=True).start()
        outcome = started.get()
        if isinstance(outcome, OSError):
            raise outcome
        self._process = outcome

    @property
    def pid(self) -> int:
        """Process id, and the id of its process group."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """As `subprocess` gives it: negative for a signal, None while it runs."""
        return self._process.returncode

    def stop(self, *, grace_s: float) -> None:
        """Ends it and returns when it is gone: asks first, kills after `grace_s` seconds; 0 kills at once."""
        if grace_s > 0:
            self._signal(signal.SIGTERM)
            if self.exited.wait(grace_s):
                return
        self._signal(signal.SIGKILL)
        self.exited.wait()

    def _attend(self, started: queue.SimpleQueue[subprocess.Popen[bytes] | OSError]) -> None:
        try:
            process = self._spawn()
        except OSError as error:
            started.put(error)
            return
        started.put(process)
        process.wait()
        self.exited.set()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                cwd=self._cwd,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _signal(self, number: signal.Signals) -> None:
        if self.exited.is_set():
            return
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass  # it went by itself just now
