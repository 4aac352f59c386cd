"""How far a corpus was read, and the strongest examples until there: a state from which a killed reading goes on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.analysis.texts import Texts, padded, text_ids
from mechinterp.base.checkpoint import Checkpoint, checkpoint_of
from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress
from mechinterp.features.basis import Basis
from mechinterp.models.hook_manager import HookManager

_INTEGERS = ("read", "tokens", "fired", "kept", "text", "position", "length", "ids")


@dataclass(frozen=True)
class Reached:
    """What was found in the texts that were read.

    Args:
        read: How many texts.
        tokens: How many tokens.
        fired: Of every feature, on how many of them it was not 0.
        kept: Of every feature its examples as (value, text, ids, position), the strongest first.
    """

    read: int
    tokens: int
    fired: Sequence[int]
    kept: Sequence[Sequence[tuple[float, int, tuple[int, ...], int]]]


class CorpusReader:
    """The batches of a corpus, from where an earlier run was killed, whose state is in a file.

    Texts that were read before are tokenised again, and their digest is compared with that of the state, so that a
    state never goes on with another corpus; texts may have been added at the end.

    Args:
        model: The model.
        texts: The corpus.
        batch_size: Texts per run.
        progress: Called with the texts that are read, and how many there are (for an iterator: those read so far).
        checkpoint: The file; without a path nothing is kept.
    """

    def __init__(
        self, model: HookManager, texts: Texts, batch_size: int, progress: Progress, checkpoint: Checkpoint
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1; got {batch_size}.")
        self._model, self._texts, self._size, self._progress = model, texts, batch_size, progress
        self._checkpoint, self._digest, self._skip, self._expected = checkpoint, hashlib.sha256(), 0, b""

    def reached(self, n_features: int, most: int) -> Reached | None:
        """What an earlier run found, of so many features and at most `most` examples of each; None: there is none.

        Raises InputError for a damaged state and for that of another run.
        """
        found = self._checkpoint.read()
        if found is None:
            return None
        if not _possible(found, n_features, most, self._model.dims.d_vocab):
            raise InputError(f"{self._checkpoint.path} is not a state of this reading; delete it to start over.")
        self._skip, self._expected = int(found["read"]), bytes(cast(list[int], found["corpus"].tolist()))
        return _reached(found)

    def batches(self, first: int = 0) -> Iterator[tuple[Int[Tensor, "batch pos"], Tensor]]:
        """(token ids, mask) of so many texts at a time, padded on the right, after those that were read before.

        Args:
            first: So many texts are left out without a check.
        """
        rows, read = text_ids(self._model, self._texts, first), first
        for row in islice(rows, self._skip):
            self._see(row)
            read += 1
        if self._skip and self._digest.digest() != self._expected:
            raise InputError(
                f"{self._checkpoint.path} is the state of another corpus: its first {self._skip:,} texts are not these;"
                " delete it to start over, or give another file."
            )
        total = len(self._texts) if isinstance(self._texts, Sized) else None
        while batch := list(islice(rows, self._size)):
            for row in batch:
                self._see(row)
            yield padded(batch, self._model.device)
            read += len(batch)
            self._progress(read, read if total is None else total)

    def _see(self, row: Tensor) -> None:
        if self._checkpoint.path is not None:
            self._digest.update(len(row).to_bytes(8, "little") + row.cpu().numpy().tobytes())

    @property
    def due(self) -> bool:
        """Whether the state should be saved now."""
        return self._checkpoint.due

    def save(self, reached: Reached) -> None:
        """Return None after writing the state."""
        self._checkpoint.save(_state(reached, self._digest.digest()), now=True)

    def clear(self) -> None:
        """Return None after deleting the file: all is read."""
        self._checkpoint.clear()


def reading_of(
    path: str | os.PathLike[str] | None,
    model: HookManager,
    subjects: Sequence[tuple[object, int | None]],
    n: int,
    skip: int = 0,
) -> Checkpoint:
    """The checkpoint of one reading; its key has the model, what is looked for, and how many examples are kept.

    Args:
        path: The file; None: nothing is kept.
        model: The model.
        subjects: Bases with numbers of features, or names of neurons and heads.
        n: Examples of each.
        skip: Tokens at the beginning of every text that are not looked at.

    Raises InputError for a basis without a digest of its own.
    """
    if path is None:
        return Checkpoint()
    names: list[object] = []
    for subject, feature in subjects:
        if not isinstance(subject, (Basis, str)):
            raise InputError(f"`resume` needs a feature basis with a sha256; {type(subject).__name__} has none.")
        names.append([subject if isinstance(subject, str) else subject.sha256, feature])
    return checkpoint_of(path, ["strongest examples", model.info.weights_sha256(), str(model.dtype), names, n, skip])


def _state(reached: Reached, digest: bytes) -> dict[str, Tensor]:
    examples = [one for kept in reached.kept for one in kept]
    integers: dict[str, list[int]] = {
        "read": [reached.read],
        "tokens": [reached.tokens],
        "fired": list(reached.fired),
        "kept": [len(kept) for kept in reached.kept],
        "text": [text for _, text, _, _ in examples],
        "position": [position for _, _, _, position in examples],
        "length": [len(ids) for _, _, ids, _ in examples],
        "ids": [i for _, _, ids, _ in examples for i in ids],
    }
    state = {name: torch.tensor(values, dtype=torch.long) for name, values in integers.items()}
    state["value"] = torch.tensor([value for value, _, _, _ in examples], dtype=torch.float64)
    state["corpus"] = torch.tensor(list(digest), dtype=torch.uint8)
    return state


def _possible(found: Mapping[str, Tensor], n_features: int, most: int, d_vocab: int) -> bool:
    """Whether a state is one: its names, dtypes, shapes and numbers go together."""
    dtypes = {**dict.fromkeys(_INTEGERS, torch.long), "value": torch.float64, "corpus": torch.uint8}
    if {name: tensor.dtype for name, tensor in found.items()} != dtypes or any(t.ndim != 1 for t in found.values()):
        return False
    size = {name: len(tensor) for name, tensor in found.items()}
    if (size["read"], size["tokens"], size["corpus"]) != (1, 1, 32) or any(
        bool((found[i] < 0).any()) for i in _INTEGERS
    ):
        return False
    if not size["fired"] == size["kept"] == n_features or int(found["kept"].max()) > most:
        return False
    n = int(found["kept"].sum())
    if any(size[name] != n for name in ("value", "text", "position", "length")):
        return False
    if bool((found["position"] >= found["length"]).any()) or bool((found["text"] >= found["read"]).any()):
        return False
    return size["ids"] == int(found["length"].sum()) and bool((found["ids"] < d_vocab).all())


def _reached(found: Mapping[str, Tensor]) -> Reached:
    lists = {name: tensor.tolist() for name, tensor in found.items()}
    ids, values = (
        iter(lists["ids"]),
        zip(lists["value"], lists["text"], lists["length"], lists["position"], strict=True),
    )
    examples = iter([(value, text, tuple(islice(ids, length)), at) for value, text, length, at in values])
    kept = [list(islice(examples, number)) for number in lists["kept"]]
    return Reached(lists["read"][0], lists["tokens"][0], lists["fired"], kept)
