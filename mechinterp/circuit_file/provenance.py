"""Records of the model, its tokenizer and the software that was used."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from mechinterp.circuit_file.schema import DimsRecord, ModelRecord, Provenance, TokenizerRecord
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.layout import Dims, LayerDims

DISTRIBUTIONS = {
    "mechinterp": "mechinterp-circuits",
    "torch": "torch",
    "transformers": "transformers",
    "transformer_lens": "transformer-lens",
}
LOADER = "transformer_lens TransformerBridge"


def versions() -> dict[str, str]:
    """The versions of the packages that results can depend on, without the local part (`+cpu`)."""
    found = {"python": platform.python_version()}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = metadata.version(distribution).partition("+")[0]
        except metadata.PackageNotFoundError:  # running from a source tree that was not installed
            found[name] = "not installed"
    return found


def provenance_of(model: HookManager, command: str | None) -> Provenance:
    """The versions, the type of device (`cpu`, `cuda`, `mps`) and the command."""
    return Provenance(versions=versions(), device=model.device.type, command=command)


def model_record(model: HookManager) -> ModelRecord:
    """The record of a model; hashes all weights as they are now."""
    info = model.info
    return ModelRecord.model_validate(
        {
            "name": Path(info.name).name if info.file and Path(info.name).is_absolute() else info.name,
            "origin": info.origin,
            "file": info.file and {"sha256": info.file.sha256, "types": info.file.types},
            "revision": info.revision,
            "weights_sha256": info.weights_sha256(),
            "architecture": info.architecture,
            "dims": asdict(model.dims) | {"layers": tuple(map(asdict, model.dims.layers)) or None},
            "processing": info.processing,
            "dtype": dtype_name(model),
            "loader": LOADER,
        }
    )


def dtype_name(model: HookManager) -> str:
    """The dtype of the weights in the form that `load_model` accepts, such as `float32`."""
    return str(model.dtype).removeprefix("torch.")


def dims_of(record: DimsRecord) -> Dims:
    """The dimensions of the model that a file describes."""
    layers = tuple(LayerDims(**own.model_dump()) for own in record.layers or ())
    return Dims(**record.model_dump(exclude={"layers"}), layers=layers)


def tokenizer_record(tokenizer: Any, prepend_bos: bool | None) -> TokenizerRecord | None:
    """The record of a tokenizer, or None if the model has none."""
    if tokenizer is None:
        return None
    return TokenizerRecord(
        kind=type(tokenizer).__name__,
        n_tokens=len(tokenizer),
        vocabulary_sha256=vocabulary_sha256(tokenizer),
        prepend_bos=prepend_bos,
    )


def vocabulary_sha256(tokenizer: Any) -> str:
    """sha256 over the words with their ids and the special tokens.

    The serialised tokenizer is not hashed, because its form changes with the version of the library. Whether the same
    texts give the same ids is checked by the digest of the pairs.
    """
    special = {name: str(getattr(tokenizer, f"{name}_token", None)) for name in ("bos", "eos", "unk", "pad")}
    text = json.dumps([sorted(tokenizer.get_vocab().items()), special], ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
