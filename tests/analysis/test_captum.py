"""Integrated gradients beside Captum's, which is not a dependency.

Captum asks for numpy below 2 and is therefore in no extra; without it this file is skipped, with the reason. To run it:
`pip install --no-deps captum` and `pip install matplotlib`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mechinterp as mi
from tests.support.models_tiny import huggingface, pairs

attr: Any = pytest.importorskip(
    "captum.attr", reason="needs captum: pip install --no-deps captum; pip install matplotlib"
)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_integrated_gradients_are_those_of_captum(name: str) -> None:
    """LayerIntegratedGradients of the token embedding, from the corrupt prompts, with as many Gauss-Legendre points."""
    module, p = huggingface(name), pairs(3, 6)
    found = mi.integrated_gradients(mi.load_model(module), p, steps=20, quadrature="gauss-legendre").values

    def logit_difference(tokens: torch.Tensor) -> torch.Tensor:
        n = len(tokens) // len(p)  # Captum lays the points of the integral out side by side
        logits = module(tokens).logits[:, -1]
        right, wrong = (ids.repeat(n, 1) for ids in (p.right, p.wrong))  # type: ignore[union-attr]
        return (logits.gather(1, right) - logits.gather(1, wrong))[:, 0]

    layer = attr.LayerIntegratedGradients(logit_difference, module.get_input_embeddings())
    given = layer.attribute(p.clean, baselines=p.corrupt, n_steps=20, method="gausslegendre")
    # Rotary models compute norms and angles in float32 here.
    torch.testing.assert_close(found, given.sum(-1).T.detach().to(found), rtol=1e-4, atol=1e-6)
