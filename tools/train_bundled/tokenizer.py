"""The bundled model's word-level tokenizer: every word of the task files and of the corpus, and `<bos>` in front."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tools.train_bundled import corpus, stories
from tools.train_bundled.templates import TASK_DIRECTORY, WORD_PATTERN, split_words, task_file, word_lists

PAD, UNKNOWN, BOS = "<pad>", "<unk>", "<bos>"
FIRST_CLAUSES = (*stories.ONE, *stories.TWO, *stories.THREE)  # these can begin a text, so with a capital letter too
OTHER_TEXTS = (
    *stories.OPENERS, *stories.SUBORDINATES, *stories.JOINTS, *stories.GIVES, *stories.LATE, *corpus.FILLERS,
    "01",  # the last digits of the corrupt years
)  # fmt: skip


def vocabulary() -> tuple[str, ...]:
    """Return the words in the order of their token ids: three special ones, then the others, sorted."""
    words = {word for words in word_lists().values() for text in words for word in split_words(text)}
    for text in _texts():
        words.update(split_words(re.sub(r"\{\w+\}", " ", text)))
    return (PAD, UNKNOWN, BOS, *sorted(words))


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer; it puts `<bos>` in front of every text itself, once."""
    words = {word: number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = Split(Regex(WORD_PATTERN), behavior="removed", invert=True)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, unk_token=UNKNOWN, pad_token=PAD, padding_side="right",
        model_max_length=max_length, add_bos_token=True, clean_up_tokenization_spaces=True,
    )  # fmt: skip


def _texts() -> Iterator[str]:
    """Yield every text with slots that can occur in a document or a prompt."""
    for path in sorted(TASK_DIRECTORY.glob("*.yaml")):
        for split in task_file(path.stem).get("splits", {}).values():
            for template in split.get("templates", ()):
                yield template["text"]
                yield str(template.get("answer", ""))
    yield from OTHER_TEXTS
    for clause in FIRST_CLAUSES:
        yield clause
        yield clause[0].upper() + clause[1:]
