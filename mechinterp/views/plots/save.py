"""Save a figure as a page that needs no network, or as a picture."""

from __future__ import annotations

import os
import re
from html import escape, unescape
from pathlib import Path
from typing import Any, cast

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from mechinterp.base.atomic_write import write_whole
from mechinterp.base.errors import InputError

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>body{{font-family:system-ui,sans-serif;margin:1rem;background:#fff;color:#1c2126}}h1{{font-size:1.15rem}}</style>
<script src="{library}"></script></head>
<body><script>window.Plotly || document.write("This figure needs the file {library} in its folder.")</script>
{body}</body></html>
"""
PICTURES = (".png", ".svg", ".pdf", ".webp", ".jpg")


def save_html(figure: go.Figure | str, path: str | os.PathLike[str], *, title: str | None = None) -> None:
    """Return None after writing one page that needs no network, completely or not at all.

    Beside figures of one folder there is one `plotly-VERSION.min.js` (5 MB), which their pages load; keep it with them.

    Args:
        figure: a figure, or the page itself as text (`text_page`), which needs no other file.
        path: where to write it.
        title: the title of the page. None: that of the figure, else the words of the file's name. A figure without a
            title of its own gets it as a heading.

    Raises:
        InputError: if it cannot be written.
    """
    if isinstance(figure, str):
        write_whole(path, figure.encode("utf-8"))
        return
    target, layout = Path(path), cast(Any, figure.layout)
    own = layout.title.text
    words = unescape(re.sub(r"<[^>]*>", "", own)) if own else title or re.sub(r"[-_.]+", " ", target.stem)
    heading = "" if own else f"<h1>{escape(words)}</h1>"
    library = f"plotly-{get_plotlyjs_version()}.min.js"
    drawn = figure.to_html(full_html=False, include_plotlyjs=False)
    write_whole(path, _PAGE.format(title=escape(title or words), library=library, body=heading + drawn).encode("utf-8"))
    shared, script = target.with_name(library), get_plotlyjs().encode("utf-8")
    if not shared.is_file() or shared.stat().st_size != len(script):
        write_whole(shared, script)


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
    size: Any = cast(Any, figure.layout).height if height is None else height
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
