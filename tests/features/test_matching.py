"""Features matched between dictionaries, their flow over layers, and their strengths over models."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import InputError
from mechinterp.features.dictionary import crosscoder, sae


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis(site: str, W: torch.Tensor):
    return sae(site, W.T.contiguous(), W)


@pytest.mark.parametrize("one_to_one", [False, True])
def test_a_permuted_noisy_dictionary_gives_the_permutation(one_to_one):
    W, order = drawn(60, 24), torch.randperm(60, generator=torch.Generator().manual_seed(3))
    other = 2.5 * W[order] + 0.05 * drawn(60, 24, seed=1)
    found = mi.match_features(basis("resid_pre.1", W), basis("resid_pre.2", other), one_to_one=one_to_one)
    assert torch.equal(order[found.match], torch.arange(60))
    assert bool(found.mutual.all()) and found.above_chance == 1 and float(found.cosine.min()) > 0.95


def test_unrelated_dictionaries_are_at_chance():
    found = mi.match_features(drawn(200, 24), drawn(200, 24, seed=1))
    assert found.above_chance < 0.15 and 0.3 < found.chance < 0.9
    assert abs(float(found.cosine.quantile(0.95)) - found.chance) < 0.1


def test_one_to_one_takes_each_feature_once_and_leaves_the_rest_over():
    W = drawn(6, 5)
    twice = torch.cat([W[:1], W[:1] + 0.01, W[1:]])
    found = mi.match_features(twice, W, one_to_one=True)
    taken = found.match[found.match >= 0].tolist()
    assert sorted(taken) == list(range(6)) and int((found.match == -1).sum()) == 1
    assert bool(found.cosine[found.match == -1].isnan().all())
    assert sorted(mi.match_features(twice, W).match.tolist())[:2] == [0, 0]


def test_directions_of_length_0_match_nothing():
    W = drawn(6, 5)
    W[2] = 0
    found = mi.match_features(W, W)
    assert found.match[2] == -1 and bool(found.cosine[2].isnan()) and not bool(found.mutual[2])
    with pytest.raises(InputError, match="cannot be compared"):
        mi.match_features(W, drawn(6, 4))


def test_the_flow_says_what_is_carried_written_and_new():
    first, attention, new = drawn(20, 64), drawn(20, 64, seed=1), drawn(10, 64, seed=2)
    both = torch.stack([first[19], attention[19]]).mean(0, keepdim=True)
    second = torch.cat([first[:10], attention[:8], new, both])
    bases = [basis("resid_pre.1", first), basis("attn_out.1", attention), basis("resid_pre.2", second)]
    found = mi.feature_flow(bases, threshold=0.6)
    origins = found.origins["origin"].tolist()
    assert origins == ["carried"] * 10 + ["written"] * 8 + ["new"] * 10 + ["both"]
    graph = found.graph()
    assert graph["resid_pre.1.f3"]["resid_pre.2.f3"]["cosine"] == pytest.approx(1)
    assert list(graph.predecessors("resid_pre.2.f12")) == ["a1.f2"] and "resid_pre.2.f20" not in graph
    assert set(found.chances) == {("resid_pre.1", "resid_pre.2"), ("a1", "resid_pre.2")}
    with pytest.raises(InputError, match="two places"):
        mi.feature_flow(bases[:2])


def test_the_flow_of_unrelated_dictionaries_is_what_the_shuffled_control_has():
    """With several sources a feature has several chances to match: `by_chance` counts them as `origins` does."""
    bases = [basis(site, drawn(150, 16, seed=i)) for i, site in enumerate(("resid_pre.1", "attn_out.1", "mlp_out.1"))]
    found = mi.feature_flow([*bases, basis("resid_pre.2", drawn(150, 16, seed=9))])
    real = {kind: float((found.origins["origin"] == kind).mean()) for kind in ("new", "written", "carried", "both")}
    assert sum(found.by_chance.values()) == pytest.approx(1) and found.by_chance["written"] > 0.02
    for kind, share in real.items():
        assert share == pytest.approx(found.by_chance[kind], abs=0.06), kind
    assert "by chance" in repr(found)


def test_the_shuffled_control_of_a_flow_is_below_what_is_carried():
    first = drawn(60, 24)
    found = mi.feature_flow([basis("resid_pre.1", first), basis("resid_pre.2", first + 0.1 * drawn(60, 24, seed=1))])
    assert (found.origins["origin"] == "carried").all() and found.by_chance["carried"] < 0.15


def test_a_feature_that_appears_at_a_checkpoint_has_its_strength_from_there_on():
    W = drawn(5, 3, 8)
    W[2, 0] = 0
    W[4] = W[4, 0] * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:, None]
    made = crosscoder(["resid_pre.1"] * 3, drawn(3, 8, 5), W, models=["step 0", "step 10", "step 100"])
    found = mi.feature_strengths(made)
    assert found.axes == ("feature", "output") and found.labels["output"] == ("step 0", "step 10", "step 100")
    assert float(found.at(feature=2, output="step 0")) == 0 < float(found.at(feature=2, output="step 10"))
    late = found.at(feature=4).values
    torch.testing.assert_close(late / late[0], torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    with pytest.raises(InputError, match="one output"):
        mi.feature_strengths(basis("resid_pre.1", drawn(3, 4)))
