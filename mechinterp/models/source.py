"""Where a model came from, as circuit files record it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelFile:
    """The one file that a model was opened from."""

    sha256: str
    """Of the whole file."""
    types: tuple[str, ...]
    """How its weights are stored, such as `Q4_1`; the type of most weights first."""

    @property
    def stored(self) -> str:
        """The types in words: `dequantised from Q4_1, Q8_0; also F32`.

        >>> ModelFile("0" * 64, ("Q4_1", "Q8_0", "F32")).stored, ModelFile("0" * 64, ("F16", "F32")).stored
        ('dequantised from Q4_1, Q8_0; also F32', 'stored as F16, F32')
        """
        quantised = [name for name in self.types if name not in FLOATS]
        floats = [name for name in self.types if name in FLOATS]
        if not quantised:
            return f"stored as {', '.join(floats)}"
        return f"dequantised from {', '.join(quantised)}" + (f"; also {', '.join(floats)}" if floats else "")


FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of a GGUF that are not quantised."""


@dataclass(frozen=True)
class ModelInfo:
    """Identity of a loaded model. `weights` are the parameters themselves, shared with the model, for hashing."""

    name: str
    """The spec that loads it again with `load_model`: `bundled`, a directory, a GGUF file, a hub id; or a label for a
    model that was in memory."""
    revision: str | None
    architecture: str
    origin: str
    """`bundled`, `directory`, `file`, `hub` or `memory`."""
    processing: str
    """`raw` (the checkpoint's weights) or `compatibility` (TransformerLens has folded and centred them)."""
    weights: Mapping[str, Tensor] = field(repr=False)
    notes: tuple[str, ...] = ()
    """Anything else that acts in every run, such as hooks that were already on the model."""
    file: ModelFile | None = None
    """The file, if the model is one (`origin` is then `file`)."""

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
