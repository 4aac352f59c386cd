"""Scores computed in shards, one file each, by runs that need not know of each other; and what they add up to.

For methods whose scores add up over examples. `merge` adds the tables in the order of the examples, in float64, so the
result is to the last bit that of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mechinterp.base.checkpoint import Checkpoint, read_state, write_state
from mechinterp.base.errors import InputError
from mechinterp.base.progress import StageProgress, no_stages
from mechinterp.base.shards import State, share
from mechinterp.circuit_file.store import SUFFIX
from mechinterp.discovery.ensemble import members_asked
from mechinterp.discovery.finished_parts import FinishedParts
from mechinterp.discovery.method import METHODS
from mechinterp.discovery.score_pieces import ScorePieces
from mechinterp.discovery.table_sums import tables_of
from mechinterp.pipeline import (
    Discovery,
    Parts,
    Prepared,
    Ranking,
    discover,
    parsed_setting,
    prepare,
    tensors_of,
)
from mechinterp.run_spec import RunSpec, command_of, output_path, parsed_shard, resolved

ENDING = ".shard"


@dataclass(frozen=True)
class Shard:
    """The tables of one shard, as its file has them; they are checked when they are added up."""

    path: Path
    key: str
    """A digest of everything that decides the results of the run."""
    command: str
    number: int
    """From 1."""
    count: int
    tables: State = field(repr=False)


def score_shard(spec: RunSpec, progress: StageProgress = no_stages) -> Path:
    """The file with the scores of one shard of the train pairs, `spec.shard` (`3/8`), which is written.

    Cost: that of scoring its share of the pairs. Nothing else is measured; that the model does the task is checked when
    the shards are merged. A killed shard goes on where it was.

    Raises InputError for a method whose scores do not add up over examples, and for what `discover` refuses.
    """
    assert spec.shard is not None
    number, count = parsed_shard(spec.shard)
    _check_additive(spec)
    ready = prepare(spec, progress)
    pieces = score_pieces(ready)
    path = shard_path(ready.spec)
    kept = Checkpoint(path.with_name(f".{path.name}.unfinished"), f"{ready.key}-{number}-of-{count}")
    mine = share(len(pieces.groups), number - 1, count)
    tables = tables_of(mine, pieces.piece, pieces.like, kept, partial(progress, "scores"), pieces.batch_size)
    command = torch.tensor(list(command_of(ready.spec).encode()), dtype=torch.uint8)
    write_state(path, ready.key, {**tables, "command": command, "shard": torch.tensor([number, count])})
    kept.clear()
    return path


def shard_path(spec: RunSpec) -> Path:
    """Where the scores of a shard go: `OUT/{task}-{model}-{method}.I-of-N.shard`."""
    number, count = parsed_shard(str(spec.shard))
    path = output_path(spec)
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}.{number}-of-{count}{ENDING}")


def made_by(path: Path) -> str:
    """The command whose shard a file holds; empty if it holds none."""
    try:
        return _read(path).command
    except InputError:
        return ""


def _check_additive(spec: RunSpec) -> None:
    """Return None if scores add up over examples. Raises InputError otherwise, before anything slow begins."""
    spec = resolved(spec)
    name = str(spec.method)
    settings = dict(parsed_setting(setting, METHODS.get(name)) for setting in spec.settings)
    if not METHODS.get(name).additive and members_asked({"method": name, **settings}) is None:
        others = ", ".join(sorted(n for n, method in METHODS.importable().items() if method.additive))
        raise InputError(
            f"Scores of method {name!r} do not add up over examples, so shards of them cannot be merged. Start the run "
            f"with torchrun, which shares out each step, or take a method whose scores do: {others}."
        )
    if spec.replacement.startswith("mean"):
        raise InputError(
            f"Replacement {spec.replacement!r} is the mean over all examples, which no shard has; start the run with "
            "torchrun, or take --replacement corrupt."
        )


def score_pieces(ready: Prepared) -> ScorePieces:
    """The scores of a run in pieces, and how they add up, as `discover` adds them up."""
    spec, train = ready.spec, ready.examples.train
    done = FinishedParts(ready.path, ready.key)
    ranking = Ranking(spec, ready.model, ready.graph, ready.metric, ready.settings, done, no_stages)
    rows = None if spec.resamples == 0 else ranking.resamples(train)
    return ScorePieces(ready.model, ready.graph, train, ranking.asked, rows)


def read_shards(paths: Sequence[Path]) -> tuple[Shard, ...]:
    """All shards of one run, in order. Raises InputError if one is missing, given twice, damaged or of another run."""
    found = sorted((_read(path) for path in paths), key=lambda shard: shard.number)
    if not found:
        raise InputError("Give the files of all shards: NAME.1-of-N.shard to NAME.N-of-N.shard.")
    first = found[0]
    for shard in found:
        if (shard.key, shard.count, shard.command) != (first.key, first.count, first.command):
            raise InputError(f"{shard.path} is not a shard of the same run as {first.path}.")
    numbers = [shard.number for shard in found]
    if len(set(numbers)) < len(numbers):
        raise InputError(f"A shard is given twice: the numbers are {', '.join(map(str, numbers))}.")
    missing = [str(number) for number in range(1, first.count + 1) if number not in numbers]
    if missing:
        raise InputError(f"Of {first.count} shards {', '.join(missing[:20])} are missing; give the files of all.")
    return tuple(found)


def _read(path: Path) -> Shard:
    key, tables = read_state(path)
    shard, command = tables.pop("shard", None), tables.pop("command", None)
    if not _is(shard, torch.int64, 2) or not _is(command, torch.uint8, None):
        raise InputError(f"{path} is not a shard that `run --shard` wrote.")
    assert shard is not None and command is not None
    number, count = shard.tolist()
    if not 1 <= number <= count:
        raise InputError(f"{path} says that it is shard {number} of {count}, which is not possible.")
    return Shard(path, key, bytes(command.tolist()).decode("utf-8", "replace"), number, count, tables)


def _is(value: Tensor | None, dtype: torch.dtype, length: int | None) -> bool:
    return value is not None and value.dtype == dtype and value.ndim == 1 and length in (None, len(value))


def merge(spec: RunSpec, shards: Sequence[Shard], progress: StageProgress = no_stages) -> Discovery:
    """The run whose scores the shards have, finished: size, evaluation, roles, files. As `discover` without shards.

    Raises InputError if the shards are of another run, and what `discover` raises.
    """
    return discover(spec, progress, scoring=partial(_sum, shards))


def _sum(shards: Sequence[Shard], ready: Prepared) -> Parts:
    """What scoring gives: the sum of all tables, in the order of the pieces."""
    if ready.key != shards[0].key:
        raise InputError(
            f"{shards[0].path} is of another run: the model, the pairs, the settings or the version of mechinterp have "
            "changed since; make the shards again."
        )
    pieces = score_pieces(ready)
    sums, like, n = pieces.start, pieces.like, len(pieces.groups)
    for shard in shards:
        mine = share(n, shard.number - 1, shard.count)
        shapes = {name: (table.dtype, len(mine), *table.shape) for name, table in like.items()}
        if shapes != {name: (table.dtype, *table.shape) for name, table in shard.tables.items()}:
            raise InputError(f"{shard.path} does not have the tables of its shard; make it again.")
        for at, group in enumerate(mine):
            pieces.add(sums, group, {name: shard.tables[name][at] for name in like})
    scores, samples = pieces.result(sums)
    return {**tensors_of(scores), **({} if samples is None else {"samples": samples})}
