"""One server being run: its plan carried out, its process, and what is cleaned up after it."""

from __future__ import annotations

import atexit
import os
import time
from contextlib import suppress
from pathlib import Path

from localstack.child import Child
from localstack.dialects import Client, client
from localstack.errors import StartFailed
from localstack.ports import HOST, accepts, any_taken
from localstack.recipe import Launch, Recipe, Site
from localstack.workspace import Workspace

_POLL_S = 0.05
_LOG_TAIL_LINES = 25

_CLOUD_VARIABLES = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_")


class Instance:
    """A planned server that can be brought up and down any number of times, then closed."""

    def __init__(self, recipe: Recipe, site: Site, workspace: Workspace) -> None:
        self.recipe, self._workspace = recipe, workspace
        self.launch: Launch = recipe.plan(site)
        self.endpoint_url = f"http://{HOST}:{self.launch.port}{self.launch.path}"
        self.log_path: Path = site.directory / "server.log"
        self.client: Client = client(recipe.dialect, self.endpoint_url, site.secret)
        self._ports, self._owner_pid = tuple(site.ports), os.getpid()
        # The one thing that changes: a new one with each `up`.
        self.child: Child | None = None

    def up(self, deadline_s: float) -> None:
        """Starts it and returns when it answers.

        Raises:
            StartFailed: a port is taken, it exited, or did not answer within `deadline_s` seconds; it does not run.
        """
        if any_taken(self._ports):
            raise StartFailed(f"{self.recipe.name} cannot start: somebody else listens on one of its ports")
        self._lay_out()
        self.child = Child(
            self.launch.command,
            cwd=self._workspace.path,
            env={**_own_environment(), **self.launch.server_env},
            log=self.log_path,
        )
        try:
            self._await_ready(self.child, deadline_s)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Kills the process, if it runs."""
        self._end(grace_s=0)

    def down(self) -> None:
        """Ends the process, if it runs, the way that keeps its data."""
        self._end(grace_s=self.recipe.grace_s)

    def close(self) -> None:
        """Ends the process and removes its directory, unless that is the user's."""
        # Nobody will miss what it has not written yet in a directory that goes with it.
        self.kill() if self._workspace.temporary else self.down()
        self._workspace.remove()
        atexit.unregister(self._close_at_exit)

    def close_at_exit(self) -> None:
        """Sees to it that `close` is called at the end of this process at the latest."""
        atexit.register(self._close_at_exit)

    def _close_at_exit(self) -> None:
        # A forked child inherits this hook, but not the server.
        if os.getpid() == self._owner_pid:
            self.close()

    def _end(self, *, grace_s: float) -> None:
        if self.child is not None:
            self.child.stop(grace_s=grace_s)
        for stray in self.launch.strays:
            with suppress(OSError):
                stray.unlink()

    def _lay_out(self) -> None:
        for folder in self.launch.folders:
            (self._workspace.path / folder).mkdir(exist_ok=True)
        for name, text in self.launch.files.items():
            (self._workspace.path / name).write_text(text)

    def _await_ready(self, child: Child, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        refusal: Exception | None = None
        while time.monotonic() < deadline:
            if child.exited.wait(_POLL_S):
                raise self._failed(f"exited with status {child.exit_status}", refusal)
            if accepts(self.launch.port):
                refusal = self._refusal()
                if refusal is None:
                    return
        raise self._failed(f"did not answer within {deadline_s:g} s", refusal)

    def _refusal(self) -> Exception | None:
        try:
            self.client.check()
        except Exception as error:  # noqa: BLE001 - whatever a server that is not up yet brings about
            return error
        return None

    def _failed(self, how: str, refusal: Exception | None) -> StartFailed:
        failed = StartFailed(f"{self.recipe.name} {how}; if it is out of date: {self.recipe.install}")
        failed.__cause__ = refusal
        failed.add_note(f"The end of its log:\n{self._log_tail()}")
        return failed

    def _log_tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])


def _own_environment() -> dict[str, str]:
    """This process's environment without anybody's cloud: a server takes AWS_* keys in it for further users."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_CLOUD_VARIABLES)}
