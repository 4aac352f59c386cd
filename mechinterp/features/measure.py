"""How well a feature basis fits a model: reconstruction and activity on prompts, and why it might not fit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.features.activations import Identity
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import Dictionary
from mechinterp.models.components import as_pairs
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.task import load_task

logger = logging.getLogger(__name__)
TEXT = (
    "The river had risen during the night, and by morning the old bridge was under water. Nobody in the village was "
    "surprised. Anna counted the sheep twice, wrote the number in her notebook, and went to find her brother.",
    "In 1969 two astronauts walked on the Moon while a third waited in orbit. Their computer had less memory than a "
    "modern washing machine; it failed twice during the landing, and the engineers in Houston told them to go on.",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\nThis function raises an error if the list is empty, so check its length first.",
)
WORST = 0.9
"""A fraction of variance unexplained from which a dictionary is hardly better than the mean of the prompts."""
USUAL = "Usual reasons: another model or hook point, a transposed matrix, a scale not folded in, a missing BOS."
MOST_TOKENS = 64
"""Tokens (or one prompt) on which it is tried where else a basis would fit: every site of the model is a try."""
MLP = ("mlp_in", "resid_mid", "resid_pre", "mlp_out", "mlp_raw")
RESIDUAL = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Measured:
    """How a basis does on prompts, over all real tokens but the first of each prompt.

    Args:
        basis: The name of the basis.
        fvu: The fraction of variance unexplained: squared error over squared distance from the mean; NaN for one layer
            of a cross-layer transcoder, which reconstructs nothing by itself.
        fvu_with_first: The same with the first tokens, whose vectors are often of another size.
        l0: Features active per token, on average.
        active: Features that are active on any token.
        features: Features in all.
        tokens: How many tokens were read.
    """

    basis: str
    fvu: float
    fvu_with_first: float
    l0: float
    active: int
    features: int
    tokens: int

    def __repr__(self) -> str:
        return (
            f"Measured({self.basis}: {self.fvu:.3f} of the variance unexplained, {self.l0:.1f} of {self.features:,} "
            f"features active per token, {self.active:,} on any of {self.tokens:,} tokens)"
        )

    def to_frame(self) -> pd.DataFrame:
        """The numbers as one row."""
        return pd.DataFrame([asdict(self)])


def measure_basis(
    model: HookManager, basis: Basis, prompts: Pairs | Int[Tensor, "batch pos"] | None = None
) -> Measured:
    """The reconstruction and activity of a basis on prompts.

    Args:
        model: The model.
        basis: The basis, at sites that the model has.
        prompts: Pairs (their clean prompts) or token ids; by default a built-in text, through the model's tokenizer.

    Cost: one forward. Raises InputError for a basis of another width, or without prompts for a model that has no
    tokenizer.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> measured = mi.measure_basis(model, mi.load_basis("bundled:resid_pre.2"))
    >>> measured.fvu < 0.1
    True
    """
    pairs = default_prompts(model) if prompts is None else as_pairs(prompts).to(model.device)
    values = _record(model, pairs, (*basis.sites_in, *basis.sites_out), basis)
    return _measured(basis, values, pairs.mask)


def default_prompts(model: HookManager) -> Pairs:
    """The prompts on which a basis is measured if none are given. Raises InputError without a tokenizer."""
    if model.info.origin == "bundled":
        return load_task("ioi").pairs(model, n=32, seed=0).to(model.device)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(
            "The model has no tokenizer to read the built-in text with; give prompts as token ids (check=tokens), or "
            "check=False to use the basis unmeasured."
        )
    start = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    rows = [start + list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXT]
    width = min(max(map(len, rows)), model.dims.n_ctx)
    rows = [row[:width] for row in rows]
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return as_pairs(tokens, mask).to(model.device)


def check_basis(model: HookManager, basis: Basis, prompts: Pairs | Tensor | None = None) -> Measured | None:
    """The measurement of a basis that fits. Raises InputError for one that does not, with what would fit.

    A subspace, concept, identity or supervised dictionary is not expected to reconstruct any text, so only its sites
    and width are compared.
    """
    check_sites_of(model, basis)
    linear = isinstance(basis, Dictionary) and isinstance(basis.activation, Identity)
    if linear or basis.kind in ("neurons", "supervised"):
        return None
    found = measure_basis(model, basis, prompts)
    silent, dense = found.l0 == 0, found.l0 > found.features / 2
    poor = found.fvu >= WORST or (dense and found.fvu > 0.5)
    if not silent and not poor:
        _warn_if_elsewhere_is_better(model, basis, found, prompts)
        return found
    what = "no feature is active" if silent else f"{found.l0:.1f} of {found.features:,} features are active per token"
    raise InputError(
        f"The basis '{basis.name}' does not fit {model.info.name}: {found.fvu:.2f} of the variance of "
        f"'{basis.sites_out[0]}' is unexplained, and {what}. {_diagnosis(model, basis, found, prompts)}"
    )


def check_set(model: HookManager, bases: Sequence[Basis], prompts: Pairs | Tensor | None = None) -> None:
    """Return None when the layers of a cross-layer transcoder together reconstruct every site that they all write to.

    One layer alone is only a part of a sum. Raises InputError, naming the worst site.
    """
    pairs = default_prompts(model) if prompts is None else as_pairs(prompts).to(model.device)
    sites = list(dict.fromkeys(site for basis in bases for site in (*basis.sites_in, *basis.sites_out)))
    values = model.run(pairs.clean, pairs.mask, record=sites).values
    decoded = [basis.decode(basis.encode(values[basis.sites_in[0]])) for basis in bases]
    real = pairs.mask & (pairs.mask.cumsum(1) > 1)
    worst = ("", 0.0)
    for site in dict.fromkeys(basis.sites_out[0] for basis in bases):
        total = sum(parts[site][real] for parts in decoded if site in parts)
        assert isinstance(total, Tensor)
        fvu = _fvu([(values[site][real], total)])
        worst = max(worst, (str(site), fvu), key=lambda one: one[1])
    if worst[1] >= WORST:
        raise InputError(
            f"The cross-layer transcoder does not fit {model.info.name}: {worst[1]:.2f} of the variance of "
            f"'{worst[0]}' is unexplained by all its layers together. {USUAL} check=False loads it unmeasured."
        )


def check_sites_of(model: HookManager, basis: Basis) -> None:
    """Return None when the model has the sites of the basis, in its widths. One forward of one token.

    Raises InputError or UnsupportedError otherwise.
    """
    model.resolve(basis)
    values = model.run([[0]], record=list(dict.fromkeys((*basis.sites_in, *basis.sites_out)))).values
    read = {site: values[site] for site in basis.sites_in}
    decoded = basis.decode(basis.encode(next(iter(read.values())) if len(read) == 1 else read))
    for site in basis.sites_out:
        if decoded[site].shape != values[site].shape:
            got, has = decoded[site].shape[-1], values[site].shape[-1]
            raise InputError(f"The basis '{basis.name}' writes vectors of {got} numbers to '{site}', which has {has}.")


def _record(model: HookManager, pairs: Pairs, sites: Sequence[Site], basis: Basis) -> Mapping[Site, Tensor]:
    if isinstance(basis, Dictionary) and basis.models:
        raise InputError(f"The basis '{basis.name}' reads several models, so one model cannot measure it.")
    run = model.run(pairs.clean, pairs.mask, record=list(dict.fromkeys(sites)))
    return {site: value for site, value in run.values.items() if isinstance(site, Site)}


def _measured(basis: Basis, values: Mapping[Site, Tensor], mask: Bool[Tensor, "batch pos"]) -> Measured:
    read = {site: values[site] for site in basis.sites_in}
    features = basis.encode(next(iter(read.values())) if len(read) == 1 else read)
    real = mask.clone()
    first = mask.cumsum(1) == 1
    real &= ~first
    active = features.values[real] != 0
    partial = isinstance(basis, Dictionary) and basis.cross_layer
    fvu = with_first = float("nan")
    if not partial:
        decoded = basis.decode(features)
        parts = [(values[site], decoded[site]) for site in basis.sites_out]
        fvu, with_first = (_fvu([(y[rows], hat[rows]) for y, hat in parts]) for rows in (real, mask))
    return Measured(
        basis.name,
        fvu,
        with_first,
        float(active.sum(-1).double().mean()),
        int(active.any(0).sum()),
        basis.n_features,
        int(real.sum()),
    )


def _fvu(parts: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Of pairs (value, reconstruction): squared error over squared distance from the mean of the tokens."""
    error = sum(float((y.double() - hat.double()).square().sum()) for y, hat in parts)
    spread = sum(float((y.double() - y.double().mean(0)).square().sum()) for y, _ in parts)
    return error / spread if spread > 0 else float("inf")


def _mistakes(basis: Dictionary, values: Mapping[Site, Tensor]) -> Iterator[tuple[str, Dictionary]]:
    """(what would be said about it, the basis) for the usual mistakes other than the site."""
    if basis.W_dec.shape[1:] == (1, basis.W_enc.shape[1]):
        words = "not " * basis.subtract_b_dec
        yield f"with b_dec {words}subtracted from the input", replace(basis, subtract_b_dec=not basis.subtract_b_dec)
    if basis.normalize == "none":
        seen = values[basis.sites_in[0]]
        width = basis.W_enc.shape[1]
        length = float(seen.reshape(*seen.shape[:2], -1).double().norm(dim=-1)[:, 1:].mean())
        scales = {"sqrt(d)": width**0.5, "1 / sqrt(d)": width**-0.5}
        scales["sqrt(d) / mean length"] = width**0.5 / max(length, 1e-9)
        for words, factor in scales.items():
            yield f"with input_scale={factor:.4g} ({words})", basis.with_input_scale(factor)
    if basis.W_enc.shape[1:] == basis.W_dec.shape[::2] and basis.W_enc.shape[1] == basis.n_features:
        enc, dec = basis.W_enc.transpose(1, 2), basis.W_dec.transpose(0, 2)
        yield "with its encoder transposed", replace(basis, W_enc=enc)
        yield "with its decoder transposed", replace(basis, W_dec=dec)
        yield "with its encoder and decoder transposed", replace(basis, W_enc=enc, W_dec=dec)


def _elsewhere(
    model: HookManager, basis: Dictionary, values: Mapping[Site, Tensor]
) -> Iterator[tuple[str, dict[Site, Tensor]]]:
    """(what would be said about it, the values that the basis would get) for other sites of the same width."""
    own_in, own_out = basis.sites_in[0], basis.sites_out[0]
    if own_in == own_out:
        for site, value in values.items():
            if site != own_in:
                yield f"at site='{site}'", {own_in: value}
        return
    for layer in range(model.dims.n_layers):
        for read in (Site("mlp_in", layer), Site("resid_mid", layer), Site("resid_pre", layer)):
            for written in (Site("mlp_out", layer), Site("mlp_raw", layer)):
                if read in values and written in values and (read, written) != (own_in, own_out):
                    about = f"at site='{read}', site_out='{written}'"
                    yield about, {own_in: values[read], own_out: values[written]}


def _sites_to_try(model: HookManager, basis: Dictionary, near: bool) -> list[Site]:
    """Where else a basis might belong: every layer, or only its own and the two beside it."""
    kinds = RESIDUAL if basis.sites_in == basis.sites_out else MLP
    sites = [Site(kind, layer) for kind in kinds for layer in range(model.dims.n_layers)]
    wide = basis.W_enc.shape[1] == model.dims.d_model == basis.W_dec.shape[2]
    own = [*basis.sites_in, *basis.sites_out]
    if near:
        home = basis.sites_in[0].layer or 0
        sites = [site for site in sites if abs((site.layer or 0) - home) <= 1]
    return [*own, *(site for site in sites if wide and model.has(site) and site not in own)]


def _best(model: HookManager, basis: Dictionary, prompts: Any, *, all_mistakes: bool) -> tuple[str, float]:
    """(what would fit best, its fraction of variance unexplained)."""
    pairs = default_prompts(model) if prompts is None else as_pairs(prompts).to(model.device)
    enough = int((pairs.lengths.cumsum(0) < MOST_TOKENS).sum()) + 1
    pairs = pairs[: min(len(pairs), enough)]
    values = _record(model, pairs, _sites_to_try(model, basis, near=not all_mistakes), basis)
    tries = [(about, basis, seen) for about, seen in _elsewhere(model, basis, values)]
    if all_mistakes:
        tries += [(about, changed, dict(values)) for about, changed in _mistakes(basis, values)]
    best = ("", float("inf"))
    for about, changed, seen in tries:
        measured = _measured(changed, seen, pairs.mask)
        if measured.l0 and measured.fvu < best[1]:
            best = (about, measured.fvu)
    return best


def _diagnosis(model: HookManager, basis: Basis, found: Measured, prompts: Any) -> str:
    if not isinstance(basis, Dictionary) or len(basis.sites_in) > 1 or len(basis.sites_out) > 1:
        return USUAL
    about, fvu = _best(model, basis, prompts, all_mistakes=True)
    if fvu < 0.5 * min(found.fvu, WORST):
        return f"It would fit {about}, where {fvu:.2f} is unexplained; check=False loads it unmeasured."
    pairs = default_prompts(model) if prompts is None else as_pairs(prompts).to(model.device)
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if bos is not None and not bool((pairs.clean[:, 0] == bos).all()) and pairs.clean.shape[1] < model.dims.n_ctx:
        tokens = torch.cat([torch.full_like(pairs.clean[:, :1], bos), pairs.clean], 1)
        mask = torch.cat([torch.ones_like(pairs.mask[:, :1]), pairs.mask], 1)
        again = measure_basis(model, basis, as_pairs(tokens, mask))
        if again.fvu < 0.5 * min(found.fvu, WORST):
            return (
                f"With a BOS token in front of the prompts {again.fvu:.2f} is unexplained: measure it on such prompts."
            )
    return f"{USUAL} None of those that can be tried here fits; check=False loads it unmeasured."


def _warn_if_elsewhere_is_better(model: HookManager, basis: Basis, found: Measured, prompts: Any) -> None:
    if not isinstance(basis, Dictionary) or found.fvu < 0.1 or len(basis.sites_out) > 1 or len(basis.sites_in) > 1:
        return
    about, fvu = _best(model, basis, prompts, all_mistakes=False)
    if fvu < found.fvu / 2:
        logger.warning(
            "The basis '%s' leaves %.2f of the variance unexplained; %s it would leave %.2f. Is its site right?",
            basis.name, found.fvu, about, fvu,
        )  # fmt: skip
