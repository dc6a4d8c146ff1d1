"""`ckpt-cloud cp`."""

from __future__ import annotations

from ckpt_cloud.cli.ending import interruptible
from ckpt_cloud.cli.keys import Given
from ckpt_cloud.cli.output import console, print_json
from ckpt_cloud.copying import copy
from ckpt_cloud.errors import CheckpointExists


def run(source: str, target: str, keys: Given, *, overwrite: bool, read_back: bool, as_json: bool) -> None:
    """Copies a checkpoint."""
    left = (
        "nothing was published and what had been uploaded is deleted, unless the commit was under way; "
        f"ckpt-cloud resolve {target} tells"
    )
    with interruptible(left):
        try:
            copied = copy(
                source,
                target,
                overwrite=overwrite,
                read_back=read_back,
                source_encryption_key=keys.source,
                encryption_key=keys.target,
                decrypt=keys.decrypt,
                **keys.demands,
                progress=not as_json,
            )
        except CheckpointExists as error:
            hint = error.hint.replace("pass overwrite=True", "give --overwrite")
            raise CheckpointExists(error.message, error.url, hint) from None
    if as_json:
        print_json({"url": copied.url, "attempt": copied.attempt, "report": copied.report.as_dict()})
    else:
        console.print(f"copied to {copied.url}: {copied.report}")
