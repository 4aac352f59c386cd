"""Roles by measurement: known heads get their roles, controls and held-out pairs can refute them, every shape works."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mechinterp as mi
from mechinterp.evaluation.predictions import PartsReplaced
from mechinterp.graphs.circuit import Circuit
from tests.support import hand_circuits
from tests.support import models_tiny as tiny
from tests.support.models_tiny import EVERY


def whole(graph: mi.Graph) -> Circuit:
    return Circuit(graph, graph.possible, graph.n_edges)


def by_role(found: mi.MeasuredRoles) -> dict[str, tuple[str, ...]]:
    return {key: role["nodes"] for key, role in found.roles.items()}


@pytest.fixture(scope="module")
def bundled() -> tuple[mi.HookManager, mi.Pairs, mi.Pairs]:
    model = mi.load_model("bundled")
    train, test = (mi.load_task("ioi").pairs(model, n=40, split=split, seed=0) for split in ("train", "test"))
    return model, train, test


def test_the_heads_of_the_bundled_model(bundled: tuple[mi.HookManager, mi.Pairs, mi.Pairs]) -> None:
    """a0.h0 and a1.h0 began as a previous-token and an induction head; the model's card says so."""
    model, train, test = bundled
    found = mi.measured_roles(model, whole(mi.build_graph(model)), train, test)
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


def test_the_line_is_between_the_weakest_member_and_the_strongest_other(
    bundled: tuple[mi.HookManager, mi.Pairs, mi.Pairs],
) -> None:
    model, train, test = bundled
    found = mi.measured_roles(model, whole(mi.build_graph(model)), train, test)
    parts = mi.direct_logit_attribution(model, train).mean()
    direct = {f"a{i}.h{j}": float(parts.at(node=f"a{i}.h{j}")) for i in range(4) for j in range(4)}
    members = by_role(found)["toward_heads"]
    weakest = min(direct[node] for node in members)
    control, strongest = max(((n, v) for n, v in direct.items() if n not in members), key=lambda item: item[1])
    for entry in found.predictions:
        if entry.prediction.measure in [mi.DirectEffect(node=node) for node in members]:
            line = max(0.1 * float(parts.values.sum()), (weakest + strongest) / 2)
            assert entry.prediction.value == pytest.approx(line, rel=1e-4)
            assert [c.measure for c in entry.prediction.controls] == [mi.DirectEffect(node=control)]


def test_other_pairs_can_refute_them(bundled: tuple[mi.HookManager, mi.Pairs, mi.Pairs]) -> None:
    """With clean and corrupt prompts exchanged, replacing no longer costs anything, and nothing that it costs holds."""
    model, train, test = bundled
    turned = replace(test, clean=test.corrupt, corrupt=test.clean)
    found = mi.measured_roles(model, whole(mi.build_graph(model)), train, turned)
    effects = [e for e in (*found.predictions, *found.failed) if isinstance(e.prediction.measure, PartsReplaced)]
    assert effects and not any(entry.ok for entry in effects if entry.prediction.relation == ">=")
    assert "toward_heads" not in found.roles  # a node that loses its prediction loses its role


def test_only_nodes_of_the_circuit_have_roles(bundled: tuple[mi.HookManager, mi.Pairs, mi.Pairs]) -> None:
    model, train, test = bundled
    graph = mi.build_graph(model)
    kept = graph.mask_of(["input->a3.h0<q>", "a3.h0->logits", "input->a0.h0<k>", "a0.h0->logits"])
    found = mi.measured_roles(model, Circuit(graph, kept, 4), train, test)
    assert sorted(node for nodes in by_role(found).values() for node in nodes) == ["a0.h0", "a3.h0"]
    assert found.evidence["node"].tolist() == ["a0.h0", "a3.h0"]


def test_at_positions_a_role_is_where_it_was_measured(bundled: tuple[mi.HookManager, mi.Pairs, mi.Pairs]) -> None:
    model, train, test = bundled
    graph = mi.build_graph(model, positions=["S1+1", "S2", "end"])
    found = mi.measured_roles(model, whole(graph), train, test)
    roles = by_role(found)
    assert roles["toward_heads"] == tuple(f"{node}@end" for node in ("a2.h1", "a2.h3", "a3.h0", "a3.h2", "a3.h3"))
    assert {name.partition("@")[2] for name in roles["previous_token"]} == {"S1+1", "S2", "end", "rest"}


def test_an_mlp_that_is_split_has_no_role(bundled: tuple[mi.HookManager, mi.Pairs, mi.Pairs]) -> None:
    """Where neurons are nodes, `m2` is the others together, which is not what the analyses measure."""
    model, _, _ = bundled
    task = mi.load_task("subject_verb_agreement")
    train, test = (task.pairs(model, n=30, split=split, seed=0) for split in ("train", "test"))
    plain = mi.measured_roles(model, whole(mi.build_graph(model)), train, test)
    assert by_role(plain)["toward_mlps"] == ("m2", "m3")
    graph = mi.build_graph(model, level="node", neurons={3: [0, 5], 2: [1]})
    found = mi.measured_roles(model, whole(graph), train, test)
    named = [node for nodes in by_role(found).values() for node in nodes] + found.evidence["node"].tolist()
    assert not {"m2", "m3"} & set(named) and "m0" in named and "m2, m3" in found.notes[0]
    parts = [e.prediction.measure.parts for e in found.predictions if isinstance(e.prediction.measure, PartsReplaced)]
    assert not {"m2", "m3"} & {part for several in parts for part in several}


def test_a_prediction_is_never_weaker_than_the_role(bundled: tuple[mi.HookManager, mi.Pairs, mi.Pairs]) -> None:
    model, train, test = bundled
    found = mi.measured_roles(model, whole(mi.build_graph(model)), train, test)
    for entry in (*found.predictions, *found.failed):
        if isinstance(entry.prediction.measure, (mi.Attention, mi.Detector)):
            assert entry.prediction.value >= 0.3


def test_names_of_positions_that_look_like_ours(bundled: tuple[mi.HookManager, mi.Pairs, mi.Pairs]) -> None:
    model, train, test = bundled
    named = {"IO": "A", "S1": "B to C", "S1+1": "C", "S2": "A to B", "end": "end"}
    renamed = [replace(p, positions={named[k]: v for k, v in p.positions.items()}) for p in (train, test)]
    found = mi.measured_roles(model, whole(mi.build_graph(model)), *renamed)
    assert len({role["label"] for role in found.roles.values()}) == len(found.roles)
    assert "heads from 'A to B' to 'B to C'" in [role["label"] for role in found.roles.values()]


@pytest.mark.parametrize("name", ["induction", "copy_head"])
def test_circuits_built_by_hand(name: str) -> None:
    made = hand_circuits.HAND[name]()
    found = mi.measured_roles(
        made.model, Circuit(made.graph, made.graph.mask_of(made.truth), 1), made.pairs, made.pairs
    )
    last = {"induction": "a1.h0", "copy_head": "a0.h0"}[name]
    assert by_role(found)["toward_heads"] == (last,)
    scores = mi.head_scores(made.model, "previous_token", n=2, length=3).mean() if name == "induction" else None
    assert scores is None or float(scores.at(layer=0, head=0)) > 0.99


@pytest.mark.parametrize("shape", EVERY)
def test_every_shape(shape: str, tmp_path: Path) -> None:
    """Random weights have no roles worth the name, so the limits are low; the file that comes out verifies."""
    model = tiny.build(shape)
    train, test = (tiny.pairs(6, seed=seed, positions={"a": torch.ones(6).long()}) for seed in (0, 1))
    limits = mi.RoleLimits(direct=0.02, detector=0.05, attention=0.1, matters=0.0, effect=0.0)
    circuit = whole(mi.build_graph(model))
    told: list[tuple[int, int]] = []
    found = mi.measured_roles(
        model,
        circuit,
        train,
        test,
        limits=limits,
        batch_size=4,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == sorted(told) and told[-1][0] == told[-1][1]
    again = mi.measured_roles(model, circuit, train, test, limits=limits, batch_size=6)
    assert by_role(found) == by_role(again)
    path = tmp_path / "x.circuit.json"
    mi.save_circuit(path, circuit, model=model, roles=found.roles, predictions=found.predictions)
    assert mi.verify(path, model=model).ok


def test_what_cannot_be_measured_is_said() -> None:
    """No wrong answers: no direct effects, and the rest is still there."""
    model, pairs = tiny.tiny("gpt2"), tiny.pairs(6, positions={"a": torch.ones(6).long(), "z": torch.full((6,), 6)})
    bare = replace(pairs, right=None, wrong=None)
    found = mi.measured_roles(model, whole(mi.build_graph(model)), bare, bare, metric="kl_to_clean")
    assert [note.partition(":")[0] for note in found.notes] == ["Direct effects were not measured"]
    assert "attention" in found.evidence and "direct effect" not in found.evidence
