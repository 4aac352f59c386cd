"""Figures: plain functions that return a plotly `Figure`. Only these files and the report import plotly."""

from mechinterp.views.plots.circuit import MAX_EDGES_DRAWN, circuit_figure
from mechinterp.views.plots.grids import attention_figure, heatmap, lens_figure, token_labels, waterfall
from mechinterp.views.plots.measures import faithfulness_figure, head_heatmap
from mechinterp.views.plots.save import save_html, save_image

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
