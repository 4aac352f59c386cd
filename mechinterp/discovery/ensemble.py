"""`ensemble`: the scores of several methods combined; and `ensemble_scores`, for scores that are there already.

Source: ensembling in the MIB shared task (BlackboxNLP 2025, arXiv 2511.18409), whose best entry combined the scores of
several methods. Each member is scored with its own settings; then, for every edge (or node), `how`:

* `rank`: the weighted mean over members of the place of its magnitude among the member's, from 1 (the strongest) down
  to 1/n; its sign is that of the weighted vote: the sum of weight x sign x place, and + in a tie. A magnitude below
  1e-4 of the member's strongest has place 0, so that rounding decides no place.
* `mean`: the weighted mean of the scores as they are. For members in one unit.
* `calibrated`: the weighted mean of the scores, each divided by the root mean square of its member's scores; 0 stays 0.

Weights count as shares of their sum. The result does not depend on the order of the members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.registry import unknown
from mechinterp.base.settings import Number, Parameter, Setting, check_settings, unknown_setting
from mechinterp.discovery.method import METHODS, REPLACEMENT, Job, Method, check_graph, score_edges
from mechinterp.graphs.graph import Graph
from mechinterp.graphs.scores import Scores

NAME = "ensemble"
FINEST = 1e-4
"""Magnitudes below this share of a member's strongest have no place."""
MOST_MEMBERS = 16


def _places(units: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """The signed place of every unit's magnitude, from 1 down to 1/n; equal ones share the mean of their places."""
    size = units.abs()
    counted = size > FINEST * size.max()
    out = torch.zeros_like(units)
    _, inverse, counts = size[counted].unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    middle = last - (counts.double() - 1) / 2
    out[counted] = (middle / max(1, int(counted.sum())))[inverse] * units[counted].sign()
    return out


def _rank(members: Float[Tensor, "member unit"], shares: Float[Tensor, " member"]) -> Float[Tensor, " unit"]:
    places = torch.stack([_places(member) for member in members])
    vote = (shares[:, None] * places).sum(0)
    return (shares[:, None] * places.abs()).sum(0) * torch.where(vote.abs() < 1e-12, 1.0, vote.sign())


def _mean(members: Float[Tensor, "member unit"], shares: Float[Tensor, " member"]) -> Float[Tensor, " unit"]:
    return (shares[:, None] * members).sum(0)


def _calibrated(members: Float[Tensor, "member unit"], shares: Float[Tensor, " member"]) -> Float[Tensor, " unit"]:
    size = members.square().mean(1, keepdim=True).sqrt()
    return _mean(members / size.clamp(min=torch.finfo(members.dtype).tiny), shares)


HOW: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"rank": _rank, "mean": _mean, "calibrated": _calibrated}
_HOW = Setting("calibrated", "how the members' scores are combined", choices=tuple(HOW))


def ensemble_scores(
    scores: Sequence[Scores], *, how: str = "calibrated", weights: Sequence[Number] | None = None
) -> Scores:
    """The scores of several methods combined into one; positive = the edge helps.

    The result is that of method `ensemble` with these members, which `verify --rescore` repeats from a file. No run of
    the model. `cost` is that of all members together.

    Raises InputError for fewer than 2 or more than 16 members, members of different graphs, metrics, replacements or
    examples, bad weights, and a member whose scores are all 0.

    Args:
        scores: The members.
        how: "calibrated", "rank" or "mean".
        weights: One weight for each member, at least 0; by default all the same.

    >>> import mechinterp as mi
    >>> model = mi.load_model("bundled")
    >>> graph, pairs = mi.build_graph(model), mi.load_task("ioi").pairs(model, n=2)
    >>> members = [mi.score_edges(model, graph, pairs, method=name) for name in ("relp", "cd-edges")]
    >>> mi.ensemble_scores(members).parameters["methods"]
    'relp,cd-edges'
    """
    members = list(scores)
    _HOW.check("how", how)
    _check_alike(members)
    shares = _shares(weights, len(members))
    graph, first = members[0].graph, members[0]
    at = tuple(graph.first_of_unit.T)
    units = torch.stack([member.values.cpu().double()[at] for member in members])
    for member, own in zip(members, units, strict=True):
        if not bool((own != 0).any()):
            raise InputError(f"Method {member.method!r} scores every edge 0, so it has no say; leave it out.")
    combined = HOW[how](units, shares)
    table = torch.zeros(graph.possible.shape, dtype=torch.promote_types(first.total.dtype, torch.float32))
    table[graph.possible] = combined[graph.unit[graph.possible]].to(table.dtype)
    costs = [member.cost for member in members]
    return Scores(
        graph,
        table * first.count,
        first.count,
        NAME,
        first.metric,
        first.replacement,
        {
            "methods": ",".join(_text(member) for member in members),
            "how": how,
            "weights": "" if weights is None else ",".join(f"{float(weight):.15g}" for weight in weights),
            "replacement": first.replacement,
        },
        {name: sum(cost.get(name, 0) for cost in costs) for name in dict.fromkeys(n for cost in costs for n in cost)},
        additive=how == "mean" and all(member.additive for member in members),
        pairs=first.pairs,
    )


def ensemble_samples(
    graph: Graph, samples: Float[Tensor, "resample member edge"], how: str, weights: Sequence[Number] | None
) -> Float[Tensor, "resample edge"]:
    """The combined scores of every resample, from those of the members; edges in the order of `Graph.edge_names`."""
    shares = _shares(weights, samples.shape[1])
    unit = graph.unit[graph.possible]
    first = torch.zeros(graph.n_units, dtype=torch.int64).scatter_(0, unit.flip(0), torch.arange(len(unit)).flip(0))
    return torch.stack([HOW[how](units, shares)[unit] for units in samples.double()[:, :, first]])


def members_asked(asked: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What to ask of `score_edges` for every member; None for another method, and if a member's scores do not add up.

    Where all add up over examples, the ensemble of a resample is that of the members' weighted sums.
    """
    if asked.get("method") != NAME:
        return None
    own = ENSEMBLE.defaults | {name: value for name, value in asked.items() if name in ENSEMBLE.settings}
    members = parse_members(str(own["methods"]))
    if not all(METHODS.get(name).additive for name, _ in members):
        return None
    shared = {name: value for name, value in asked.items() if name not in ("method", "methods", "how", "weights")}
    return [{**shared, **given, "method": name} for name, given in members]


def _check_alike(members: list[Scores]) -> None:
    if not 2 <= len(members) <= MOST_MEMBERS:
        raise InputError(f"An ensemble has 2 to {MOST_MEMBERS} members; got {len(members)}.")
    first = members[0]
    for other in members[1:]:
        for what, a, b in (
            ("graphs", first.graph.digest(), other.graph.digest()),
            ("metrics", first.metric, other.metric),
            ("replacements", first.replacement, other.replacement),
            ("numbers of examples", first.count, other.count),
            ("examples", first.pairs and first.pairs.digest(), other.pairs and other.pairs.digest()),
        ):
            if a != b and (what != "examples" or (a and b)):  # scores from a file do not know their examples
                raise InputError(f"The members of an ensemble must be scored alike; these have different {what}.")


def _shares(weights: Sequence[Number] | None, n: int) -> Float[Tensor, " member"]:
    given = torch.ones(n, dtype=torch.float64) if weights is None else torch.tensor(list(weights), dtype=torch.float64)
    if len(given) != n or not bool((torch.isfinite(given) & (given >= 0)).all()) or not float(given.sum()) > 0:
        raise InputError(f"Give {n} weights, one weight a member, at least 0 and not all 0; got {given.tolist()}.")
    return given / given.sum()


def _text(scores: Scores) -> str:
    """The member as setting `methods` names it: the method, and its settings that are not the defaults."""
    if scores.method == NAME:
        raise InputError("An ensemble cannot be a member of another; combine the members in one.")
    usual = METHODS.get(scores.method).defaults
    own = {name: value for name, value in scores.parameters.items() if name != "replacement"}
    for name in own:
        if name not in usual:
            raise InputError(
                f"The scores of {scores.method!r} have {name}={own[name]}, which is not one of its settings, so an "
                "ensemble of them could not be repeated; combine scores as score_edges gives them."
            )
    changed = [f":{name}={_plain(value)}" for name, value in own.items() if value != usual[name]]
    return scores.method + "".join(changed)


def _plain(value: Parameter) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_members(text: str) -> list[tuple[str, dict[str, Parameter]]]:
    """(method, its settings) of every member that the setting `methods` names.

    Raises InputError for an unknown method or setting, a value out of bounds, and fewer than 2 or more than 16 members.

    >>> parse_members("eap,eap-ig:steps=3:schedule=left")
    [('eap', {}), ('eap-ig', {'steps': 3, 'schedule': 'left'})]
    """
    parts = text.split(",")
    if not 2 <= len(parts) <= MOST_MEMBERS:
        raise InputError(f"methods must name 2 to {MOST_MEMBERS} methods, separated by commas; got {text[:60]!r}.")
    found: list[tuple[str, dict[str, Parameter]]] = []
    for part in parts:
        name, *settings = part.strip().split(":")
        if name == NAME or name not in METHODS:
            raise unknown("member of an ensemble", name, [known for known in METHODS.names() if known != NAME])
        known, given = METHODS.get(name).settings, dict[str, Parameter]()
        for setting in settings:
            key, equals, value = setting.partition("=")
            if not equals:
                raise InputError(f"A member's setting is METHOD:NAME=VALUE; got {part[:60]!r}.")
            if key == "replacement":
                raise InputError("All members have the replacement of the ensemble; leave replacement= out of methods.")
            if key not in known:
                raise unknown_setting(f"method {name!r}", key, known)
            given[key] = known[key].parse(key, value)
        found.append((name, given))
    return found


def parse_weights(text: str) -> list[float] | None:
    """The weights that the setting `weights` names; None for the empty text."""
    if not text:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"weights must be numbers separated by commas, such as 2,1; got {text[:60]!r}.") from None


def _ensemble(job: Job) -> Scores:
    members = parse_members(str(job.settings["methods"]))
    weights = parse_weights(str(job.settings["weights"]))
    _shares(weights, len(members))
    for name, given in members:  # before anything slow begins
        check_graph(name, job.graph)
        check_settings(f"method {name!r}", METHODS.get(name).settings, {**given, "replacement": job.replacement})
    found = _members(job, members)
    result = ensemble_scores(found, how=str(job.settings["how"]), weights=weights)
    return replace(result, parameters=dict(job.settings))


def _members(job: Job, members: list[tuple[str, dict[str, Parameter]]]) -> list[Scores]:
    """The scores of every member; a killed run resumes at the member that it had reached."""
    found: list[Scores] = []
    totals = job.zeros().double().repeat(len(members), 1, 1)
    costs = torch.zeros(len(members), 2, dtype=torch.int64)
    additive = torch.zeros(len(members), dtype=torch.int64)
    done = torch.tensor(0)
    saved = job.checkpoint.load(_state(totals, costs, additive, done), {"done": len(members)})
    if saved is not None:
        totals, costs, additive, done = (saved[name] for name in ("totals", "costs", "additive", "done"))
    for i, (name, given) in enumerate(members):
        settings: dict[str, Any] = {**METHODS.get(name).defaults, **given, "replacement": job.replacement}
        if i >= int(done):
            one = score_edges(
                job.model,
                job.graph,
                job.pairs,
                method=name,
                metric=job.metric,
                batch_size=job.batch_size,
                progress=lambda part, whole, i=i: job.progress(
                    1000 * i + (1000 * part) // max(1, whole), 1000 * len(members)
                ),
                **settings,
            )
            totals[i] = one.total.cpu().double()
            costs[i] = torch.tensor([one.cost.get("forwards", 0), one.cost.get("backwards", 0)])
            additive[i] = int(one.additive)
            done = torch.tensor(i + 1)
            job.checkpoint.save(_state(totals, costs, additive, done))
        cost = {"forwards": int(costs[i, 0]), "backwards": int(costs[i, 1])}
        scores = Scores(
            job.graph,
            totals[i].to(job.zeros().dtype),
            len(job.pairs),
            name,
            job.metric.name,
            job.replacement,
            settings,
            cost,
            bool(additive[i]),
        )
        found.append(scores)
    job.progress(1000 * len(members), 1000 * len(members))
    return found


def _state(totals: Tensor, costs: Tensor, additive: Tensor, done: Tensor) -> dict[str, Tensor]:
    return {"totals": totals, "costs": costs, "additive": additive, "done": done}


ENSEMBLE = Method(
    NAME,
    "Several methods' scores combined, by the rank of their magnitude or by their calibrated mean",
    "MIB shared task, BlackboxNLP 2025, arXiv 2511.18409",
    _ensemble,
    {
        "methods": Setting("eap-ig,relp,cd-edges", "the members, by comma; METHOD:NAME=VALUE sets a setting of one"),
        "how": _HOW,
        "weights": Setting("", "one weight for each member, by comma; empty: all the same"),
        "replacement": REPLACEMENT,
    },
    graphs="own",
)
