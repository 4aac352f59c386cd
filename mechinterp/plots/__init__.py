"""Figures: plain functions that return a plotly `Figure`. Only these files and the report know plotly."""

from mechinterp.plots.circuit import MAX_EDGES_DRAWN, circuit_figure
from mechinterp.plots.grids import attention_figure, heatmap, lens_figure, token_labels, waterfall
from mechinterp.plots.measures import faithfulness_figure, head_heatmap
from mechinterp.plots.save import save_html, save_image

__all__ = [
    "MAX_EDGES_DRAWN",
    "attention_figure",
    "circuit_figure",
    "faithfulness_figure",
    "head_heatmap",
    "heatmap",
    "lens_figure",
    "save_html",
    "save_image",
    "token_labels",
    "waterfall",
]
