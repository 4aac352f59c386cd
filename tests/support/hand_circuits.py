"""Two models whose weights are set by hand, with the circuit that is in them by construction.

Every role has dimensions of its own in the residual stream, there is no norm, and heads attend sharply. Beside the
circuit there are heads (and an MLP) with random weights that read everything and write where nobody of the circuit
reads, and one that writes the same to the output for every prompt.

The truth is that under resampling: an edge that carries the same in the clean and the corrupt prompt is no part of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

from mechinterp.graphs.graph import Graph, build_graph
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.tasks.pairs import Pairs

SHARP = 20.0
"""What a head's score is where it attends; elsewhere it is 0. All but 2e-8 of the attention goes there."""
LOGIT = 4.0
N_EXAMPLES = 12


@dataclass(frozen=True)
class ByHand:
    """A model, pairs of its task, and the edges of its circuit."""

    model: HookManager
    pairs: Pairs
    truth: frozenset[str]

    @property
    def graph(self) -> Graph:
        """The graph with one input."""
        return build_graph(self.model)


class _Weights:
    """Zero weights `[layer, head, ..]` to be filled in."""

    def __init__(self, n_layers: int, n_heads: int, d_model: int, d_head: int, d_vocab: int, n_ctx: int) -> None:
        self.sizes = {
            "n_layers": n_layers,
            "n_heads": n_heads,
            "d_model": d_model,
            "d_head": d_head,
            "d_vocab": d_vocab,
            "n_ctx": n_ctx,
        }
        self.embed, self.pos = torch.zeros(d_vocab, d_model), torch.zeros(n_ctx, d_model)
        self.unembed = torch.zeros(d_model, d_vocab)
        read, write = (n_layers, n_heads, d_model, d_head), (n_layers, n_heads, d_head, d_model)
        self.q, self.k, self.v, self.o = (torch.zeros(shape) for shape in (read, read, read, write))
        self.generator = torch.Generator().manual_seed(0)
        self.mlp: dict[str, torch.Tensor] = {}

    def noise(self, *shape: int) -> torch.Tensor:
        return 0.5 * torch.randn(*shape, generator=self.generator)

    def attend(self, layer: int, head: int, query: torch.Tensor, key: torch.Tensor) -> None:
        """The head attends where the query's and the key's maps `[d_model, n]` agree."""
        n, d_head = query.shape[1], self.sizes["d_head"]
        self.q[layer, head, :, :n] = query * SHARP * d_head**0.5  # attention divides by the root of d_head
        self.k[layer, head, :, :n] = key

    def distract(self, layer: int, head: int, to: slice) -> None:
        """A head with random weights that reads everything and writes to `to`."""
        for weight in (self.q, self.k, self.v):
            weight[layer, head] = self.noise(*weight[layer, head].shape)
        self.o[layer, head, :, to] = self.noise(self.sizes["d_head"], to.stop - to.start)

    def model(self) -> HookManager:
        """The model with these weights."""
        n_layers, n_heads = self.sizes["n_layers"], self.sizes["n_heads"]
        d_mlp = self.mlp["W_in"].shape[1] if self.mlp else 4
        config = TransformerBridgeConfig(
            d_mlp=d_mlp,
            act_fn="relu",
            normalization_type=None,
            attn_only=not self.mlp,
            architecture="TransformerLensNative",
            **self.sizes,  # type: ignore[arg-type]
        )
        weights: dict[str, Any] = {
            "embed.W_E": self.embed,
            "pos_embed.W_pos": self.pos,
            "unembed.W_U": self.unembed,
            "unembed.b_U": torch.zeros(self.sizes["d_vocab"]),
        }
        for layer in range(n_layers):
            start = f"blocks.{layer}.attn."
            for name, values in (("W_Q", self.q), ("W_K", self.k), ("W_V", self.v), ("W_O", self.o)):
                weights[start + name] = values[layer]
            weights |= {start + name: torch.zeros(n_heads, self.sizes["d_head"]) for name in ("b_Q", "b_K", "b_V")}
            weights[start + "b_O"] = torch.zeros(self.sizes["d_model"])
            weights |= {f"blocks.{layer}.mlp.{name}": values for name, values in self.mlp.items()}
        bridge = TransformerBridge.boot_native(config)
        bridge.load_state_dict(convert_tl_checkpoint(weights, config))
        return load_model(bridge.eval())


def _one_hot(d_model: int, rows: slice) -> torch.Tensor:
    """`[d_model, n]`: reads the dimensions `rows`."""
    return torch.eye(d_model)[:, rows]


@functools.cache
def induction() -> ByHand:
    """Two layers, attention only: `BOS .. A B .. A` is followed by B.

    a0.h0 attends to the token before and writes what it was; a1.h0 looks for the position whose token before is the
    present token, and copies that position's token to the output. So the circuit is: the tokens that a0.h0 moves;
    what it wrote, as a1.h0's keys (K composition); the present token as a1.h0's query; the token that it copies; and
    the output. a0.h0's own queries and keys read positions alone, which are the same in both prompts.
    """
    n_vocab, n_ctx, n_junk = 14, 8, 6
    d_model = 3 * n_vocab + n_ctx + n_junk
    token, before, out = (slice(i * n_vocab, (i + 1) * n_vocab) for i in range(3))
    place, junk = slice(3 * n_vocab, 3 * n_vocab + n_ctx), slice(3 * n_vocab + n_ctx, d_model)
    made = _Weights(2, 3, d_model, n_vocab, n_vocab, n_ctx)
    made.embed[:, token], made.pos[:, place] = torch.eye(n_vocab), torch.eye(n_ctx)
    made.unembed[out] = LOGIT * torch.eye(n_vocab)
    places = _one_hot(d_model, place)
    made.attend(0, 0, places[:, 1:], places[:, :-1])  # the query of position p meets the key of position p - 1
    made.v[0, 0], made.o[0, 0, :, before] = _one_hot(d_model, token), torch.eye(n_vocab)
    made.attend(1, 0, _one_hot(d_model, token), _one_hot(d_model, before))
    made.v[1, 0], made.o[1, 0, :, out] = _one_hot(d_model, token), torch.eye(n_vocab)
    made.distract(0, 1, junk)
    made.distract(1, 1, junk)
    # a0.h2 writes the same to the output for every prompt: its queries, keys and values read positions.
    made.v[0, 2, place] = made.noise(n_ctx, n_vocab)
    made.o[0, 2, :, out] = 0.3 * made.noise(n_vocab, n_vocab)
    # a1.h2 does nothing at all.

    def prompts() -> tuple[torch.Tensor, torch.Tensor]:
        tokens, answers = torch.zeros(N_EXAMPLES, n_ctx, dtype=torch.long), []
        for row in tokens:  # 0 is BOS
            row[1:-1] = 1 + torch.randperm(n_vocab - 1, generator=made.generator)[: n_ctx - 2]
            first = int(torch.randint(1, n_ctx - 2, (), generator=made.generator))
            row[-1] = row[first]
            answers.append(row[first + 1])
        return tokens, torch.stack(answers)

    truth = {
        "input->a0.h0<v>",
        "a0.h0->a1.h0<k>",
        "input->a1.h0<q>",
        "input->a1.h0<v>",
        "a1.h0->logits",
    }
    return ByHand(made.model(), _pairs(prompts), frozenset(truth))


@functools.cache
def copy_head() -> ByHand:
    """One layer with an MLP: the last token asks for the one that is marked, and a0.h0 copies that to the output.

    The circuit is the mark, in a0.h0's keys, the token that it copies, and the output. The query is the same token
    `?` in both prompts. The MLP reads everything and writes where nobody reads.
    """
    n_kinds, n_ctx, n_junk = 10, 7, 6
    n_vocab = 2 * n_kinds + 2  # every kind plain and marked, BOS and the question
    d_model = 2 * n_kinds + 3 + n_ctx + n_junk
    kind, out = slice(0, n_kinds), slice(n_kinds, 2 * n_kinds)
    marked, start, question = (2 * n_kinds + i for i in range(3))
    place, junk = slice(2 * n_kinds + 3, d_model - n_junk), slice(d_model - n_junk, d_model)
    made = _Weights(1, 3, d_model, n_kinds, n_vocab, n_ctx)
    made.embed[:n_kinds, kind] = made.embed[n_kinds : 2 * n_kinds, kind] = torch.eye(n_kinds)
    made.embed[n_kinds : 2 * n_kinds, marked] = 1
    made.embed[-2, start] = made.embed[-1, question] = 1
    made.pos[:, place] = torch.eye(n_ctx)
    made.unembed[out, :n_kinds] = LOGIT * torch.eye(n_kinds)
    made.attend(0, 0, _one_hot(d_model, slice(question, question + 1)), _one_hot(d_model, slice(marked, marked + 1)))
    made.v[0, 0], made.o[0, 0, :, out] = _one_hot(d_model, kind), torch.eye(n_kinds)
    made.distract(0, 1, junk)
    made.v[0, 2, place] = made.noise(n_ctx, n_kinds)
    made.o[0, 2, :, out] = 0.3 * made.noise(n_kinds, n_kinds)
    made.mlp = {"W_in": made.noise(d_model, 8), "b_in": made.noise(8), "W_out": torch.zeros(8, d_model)}
    made.mlp["W_out"][:, junk] = made.noise(8, n_junk)
    made.mlp["b_out"] = torch.zeros(d_model)

    def prompts() -> tuple[torch.Tensor, torch.Tensor]:
        tokens, answers = torch.full((N_EXAMPLES, n_ctx), n_vocab - 2), []
        for row in tokens:
            row[1:-1] = torch.randperm(n_kinds, generator=made.generator)[: n_ctx - 2]
            at = int(torch.randint(1, n_ctx - 1, (), generator=made.generator))
            answers.append(row[at].clone())
            row[at] += n_kinds
            row[-1] = n_vocab - 1
        return tokens, torch.stack(answers)

    truth = {"input->a0.h0<k>", "input->a0.h0<v>", "a0.h0->logits"}
    return ByHand(made.model(), _pairs(prompts), frozenset(truth))


def _pairs(prompts: Any) -> Pairs:
    """Pairs of two draws; an example whose two answers are the same is left out."""
    (clean, right), (corrupt, wrong) = prompts(), prompts()
    kept = right != wrong
    return Pairs(clean=clean[kept], corrupt=corrupt[kept], right=right[kept], wrong=wrong[kept])


HAND = {"induction": induction, "copy_head": copy_head}
