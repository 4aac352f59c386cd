"""Runs of the model on one prompt in which patterns, norm scales and MLP outputs are held, and gradients through them.

All is edits of the model itself, so this is independent of the closed form of `frozen_run`, and any of the three can be
left free: `held="norms"` holds patterns and norm scales, `"patterns"` only patterns, `"nothing"` neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.analysis.attribution_graph.frozen_run import FrozenRun, Seed
from mechinterp.analysis.attribution_graph.graph import GraphNode
from mechinterp.models.hook_manager import Intervention
from mechinterp.models.modes import Gradients
from mechinterp.models.norm import Norm
from mechinterp.models.sites import Site

HELD = ("nothing", "patterns", "norms")
BEFORE = ("resid_pre", "mlp_raw")
"""Where a leaf must come before the edits, which keep the value they see there; elsewhere they replace it."""


class HeldEdits:
    """The edits that hold patterns and norm scales at those of the prompt, in a run of `n` rows of it."""

    def __init__(self, run: FrozenRun, n: int) -> None:
        self.run, self.n = run, n
        self.now: dict[str, Tensor] = {}
        """The streams of the run so far, by name."""

    def note(self, name: str) -> Callable[[Tensor], Tensor]:
        """Keeps a value and changes nothing."""

        def seen(value: Tensor) -> Tensor:
            self.now[name] = value
            return value

        return seen

    def normed(self, norm: Norm, stream: str, scale: Float[Tensor, "pos 1"]) -> Callable[[Tensor], Tensor]:
        """The output of a norm with a scale that is held."""

        def held(value: Tensor) -> Tensor:
            out = norm.project(self.now[stream].to(self.run.dtype)) / scale
            return (out if norm.bias is None else out + norm.bias.to(out)).to(value.dtype)

        return held

    def patterns(self) -> list[Intervention]:
        """The attention patterns of all layers."""
        run = self.run
        return [
            Intervention(
                Site("pattern", layer), run.at("pattern", layer).to(run.model.dtype).expand(self.n, -1, -1, -1)
            )
            for layer in range(run.model.dims.n_layers)
        ]

    def norms(self, mlp: Callable[[int, str], Callable[[Tensor], Tensor]] | None = None) -> list[Intervention]:
        """The scales of all norms; `mlp` makes the edit of a layer's MLP output (the name of its stream is given)."""
        run, dims, layout = self.run, self.run.model.dims, self.run.model.layout
        edits: list[Intervention] = []
        for layer in range(dims.n_layers):
            maps = layout.attention[layer]
            scale = maps.norm.scale(run.at("resid_pre", layer))
            edits.append(Intervention(Site("resid_pre", layer), self.note("pre")))
            edits.append(Intervention(Site("attn_in", layer), self.normed(maps.norm, "pre", scale)))
            if maps.post.kind != "none":
                edits.append(Intervention(Site("attn_raw", layer), self.note("raw")))
                post = self.normed(maps.post, "raw", run.attention_post(layer)[1])
                edits.append(Intervention(Site("attn_out", layer), post))
            if not run.has_mlp(layer):
                continue
            stream = "pre" if dims.parallel else "mid"
            if stream == "mid":
                edits.append(Intervention(Site("resid_mid", layer), self.note("mid")))
            normed = self.normed(run.mlp_norm(layer), stream, run.mlp_scale(layer))
            edits.append(Intervention(Site("mlp_in", layer), normed))
            edits.append(Intervention(Site("mlp_in", layer), self.note("mlp_in")))
            post, post_scale = run.mlp_post(layer)
            if mlp is not None:
                edits.append(Intervention(Site("mlp_out", layer), mlp(layer, stream)))
            elif post.kind != "none":
                edits.append(Intervention(Site("mlp_raw", layer), self.note("mlp_raw")))
                edits.append(Intervention(Site("mlp_out", layer), self.normed(post, "mlp_raw", post_scale)))
        edits.append(Intervention(Site("resid_final"), self.note("final")))
        scale = layout.final_norm.scale(run.at("resid_final"))
        edits.append(Intervention(Site("final_norm"), self.normed(layout.final_norm, "final", scale)))
        return edits


def held_mlp(
    held: HeldEdits, layer: int, scaled: Sequence[GraphNode], factor: float, stream: str
) -> Callable[[Tensor], Tensor]:
    """The edit of an MLP's output: the recorded one, plus what the scaled features and the skip connection change."""
    run, n = held.run, held.n
    change = run.at("mlp_out", layer).new_zeros(n, run.n_pos, run.model.dims.d_model)
    for row, node in enumerate(scaled):
        basis = run.transcoders[node.layer]
        for i, site in enumerate(basis.sites_out):
            if site.layer == layer:
                vector = (factor - 1) * node.value * basis.W_dec[node.feature, i].to(change)
                at = torch.tensor([node.position], device=change.device)
                change[row, node.position] += run.written(site.kind, layer, vector[None], at)[0]
    skip = run.transcoders.get(layer)

    def edit(value: Tensor) -> Tensor:
        out = run.at("mlp_out", layer) + change
        if skip is not None and skip.W_skip is not None:
            kind, every = skip.sites_in[0].kind, torch.arange(run.n_pos, device=out.device)
            seen = held.now["mlp_in" if kind == "mlp_in" else "pre" if kind == "resid_pre" else stream]
            moved = (seen.to(out) - run.values[skip.sites_in[0]]) @ skip.W_skip.to(out)
            moved = run.written(skip.sites_out[0].kind, layer, moved.flatten(0, 1), every.repeat(n)).view_as(out)
            out = out + moved
        return out.to(value.dtype)

    return edit


def held_edits(
    run: FrozenRun, n: int, held: str, scaled: Sequence[GraphNode] = (), factor: float = 1.0
) -> list[Intervention]:
    """The edits that hold all MLP outputs, and patterns and norm scales as `held` says, in a run of `n` rows.

    Args:
        run: The run of the prompt.
        n: Rows.
        held: `nothing`, `patterns` or `norms`.
        scaled: A feature per row, whose activation is multiplied.
        factor: By this.
    """
    holding = HeldEdits(run, n)

    def mlp(layer: int, stream: str) -> Callable[[Tensor], Tensor]:
        return held_mlp(holding, layer, scaled, factor, stream)

    if held == "norms":
        return [*holding.patterns(), *holding.norms(mlp)]
    edits = holding.patterns() if held == "patterns" else []
    for layer in range(run.model.dims.n_layers):
        if not run.has_mlp(layer):
            continue
        stream = "pre" if run.model.dims.parallel else "mid"
        skip = run.transcoders.get(layer)
        if skip is not None and skip.W_skip is not None:
            kind = skip.sites_in[0].kind
            name = "mlp_in" if kind == "mlp_in" else "pre" if kind == "resid_pre" else stream
            edits.append(Intervention(skip.sites_in[0], holding.note(name)))
        edits.append(Intervention(Site("mlp_out", layer), mlp(layer, stream)))
    return edits


def gradients_at(
    run: FrozenRun,
    places: Sequence[Site],
    edits: Sequence[Intervention],
    read: Callable[[Tensor], Tensor],
    *,
    n: int,
    stop: Site,
) -> dict[Site, Float[Tensor, "row pos d_model"]]:
    """The gradient of a reading of a run of the model with respect to what is added at some places.

    Args:
        run: The run of the prompt.
        places: The sites.
        edits: The edits of the run.
        read: From the value at `stop` to the reading; its sum is differentiated.
        n: Rows of the run.
        stop: Where the run ends.

    Cost: a forward and a backward of `n` rows, with all activations kept.
    """
    width, model = run.model.dims.d_model, run.model
    leaves = {
        site: torch.zeros(n, run.n_pos, width, dtype=model.dtype, device=model.device, requires_grad=True)
        for site in places
    }

    def adding(site: Site) -> Intervention:
        leaf = leaves[site]
        return Intervention(site, lambda value: value + leaf)

    found: dict[Site, Tensor] = {}

    def loss(end: Tensor) -> Tensor:
        gradients = torch.autograd.grad(
            read(end).sum(), list(leaves.values()), retain_graph=True, materialize_grads=True
        )
        found.update(zip(places, gradients, strict=True))
        return end.sum()

    first = [adding(site) for site in places if site.kind in BEFORE]
    last = [adding(site) for site in places if site.kind not in BEFORE]
    with Gradients(True) as on, on:
        model.run(run.tokens.expand(n, -1), interventions=[*first, *edits, *last], grads=[stop], loss=loss, stop=stop)
    return found


def backward_in_model(
    run: FrozenRun, seeds: Sequence[Seed], n_rows: int, held: str
) -> Iterator[tuple[tuple[str, int], Float[Tensor, "row pos d_model"]]]:
    """What `FrozenRun.backward` yields, by autograd through the model with its MLP outputs held.

    Patterns and norm scales move unless `held` says otherwise, so this is the first order of what they do.

    Args:
        run: The run of the prompt.
        seeds: What is read.
        n_rows: Rows of the batch.
        held: `nothing`, `patterns` or `norms` (then the values are those of `FrozenRun.backward`).

    Memory: the activations of a run of `n_rows` rows.
    """
    dims, read = run.model.dims, dict[Site, Tensor]()

    def site_of(seed: Seed) -> Site:
        return Site("final_norm") if seed.kind == "resid_final" else Site(seed.kind, seed.layer)

    def noted(site: Site) -> Intervention:
        def seen(value: Tensor) -> Tensor:
            read[site] = value
            return value

        return Intervention(site, seen)

    def reading(_: Tensor) -> Tensor:
        total = torch.zeros((), dtype=run.dtype, device=run.model.device)
        for site in sites:
            own = [seed for seed in seeds if site_of(seed) == site]
            values = read[site][[seed.row for seed in own], [seed.position for seed in own]]
            total = total + (values.to(run.dtype) * torch.stack([seed.direction for seed in own]).to(run.dtype)).sum()
        return total

    last = max(seed.layer for seed in seeds)
    sites = list(dict.fromkeys(site_of(seed) for seed in seeds))
    places = [Site("resid_pre", 0)]
    for layer in range(min(dims.n_layers, last + 1)):
        places += [Site("attn_out", layer), *([Site("mlp_out", layer)] if run.has_mlp(layer) else [])]
    if last == dims.n_layers:
        stop = Site("final_norm")
    else:  # after the layer, so that all its edits are reached
        stop = Site("resid_pre", last + 1) if last + 1 < dims.n_layers else Site("resid_final")

    def reached(edit: Intervention) -> bool:
        layer = Site.parse(str(edit.site)).layer
        return last == dims.n_layers or (layer is not None and layer <= last)

    edits = [*filter(reached, held_edits(run, n_rows, held)), *map(noted, sites)]
    found = gradients_at(run, places, edits, reading, n=n_rows, stop=stop)
    for site, gradient in reversed(found.items()):
        kind = {"resid_pre": "input", "attn_out": "attn", "mlp_out": "mlp"}[site.kind]
        yield (kind, -1 if site.layer is None or kind == "input" else site.layer), gradient.to(run.dtype)
