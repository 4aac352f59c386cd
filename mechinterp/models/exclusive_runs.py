"""Only one thread runs a model at a time, and what a run changes on the model is undone when the run ends.

A run changes a model: it adds hooks, replaces the `forward` of layers that it skips, and sets evaluation mode. Each
change is noted in the run's `Turn` before it is made, and has an effect only while that turn is the innermost one in
progress: anything that an interrupt leaves behind does nothing, and the next run removes it. This state belongs to the
model, so several managers of one model share it.
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
    """The current users of a model: nested runs, and the blocks of edits around them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.users: list[Turn | Block] = []
        """In order of arrival; the thread of the first one has the model."""
        self.turns: list[Turn] = []
        """The runs in progress, the innermost one last."""

    def __reduce__(self) -> tuple[Callable[[Any], Use], tuple[Any]]:
        return use_of, (self.model,)  # a copy of a model has no users yet

    def edits(self) -> list[Any]:
        """The edits of all blocks that this thread is inside, outer blocks first."""
        me = threading.current_thread()
        blocks = [user for user in list(self.users) if isinstance(user, Block) and user.thread is me]
        return [edit for block in blocks if block.in_progress for edit in block.edits]

    def claim(self, user: Turn | Block, name: str) -> None:
        """Give the model to the user's thread and remove users that are done. Raises BusyError while another has it.

        This uses no lock, which an interrupt could leave locked: the first user in the list wins.
        """
        self.users.append(user)
        before = [other for other in list(self.users) if other is user or other.in_progress]
        if before[0].thread is not user.thread:
            self.users.remove(user)
            raise BusyError(f"{name} is being run by another thread. Load it once per thread, or take turns.")
        for other in reversed(list(self.users)):
            if other is not user and not other.in_progress:
                other.clear()


# Not an attribute of the model, which stays unchanged, nor of a manager, since there may be several.
_USES: weakref.WeakValueDictionary[int, Use] = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


def use_of(bridge: Any) -> Use:
    """The one `Use` of a bridge's model; it exists as long as a manager refers to it."""
    model = getattr(bridge, "original_model", bridge)
    with _OPENING:
        found = _USES.get(id(model))
        if found is None:
            found = _USES[id(model)] = Use(model)  # it refers to the model, so the id cannot be reused
        return found


class Turn(Restored):
    """One run of a model: `with Turn(...) as turn, turn:`. Gradients are as before when it ends.

    `frame` is the frame of the function that runs the model: the run is in progress while it is on its thread's stack.
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
        """Undoes each change; noted before the change is made, and safe to call more than once."""

    @property
    def acting(self) -> bool:
        """Whether this is the innermost run, it is in progress, and the current thread is the one that runs it.

        A turn whose end was lost to an interrupt is not in progress: its changes have no effect, even if the model is
        then called directly.
        """
        turns = self.use.turns
        innermost = bool(turns) and turns[-1] is self and self.thread.ident == threading.get_ident()
        return innermost and self.in_progress

    @property
    def in_progress(self) -> bool:
        """Whether the function that runs is still on its thread's stack."""
        frame = sys._current_frames().get(self.thread.ident or 0)  # pyright: ignore[reportPrivateUsage]
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def change(self) -> None:
        """Start the turn. Raises BusyError while another thread has the model."""
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
        """Undo every change of the run to the model, then end the turn, so that another thread may begin."""
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
        self.undo.clear()  # its hooks refer to this turn: with the cycle, the run's memory would wait for the collector

    def hook(self, module: Any, function: Callable[..., Any]) -> OwnHook:
        """The function as a hook that acts in this run only, to be registered on the module; it will be removed."""
        own = OwnHook(self, function)
        self.undo.append(partial(own.remove_from, module))
        return own

    def replace_forward(self, module: Any, forward: Callable[..., Any]) -> None:
        """Let a module compute `forward` in this run; nested runs use the module's own."""
        own = module.forward

        def either(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if self.acting else own(*args, **kwargs)

        self.undo.append(partial(_set_forward, module, vars(module).get("forward")))
        vars(module)["forward"] = either


class OwnHook:
    """A hook of one run; it has no effect in any other run."""

    def __init__(self, turn: Turn, function: Callable[..., Any]) -> None:
        self.turn, self.function = turn, function

    def __call__(self, *args: Any, hook: Any = None) -> Any:
        return self.function(*args) if self.turn.acting else None

    def remove_from(self, module: Any) -> None:
        """Remove the hook from a module or hook point, even if its registration was interrupted."""
        hooks = module._forward_hooks  # PyTorch returns a handle only at the end
        for key, found in list(hooks.items()):
            if found is self or getattr(found, "__name__", "") == repr(self):  # the name of TransformerLens's wrapper
                hooks.pop(key, None)
        if hasattr(module, "fwd_hooks"):
            module.fwd_hooks[:] = [handle for handle in module.fwd_hooks if handle.user_hook is not self]


class _LocksOwnExit:
    """`__exit__` of a block is that of its lock, which is C code and cannot be interrupted halfway.

    `with` looks it up before it enters the block.
    """

    def __get__(self, block: Block | None, kind: type[Block]) -> Callable[..., None]:
        return (lambda block, *error: block.lock.__exit__(*error)) if block is None else block.lock.__exit__


class Block:
    """Edits that every run inside a `with` block applies, as long as the block's lock is held."""

    def __init__(self, use: Use, name: str, edits: tuple[Any, ...], value: Any) -> None:
        self.use, self.name, self.edits, self.value = use, name, edits, value
        self.thread = threading.current_thread()
        self.lock = threading.Lock()

    @property
    def in_progress(self) -> bool:
        """Whether the block has been entered and not left yet."""
        return self.lock.locked() and self.thread.is_alive()

    def clear(self) -> None:
        """Forget the block."""
        if self in self.use.users:
            self.use.users.remove(self)

    def __enter__(self) -> Any:
        if self.lock.locked():
            raise InputError("This `intervene` block is entered already; call `intervene` again for a new one.")
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
    """Restore a module's own `forward`, or that of its class."""
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward
