"""Whose turn it is on a model: one thread runs it at a time, and what a run changes on it ends with the run.

A run changes a model: it adds hooks, replaces the `forward` of layers that it skips, and sets evaluation mode. All of
it is noted in the run's `Turn` before it is done, and acts only while that turn is the innermost one in progress: what
an interrupt left behind does nothing, and the next run takes it away. This state belongs to the model, so that several
managers of one model share it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from mechinterp.base.errors import BusyError, InputError
from mechinterp.models.modes import EvalMode, Restored


class Use:
    """Who uses a model now: runs, one within the other, and the blocks of edits they are in."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.users: list[Turn | Block] = []
        """In the order in which they came; the first one's thread has the model."""
        self.turns: list[Turn] = []
        """The runs in progress, the innermost one last."""

    def __reduce__(self) -> tuple[Callable[[Any], Use], tuple[Any]]:
        return use_of, (self.model,)  # a copy of a model is used by nobody

    def edits(self) -> list[Any]:
        """The edits of all blocks of this thread in force, outer ones first."""
        me = threading.current_thread()
        blocks = [user for user in list(self.users) if isinstance(user, Block) and user.thread is me]
        return [edit for block in blocks if block.in_progress for edit in block.edits]

    def claim(self, user: Turn | Block, name: str) -> None:
        """Give the model to the user's thread and clear away what is over. Raises BusyError while another has it.

        Without a lock, as an interrupt could leave it locked: whoever is in the list first wins.
        """
        self.users.append(user)
        before = [other for other in list(self.users) if other is user or other.in_progress]
        if before[0].thread is not user.thread:
            self.users.remove(user)
            raise BusyError(f"{name} is being run by another thread. Load it once per thread, or take turns.")
        for other in reversed(list(self.users)):
            if other is not user and not other.in_progress:
                other.clear()


# Not an attribute of the model, which is left as it was; nor of a manager, as there may be several.
_USES: weakref.WeakValueDictionary[int, Use] = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


def use_of(bridge: Any) -> Use:
    """The one state of use of a bridge's model, as long as somebody (a manager) keeps it."""
    model = getattr(bridge, "original_model", bridge)
    with _OPENING:
        found = _USES.get(id(model))
        if found is None:
            found = _USES[id(model)] = Use(model)  # which keeps the model, so the id stays its own
        return found


class Turn(Restored):
    """One run of a model: `with Turn(...) as turn, turn:`. Gradients are as before when it ends.

    `frame` is the frame of the function that runs: as long as it is on its thread's stack, the run is in progress.
    """

    def __init__(
        self, use: Use, bridge: Any, name: str, frame: FrameType | None, gradients: bool | None = None
    ) -> None:
        self.use, self.bridge, self.name = use, bridge, name
        self.frame = frame
        self.thread = threading.current_thread()
        self.gradients, self.gradients_before = gradients, torch.is_grad_enabled()
        self.modes: EvalMode | None = None
        self.undo: list[Callable[[], None]] = []
        """What takes away each change, noted before the change is made; may be called again and again."""

    @property
    def acting(self) -> bool:
        """Whether this is the innermost run in progress, and it is this thread that asks."""
        turns = self.use.turns
        return bool(turns) and turns[-1] is self and self.thread.ident == threading.get_ident()

    @property
    def in_progress(self) -> bool:
        """Whether the function that runs is still on its thread's stack."""
        frame = sys._current_frames().get(self.thread.ident or 0)  # pyright: ignore[reportPrivateUsage]
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def change(self) -> None:
        """Take the turn. Raises BusyError while another thread has it."""
        if self not in self.use.users:
            self.use.claim(self, self.name)
        if self not in self.use.turns:
            self.use.turns.append(self)
        if self.gradients is not None:
            torch.set_grad_enabled(self.gradients)
        if self.modes is None:
            self.modes = EvalMode(self.bridge)
        self.modes.change()

    def change_back(self) -> None:
        """End the turn: the model and the gradient mode are as they were."""
        torch.set_grad_enabled(self.gradients_before)
        self.clear()

    def clear(self) -> None:
        """Take away all that the run changed on the model. The turn ends last: then another thread may begin."""
        if self not in self.use.users:
            return
        for undo in reversed(self.undo):
            undo()
        if self.modes is not None:
            self.modes.change_back()
        if self in self.use.turns:
            self.use.turns.remove(self)
        self.use.users.remove(self)
        self.frame = None

    def hook(self, module: Any, function: Callable[..., Any]) -> OwnHook:
        """The function as a hook of this run alone, to be registered on the module; it is certain to be removed."""
        own = OwnHook(self, function)
        self.undo.append(partial(own.remove_from, module))
        return own

    def replace_forward(self, module: Any, forward: Callable[..., Any]) -> None:
        """Let a module compute `forward` in this run; runs within it see the module's own."""
        own = module.forward

        def either(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if self.acting else own(*args, **kwargs)

        self.undo.append(partial(_set_forward, module, vars(module).get("forward")))
        vars(module)["forward"] = either


class OwnHook:
    """A hook of one run: without effect in any other."""

    def __init__(self, turn: Turn, function: Callable[..., Any]) -> None:
        self.turn, self.function = turn, function

    def __call__(self, *args: Any, hook: Any = None) -> Any:
        return self.function(*args) if self.turn.acting else None

    def remove_from(self, module: Any) -> None:
        """Take the hook off a module or hook point, also where registering it was interrupted."""
        hooks = module._forward_hooks  # PyTorch gives a handle only when it is done
        for key, found in list(hooks.items()):
            if found is self or getattr(found, "__name__", "") == repr(self):  # TransformerLens's wrapper is named so
                hooks.pop(key, None)
        if hasattr(module, "fwd_hooks"):
            module.fwd_hooks[:] = [handle for handle in module.fwd_hooks if handle.user_hook is not self]


class _LocksOwnExit:
    """`__exit__` of a block: that of its lock, which is C code and cannot be interrupted before it has done its work.

    `with` takes it before it enters.
    """

    def __get__(self, block: Block | None, kind: type[Block]) -> Callable[..., None]:
        return (lambda block, *error: block.lock.__exit__(*error)) if block is None else block.lock.__exit__


class Block:
    """Edits that every run inside a `with` sees. They are in force as long as the block's lock is held."""

    def __init__(self, use: Use, name: str, edits: tuple[Any, ...], value: Any) -> None:
        self.use, self.name, self.edits, self.value = use, name, edits, value
        self.thread = threading.current_thread()
        self.lock = threading.Lock()

    @property
    def in_progress(self) -> bool:
        """Whether the block was entered and not left."""
        return self.lock.locked() and self.thread.is_alive()

    def clear(self) -> None:
        """Forget the block."""
        if self in self.use.users:
            self.use.users.remove(self)

    def __enter__(self) -> Any:
        if self.lock.locked():
            raise InputError("This block of edits is entered already; call `intervene` again for another one.")
        self.clear()
        self.thread = threading.current_thread()
        try:
            self.lock.acquire()
            self.use.claim(self, self.name)
            return self.value
        except BaseException:
            if self.lock.locked():
                self.lock.release()
            raise

    if TYPE_CHECKING:

        def __exit__(self, *_: object) -> None: ...

    else:
        __exit__ = _LocksOwnExit()


def _set_forward(module: Any, forward: Any) -> None:
    """Give a module back the `forward` of its own that it had, or that of its class."""
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward
