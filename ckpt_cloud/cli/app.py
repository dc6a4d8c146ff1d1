"""Commands and their options; what each does lies in a module of its own, loaded when it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ckpt_cloud.cli.ending import end_unwritten, end_with, interrupted
from ckpt_cloud.errors import CkptCloudError
from ckpt_cloud.version import VERSION

FORMATS = ("ckpt-cloud", "dcp", "safetensors", "torch")
"""That convert writes."""


class _Commands(TyperGroup):
    """Commands that leave anything when they are interrupted say so themselves."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            interrupted("nothing was changed")
        except CkptCloudError:
            raise  # some are OSErrors as well
        except OSError as error:
            end_unwritten(error)


app = typer.Typer(
    name="ckpt-cloud",
    cls=_Commands,
    help="Look after checkpoints on object stores.",
    epilog="Exit status: 0 done, 1 nothing found or taken, or a difference, 2 wrong request, 3 try again, "
    "4 damaged data, 130 interrupted.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Hours = Annotated[float, typer.Option(min=0, metavar="HOURS", help="Leave younger ones alone.")]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--encryption-key-file", metavar="FILE", help="Key of encrypted checkpoints; or CKPT_CLOUD_ENCRYPTION_KEY."
    ),
]
NewKey = Annotated[
    Path | None, typer.Option("--encryption-key-file", metavar="FILE", help="Encrypt what is written with this key.")
]
NewKeyId = Annotated[
    str | None, typer.Option("--encryption-key-id", metavar="NAME", help="What COMMIT calls that key.")
]
SourceKey = Annotated[
    Path | None,
    typer.Option(
        "--source-key-file",
        metavar="FILE",
        help="Key of an encrypted SOURCE; else --encryption-key-file or CKPT_CLOUD_ENCRYPTION_KEY.",
    ),
]
Decrypt = Annotated[bool, typer.Option("--decrypt", help="Write what was encrypted in clear.")]
TrustedKey = Annotated[
    list[str] | None,
    typer.Option("--trusted-key", metavar="FILE", help="PEM file of a public key that must have signed it."),
]
Encrypted = Annotated[bool, typer.Option("--require-encryption", help="Refuse what is not encrypted.")]
Root = Annotated[str, typer.Argument(help="URL under which the checkpoints lie.")]
Url = Annotated[str, typer.Argument(help="URL of a checkpoint.")]


def main() -> None:
    """Entry point: a user's mistake ends in a message and an exit status, never in a traceback."""
    try:
        app(prog_name="ckpt-cloud")
    except CkptCloudError as error:
        end_with(error)


@contextmanager
def _suggesting(*urls: str) -> Iterator[None]:
    """An error about one of `urls`, which is not there, names those near it."""
    try:
        yield
    except CkptCloudError as error:
        from ckpt_cloud.cli.nearby import with_suggestion

        raise with_suggestion(error, urls) from None


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(VERSION)
        raise typer.Exit


@app.command(epilog="Example: ckpt-cloud ls s3://bucket/run")
def ls(
    root: Root,
    all_: Annotated[bool, typer.Option("--all", help="Deleted and aborted ones too.")] = False,
    json: Json = False,
) -> None:
    """List the checkpoints under ROOT with their state and metrics, oldest first."""
    from ckpt_cloud.cli import ls as command

    with _suggesting(root):
        command.run(root, all_=all_, as_json=json)


@app.command(epilog="Example: ckpt-cloud show s3://bucket/run/step-100 --depth 2")
def show(
    url: Url,
    depth: Annotated[int | None, typer.Option(min=0, help="Levels of the tree; all by default.")] = None,
    objects: Annotated[bool, typer.Option("--objects", help="List the stored objects too.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures instead.")] = None,
    trace: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="A trace to show on the page.")] = None,
    encryption_key_file: KeyFile = None,
    json: Json = False,
) -> None:
    """Show what a checkpoint holds, as a tree: tensors with dtype, shape, size and shards, items, objects."""
    from ckpt_cloud.cli import keys
    from ckpt_cloud.cli import show as command

    opened = keys.given(encryption_key_file)
    with _suggesting(url):
        command.run(url, opened, as_json=json, depth=depth, objects=objects, page=html, traces=trace or [])


@app.command(epilog="Example: ckpt-cloud diff s3://bucket/run/step-100 s3://bucket/run/step-200")
def diff(
    first: Url,
    second: Url,
    values: Annotated[bool, typer.Option("--values", help="Read all tensors, and compare their bytes.")] = False,
    encryption_key_file: KeyFile = None,
    json: Json = False,
) -> None:
    """Compare two checkpoints: keys, shapes, dtypes, and on demand values. Status 1 if they differ."""
    from ckpt_cloud.cli import diff as command
    from ckpt_cloud.cli import keys

    opened = keys.given(encryption_key_file)
    with _suggesting(first, second):
        command.run(first, second, opened, values=values, as_json=json)


@app.command(epilog="Example: ckpt-cloud cp s3://bucket/run/step-100 gs://other/run/step-100")
def cp(
    source: Url,
    target: Annotated[str, typer.Argument(help="URL of the copy, where nothing is yet.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint at TARGET.")] = False,
    read_back: Annotated[bool, typer.Option("--read-back", help="Read and check the copy before it counts.")] = False,
    source_key_file: SourceKey = None,
    encryption_key_file: NewKey = None,
    encryption_key_id: NewKeyId = None,
    decrypt: Decrypt = False,
    trusted_key: TrustedKey = None,
    require_encryption: Encrypted = False,
    json: Json = False,
) -> None:
    """Copy a checkpoint, to another bucket or cloud too: verified on the way, in fixed memory, committed last.

    The copy of an encrypted one is encrypted too, with the same key unless another is given.
    """
    from ckpt_cloud.cli import cp as command
    from ckpt_cloud.cli import keys

    demands = keys.demanded(trusted_key, encryption=require_encryption)
    ring = keys.Given.of(source_key_file, encryption_key_file, encryption_key_id, demands, decrypt=decrypt)
    with _suggesting(source):
        command.run(source, target, ring, overwrite=overwrite, read_back=read_back, as_json=json)


@app.command(epilog="Example: ckpt-cloud rm s3://bucket/run/step-100")
def rm(
    urls: Annotated[list[str], typer.Argument(help="URLs of checkpoints.")],
    yes: Yes = False,
    json: Json = False,
) -> None:
    """Delete checkpoints: first their visibility, then their data. Shows them and asks."""
    from ckpt_cloud.cli import rm as command

    with _suggesting(*urls):
        command.run(urls, yes=yes, as_json=json)


@app.command(epilog="Example: ckpt-cloud gc s3://bucket/run --delete")
def gc(
    root: Annotated[str, typer.Argument(help="URL at or below which to look.")],
    older_than: Hours = 24,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it.")] = False,
    yes: Yes = False,
    encryption_key_file: KeyFile = None,
    json: Json = False,
) -> None:
    """List what no checkpoint under ROOT needs, of dead saves and replaced checkpoints; --delete removes it.

    Safe beside running saves and loads. Asks before it deletes. Skips encrypted checkpoints without their key.
    """
    from ckpt_cloud.cli import gc as command
    from ckpt_cloud.cli import keys

    opened = keys.given(encryption_key_file)
    with _suggesting(root):
        command.run(root, opened, older_than_hours=older_than, delete=delete, yes=yes, as_json=json)


@app.command(epilog="Example: ckpt-cloud convert s3://bucket/run/step-100 s3://bucket/model --to safetensors")
def convert(
    source: Annotated[str, typer.Argument(help="URL of a checkpoint of any format, or of a file.")],
    destination: Annotated[str, typer.Argument(help="URL to write to.")],
    *,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT", help="ckpt-cloud, dcp, safetensors or torch.", autocompletion=lambda: list(FORMATS)
        ),
    ],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at DESTINATION.")] = False,
    max_shard: Annotated[float, typer.Option(min=0.001, metavar="GB", help="Of one safetensors file.")] = 5,
    dequantize: Annotated[str, typer.Option(metavar="DTYPE", help="Multiply fp8 weights out, to bfloat16, ...")] = "",
    block_size: Annotated[int, typer.Option(min=1, help="Rows and columns of fp8 weights with one scale.")] = 128,
    trust: Annotated[bool, typer.Option("--trust", help="Open items that could run code.")] = False,
    source_key_file: SourceKey = None,
    encryption_key_file: NewKey = None,
    encryption_key_id: NewKeyId = None,
    decrypt: Decrypt = False,
    trusted_key: TrustedKey = None,
    require_encryption: Encrypted = False,
    json: Json = False,
) -> None:
    """Write the checkpoint at SOURCE to DESTINATION in another format; tensors stream through in fixed memory.

    Of an encrypted one only --to ckpt-cloud is encrypted too; other formats need --decrypt.
    """
    from ckpt_cloud.cli import convert as command
    from ckpt_cloud.cli import keys

    demands = keys.demanded(trusted_key, encryption=require_encryption)
    ring = keys.Given.of(source_key_file, encryption_key_file, encryption_key_id, demands, decrypt=decrypt)
    how = command.How(to, overwrite, int(max_shard * 1e9), dequantize, block_size, trust, ring)
    with _suggesting(source):
        command.run(source, destination, how, as_json=json)


@app.command(epilog="Example: ckpt-cloud uploads s3://bucket/run --older-than 24 --abort")
def uploads(
    root: Annotated[str, typer.Argument(help="URL under which to look.")],
    older_than: Hours = 24,
    abort: Annotated[bool, typer.Option("--abort", help="Abort them.")] = False,
    yes: Yes = False,
    json: Json = False,
) -> None:
    """List unfinished multipart uploads under ROOT, which no listing shows and which are billed; --abort ends them."""
    from ckpt_cloud.cli import uploads as command

    with _suggesting(root):
        command.run(root, older_than_hours=older_than, abort=abort, yes=yes, as_json=json)


@app.command(epilog="Example: ckpt-cloud resolve s3://bucket/run/step-100")
def resolve(
    url: Annotated[str, typer.Argument(help="URL of a save that ended without a clear answer.")],
    json: Json = False,
) -> None:
    """Settle a save that ended in CommitStateUnknown: print what is at URL, and see to it that it stays so.

    Saves to URL that began before now and have not committed are given up.
    """
    from ckpt_cloud.cli import resolve as command

    with _suggesting(url):
        command.run(url, as_json=json)


@app.command(epilog="Example: ckpt-cloud doctor s3://bucket/run")
def doctor(
    url: Annotated[str, typer.Argument(help="URL under which checkpoints are to lie.")],
    size: Annotated[int, typer.Option(min=0, metavar="MIB", help="To move for the measurement; 0 for none.")] = 64,
    json: Json = False,
) -> None:
    """Try out a place: is it reached, which permissions are there, are conditional writes kept, how fast is it.

    Writes throw-away objects below data/ and deletes them.
    """
    from ckpt_cloud.cli import doctor as command

    with _suggesting(url):
        command.run(url, size_mib=size, as_json=json)


@app.command(epilog="Example: ckpt-cloud bench s3://bucket/bench --size 1024")
def bench(
    root: Annotated[str, typer.Argument(help="URL below which to save, and to delete it again.")],
    size: Annotated[int, typer.Option(min=1, metavar="MIB", help="Of the state.")] = 256,
    tensors: Annotated[int, typer.Option(min=1, help="That make up the state.")] = 16,
    json: Json = False,
) -> None:
    """Save, load and compare a state of random numbers, and print how fast that was."""
    from ckpt_cloud.cli import bench as command

    with _suggesting(root):
        command.run(root, size_mib=size, tensors=tensors, as_json=json)


@app.command(epilog="Example: ckpt-cloud verify s3://bucket/run/step-100 --deep")
def verify(
    url: Annotated[str, typer.Argument(help="URL of a checkpoint.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and check it.")] = False,
    trusted_key: TrustedKey = None,
    encryption_key_file: KeyFile = None,
    require_encryption: Encrypted = False,
    json: Json = False,
) -> None:
    """Check a whole checkpoint: the manifest, sizes, and the store's own checksums where it tells them.

    --deep also reads every byte.
    """
    from ckpt_cloud.cli import keys
    from ckpt_cloud.cli import verify as command

    opened = keys.given(encryption_key_file)
    with _suggesting(url):
        command.run(url, opened, keys.demanded(trusted_key, encryption=require_encryption), deep=deep, as_json=json)
