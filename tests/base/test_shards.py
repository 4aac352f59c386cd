"""Work shared out among processes: the sums of one process to the last bit, and errors that all raise."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

import pytest
import torch

from mechinterp.base.batches import over_batches
from mechinterp.base.checkpoint import UNSAVED, Checkpoint
from mechinterp.base.errors import InputError, TaskNotDone
from mechinterp.base.progress import no_progress
from mechinterp.base.shards import agree, current, from_first, share, sharing
from mechinterp.discovery.table_sums import sum_tables


class InThread:
    """One of several "processes" that are threads, and pass bytes on through queues."""

    def __init__(self, index: int, count: int, queues: list[Any], ends: list[Any]) -> None:
        self.index, self.count, self.queues, self.ends = index, count, queues, ends

    def relay(self, step: Callable[[bytes], bytes], /) -> bytes:
        own = step(self.queues[self.index].get(timeout=20) if self.index else b"")
        if self.index + 1 < self.count:
            self.queues[self.index + 1].put(own)
        else:
            for end in self.ends:
                end.put(own)
        return self.ends[self.index].get(timeout=20)


def together(count: int, run: Callable[[], Any]) -> list[Any]:
    """What `run` gives, or raises, in each of `count` processes."""
    queues, ends = ([queue.SimpleQueue() for _ in range(count)] for _ in range(2))
    found: list[Any] = [None] * count

    def one(index: int) -> None:
        with sharing(InThread(index, count, queues, ends)):
            try:
                found[index] = run()
            except Exception as error:
                found[index] = error

    threads = [threading.Thread(target=copy_context().run, args=(one, i)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


VALUES = torch.randn(23, 40, generator=torch.Generator().manual_seed(0))


def over_values(size: int) -> dict[str, torch.Tensor]:
    def some(batch: torch.Tensor, rows: slice) -> dict[str, torch.Tensor | float]:
        assert current().count == 1  # nothing inside is shared out again
        return {"sum": batch.sum(0), "rows": batch * rows.start, "n": float(len(batch))}

    return over_batches(VALUES, size, some, {"sum": "sum", "rows": 0, "n": "sum"})


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("size", [1, 4, 23])
def test_many_processes_sum_and_join_as_one_does(count: int, size: int) -> None:
    alone = over_values(size)
    for found in together(count, lambda: over_values(size)):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_the_order_of_these_sums_can_be_seen() -> None:
    first, second = (sum(rows) for rows in (VALUES[:11], VALUES[11:]))
    assert not torch.equal(first + second, over_values(1)["sum"])


def test_shares_are_neighbours_and_even() -> None:
    for n in range(12):
        for count in range(1, 6):
            shares = [list(share(n, index, count)) for index in range(count)]
            assert [i for some in shares for i in some] == list(range(n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_error_of_one_process_is_raised_in_all() -> None:
    def run() -> None:
        def some(batch: torch.Tensor, rows: slice) -> dict[str, torch.Tensor]:
            if rows.start == 16:
                raise TaskNotDone("not on the last one")
            return {"sum": batch.sum(0)}

        over_batches(VALUES, 8, some, {"sum": "sum"})

    for error in together(3, run):
        assert isinstance(error, TaskNotDone) and str(error) == "not on the last one"
    for error in together(2, lambda: agree(KeyError("a") if current().index else None)):
        assert "a" in str(error) and isinstance(error, (KeyError, RuntimeError))


def test_only_the_first_process_reads() -> None:
    read: list[int] = []

    def run() -> Any:
        return from_first(lambda: (read.append(current().count), {"x": torch.arange(3)})[1])

    assert all(torch.equal(found["x"], torch.arange(3)) for found in together(3, run)) and read == [1]
    assert together(2, lambda: from_first(lambda: None)) == [None, None]


def table_sums(checkpoint: Checkpoint = UNSAVED, fails_at: int | None = None) -> torch.Tensor:
    def piece(number: int) -> dict[str, torch.Tensor]:
        if number == fails_at:
            raise InputError("broken")
        return {"total": VALUES[number]}

    def add(sums: dict[str, torch.Tensor], number: int, found: dict[str, torch.Tensor]) -> None:
        sums["total"] += found["total"] * (number + 1)

    like, start = {"total": torch.zeros(40)}, {"total": torch.zeros(40, dtype=torch.float64)}
    return sum_tables(len(VALUES), piece, like, start, add, checkpoint, no_progress)["total"]


@pytest.mark.parametrize("count", [2, 4])
def test_tables_are_added_in_order_and_a_broken_run_goes_on(count: int, tmp_path: Any) -> None:
    alone, kept = table_sums(), Checkpoint(tmp_path / "state", "k")
    for error in together(count, lambda: table_sums(kept, fails_at=22)):
        assert isinstance(error, InputError)
    assert len(list(tmp_path.iterdir())) == count  # every process has kept its own
    assert all(torch.equal(found, alone) for found in together(count, lambda: table_sums(kept)))
    assert not list(tmp_path.iterdir())
