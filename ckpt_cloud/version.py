"""The version of the library, and how it signs its manifests."""

VERSION = "0.1.0"
WRITER = f"ckpt-cloud {VERSION}"
