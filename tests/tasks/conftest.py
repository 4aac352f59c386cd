"""Tokenizers made here, of the kinds that models come with: word-level and byte-level BPE, with and without BOS."""

import re

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mechinterp.tasks.task import load_task, task_names

RARE_NAMES = ("Christopher", "Stephanie", "Elizabeth")
"""Names that the BPE has not learned, so that they are several tokens."""


def _texts() -> list[str]:
    texts: set[str] = set()
    for name in task_names():
        task = load_task(name)
        for template in task.spec.splits.train.templates + task.spec.splits.test.templates:
            texts.add(re.sub(r"\{\w+\}", " ", template.text))
        for words in task.lists.values():
            for word in words:
                # A year is two tokens, its century and the rest, as in GPT-2.
                texts.update((f" {word[:2]}", word[2:]) if re.fullmatch(r"\d{4}", word) else (f" {word}", word))
    return sorted({*texts, "01", " she he is are"} - {f" {name}" for name in RARE_NAMES} - {*RARE_NAMES, ""})


def _bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    """As GPT-2's: a space belongs to the word after it; has a BOS token but does not put it in front."""
    tokenizer = _bpe()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )  # fmt: skip


@pytest.fixture(scope="session")
def bpe_with_bos() -> PreTrainedTokenizerFast:
    """As Llama 3's: the same, and BOS is put in front of every text."""
    tokenizer = _bpe()
    number = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", number)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    """As the bundled model's: words and signs, spaces dropped; BOS in front; one token for all unknown words."""
    pattern = r"\d{2}|\w+|[^\w\s]"
    known = sorted({word for text in _texts() for word in re.findall(pattern, text)} | set(RARE_NAMES))
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<bos>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


@pytest.fixture(scope="session")
def digits() -> PreTrainedTokenizerFast:
    """As SmolLM2's and Gemma's: every digit is a token, and so is the space before a number."""
    pattern = r" ?[A-Za-z]+|[\s\S]"
    known = sorted({word for text in _texts() for word in re.findall(pattern, text)} | {" ", "\n", *"0123456789"})
    vocabulary = {word: number for number, word in enumerate(["<unk>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(params=["bpe", "bpe_with_bos", "words"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each of the kinds in turn."""
    return request.getfixturevalue(request.param)
