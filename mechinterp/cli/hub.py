"""The commands that share circuit files through the Hugging Face hub: push, pull. No model runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from mechinterp.base.errors import InputError
from mechinterp.cli import options
from mechinterp.cli.help import PULL_HELP, PUSH_HELP
from mechinterp.cli.options import find_file
from mechinterp.cli.terminal import Terminal, say

commands = typer.Typer()
Action = Callable[[], int]


@commands.command("push", help=PUSH_HELP, short_help="Upload a circuit file to the Hugging Face hub.")
def _push(
    file: options.File,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name, or datasets/org/name.")],
    revision: Annotated[str, typer.Option(help="Branch to commit to.")] = "main",
    message: Annotated[str | None, typer.Option(help="Message of the commit.  [default: Add circuit NAME]")] = None,
) -> Action:
    return partial(_do_push, file, repo, revision, message)


@commands.command("pull", help=PULL_HELP, short_help="Download a circuit file from the Hugging Face hub.")
def _pull(
    place: Annotated[str, typer.Argument(metavar="REPO[/PATH]", help="org/name or datasets/org/name, and the file.")],
    revision: Annotated[str | None, typer.Option(help="A commit; or a branch or tag, whose commit is printed.")] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the files.")] = Path("."),
    force: Annotated[bool, typer.Option("--force", help="Overwrite other files with these names.")] = False,
) -> Action:
    return partial(_do_pull, place, revision, out, force)


def _do_push(file: str, repo: str, revision: str, message: str | None) -> int:
    path = find_file(file)
    _check_endpoint()
    from mechinterp.circuit_file.hub import push_circuit

    _quiet_hub()
    done = push_circuit(path, repo, revision=revision, message=message)
    console = Terminal()
    word = "pushed" if done.new else "already there, unchanged:"
    say(console, f"{word} {', '.join(done.files)}")
    say(console, f"commit {done.commit}")
    say(console, f"to download it: discover-circuit pull {done.place} --revision {done.commit}")
    return 0


def _do_pull(place: str, revision: str | None, out: Path, force: bool) -> int:
    _check_endpoint()
    from mechinterp.circuit_file.hub import pull_circuit
    from mechinterp.circuit_file.summary import verify_command

    _quiet_hub()
    done = pull_circuit(place, revision=revision, out=out, force=force)
    console = Terminal()
    say(console, f"pulled {done.place} at commit {done.commit}")
    for path in done.files:
        say(console, f"{'wrote' if done.new else 'already there, the same:'} {path}")
    say(console, f"next: {verify_command(str(done.files[0]))}")
    return 0


def _check_endpoint() -> None:
    """Return None if HF_ENDPOINT can be an address. Raises InputError otherwise: the hub's client would not import."""
    given = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(given).port
    except ValueError as error:
        raise InputError(f"HF_ENDPOINT is not an address: {given[:100]!r} ({error}).") from error


def _quiet_hub() -> None:
    """Turn off the hub client's own messages and bars; an error is one line of ours."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error

    disable_progress_bars()
    set_verbosity_error()
