"""The page of a comparison of methods: table, curves, overlap. One file that needs no network."""

from __future__ import annotations

import os
from html import escape

from mechinterp.base.atomic_write import write_whole
from mechinterp.evaluation.comparison import Comparison
from mechinterp.views.plots.compare import comparison_curves, overlap_matrix

_STYLE = """
:root{color-scheme:light dark}
body{font-family:system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;line-height:1.45}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .8rem;border-bottom:1px solid #8884;text-align:right}
th:first-child,td:first-child{text-align:left}
"""


def write_comparison(path: str | os.PathLike[str], found: Comparison, title: str, command: str) -> None:
    """Return None after writing the page, completely or not at all."""
    about = found.about
    middle = found.sizes[len(found.sizes) * 7 // 10]
    table = found.to_frame().to_html(index=False, float_format=lambda x: f"{x:.3f}", na_rep="not reached", border=0)
    figures = [comparison_curves(found), overlap_matrix(found, middle)]
    parts = [figure.to_html(full_html=False, include_plotlyjs=i == 0) for i, figure in enumerate(figures)]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<p>Scored on {about['train']} pairs, evaluated on {about['test']} others; metric "
        f"{escape(str(about['metric']))}, cut edges carry {escape(str(about['replacement']))}. Forwards and backwards "
        f"are per example.</p>{table}"
        "<p>CPR: area under the faithfulness curve, circuits by signed score. CMD: area between this curve and 1, "
        "circuits by magnitude (0 is best). Both are over the share of "
        f"{about['units']}, as in MIB; a circuit that does nothing until it has every "
        "edge has CPR 0.25 and CMD 0.75.</p>"
        f"<h2>Faithfulness against size, by magnitude</h2>{parts[0]}"
        f"<h2>Overlap of the edges selected first</h2>{parts[1]}"
        f"<p><code>{escape(command)}</code></p></body></html>"
    )
    write_whole(path, page.encode("utf-8"))
