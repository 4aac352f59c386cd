"""`gim`: the modified backward, held against plain autograd with the rules written as functions of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import mechinterp as mi
from mechinterp.base.errors import UnsupportedError
from mechinterp.engines.lrp import RULES, rule_edits
from mechinterp.models.hook_manager import Intervention
from tests.support.models_tiny import SHAPES, huggingface, pairs, tiny

TEMPERATURE = 2.0


class SofterBackward(torch.autograd.Function):
    """A softmax whose backward is that of the softmax at a temperature (without the factor 1 / temperature)."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scores)
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        softer = (ctx.saved_tensors[0] / TEMPERATURE).softmax(-1)
        return softer * (gradients[0] - (softer * gradients[0]).sum(-1, keepdim=True))


def less(value: torch.Tensor, share: float) -> torch.Tensor:
    """The value, with a share of the gradient."""
    return share * value + (1 - share) * value.detach()


def frozen_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach() * weight + bias


def test_every_edge_is_that_of_plain_autograd() -> None:
    """GPT-2 written out, every reader with an input of its own."""
    module = huggingface("gpt2", n_layer=2)
    model, some = mi.load_model(module), pairs(3, 6)
    graph = mi.build_graph(model)
    d, heads = 16, 4

    def forward(tokens: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        body, eps = module.transformer, module.config.layer_norm_epsilon
        resid = body.wte(tokens) + body.wpe(torch.arange(tokens.shape[1]))
        writes, readers = {"input": resid}, dict[str, torch.Tensor]()

        def read(name: str, norm: Any) -> torch.Tensor:
            readers[name] = torch.zeros_like(resid, requires_grad=True)
            return frozen_norm(resid + readers[name], norm.weight, norm.bias, eps)

        causal = torch.ones(tokens.shape[1], tokens.shape[1]).triu(1).bool()
        for layer, block in enumerate(body.h):
            weight, bias = block.attn.c_attn.weight.split(d, 1), block.attn.c_attn.bias.split(d)
            out: dict[str, torch.Tensor] = {}
            for head in range(heads):
                cols = slice(head * d // heads, (head + 1) * d // heads)
                q, k, v = (
                    read(f"a{layer}.h{head}<{c}>", block.ln_1) @ weight[i][:, cols] + bias[i][cols]
                    for i, c in enumerate("qkv")
                )
                scores = less(q, 0.25) @ less(k, 0.25).transpose(1, 2) / (d // heads) ** 0.5
                z = SofterBackward.apply(scores.masked_fill(causal, -torch.inf)) @ less(v, 0.5)  # type: ignore[operator]
                out[f"a{layer}.h{head}"] = z @ block.attn.c_proj.weight[cols]
            writes |= out
            resid = resid + sum(out.values()) + block.attn.c_proj.bias
            inner = read(f"m{layer}", block.ln_2) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias
            writes[f"m{layer}"] = F.gelu(inner, approximate="tanh") @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
            resid = resid + writes[f"m{layer}"]
        logits = read("logits", body.ln_f) @ module.lm_head.weight.T
        return writes, readers, logits[:, -1]

    clean, readers, logits = forward(some.clean)
    corrupt, _, _ = forward(some.corrupt)
    assert some.right is not None and some.wrong is not None
    rows, right, wrong = torch.arange(len(some)), some.right[:, 0], some.wrong[:, 0]
    own = model.run(some.clean).logits
    assert own is not None
    torch.testing.assert_close(logits, own[:, -1], rtol=1e-9, atol=1e-9)
    (logits[rows, right] - logits[rows, wrong]).sum().backward()
    found = mi.score_edges(model, graph, some, method="gim").to_dict()
    assert len(found) == graph.n_edges
    for edge, score in found.items():
        writer, _, reader = edge.partition("->")
        gradient = readers[reader].grad
        assert gradient is not None
        assert score == pytest.approx(float((gradient * (clean[writer] - corrupt[writer])).sum()) / 3, abs=1e-9), edge


@contextmanager
def modified(module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rules in a Hugging Face model: its softmax, its norms, its projections to q, k and v."""

    def softmax(scores: torch.Tensor, dim: int = -1, dtype: Any = None, **_: Any) -> torch.Tensor:
        return SofterBackward.apply(scores if dtype is None else scores.to(dtype))  # type: ignore[return-value]

    def rms(self: Any, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps).detach()
        if type(self).__name__.startswith("Gemma"):
            return (normed * (1 + self.weight.float())).type_as(x)
        return self.weight * normed.to(x.dtype)

    with monkeypatch.context() as patched:
        patched.setattr(F, "softmax", softmax)
        handles = []
        for name, part in module.named_modules():
            if type(part).__name__.endswith("RMSNorm"):
                patched.setattr(type(part), "forward", rms)
            share = {"q_proj": 0.25, "k_proj": 0.25, "v_proj": 0.5}.get(name.rpartition(".")[2])
            if share is not None:
                handles.append(part.register_forward_hook(lambda _, __, out, share=share: less(out, share)))
        yield
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_the_edges_out_of_the_input_sum_to_plain_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped queries, soft caps and post-norms; the edges' gradients sum to that at the embedding."""
    module = huggingface(name)
    some = pairs(3, 6)
    clean, corrupt = (module.get_input_embeddings()(tokens).detach() for tokens in (some.clean, some.corrupt))
    clean.requires_grad_()
    assert some.right is not None and some.wrong is not None
    right, wrong = some.right[:, 0], some.wrong[:, 0]
    with modified(module, monkeypatch):
        logits = module(inputs_embeds=clean).logits[:, -1]
        rows = torch.arange(len(some))
        (logits[rows, right] - logits[rows, wrong]).sum().backward()
    expected = float((clean.grad * (clean - corrupt)).sum()) / 3  # type: ignore[operator]
    model = mi.load_model(module)
    found = mi.score_edges(model, mi.build_graph(model), some, method="gim").values[:, 0].sum()
    plain = mi.score_edges(model, mi.build_graph(model), some, method="eap").values[:, 0].sum()
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)  # norms in float32
    assert abs(float(plain) - expected) > 1e-2


@pytest.mark.parametrize("name", SHAPES)
def test_batches_and_padding_change_nothing(name: str) -> None:
    model, some = tiny(name), pairs(5, padded=True)
    graph = mi.build_graph(model)
    whole = mi.score_edges(model, graph, some, method="gim", batch_size=5)
    for size in (1, 4):
        parts = mi.score_edges(model, graph, some, method="gim", batch_size=size)
        torch.testing.assert_close(parts.values, whole.values, rtol=1e-4, atol=1e-5)


def test_it_refuses_what_has_no_gradient_there() -> None:
    model, some = tiny("gpt2"), pairs(3)
    with pytest.raises(mi.InputError, match="no relevance at the clean run"):
        mi.score_edges(model, mi.build_graph(model), some, method="gim", metric="kl_to_clean")
    assert mi.relevance(model, some, rules="gim").violation > 0.01  # it does not conserve relevance, and says so
    halved = [Intervention("pattern.0", lambda pattern: pattern / 2)]
    with pytest.raises(UnsupportedError, match="attention sink"):
        model.run(some.clean, some.mask, interventions=[*halved, *rule_edits(model, RULES["gim"])])
