"""Free TCP ports on 127.0.0.1."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from contextlib import ExitStack

HOST = "127.0.0.1"


def free_ports(count: int) -> tuple[int, ...]:
    """`count` distinct ports that nobody listens on right now; another process may take one before you do."""
    with ExitStack() as held:
        # All stay bound until the last is chosen, so that none comes twice.
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return tuple(each.getsockname()[1] for each in sockets)


def any_taken(ports: Iterable[int]) -> bool:
    """Whether somebody listens on one of `ports`."""
    return any(_taken(port) for port in ports)


def accepts(port: int) -> bool:
    """Whether a connection to `port` is accepted."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        # Connections of a server that just died linger in TIME_WAIT; those do not hinder the next one.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False
