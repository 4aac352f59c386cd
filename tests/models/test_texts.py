"""Texts in a model's own tokens: the same ids as TransformerLens gives, one rule for BOS, and a run that says so."""

from __future__ import annotations

import pytest
import torch

from mechinterp.analysis.logit_lens import logit_lens
from mechinterp.base.errors import InputError
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.tasks.task import load_task
from tests.support.models_tiny import tiny

TEXT, SHORT = "When Mary and John went to the store", "When John"


@pytest.fixture(scope="module")
def model() -> HookManager:
    return load_model("bundled")


@pytest.mark.parametrize("bos", [True, False])
def test_tokens_are_those_of_transformer_lens(model: HookManager, bos: bool) -> None:
    model.bridge.tokenizer = model.tokenizer
    expected = model.bridge.to_tokens(TEXT, prepend_bos=bos)
    assert torch.equal(model.to_tokens(TEXT, prepend_bos=bos), expected)
    assert model.to_str_tokens(TEXT, prepend_bos=bos) == model.bridge.to_str_tokens(TEXT, prepend_bos=bos)


def test_the_default_is_that_of_the_pairs_of_a_task(model: HookManager) -> None:
    pairs = load_task("ioi").pairs(model, n=2)
    assert pairs.clean_text is not None
    for row, text in enumerate(pairs.clean_text):
        assert model.to_tokens(text)[0].tolist() == pairs.clean[row][pairs.mask[row]].tolist()


def test_tokens_go_back_to_their_text(model: HookManager) -> None:
    assert model.to_string(model.to_tokens(TEXT, prepend_bos=False)) == [TEXT]
    assert model.to_str_tokens(TEXT, prepend_bos=False) == TEXT.split()  # the bundled tokenizer has words, no spaces
    assert model.to_tokens("Mary", prepend_bos=False).tolist() == [[model.to_single_token(" Mary")]]
    ids = model.to_tokens([TEXT, TEXT])
    assert model.to_str_tokens(ids) == [model.to_str_tokens(TEXT)] * 2


def test_texts_run_as_their_tokens_do_also_side_by_side(model: HookManager) -> None:
    both = model.run([TEXT, SHORT], record=["z.0"])
    for row, text in enumerate((TEXT, SHORT)):
        tokens = model.to_tokens(text)
        alone = model.run(tokens, record=["z.0"])
        assert both.logits is not None and alone.logits is not None
        n = tokens.shape[1]
        torch.testing.assert_close(both.logits[row, :n], alone.logits[0], rtol=0, atol=1e-4)  # another batch, float32
        assert torch.equal(model.run(text).logits, alone.logits)
    assert repr(both.prompts) == "2 texts of 3 to 9 tokens, BOS '<bos>' before each"
    assert "2 texts of 3 to 9 tokens" in repr(both) and both.prompts is not None
    assert both.prompts.mask.sum(1).tolist() == [9, 3]
    assert torch.equal(model.run(both.prompts).logits, both.logits)  # type: ignore[arg-type]


def test_without_bos_the_run_says_so(model: HookManager) -> None:
    run = model.run(TEXT, prepend_bos=False)
    assert repr(run.prompts) == "1 text of 8 tokens, no BOS token before them"
    assert run.prompts is not None and run.prompts.str_tokens[0][0] == "When"


def test_what_is_wrong_is_said_in_one_line(model: HookManager) -> None:
    with pytest.raises(InputError, match=r"do not form a rectangle\. Give the texts to model\.run"):
        model.to_tokens([TEXT, SHORT])
    with pytest.raises(InputError, match="begins with the BOS token already"):
        model.run("<bos>" + TEXT)
    with pytest.raises(InputError, match="has no tokens"):
        model.run("", prepend_bos=False)
    with pytest.raises(InputError, match=r"is 2 tokens .* not one; mind the leading space"):
        model.to_single_token(" Mary and")
    with pytest.raises(InputError, match="no tokenizer for texts"):
        tiny("gpt2").run("some text")
    with pytest.raises(InputError, match="is for texts; these are token ids"):
        model.run([[1, 2]], prepend_bos=True)
    with pytest.raises(InputError, match="have their own mask"):
        model.run(TEXT, torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(InputError, match="whole numbers"):
        model.to_string([0.5])


def test_analyses_take_texts(model: HookManager) -> None:
    lens = logit_lens(model, [TEXT, SHORT], positions=[-1])
    tokens = model.prompts([TEXT, SHORT])
    assert lens.probabilities.labels["example"] == ("0", "1") and tokens.mask.sum(1).tolist() == [9, 3]
    alone = logit_lens(model, model.to_tokens(SHORT), positions=[-1])
    torch.testing.assert_close(lens.kl.at(example=1).values, alone.kl.at(example=0).values, rtol=0, atol=1e-4)
