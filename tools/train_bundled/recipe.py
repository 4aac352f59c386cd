"""What decides the weights: the recipe's numbers, the untrained model and its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

TARGETS: Mapping[str, float] = MappingProxyType({
    "ioi": 0.99,
    "ioi_distractor": 0.98,
    "induction": 0.97,
    "greater_than": 0.98,
    "subject_verb_agreement": 0.98,
    "gendered_pronoun": 0.98,
})  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run; with one thread they decide the weights on one type of machine.

    When held-out induction reaches `first_target` the full mixture takes over from the first; when every task
    reaches its target (or at `max_steps - cooldown_steps`) the learning rate falls to zero over `cooldown_steps`.
    """

    seed: int = 0
    n_layers: int = 4
    n_heads: int = 4
    d_model: int = 64
    n_positions: int = 64
    learning_rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05  # on matrices only
    max_norm: float = 1.0  # of the gradient
    label_smoothing: float = 0.05  # keeps the logits bounded, so that no softmax is saturated
    warmup_steps: int = 100
    cooldown_steps: int = 600
    max_steps: int = 7200
    batch_size: int = 32
    init_scale: float = 0.8  # standard deviation of the initial weights times sqrt(d_model)
    check_every: int = 200  # steps
    check_prompts: int = 100  # of each task at a check
    exam_prompts: int = 1000  # of each task for the card
    first_target: float = 0.8
    targets: Mapping[str, float] = field(default_factory=lambda: TARGETS)


def new_model(recipe: Recipe, vocab_size: int, bos: int) -> GPT2LMHeadModel:
    """Return an untrained model of the recipe's shape; the recipe's seed decides its weights."""
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=recipe.n_positions,
        n_embd=recipe.d_model,
        n_layer=recipe.n_layers,
        n_head=recipe.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=recipe.init_scale / recipe.d_model**0.5,
        bos_token_id=bos,
        eos_token_id=bos,
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's gelu_new, in one kernel
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = GPT2LMHeadModel(config)
        start_with_induction(model)
    return model


@torch.no_grad()
def start_with_induction(model: GPT2LMHeadModel) -> None:
    """Let training begin with a previous-token head a0.h0 and an induction head a1.h0 that reads from it.

    From random weights the pair appears only after thousands of steps, which is too long for a script that is to
    take minutes. Nothing holds the pair in place: training keeps it because induction needs it. The rest is random.

    Position embeddings begin as sinusoids. a0.h0: the query is the position turned back by one, the key the
    position, the value 16 random directions of the token. a1.h0: the query is the same 16 directions of its own
    token, the key what a0.h0 wrote; it copies the token it looks at.
    """
    config = model.config
    d_head = config.n_embd // config.n_head
    scale = config.initializer_range
    model.transformer.wpe.weight.copy_(sinusoids(config.n_positions, config.n_embd) * scale * 2**0.5)
    previous, induction = (cast(GPT2Attention, model.transformer.h[layer].attn) for layer in (0, 1))
    used = look_one_back(previous, gain=2.5)
    model.transformer.wte.weight[:, used] = 0  # so that tokens do not disturb a0.h0
    token = torch.randn(config.n_embd, d_head)
    token[used] = 0  # so that positions do not disturb a1.h0
    written = torch.linalg.qr(torch.randn(config.n_embd, d_head))[0].T
    query, key, value = induction.c_attn.weight.split(config.n_embd, dim=1)
    previous.c_attn.weight[:, 2 * config.n_embd : 2 * config.n_embd + d_head] = 0.5 * scale * token
    previous.c_proj.weight[:d_head] = written
    query[:, :d_head] = 1.5 * scale * token
    key[:, :d_head] = 4.0 * written.T
    induction.c_proj.weight[:d_head] = value[:, :d_head].T


def look_one_back(attention: GPT2Attention, gain: float) -> list[int]:
    """Let head 0 attend to the position before, and return the dimensions it reads.

    It uses every second one of the fastest frequencies of `sinusoids`, as many as fit into a head.
    """
    width, d_head = attention.embed_dim, attention.head_dim
    query, key, _ = attention.c_attn.weight.split(width, dim=1)
    query[:, :d_head] = 0
    key[:, :d_head] = 0
    used: list[int] = []
    for column in range(0, d_head, 2):
        sine, cosine = column, column + width // 2
        angle = 2 * torch.pi / wavelengths(width)[column]
        key[sine, column] = key[cosine, column + 1] = gain
        # sin(x - a) = sin x cos a - cos x sin a; cos(x - a) = cos x cos a + sin x sin a
        query[sine, column] = query[cosine, column + 1] = gain * angle.cos()
        query[cosine, column] = -gain * angle.sin()
        query[sine, column + 1] = gain * angle.sin()
        used += [sine, cosine]
    return used


def wavelengths(d_model: int) -> Tensor:
    """Return the [d_model / 2] wavelengths of the initial position embeddings, 2.5 to 160 tokens."""
    return 2.5 * 64 ** torch.linspace(0, 1, d_model // 2)


def sinusoids(n_positions: int, d_model: int) -> Tensor:
    """Return [pos, d_model] initial position embeddings: the sines, then the cosines. Training changes them.

    Source: Vaswani et al. 2017, section 3.5, with other wavelengths.
    """
    angles = 2 * torch.pi * torch.arange(n_positions)[:, None] / wavelengths(d_model)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def new_optimizer(model: GPT2LMHeadModel, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)
