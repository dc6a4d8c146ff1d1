"""A local S3 server, and lines to it with the habits of a cloud's network: nginx in front of SeaweedFS.

with start() as line:
    os.environ.update(line.env("sink"))
"""

from __future__ import annotations

import contextlib
import os
import shutil
import string
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import localstack
from localstack.child import Child
from localstack.ports import HOST, accepts, free_ports
from localstack.workspace import temporary

Name = Literal["direct", "counted", "cloud", "sink", "sink_cloud"]
"""`direct` is the server itself; the others are described in nginx.conf.in."""
PROXIED: tuple[Name, ...] = ("counted", "cloud", "sink", "sink_cloud")

BUCKET = "bench"
WAIT_S = 0.030
RATE = 90_000_000
"""Bytes a second and connection, as Amazon's guide says of S3."""
_DEADLINE_S = 20.0
_MODULES = ("/usr/lib/nginx/modules", "/usr/lib64/nginx/modules", "/usr/share/nginx/modules")
_INSTALL = "apt-get install nginx libnginx-mod-http-lua (elsewhere: nginx with its Lua module)"


@dataclass(frozen=True)
class Line:
    """A started server and the ports of the lines to it."""

    server: localstack.Server
    ports: dict[Name, int]

    def env(self, name: Name) -> dict[str, str]:
        """What clients read to take this line."""
        if name == "direct":
            return dict(self.server.env)
        return {**self.server.env, "AWS_ENDPOINT_URL": f"http://{HOST}:{self.ports[name]}"}

    @property
    def counter_url(self) -> str:
        """Where `counted` says what went over it."""
        return f"http://{HOST}:{self.ports['counted']}/.counted"


def take_count(url: str) -> tuple[int, int]:
    """Bytes and number of answers to GET that `counted` passed on since the last call."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        size, requests = answer.read().split()
    return int(size), int(requests)


@contextlib.contextmanager
def start(directory: Path | None = None) -> Iterator[Line]:
    """SeaweedFS with data in memory (or in `directory`) and nginx before it, both gone at the end of the block."""
    nginx, modules = _nginx()
    with localstack.start("seaweedfs", directory=directory) as server:
        server.create_bucket(BUCKET)
        workspace = temporary("line")
        ports = dict(zip(PROXIED, free_ports(len(PROXIED)), strict=True))
        _lay_out(workspace.path, modules, server.endpoint_url.removeprefix("http://"), ports)
        child = Child(
            (nginx, "-p", f"{workspace.path}", "-c", f"{workspace.path}/nginx.conf"),
            cwd=workspace.path,
            env=dict(os.environ),
            log=workspace.path / "nginx.log",
        )
        try:
            _await(child, ports, workspace.path)
            yield Line(server, ports)
        finally:
            child.stop(grace_s=0)
            workspace.remove()


def _nginx() -> tuple[str, str]:
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    modules = next((m for m in _MODULES if Path(m, "ngx_http_lua_module.so").exists()), None)
    if program is None or modules is None:
        what = "nginx" if program is None else "nginx's Lua module"
        raise SystemExit(f"scripts/bench: {what} is not on this machine: {_INSTALL}")
    return program, modules


def _lay_out(directory: Path, modules: str, upstream: str, ports: dict[Name, int]) -> None:
    here = Path(__file__).parent
    values = {"modules": modules, "upstream": upstream, "wait_s": WAIT_S, "rate": RATE, **ports}
    text = string.Template((here / "nginx.conf.in").read_text()).substitute(values)
    (directory / "nginx.conf").write_text(text)
    shutil.copy(here / "sink.lua", directory)
    (directory / "tmp").mkdir()


def _await(child: Child, ports: dict[Name, int], directory: Path) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline and not child.exited.wait(0.05):
        if all(map(accepts, ports.values())):
            return
    logs = "".join(p.read_text() for p in (directory / "nginx.log", directory / "nginx.err") if p.exists())
    raise SystemExit(f"scripts/bench: nginx did not start:\n{logs}")
