"""Accuracy on held-out prompts: other templates, other name pairs, other words than the corpus ever shows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import GPT2LMHeadModel

from tools.train_bundled.templates import Prompt, prompt

TASKS = (
    "ioi", "ioi_distractor", "induction", "greater_than", "docstring", "subject_verb_agreement", "gendered_pronoun",
)  # fmt: skip


@dataclass(frozen=True)
class Grade:
    """How well a model does a task, over `prompts` prompts.

    accuracy: share of prompts whose most likely next word, of the whole vocabulary, is a right answer.
    preference: share in which the right answers together are likelier than the wrong ones together.
    probability: mean probability of the right answers together.
    """

    accuracy: float
    preference: float
    probability: float
    prompts: int


def exam_prompts(task_name: str, count: int, seed: int) -> list[Prompt]:
    """Return `count` prompts of the test split of a task."""
    generator = random.Random(f"{task_name} {seed}")
    return [prompt(task_name, "test", generator) for _ in range(count)]


def grade(model: GPT2LMHeadModel, word_ids: Mapping[str, int], bos: int, prompts: Sequence[Prompt]) -> Grade:
    """Return the grade of a model on prompts. Cost: one forward of each."""
    lengths = torch.tensor([len(p.words) for p in prompts])
    tokens = torch.zeros(len(prompts), int(lengths.max()) + 1, dtype=torch.long)
    right = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
    wrong = torch.zeros_like(right)
    for row, p in enumerate(prompts):
        tokens[row, : len(p.words) + 1] = torch.tensor([bos, *(word_ids[word] for word in p.words)])
        right[row, [word_ids[word] for word in p.right]] = True
        wrong[row, [word_ids[word] for word in p.wrong]] = True
    with torch.inference_mode():
        hidden = model.transformer(tokens).last_hidden_state[torch.arange(len(prompts)), lengths]
        probabilities = model.lm_head(hidden).float().softmax(-1)
    chosen = probabilities.argmax(-1, keepdim=True)
    right_mass = (probabilities * right).sum(-1)
    wrong_mass = (probabilities * wrong).sum(-1)
    return Grade(
        accuracy=right.gather(1, chosen).float().mean().item(),
        preference=(right_mass > wrong_mass).float().mean().item(),
        probability=right_mass.mean().item(),
        prompts=len(prompts),
    )


def grades(
    model: GPT2LMHeadModel, word_ids: Mapping[str, int], bos: int, count: int, seed: int = 0
) -> dict[str, Grade]:
    """Return the grade of a model on each task."""
    was_training = model.training
    model.eval()
    try:
        return {name: grade(model, word_ids, bos, exam_prompts(name, count, seed)) for name in TASKS}
    finally:
        model.train(was_training)
