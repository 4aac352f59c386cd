"""Directions of a concept: found from clean against corrupt prompts, read, steered and analysed as a feature basis.

The positive class are the clean prompts, the negative class the corrupt ones. Whether a direction separates prompts
that it was not fitted on, better than its controls, is `probe_directions`'s question (`probes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.base.batches import batches
from mechinterp.base.errors import InputError
from mechinterp.features.dictionary import Dictionary
from mechinterp.features.direction_fits import fit_direction
from mechinterp.features.subspaces import direction_basis
from mechinterp.graphs.token_positions import take_positions
from mechinterp.models.components import BY_QUERY, Position, position_index
from mechinterp.models.direction_readout import DirectionReadout
from mechinterp.models.feature_basis import BasisSource
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import GLOBAL_SITES, Site
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.source import TaskSource

PER_HEAD = ("q", "k", "v", "z")


@dataclass(frozen=True, eq=False)
class Direction:
    """One direction at one site: a feature basis with one feature, and how it was found.

    The feature's activation is the reading: 0 is the boundary between the classes, and their means (on the prompts of
    the fit) are 1 apart. So `add_features(direction.basis, {0: 1.0})` moves a negative prompt to the positive mean,
    `set_features` clamps the reading, `scale_features` scales and `ablate_features` removes it.

    Args:
        basis: The basis.
        position: Where in each prompt it was found.
        method: How it was found.
        about: More about it: task, digest of the pairs, settings.
    """

    basis: Dictionary
    position: Position = -1
    method: str = "given"
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def site(self) -> Site:
        """Where it is."""
        return self.basis.sites_in[0]

    @property
    def read(self) -> Float[Tensor, " d"]:
        """What is read: the reading is `x @ read - offset`."""
        return self.basis.reads()[0]

    @property
    def write(self) -> Float[Tensor, " d"]:
        """What raises the reading by 1 when it is added to the value."""
        return self.basis.writes()[0]

    @property
    def offset(self) -> float:
        """What is subtracted from `x @ read`."""
        return float(self.basis.b_dec[0].double() @ self.read.double())

    @property
    def sha256(self) -> str:
        """Of the basis: its site and numbers."""
        return self.basis.sha256

    def reading(self, values: Float[Tensor, "*axes d"]) -> Float[Tensor, "*axes"]:
        """The reading of values at the site; positive = the positive class."""
        return self.basis.encode(values).values[..., 0]

    def pairs(self, pairs: Pairs) -> Pairs:
        """The same prompts without answers, read at the direction's position: for a model of `read_direction`."""
        return read_pairs(pairs, self.position)

    def __repr__(self) -> str:
        return f"Direction({self.site} at {self.position}, {self.method}, sha256 {self.sha256[:12]})"


def orient_pairs(pairs: Pairs, positive: int | None = None) -> Pairs:
    """The same pairs with the prompts of one answer as the clean ones: from a task to a concept.

    In many tasks the clean prompt is of either class (singular or plural, he or she), and the corrupt one of the other.
    A difference of clean and corrupt means is then the difference of nothing. Here pairs whose right answer is the
    other one are exchanged.

    Args:
        pairs: Pairs with one right and one wrong answer, the same two tokens in all of them.
        positive: Which of the two is the right answer of the clean prompts; by default the lower token id.

    Raises InputError for pairs with other answers.

    >>> import mechinterp as mi
    >>> pairs = mi.load_task("subject_verb_agreement").pairs(mi.load_model("bundled"), n=8)
    >>> len(pairs.right.unique()), len(mi.orient_pairs(pairs).right.unique())
    (2, 1)
    """
    found = two_answers(pairs)
    if found is None:
        raise InputError(
            "The pairs do not have the same two answers, so there are no two classes of answers; the clean prompts are "
            "the positive class as they are."
        )
    if positive is not None and positive not in found:
        raise InputError(f"The answers of the pairs are tokens {found[0]} and {found[1]}; got {positive}.")
    assert pairs.right is not None
    return pairs.exchanged(pairs.right[:, 0] != (found[0] if positive is None else positive))


def read_pairs(pairs: Pairs, position: Position, positive: int | None = None) -> Pairs:
    """The prompts as a direction is read on them: without answers, at one position; their source says so.

    Args:
        pairs: The pairs.
        position: Where the direction is read.
        positive: Prompts with this right answer become the clean ones, see `orient_pairs`; by default they stay.
    """
    oriented = pairs if positive is None else orient_pairs(pairs, positive)
    read, source = oriented.read_at(position_index(oriented, position)), pairs.source
    if not isinstance(source, TaskSource):
        return read
    stated = source.positive if positive is None else positive
    return read.from_source(replace(source, read_at=str(position), positive=stated))


def two_answers(pairs: Pairs) -> tuple[int, int] | None:
    """The two tokens that are the answers of all pairs, each right in some and wrong in the others; None otherwise."""
    if pairs.right is None or pairs.wrong is None or pairs.right.shape[1] != 1 or pairs.wrong.shape[1] != 1:
        return None
    found = torch.cat([pairs.right, pairs.wrong]).unique(sorted=True).tolist()
    return (found[0], found[1]) if len(found) == 2 else None


def find_direction(
    model: HookManager,
    pairs: Pairs,
    site: str | Site,
    position: Position = -1,
    method: str = "mean-difference",
    *,
    batch_size: int | None = None,
    **settings: Any,
) -> Direction:
    """The direction from the corrupt to the clean prompts at one site and position.

    The clean prompts must be one class and the corrupt ones the other; `orient_pairs` makes them so.

    Args:
        model: The model.
        pairs: Clean (positive) and corrupt (negative) prompts to fit it on.
        site: A site of one vector per token: a residual stream, `mlp_out.3`, `attn_out.3`, `mlp_post.3`.
        position: Where in each prompt it is read.
        method: `mean-difference`, `logistic`, `lda`, `leace`, `pca` or `contrast-pairs`; see `fit_direction`.
        batch_size: Examples at a time; by default all.
        settings: Parameters of the method.

    Cost: two forwards up to the site.

    Raises InputError for a site that is not one vector per token, an unknown method, and prompts that do not differ
    there.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.orient_pairs(mi.load_task("subject_verb_agreement").pairs(model, n=16))
    >>> direction = mi.find_direction(model, pairs, "resid_pre.3", "end")
    >>> steered = model.run(pairs.corrupt, pairs.mask, interventions=[mi.add_features(direction.basis, {0: 1.0})])
    """
    place = vector_site(model, site)
    values = direction_values(model, pairs, [place], [position], batch_size=batch_size)
    return direction_of(place, position, *values[place, position], method, pairs, model, **settings)


def given_direction(
    site: str | Site, vector: Float[Tensor, " d"], *, read: Float[Tensor, " d"] | None = None, offset: float = 0.0
) -> Direction:
    """A direction that is already known, such as a row of a dictionary: `vector` is what it writes.

    Args:
        site: Where.
        vector: What raises the reading by 1.
        read: What is read, with `read @ vector` = 1; by default `vector / |vector|^2`.
        offset: The reading that counts as 0.
    """
    if vector.ndim != 1 or not bool(vector.isfinite().all()) or not bool(vector.any()):
        raise InputError(f"A direction must be a vector [d] that is finite and not 0; got shape {list(vector.shape)}.")
    own = vector / vector.double().square().sum().to(vector) if read is None else read
    return Direction(direction_basis(site, own, vector, offset))


def read_direction(model: HookManager, direction: Direction) -> DirectionReadout:
    """The model up to the direction's site, with the reading in place of the logits: its metric is `direction`.

    Every discovery method, evaluation and analysis then explains the direction instead of a logit. Give them
    `direction.pairs(pairs)`: the prompts without answers, read at the direction's position.

    - `build_graph(readout)` ends at the site, and the node `logits` is the reading;
    - `metric="direction"` is the reading, in units of the direction;
    - `direct_logit_attribution(readout, pairs, 0)`: what every head and MLP writes along it (they add up to it);
    - `path_patching(readout, pairs, metric="direction")`: the effect of each sender on it;
    - `save_circuit(path, circuit, model=readout)` names the file of a direction that `load_direction` has read, so
      that the circuit verifies from its files alone.

    Args:
        model: The model. It is shared, not copied.
        direction: A direction at a residual stream (`resid_pre`, `resid_post` or `resid_final`).

    Raises InputError for another site, and for `resid_pre.0`, before which there is nothing.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> pairs = mi.orient_pairs(mi.load_task("subject_verb_agreement").pairs(model, n=8))
    >>> direction = mi.find_direction(model, pairs, "resid_pre.3", "end")
    >>> readout = mi.read_direction(model, direction)
    >>> own = direction.pairs(pairs)
    >>> scores = mi.score_edges(readout, mi.build_graph(readout), own, method="eap", metric="direction")
    """
    file = direction.about.get("file")
    return DirectionReadout(model, direction.site, direction.read, direction.offset, direction.sha256, file)


def vector_site(model: HookManager, site: str | Site) -> Site:
    """The site, which must be one vector per token that the model has. Raises InputError otherwise."""
    place = Site.parse(site) if isinstance(site, str) else site
    if place.kind in BY_QUERY or place.kind in PER_HEAD:
        raise InputError(
            f"'{place}' is not one vector per token; a direction is at a residual stream, an attention or MLP output "
            "('attn_out.3', 'mlp_out.3') or the neurons ('mlp_post.3')."
        )
    model.resolve(place)
    return place


def vector_sites(model: HookManager, sites: str | Sequence[str | Site]) -> tuple[Site, ...]:
    """The sites: a list of them, or one kind (`resid_pre`) in every layer."""
    if isinstance(sites, str) and "." not in sites and sites not in GLOBAL_SITES:
        sites = [Site(sites, layer) for layer in range(model.dims.n_layers)]
    listed = [sites] if isinstance(sites, (str, Site)) else list(sites)
    found = tuple(vector_site(model, site) for site in listed)
    if not found or len(set(found)) != len(found):
        raise InputError("Name at least one site, and each one once.")
    return found


def direction_values(
    model: HookManager,
    pairs: Pairs,
    sites: Sequence[Site],
    positions: Sequence[Position],
    *,
    batch_size: int | None = None,
) -> dict[tuple[Site, Position], tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]]:
    """(values of the clean prompts, of the corrupt ones) per site and position, in float32 or better.

    Cost: two forwards, up to the last site. Memory: the recorded sites of one batch.
    """
    index = {position: position_index(pairs, position) for position in positions}
    found: dict[tuple[Site, Position], tuple[list[Tensor], list[Tensor]]] = {
        (site, position): ([], []) for site in sites for position in positions
    }
    for rows, batch in batches(pairs, batch_size):
        for side, tokens in enumerate((batch.clean, batch.corrupt)):
            values = model.run(tokens, batch.mask, record=sites).values
            for site, position in found:
                at = index[position][rows, None].to(values[site].device)
                own = take_positions(values[site].expand(len(tokens), -1, -1), at)[:, 0]
                found[site, position][side].append(own.to(torch.promote_types(own.dtype, torch.float32)))
    return {key: (torch.cat(clean), torch.cat(corrupt)) for key, (clean, corrupt) in found.items()}


def direction_of(
    site: Site,
    position: Position,
    positive: Float[Tensor, "n d"],
    negative: Float[Tensor, "m d"],
    method: str,
    pairs: Pairs,
    model: HookManager,
    **settings: Any,
) -> Direction:
    """The direction of values that are already there, with what is recorded about it."""
    fit = fit_direction(positive, negative, method, **settings)
    about = {"pairs": pairs.digest(), "examples": len(pairs), "model": model.info.name, "settings": dict(settings)}
    source = BasisSource(format=method, about={"pairs": pairs.digest(), "position": str(position)})
    return Direction(direction_basis(site, fit.read, fit.write, fit.offset, source=source), position, method, about)


def tokens_at(pairs: Pairs, position: Position) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """The token ids of the clean and of the corrupt prompts at a position."""
    at = position_index(pairs, position)[:, None]
    return pairs.clean.gather(1, at)[:, 0], pairs.corrupt.gather(1, at)[:, 0]
