"""moto: S3 as AWS documents it, in memory; strict about conditions, lax about checksums."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from localstack.ports import HOST
from localstack.recipe import Launch, Recipe, Site


def _locate() -> Path | None:
    installed = all(importlib.util.find_spec(module) for module in ("moto", "flask"))
    return Path(sys.executable) if installed else None


def _plan(site: Site) -> Launch:
    (port,) = site.ports
    command = (str(site.program), "-m", "moto.server", "--host", HOST, "--port", str(port))
    return Launch(command=command, port=port)


RECIPE = Recipe(
    name="moto",
    dialect="s3",
    install='pip install "moto[s3,server]"',
    conditional_writes=True,
    keeps_data=False,
    port_count=1,
    grace_s=0,
    locate=_locate,
    plan=_plan,
)
