"""Write a trained model as a directory that `from_pretrained` loads, with its card, in one step."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

WEIGHTS = "model.safetensors"


def save_model(
    directory: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, card: Mapping[str, Any]
) -> str:
    """Return the SHA-256 of the weights file after writing model, tokenizer and card.json to `directory`.

    Everything is written beside the directory first and then moved, so a run that is cut short leaves either
    the old files or the new ones. A MODEL_CARD.md that is there already stays.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-"))
    try:
        model.save_pretrained(fresh)
        (fresh / "generation_config.json").unlink(missing_ok=True)
        tokenizer.save_pretrained(fresh)
        _name_tokenizer_class(fresh / "tokenizer_config.json")
        digest = sha256_of(fresh / WEIGHTS)
        full = {**card, "files": {name: sha256_of(fresh / name) for name in sorted(_names(fresh))}, "sha256": digest}
        (fresh / "card.json").write_text(json.dumps(full, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if (directory / "MODEL_CARD.md").exists():
            shutil.copy2(directory / "MODEL_CARD.md", fresh / "MODEL_CARD.md")
        for path in fresh.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner only
        fresh.chmod(0o755)
        _swap(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return digest


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def _name_tokenizer_class(path: Path) -> None:
    """Name the class that every version of transformers knows; without it AutoTokenizer guesses from the model type."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(fresh: Path, directory: Path) -> None:
    """Move `fresh` to `directory`; what was there is put back if the move fails."""
    if not directory.exists():
        fresh.rename(directory)
        return
    aside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-old-"))
    directory.rename(aside / "old")
    try:
        fresh.rename(directory)
    except OSError:
        (aside / "old").rename(directory)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
