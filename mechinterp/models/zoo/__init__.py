"""The bundled model: its corpus, its training script and the files themselves."""

from __future__ import annotations

from pathlib import Path


def bundled_directory() -> Path:
    """Return the directory of the bundled model, in the form that transformers' `from_pretrained` takes."""
    return Path(__file__).parent / "bundled"
