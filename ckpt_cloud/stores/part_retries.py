"""How often one part of an upload is sent again before the whole upload begins anew, with fewer parts in flight."""

from __future__ import annotations

from typing import Final

import tenacity

from ckpt_cloud.errors import StoreUnavailable, Throttled
from ckpt_cloud.options import RetryOptions

MOST: Final = 3
FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 2.0


def part_retries(retry: RetryOptions, *, only_refused: bool = False) -> tenacity.AsyncRetrying:
    """Sends one part again with full jitter; what native clients are told in their own words.

    Args:
        only_refused: only where the store said that it did nothing, for requests that may not be carried out twice.
    """
    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type((Throttled,) if only_refused else (StoreUnavailable, Throttled)),
        stop=tenacity.stop_after_attempt(min(MOST, retry.max_retries) + 1),
        wait=tenacity.wait_random_exponential(FIRST_BACKOFF_S, min(MAX_BACKOFF_S, retry.max_backoff_s)),
        reraise=True,
    )
