"""Relevance of words and phrases: as sources of a decomposition, as a table, as coloured text."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import mechinterp as mi
from examples.sentiment_encoder import sentence, train
from mechinterp.base.errors import InputError
from mechinterp.engines.decomposition.encoder import Encoder
from tests.support.models_tiny import as_installed, huggingface

TEXT = "When Mary and John went to the store, John gave a drink to"


@functools.cache
def bundled() -> mi.HookManager:
    return mi.load_model("bundled")


@functools.cache
def sentiment(steps: int = 1) -> Encoder:
    """The classifier of the example, hardly trained where what it says does not matter."""
    model, tokenizer, _ = train(steps)
    return mi.load_encoder(model, tokenizer=tokenizer)


@pytest.mark.slow
def test_words_and_phrases_are_sources_of_a_decomposition() -> None:
    model = bundled()
    found = mi.phrase_relevance(model, TEXT, " Mary", against=" John", max_words=2, preset="frozen-remove")
    ids = torch.tensor(model.tokenizer(TEXT)["input_ids"])
    mary, john = (
        int(model.tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0]) for name in ("Mary", "John")
    )
    each = mi.contextual_decomposition(
        model, ids[None], ["input"], positions=[0, 2, (4, 5)], targets=(mary, john), preset="frozen-remove"
    )
    expected = each.scores().values[0, :, 0]
    got = torch.tensor([found.value(0, 1), found.value(2, 3), found.value(4, 6)])
    torch.testing.assert_close(got, expected.float())
    logits = model.run(ids[None]).logits
    assert logits is not None
    assert found.total == pytest.approx(float(logits[0, -1, mary] - logits[0, -1, john]), abs=1e-4)
    assert len(found.spans) == 2 * len(ids) - 1 and found.text((2, 3)) == "Mary"


@pytest.mark.slow
def test_the_interaction_is_what_a_phrase_has_beyond_its_words() -> None:
    linear, bert = (
        mi.phrase_relevance(bundled(), TEXT, " Mary", max_words=3, preset=p) for p in ("linear", "authors-bert")
    )
    table = linear.to_frame()
    assert float(table.interaction.abs().max()) < 1e-4  # a linear rule adds up
    table = bert.to_frame()
    assert float(table.interaction.abs().max()) > 0.1
    row = table[(table.start == 3) & (table.stop == 6)].iloc[0]
    assert row.interaction == pytest.approx(row.relevance - sum(bert.value(i, i + 1) for i in (3, 4, 5)), abs=1e-6)
    alone = mi.phrase_relevance(bundled(), TEXT, " Mary", spans=[(1, 4)])
    assert alone.interaction((1, 4)) == pytest.approx(alone.value(1, 4) - sum(alone.value(i, i + 1) for i in (1, 2, 3)))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_encoder_classifier_is_read_by_its_labels() -> None:
    model = sentiment(400)
    text = "the film was not bad ."
    found = mi.phrase_relevance(model, text, "positive", against="negative", spans=[(4, 6)], preset="patch")
    encoding = model.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        whole = model.module(**encoding).logits[0]
        embedded = model.module.bert.embeddings(encoding["input_ids"])
        embedded[:, 4:6] = 0  # "not bad" as it enters the first layer
        stream = embedded
        for layer in model.module.bert.encoder.layer:
            stream = layer(stream)
            stream = stream[0] if isinstance(stream, tuple) else stream
        ablated = model.module.classifier(model.module.bert.pooler(stream))[0]
    assert found.pieces == (" [CLS]", " the", " film", " was", " not", " bad", " .", " [SEP]")
    assert found.total == pytest.approx(float(whole[1] - whole[0]), abs=1e-4)
    effect = float((whole[1] - whole[0]) - (ablated[1] - ablated[0]))
    assert found.value(4, 6) == pytest.approx(effect, abs=1e-4)
    assert abs(effect) > 0.1


def test_the_sentences_of_the_example_have_the_classes_that_their_words_say() -> None:
    import random

    rng = random.Random(0)
    texts = dict(sentence(rng) for _ in range(300))
    assert {0, 1} == set(texts.values())
    assert any(" but " in text for text in texts) and any(" not " in text for text in texts)


def test_token_ids_are_words_of_their_own() -> None:
    ids = torch.tensor(bundled().tokenizer(TEXT)["input_ids"])
    found = mi.phrase_relevance(bundled(), ids, 5)
    assert found.words == tuple((i, i + 1) for i in range(len(ids)))


@pytest.mark.parametrize(
    ("prompt", "target", "keywords", "message"),
    [
        (TEXT, " Mary gave", {}, "is 2 tokens; a target must be one"),
        (TEXT, " Mary", {"max_words": 0}, "max_words` must be a whole number"),
        (TEXT, " Mary", {"spans": [(3, 99)]}, "not in the text"),
        (TEXT, " Mary", {"spans": [(4, 4)]}, "not in the text"),
        (TEXT, " Mary", {"spans": [(0, 1, 2)]}, "A span is"),
        (TEXT, " Mary", {"spans": [(0.5, 1.7)]}, "A span is"),
        (TEXT, " Mary", {"max_words": 1.5}, "whole number"),
        ([1, 2, 3], " Mary", {}, "must be a text"),
        (torch.zeros(2, 2), " Mary", {}, "must be a text or token ids"),
        (
            TEXT,
            torch.zeros(808).index_fill(0, torch.tensor(5), 1.0),
            {"against": " Mary"},
            "needs a target that is one",
        ),
        (TEXT, "answers", {}, "'answers' is not in the vocabulary"),
        ("When Mary and Xyzzy went to", " Mary", {}, "'Xyzzy' is not in the vocabulary"),
        ("", " Mary", {"spans": [(0, 2)]}, "not in the text"),
    ],
)
def test_bad_requests_get_one_clear_line(prompt: Any, target: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_installed(mi.phrase_relevance)(bundled(), prompt, target, **keywords)


def test_a_class_that_is_not_there_and_a_span_that_was_not_asked_for() -> None:
    with pytest.raises(InputError, match="Unknown class 'neutral'; known: negative, positive"):
        mi.phrase_relevance(sentiment(), "the film was bad .", "neutral")
    with pytest.raises(InputError, match="was not decomposed"):
        mi.phrase_relevance(sentiment(), "the film was bad .", "positive").value(0, 3)


@pytest.mark.slow
def test_the_page_shows_every_span_and_nothing_of_it_is_run(tmp_path: Any) -> None:
    model = sentiment()
    found = mi.phrase_relevance(model, "the film was not bad .", "positive", max_words=2)
    page = mi.text_page(found, title="<script>alert(1)</script>")
    assert "<script" not in page and "&lt;script&gt;" in page and "http" not in page
    for span, value in zip(found.spans, found.values.tolist(), strict=True):
        assert f'title="{value:+.4f} logits">{found.text(span)}' in page
    mi.save_html(page, tmp_path / "text.html")
    assert (tmp_path / "text.html").read_text() == page


@pytest.mark.slow
def test_words_are_found_where_the_tokenizer_splits_none() -> None:
    """Llama's and Gemma's tokenizers hand a whole text to BPE, with spaces as ordinary characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u2581"
    letters = {piece: i for i, piece in enumerate(["<unk>", space, *"acst", "ca", f"{space}ca"])}
    inner = Tokenizer(models.BPE(letters, [("c", "a"), (space, "ca")], unk_token="<unk>"))
    inner.normalizer = normalizers.Prepend(space)  # pyright: ignore[reportAttributeAccessIssue]
    inner.pre_tokenizer = pre_tokenizers.Metaspace(split=False)  # pyright: ignore[reportAttributeAccessIssue]
    inner.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    model = mi.load_model(huggingface("llama"), tokenizer=tokenizer)
    found = mi.phrase_relevance(model, "cat sat", 5)
    assert [found.text(word) for word in found.words] == ["cat", "sat"]
    assert "".join(found.pieces).split() == ["cat", "sat"]
