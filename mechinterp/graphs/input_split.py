"""Whether the input of a model is the sum of its embeddings, so that each can be a writer."""

from __future__ import annotations

import torch

from mechinterp.base.errors import UnsupportedError
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.sites import Site


def check_input_split(model: HookManager) -> None:
    """Return None if the input of the first layer is embed + pos_embed. Raises UnsupportedError otherwise."""
    sites = [Site("embed"), Site("pos_embed")]
    for site in sites:
        if not model.has(site):
            raise UnsupportedError(f"{model.info.architecture} has no '{site}' to split off; keep it as one `input`.")
    tokens = torch.arange(min(model.dims.d_vocab, model.dims.n_ctx, 8), device=model.device)[None]
    values = model.run(tokens, record=[*sites, Site("resid_pre", 0)]).values
    total = values[sites[0]] + values[sites[1]]
    if not torch.allclose(total, values[Site("resid_pre", 0)], rtol=1e-4, atol=1e-5):
        raise UnsupportedError(
            f"In {model.info.architecture} embed + pos_embed is not what enters the first layer; keep it as one "
            "`input`."
        )
