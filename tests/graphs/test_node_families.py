"""The contract of node families, for every family on every shape: what engines rely on, and nothing of one kind."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.engines.edge_attribution import activation_path_gradients, edge_gradients
from mechinterp.engines.edge_patching import run_edges
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import build_replacement, corrupt_replacement, record_writes
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.families.family import NodeFamily, NodeSite, Recorded
from mechinterp.graphs.families.neurons import Neurons
from mechinterp.graphs.families.normed_ports import DirectionGradients, Step
from mechinterp.graphs.families.write_block import Dense, LowRank, WriteBlock, less_parts
from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.models.experts import expert_writes
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Node, Site
from mechinterp.views.plots.circuit import circuit_figure
from tests.support.engine_tables import LOGIT_DIFF, check_batches, engine_tables
from tests.support.models_tiny import ALL_FLOAT64, D_MODEL, EVERY, HYBRIDS, MIXTURES, build, pairs, small_cut, tiny
from tests.support.odd_models import odd

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-node-family.md"
SEEDED = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
KINDS = ("whole", "split input", "neurons", "direction", "positions", "features")


@cache
def shown_on_the_page() -> type[NodeFamily]:
    """The family of the page that says how to add one."""
    block = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)[0]
    assert len(block.splitlines()) < 100
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(block.partition("\nmodel = ")[0], PAGE.name, "exec", dont_inherit=True), names)
    return names["Direction"]


@cache
def as_dense(kind: type[NodeFamily]) -> type[NodeFamily]:
    """The same family with every write in full."""

    class InFull(kind):
        @property
        def low_rank(self) -> bool:
            return False

        def writes(self, model: HookManager, now: Recorded) -> Dense:
            return Dense(super().writes(model, now).dense())

    return InFull


def directions(kind: type[NodeFamily]) -> list[NodeFamily]:
    """A direction of the write of two MLPs."""
    made: Any = kind
    drawn = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [made(layer, tuple((v / v.norm()).tolist())) for layer, v in zip((0, 2), drawn, strict=True)]


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_transcoder(layer: int, n: int = 12, *, site_out: str = "mlp_out", **settings: Any) -> mi.FeatureBasis:
    """A transcoder with random weights, of which about half of the features are active."""
    weights = drawn(D_MODEL, n, seed=layer), 0.3 * drawn(n, D_MODEL, seed=10 + layer)
    biases = {"b_enc": 0.1 * drawn(n, seed=20 + layer), "b_dec": drawn(D_MODEL, seed=30 + layer)}
    return mi.transcoder(f"mlp_in.{layer}", f"{site_out}.{layer}", *weights, **biases, **settings)


def some_sae(site: str, n: int = 12, width: int = D_MODEL, **settings: Any) -> mi.FeatureBasis:
    """A dictionary with random weights at one site."""
    weights = drawn(width, n, seed=1), drawn(n, width, seed=2)
    return mi.sae(site, *weights, b_dec=drawn(width, seed=3), subtract_b_dec=True, **settings)


@cache
def features_for(name: str, kind: str) -> dict[Any, list[int]]:
    """Features of dictionaries of every sort that the shape has."""
    model = tiny(name)
    threshold = mi.JumpRelu(torch.tensor(0.2, dtype=torch.float64))
    if kind in ("features and neurons", "features of an MLP"):  # that may be all that a layer has
        return {some_transcoder(1, activation=threshold): [0, 3, 4, 9]}
    if kind == "features and experts":
        return {some_transcoder(0, activation=threshold): [0, 3, 4, 9], some_sae("mlp_out.1"): [1, 10]}
    if kind == "features before a norm":  # and of what is inside an MLP or an attention
        found = {
            some_transcoder(0, site_out="mlp_raw", activation=threshold, label="m0"): [0, 3, 4],
            some_sae("z.1", width=model.dims.n_heads * model.dims.d_head): [2, 5],
            mi.neuron_basis("mlp_post.2", len(model.layout.neurons(2).W_out), label="m2"): [1, 7],
            some_sae("attn_raw.0", label="a0"): [0, 1],
        }
        return {basis: ids for basis, ids in found.items() if name == "gemma2" or "raw" not in repr(basis)}
    found = {some_sae("attn_out.1", activation=mi.TopK(4), normalize="layer_norm"): [0, 1, 11]}
    if not model.dims.has_mlp:
        return found
    found |= {some_transcoder(0, activation=threshold): [0, 3, 4, 9], some_transcoder(1, activation=mi.TopK(5)): [2, 8]}
    return found | {some_sae("mlp_out.2"): [1, 10]}


@cache
def graph_for(name: str, kind: str) -> Graph:
    """A graph of the shape with these families."""
    if kind.startswith("features"):
        more: dict[str, Any] = {"positions": ("a", "end")} if name in ("gpt2", "llama") else {}
        more |= {"experts": True} if kind == "features and experts" else {}
        more |= {"neurons": {tiny(name).dims.mlp_layers[-1]: [3, 8]}} if kind == "features and neurons" else {}
        return build_graph(tiny(name), features=features_for(name, kind), **more)
    options: dict[str, Any] = {
        "split input": {"split_input": True},
        "neurons": {"neurons": {0: [3, 8], 2: [0, 1, 30]}},
        "dense neurons": {"parts": [as_dense(Neurons)(0, (3, 8)), as_dense(Neurons)(2, (0, 1, 30))]},  # type: ignore[call-arg]
        "direction": {"parts": directions(shown_on_the_page())},
        "dense direction": {"parts": directions(as_dense(shown_on_the_page()))},
        "positions": {"neurons": {1: [4, 5]}, "positions": ("a", "end")},
        "experts": {"experts": True},
    }.get(kind, {})
    return build_graph(tiny(name), **options)


def cases() -> Iterator[tuple[str, str]]:
    """Every shape with every kind that it has."""
    for name in EVERY:
        for kind in KINDS:
            if kind == "features" and name in ("qwen2", "no-norm"):
                continue  # nothing that llama and gpt2 do not have
            with_mlp = name != "attention-only" or kind in ("whole", "split input", "features")
            if with_mlp and (kind != "split input" or name in ("gpt2", "attention-only", "no-norm")):
                yield name, kind
    yield from ((name, "experts") for name in MIXTURES)
    yield from ((name, "features before a norm") for name in ("gpt2", "gemma2"))
    yield "mixtral", "features and experts"
    yield from ((name, "whole") for name in HYBRIDS)
    yield from [("lfm2", "positions"), ("granite-hybrid", "features and neurons"), ("nemotron-h", "features of an MLP")]


MORE = [("gpt2", "positions"), ("llama", "positions"), ("gpt2", "direction"), ("gemma2", "direction")]
CASES = pytest.mark.parametrize(("name", "kind"), list(cases()))


def some(n: int = 3, padded: bool = True) -> Any:
    """Pairs of 6, 5 and 4 tokens with two named positions."""
    return pairs(n, 6, padded=padded, positions={"a": [1, 2, 1][:n], "end": [5, 4, 3][:n] if padded else [5] * n})


def close(name: str) -> dict[str, float]:
    # The other shapes compute norms in float32.
    return {"rtol": 1e-9, "atol": 1e-9} if name in ALL_FLOAT64 else {"rtol": 1e-4, "atol": 2e-5}


def blocks_of(model: HookManager, graph: Graph, recorded: Recorded) -> dict[NodeFamily, WriteBlock]:
    """What every family writes, of a writer with parts the rest."""
    blocks = {family: family.writes(model, recorded) for family in graph.families}
    for family in graph.families:
        parts: dict[int, torch.Tensor] = {}
        for part in graph.parts_of(family):
            row = family.writers.index(str(part.part_of))
            parts[row] = parts.get(row, 0) + blocks[part].total()
        blocks[family] = less_parts(blocks[family], parts)
    return blocks


# -- the stream ----------------------------------------------------------------------------------------------------


@CASES
def test_writes_and_biases_add_up_to_the_stream(name: str, kind: str) -> None:
    model, graph, ids = tiny(name), graph_for(name, kind), some()
    streams = [family.stream for family in graph.families if family.ports]
    run = model.run(ids.clean, ids.mask, record=[*dict.fromkeys(streams), Site("resid_final")])
    recorded = record_writes(model, graph, ids.clean, ids).values
    blocks = blocks_of(model, graph, recorded)
    biases = {
        f.written: bias
        for f in graph.families
        if f.part_of is None and (bias := attention_bias(model, f, recorded)) is not None
    }
    moments = [(f.stream, f.reads) for f in graph.families if f.reads is not None]
    for site, moment in [*moments, (Site("resid_final"), (model.dims.n_layers, 0))]:
        terms = [block.total() for family, block in blocks.items() if family.written <= moment]
        terms += [bias for written, bias in biases.items() if written <= moment]
        torch.testing.assert_close(sum(terms), run.values[site].double(), **close(name))
        assert graph.n_writers_at(moment) == sum(len(f.writers) for f in graph.families if f.written <= moment)


def attention_bias(model: HookManager, family: NodeFamily, recorded: Recorded) -> torch.Tensor | None:
    """What a layer's attention adds besides its heads."""
    z = recorded.get(Site("z", family.layer))
    return model.layout.attention_bias(family.layer, z) if z is not None and family.writers[0][0] == "a" else None


CONSTANT = [(*case, kind) for case in cases() if case[0] in ("gpt2", "gemma2") for kind in ("mean", "zero")]


@pytest.mark.parametrize(("name", "kind", "replacement"), [*((*case, "corrupt") for case in cases()), *CONSTANT])
def test_nothing_replaced_is_clean_and_all_replaced_is_the_replacement(name: str, kind: str, replacement: str) -> None:
    model, graph, ids = tiny(name), graph_for(name, kind), some()
    by = build_replacement(replacement, model, graph, ids)
    whole = build_graph(model)
    ends = run_edges(model, graph, ids, torch.stack([torch.zeros_like(graph.possible), graph.possible]), replacement=by)
    clean, corrupt = (LOGIT_DIFF(_answer_logits(model, ids, prompts), ids) for prompts in (ids.clean, ids.corrupt))
    torch.testing.assert_close(ends[0], clean.to(ends), **close(name))
    if replacement == "corrupt":
        torch.testing.assert_close(ends[1], corrupt.to(ends), **close(name))
    else:  # parts and rest are replaced as the whole is
        expected = run_edges(
            model, whole, ids, whole.possible, replacement=build_replacement(replacement, model, whole, ids)
        )
        torch.testing.assert_close(ends[1], expected, **close(name))


def _answer_logits(model: HookManager, ids: Any, prompts: torch.Tensor) -> torch.Tensor:
    logits = model.run(prompts, ids.mask).logits
    assert logits is not None
    return logits.gather(1, ids.answer_pos[..., None].expand(-1, -1, logits.shape[-1]))


# -- reading -------------------------------------------------------------------------------------------------------


READING = [*((name, "whole") for name in EVERY), ("mixtral", "experts"), ("gemma2", "features before a norm")]
READING += [(name, "whole") for name in HYBRIDS]
READING += [(name, "features") for name in ("gpt2", "neox", "llama", "gemma2")]


@pytest.mark.parametrize(("name", "kind"), READING)
def test_pull_back_is_the_transposed_jacobian_of_read(name: str, kind: str) -> None:
    model, graph = tiny(name), graph_for(name, kind)
    for family in (family for family in graph.families if family.ports):
        resid = torch.randn(2, 3, D_MODEL, **SEEDED)
        seen = resid.expand(graph.ports_of(family).stop - graph.ports_of(family).start, *resid.shape).clone()
        seen.requires_grad_(True)
        values: dict[NodeSite, torch.Tensor] = {family.stream: resid}
        gradients: dict[NodeSite, torch.Tensor] = {}
        loss, first = torch.zeros((), dtype=torch.float64), 0
        for ports in family.ports:
            read = family.read(model, ports, seen[first : first + len(ports.names)])
            gradients[ports.site] = torch.randn(read.shape, **SEEDED)
            values[ports.site] = read.detach()
            loss = loss + (read * gradients[ports.site]).sum()
            first += len(ports.names)
        (expected,) = torch.autograd.grad(loss, seen)
        found = torch.empty(len(seen), 6, D_MODEL, dtype=torch.float64)
        family.pull_back(model, [Step(values, gradients)], (slice(None), slice(None)), found, frozen=False)
        torch.testing.assert_close(found, expected.flatten(1, 2), rtol=1e-10, atol=1e-10)


# -- blocks --------------------------------------------------------------------------------------------------------


def test_low_rank_gives_what_dense_gives() -> None:
    low = LowRank(torch.randn(5, 2, 3, 4, **SEEDED), torch.randn(5, 7, **SEEDED))
    dense = Dense(low.dense())
    weights, gradients = torch.randn(6, 5, **SEEDED), torch.randn(6, 2, 3, 4, 7, **SEEDED)
    constant = LowRank(torch.randn(5, **SEEDED), low.directions)
    mask, chosen = torch.rand(3, 4) < 0.5, torch.rand(5, 2, 1, 4) < 0.5
    for of in (
        lambda block: block.total(),
        lambda block: block.total_where(chosen),
        lambda block: block.weighted_sum(weights),
        lambda block: block.inner(gradients),
        lambda block: block.sums(mask, positional=False).dense(),
        lambda block: block.sums(mask, positional=True).dense(),
        lambda block: block.add(block).divided(3).dense(),
        lambda block: block.minus(constant if block is low else Dense(constant.dense())).dense(),
    ):
        torch.testing.assert_close(of(low), of(dense), rtol=1e-12, atol=1e-12)
    # `accumulate` is the gradient of <weighted_sum, gradients>, at the activations and at the writes.
    for block, leaf in ((low, low.values), (dense, dense.writes)):
        leaf.requires_grad_(True)
        (expected,) = torch.autograd.grad((block.weighted_sum(weights) * gradients).sum(), leaf)
        leaf.requires_grad_(False)
        torch.testing.assert_close(block.accumulate(weights, gradients), expected, rtol=1e-12, atol=1e-12)


def test_gradients_along_directions_are_those_in_full() -> None:
    steps = tuple((torch.randn(5, 8, **SEEDED), torch.randn(8, 7, **SEEDED)) for _ in range(2))
    found = DirectionGradients(torch.randn(5, 8, **SEEDED), torch.randn(5, 7, **SEEDED), steps)
    full, low = found.dense(), LowRank(torch.randn(3, 8, **SEEDED), torch.randn(3, 7, **SEEDED))
    along = [weights[..., None] * standard for weights, standard in steps]
    torch.testing.assert_close(full, found.weights[..., None] * found.directions[:, None] - along[0] - along[1])
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(found.total(), full.sum(0), **exact)
    torch.testing.assert_close(found.inner(low.dense()), Dense(low.dense()).inner(full), **exact)
    torch.testing.assert_close(found.inner_low_rank(low.values, low.directions), low.inner(full), **exact)
    some = torch.tensor([0, 5])
    torch.testing.assert_close(found.at(some).dense(), full[:, some], **exact)


def test_more_writers_than_fit_at_once_are_taken_in_parts() -> None:
    low = LowRank(torch.randn(300, 2, **SEEDED), torch.randn(300, 2, **SEEDED))
    weights, gradients = torch.randn(9, 300, **SEEDED), torch.randn(9, 2, 2, **SEEDED)
    dense = Dense(low.dense())
    torch.testing.assert_close(low.weighted_sum(weights), dense.weighted_sum(weights), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(low.inner(gradients), dense.inner(gradients), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma2"])
@pytest.mark.parametrize("kind", ["neurons", "direction"])
def test_engines_give_the_same_for_low_rank_and_dense(name: str, kind: str) -> None:
    """Not to the last bit: activations times directions are summed in another order. Here in float64, where it is."""
    model, ids = tiny(name), some()
    low, dense = graph_for(name, kind), graph_for(name, f"dense {kind}")
    assert low.writers == dense.writers
    cuts = torch.stack([small_cut(low, 0.4, seed=1).double(), 0.7 * small_cut(low, 0.9, seed=2).double()])
    near = {"rtol": 1e-6, "atol": 1e-9} if name in ALL_FLOAT64 else close(name)
    found = [engine_tables(model, graph, ids, cuts) for graph in (low, dense)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **near)


# -- examples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, kind in cases() if kind in ("neurons", "experts", "features") or (name, kind) in MORE],
)
def test_a_batch_is_its_examples_one_by_one_and_padding_changes_nothing(name: str, kind: str) -> None:
    check_batches(tiny(name), graph_for(name, kind), some(), close(name))


# -- refinement ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refined:
    """A graph whose MLPs are split, and the same graph with whole ones."""

    split: Graph
    whole: Graph

    def merged(self, table: torch.Tensor) -> torch.Tensor:
        """Columns of parts added to that of what they are parts of, and a router's or feature's row to its MLP's."""
        row = {name: i for i, name in enumerate(dict.fromkeys(self.owners(self.split)))}
        graph = self.split if table.shape == self.split.possible.shape else self.whole
        columns = torch.tensor([row[name] for name in self.owners(graph)])
        names = [re.sub(r"<router>|\.f\d+<in>", "", name) for name in graph.readers]
        readers = torch.tensor([self.whole.reader_index[name] for name in names])
        merged = table.new_zeros(len(table), len(row)).index_add(1, columns, table)
        return table.new_zeros(len(self.whole.readers), len(row)).index_add(0, readers, merged)

    def owners(self, graph: Graph) -> list[str]:
        """Of every writer the one that has it as a part; of a head of an attention that is split, all of that."""
        own = [f.part_of or w for f in graph.families for w in f.writers]
        return [part if (part := name.partition(".")[0]) in self.split.split_writers else name for name in own]


SPLIT = [(name, "neurons") for name in EVERY if name != "attention-only"]
SPLIT += [("gpt2", "direction"), ("gemma2", "direction"), ("neox", "dense direction")]
SPLIT += [(name, "features") for name, kind in cases() if kind == "features"]
SPLIT += [(name, "features before a norm") for name in ("gpt2", "gemma2")]
SPLIT += [("mixtral", "features and experts")]


@pytest.mark.parametrize(("name", "kind"), [*SPLIT, *((name, "experts") for name in MIXTURES)])
def test_scores_of_parts_and_rest_add_up_to_those_of_the_whole(name: str, kind: str) -> None:
    model, ids = tiny(name), some()
    graphs = Refined(graph_for(name, kind), build_graph(model, positions=graph_for(name, kind).positions))
    for alphas in ((1.0,), (0.25, 0.75)):
        split, whole = (edge_gradients(model, g, ids, LOGIT_DIFF, alphas=alphas) for g in (graphs.split, graphs.whole))
        torch.testing.assert_close(graphs.merged(split), graphs.merged(whole), **close(name))
    # Activation paths are of edges at all positions; under a post-norm, a split attention has another path than heads.
    if not graphs.whole.positions and not (name == "gemma2" and kind.startswith("features")):
        split, whole = (
            activation_path_gradients(model, g, ids, LOGIT_DIFF, (0.5,)) for g in (graphs.split, graphs.whole)
        )
        torch.testing.assert_close(graphs.merged(split), graphs.merged(whole), **close(name))
    # Exactly: parts and rest replaced together are the whole node replaced.
    for part in {"m0", f"m{model.dims.n_layers - 1}", *graphs.split.split_writers}:
        cuts = [
            g.possible & torch.tensor([owner.partition(".")[0] == part for owner in graphs.owners(g)])
            for g in (graphs.split, graphs.whole)
        ]
        split, whole = (
            run_edges(model, g, ids, cut) for g, cut in zip((graphs.split, graphs.whole), cuts, strict=True)
        )
        torch.testing.assert_close(split, whole, **close(name))


def test_a_circuit_file_does_not_take_nodes_that_it_cannot_describe(tmp_path: Path) -> None:
    graph = graph_for("gpt2", "direction")
    circuit = mi.select(graph, mi.score_edges(tiny("gpt2"), graph, some(), method="eap"), edges=9)
    assert str(Node.parse("m0.f0")) in {name for name in graph.writers}
    assert graph.digest() != build_graph(tiny("gpt2"), parts=directions(shown_on_the_page())[::-1][:1]).digest()
    with pytest.raises(UnsupportedError, match=r"this graph has 'm0\.f0'"):
        mi.save_circuit(tmp_path / "x.circuit.json", circuit, model=tiny("gpt2"), title="x")
    assert not list(tmp_path.iterdir())


def test_parts_of_what_the_model_does_not_have_are_refused() -> None:
    made: Any = shown_on_the_page()
    for layer, twice in ((9, False), (0, True)):
        part = made(layer, (1.0,) + (0.0,) * (D_MODEL - 1))
        with pytest.raises(InputError, match="Two families have a node 'm0.f0'" if twice else "is part of 'm9'"):
            build_graph(tiny("gpt2"), parts=[part] * (1 + twice))


@pytest.mark.parametrize("name", MIXTURES)
def test_an_expert_writes_its_output_times_its_weight(name: str) -> None:
    """Against the experts' own matrices: an expert that is not chosen writes 0, and nothing is left of the MLP."""
    model, ids = tiny(name), some()
    graph = graph_for(name, "experts")
    recorded = record_writes(model, graph, ids.clean, ids).values
    blocks = blocks_of(model, graph, recorded)
    for family in graph.families:
        if family.part_of is not None:
            written = blocks[family].dense()
            chosen = (written != 0).any(-1).sum(0)
            assert bool((chosen == 2).all())  # two experts a token
        elif family.writers[0][0] == "m":
            size = float(recorded[family.output].abs().max())
            assert float(blocks[family].dense().abs().max()) < 1e-5 * size  # rounding


@pytest.mark.parametrize("name", MIXTURES)
def test_router_and_experts_read_apart_and_together_as_the_mlp(name: str) -> None:
    """Cutting an edge into both is cutting it into the MLP; into one of them, the MLP with that input alone changed."""
    model, ids = tiny(name), some()
    graph, whole = graph_for(name, "experts"), build_graph(tiny(name))
    both = graph.mask_of(["input->m1", "a0.h1->m1", "input->m1<router>", "a0.h1->m1<router>"])
    expected = run_edges(model, whole, ids, whole.mask_of(["input->m1", "a0.h1->m1"]))
    torch.testing.assert_close(run_edges(model, graph, ids, both), expected, **close(name))
    stream = Site("resid_mid", 1)
    now, then = (record_writes(model, graph, tokens, ids).values for tokens in (ids.clean, ids.corrupt))
    family = graph.families[0]
    change = (family.writes(model, now).dense() - family.writes(model, then).dense())[0]
    resid = model.run(ids.clean, ids.mask, record=[stream]).values[stream]
    changed = model.layout.read_mlp(1, resid - change)
    own = model.layout.read_mlp(1, resid)
    for reader, inputs in (("m1", (changed, own)), ("m1<router>", (own, changed))):
        written = expert_writes(model, 1, *inputs).sum(0)
        edits = {Site("mlp_out", 1): lambda value, written=written: written.to(value.dtype)}
        logits = model.run(ids.clean, ids.mask, interventions=edits).logits
        assert logits is not None
        by_hand = LOGIT_DIFF(logits.gather(1, ids.answer_pos[..., None].expand(-1, -1, logits.shape[-1])), ids)
        found = run_edges(model, graph, ids, graph.mask_of([f"input->{reader}"]))
        torch.testing.assert_close(found, by_hand, **close(name))
        assert not torch.allclose(found, expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_scores_into_router_and_experts_add_up_to_those_into_the_mlp(name: str) -> None:
    model, ids = tiny(name), some()
    graphs = Refined(graph_for(name, "experts"), build_graph(model))
    split, whole = (edge_gradients(model, g, ids, LOGIT_DIFF) for g in (graphs.split, graphs.whole))
    torch.testing.assert_close(graphs.merged(split), graphs.merged(whole), **close(name))
    assert bool((split[graphs.split.reader_index["m1<router>"]] != 0).any())


@pytest.mark.parametrize("name", MIXTURES)
def test_the_gradient_at_no_cut_is_minus_the_score(name: str) -> None:
    model, graph, ids = tiny(name), graph_for(name, "experts"), some()
    values = corrupt_replacement(model, graph).on(ids)
    kept = torch.zeros(1, *graph.possible.shape, dtype=torch.float64)
    slopes = mask_gradients(model, graph, ids, kept, values, lambda logits: LOGIT_DIFF(logits[0], ids)[None])[1][0]
    torch.testing.assert_close(-slopes, edge_gradients(model, graph, ids, LOGIT_DIFF), **close(name))


def test_experts_of_a_model_without_them_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="has no mixture of experts"):
        build_graph(tiny("gpt2"), experts=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Qwen2-MoE, dense first", "experts of layer 1 .* do not add up .* shared expert"),
        ("Llama 4", "cannot be run one by one"),
        ("FlexOLMo (norm after)", "under a post-norm"),
    ],
)
def test_experts_that_are_not_exact_are_refused_by_name(name: str, reason: str) -> None:
    model = mi.load_model(odd(name))
    with pytest.raises(UnsupportedError, match=reason) as caught:
        build_graph(model, experts=True)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("keep the MLP as one node.")


def test_a_circuit_of_experts_is_stored_and_read(tmp_path: Path) -> None:
    model, ids = build("mixtral", dtype=torch.float32), some()
    graph = build_graph(model, level="node", experts=True)
    assert graph.experts == (4, 4) and graph.unit_names()[-1] == "m1.e3"
    circuit = mi.select(graph, mi.score_edges(model, graph, ids, method="eap"), nodes=8)
    path = tmp_path / "x.circuit.json"
    mi.save_circuit(path, circuit, model=model, title="x")
    read = mi.load_circuit(path)
    assert read.graph.digest() == graph.digest() and read.graph.experts == graph.experts
    assert torch.equal(read.kept, circuit.kept)
    document = json.loads(path.read_text("utf-8"))
    assert document["graph"]["experts"] == [4, 4]


def test_a_circuit_of_experts_and_routers_is_drawn() -> None:
    graph = graph_for("mixtral", "experts")
    kept = graph.mask_of(["input->m0<router>", "input->m0", "m0.e1->a1.h0<q>", "a1.h0->logits"])
    figure = circuit_figure(mi.Circuit(graph, on_paths(graph, kept), 4))
    assert {"m0.e1", "a1.h0"} <= {text for trace in figure.data for text in trace.text or () if isinstance(text, str)}
