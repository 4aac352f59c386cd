"""Save a figure as a page that needs no network, or as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from mechinterp.base.atomic_write import write_whole
from mechinterp.base.errors import InputError

PICTURES = (".png", ".svg", ".pdf", ".webp", ".jpg")


def save_html(figure: go.Figure | str, path: str | os.PathLike[str]) -> None:
    """Return None after writing one page that needs no network, completely or not at all.

    Args:
        figure: a figure (its page includes plotly, about 5 MB), or the page itself as text (`text_page`).
        path: where to write it.
    """
    page = figure if isinstance(figure, str) else figure.to_html(include_plotlyjs=True, full_html=True)
    write_whole(path, page.encode("utf-8"))


def save_image(
    figure: go.Figure, path: str | os.PathLike[str], *, width: int = 900, height: int | None = None, scale: float = 2.0
) -> None:
    """Return None after writing a picture of the kind that the name ends in (.png, .svg, .pdf, ...).

    Args:
        figure: the figure.
        path: where to write it; the ending gives the format.
        width: in pixels.
        height: in pixels. None: that of the figure.
        scale: multiplies the resolution of pixel formats.

    Raises:
        InputError: for another ending, or if kaleido (`pip install 'mechinterp-circuits[images]'`) or a browser for it
            (Chrome or Chromium) is missing.
    """
    target = Path(path)
    if target.suffix not in PICTURES:
        raise InputError(f"{target.name!r} is not a picture; use one of {', '.join(PICTURES)}, or use save_html.")
    size: Any = figure.layout.height if height is None else height
    try:
        data = (
            go.Figure(figure)
            .update_layout(paper_bgcolor="white")
            .to_image(format=target.suffix[1:], width=width, height=size, scale=scale)
        )
    except Exception as error:  # kaleido raises many kinds of errors; all are passed on
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"Cannot draw {target.name!r}: {reason} Pictures need kaleido (pip install 'mechinterp-circuits[images]') "
            "and Chrome or Chromium; save_html needs neither."
        ) from error
    write_whole(target, data)
