"""The only code that talks to stores."""

from ckpt_cloud.stores.base import (
    ANY,
    CREATE,
    AtHand,
    Condition,
    ObjectInfo,
    ObjectStore,
    Replace,
    UnfinishedUpload,
)
from ckpt_cloud.stores.location import Location, parse_url, supports
from ckpt_cloud.stores.resolve import import_engine, open_both, open_store

__all__ = [
    "ANY",
    "CREATE",
    "AtHand",
    "Condition",
    "Location",
    "ObjectInfo",
    "ObjectStore",
    "Replace",
    "UnfinishedUpload",
    "import_engine",
    "open_both",
    "open_store",
    "parse_url",
    "supports",
]
