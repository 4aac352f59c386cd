"""Features of one dictionary in another: of another layer, site, seed, checkpoint or model of the same width.

No data is needed: features are matched by the cosine of what they write. A best match among thousands of directions is
never small, so it stands beside the best match in the same dictionary turned at random.

Sources: Laptev et al. 2025, feature flow (arXiv 2502.03032); Lindsey et al. 2024, crosscoders, whose lengths say in
which model or at which checkpoint a feature is; Ge et al. 2025 (arXiv 2509.17196).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx as nx
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.base.shown import Shown
from mechinterp.engines.grid import Grid, numbered
from mechinterp.features.addresses import by_name
from mechinterp.features.basis import Basis
from mechinterp.features.dictionary import Dictionary

CHUNK = 4096
"""Rows of a table of cosines that are held at a time."""
MOST_ASSIGNED = 20_000
"""Features up to which a one-to-one matching is searched, whose table is held as a whole."""
ORIGINS = ("new", "written", "carried", "both")
STREAM = ("resid_pre", "resid_mid", "resid_post", "resid_final")


@dataclass(frozen=True, eq=False, repr=False)
class FeatureMatches(Shown):
    """For every feature of one basis the feature of another that writes the most similar direction.

    Args:
        names: The names of the two bases.
        match: The number of the matching feature; -1: none (a direction of length 0, or left over one-to-one).
        cosine: The cosine of the two directions; NaN without a match.
        mutual: Whether it is the best match from the other side, too.
        chance: The 95 % quantile of the best cosines with the other basis turned by a random rotation.
    """

    names: tuple[str, str]
    match: Int[Tensor, " feature"]
    cosine: Float[Tensor, " feature"]
    mutual: Tensor
    chance: float

    @property
    def above_chance(self) -> float:
        """The share of features whose match is closer than 95 % of the best matches by chance."""
        return float((self.cosine > self.chance).double().mean())

    def to_frame(self) -> pd.DataFrame:
        """A row per feature: feature, match, cosine, mutual; the closest first."""
        frame = pd.DataFrame(
            {
                "feature": range(len(self.match)),
                "match": self.match.numpy(),
                "cosine": self.cosine.numpy(),
                "mutual": self.mutual.numpy(),
            }
        )
        return frame.sort_values("cosine", ascending=False, kind="stable", ignore_index=True)

    def _facts(self) -> list[tuple[str, object]]:
        return [
            ("", f"{self.names[0]} in {self.names[1]}"),
            ("median cosine", f"{float(self.cosine.nanmedian()):.3f}"),
            ("by chance below", f"{self.chance:.3f}"),
            ("above chance", f"{self.above_chance:.0%}"),
            ("mutual", f"{float(self.mutual.double().mean()):.0%}"),
        ]


Directions = Basis | Tensor


def match_features(a: Directions, b: Directions, *, one_to_one: bool = False, seed: int = 0) -> FeatureMatches:
    """The feature of `b` that writes the direction most similar to that of each feature of `a`.

    Args:
        a: A basis, or directions `[feature, d]`.
        b: Another of the same width. Bases of several sites are compared over all their sites together.
        one_to_one: Whether every feature of `b` is taken at most once, such that the cosines are largest in sum.
        seed: Of the random rotation that gives the chance level.

    Cost: a product of the two matrices, twice. Memory: 4,096 rows of it; one-to-one all of it.

    Raises InputError for other widths, UnsupportedError for a one-to-one matching of more than 20,000 features.

    >>> import torch
    >>> W = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    >>> match_features(W, W.flip(0)).match.tolist() == list(range(29, -1, -1))
    True
    """
    (x, name), (y, other) = _directions(a), _directions(b)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"'{name}' writes {x.shape[1]} numbers and '{other}' {y.shape[1]}; they cannot be compared.")
    rotation = _rotation(y, seed)
    cosine, match = _best(x, y)
    if one_to_one:
        if max(len(x), len(y)) > MOST_ASSIGNED:
            raise UnsupportedError(f"A one-to-one matching takes at most {MOST_ASSIGNED:,} features.")
        table = x @ y.T
        rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
        cosine, match = torch.full_like(cosine, torch.nan), torch.full_like(match, -1)
        match[rows] = torch.as_tensor(columns)
        cosine[rows] = table[rows, columns]
    back = _best(y, x)[1]
    mutual = (match >= 0) & (back[match.clamp(min=0)] == torch.arange(len(x)))
    dead = x.square().sum(1) == 0
    match, cosine = match.masked_fill(dead, -1), cosine.masked_fill(dead, torch.nan)
    by_chance = _best(x[~dead], y @ rotation)[0]
    chance = float(by_chance.quantile(0.95)) if len(by_chance) else torch.nan
    return FeatureMatches((name, other), match, cosine, mutual & ~dead, chance)


def _directions(given: Directions) -> tuple[Float[Tensor, "feature d"], str]:
    """(directions of length 1, or 0 where they are 0, on the CPU; a name)."""
    rows, name = (given, "directions") if isinstance(given, Tensor) else (given.writes().flatten(1), given.name)
    if rows.ndim != 2 or not len(rows) or not bool(rows.isfinite().all()):
        raise InputError(f"Directions are finite rows [feature, d]; got {list(rows.shape)}.")
    wide = rows.detach().cpu().to(torch.promote_types(rows.dtype, torch.float32))
    norm = wide.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, wide / torch.where(norm > 0, norm, 1), 0), name


def _best(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    found = [(rows @ y.T).max(1) for rows in x.split(CHUNK)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


@dataclass(frozen=True, eq=False, repr=False)
class FeatureFlow(Shown):
    """Where the features of the residual stream come from, layer by layer.

    Args:
        edges: A row per feature and source: downstream, upstream, source (the basis), cosine, above (whether it is
            closer than the threshold, by default the chance level of the two bases).
        origins: A row per feature of every residual stream after the first: feature, origin. `carried`: from the
            residual stream before; `written`: from an attention or MLP output between the two; `both`; `new`: none.
        chances: By pair of bases (upstream, downstream), the chance level.
        by_chance: The control: by origin the share of features that would have it if every source were turned by a
            random rotation of its own.
    """

    edges: pd.DataFrame
    origins: pd.DataFrame
    chances: dict[tuple[str, str], float]
    by_chance: dict[str, float]

    def graph(self) -> nx.DiGraph[str]:
        """The edges above chance, as a graph of features with the attribute `cosine`."""
        made = nx.DiGraph()
        for row in self.edges[self.edges["above"]].itertuples():
            made.add_edge(row.upstream, row.downstream, cosine=row.cosine)
        return made

    def _facts(self) -> list[tuple[str, object]]:
        n = len(self.origins)
        shares = [(kind, float((self.origins["origin"] == kind).sum()) / max(n, 1)) for kind in ORIGINS]
        shown = ((kind, f"{share:.0%} (by chance {self.by_chance[kind]:.0%})") for kind, share in shares)
        return [("", f"{n:,} features"), *shown]


def feature_flow(bases: Sequence[Basis], *, threshold: float | None = None, seed: int = 0) -> FeatureFlow:
    """From which feature of the layer before each feature of the residual stream comes, by what they write.

    Each residual stream is matched with the residual stream before it and with all bases in between (attention and MLP
    outputs). A feature that several sources could have written has several chances of a match that means nothing, so
    the shares of the origins stand beside those with every source turned at random (`by_chance`).

    Args:
        bases: Dictionaries of one model in the order of a run, at least two of the residual stream among them.
        threshold: The cosine from which a feature counts as the same; by default the chance level of the two bases.
        seed: Of the rotations that give the chance levels and the control.

    Cost: as `match_features`, per pair, and half of it for the control.

    Raises InputError for fewer than two residual streams.
    """
    by_name(bases)
    streams = [i for i, basis in enumerate(bases) if basis.sites_out[-1].kind in STREAM]
    if len(streams) < 2:
        raise InputError("A flow needs dictionaries of the residual stream at two places at least, in order.")
    rows: list[tuple[str, str, str, float, bool]] = []
    origins: list[tuple[str, str]] = []
    chances: dict[tuple[str, str], float] = {}
    counts = torch.zeros(len(ORIGINS), dtype=torch.long)
    turned = 0
    for first, last in pairwise(streams):
        own = bases[last]
        above = torch.zeros(last - first, own.n_features, dtype=torch.bool)
        control = above.clone()
        for k, source in enumerate(bases[first:last]):
            found = match_features(own, source, seed=seed)
            chances[source.name, own.name] = found.chance
            least = found.chance if threshold is None else threshold
            above[k] = found.cosine > least
            turned += 1
            control[k] = _turned_cosines(own, source, seed + turned) > least
            for i in (found.match >= 0).nonzero()[:, 0].tolist():
                up, down = f"{source.name}.f{int(found.match[i])}", f"{own.name}.f{i}"
                rows.append((down, up, source.name, float(found.cosine[i]), bool(above[k, i])))
        counts += (2 * control[0] + control[1:].any(0).long()).bincount(minlength=len(ORIGINS))
        carried, written = above[0], above[1:].any(0)
        for i in range(own.n_features):
            kind = ORIGINS[2 * int(carried[i]) + int(written[i])]
            origins.append((f"{own.name}.f{i}", kind))
    edges = pd.DataFrame(rows, columns=["downstream", "upstream", "source", "cosine", "above"])
    shares = (counts / counts.sum()).tolist()
    by_chance: dict[str, float] = {kind: share for kind, share in zip(ORIGINS, shares, strict=True)}
    return FeatureFlow(edges, pd.DataFrame(origins, columns=["feature", "origin"]), chances, by_chance)


def _turned_cosines(a: Directions, b: Directions, seed: int) -> Float[Tensor, " feature"]:
    """The best cosine of every feature of one basis in another that is turned at random; NaN for length 0."""
    (x, _), (y, _) = _directions(a), _directions(b)
    return _best(x, y @ _rotation(y, seed))[0].masked_fill(x.square().sum(1) == 0, torch.nan)


def _rotation(rows: Float[Tensor, "feature d"], seed: int) -> Float[Tensor, "d d"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[1], generator=generator, dtype=rows.dtype)).Q


def feature_strengths(basis: Dictionary) -> Grid:
    """How strongly each feature of a crosscoder is in every model, checkpoint or site: the length of what it writes.

    Axes feature and output, in units of the site. Lengths that an L1 penalty has shrunk to 0 may be artefacts: a
    feature that is weak in one model can be lost in it although it is there.

    Args:
        basis: A crosscoder, or another dictionary of several outputs.

    Raises InputError for a basis of one output.

    Source: Lindsey et al. 2024; over checkpoints Ge et al. 2025 (arXiv 2509.17196).
    """
    norms = basis.decoder_norms().double().cpu()
    if norms.shape[1] < 2:
        raise InputError(f"'{basis.name}' has one output; strengths compare several models, checkpoints or sites.")
    labels = {"feature": numbered(len(norms)), "output": tuple(map(str, basis.keys_out))}
    return Grid(norms, labels, "norm", "", {"analysis": "feature strengths", "basis": basis.name})
