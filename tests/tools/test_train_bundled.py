"""The bundled model: what its card says is so, and nothing held out reached the corpus."""

from __future__ import annotations

import itertools
import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechinterp.models.load import BUNDLED
from mechinterp.tasks.split import split_of
from tools.train_bundled.corpus import MAKERS, MIXTURE, Document, documents
from tools.train_bundled.exam import TASKS, exam_prompts, grade
from tools.train_bundled.loop import batches, train, update, weighted_loss
from tools.train_bundled.recipe import Recipe, new_model, new_optimizer
from tools.train_bundled.store import save_model, sha256_of
from tools.train_bundled.templates import SLOT_PATTERN, split_words, task_file, word_lists
from tools.train_bundled.tokenizer import BOS, build_tokenizer, vocabulary

# Two standard errors at an accuracy of .95 over 300 prompts are .025; the card's own figure adds as much again.
MARGIN = 0.05


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    return json.loads((BUNDLED / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(BUNDLED, local_files_only=True).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED, local_files_only=True)


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return list(itertools.islice(documents(seed=11), 2000))


def test_files_are_the_ones_the_card_names(card):
    for name, digest in card["files"].items():
        assert sha256_of(BUNDLED / name) == digest, name
    assert card["sha256"] == sha256_of(BUNDLED / "model.safetensors")
    assert card["sha256"] in (BUNDLED / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_tokenizer_is_word_level_with_one_bos(tokenizer):
    text = "When Mary and John went, the war lasted from the year 1732 to the year 17"
    ids = tokenizer(text)["input_ids"]
    spaced = "When Mary and John went , the war lasted from the year 17 32 to the year 17"
    assert tokenizer.convert_ids_to_tokens(ids) == [BOS, *spaced.split()]
    assert tokenizer(" Mary", add_special_tokens=False)["input_ids"] == [tokenizer.get_vocab()["Mary"]]


def test_tokenizer_of_the_package_and_of_the_file_agree(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer(Recipe.n_positions).get_vocab()
    assert set(tokenizer.get_vocab()) == set(vocabulary())


def test_every_word_of_the_task_files_is_one_token(tokenizer):
    for name, words in word_lists().items():
        for word in words:
            ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == (2 if name == "years" else 1), (name, word)


@pytest.mark.parametrize("task_name", TASKS)
def test_accuracy_on_held_out_prompts(card, model, tokenizer, task_name):
    count = 500 if task_name == "ioi" else 300
    prompts = exam_prompts(task_name, count, seed=7)  # neither the seed of the checks nor that of the card
    found = grade(model, tokenizer.get_vocab(), tokenizer.bos_token_id, prompts)
    if task_name == "ioi":
        assert found.accuracy >= 0.99
    assert found.accuracy >= card["tasks"][task_name]["accuracy"] - MARGIN


def test_both_orders_of_ioi_are_in_the_exam():
    prompts = exam_prompts("ioi", 400, seed=3)
    receiver_first = sum(p.words.index(p.right[0]) < p.words.index(p.wrong[0]) for p in prompts)
    assert 150 < receiver_first < 250  # five standard deviations of a fair coin


def test_corpus_is_the_same_for_the_same_seed():
    first, again, other = (list(itertools.islice(documents(seed), 200)) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_corpus_shows_no_held_out_name_pair(corpus):
    names = set(word_lists()["names"])
    held = task_file("ioi")["pair_split"]["test_fraction"]
    for document in corpus:
        for pair in itertools.combinations(sorted(names & set(document.words)), 2):
            assert split_of(pair, held) == "train", document.words


def test_exam_shows_only_held_out_name_pairs():
    held = task_file("ioi")["pair_split"]["test_fraction"]
    for prompt in exam_prompts("ioi", 200, seed=0):
        assert split_of((prompt.right[0], prompt.wrong[0]), held) == "test"


def test_corpus_shows_no_test_template(corpus):
    texts = [" ".join(document.words) for document in corpus]
    for task_name in TASKS:
        for template in task_file(task_name)["splits"]["test"].get("templates", ()):
            marked = " ".join(split_words(re.sub(SLOT_PATTERN, " SLOT ", template["text"])))
            pattern = re.compile(re.escape(marked).replace("SLOT", r"\w+( \d\d)?"))
            assert not [text for text in texts if pattern.search(text)], template["text"]


def test_corpus_has_every_kind_of_document_and_fits_the_positions(corpus):
    assert max(len(document.words) for document in corpus) < Recipe.n_positions
    known = set(vocabulary())
    for name, make in MAKERS.items():
        document = make(random.Random(0))
        assert len(document.words) == len(document.weights), name
        assert set(document.words) <= known, name


@pytest.mark.slow
def test_vocabulary_has_no_word_that_training_never_shows():
    """But for docstrings, which are not in the mixture: their words are the only untrained ones."""
    seen = {word for document in itertools.islice(documents(seed=1), 20000) for word in document.words}
    generator = random.Random(0)
    docstrings = {word for _ in range(2000) for word in MAKERS["docstring"](generator).words}
    unseen = set(vocabulary()) - seen
    assert unseen - docstrings == {"<pad>", "<unk>", BOS}
    assert "docstring" not in MIXTURE and unseen & docstrings


@pytest.mark.slow
def test_twenty_steps_lower_the_loss():
    recipe = Recipe(warmup_steps=1)
    words = build_tokenizer(recipe.n_positions).get_vocab()
    model = new_model(recipe, len(words), words[BOS])
    optimizer = new_optimizer(model, recipe)
    source = batches(recipe, {"ioi": 1.0}, words, words[BOS])
    batch = next(source)
    before = weighted_loss(model, batch, smoothing=0.0).item()
    for _ in range(20):
        update(model, optimizer, next(source), recipe)
    assert weighted_loss(model, batch, smoothing=0.0).item() < before - 1  # nats; it starts near ln(vocabulary) = 6.7


@pytest.mark.slow
def test_training_is_reproducible_and_written_in_one_step(tmp_path: Path):
    recipe = Recipe(max_steps=4, cooldown_steps=2, check_every=2, check_prompts=4, exam_prompts=4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first, again = (train(recipe, 1.0, lambda step: None) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert first.steps == 4
    digest = save_model(tmp_path / "one", first.model, first.tokenizer, {})
    assert digest == save_model(tmp_path / "two", again.model, again.tokenizer, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]  # nothing half-written is left
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(loaded.transformer.wte.weight, first.model.transformer.wte.weight)


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = replace(Recipe(), n_layers=2)
    tokenizer = build_tokenizer(recipe.n_positions)
    model = new_model(recipe, len(tokenizer.get_vocab()), tokenizer.bos_token_id)
    digest = save_model(tmp_path / "model", model, tokenizer, {})

    def broken(*_args, **_keywords):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        save_model(tmp_path / "model", model, tokenizer, {})
    assert sha256_of(tmp_path / "model" / "model.safetensors") == digest
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
