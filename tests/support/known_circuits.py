"""Models compiled from programs, with their true circuits (tests/data/known-circuits, benchmarks/programs)."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformer_lens.config.transformer_bridge_config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.tl_checkpoint_conversion import convert_tl_checkpoint

from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.tasks.pairs import Pairs

FOLDER = Path(__file__).parents[1] / "data" / "known-circuits"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.npz")))
PROGRAMS = Path(__file__).parents[2] / "benchmarks" / "programs"
MORE = tuple(sorted(path.stem for path in PROGRAMS.glob("*.npz")))
"""Further programs, for the benchmark: `benchmarks/compile_programs.py` made them."""


@dataclass(frozen=True)
class Known:
    """One compiled model with its pairs (every position but BOS is an answer position) and its truths."""

    model: HookManager
    pairs: Pairs
    clean_logits: torch.Tensor
    truths: dict[str, Any]

    def truth(self, name: str) -> set[str]:
        """The edges of one truth, in our names."""
        return {_our_name(source, channel) for source, channel in self.truths[name]["edges"]}


@functools.cache
def known(name: str) -> Known:
    """The compiled model of that name, made once per session: tests leave it as it was."""
    folder = FOLDER if name in NAMES else PROGRAMS
    arrays = {key: torch.from_numpy(value) for key, value in np.load(folder / f"{name}.npz").items()}
    description = json.loads((folder / f"{name}.json").read_text())
    n_layers, n_heads, d_model, d_head = arrays["W_Q"].shape
    config = TransformerBridgeConfig(
        d_model=d_model,
        d_head=d_head,
        n_layers=n_layers,
        n_heads=n_heads,
        n_ctx=len(arrays["W_pos"]),
        d_vocab=len(arrays["W_E"]),
        d_vocab_out=arrays["W_U"].shape[1],
        d_mlp=arrays["W_in"].shape[2],
        act_fn="relu",
        normalization_type=None,
        attention_dir=description["config"]["attention_dir"],
        architecture="TransformerLensNative",
    )
    weights = {
        "embed.W_E": arrays["W_E"],
        "pos_embed.W_pos": arrays["W_pos"],
        "unembed.W_U": arrays["W_U"],
        "unembed.b_U": torch.zeros(arrays["W_U"].shape[1]),
    }
    parts = {
        "attn": ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"),
        "mlp": ("W_in", "b_in", "W_out", "b_out"),
    }
    for layer in range(n_layers):
        for part, names in parts.items():
            weights |= {f"blocks.{layer}.{part}.{key}": arrays[key][layer] for key in names}
    bridge = TransformerBridge.boot_native(config)
    bridge.load_state_dict(convert_tl_checkpoint(weights, config))
    clean, corrupt = arrays["clean_tokens"].long(), arrays["corrupt_tokens"].long()
    positions = torch.arange(1, clean.shape[1]).repeat(len(clean), 1)
    pairs = Pairs(clean=clean, corrupt=corrupt, answer_pos=positions)
    return Known(load_model(bridge.eval()), pairs, arrays["clean_logits"], description["truth"])


def _our_name(source: str, channel: str) -> str:
    if channel == "output":
        return f"{source}->logits"
    node, _, part = channel.rpartition(".")
    return f"{source}->{node}" if part == "in" else f"{source}->{node}<{part}>"
