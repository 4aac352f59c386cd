"""The lens against whole softmaxes of the unembedded streams, and against the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.tools.analysis.logit_lens import logit_readout

import mechinterp.engines.projected_logits
from mechinterp.analysis.logit_lens import logit_lens, writes_lens
from mechinterp.base.errors import InputError, UnsupportedError
from mechinterp.models.hook_manager import Intervention
from mechinterp.models.sites import Site
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import ALL_FLOAT64, EVERY, SHAPES, as_installed, pairs, tiny, tokens


def tolerance(name: str) -> float:
    # Norms and rotations of the other shapes run in float32 inside a float64 model.
    return 1e-9 if name in ALL_FLOAT64 else 2e-5


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", EVERY)
def test_every_number_is_that_of_the_whole_softmax(name: str, chunk: int | None) -> None:
    model, examples = tiny(name), pairs(4, 6, padded=True)
    targets = torch.tensor([[3, 5], [7, -1], [49, 0], [1, 2]])
    read = logit_lens(model, examples, positions="each", targets=targets, top_k=3, vocabulary_chunk=chunk)
    sites = read.kl.labels["site"]
    assert sites[0] == "resid_pre.0" and sites[-1] == "resid_final"
    assert ("resid_mid.1" in sites) == model.has("resid_mid.1")
    run = model.run(examples.clean, examples.mask, record=[Site.parse(site) for site in sites])
    assert run.logits is not None
    own = run.logits.log_softmax(-1)
    for site in (sites[0], sites[-2], sites[-1]):
        says = model.layout.unembed(run.values[Site.parse(site)]).log_softmax(-1)
        kl = (own.exp() * (own - says)).sum(-1)
        for row in range(4):
            for pos in (0, 2, 5):
                at = {"site": site, "pos": pos, "example": row}
                if not examples.mask[row, pos]:
                    assert read.kl.at(**at).values.isnan() and read.target_rank.at(**at).values.isnan().all()
                    continue
                here = says[row, pos]
                close = {"rel": tolerance(name), "abs": tolerance(name)}
                assert float(read.kl.at(**at)) == pytest.approx(float(kl[row, pos]), **close)
                assert float(read.entropy.at(**at)) == pytest.approx(float(-(here.exp() * here).sum()), **close)
                best = here.topk(3)
                got = read.top_tokens[sites.index(site), pos, row]
                assert got.tolist() == best.indices.tolist()
                torch.testing.assert_close(
                    read.probabilities.at(**at).values, best.values.exp(), rtol=0, atol=tolerance(name)
                )
                for i, target in enumerate(targets[row].tolist()):
                    rank, log_prob = read.target_rank.at(**at, target=i), read.target_log_prob.at(**at, target=i)
                    if target < 0:
                        assert rank.values.isnan() and log_prob.values.isnan()
                        continue
                    assert float(rank) == int((here > here[target]).sum())
                    assert float(log_prob) == pytest.approx(float(here[target]), **close)


@pytest.mark.parametrize("name", EVERY)
def test_the_last_site_is_the_model(name: str) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True)
    read = logit_lens(model, examples, sites=["resid_final"], positions=[-1, 0])
    assert float(read.kl.values.max()) < tolerance(name)
    assert read.kl.about["error"] < 1e-5
    logits = model.run(examples.clean, examples.mask, at=examples.answer_pos).logits
    assert logits is not None
    assert read.top_tokens[0, 0, :, 0].tolist() == logits[:, 0].argmax(-1).tolist()


def test_a_softcap_is_in_the_numbers() -> None:
    model, examples = tiny("gemma2"), pairs(3, 6)
    assert model.layout.soft_cap
    resid = model.run(examples.clean, record=["resid_pre.1"]).values["resid_pre.1"][:, -1]
    plain = model.layout.final_norm(resid) @ model.layout.W_U
    capped = model.layout.soft_cap * torch.tanh(plain / model.layout.soft_cap)
    read = logit_lens(model, examples, sites=["resid_pre.1"])
    expected = capped.log_softmax(-1).gather(-1, examples.right)[:, 0]  # type: ignore[arg-type]
    torch.testing.assert_close(read.target_log_prob.values[0, 0, :, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_batches_and_padding_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = tiny(name), pairs(7, 7, padded=True)
    whole = logit_lens(model, examples, positions=["1", "-1"])
    monkeypatch.setattr(mechinterp.engines.projected_logits, "MEMORY", 1)
    tight = logit_lens(model, examples, positions=["1", "-1"], batch_size=1)
    alone = Pairs(
        clean=examples.clean[[4, 4], : int(examples.lengths[4])],
        corrupt=examples.corrupt[[4, 4], : int(examples.lengths[4])],
        right=examples.right[[4, 4]],  # type: ignore[index]
        wrong=examples.wrong[[4, 4]],  # type: ignore[index]
    )
    one = logit_lens(model, alone, positions=["1", "-1"])
    for part in ("kl", "entropy", "probabilities", "target_rank", "target_log_prob"):
        values = getattr(whole, part).values
        torch.testing.assert_close(values, getattr(tight, part).values, rtol=0, atol=tolerance(name))
        torch.testing.assert_close(values[:, :, 4], getattr(one, part).values[:, :, 0], rtol=0, atol=tolerance(name))
    assert torch.equal(whole.top_tokens, tight.top_tokens)


def test_a_lens_of_one_s_own_and_plain_token_ids() -> None:
    model, ids = tiny("gpt2"), tokens(2, 6)
    doubled = logit_lens(
        model, ids, sites=["resid_pre.1"], lens=lambda site, resid: 2 * resid + site.layer, targets=ids[:, :1]
    )
    resid = model.run(ids, record=["resid_pre.1"]).values["resid_pre.1"][:, -1]
    expected = model.layout.unembed(2 * resid + 1).log_softmax(-1).gather(-1, ids[:, :1])
    torch.testing.assert_close(doubled.target_log_prob.values[0, 0], expected, rtol=0, atol=1e-9)
    frame = logit_lens(model, ids[:1]).to_frame()
    assert len(frame) == 7 and list(frame.columns) == [
        "site",
        "pos",
        "example",
        "kl",
        "entropy",
        "probability",
        "token",
    ]


@pytest.mark.parametrize("name", EVERY)
def test_writes_are_read_with_the_run_s_scale(name: str) -> None:
    model, examples = tiny(name), pairs(3, 6)
    nodes = ["a1.h2", "input"] + (["m1", "m1.n3"] if model.dims.has_mlp else [])
    table = writes_lens(model, examples, nodes, top_k=4)
    final = model.run(examples.clean, record=["resid_final"]).values["resid_final"][:, -1]
    logits = torch.stack([_removed(model, examples, node, final) for node in nodes])
    for i, node in enumerate(nodes):
        for row in range(3):
            mine = table[(table.node == node) & (table.example == row)]
            best = logits[i, row].topk(4)
            assert mine.raised.tolist() == best.indices.tolist()
            assert mine.raised_by.tolist() == pytest.approx(best.values.tolist(), abs=tolerance(name))
            worst = (-logits[i, row]).topk(4)
            assert mine.lowered.tolist() == worst.indices.tolist()
            assert mine.lowered_by.tolist() == pytest.approx((-worst.values).tolist(), abs=tolerance(name))


def _removed(model: Any, examples: Pairs, node: str, final: torch.Tensor) -> torch.Tensor:
    """What is missing from the logits before the cap when the node's write is taken out behind the frozen norm."""
    layout, norm = model.layout, model.layout.final_norm
    run = model.run(
        examples.clean, record=[s for s in model.sites() if s.kind in ("z", "mlp_post", "mlp_out", "resid_pre")]
    )
    if node == "input":
        write = run.values[Site("resid_pre", 0)][:, -1]
    elif node == "m1":
        write = run.values[Site("mlp_out", 1)][:, -1]
    elif node == "m1.n3":
        neurons = run.values[Site("mlp_post", 1)][:, -1]
        maps = layout.neurons(1)
        raw = neurons @ maps.W_out if maps.b_out is None else neurons @ maps.W_out + maps.b_out
        less = raw - neurons[:, 3, None] * maps.W_out[3]
        scale = maps.post.scale(raw)
        write = (maps.post.project(raw) - maps.post.project(less)) / scale
    else:
        write = layout.head_writes(1, run.values[Site("z", 1)][:, -1])[2]
    whole = norm.project(final) / norm.scale(final)
    return (whole - norm.project(final - write) / norm.scale(final)) @ layout.W_U


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sites": ["z.0"]}, "is not a residual stream"),
    ({"sites": []}, "at least one"),
    ({"sites": "resid_pre.0"}, "must be a list"),
    ({"sites": ["resid_pre.9"]}, "layers 0 to 2"),
    ({"positions": [6]}, "outside the prompt"),
    ({"positions": []}, "No position"),
    ({"positions": ["S2"]}, "Unknown position"),
    ({"targets": torch.tensor([[50]] * 3)}, "outside the vocabulary of 50"),
    ({"targets": torch.tensor([1, 2, 3])}, "must be token ids"),
    ({"top_k": 51}, "from 1 to the vocabulary's 50"),
    ({"lens": lambda site, resid: resid[..., :3]}, "must keep the shape"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD)
def test_bad_input_gets_one_clear_line(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_installed(logit_lens)(tiny("gpt2"), pairs(3, 6), **keywords)
    with pytest.raises(InputError, match="Give Pairs"):
        as_installed(logit_lens)(tiny("gpt2"), [[1, 2]])
    with pytest.raises(InputError, match="does not write to the residual stream by itself"):
        as_installed(writes_lens)(tiny("gpt2"), pairs(3, 6), ["resid_pre.1"])


def test_an_edited_readout_is_refused() -> None:
    model = tiny("gpt2")
    with (
        model.intervene(Intervention("final_norm", lambda x: 3 * x)),
        pytest.raises(UnsupportedError, match="gives other"),
    ):
        logit_lens(model, pairs(3, 6))


@pytest.mark.parametrize("name", SHAPES)
def test_it_agrees_with_transformer_lens(name: str) -> None:
    model, examples = tiny(name), pairs(3, 6)
    sites = ["resid_pre.0", "resid_pre.2"]
    read = logit_lens(model, examples, sites=sites, targets=examples.right, top_k=3)
    for i, site in enumerate(sites):
        resid = model.run(examples.clean, record=[site]).values[site][:, -1]
        best = logit_readout(model.bridge, resid, return_type="probs", top_k=3)
        aimed = logit_readout(model.bridge, resid, return_type="log_probs", targets=examples.right[:, 0])  # type: ignore[index]
        assert torch.equal(read.top_tokens[i, 0], best.top_ids)  # type: ignore[arg-type]
        for ours, theirs in (
            (read.probabilities.values[i, 0], best.values),
            (read.entropy.values[i, 0], best.entropy),
            (read.target_log_prob.values[i, 0], aimed.values),
            (read.target_rank.values[i, 0].long(), aimed.target_ranks),
        ):
            # TransformerLens's softmax runs in float32.
            torch.testing.assert_close(ours, theirs.to(ours), rtol=0, atol=2e-5)  # type: ignore[union-attr]
