"""A dictionary that is trained on a model with planted features gives them back: directions, activations, effects."""

from __future__ import annotations

import torch

import mechinterp as mi
from mechinterp.features.activations import JumpRelu
from mechinterp.features.dictionary import sae
from tests.support.toy_superposition import D_VOCAB, planted
from tools.train_dictionaries.train import Recipe, train


def test_a_dictionary_gives_planted_features_back():
    toy = planted()
    tokens = torch.arange(D_VOCAB)[:, None]
    values = toy.model.run(tokens, record=["resid_pre.0"]).values["resid_pre.0"][:, 0]
    assert mi.feature_dimensions(toy.directions).max() < 0.85  # superposition: no direction has a dimension to itself
    parts, threshold = train(values, values, Recipe(features=64, k=2, steps=500, batch=256, dead_after=50))
    basis = sae("resid_pre.0", activation=JumpRelu(torch.tensor(threshold)), **parts)
    found = mi.match_features(toy.directions, basis, one_to_one=True)
    assert found.above_chance == 1 and float(found.cosine.min()) > 0.85, found

    # The dictionary is larger than need be and splits features: what writes a planted direction is taken together.
    cosines = toy.directions @ torch.nn.functional.normalize(basis.writes(), dim=1).T
    groups = [(row > 0.8).nonzero()[:, 0].tolist() for row in cosines]
    activations = toy.model.run(tokens, record=[basis]).values[basis][:, 0]
    plain = toy.model.run(tokens, record=["mlp_post.0"]).values["mlp_post.0"][:, 0]
    for feature, group in enumerate(groups):
        pair = torch.stack([activations[:, group].sum(1), toy.amounts[:, feature]])
        assert float(pair.corrcoef()[0, 1]) > 0.9
        off = mi.ablate_features(basis, group)
        run = toy.model.run(tokens, record=["mlp_post.0"], interventions=[off])
        lost = (plain - run.values["mlp_post.0"][:, 0])[toy.amounts[:, feature] > 0].mean(0)
        assert int(lost.argmax()) == feature and float(lost[feature]) > 0.4


def test_neurons_and_random_directions_are_not_the_planted_features():
    toy = planted()
    random = torch.randn(40, toy.directions.shape[1], generator=torch.Generator().manual_seed(5))
    for other in (torch.eye(toy.directions.shape[1]), random):
        assert mi.match_features(toy.directions, other).above_chance < 0.35
