"""`sum_tables`: sums over tables of edges, one for each piece of work, in the order of the pieces.

Processes that share the work take a part of the pieces each, and a killed run goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mechinterp.base.checkpoint import Checkpoint
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress
from mechinterp.base.shards import ALONE, State, agree, current, relayed, share, sharing


def sum_tables(
    n: int,
    piece: Callable[[int], State],
    like: State,
    start: State,
    add: Callable[[State, int, State], None],
    checkpoint: Checkpoint,
    progress: Progress,
    batch_size: int = 0,
) -> State:
    """What `add` makes of `start` with the tables of the pieces 0 to n - 1, in this order.

    Memory: a process that is not the first keeps the tables of its own pieces until the others have added theirs.

    Args:
        n: How many pieces of work there are.
        piece: The tables that one of them gives, on the CPU.
        like: Tables with the names, dtypes and shapes of those of a piece.
        start: The sums before the first piece.
        add: Adds the tables of a piece to the sums, in place.
        checkpoint: Keeps the state of this process. Where there are several, it is saved at once if one of them ends.
        progress: Called with the pieces done by this process, and of all that it does.
        batch_size: That of the pieces, if they are batches: a state in other batches cannot be gone on with.
    """
    processes, own = current(), checkpoint.of_process()
    mine, error = share(n, processes.index, processes.count), None
    first, state = processes.index == 0, start
    try:
        with sharing(ALONE):
            if first:
                state = _each(
                    mine, piece, start, lambda sums, at, got: add(sums, mine[at], got), own, progress, batch_size
                )
            else:
                state = tables_of(mine, piece, like, own, progress, batch_size)
    except Exception as raised:  # raised in all processes by `agree`
        error = raised
    agree(error)

    def add_own(sums: State) -> State:
        if first:
            return state
        for at, number in enumerate(mine):
            add(sums, number, {name: state[name][at] for name in like})
        return sums

    sums = relayed(add_own)
    own.clear()
    return sums


def tables_of(
    pieces: range,
    piece: Callable[[int], State],
    like: State,
    checkpoint: Checkpoint,
    progress: Progress,
    batch_size: int = 0,
) -> State:
    """The tables of some pieces, one upon the other. The arguments are those of `sum_tables`."""

    def put(state: State, at: int, found: State) -> None:
        for name in like:
            state[name][at] = found[name]

    empty = {name: table.new_zeros(len(pieces), *table.shape) for name, table in like.items()}
    return _each(pieces, piece, empty, put, checkpoint, progress, batch_size)


def _each(
    pieces: range,
    piece: Callable[[int], State],
    state: State,
    put: Callable[[State, int, State], None],
    checkpoint: Checkpoint,
    progress: Progress,
    batch_size: int,
) -> State:
    """The state after all pieces; a killed run goes on at the piece that it had reached."""
    counts = {"done": torch.tensor(0), "batch_size": torch.tensor(batch_size)}
    done, saved = 0, checkpoint.load({**state, **counts}, {})
    if saved is not None:
        _check_batches(checkpoint, int(saved["batch_size"]), batch_size)
        checkpoint.check_counts(saved, {"done": len(pieces)})
        done, state = int(saved["done"]), {name: saved[name] for name in state}
    progress(done, len(pieces))
    try:
        while done < len(pieces):
            found = piece(pieces[done])
            put(state, done, found)
            done += 1
            checkpoint.save({**state, **counts, "done": torch.tensor(done)})
            progress(done, len(pieces))
    finally:
        if checkpoint.apart and done:  # another process may have ended the run
            checkpoint.save({**state, **counts, "done": torch.tensor(done)}, now=True)
    return state


def _check_batches(checkpoint: Checkpoint, saved: int, batch_size: int) -> None:
    """Return None if the state counts the same batches. Raises InputError otherwise."""
    if saved != batch_size:
        raise InputError(
            f"{checkpoint.path} counts batches of {saved} pairs, and this run has batches of {batch_size}, so "
            f"other pairs would count as done. Go on with batch_size={saved} (--batch-size {saved}), or delete it "
            "to start over."
        )
