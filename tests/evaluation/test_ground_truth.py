"""Scores against a known circuit."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.evaluation.ground_truth import against_truth
from mechinterp.graphs.scores import Scores
from tests.support.known_circuits import NAMES, known
from tests.support.models_tiny import tiny


def test_the_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    graph = mi.build_graph(tiny("gpt2"))
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, graph.possible.shape, generator=generator).float() * graph.possible
    scores = Scores(graph, values, 1, "random", "logit_diff", "corrupt")
    names = graph.edge_names()
    truth = set(names[::7])
    found = against_truth(scores, truth, 1.5)
    table = {name: abs(value) for name, value in scores.to_dict().items()}
    inside, outside = [table[n] for n in names if n in truth], [table[n] for n in names if n not in truth]
    pairs = [(1.0 if a > b else 0.5 if a == b else 0.0) for a in inside for b in outside]
    assert found.auc == pytest.approx(sum(pairs) / len(pairs))
    chosen = {name for name, value in table.items() if value > 1.5}
    assert (found.n_selected, found.n_true) == (len(chosen), len(truth))
    assert found.precision == pytest.approx(len(chosen & truth) / len(chosen))
    assert found.recall == pytest.approx(len(chosen & truth) / len(truth))
    with pytest.raises(mi.InputError, match="not 0"):
        against_truth(scores, [])
    with pytest.raises(mi.InputError, match="writer"):
        against_truth(scores, ["a9.h9->logits"])


@pytest.mark.parametrize("name", NAMES)
def test_acdc_recovers_every_known_circuit(name: str) -> None:
    this = known(name)
    graph = mi.build_graph(this.model, split_input=True)
    scores = mi.score_edges(this.model, graph, this.pairs, method="acdc", metric="l2_to_clean", tau=1e-3, batch_size=64)
    found = against_truth(scores, this.truth("derived_resample"))
    assert found.recovered and found.auc == 1
    assert not against_truth(scores, this.truth("derived_zero")).recovered  # a truth under another ablation
