"""Figures as files: a page that needs no network, or a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from mechinterp.base.atomic_write import write_whole
from mechinterp.base.errors import InputError

PICTURES = (".png", ".svg", ".pdf", ".webp", ".jpg")


def save_html(figure: go.Figure | str, path: str | os.PathLike[str]) -> None:
    """Return None after writing the figure as one page with plotly inside (about 5 MB), or a page that is given as
    text (`text_page`), whole or not at all."""
    page = figure if isinstance(figure, str) else figure.to_html(include_plotlyjs=True, full_html=True)
    write_whole(path, page.encode("utf-8"))


def save_image(
    figure: go.Figure, path: str | os.PathLike[str], *, width: int = 900, height: int | None = None, scale: float = 2.0
) -> None:
    """Return None after writing a picture of the kind that the name ends in (.png, .svg, .pdf, ...).

    `scale` multiplies the pixels of a .png. Raises InputError for another ending, and where kaleido or a browser for
    it is missing: `pip install 'mechinterp-circuits[images]'`, and Chrome or Chromium.
    """
    target = Path(path)
    if target.suffix not in PICTURES:
        raise InputError(f"{target.name!r} is no picture; name it with one of {', '.join(PICTURES)}, or use save_html.")
    size: Any = figure.layout.height if height is None else height
    try:
        data = (
            go.Figure(figure)
            .update_layout(paper_bgcolor="white")
            .to_image(format=target.suffix[1:], width=width, height=size, scale=scale)
        )
    except Exception as error:  # kaleido raises many kinds; each is told, none is hidden
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"Cannot draw {target.name!r}: {reason} Pictures need kaleido (pip install 'mechinterp-circuits[images]') "
            "and Chrome or Chromium; save_html needs neither."
        ) from error
    write_whole(target, data)
