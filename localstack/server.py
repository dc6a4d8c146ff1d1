"""`start` and the handle that it returns."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from localstack.errors import BucketRefused, NotInstalled, StartFailed, UnknownServer
from localstack.instance import Instance
from localstack.ports import any_taken, free_ports
from localstack.proxies import past_proxies
from localstack.recipe import Dialect, Recipe, Site
from localstack.recipes import RECIPES
from localstack.workspace import Workspace, kept, temporary

# Another process may take a port between its choice and its use.
_ATTEMPTS = 3
DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A started server; as a context manager it stops at the end of the block."""

    name: str
    dialect: Dialect
    # Scheme, host and port; for Azure with the account as path.
    endpoint_url: str
    # Set these and boto3, s3fs, gcsfs, adlfs and ckpt_cloud talk to this server.
    env: Mapping[str, str] = field(repr=False)
    # Holds its data and its log; removed by `stop` unless it was given to `start`.
    directory: Path
    log_path: Path = field(repr=False)
    # Whether a create that must not overwrite is refused when the object exists.
    conditional_writes: bool
    _instance: Instance = field(repr=False)

    @property
    def pid(self) -> int:
        """The server's process id, also its process group; the last one while it does not run."""
        assert self._instance.child is not None
        return self._instance.child.pid

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        assert self._instance.child is not None
        return not self._instance.child.exited.is_set()

    def create_bucket(self, bucket: str) -> None:
        """Creates a bucket (Azure: a container) unless it exists.

        Raises:
            BucketRefused: the server did not, for whatever reason.
        """
        try:
            self._instance.client.create_bucket(bucket)
        except Exception as error:
            raise BucketRefused(f"{self.name} does not create the bucket {bucket!r}: {error}") from error

    def kill(self) -> None:
        """Kills it with SIGKILL and returns when it is gone; data, ports and `env` stay for `restart`."""
        self._instance.kill()

    def restart(self, *, deadline_s: float = DEADLINE_S) -> None:
        """Brings it up again, killed or running, with the same data, ports and `env`; moto starts empty.

        Raises:
            StartFailed: it did not answer within `deadline_s` seconds, or a port was taken meanwhile.
        """
        self._instance.down()
        self._instance.up(deadline_s)

    def stop(self) -> None:
        """Ends it and removes its temporary directory; does nothing the second time."""
        self._instance.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def start(name: str, *, directory: str | os.PathLike[str] | None = None, deadline_s: float = DEADLINE_S) -> Server:
    """Starts a server on free ports of 127.0.0.1 and returns when it stores and returns an object.

    It never outlives this process: stopped at exit, and on Linux killed by the kernel when this process is.

    Args:
        name: one of `names()`.
        directory: keep data there, made if need be, left in place by `stop`, and found again by a later `start`
            (with other ports and other credentials). Default: a temporary one, in shared memory where 4 GiB are free.
        deadline_s: seconds until it must answer; default 60.

    Raises:
        UnknownServer: no server has this name.
        NotInstalled: its program is not on this machine; the message says how to install it.
        StartFailed: it exited or missed the deadline; nothing of it is left. Its log's tail is in the notes.
        ValueError: `directory` for a server that keeps its data in memory.
    """
    recipe = _recipe(name)
    program = recipe.locate()
    if program is None:
        raise NotInstalled(f"{name} is not installed: {recipe.install}")
    if directory is not None and not recipe.keeps_data:
        raise ValueError(f"{name} keeps its data in memory: leave out directory")
    workspace = temporary(name) if directory is None else kept(Path(directory))
    try:
        return _handle(_bring_up(recipe, program, workspace, deadline_s), workspace)
    except BaseException:
        workspace.remove()
        raise


def missing(name: str) -> str | None:
    """Why `name` cannot be started here and how to install it; None when it can.

    Raises:
        UnknownServer: no server has this name.
    """
    recipe = _recipe(name)
    return None if recipe.locate() else f"not installed: {recipe.install}"


def names() -> tuple[str, ...]:
    """All servers, installed or not."""
    return tuple(RECIPES)


def _recipe(name: str) -> Recipe:
    try:
        return RECIPES[name]
    except KeyError:
        raise UnknownServer(f"no server is called {name!r}: choose from {', '.join(RECIPES)}") from None


def _bring_up(recipe: Recipe, program: Path, workspace: Workspace, deadline_s: float) -> Instance:
    for attempt in range(1, _ATTEMPTS + 1):
        ports = free_ports(recipe.port_count)
        # A secret of its own, so that a stranger who took the port is not mistaken for the server.
        instance = Instance(recipe, Site(program, workspace.path, ports, secrets.token_hex(16)), workspace)
        try:
            instance.up(deadline_s)
        except StartFailed:
            # The server is gone, so whoever has one of its ports now is another.
            if attempt == _ATTEMPTS or not any_taken(ports):
                raise
        else:
            instance.close_at_exit()
            return instance
    raise AssertionError("the last attempt returns or raises")


def _handle(instance: Instance, workspace: Workspace) -> Server:
    return Server(
        name=instance.recipe.name,
        dialect=instance.recipe.dialect,
        endpoint_url=instance.endpoint_url,
        env=MappingProxyType({**instance.client.env(), **past_proxies()}),
        directory=workspace.path,
        log_path=instance.log_path,
        conditional_writes=instance.recipe.conditional_writes,
        _instance=instance,
    )
