"""The metric of a batch is the same from columns or all logits, and from runs side by side or one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mechinterp.base.errors import InputError
from mechinterp.engines.patch_direction import DENOISE, NOISE, patch_direction
from mechinterp.engines.readout import FINAL, checked_metric, metric_readout
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from tests.support.models_tiny import pairs, tiny


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_answers_columns_give_what_all_logits_give(name: str) -> None:
    model, examples = tiny(name), pairs(3, 6, padded=True)
    readout = metric_readout(model, examples, get_metric("logit_diff"))
    resid = model.run(examples.clean, examples.mask, record=[FINAL]).values[FINAL]
    assert readout.columns is not None and len(readout.columns) < model.dims.d_vocab_out
    whole = replace(readout, columns=None)
    torch.testing.assert_close(readout.of_resid(resid), whole.of_resid(resid), rtol=0, atol=1e-9)


@pytest.mark.parametrize("metric", ["logit_diff", "kl_to_clean"])
def test_runs_side_by_side_are_read_one_by_one(metric: str) -> None:
    model, examples = tiny("gpt2"), pairs(3, 6, answer_pos=torch.tensor([[2, 5], [3, -1], [5, 4]]))
    readout = metric_readout(model, examples, get_metric(metric))
    runs = [model.run(ids, record=[FINAL]).values[FINAL] for ids in (examples.clean, examples.corrupt)]
    late = readout.of_runs(torch.cat(runs)[:, 2:], 2, 2)  # no answer is before position 2
    torch.testing.assert_close(late, torch.stack([readout.of_resid(run) for run in runs]))
    if metric == "kl_to_clean":  # which is 0 against the clean run itself
        assert float(late[0].abs().max()) < 1e-9 and float(late[1].abs().max()) > 1e-3


def test_a_metric_is_checked_against_pairs_and_model() -> None:
    model, examples = tiny("gpt2"), pairs(2, 4)
    assert checked_metric(model, examples, "prob") is get_metric("prob")
    bare = Pairs(clean=examples.clean, corrupt=examples.corrupt)
    for some, metric, message in (
        (examples, "logit_dif", "Did you mean 'logit_diff'"),
        (bare, "logit_diff", "needs right and wrong answers"),
        (Pairs(clean=[[70, 2]] * 2, corrupt=[[1, 2]] * 2), "kl_to_clean", "70"),
    ):
        with pytest.raises(InputError, match=message):
            checked_metric(model, some, metric)


def test_noise_and_denoise_are_the_same_with_the_prompts_exchanged() -> None:
    examples = pairs(2, 4)
    swapped = Pairs(clean=examples.corrupt, corrupt=examples.clean)
    for one, other in zip(NOISE.tokens(examples), DENOISE.tokens(swapped), strict=True):
        assert torch.equal(one, other)
    before, after = torch.tensor([2.0, 3.0]), torch.tensor([0.5, 4.0])
    logit_diff, kl = get_metric("logit_diff"), get_metric("kl_to_clean")
    assert NOISE.effect(before, after, logit_diff).tolist() == [1.5, -1.0]
    for metric in (logit_diff, kl):
        assert torch.equal(DENOISE.effect(before, after, metric), -NOISE.effect(before, after, metric))
        assert DENOISE.sign(metric) == -NOISE.sign(metric)
    assert torch.equal(NOISE.effect(before, after, kl), -NOISE.effect(before, after, logit_diff))
    assert patch_direction("denoise") is DENOISE and DENOISE.swap("clean", "corrupt") == ("corrupt", "clean")
    with pytest.raises(InputError, match="Did you mean 'noise'"):
        patch_direction("noisy")
