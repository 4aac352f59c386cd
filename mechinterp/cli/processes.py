"""The command line in several processes: those that torchrun starts, or shards that are merged later."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mechinterp.base.errors import InputError, clip
from mechinterp.base.plain_files import is_file
from mechinterp.cli.overwriting import check_new
from mechinterp.cli.terminal import Detail, Terminal, hint, quiet_libraries, say
from mechinterp.run_spec import RunSpec, command_of, resolved

COMMAND = ["discover-circuit", "run"]


def together(run: Callable[..., int]) -> int:
    """The exit code of `run(first=...)` in the processes that torchrun started, which share the work; or in this one.

    `first` is whether this process is the one that writes and prints.
    """
    if "RANK" not in os.environ:  # torch is not imported yet
        return run()
    from mechinterp.base.processes import torchrun_processes

    with torchrun_processes() as processes:
        return run(first=processes.index == 0)


def nothing_to_share(words: Sequence[str]) -> bool:
    """Whether torchrun started several processes for a command that does not share its work, and this is not the first.

    Raises InputError in the first one: each process would do all of the work.
    """
    count, shares = os.environ.get("WORLD_SIZE", "1"), words[0] == "run" and "--dry-run" not in words
    if shares or count == "1" or "RANK" not in os.environ:
        return False
    if os.environ["RANK"] != "0":
        return True
    raise InputError(
        f"Only `run` shares its work among processes; each of these {clip(count, 9)} would do all of "
        f"`{clip(words[0], 40)}`. Start it without torchrun."
    )


def spec_here(values: dict[str, Any]) -> RunSpec:
    """The spec for this process: `cuda` is its own GPU.

    Raises InputError for a model over all devices if another process of this machine would do the same.
    """
    from mechinterp.base.processes import device_of_process

    if values["device_map"] is not None and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise InputError(
            "With --device-map each process would put the whole model on all devices of this machine. Start one "
            "process a machine (torchrun --nproc-per-node 1), or give --shard to jobs that have GPUs of their own."
        )
    return replace(RunSpec(**values), device=device_of_process(values["device"]))


def first_to_say(message: str) -> bool:
    """Whether no other process of this run has said this, so that it is printed once."""
    if "RANK" not in os.environ:
        return True
    from mechinterp.base import processes

    return processes.first_to_say(message)


def score_shard(spec: RunSpec, force: bool, detail: Detail) -> int:
    """The exit code after scoring one shard and writing its file."""
    from mechinterp.cli.progress_bars import stages

    if "RANK" in os.environ:
        raise InputError("Give --shard, or start the run with torchrun, not both.")
    with stages(detail) as progress:
        from mechinterp.shard_files import made_by, score_shard, shard_path

        quiet_libraries()
        path = shard_path(spec)
        if is_file(path) and made_by(path) != command_of(resolved(spec)):
            check_new(path, force)
        path = score_shard(spec, progress)
    assert spec.shard is not None
    count = spec.shard.partition("/")[2]
    every = str(path).replace(f".{spec.shard.replace('/', '-of-')}.", f".*-of-{count}.")
    say(Terminal(), f"wrote {path}")
    hint(Terminal(detail), f"next, when all {count} are there: discover-circuit merge {every}")
    return 0


def words_of_run(shard: Any) -> list[str]:
    """The words of the command that scored a shard. Raises InputError if it is not a run."""
    try:
        words = shlex.split(shard.command)
    except ValueError:
        words = []
    if words[:2] != COMMAND or any(word.startswith(("--shard", "--help")) for word in words):
        raise InputError(f"{shard.path} does not say which run it is a shard of; make it again.")
    return words[1:]
