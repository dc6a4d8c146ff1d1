"""What becomes of unfinished uploads by a store's own rules."""

from __future__ import annotations

from ckpt_cloud.errors import Unsupported
from ckpt_cloud.options import StoreOptions
from ckpt_cloud.stores.location import Location

AZURE_DAYS = 7
"""Azure discards blocks that nobody committed (https://learn.microsoft.com/rest/api/storageservices/put-block)."""


async def days_to_abort(location: Location, options: StoreOptions) -> int | None:
    """Days after which the store ends unfinished uploads by itself; None if it never does.

    Raises:
        Unsupported: the store does not tell.
        PermissionDenied, StoreUnavailable, ...: from S3, where `s3:GetLifecycleConfiguration` is needed.
    """
    if location.dialect == "azure":
        return AZURE_DAYS
    if location.dialect != "s3":
        raise Unsupported(f"{location.scheme}:// does not tell its lifecycle rules", location.url)
    from ckpt_cloud.stores import aws
    from ckpt_cloud.stores.beside_s3 import BesideS3

    chain = aws.session(options, location.url)
    return await BesideS3(
        chain, location, options, endpoint=aws.endpoint_url(chain, options, location.url)
    ).days_to_abort()
