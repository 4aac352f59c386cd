"""The look that all figures share: colours, margins, transparent ground.

Colours are chosen to be told apart by colour-blind readers and to stand on white and on black; backgrounds are
transparent, so a figure takes that of the page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NodeLook:
    """How nodes of one kind are drawn, and whether a legend names them."""

    label: str
    colour: str
    symbol: str
    named: bool


NODE_LOOKS = {
    "input": NodeLook("input", "#5c6773", "square", named=False),
    "embed": NodeLook("input", "#5c6773", "square", named=False),
    "pos_embed": NodeLook("input", "#5c6773", "square", named=False),
    "head": NodeLook("attention head", "#2f5f8f", "circle", named=True),
    "attention": NodeLook("attention", "#2f5f8f", "square", named=True),
    "mlp": NodeLook("MLP", "#7b4fa3", "square", named=True),
    "neuron": NodeLook("neuron", "#a3568c", "diamond", named=True),
    "expert": NodeLook("expert", "#8c6bb1", "diamond", named=True),
    "feature": NodeLook("feature", "#b5762a", "diamond", named=True),
    "error": NodeLook("reconstruction error", "#8c8c8c", "diamond", named=True),
    "logits": NodeLook("logits", "#5c6773", "square", named=False),
}
"""By kind, in the order in which nodes of one layer are listed."""
SEVERAL = "several"
CHANNEL_COLOURS = {"q": "#3b7dd8", "k": "#1f9e77", "v": "#e08214", "mlp": "#9467bd", "logits": "#8c8c8c"}
CHANNEL_COLOURS["router"], CHANNEL_COLOURS["in"] = "#c77cff", "#b5762a"
CHANNEL_COLOURS[SEVERAL] = "#b5a642"
"""Colour of an edge by where it enters: query, key or value of a head, an MLP, a feature, the logits, or several."""
CHOSEN_COLOUR = "#d1495b"
GUIDE_COLOUR = "#999999"
LEFT_PIXELS = 78


def grid() -> dict[str, Any]:
    return {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "linecolor": GUIDE_COLOUR}


def look(*, height: int, showlegend: bool, below: int = 50) -> dict[str, Any]:
    return {
        "template": "none",
        "height": height,
        "showlegend": showlegend,
        "margin": {"l": LEFT_PIXELS, "r": 20, "t": 50, "b": below},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GUIDE_COLOUR, "activecolor": CHANNEL_COLOURS["q"]},
        "font": {"family": "system-ui, sans-serif", "size": 13},
    }
