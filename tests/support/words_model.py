"""A tiny random model with a word-level tokenizer, saved as a directory: what the file and pipeline tests load."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from mechinterp.tasks.task import load_task
from tests.support.models_tiny import randomized

_PATTERN = r"\w+|[^\w\s]"


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, with every word of the IOI task; BOS in front."""
    task = load_task("ioi")
    templates = task.spec.splits.train.templates + task.spec.splits.test.templates
    texts = [re.sub(r"\{\w+\}", " ", template.text) for template in templates]
    texts += [word for words in task.lists.values() for word in words]
    known = sorted({word for text in texts for word in re.findall(_PATTERN, text)})
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<bos>", *known])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True)
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", unk_token="<unk>")


def save_words_model(folder: Path) -> Path:
    """The folder of a 2-layer, 2-head GPT-2 with random weights and that tokenizer."""
    words = tokenizer()
    config = GPT2Config(
        vocab_size=len(words), n_positions=48, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1
    )
    randomized(GPT2LMHeadModel(config), dtype=torch.float32).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
