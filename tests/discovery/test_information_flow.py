"""Information flow routes: by hand, as conservation laws, under batches and padding, and what they do not see."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.discovery.information_flow import IMPORTANCES, edge_importances
from tests.support.models_tiny import EVERY, NATIVE, SHAPES, build, pairs, tiny

TOLERANCE = 2e-5
"""Gemma-2 and the other RMSNorm shapes compute norms and softmax in float32 inside."""


class ByHand:
    """One example of one model, its writes and streams as plain vectors."""

    def __init__(self, name: str, some: mi.Pairs, row: int, split_input: bool = False) -> None:
        self.model = tiny(name)
        self.graph = graph = mi.build_graph(self.model, split_input=split_input)
        n, dims, layout = int(some.mask[row].sum()), self.model.dims, self.model.layout
        self.n_pos, self.answer_pos = n, [int(p) for p in some.answer_pos[row] if p >= 0]
        run = self.model.run(some.clean[row : row + 1, :n], record=lambda name: True).values
        at = {str(site): value[0].double() for site, value in run.items()}
        self.writes: dict[str, torch.Tensor] = {}
        self.biases: list[tuple[int, torch.Tensor]] = []
        """(the first layer whose attention reads it, what it adds)"""
        for name in graph.inputs:
            self.writes[name] = at[name if split_input else "resid_pre.0"]
        self.at = at
        for layer in range(dims.n_layers):
            heads = layout.head_writes(layer, at[f"z.{layer}"])
            self.writes |= {f"a{layer}.h{head}": heads[head] for head in range(dims.n_heads)}
            bias = layout.attention_bias(layer, at[f"z.{layer}"])
            self.biases.append((layer, torch.zeros_like(heads[0]) if bias is None else bias))
            if dims.has_mlp:
                self.writes[f"m{layer}"] = at[f"mlp_out.{layer}"]

    def stream(self, reader: str) -> torch.Tensor:
        if reader == "logits":
            return self.at["resid_final"]
        layer = int(reader[1:].partition(".")[0])
        middle = reader.startswith("m") and not self.model.dims.parallel
        return self.at[f"resid_{'mid' if middle else 'pre'}.{layer}"]

    def before(self, reader: str) -> list[str]:
        row = self.graph.reader_index[reader]
        return [
            w for w, possible in zip(self.graph.writers, self.graph.possible[row].tolist(), strict=True) if possible
        ]

    def importances(self, reader: str, pos: int) -> dict[str, float]:
        y = self.stream(reader)[pos]
        near = {w: max(0.0, float(y.abs().sum() - (y - self.writes[w][pos]).abs().sum())) for w in self.before(reader)}
        return {w: value / sum(near.values()) if value else 0.0 for w, value in near.items()}

    def sources(self, layer: int, head: int, pos: int) -> list[float]:
        """Shares of the value vectors of each position in the head's write, through the post-norm's scale."""
        dims, maps = self.model.dims, self.model.layout.attention[layer]
        v = self.at[f"v.{layer}"][:, head * dims.n_kv_heads // dims.n_heads]
        weights = self.at[f"pattern.{layer}"][head, pos]
        total = self.model.layout.attention_total(layer, self.at[f"z.{layer}"])[pos]
        y = self.writes[f"a{layer}.h{head}"][pos]
        moved = [w * x @ maps.W_O[head].double() for w, x in zip(weights, v, strict=True)]
        terms = [maps.post.project(term) / maps.post.scale(total) for term in moved]
        torch.testing.assert_close(torch.stack(terms).sum(0), y, rtol=0, atol=TOLERANCE)
        near = [max(0.0, float(y.abs().sum() - (y - term).abs().sum())) for term in terms]
        return [value / sum(near) if value else 0.0 for value in near]

    def per_reader(self) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        for reader in self.graph.readers:
            for pos in range(self.n_pos):
                for writer, share in self.importances(reader, pos).items():
                    found[f"{writer}->{reader}"] += share / self.n_pos
        return found

    def from_answer(self) -> dict[str, float]:
        found: dict[str, float] = defaultdict(float)
        flow: dict[tuple[str, int], float] = defaultdict(float)

        def read(reader: str, pos: int, weight: float) -> None:
            for writer, share in self.importances(reader, pos).items():
                found[f"{writer}->{reader}"] += weight * share
                flow[writer, pos] += weight * share

        for pos in self.answer_pos:
            read("logits", pos, 1 / len(self.answer_pos))
        dims = self.model.dims
        for layer in reversed(range(dims.n_layers)):
            if dims.has_mlp:
                for pos in range(self.n_pos):
                    read(f"m{layer}", pos, flow[f"m{layer}", pos])
            for head in range(dims.n_heads):
                group = head * dims.n_kv_heads // dims.n_heads
                name = f"a{layer}.h{head}" if dims.n_heads == dims.n_kv_heads else f"a{layer}.kv{group}"
                for pos in range(self.n_pos):
                    weight = flow[f"a{layer}.h{head}", pos]
                    read(f"a{layer}.h{head}<q>", pos, weight)
                    for source, share in enumerate(self.sources(layer, head, pos)):
                        read(f"{name}<k>", source, weight * share)
                        read(f"{name}<v>", source, weight * share)
        return found


@pytest.mark.parametrize("name", EVERY)
def test_it_is_the_formula_by_hand(name: str) -> None:
    model, some = tiny(name), pairs(2, 4, padded=True, answer_pos=[[3, 1], [2, -1]])
    graph = mi.build_graph(model)
    rows = [ByHand(name, some, row) for row in range(2)]
    by_hand = {
        "per-reader": [row.per_reader() for row in rows],
        "from-answer": [row.from_answer() for row in rows],
    }
    for importance, tables in by_hand.items():
        scores = mi.score_edges(model, graph, some, method="information-flow", importance=importance)
        for edge, value in scores.to_dict().items():
            assert value == pytest.approx(sum(table[edge] for table in tables) / 2, abs=TOLERANCE), edge
        assert dict(scores.cost) == {"forwards": 2, "backwards": 0}


@pytest.mark.parametrize("name", EVERY)
def test_the_terms_and_the_biases_are_the_whole_stream(name: str) -> None:
    hand = ByHand(name, pairs(2, 5), 0)
    for reader in hand.graph.readers:
        layer = hand.model.dims.n_layers if reader == "logits" else int(reader[1:].partition(".")[0])
        middle = reader.startswith("m") and not hand.model.dims.parallel
        total = sum(hand.writes[w] for w in hand.before(reader))
        total = total + sum(bias for i, bias in hand.biases if i < layer + middle)
        torch.testing.assert_close(total, hand.stream(reader), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", SHAPES)
def test_what_flows_into_a_component_flows_on(name: str) -> None:
    """1 into the logits; into every MLP and query as much as its component's write has. Into keys and values as much,
    less what is lost where value vectors cancel so that none is near their sum. With output biases, which are no term,
    all the writes of a token can be far from its stream, and that is lost too."""
    model = tiny(name)
    graph = mi.build_graph(model)
    table = edge_importances(model, graph, pairs(3, padded=True), importance="from-answer") / 3
    into, out_of = table.sum(1), table.sum(0)
    assert float(into[-1]) == pytest.approx(1) and float(into.min()) > 0
    lost = graph.feeds[:-1].to(table.dtype) @ out_of - into[:-1]
    keys, values = (torch.tensor([reader.endswith(f"<{c}>") for reader in graph.readers[:-1]]) for c in "kv")
    whole = edge_importances(model, graph, pairs(3, padded=True)).sum(1) / 3
    if name in ("llama", "gemma2", "qwen2"):
        torch.testing.assert_close(lost[~keys & ~values], 0 * lost[~keys & ~values], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(lost[keys], lost[values], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=TOLERANCE)
    assert float(lost.min()) > -TOLERANCE and float((lost < TOLERANCE).double().mean()) > 0.5
    assert float(whole.max()) < 1 + TOLERANCE and float(whole.median()) == pytest.approx(1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_batches_padding_and_memory_change_nothing(name: str, importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = tiny(name), pairs(5, padded=True)
    graph = mi.build_graph(model)
    whole = mi.score_edges(model, graph, some, method="information-flow", importance=importance)
    total = torch.zeros_like(whole.total)
    for row in range(len(some)):
        n = int(some.mask[row].sum())
        twice = mi.Pairs(clean=some.clean[[row, row], :n], corrupt=some.corrupt[[row, row], :n])
        total += edge_importances(model, graph, twice, importance=importance) / 2
    torch.testing.assert_close(whole.total, total, rtol=0, atol=TOLERANCE)
    monkeypatch.setattr("mechinterp.discovery.information_flow.TOKEN_BUDGET_BYTES", 1)
    parts = mi.score_edges(model, graph, some, method="information-flow", importance=importance, batch_size=2)
    torch.testing.assert_close(whole.total, parts.total, rtol=0, atol=TOLERANCE)


def test_the_input_can_be_split() -> None:
    some = pairs(2, 4)
    some = mi.Pairs(clean=some.clean[[0, 0]], corrupt=some.corrupt)
    graph = mi.build_graph(tiny("gpt2"), split_input=True)
    scores = mi.score_edges(tiny("gpt2"), graph, some, method="information-flow")
    expected = ByHand("gpt2", some, 0, split_input=True).per_reader()
    assert scores.to_dict() == pytest.approx(expected, abs=TOLERANCE)


def test_it_sees_neither_the_corrupt_prompt_nor_the_metric_nor_the_readers() -> None:
    model, some = tiny("gpt2"), pairs(3)
    graph = mi.build_graph(model)
    other = mi.Pairs(clean=some.clean, corrupt=some.corrupt.flip(0))
    scores = mi.score_edges(model, graph, some, method="information-flow")
    again = mi.score_edges(model, graph, other, method="information-flow", metric="kl_to_clean")
    assert torch.equal(scores.values, again.values)
    rows = scores.values[graph.channel_readers(2, "q").start : graph.channel_readers(2, "v").stop]
    assert torch.equal(rows, rows[:1].expand_as(rows))


@pytest.mark.slow
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_write_of_nothing_and_a_model_of_nothing_score_exactly_zero(importance: str) -> None:
    bridge = build(NATIVE[1], dtype=torch.float32).bridge
    with torch.no_grad():
        bridge.blocks[1].attn.o.weight.zero_()
        bridge.blocks[1].attn.o.bias.zero_()
    model = mi.load_model(bridge)
    graph = mi.build_graph(model)
    table = edge_importances(model, graph, pairs(2), importance=importance)
    assert bool((table[:, graph.head_writers(1)] == 0).all()) and float(table[-1].sum()) == pytest.approx(2)
    with torch.no_grad():
        for parameter in bridge.parameters():
            parameter.zero_()
        bridge.unembed.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert bool((edge_importances(model, graph, pairs(2), importance=importance) == 0).all())


@pytest.mark.parametrize("settings", [{"importance": "paths"}, {"replacement": "means"}])
def test_an_unknown_setting_gets_one_clear_line(settings: dict[str, Any]) -> None:
    with pytest.raises(mi.InputError, match=f"Unknown {next(iter(settings))}"):
        mi.score_edges(tiny("gpt2"), mi.build_graph(tiny("gpt2")), pairs(2), method="information-flow", **settings)
