"""What happens at a hook point in one run: edit the value, take its gradient, record it, stop."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from mechinterp.base.errors import InputError, clip
from mechinterp.base.shown import Shown
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.past import Past
from mechinterp.models.placement import on_device
from mechinterp.models.sites import Site
from mechinterp.models.texts import Prompts

SiteLike = Site | str | FeatureBasis
"""A Site, its text (`z.3`), or a raw TransformerLens hook name (`blocks.3.attn.hook_z`); or a feature basis, whose
value is the activations of its features, `[batch, pos, feature]`."""
SiteName = SiteLike | tuple[str, int]
"""A SiteLike, or its kind and layer: `("pattern", 5)`."""

MOST_SHOWN = 4
"""Recorded sites that a `Run` shows when it is printed."""

OfValue = Callable[[Tensor], Tensor]
Edit = OfValue | Callable[[Tensor, "Hook"], Tensor]
"""`edit(value)`, or `edit(value, hook)` as in TransformerLens."""


@dataclass(frozen=True)
class Hook:
    """Where an edit acts: the second argument of an edit `(value, hook)`.

    Args:
        name: TransformerLens's name of the hook point, such as `blocks.3.attn.hook_z`.
        site: The site as the caller wrote it.
    """

    name: str
    site: SiteName

    def layer(self) -> int:
        """The layer of the hook point. Raises InputError for one outside the layers."""
        found = re.match(r"blocks\.([0-9]+)\.", self.name)
        if found is None:
            raise InputError(f"The hook point {self.name!r} is in no layer.")
        return int(found[1])


@dataclass(frozen=True)
class Intervention:
    """An edit at one site, of its value, of its gradient in the backward pass, or of both.

    Args:
        site: A Site, its text (`z.3`), a TransformerLens hook name, or a feature basis (its activations are edited,
            the error of its reconstruction stays).
        value: Maps the activation to a new one of the same shape, dtype and device; or the new one itself. A function
            of two arguments also gets the `Hook`. It gets a copy of the activation, which it may change in place: the
            tensor itself may be the value of other sites, too (`resid_post.0` and `resid_pre.1`).
        grad: Maps the gradient at the site to a new one of the same shape, dtype and device; a copy, alike.
        reading: Of a basis with one input site: whether what the basis reads is edited, not its activations. The site
            itself keeps its value. What edited activations add is then relative to those of the edited input.

    Raises InputError when neither `value` nor `grad` is given, and for `reading` of anything but such a basis.

    >>> Intervention("z.3", lambda value: 0 * value).site
    'z.3'
    """

    site: SiteName
    value: Edit | Tensor | None = None
    grad: Edit | None = None
    reading: bool = False

    def __post_init__(self) -> None:
        if self.value is None and self.grad is None:
            raise InputError(f"The intervention at '{self.site}' has no edit; give `value` or `grad`.")
        if self.reading and (isinstance(self.site, (str, Site, tuple)) or len(self.site.sites_in) != 1):
            raise InputError(
                f"`reading` edits what a basis with one input site reads; '{self.site}' is not such a basis."
            )


@dataclass(frozen=True, eq=False)
class EditAt:
    """An edit that acts on every token alike, or on the tokens of a mask only.

    Args:
        site: Where, for messages.
        change: Maps the value of any number of tokens to a new one; each token's depends on that token's value only.
        mask: Where it acts, `[prompt, pos]`; None: everywhere.
        grows: Whether the run may have more tokens than the mask, on which it does not act: tokens that are generated.
    """

    site: Any
    change: OfValue
    mask: Tensor | None = None
    grows: bool = False

    def __call__(self, value: Tensor) -> Tensor:
        new = self.change(value)
        if self.mask is None:
            return new
        mask = self.mask.to(value.device)
        times, rest = divmod(len(value), len(mask))
        missing = value.shape[1] - mask.shape[1]
        if rest or missing < 0 or (missing and not self.grows):
            raise InputError(
                f"The edit at '{self.site}' is for {len(mask)} prompts of {mask.shape[1]} tokens; the run has "
                f"{list(value.shape[:2])}."
            )
        mask = torch.nn.functional.pad(mask, (0, missing)).repeat(times, 1)
        return torch.where(mask.reshape(*mask.shape, *[1] * (value.ndim - 2)), new, value)

    def of(self, rows: Tensor, length: int, first: int) -> EditAt:
        """The edit for some of the prompts, `length` tokens long, in a run that begins with token `first`.

        Raises InputError for prompts that the mask does not have.
        """
        if self.mask is None:
            return self
        if int(rows.max()) >= len(self.mask) or length > self.mask.shape[1]:
            raise InputError(
                f"The edit at '{self.site}' is for {len(self.mask)} prompts of {self.mask.shape[1]} tokens; got prompt "
                f"{int(rows.max())} of {length} tokens."
            )
        return replace(self, mask=self.mask[rows.to(self.mask.device), :length][:, first:], grows=True)


def as_interventions(
    given: Iterable[Intervention] | Mapping[Any, Edit | Tensor],
) -> list[Intervention]:
    """Interventions from a list of them or from a mapping of sites to edits."""
    if isinstance(given, Mapping):
        edits = cast("Mapping[SiteName, Edit | Tensor]", given)
        return [Intervention(site, value) for site, value in edits.items()]
    return list(given)


@dataclass(frozen=True)
class BoundEdit:
    """An intervention as a run applies it: at a plain site, with functions of the value (or gradient) alone."""

    site: SiteLike
    value: OfValue | Tensor | None = None
    grad: OfValue | None = None
    reading: bool = False


def bound(intervention: Intervention, site: SiteLike, name: str) -> BoundEdit:
    """The intervention at `site` (hook `name`) as functions of the value alone; one that takes the hook has it."""
    hook, value = Hook(name, intervention.site), intervention.value
    return BoundEdit(
        site,
        value if value is None or isinstance(value, Tensor) else _of_value(value, hook),
        None if intervention.grad is None else _of_value(intervention.grad, hook),
        intervention.reading,
    )


def _of_value(edit: Edit, hook: Hook) -> OfValue:
    """The edit as a function of the value alone, which works on a copy (1 to 3 % of a run with an edit at every
    site)."""
    if isinstance(edit, EditAt):  # generation asks it where it acts
        return replace(edit, change=_on_copy(edit.change))
    function = cast("Callable[..., Tensor]", edit)
    if not _takes_hook(function, hook.site):
        return _on_copy(function)
    return _on_copy(partial(function, hook=hook) if _by_name(function) else partial(_with_second, function, hook))


def _on_copy(function: OfValue) -> OfValue:
    """The function of a copy; the value itself if it changed nothing."""

    def of_copy(value: Tensor) -> Tensor:
        copy = value.clone()
        new = function(copy)
        unchanged = new is copy and not copy.is_inference() and copy._version == 0
        return value if unchanged else new

    return of_copy


def _with_second(function: Callable[..., Tensor], hook: Hook, value: Tensor) -> Tensor:
    return function(value, hook)


def _parameters(edit: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that can be given by position, or are named `hook`; none if Python does not know them."""
    try:
        known = inspect.signature(edit).parameters.values()
    except (TypeError, ValueError):  # functions written in C, such as torch.relu
        return []
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in known if p.kind in by_position or p.name == "hook"]


def _by_name(edit: Callable[..., Any]) -> bool:
    return any(p.name == "hook" and p.kind is not inspect.Parameter.POSITIONAL_ONLY for p in _parameters(edit)[1:])


def _takes_hook(edit: Callable[..., Any], site: SiteName) -> bool:
    """Whether an edit is `(value, hook)`: it needs a second argument, or has one named `hook`."""
    if isinstance(edit, FunctionType) and not hasattr(edit, "__wrapped__"):  # most edits, a hundred in some runs
        code = edit.__code__
        needed = code.co_argcount - len(edit.__defaults__ or ())
        if needed == 1 and not code.co_kwonlyargcount and "hook" not in code.co_varnames[1 : code.co_argcount]:
            return False
    parameters = _parameters(edit)
    needed = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    if len([name for name in needed if name != "hook"]) > 2 - ("hook" in needed):
        raise InputError(
            f"The edit at {site!s} needs {len(needed)} arguments ({', '.join(needed)}); an edit takes (value) or "
            "(value, hook). Fix the others with functools.partial."
        )
    return len(needed) == 2 or any(p.name == "hook" for p in parameters[1:])


@dataclass(frozen=True, repr=False, eq=False)
class Run(Shown):
    """The results of one run of a model, as `HookManager.run` returns them.

    Args:
        logits: `[batch, pos, d_vocab]` (with `at`: `[batch, n_at, d_vocab]`), None if the run was stopped early.
        values: The recorded values, keyed by the sites (or feature bases) as they were given.
        grads: The gradients, keyed in the same way.
        loss: The value of the loss, detached, if one was given.
        past: The keys and values, if they were kept.
        prompts: What the texts became, if texts were given: tokens, mask, and whether a BOS token was put before them.
        same_as: Maps any name of a site to the one name that all its names share.

    `run["z.1"]`, `run["z", 1]` and `run["blocks.1.attn.hook_z"]` are the same recorded value.
    """

    logits: Tensor | None
    values: Mapping[Any, Tensor]
    grads: Mapping[Any, Tensor]
    loss: Tensor | None = None
    past: Past | None = None
    prompts: Prompts | None = None
    same_as: Callable[[Any], str] = field(default=str, repr=False)

    def __getitem__(self, name: SiteName | tuple[str, int, str]) -> Tensor:
        """The recorded value at a site, under any of its names.

        Args:
            name: As for `record`: `"z.1"`, `("z", 1)`, a Site, or a hook name of TransformerLens, also in its short
                forms (`("post", 1)`, `("scale", 1, "ln1")`).

        Raises InputError for a site that was not recorded, and for what is not the name of a site.
        """
        if name in self:
            wanted = self.same_as(name)
            return next(value for key, value in self.values.items() if self.same_as(key) == wanted)
        known = ", ".join(str(key) for key in self.values) or "none"
        raise InputError(
            f"{name!s} was not recorded in this run; give record=[{name!r}], or use model.cache, which records every "
            f"site. Recorded: {clip(known, 300)}."
        )

    def __contains__(self, name: object) -> bool:
        """Whether the site was recorded. Raises InputError for what is not the name of a site of the model."""
        wanted = self.same_as(name)
        return any(self.same_as(key) == wanted for key in self.values)

    def __iter__(self) -> NoReturn:
        raise InputError("A run is one object: run.logits, run['z', 1]; run.values holds what was recorded.")

    def keys(self) -> tuple[Any, ...]:
        """The sites that were recorded, as they were given."""
        return tuple(self.values)

    def _facts(self) -> list[tuple[str, str]]:
        facts = [] if self.prompts is None else [("of", repr(self.prompts))]
        facts.append(("logits", "none: stopped early" if self.logits is None else str(list(self.logits.shape))))
        for name, values in (("recorded", self.values), ("grads", self.grads)):
            shown = [f"{site} {list(value.shape)}" for site, value in list(values.items())[:MOST_SHOWN]]
            more = [f"and {len(values) - MOST_SHOWN} more"] if len(values) > MOST_SHOWN else []
            facts += [(name, ", ".join(shown + more))] if shown else []
        if self.loss is not None:
            facts.append(("loss", f"{float(self.loss.sum()):.4g}"))
        return facts


class Stopped(BaseException):
    """Ends a forward at the stop site; not an Exception, so that model code cannot catch it by accident."""


@dataclass
class Point:
    """Everything that happens at one hook point in one run; `names` are the sites as the caller wrote them."""

    names: list[SiteLike] = field(default_factory=list[SiteLike])
    edits: list[BoundEdit] = field(default_factory=list[BoundEdit])
    record: bool = False
    grad: bool = False
    stop: bool = False
    fired: int = 0
    tap: Tensor | None = None
    value: Tensor | None = None
    end: Tensor | None = None
    """The value at the stop site, to which a loss may be applied."""
    later: int = 0
    """How many of the names are of a basis that writes here after it has written elsewhere."""

    @property
    def only_later(self) -> bool:
        """Whether all that is asked of it are later writes of bases, which a run may stop before."""
        return self.later == len(self.names)


def fire(point: Point, value: Tensor, main: torch.device | None = None) -> Tensor | None:
    """The new value at a hook point that fires (None: unchanged), after editing, recording and perhaps stopping.

    All of it is on the main device; the new value goes back to where the layer is.
    """
    point.fired += 1
    if point.fired > 1:
        return None  # reported after the run, with the count
    here = value if main is None else on_device(value, main)
    new = here
    for edit in point.edits:
        if edit.value is not None:
            before = new
            new = edit.value if isinstance(edit.value, Tensor) else edit.value(before)
            _check_edit(edit.site, before, new)
    if point.grad or (point.stop and torch.is_grad_enabled()):
        new = tap(new)
        point.tap = new
    if torch.is_grad_enabled():  # after the tap, so that the tap receives the edited gradient
        for edit in reversed(point.edits):
            new = new if edit.grad is None else _EditGradient.apply(tap(new), edit)
    if point.record:
        point.value = new.detach()
    if point.stop:
        point.end = new
        raise Stopped
    return None if new is here else on_device(new, value.device)


class Carry:
    """Completes an edit at a hook that sees one of two branches: its change is added where the branches join.

    TransformerLens's `hook_resid_mid` is the input of the second norm only; the residual stream bypasses it.
    """

    def __init__(self, point: Point, main: torch.device | None = None) -> None:
        self.point, self.main, self.change = point, main, None

    def at_branch(self, value: Tensor) -> Tensor | None:
        """Fires the point and keeps the change (zero when only gradients are taken, but differentiable)."""
        new = fire(self.point, value, self.main)
        self.change = None if new is None else new - value
        return new

    def at_sum(self, value: Tensor) -> Tensor | None:
        """The sum of the branches with the change added."""
        return None if self.change is None else value + self.change


def tap(value: Tensor) -> Tensor:
    """A tensor equal to `value`, for the rest of the run to use, at which a gradient can be taken."""
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()


class _EditGradient(torch.autograd.Function):
    """The identity, with an edited gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, edit: Intervention) -> Tensor:
        ctx.edit = edit
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        new = ctx.edit.grad(gradient)
        _check_edit(ctx.edit.site, gradient, new)
        return new, None


def _check_edit(site: SiteLike, before: Tensor, after: Any) -> None:
    if not isinstance(after, Tensor):
        raise InputError(f"The edit at '{site}' returned {type(after).__name__}; it must return the new tensor.")
    if (after.shape, after.dtype, after.device) != (before.shape, before.dtype, before.device):
        raise InputError(
            f"The edit at '{site}' must keep shape, dtype and device: got {list(after.shape)} {after.dtype} "
            f"{after.device}, expected {list(before.shape)} {before.dtype} {before.device}."
        )
