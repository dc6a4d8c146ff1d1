"""The only code that talks to stores."""

from ckpt_cloud.stores.base import (
    ANY,
    CREATE,
    Condition,
    ObjectInfo,
    ObjectStore,
    Replace,
)
from ckpt_cloud.stores.resolve import Location, open_store, parse_url, supports

__all__ = [
    "ANY",
    "CREATE",
    "Condition",
    "Location",
    "ObjectInfo",
    "ObjectStore",
    "Replace",
    "open_store",
    "parse_url",
    "supports",
]
