"""Figures: plain functions that return a plotly `Figure`. Only these files and the report know plotly."""

from mechinterp.plots.circuit import MAX_EDGES_DRAWN, circuit_figure
from mechinterp.plots.measures import faithfulness_figure, head_heatmap

__all__ = ["MAX_EDGES_DRAWN", "circuit_figure", "faithfulness_figure", "head_heatmap"]
