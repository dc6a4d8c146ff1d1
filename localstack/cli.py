"""The command line: `python -m localstack up | run | list`.

What a shell should read goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack

from localstack.errors import LocalServerError, NotInstalled
from localstack.recipe import Recipe
from localstack.recipes import RECIPES
from localstack.server import Server, missing, start

_EPILOG = """\
examples:
  python -m localstack up s3 --bucket demo        until Ctrl-C; prints the variables to export
  python -m localstack run s3 gcs -- pytest       with the variables set, for as long as the command runs
"""
_WATCH_S = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    ours, command = _split(words)
    options = _parser().parse_args(ours)
    # One way out for both signals: the `with` blocks below stop the servers.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if options.command == "list":
            return _list()
        recipes = choose(options.servers)
        if options.command == "run":
            _check(command)
        with ExitStack() as stack:
            servers = [_start(stack, recipe, options.bucket) for recipe in recipes]
            return _run(servers, command) if options.command == "run" else _up(servers)
    except KeyboardInterrupt:
        return 0
    except (LocalServerError, ValueError) as error:
        _say("\n".join([str(error), *getattr(error, "__notes__", ())]))
        return 1


def choose(wanted: Sequence[str]) -> list[Recipe]:
    """The recipes for names of servers or dialects; a dialect means its first installed server that honours conditions.

    Raises:
        ValueError: a name means nothing, or two servers would share their variables.
        NotInstalled: no server of a dialect is installed.
    """
    chosen = [RECIPES.get(word) or _preferred(word) for word in wanted]
    dialects = [recipe.dialect for recipe in chosen]
    if len(set(dialects)) < len(dialects):
        raise ValueError("two servers of one dialect are reached through the same variables: start them separately")
    return chosen


def _preferred(dialect: str) -> Recipe:
    fitting = [recipe for recipe in RECIPES.values() if recipe.dialect == dialect and recipe.conditional_writes]
    if not fitting:
        raise ValueError(f"{dialect!r} is no server and no dialect: choose s3, gcs, azure, {', '.join(RECIPES)}")
    for recipe in fitting:
        if missing(recipe.name) is None:
            return recipe
    raise NotInstalled(f"no server for {dialect} is installed: {fitting[0].install}")


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m localstack",
        description="Object-store servers on this machine.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_ in (
        ("up", "start servers, print what to export, stop them on Ctrl-C or SIGTERM"),
        ("run", "start servers, run the command after --, stop them"),
    ):
        command = commands.add_parser(name, help=help_)
        command.add_argument("servers", nargs="+", metavar="SERVER", help="s3, gcs, azure, or a name that `list` shows")
        command.add_argument("--bucket", help="create this bucket in each")
    commands.add_parser("list", help="show every server and how to install what is missing")
    return parser


def _start(stack: ExitStack, recipe: Recipe, bucket: str | None) -> Server:
    _say(f"starting {recipe.name} ...")
    server = stack.enter_context(start(recipe.name))
    if bucket:
        server.create_bucket(bucket)
    _say(f"{server.name} speaks {server.dialect} at {server.endpoint_url} (pid {server.pid}, log {server.log_path})")
    return server


def _up(servers: Sequence[Server]) -> int:
    for name, value in _environment(servers).items():
        print(f"export {name}={shlex.quote(value)}")
    sys.stdout.flush()
    _say("Ctrl-C stops")
    never = threading.Event()
    while all(server.running for server in servers):
        never.wait(_WATCH_S)
    _say(f"gone by itself: {', '.join(server.name for server in servers if not server.running)}")
    return 1


def _check(command: Sequence[str]) -> None:
    """Refuses what cannot be run, before anything is started for it."""
    if not command:
        raise ValueError("no command: put it after --")
    if shutil.which(command[0]) is None:
        raise ValueError(f"no command is called {command[0]!r}")


def _run(servers: Sequence[Server], command: Sequence[str]) -> int:
    return subprocess.run(command, env={**os.environ, **_environment(servers)}, check=False).returncode


def _environment(servers: Sequence[Server]) -> dict[str, str]:
    return {name: value for server in servers for name, value in server.env.items()}


def _list() -> int:
    for recipe in RECIPES.values():
        print(f"{recipe.name:<10} {recipe.dialect:<6} {missing(recipe.name) or 'installed'}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)
