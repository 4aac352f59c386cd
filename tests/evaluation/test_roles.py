"""Roles by measurement: known heads get their roles, controls and held-out pairs can refute them, every shape works."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mechinterp as mi
from mechinterp.base.keep import Compute
from mechinterp.evaluation.predictions import PartsReplaced
from mechinterp.graphs.circuit import Circuit
from tests.support import hand_circuits
from tests.support import models_tiny as tiny
from tests.support.models_tiny import EVERY


def whole(graph: mi.Graph) -> Circuit:
    return Circuit(graph, graph.possible, graph.n_edges)


def by_role(found: mi.MeasuredRoles) -> dict[str, tuple[str, ...]]:
    return {key: role["nodes"] for key, role in found.roles.items()}


Bundled = tuple[mi.HookManager, mi.Pairs, mi.Pairs]


@pytest.fixture(scope="module")
def bundled(bundled_model: mi.HookManager) -> Bundled:
    """The bundled model with train and test pairs of IOI."""
    task = mi.load_task("ioi")
    train, test = (task.pairs(bundled_model, n=16, split=split, seed=0) for split in ("train", "test"))
    return bundled_model, train, test


@pytest.fixture(scope="module")
def found(bundled: Bundled) -> mi.MeasuredRoles:
    """The roles in the bundled model's whole graph."""
    model, train, test = bundled
    return mi.measured_roles(model, whole(mi.build_graph(model)), train, test)


@pytest.mark.slow
def test_the_heads_of_the_bundled_model(bundled: Bundled, found: mi.MeasuredRoles) -> None:
    """a0.h0 and a1.h0 were initialised as a previous-token and an induction head; the model's card says so."""
    model, train, _ = bundled
    roles = by_role(found)
    assert roles["previous_token"] == ("a0.h0",) and roles["induction"] == ("a1.h0",)
    assert set(roles["toward_heads"]) == {"a2.h1", "a2.h3", "a3.h0", "a3.h2", "a3.h3"} and "toward_mlps" not in roles
    assert all(entry.ok for entry in found.predictions) and not any(entry.ok for entry in found.failed)
    assert all(entry.prediction.controls for entry in found.predictions)
    direct = mi.direct_logit_attribution(model, train).mean()
    row = found.evidence.set_index("node").loc["a2.h1"]
    assert row["direct effect"] == pytest.approx(float(direct.at(node="a2.h1")))
    assert row["replacing it"] == pytest.approx(float(mi.activation_patching(model, train, ["a2.h1"]).mean().values))
    assert row["role"] == "heads that write toward the answer" and not found.notes


def test_every_line_is_halfway_from_a_member_to_the_control(bundled: Bundled, found: mi.MeasuredRoles) -> None:
    """The control is at the upper quartile of the heads below the limit, and both are clear of the line."""
    model, train, _ = bundled
    parts, limits = mi.direct_logit_attribution(model, train), mi.RoleLimits()
    heads = [f"a{i}.h{j}" for i in range(4) for j in range(4)]
    values = {head: parts.at(node=head).values.double() for head in heads}
    direct = {head: float(value.mean()) for head, value in values.items()}
    limit = limits.direct * float(parts.mean().values.sum())
    below = sorted((head for head in heads if direct[head] < limit), key=lambda head: direct[head])
    control = below[int(limits.control * (len(below) - 1))]
    members = by_role(found)["toward_heads"]
    stated = [
        e.prediction for e in found.predictions if e.prediction.measure in [mi.DirectEffect(node=n) for n in members]
    ]
    assert len(stated) == len(members) == 5
    for prediction in stated:
        own = prediction.measure.node
        assert prediction.value == pytest.approx((direct[own] + max(0.0, direct[control])) / 2, rel=1e-4)
        assert [c.measure for c in prediction.controls] == [mi.DirectEffect(node=control)]
        error = max(float(values[node].std()) / len(train) ** 0.5 for node in (own, control))
        assert direct[own] - prediction.value > limits.margin * error


@pytest.mark.slow
def test_other_pairs_can_refute_them(bundled: Bundled) -> None:
    """With clean and corrupt prompts exchanged, replacing a node costs nothing, so no predicted cost holds."""
    model, train, test = bundled
    exchanged = replace(test, clean=test.corrupt, corrupt=test.clean)
    refuted = mi.measured_roles(model, whole(mi.build_graph(model)), train, exchanged)
    effects = [e for e in (*refuted.predictions, *refuted.failed) if isinstance(e.prediction.measure, PartsReplaced)]
    costs = [entry for entry in effects if entry.prediction.relation == ">="]
    assert costs and not any(entry.ok for entry in costs)
    assert "toward_heads" not in refuted.roles  # a node that loses its prediction loses its role


def test_only_nodes_of_the_circuit_have_roles(bundled: Bundled) -> None:
    model, train, test = bundled
    graph = mi.build_graph(model)
    kept = graph.mask_of(["input->a3.h0<q>", "a3.h0->logits", "input->a0.h0<k>", "a0.h0->logits"])
    own = mi.measured_roles(model, Circuit(graph, kept, 4), train, test)
    assert sorted(node for nodes in by_role(own).values() for node in nodes) == ["a0.h0", "a3.h0"]
    assert own.evidence["node"].tolist() == ["a0.h0", "a3.h0"]


@pytest.mark.slow
def test_at_positions_a_role_is_where_it_was_measured(bundled: Bundled) -> None:
    model, train, test = bundled
    graph = mi.build_graph(model, positions=["S1+1", "S2", "end"])
    roles = by_role(mi.measured_roles(model, whole(graph), train, test))
    assert roles["toward_heads"] == tuple(f"{node}@end" for node in ("a2.h1", "a2.h3", "a3.h0", "a3.h2", "a3.h3"))
    assert {name.partition("@")[2] for name in roles["previous_token"]} == {"S1+1", "S2", "end", "rest"}


@pytest.mark.slow
def test_an_mlp_that_is_split_has_no_role(bundled: Bundled) -> None:
    """If some neurons are separate nodes, `m2` is all the others, which is not what the analyses measure."""
    model, _, _ = bundled
    task = mi.load_task("subject_verb_agreement")
    train, test = (task.pairs(model, n=16, split=split, seed=0) for split in ("train", "test"))
    plain = mi.measured_roles(model, whole(mi.build_graph(model)), train, test)
    assert by_role(plain)["toward_mlps"] == ("m2", "m3")
    graph = mi.build_graph(model, level="node", neurons={3: [0, 5], 2: [1]})
    split = mi.measured_roles(model, whole(graph), train, test)
    named = [node for nodes in by_role(split).values() for node in nodes] + split.evidence["node"].tolist()
    assert not {"m2", "m3"} & set(named) and "m0" in named and "m2, m3" in split.notes[0]
    parts = [e.prediction.measure.parts for e in split.predictions if isinstance(e.prediction.measure, PartsReplaced)]
    assert parts and not {"m2", "m3"} & {part for several in parts for part in several}


def test_no_line_is_below_half_the_limit(found: mi.MeasuredRoles) -> None:
    entries = (*found.predictions, *found.failed)
    limited = [e.prediction for e in entries if isinstance(e.prediction.measure, (mi.Attention, mi.Detector))]
    assert limited and all(prediction.value >= 0.15 for prediction in limited)


def test_a_member_that_fails_takes_only_its_own_role(bundled: Bundled, found: mi.MeasuredRoles) -> None:
    """On test pairs in which one member's line is out of reach, the others keep their role."""
    model, train, test = bundled
    order = mi.direct_logit_attribution(model, test)
    weakest = min(by_role(found)["toward_heads"], key=lambda node: float(order.mean().at(node=node)))
    rows = order.at(node=weakest).values.argsort()[:2]  # the pairs on which it writes least
    other = mi.measured_roles(model, whole(mi.build_graph(model)), train, test[rows])
    lost = set(by_role(found)["toward_heads"]) - set(by_role(other)["toward_heads"])
    failed = {e.prediction.measure.node for e in other.failed if isinstance(e.prediction.measure, mi.DirectEffect)}
    assert lost == failed != set() and len(by_role(other)["toward_heads"]) >= 2


@pytest.mark.slow
def test_names_of_positions_that_contain_the_word_to(bundled: Bundled) -> None:
    model, train, test = bundled
    named = {"IO": "A", "S1": "B to C", "S1+1": "C", "S2": "A to B", "end": "end"}
    renamed = [replace(p, positions={named[k]: v for k, v in p.positions.items()}) for p in (train, test)]
    labels = [role["label"] for role in mi.measured_roles(model, whole(mi.build_graph(model)), *renamed).roles.values()]
    assert len(set(labels)) == len(labels) and "attends 'A to B' -> 'B to C'" in labels


@pytest.mark.parametrize("name", ["induction", "copy_head"])
def test_the_heads_of_handcrafted_models(name: str) -> None:
    made = hand_circuits.HAND[name]()
    circuit = Circuit(made.graph, made.graph.mask_of(made.truth), 1)
    last = {"induction": "a1.h0", "copy_head": "a0.h0"}[name]
    assert by_role(mi.measured_roles(made.model, circuit, made.pairs, made.pairs))["toward_heads"] == (last,)
    scores = mi.head_scores(made.model, "previous_token", n=2, length=3).mean() if name == "induction" else None
    assert scores is None or float(scores.at(layer=0, head=0)) > 0.99


LOW = mi.RoleLimits(direct=0.02, detector=0.05, attention=0.1, matters=0.0, effect=0.0)
"""Random weights have no strong roles, so the limits are low."""


@pytest.mark.slow
@pytest.mark.parametrize("shape", EVERY)
def test_the_roles_of_every_shape_can_be_saved_and_verified(shape: str, tmp_path: Path) -> None:
    model = tiny.tiny(shape)
    train, test = (tiny.pairs(3, seed=seed, positions={"a": torch.ones(3).long()}) for seed in (0, 1))
    circuit = whole(mi.build_graph(model))
    measured = mi.measured_roles(model, circuit, train, test, limits=LOW)
    assert measured.roles and measured.predictions
    path = tmp_path / "x.circuit.json"
    mi.save_circuit(path, circuit, model=model, roles=measured.roles, predictions=measured.predictions)
    assert mi.verify(path, model=model).ok


@pytest.mark.slow
def test_roles_do_not_depend_on_the_batch_size_and_progress_ends() -> None:
    model = tiny.tiny("gpt2")
    train, test = (tiny.pairs(5, seed=seed, positions={"a": torch.ones(5).long()}) for seed in (0, 1))
    circuit = whole(mi.build_graph(model))
    calls: list[tuple[int, int]] = []
    batched = mi.measured_roles(
        model, circuit, train, test, limits=LOW, batch_size=3, progress=lambda *call: calls.append(call)
    )
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1]
    assert by_role(batched) == by_role(mi.measured_roles(model, circuit, train, test, limits=LOW, batch_size=5))


def test_what_cannot_be_measured_is_said() -> None:
    """No wrong answers: no direct effects, and the rest is still there."""
    model, pairs = tiny.tiny("gpt2"), tiny.pairs(3, positions={"a": torch.ones(3).long(), "z": torch.full((3,), 6)})
    bare = replace(pairs, right=None, wrong=None)
    measured = mi.measured_roles(model, whole(mi.build_graph(model)), bare, bare, metric="kl_to_clean")
    assert [note.partition(":")[0] for note in measured.notes] == ["Direct effects were not measured"]
    assert "attention" in measured.evidence and "direct effect" not in measured.evidence


@pytest.mark.slow
def test_a_killed_measurement_goes_on(bundled: Bundled, found: mi.MeasuredRoles) -> None:
    """Stopped at a progress call near its end, it makes no patched run of the train pairs again, and ends the same."""
    model, train, test = bundled
    circuit, kept, computed = whole(mi.build_graph(model)), dict[str, Mapping[str, torch.Tensor]](), list[str]()

    def keep(name: str, compute: Compute) -> Mapping[str, torch.Tensor]:
        if name not in kept:
            computed.append(name)
            kept[name] = compute()
        return kept[name]

    def kill(done: int, total: int, /) -> None:
        if done > 0.95 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mi.measured_roles(model, circuit, train, test, progress=kill, keep=keep)
    before = list(computed)
    assert len(before) == len(set(before)) == 3  # of nodes, of paths, of whole roles
    resumed = mi.measured_roles(model, circuit, train, test, keep=keep)
    assert computed == before
    assert resumed.roles == found.roles and resumed.evidence.equals(found.evidence)
    assert [e.prediction for e in resumed.predictions] == [e.prediction for e in found.predictions]
