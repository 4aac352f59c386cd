"""Where a model came from, as circuit files record it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelInfo:
    """Identity of a loaded model. `weights` are the parameters themselves, shared with the model, for hashing."""

    name: str
    """The spec that loads it again with `load_model`: `bundled`, a directory, a hub id; or a label for a model that was
    in memory."""
    revision: str | None
    architecture: str
    origin: str
    """`bundled`, `directory`, `hub` or `memory`."""
    processing: str
    """`raw` (the checkpoint's weights) or `compatibility` (TransformerLens has folded and centred them)."""
    weights: Mapping[str, Tensor] = field(repr=False)
    notes: tuple[str, ...] = ()
    """Anything else that acts in every run, such as hooks that were already on the model."""

    def weights_sha256(self) -> str:
        """sha256 over names, dtypes, shapes and bytes of all weights as they are now, in order of name."""
        return hash_tensors(self.weights)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of the tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
