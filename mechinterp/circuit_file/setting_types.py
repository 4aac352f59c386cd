"""The parameters of `select` that a circuit file can state; a file may hold anything, so they are checked first."""

from __future__ import annotations

from mechinterp.base.settings import Setting

SELECTION = {
    "edges": Setting(0, share=True),
    "nodes": Setting(0, share=True),
    "threshold": Setting(0.0),
    "rule": Setting("top"),
    "by": Setting("magnitude"),
    "ratio": Setting(0.0),
}
"""Their types; `select` checks the values."""
RULES = ("top", "greedy", "ilp")
"""Rules that `select` can apply again."""
REFINEMENT = ("refined", "tau", "dropped", "added", "refined_on", "refined_with", "forwards")
"""What `refine_circuit` adds to them."""
