"""Work shared out among processes: each takes a part of the examples, and all of them get the whole result.

Every process runs the same program. Where examples are looped over (`over_batches`, and the sums of scores), each takes
a part of the batches; the results are then combined in the order of the batches, so that they are those of one process
to the last bit. What starts the processes and connects them is in `processes.py`; without it there is one, `ALONE`.
"""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar, runtime_checkable

from safetensors.torch import load, save
from torch import Tensor

from mechinterp.base import errors

Found = TypeVar("Found")
State = dict[str, Tensor]


@runtime_checkable
class Processes(Protocol):
    """The processes that share the work, as one of them sees them."""

    @property
    def index(self) -> int:
        """The number of this process, from 0. The first one writes files."""
        ...

    @property
    def count(self) -> int:
        """How many there are."""
        ...

    def relay(self, step: Callable[[bytes], bytes], /) -> bytes:
        """What the last process makes of what goes from process to process, each making something of it in turn.

        The first one is given nothing. All wait for the last. Raises ProcessLost if one of them is gone.
        """
        ...


class Alone:
    """One process, which does all of the work."""

    index, count = 0, 1

    def relay(self, step: Callable[[bytes], bytes], /) -> bytes:
        """What it makes of nothing."""
        return step(b"")


ALONE = Alone()
_CURRENT: ContextVar[Processes] = ContextVar("processes", default=ALONE)


def current() -> Processes:
    """The processes that share the work here."""
    return _CURRENT.get()


@contextmanager
def sharing(processes: Processes) -> Iterator[Processes]:
    """Inside the block these processes share the work; all of them must then do the same calls in the same order.

    >>> with sharing(ALONE) as processes:
    ...     processes.count
    1
    """
    before = _CURRENT.set(processes)
    try:
        yield processes
    finally:
        _CURRENT.reset(before)


def share(n: int, index: int, count: int) -> range:
    """Which of `n` pieces of work process `index` of `count` takes: neighbours, as many as the others or one more.

    >>> [list(share(5, index, 2)) for index in range(2)]
    [[0, 1], [2, 3, 4]]
    """
    return range(n * index // count, n * (index + 1) // count)


def agree(error: Exception | None = None) -> None:
    """Return None if no process has an error; otherwise all of them raise that of the first that has one."""
    own = b"" if error is None else json.dumps([type(error).__name__, str(error)]).encode()
    first = current().relay(lambda other: other or own)
    if error is not None and first == own:
        raise error
    if first:
        raise _error(*json.loads(first))


def _error(kind: str, text: str) -> Exception:
    """The error of another process, of the same kind where it is one of ours or a common one of Python."""
    if kind in ("ValueError", "RuntimeError", "ArithmeticError", "MemoryError", "ZeroDivisionError", "OverflowError"):
        return getattr(builtins, kind)(text)
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, errors.MechInterpError):
        return known(text)
    return RuntimeError(f"{kind}: {text}" if text else kind)


def from_first(compute: Callable[[], State | None]) -> State | None:
    """What the first process computes, in all of them: for what only one should read. Errors are raised in all."""
    if current().count == 1:
        return compute()
    found, error = None, None
    if current().index == 0:
        with sharing(ALONE):
            try:
                found = compute()
            except Exception as raised:  # raised in all processes by `agree`
                error = raised
    agree(error)
    content = b"" if found is None else save({name: value.contiguous() for name, value in found.items()})
    given = current().relay(lambda other: other if current().index else content)
    return load(given) if given else None


def relayed(step: Callable[[State], State]) -> State:
    """The tensors that go from process to process, each changing them in turn; all get the last. On the CPU."""
    if current().count == 1:
        return step({})

    def packed(given: bytes) -> bytes:
        found = step(load(given) if given else {})
        return save({name: value.cpu().contiguous() for name, value in found.items()})

    return load(current().relay(packed))


def computed(pieces: range, compute: Callable[[int], Found]) -> list[Found]:
    """What `compute` gives for the pieces of work of this process; an error of any process is raised in all."""
    found: list[Found] = []
    error = None
    with sharing(ALONE):
        try:
            found = [compute(piece) for piece in pieces]
        except Exception as raised:  # raised in all processes by `agree`
            error = raised
    agree(error)
    return found


def fold_shared(n: int, compute: Callable[[int], Found], add: Callable[[State, Found], State]) -> State:
    """What `add` makes of the results of `compute` for 0 to n - 1, in this order, beginning with nothing.

    The processes compute a part each. Memory: a process keeps its own results until its turn to add them; one that is
    alone keeps none.
    """
    processes = current()
    if processes.count == 1:
        state: State = {}
        for piece in range(n):
            state = add(state, compute(piece))
        return state
    own = computed(share(n, processes.index, processes.count), compute)

    def add_own(state: State) -> State:
        for found in own:
            state = add(state, found)
        return state

    return relayed(add_own)
