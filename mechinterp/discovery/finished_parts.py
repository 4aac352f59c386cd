"""What the finished parts of a long run gave, so that a killed run goes on in every stage and not only in scoring."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mechinterp.base.checkpoint import Checkpoint
from mechinterp.base.keep import Compute
from mechinterp.base.shards import current

WORTH_SECONDS = 2.0
"""A part that took less is computed again."""


@dataclass
class FinishedParts:
    """Tensors of each finished part, in files beside the state of the run that end in a digest of the part's name.

    Args:
        path: The state of the run.
        key: A digest of everything that decides the results.
    """

    path: Path
    key: str

    def keep(self, name: str, compute: Compute) -> Mapping[str, Tensor]:
        """What the part gave in an earlier run, or gives now. Raises InputError for a damaged file."""
        digest = hashlib.sha256(json.dumps([self.key, name]).encode()).hexdigest()
        file = Checkpoint(self.path.with_name(f"{self.path.name}.{digest[:8]}"), digest)
        found = file.read()
        if found is None:
            start = time.monotonic()
            found = compute()
            if time.monotonic() - start >= WORTH_SECONDS:
                file.save(found, now=True)
        return found

    def clear(self) -> None:
        """Return None after deleting the files, those of other runs with this state, too: the run is done."""
        if current().index:
            return
        name = re.compile(re.escape(self.path.name) + r"\.[0-9a-f]{8}")
        for entry in list(self.path.parent.iterdir()):
            if name.fullmatch(entry.name):
                Checkpoint(entry).clear()
