"""The processes that `torchrun` started, connected by torch.distributed (gloo, which needs no GPU)."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch

from mechinterp.base.errors import InputError, ProcessLost
from mechinterp.base.shards import ALONE, Processes, sharing

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun (or `srun` with these variables) tells every process."""
PATIENCE = timedelta(hours=24)
"""How long a process waits for the others; one that has died is noticed at once."""
LOST = (
    "another process of this run has ended (torchrun says which one, and how). What was finished is kept: the same "
    "command goes on from there."
)


class Torchrun:
    """One of the processes of a run, in a ring of gloo connections."""

    def __init__(self, store: Any, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.distributed: Any = torch.distributed
        with _noticing():
            self.distributed.init_process_group(
                "gloo", store=self.distributed.PrefixStore("mechinterp", store), rank=index, world_size=count,
                timeout=PATIENCE,
            )  # fmt: skip

    def relay(self, step: Callable[[bytes], bytes], /) -> bytes:
        """What the last process makes of what goes from process to process."""
        with _noticing():
            given = self._receive() if self.index else b""
        own = step(given)
        last = self.count - 1
        with _noticing():
            if self.index < last:
                self._send(own)
            size = torch.tensor(len(own))
            self.distributed.broadcast(size, last)
            content = _tensor(own) if self.index == last else torch.empty(int(size), dtype=torch.uint8)
            if len(content):
                self.distributed.broadcast(content, last)
        return content.numpy().tobytes()

    def _receive(self) -> bytes:
        size = torch.tensor(0)
        self.distributed.recv(size, self.index - 1)
        content = torch.empty(int(size), dtype=torch.uint8)
        if len(content):
            self.distributed.recv(content, self.index - 1)
        return content.numpy().tobytes()

    def _send(self, content: bytes) -> None:
        self.distributed.send(torch.tensor(len(content)), self.index + 1)
        if content:
            self.distributed.send(_tensor(content), self.index + 1)


_STORE: ContextVar[Any] = ContextVar("store", default=None)
"""Where the processes of this run meet; it outlives the connections, so that an error can be said once."""


def first_to_say(text: str) -> bool:
    """Whether no other process of this run has said this yet, so that it is printed once."""
    store = _STORE.get()
    with suppress(Exception):  # the store may be gone with its process; then it is said
        return store is None or store.add(f"said {hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    return True


def _tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


@contextmanager
def _noticing() -> Iterator[None]:
    """Turns what torch.distributed raises where a connection is closed into ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(LOST) from error


def device_of_process(device: str | None) -> str | None:
    """The device for this process: `cuda` becomes its own GPU of this machine.

    >>> device_of_process("cpu")
    'cpu'
    """
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if device == "cuda" and local is not None else device


@contextmanager
def torchrun_processes() -> Iterator[Processes]:
    """The processes that torchrun started, which share the work inside the block; without it, this one alone.

    Raises InputError if only some of its variables are set, ProcessLost if another process ends early.
    """
    given = [name for name in NEEDED if name in os.environ]
    if len(given) < 2 or os.environ.get("WORLD_SIZE") == "1":
        yield ALONE
        return
    if missing := [name for name in NEEDED if name not in given]:
        raise InputError(
            f"{', '.join(given)} are set, as by torchrun, but not {', '.join(missing)}; start the run with torchrun, "
            "or unset them."
        )
    distributed: Any = torch.distributed
    with _noticing():
        store, index, count = next(distributed.rendezvous("env://", timeout=timedelta(minutes=10)))

    def stop(number: int, frame: Any) -> None:
        raise ProcessLost(LOST)  # torchrun ends the others when one has died

    before = signal.signal(signal.SIGTERM, stop)
    _STORE.set(store)
    processes = Torchrun(store, index, count)
    try:
        with sharing(processes):
            yield processes
    finally:
        signal.signal(signal.SIGTERM, before)
        with suppress(Exception):  # the connections of a dead process cannot be closed in order
            distributed.destroy_process_group()
