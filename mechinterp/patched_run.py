"""One forward of a model with edges cut: what `run_edges` and everything else that cuts edges is built on.

A reader none of whose edges is cut keeps the model's own input. Another one gets
`resid - sum over cut writers (current write - replacement)`, then its norm and projection again, per head. Where the
graph has named positions, the sum is another one at each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from mechinterp.graph import Graph
from mechinterp.hooks import HookManager, Intervention
from mechinterp.models.modes import Gradients
from mechinterp.places import places_of, take_positions
from mechinterp.replacement import Values
from mechinterp.sites import Site
from mechinterp.tasks.pairs import Pairs


@dataclass(frozen=True)
class Prefix:
    """The run of one batch up to a layer, with no edge cut before it: what patched runs from there share."""

    layer: int
    resid: Float[Tensor, "batch pos d_model"]
    differences: Float[Tensor, "writer 1 batch pos d_model"]
    """What each earlier writer's write differs by from its replacement."""


def run_prefix(model: HookManager, graph: Graph, pairs: Pairs, values: Values, layer: int) -> Prefix:
    """The run of a batch up to `layer` (the number of layers: all of it), for `edge_logits`. One forward at most."""
    with Gradients(False) as off, off:
        nothing = torch.zeros(1, *graph.possible.shape, device=model.device)
        run = PatchedRun(model, graph, pairs, nothing, values)
        resid = run.shared(layer)
        before = graph.n_writers_before(layer, mlp=False) if layer < model.dims.n_layers else len(graph.writers)
        return Prefix(layer, resid, run.differences[:before].clone())


class PatchedRun:
    """One forward of (candidate x batch) prompts with edges cut; lives as long as the run."""

    def __init__(
        self,
        model: HookManager,
        graph: Graph,
        pairs: Pairs,
        masks: Tensor,
        values: Values,
        prefix: Prefix | None = None,
    ) -> None:
        self.model, self.graph, self.pairs, self.masks, self.values = model, graph, pairs, masks, values
        self.n = masks.shape[0]
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.masks = masks.to(dtype)
        n_batch, n_pos = pairs.clean.shape
        # Row 0 is the residual stream being read; the rows after it are what each writer's current write differs by
        # from its replacement, filled as the forward goes. One product with (1, -cut) then gives what a reader sees.
        shape = (1 + len(graph.writers), self.n, n_batch, n_pos, model.dims.d_model)
        self.rows = torch.empty(shape, dtype=dtype, device=model.device)
        self.differences = self.rows[1:]
        self.weights = torch.nn.functional.pad(-self.masks, (1, 0), value=1.0)
        self.cut_readers = (self.masks != 0).any(0).any(-1).cpu()
        self.resid: Tensor | None = None
        self.prefix = prefix
        self.places = places_of(graph, pairs)
        self.seen: tuple[int, Tensor] | None = None
        self.apart: Tensor | None = None

    def run(self, columns: Tensor | None) -> Float[Tensor, "rows n_answer n_columns"]:
        """Logits at the answer positions; the rows are candidate by candidate."""
        readers = slice(len(self.graph.readers) - 1, len(self.graph.readers))
        with Gradients(False) as off, off:
            resid = self._final_resid()
            seen = self.corrected(readers, len(self.graph.writers), resid)[:, 0].flatten(0, 1)
            at = repeat(self.pairs.answer_pos, "batch n_answer -> (candidate batch) n_answer", candidate=self.n)
            return self.model.layout.unembed(take_positions(seen, at), columns)

    def _final_resid(self) -> Float[Tensor, "candidate batch pos d_model"]:
        """The final residual stream, the layers before the first cut edge run once for all candidates."""
        first, last = self._first_cut_layer(), Site("resid_final")
        n_layers = self.model.dims.n_layers
        tokens, mask, start = self.pairs.clean, self.pairs.mask, None
        if self.prefix is not None and self.prefix.layer <= first:
            first = self.prefix.layer
            self.differences[: len(self.prefix.differences)] = self.prefix.differences
            shared = self.prefix.resid
        else:
            shared = self.shared(first) if first > 0 else None
        if first == n_layers:
            assert shared is not None
            return self.fold(shared).to(self.differences.dtype)
        if shared is not None and first > 0:
            start = (first, self._repeated(shared))
        plan = self.plan(range(first, n_layers))
        run = self.model.run(
            self._repeated(tokens),
            self._repeated(mask),
            interventions=plan,
            record=[last],
            start=start,
            stop=last,
        )
        return self.fold(run.values[last]).to(self.differences.dtype)

    def shared(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream before a layer, run once for all candidates; the writes until then are kept."""
        stop = Site("resid_pre", layer) if layer < self.model.dims.n_layers else Site("resid_final")
        plan = self.plan(range(layer))
        return self.model.run(self.pairs.clean, self.pairs.mask, interventions=plan, record=[stop], stop=stop).values[
            stop
        ]

    def _repeated(self, value: Tensor) -> Tensor:
        return value.repeat(self.n, *[1] * (value.ndim - 1))

    def _first_cut_layer(self) -> int:
        per_layer = (len(self.graph.readers) - 1) // self.model.dims.n_layers
        cut = self.cut_readers.nonzero()
        return int(cut[0]) // per_layer if len(cut) else self.model.dims.n_layers

    def plan(self, layers: range) -> list[Intervention]:
        graph, dims, cut = self.graph, self.model.dims, self.cut_readers
        plan: list[Intervention] = []
        if graph.split_input and 0 in layers:
            plan += [Intervention(Site(name), self._input_tap(i, name)) for i, name in enumerate(graph.inputs)]
        for layer in layers:
            channels = [c for c in "qkv" if bool(cut[graph.channel_readers(layer, c)].any())]
            plan.append(Intervention(Site("resid_pre", layer), self._resid_tap(layer, channels)))
            plan += [Intervention(Site(c, layer), self._head_edit(layer, c)) for c in channels]
            plan.append(Intervention(Site("z", layer), self._z_tap(layer)))
            if dims.has_mlp:
                if not dims.parallel:
                    plan.append(Intervention(Site("resid_mid", layer), self._keep_resid))
                if bool(cut[graph.mlp_readers(layer)].any()):
                    plan.append(Intervention(Site("mlp_in", layer), self._mlp_edit(layer)))
                if graph.neurons_of(layer):
                    plan.append(Intervention(Site("mlp_post", layer), self._neuron_tap(layer)))
                plan.append(Intervention(Site("mlp_out", layer), self._mlp_tap(layer)))
        return plan

    def fold(self, value: Tensor) -> Tensor:
        """`[candidate, batch, ...]`; a run shared by all candidates has the candidate axis 1 repeated."""
        shared = value.shape[0] == len(self.pairs)
        return value[None].expand(self.n, *value.shape) if shared else value.unflatten(0, (self.n, len(self.pairs)))

    def _keep_resid(self, value: Tensor) -> Tensor:
        self.resid = value
        return value

    def _input_tap(self, index: int, name: str):
        def tap(value: Tensor) -> Tensor:
            self.keep(slice(index, index + 1), (self.fold(value) - self.values.inputs(name))[None])
            return value

        return tap

    def _resid_tap(self, layer: int, channels: list[str]):
        def tap(value: Tensor) -> Tensor:
            if layer == 0 and not self.graph.split_input:
                self.keep(slice(0, 1), (self.fold(value) - self.values.inputs("input"))[None])
            if channels:  # q, k and v together: their products share the pass over all earlier writes
                readers = slice(
                    self.graph.channel_readers(layer, channels[0]).start,
                    self.graph.channel_readers(layer, channels[-1]).stop,
                )
                before = self.graph.n_writers_before(layer, mlp=False)
                self.seen = (readers.start, self.corrected(readers, before, self.fold(value)))
            return self._keep_resid(value)

        return tap

    def _z_tap(self, layer: int):
        def tap(value: Tensor) -> Tensor:
            z = self.fold(value).to(self.differences.dtype)
            self.keep(self.graph.head_writers(layer), self.values.head_differences(layer, z))
            return value

        return tap

    def _neuron_tap(self, layer: int):
        chosen = torch.tensor(self.graph.neurons_of(layer), device=self.model.device)

        def tap(value: Tensor) -> Tensor:
            post = self.fold(value).to(self.differences.dtype)
            self.apart = self.values.neuron_differences(layer, post, chosen)
            self.keep(self.graph.neuron_writers(layer), self.apart)
            return value

        return tap

    def _mlp_tap(self, layer: int):
        row = self.graph.mlp_writer(layer)

        def tap(value: Tensor) -> Tensor:
            difference = self.fold(value) - self.values.mlp(layer)
            if self.graph.neurons_of(layer):
                assert self.apart is not None
                difference = difference - self.apart.sum(0)
            self.keep(slice(row, row + 1), difference[None])
            return value

        return tap

    def keep(self, writers: slice, differences: Float[Tensor, "writer candidate batch pos d_model"]) -> None:
        """Keeps what writers' current writes differ by from their replacements."""
        self.differences[writers] = differences

    def corrected(
        self, readers: slice, n_writers: int, resid: Float[Tensor, "candidate batch pos d_model"]
    ) -> Float[Tensor, "candidate reader batch pos d_model"]:
        """The residual stream as each of these readers (rows of the graph) sees it; positions are joined again."""
        self.rows[0] = resid
        return read(self.weights[:, readers, : 1 + n_writers], self.rows[: 1 + n_writers], self.places_for(readers))

    def places_for(self, readers: slice) -> list[Tensor] | None:
        """The tokens of each position; None where the readers have one row for all tokens, as the logits have."""
        return None if readers.start == len(self.graph.readers) - 1 else self.places

    def _whole(self, readers: slice) -> Tensor:
        """Which readers have no cut edge: `[candidate, reader]`, positions together."""
        uncut = (self.masks[:, readers] == 0).all(-1)
        return uncut.unflatten(1, (-1, self.graph.n_positions)).all(-1).repeat_interleave(len(self.pairs), 0)

    def _head_edit(self, layer: int, channel: str):
        readers = self.graph.channel_readers(layer, channel)
        n = self.graph.n_positions

        def edit(value: Tensor) -> Tensor:
            assert self.seen is not None
            first, seen = self.seen
            mine = seen[:, (readers.start - first) // n : (readers.stop - first) // n].transpose(0, 1)
            read = self.model.layout.read_heads(layer, channel, mine)
            new = read.permute(1, 2, 3, 0, 4).flatten(0, 1).to(value.dtype)
            # A reader without a cut edge keeps the model's own value, to the last bit.
            return torch.where(self._whole(readers)[:, None, :, None], value, new)

        return edit

    def _mlp_edit(self, layer: int):
        readers = self.graph.mlp_readers(layer)
        before = self.graph.n_writers_before(layer, mlp=True)

        def edit(value: Tensor) -> Tensor:
            assert self.resid is not None
            seen = self.corrected(readers, before, self.fold(self.resid))[:, 0]
            new = self.model.layout.read_mlp(layer, seen).flatten(0, 1).to(value.dtype)
            return torch.where(self._whole(readers)[:, :, None], value, new)

        return edit


def read(
    weights: Float[Tensor, "candidate row writer"],
    rows: Float[Tensor, "writer candidate batch pos d_model"],
    places: list[Tensor] | None,
) -> Float[Tensor, "candidate reader batch pos d_model"]:
    """The sums of the rows that each reader's weights give; with places, a reader has one row of weights for each."""
    n_batch, n_pos, d_model = rows.shape[2:]
    if places is None:
        return torch.bmm(weights, rows.flatten(2).transpose(0, 1)).unflatten(-1, (n_batch, n_pos, d_model))
    flat, by_place = rows.flatten(2, 3), weights.unflatten(1, (-1, len(places)))
    out = rows.new_empty(weights.shape[0], by_place.shape[1], n_batch * n_pos, d_model)
    for i, tokens in enumerate(places):
        here = flat[:, :, tokens].flatten(2).transpose(0, 1)
        out[:, :, tokens] = torch.bmm(by_place[:, :, i], here).unflatten(-1, (len(tokens), d_model))
    return out.unflatten(2, (n_batch, n_pos))
