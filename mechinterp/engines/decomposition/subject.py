"""The model that is decomposed, as a tape with the totals of its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.engines.decomposition.closed_patterns import complete_totals
from mechinterp.engines.decomposition.decoder import decoder_tape, named_totals, recorded_sites, visible_keys
from mechinterp.engines.decomposition.tape import HEAD, Tape, gathered
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.layout import Dims
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs

TOLERANCE = 1e-4
"""The largest allowed error of an operation, as a share of its largest entry (half precision: 5e-2)."""


@dataclass(frozen=True)
class Pass:
    """One run of one batch: its tape, its totals, the keys that queries attend to, and the error of completeness."""

    tape: Tape
    totals: Mapping[str, Tensor]
    visible: Mapping[str, Bool[Tensor, "batch 1 query key"]]
    completeness: float


@runtime_checkable
class Subject(Protocol):
    """A model that can be decomposed."""

    @property
    def dims(self) -> Dims: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def name(self, site: Site) -> str:
        """The tape's name of a site. Raises InputError for a site that is not a value of the tape."""
        ...

    def read_at(self, pairs: Pairs) -> Int[Tensor, "batch n_at"]:
        """Where logits are read by default."""
        ...

    def run_pass(
        self,
        pairs: Pairs,
        at: Int[Tensor, "batch n_at"],
        columns: Int[Tensor, " n_columns"] | None,
        *,
        scores: bool,
        values: Mapping[Site, Tensor] | None = None,
    ) -> Pass:
        """The totals of a batch's clean prompts; `at` is where the logits are read."""
        ...


@dataclass(frozen=True)
class Decoder:
    """A causal model under a HookManager."""

    model: HookManager

    @property
    def dims(self) -> Dims:
        """Sizes of the model."""
        return self.model.dims

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return self.model.dtype

    def name(self, site: Site) -> str:
        """The tape's name of a site: the stream after a layer has the name of that before the next."""
        if site.kind == "resid_post":
            last = site.layer is None or site.layer + 1 == self.dims.n_layers
            return "resid_final" if last else f"resid_pre.{(site.layer or 0) + 1}"
        if site.kind in ("embed", "pos_embed", "final_norm", "pattern", "scores"):
            raise InputError(
                f"Contextual decomposition does not split the site '{site}'; use 'input', a head, an MLP, a neuron, or "
                "a site of the residual stream."
            )
        return str(site)

    def read_at(self, pairs: Pairs) -> Int[Tensor, "batch n_at"]:
        """Where logits are read: at the answer positions."""
        return pairs.answer_pos

    def run_pass(
        self,
        pairs: Pairs,
        at: Int[Tensor, "batch n_at"],
        columns: Int[Tensor, " n_columns"] | None,
        *,
        scores: bool,
        values: Mapping[Site, Tensor] | None = None,
    ) -> Pass:
        """One forward that records every value (unless they are given), and the check of every operation."""
        model = self.model
        tape = decoder_tape(model, columns, pairs.clean.shape[1], scores=scores)
        if values is None:
            values = record_all(model, pairs)
        totals = named_totals(dict(values), torch.promote_types(model.dtype, torch.float32))
        complete_totals(model, pairs, tape, totals)
        tolerance = TOLERANCE if model.dtype in (torch.float32, torch.float64) else 5e-2
        completeness = tape.check(totals, pairs.mask, tolerance)
        head_totals(tape, totals, at)
        visible = visible_keys(model, pairs, tape, totals, tolerance) if scores else {}
        return Pass(tape, totals, visible, completeness)


def head_totals(tape: Tape, totals: dict[str, Tensor], at: Int[Tensor, "batch n_at"]) -> None:
    """Adds the values from the final norm on, at the answer positions only."""
    for op in tape.operations:
        if op.output in HEAD:
            given = (totals[name] if name in HEAD else gathered(totals[name], at) for name in op.inputs)
            totals[op.output] = op.apply(list(given))


def record_all(model: HookManager, pairs: Pairs) -> dict[Site, Tensor]:
    """Every value of the tape in one forward of the clean prompts."""
    run: Any = model.run(pairs.clean, pairs.mask, record=recorded_sites(model), stop=Site("resid_final"))
    return {Site.parse(site) if isinstance(site, str) else site: value for site, value in run.values.items()}
