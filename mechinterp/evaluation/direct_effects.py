"""Direct effects: what every part of a model writes toward the right answers, or along an explained direction."""

from __future__ import annotations

from dataclasses import replace

from mechinterp.analysis.direct_logit_attribution import direct_logit_attribution
from mechinterp.engines.grid import Grid
from mechinterp.models.direction_readout import READING, explained
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.pairs import Pairs


def direct_effects(model: HookManager, pairs: Pairs, batch_size: int) -> Grid:
    """A Grid (node, example): what each part writes toward the right answers, in logits, or along a direction.

    In the view of `read_direction` it is what the part adds to the reading on the clean prompt, less that on the
    corrupt one: a reading has no wrong answer in it that would take away what both classes have in common. The sum over
    the parts is the logit difference, or the difference of the two readings.

    Cost: a forward, two for a reading.
    """
    direction = explained(model).direction
    clean = direct_logit_attribution(model, pairs, direction, batch_size=batch_size)
    if explained(model) is not READING:
        return clean
    corrupt = direct_logit_attribution(model, pairs, direction, prompt="corrupt", batch_size=batch_size)
    return replace(clean, values=clean.values - corrupt.values)
