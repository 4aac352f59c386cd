"""Activation patching of every head of the GPT-2-small shape, in forwards of the bare Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable

import torch

import mechinterp as mi
from benchmarks.engines import Row, measure, small_gpt2


def patching(device: torch.device, repeats: int) -> list[Row]:
    """144 heads at all positions, and at each of 15 positions by itself. F has logits at every position."""
    bare, model, pairs = small_gpt2(device)

    def forward() -> object:
        with torch.no_grad():
            return bare(pairs.clean).logits

    work: dict[str, Callable[[], object]] = {
        "forward": forward,
        "heads": lambda: mi.activation_patching(model, pairs, "z"),
    }
    seconds = measure(work, device, repeats)
    by_position = {"all": lambda: mi.activation_patching(model, pairs, "z", positions="each")}
    once = measure(by_position, device, 1, warm=False)["all"]
    return [
        Row("activation patching, 144 heads", seconds["heads"] / seconds["forward"], "F", "51", "60"),
        Row("activation patching, 144 heads x 15 positions", once / seconds["forward"], "F", "440", "600"),
        Row(
            "largest difference from whole patched runs (12 drawn)",
            _difference(model, pairs) * 1e6,
            "1e-6 logits",
            "",
            "10",
        ),
    ]


def _difference(model: mi.HookManager, pairs: mi.Pairs) -> float:
    """The largest difference between the sweep and whole patched runs, for a few heads and positions."""
    corrupt = model.run(pairs.corrupt, record=[f"z.{layer}" for layer in range(12)]).values
    clean = model.run(pairs.clean).logits
    assert clean is not None and pairs.right is not None and pairs.wrong is not None
    rows, worst = torch.arange(len(pairs)), 0.0

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[rows, -1, pairs.right[:, 0]] - logits[rows, -1, pairs.wrong[:, 0]]

    for number in torch.randperm(144 * 15, generator=torch.Generator().manual_seed(0))[:12].tolist():
        layer, head, pos = number // 180, number // 15 % 12, number % 15

        def edit(z: torch.Tensor, layer: int = layer, head: int = head, pos: int = pos) -> torch.Tensor:
            z = z.clone()
            z[:, pos, head] = corrupt[f"z.{layer}"][:, pos, head]
            return z

        patched = model.run(pairs.clean, interventions={f"z.{layer}": edit}).logits
        assert patched is not None
        swept = mi.activation_patching(model, pairs, "z", layers=[layer], units=[head], positions=[pos])
        worst = max(worst, float((metric(clean) - metric(patched) - swept.values.flatten()).abs().max()))
    return worst
