"""A model with planted features: each token is a few of 24 directions in 16 dimensions, the neurons tell them apart.

The toy model of superposition (Elhage et al. 2022) as a transformer of one layer: the embedding holds W x for sparse x,
the MLP computes ReLU(W^T W x + b). What the features are is known, token by token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

from mechinterp.models.hook_manager import HookManager, load_model

D_MODEL, N_FEATURES, D_VOCAB = 16, 24, 600


@dataclass(frozen=True, eq=False)
class Planted:
    """The model, the directions `[feature, d_model]`, and how much of each feature a token has, `[token, feature]`."""

    model: HookManager
    directions: torch.Tensor
    amounts: torch.Tensor


def planted(seed: int = 0, amounts: torch.Tensor | None = None) -> Planted:
    """The toy model, its directions spread out; by default every token has one or two features, 0.5 to 1.5 strong."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(N_FEATURES, D_MODEL, generator=generator), dim=1)
    for _ in range(300):  # pushed apart, as training does: the largest cosine is then 0.23
        overlap = (W @ W.T).fill_diagonal_(0)
        W = torch.nn.functional.normalize(W - 0.1 * overlap**3 @ W, dim=1)
    if amounts is None:
        amounts = torch.zeros(D_VOCAB, N_FEATURES)
        for token in range(D_VOCAB):
            some = torch.randperm(N_FEATURES, generator=generator)[: 1 + token % 2]
            amounts[token, some] = torch.rand(len(some), generator=generator) + 0.5
    cfg = TransformerBridgeConfig(
        d_model=D_MODEL,
        d_head=4,
        n_layers=1,
        n_heads=4,
        n_ctx=8,
        d_vocab=len(amounts),
        architecture="TransformerLensNative",
        attn_only=False,
        normalization_type=None,
        act_fn="relu",
        d_mlp=N_FEATURES,
    )
    bridge = TransformerBridge.boot_native(cfg).eval()
    weights = {name.replace("._original_component", ""): value for name, value in bridge.named_parameters()}
    with torch.no_grad():
        for name, value in weights.items():
            if name.startswith("layers.0.attn.o") or name == "pos.weight":
                value.zero_()
        weights["tok_embed.weight"].copy_(amounts @ W)
        weights["layers.0.mlp.fc_in.weight"].copy_(W)
        weights["layers.0.mlp.fc_in.bias"].fill_(-0.2)
    return Planted(load_model(bridge), W, amounts)
