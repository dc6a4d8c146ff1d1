"""Azurite: Microsoft's emulator of Azure Blob Storage; a program for Node."""

from __future__ import annotations

import os
from pathlib import Path

from localstack.dialects.shared_key import ACCOUNT
from localstack.ports import HOST
from localstack.programs import find
from localstack.recipe import Launch, Recipe, Site

# Path of the program, where it is neither on PATH nor in node_modules.
VARIABLE = "CKPT_CLOUD_AZURITE"
_NODE_PROGRAMS = Path(__file__).parents[2] / "node_modules" / ".bin"


def _locate() -> Path | None:
    if find("node") is None:
        return None
    chosen = os.environ.get(VARIABLE)
    return find(chosen) if chosen else find("azurite-blob", beside=(_NODE_PROGRAMS,))


def _plan(site: Site) -> Launch:
    (port,) = site.ports
    options = ("--blobHost", HOST, "--blobPort", str(port), "--location", str(site.directory))
    # Clients are newer than the emulator, and send versions of the API that it does not know by name.
    switches = ("--skipApiVersionCheck", "--disableTelemetry", "--silent")
    return Launch(command=(str(site.program), *options, *switches), port=port, path=f"/{ACCOUNT}")


RECIPE = Recipe(
    name="azurite",
    dialect="azure",
    install="npm install azurite",
    conditional_writes=True,
    keeps_data=True,
    port_count=1,
    # It writes its index every few seconds and when asked to stop: killed, it forgets the newest blobs.
    grace_s=10,
    locate=_locate,
    plan=_plan,
)
