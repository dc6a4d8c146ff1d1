"""Commands and their options."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ckpt_cloud.errors import ChooseAnother, CkptCloudError, Damaged, FixRequest, TryAgain
from ckpt_cloud.version import VERSION

app = typer.Typer(
    name="ckpt-cloud",
    help="Look after checkpoints on object stores.",
    epilog="Exit status: 0 done, 1 nothing found or taken, 2 wrong request, 3 try again, 4 damaged data.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

EXIT_STATUS: tuple[tuple[type[CkptCloudError], int], ...] = (
    (ChooseAnother, 1),
    (FixRequest, 2),
    (TryAgain, 3),
    (Damaged, 4),
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Entry point: a user's mistake ends in a message and an exit status, never in a traceback."""
    try:
        app()
    except CkptCloudError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(next((status for kind, status in EXIT_STATUS if isinstance(error, kind)), 1))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(VERSION)
        raise typer.Exit


@app.command(epilog="Example: ckpt-cloud ls s3://bucket/run")
def ls(
    root: Annotated[str, typer.Argument(help="URL under which the checkpoints lie.")],
    json: Json = False,
) -> None:
    """List the checkpoints under ROOT with their state."""
    from ckpt_cloud.cli import ls as command

    command.run(root, as_json=json)


@app.command(epilog="Example: ckpt-cloud show s3://bucket/run/step-100")
def show(
    url: Annotated[str, typer.Argument(help="URL of a checkpoint.")],
    json: Json = False,
) -> None:
    """Show what a checkpoint holds: tensors with dtype, shape and size, items, and objects."""
    from ckpt_cloud.cli import show as command

    command.run(url, as_json=json)


@app.command(epilog="Example: ckpt-cloud uploads s3://bucket/run --older-than 24 --abort")
def uploads(
    root: Annotated[str, typer.Argument(help="URL under which to look.")],
    older_than: Annotated[float, typer.Option(min=0, metavar="HOURS", help="Pass over younger ones.")] = 24,
    abort: Annotated[bool, typer.Option("--abort", help="Abort them.")] = False,
    json: Json = False,
) -> None:
    """List unfinished multipart uploads under ROOT, which no listing shows and which are billed; --abort ends them."""
    from ckpt_cloud.cli import uploads as command

    command.run(root, older_than_hours=older_than, abort=abort, as_json=json)


@app.command(epilog="Example: ckpt-cloud gc s3://bucket/run --delete")
def gc(
    root: Annotated[str, typer.Argument(help="URL at or below which to look.")],
    older_than: Annotated[float, typer.Option(min=0, metavar="HOURS", help="Leave younger ones alone.")] = 24,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it.")] = False,
    json: Json = False,
) -> None:
    """List what no checkpoint under ROOT needs, of dead saves and replaced checkpoints; --delete removes it.

    Safe beside running saves and loads.
    """
    from ckpt_cloud.cli import gc as command

    command.run(root, older_than_hours=older_than, delete=delete, as_json=json)


@app.command(epilog="Example: ckpt-cloud convert s3://bucket/run/step-100 s3://bucket/model --to safetensors")
def convert(
    source: Annotated[str, typer.Argument(help="URL of a checkpoint of any format, or of a file.")],
    destination: Annotated[str, typer.Argument(help="URL to write to.")],
    *,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="ckpt-cloud, dcp, safetensors or torch.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at DESTINATION.")] = False,
    max_shard: Annotated[float, typer.Option(metavar="GB", help="Of one safetensors file.")] = 5,
    dequantize: Annotated[str, typer.Option(metavar="DTYPE", help="Multiply fp8 weights out, to bfloat16, ...")] = "",
    trust: Annotated[bool, typer.Option("--trust", help="Open items that could run code.")] = False,
    json: Json = False,
) -> None:
    """Write the checkpoint at SOURCE to DESTINATION in another format; tensors stream through in fixed memory."""
    from ckpt_cloud.cli import convert as command

    how = command.How(to, overwrite, int(max_shard * 1e9), dequantize, trust)
    command.run(source, destination, how, as_json=json)


@app.command(epilog="Example: ckpt-cloud rm s3://bucket/run/step-100")
def rm(
    url: Annotated[str, typer.Argument(help="URL of a checkpoint.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a checkpoint: first its visibility, then its data."""
    from ckpt_cloud.collector import delete

    if not yes:
        typer.confirm(f"Delete {url}?", abort=True, err=True)
    delete(url)


@app.command(epilog="Example: ckpt-cloud resolve s3://bucket/run/step-100")
def resolve(
    url: Annotated[str, typer.Argument(help="URL of a save that ended without a clear answer.")],
    json: Json = False,
) -> None:
    """Settle a save that ended in CommitStateUnknown: print what is at URL, and see to it that it stays so.

    Saves to URL that began before now and have not committed are given up.
    """
    import msgspec

    from ckpt_cloud.collector import resolve as settle

    info = settle(url)
    print(msgspec.json.format(msgspec.json.encode(info)).decode() if json else f"{info.state} {info.attempt}")


@app.command(epilog="Example: ckpt-cloud verify s3://bucket/run/step-100 --deep")
def verify(
    url: Annotated[str, typer.Argument(help="URL of a checkpoint.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and check it.")] = False,
    trusted_key: Annotated[
        list[str] | None, typer.Option("--trusted-key", help="PEM file of a public key that must have signed it.")
    ] = None,
    json: Json = False,
) -> None:
    """Check a whole checkpoint: the manifest and the sizes of all objects; --deep also reads every byte."""
    from ckpt_cloud.cli import verify as command

    command.run(url, deep=deep, trusted_keys=trusted_key or None, as_json=json)
