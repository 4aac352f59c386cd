"""The training loop: batches, loss, the two mixtures and the cool-down. It prints nothing and writes nothing."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tools.train_bundled.corpus import FIRST_MIXTURE, MIXTURE, Document, documents
from tools.train_bundled.exam import Grade, grades
from tools.train_bundled.recipe import Recipe, new_model, new_optimizer
from tools.train_bundled.tokenizer import BOS, build_tokenizer


@dataclass(frozen=True)
class Batch:
    """Token ids and loss weights [batch, pos], and which query may attend to which key [batch, query, key].

    Weights are 0 on `<bos>` and padding.
    """

    tokens: Tensor
    weights: Tensor
    visible: Tensor


@dataclass(frozen=True)
class Step:
    """Where a run is after a step; `grades` is None at steps without a check."""

    number: int
    phase: str  # "first mixture", "full mixture" or "cool-down"
    loss: float  # nats
    grades: Mapping[str, Grade] | None


@dataclass(frozen=True)
class Trained:
    """A finished run. `reproducible` is False when the time limit, not the data, started the cool-down."""

    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerFast
    grades: Mapping[str, Grade]
    steps: int
    phases: Mapping[str, int]  # the step at which each phase began
    losses: tuple[float, ...]
    reproducible: bool


def train(recipe: Recipe, max_minutes: float, on_step: Callable[[Step], None]) -> Trained:
    """Return a trained model; `on_step` hears of every step.

    Cost: about 0.1 s a step on one core. The step count ends the full mixture only at
    `recipe.max_steps - recipe.cooldown_steps`, before that the held-out accuracy does.
    """
    tokenizer = build_tokenizer(recipe.n_positions)
    word_ids = tokenizer.get_vocab()
    bos = word_ids[BOS]
    model = new_model(recipe, len(word_ids), bos)
    optimizer = new_optimizer(model, recipe)
    source = batches(recipe, FIRST_MIXTURE, word_ids, bos)
    phase, phases, losses = "first mixture", {"first mixture": 0}, []
    reproducible = True
    deadline = time.monotonic() + 60 * max_minutes
    for number in itertools.count(1):
        left = recipe.cooldown_steps - (number - 1 - phases.get("cool-down", number - 1))
        rate = min(1.0, number / recipe.warmup_steps) * left / recipe.cooldown_steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        losses.append(update(model, optimizer, next(source), recipe))
        result = None
        if number % recipe.check_every == 0:
            result = grades(model, word_ids, bos, recipe.check_prompts, seed=1)
            late, last = time.monotonic() > deadline, number >= recipe.max_steps - recipe.cooldown_steps
            following = next_phase(phase, recipe, result, last or late)
            if following != phase:
                phases[following] = number
                if phase == "first mixture":
                    source = batches(recipe, MIXTURE, word_ids, bos)
                if following == "cool-down":
                    reproducible = not late
                phase = following
        on_step(Step(number, phase, losses[-1], result))
        if "cool-down" in phases and number >= phases["cool-down"] + recipe.cooldown_steps:
            break
    final = grades(model, word_ids, bos, recipe.exam_prompts)
    return Trained(model.eval(), tokenizer, final, len(losses), phases, tuple(losses), reproducible)


def next_phase(phase: str, recipe: Recipe, result: Mapping[str, Grade], must_end: bool) -> str:
    """Return the phase that follows a check with these grades; it may be the same."""
    if phase == "cool-down" or must_end:
        return "cool-down"
    if all(result[name].accuracy >= target for name, target in recipe.targets.items()):
        return "cool-down"
    if phase == "first mixture" and result["induction"].accuracy < recipe.first_target:
        return phase
    return "full mixture"


def update(model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, batch: Batch, recipe: Recipe) -> float:
    """Return the loss in nats before one step of the optimizer."""
    loss = weighted_loss(model, batch, recipe.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
    optimizer.step()
    return loss.item()


def weighted_loss(model: GPT2LMHeadModel, batch: Batch, smoothing: float) -> Tensor:
    """Return the mean cross-entropy in nats of the next word, weighted."""
    logits = model(batch.tokens[:, :-1], attention_mask=batch.visible[:, None, :-1, :-1]).logits
    targets = batch.tokens[:, 1:].flatten()
    losses = cross_entropy(logits.flatten(0, 1), targets, reduction="none", label_smoothing=smoothing)
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def batches(recipe: Recipe, mixture: Mapping[str, float], word_ids: Mapping[str, int], bos: int) -> Iterator[Batch]:
    """Yield batches of documents of like length."""
    stream = documents(recipe.seed, mixture)
    generator = random.Random(recipe.seed)
    while True:
        pool = sorted(itertools.islice(stream, 16 * recipe.batch_size), key=lambda document: len(document.words))
        starts = list(range(0, len(pool), recipe.batch_size))
        generator.shuffle(starts)
        for start in starts:
            yield make_batch(pool[start : start + recipe.batch_size], word_ids, bos)


def make_batch(chosen: Sequence[Document], word_ids: Mapping[str, int], bos: int) -> Batch:
    """Return documents as a batch, `<bos>` in front, padded on the right."""
    length = 1 + max(len(document.words) for document in chosen)
    tokens = torch.zeros(len(chosen), length, dtype=torch.long)
    weights = torch.zeros(len(chosen), length)
    visible = torch.ones(length, length, dtype=torch.bool).tril().repeat(len(chosen), 1, 1)
    for row, document in enumerate(chosen):
        stop = 1 + len(document.words)
        tokens[row, :stop] = torch.tensor([bos, *(word_ids[word] for word in document.words)])
        weights[row, 1:stop] = torch.tensor(document.weights)
        first, query = document.hidden
        visible[row, 1 + query, 1 + first : 1 + query] = False
    return Batch(tokens, weights, visible)
