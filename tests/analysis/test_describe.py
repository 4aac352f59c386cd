"""Descriptions of features: evidence against the weights and by hand, scores of descriptions beside shuffled ones."""

from __future__ import annotations

import pytest
import torch

import mechinterp as mi
from mechinterp.analysis.describe import EVIDENCE
from mechinterp.analysis.description_scores import auroc
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.features.dictionary import cross_layer_transcoder, sae, transcoder
from tests.support.models_tiny import D_MODEL, D_VOCAB, build, tiny, tokens

F = 6
TEXTS = [row[: 4 + i % 4] for i, row in enumerate(tokens(12, 9))]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def an_sae(site: str = "resid_pre.2", **more):
    return sae(site, drawn(D_MODEL, F), drawn(F, D_MODEL, seed=1), b_enc=drawn(F), **more)


def test_vocab_is_the_logit_lens_of_the_direction():
    model, basis = tiny("gpt2"), an_sae()
    found = mi.describe(model, basis, 3, n=4).vocab
    layout = model.layout
    logits = layout.final_norm.project(basis.writes([3])[0]) @ layout.W_U
    assert found[found["side"] == "top"]["token"].tolist() == logits.topk(4).indices.tolist()
    assert found[found["side"] == "bottom"]["token"].tolist() == (-logits).topk(4).indices.tolist()
    torch.testing.assert_close(torch.tensor(found["value"][:4].to_numpy()), logits.topk(4).values)
    spread = cross_layer_transcoder(
        ["mlp_in.1", "mlp_in.2"],
        ["mlp_out.1", "mlp_out.2"],
        drawn(2, D_MODEL, F),
        [drawn(F, 2, D_MODEL), drawn(F, 1, D_MODEL)],
    )[0]
    both = layout.final_norm.project(spread.writes([2])[0].sum(0)) @ layout.W_U
    assert mi.describe(model, spread, 2, n=1).vocab["token"][0] == int(both.argmax())


def test_change_becomes_the_direction_as_the_strength_goes_to_zero():
    """At the last layer, with the final norm's Jacobian, which is the identity here."""
    model = build("no-norm")
    basis = an_sae("resid_post.2") if model.has("resid_post.2") else an_sae("resid_final")
    found = mi.describe(model, basis, 3, by=["change"], texts=TEXTS, strength=1e-4, n=D_VOCAB).change
    top = found[found["side"] == "top"].sort_values("token")["value"].to_numpy()
    torch.testing.assert_close(torch.tensor(top) / 1e-4, basis.writes([3])[0] @ model.layout.W_U, rtol=1e-6, atol=1e-8)


def test_examples_are_the_largest_values_and_resume():
    model, basis = tiny("gpt2"), an_sae()
    found = mi.strongest_examples(model, basis, 3, texts=TEXTS, n=5, batch_size=5)
    values = [model.run(text[None], record=[basis]).values[basis][0, :, 3] for text in TEXTS]
    best = sorted(((float(v.max()), i, int(v.argmax())) for i, v in enumerate(values) if v.max() > 0), reverse=True)[:5]
    assert [one.text for one in found.strongest] == [i for _, i, _ in best]
    assert [one.position for one in found.strongest] == [p for _, _, p in best]
    assert [one.value for one in found.strongest] == pytest.approx([v for v, _, _ in best], rel=1e-5)
    assert found.read == 12 and found.tokens == sum(map(len, TEXTS))
    assert found.fired == sum(int((v != 0).sum()) for v in values)
    part = mi.strongest_examples(model, basis, 3, texts=TEXTS[:7], n=5)
    again = mi.strongest_examples(model, basis, 3, texts=TEXTS, n=5, so_far=part)
    assert again == found
    streamed = mi.strongest_examples(model, basis, 3, texts=iter(TEXTS), n=5, batch_size=1)
    assert [one.text for one in streamed.strongest] == [one.text for one in found.strongest]
    assert ">>" in found.strongest[0].marked()


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_of_equal_examples_the_first_of_the_corpus_are_kept(batch_size: int):
    basis = sae("resid_pre.0", torch.zeros(D_MODEL, 1).double(), drawn(1, D_MODEL), b_enc=torch.ones(1).double())
    found = mi.strongest_examples(tiny("gpt2"), basis, 0, texts=iter(TEXTS), n=3, batch_size=batch_size)
    assert [(one.value, one.text, one.position) for one in found.strongest] == [(1.0, i, 0) for i in range(3)]
    note = mi.feature_notes(tiny("gpt2"), [basis], [(basis.name, 0)], texts=TEXTS, n_examples=3, batch_size=batch_size)
    assert note[f"{basis.name}.f0"].examples == found.strongest


def test_input_gradient_on_a_linear_path_is_the_de_embedding():
    model = tiny("gpt2")
    basis = an_sae("resid_pre.0")
    found = mi.describe(model, basis, 3, by=["input-gradient"], texts=TEXTS, n=D_VOCAB).input_gradient
    by_token = found[found["side"] == "top"].sort_values("token")["value"].to_numpy()
    embed = model.bridge.original_model.transformer.wte.weight.detach()
    torch.testing.assert_close(torch.tensor(by_token), embed @ basis.reads([3])[0], rtol=1e-6, atol=1e-9)
    for shape in ("llama", "gpt2"):  # through layers: the derivative of the pre-activation, by finite differences
        model, later = tiny(shape), an_sae("resid_pre.1")
        found = mi.describe(model, later, 3, by=["input-gradient"], texts=TEXTS[:3], n=1).input_gradient
        assert len(found) == 2


def test_neurons_and_heads():
    model = tiny("gpt2")
    neuron = mi.describe(model, "m2.n5", n=3, by=EVIDENCE, texts=TEXTS)
    logits = model.layout.final_norm.project(model.layout.mlp_maps[2].W_out[5]) @ model.layout.W_U
    assert neuron.vocab["token"][:3].tolist() == logits.topk(3).indices.tolist()
    values = torch.cat([model.run(t[None], record=["mlp_post.2"]).values["mlp_post.2"][0, :, 5] for t in TEXTS])
    assert neuron.strength == pytest.approx(float(values.max()))
    head = mi.describe(model, "a1.h2", n=3, by=EVIDENCE, texts=TEXTS)
    z = torch.cat([model.run(t[None], record=["z.1"]).values["z.1"][0, :, 2] for t in TEXTS])
    write = z @ model.layout.attention[1].W_O[2]
    assert head.examples.strongest[0].value == pytest.approx(float(write.norm(dim=1).max()))
    mean = model.layout.final_norm.project(write.mean(0)) @ model.layout.W_U
    assert head.vocab["token"][0] == int(mean.argmax()) and head.strength == 1.0
    assert "fires on" in head.evidence() and "raises" in repr(neuron)


def test_words_come_from_a_callback_only():
    seen: list[str] = []
    found = mi.describe(tiny("gpt2"), an_sae(), 3, n=2, words=lambda text: seen.append(text) or "a colour")
    assert found.words == "a colour" and "a colour" in repr(found) and seen[0].startswith("resid_pre.2.f3")
    assert len(found.top_words().split(", ")) == 2


def by_first_token(model):
    """Texts that start with token 7 or with another one, and an SAE whose feature 0 tells them apart."""
    inside = [torch.cat([torch.tensor([7]), row]) for row in tokens(20, 4, seed=3)]
    outside = [torch.cat([torch.tensor([9]), row]) for row in tokens(20, 4, seed=4)]
    site = "resid_pre.0"
    ends = [
        torch.stack([model.run(t[None], record=[site]).values[site][0, 0] for t in side]) for side in (inside, outside)
    ]
    way = ends[0].mean(0) - ends[1].mean(0)
    middle = (ends[0].mean(0) + ends[1].mean(0)) / 2
    W = torch.stack([way, drawn(D_MODEL, seed=5)], 1)
    return (
        inside,
        outside,
        sae(site, W, W.T.contiguous() / way.norm(), b_enc=torch.stack([-middle @ way, torch.tensor(0.0).double()])),
    )


def test_a_true_description_holds_and_a_shuffled_one_does_not():
    model = tiny("gpt2")
    inside, outside, basis = by_first_token(model)
    firsts = [[t[:1] for t in side] for side in (inside, outside)]
    found = mi.score_description(model, basis, 0, inside=firsts[0], outside=firsts[1])
    assert (found.precision, found.recall, found.auroc) == (1.0, 1.0, 1.0) and found.holds
    assert found.effect_inside > 1e-4 and found.effect_outside == 0 and 0.5 < found.auroc_shuffled < 0.8
    mixed = [firsts[0][::2] + firsts[1][::2], firsts[0][1::2] + firsts[1][1::2]]
    wrong = mi.score_description(model, basis, 0, inside=mixed[0], outside=mixed[1])
    assert not wrong.holds and wrong.auroc == pytest.approx(0.5)


def test_auroc_counts_pairs():
    scores, positive = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0]), torch.tensor([True, False, True, False, False])
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in (3.0, 2.0) for b in (1.0, 2.0, 0.0)]
    assert float(auroc(scores, positive)) == pytest.approx(sum(pairs) / 6)


def test_separation_scores_are_counts():
    model = tiny("gpt2")
    inside, outside, basis = by_first_token(model)
    found = mi.separation_scores(model, basis, inside, outside, token="any")
    on = [
        torch.stack([(model.run(t[None], record=[basis]).values[basis][0] != 0).any(0) for t in side]).double().mean(0)
        for side in (inside, outside)
    ]
    for _, row in found.frame.iterrows():
        assert row["score"] == pytest.approx(float(on[0][int(row["feature"])] - on[1][int(row["feature"])]))
    assert found.frame["score"].is_monotonic_decreasing and 0 < found.shuffled < 1
    last = mi.separation_scores(model, basis, [t[:1] for t in inside], [t[:1] for t in outside])
    assert last.frame.iloc[0].to_dict() == {"feature": 0, "positive": 1.0, "negative": 0.0, "score": 1.0}
    kinds = mi.separation_scores(model, basis, {"a": inside, "b": outside}, {"a": outside, "b": inside}, token="any")
    assert float(kinds.frame["score"].max()) <= 0  # the least over the kinds
    dropped = mi.separation_scores(model, basis, inside, outside, exclude=inside, token="any", most=0.0)
    assert dropped.dropped + len(dropped.frame) == 2 and dropped.dropped >= 1


def test_examples_can_leave_the_first_token_out():
    """A feature that is strongest on the first token of every text shows only that, and a line says so."""
    model = tiny("gpt2")
    embed = model.run(torch.tensor([[1, 2, 3]]), record=["embed"]).values["embed"][0]
    reads = torch.linalg.pinv(embed).T.contiguous()
    encoder = (3 * reads[0] + reads[1])[:, None]
    basis = sae("embed", encoder, drawn(1, D_MODEL), b_enc=torch.full((1,), -1e-6, dtype=torch.float64))
    texts = [torch.tensor([1, 3, 2, 3]), torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1])]
    plain = mi.describe(model, basis, 0, by=["examples"], texts=texts)
    assert [one.position for one in plain.examples.strongest] == [0, 0, 0, 0] and "skip=1" in str(plain)
    found = mi.describe(model, basis, 0, by=["examples"], texts=texts, skip=1)
    assert [(one.text, one.position) for one in found.examples.strongest] == [(0, 2), (1, 1)]
    assert (found.examples.fired, found.examples.tokens, found.examples.read) == (2, 5, 4) and "skip=1" not in str(
        found
    )
    same = mi.strongest_examples(model, basis, 0, texts=texts, skip=1, batch_size=1)
    assert same == found.examples
    note = mi.feature_notes(model, [basis], [(basis.name, 0)], texts=texts, skip=1, batch_size=3)[f"{basis.name}.f0"]
    assert (note.examples, note.fired, note.tokens) == (same.strongest, 2, 5)
    part = mi.strongest_examples(model, basis, 0, texts=texts[:2], skip=1)
    assert mi.strongest_examples(model, basis, 0, texts=texts, skip=1, so_far=part) == same
    for call in (
        lambda: mi.strongest_examples(model, basis, 0, texts=texts, so_far=part),
        lambda: mi.describe(model, basis, 0, by=["examples"], texts=texts, skip=-1),
        lambda: mi.feature_notes(model, [basis], [(basis.name, 0)], texts=texts, skip=-1),
    ):
        with pytest.raises(InputError, match="skip"):
            call()


def test_the_first_token_can_be_left_out_of_both_tests():
    """A feature that is strongest on the first token of every text tells texts apart only behind it."""
    model = tiny("gpt2")
    embed = model.run(torch.arange(1, 4)[None], record=["embed"]).values["embed"][0]
    reads = torch.linalg.pinv(embed).T.contiguous()  # 1 on its own token, 0 on the two others
    encoder = (3 * reads[0] + reads[1])[:, None]
    basis = sae("embed", encoder, drawn(1, D_MODEL), b_enc=torch.full((1,), -1e-6, dtype=torch.float64))
    inside, outside = [torch.tensor([1, 2, 3])] * 4, [torch.tensor([1, 3, 3])] * 4
    plain = mi.score_description(model, basis, 0, inside=inside, outside=outside)
    assert plain.auroc == 0.5 and plain.precision == 0.5
    found = mi.score_description(model, basis, 0, inside=inside, outside=outside, skip=1)
    assert (found.auroc, found.precision, found.recall) == (1, 1, 1)
    assert abs(found.effect_outside) < 1e-12 < 1e-6 < found.effect_inside
    negative = [
        mi.separation_scores(model, basis, inside, outside, exclude=inside, most=1.0, token="any", skip=k)
        .frame["negative"]
        .iloc[0]
        for k in (0, 1)
    ]
    assert negative == [1, 0]
    for call in (
        lambda: mi.score_description(model, basis, 0, inside=inside, outside=outside, skip=3),
        lambda: mi.separation_scores(model, basis, inside, outside, skip=-1),
        lambda: mi.separation_scores(model, basis, inside, outside, skip=3),
    ):
        with pytest.raises(InputError, match="skip"):
            call()


def test_bad_input_is_one_line():
    model, basis = tiny("gpt2"), an_sae()
    for call, said in (
        (lambda: mi.describe(model, basis), "Give its number"),
        (lambda: mi.describe(model, basis, F), "features 0 to 5"),
        (lambda: mi.describe(model, "m2.n5", 3), "goes with a feature basis"),
        (lambda: mi.describe(model, "m2"), "not a neuron or head"),
        (lambda: mi.describe(model, basis, 0, by=["vocabulary"]), "Did you mean 'vocab'"),
        (lambda: mi.describe(model, basis, 0, by=["examples"]), "give `texts`"),
        (lambda: mi.describe(model, "a1.h1"), "give `texts`"),
        (lambda: mi.describe(model, basis, 0, by=["examples"], texts=[]), "no texts"),
        (lambda: mi.describe(model, basis, 0, by=["examples"], texts="one text"), "put one text in a list"),
        (lambda: mi.score_description(model, basis, 0, inside=TEXTS[:1], outside=TEXTS), "at least two texts"),
        (lambda: mi.separation_scores(model, basis, {"a": TEXTS}, {"b": TEXTS}), "same kinds"),
        (lambda: mi.separation_scores(model, basis, TEXTS, TEXTS, token="first"), "last or any"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    q = transcoder("resid_pre.1", "q.1", drawn(D_MODEL, F), drawn(F, D_MODEL))
    with pytest.raises(UnsupportedError, match="does not write to the residual stream"):
        mi.describe(model, q, 0, texts=TEXTS)
