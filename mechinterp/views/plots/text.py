"""`text_page`: the relevance of words and phrases as coloured text, on one HTML page without scripts."""

from __future__ import annotations

from html import escape

from plotly.colors import sample_colorscale

from mechinterp.analysis.phrases import PhraseRelevance, Span

_STYLE = """
:root{color-scheme:light dark}
body{font-family:system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;line-height:1.4}
.scroll{overflow-x:auto}
table.text{border-collapse:separate;border-spacing:3px;margin-top:1rem}
table.text td{padding:.3rem .55rem;border-radius:.3rem;text-align:center;white-space:nowrap}
table.text small{display:block;font-variant-numeric:tabular-nums}
table.rows{border-collapse:collapse;margin-top:1.5rem}
table.rows th,table.rows td{padding:.2rem .8rem;border-bottom:1px solid #8884}
table.rows td.n{text-align:right;font-variant-numeric:tabular-nums}
table.rows th{text-align:left}
.bar{height:.8rem;width:20rem;border-radius:.3rem}
.scale{display:flex;justify-content:space-between;width:20rem;font-size:.85rem}
"""


def text_page(found: PhraseRelevance, title: str = "") -> str:
    """One HTML page of the words and phrases of a text, coloured by relevance, with a table of the values.

    Blue raises the target, red lowers it, white is 0. The page needs no network and no scripts; write it with
    `save_html`.

    Args:
        found: the result of `phrase_relevance`.
        title: the heading. "": "Relevance for" and the target.
    """
    most = max((abs(float(value)) for value in found.values), default=0.0) or 1.0
    heading = escape(title or f"Relevance for {found.target}")
    stops = ",".join(_colour(x / 10 - 1) for x in range(21))
    rows = "".join(_row(found, span) for span in found.spans)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><h1>{heading}</h1>'
        f"<p>The target is {found.total:+.3f} logits for the whole text. Preset {escape(str(found.about['preset']))}."
        f'</p><div class="bar" style="background:linear-gradient(90deg,{stops})"></div>'
        f'<div class="scale"><span>{-most:+.2f}</span><span>0</span><span>{most:+.2f}</span></div>'
        f'<div class="scroll"><table class="text">{"".join(_lines(found, most))}</table></div>'
        '<table class="rows"><thead><tr><th>text</th><th>tokens</th><th>relevance</th><th>beyond its words</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></body></html>"
    )


def _row(found: PhraseRelevance, span: Span) -> str:
    beyond = found.interaction(span)
    more = "" if beyond != beyond or span in found.words else f"{beyond:+.3f}"
    return (
        f"<tr><td>{escape(found.text(span))}</td><td class=n>{span[0]}:{span[1]}</td>"
        f"<td class=n>{found.value(*span):+.3f}</td><td class=n>{more}</td></tr>"
    )


def _lines(found: PhraseRelevance, most: float) -> list[str]:
    """The words in one line, then the longer spans, shorter ones first, in as few lines as possible."""
    words = [span for span in found.spans if span in found.words]
    longer = sorted((span for span in found.spans if span not in found.words), key=lambda s: (s[1] - s[0], s[0]))
    lines: list[list[Span]] = [words] if words else []
    for span in longer:
        fits = next((line for line in lines[1:] if all(span[0] >= s[1] or span[1] <= s[0] for s in line)), None)
        if fits is None:
            lines.append([span])
        else:
            fits.append(span)
    return [_line(found, sorted(line), most) for line in lines]


def _line(found: PhraseRelevance, spans: list[Span], most: float) -> str:
    cells: list[str] = []
    at = 0
    for start, stop in spans:
        if start > at:
            cells.append(f"<td colspan={start - at}></td>")
        value = found.value(start, stop)
        share = value / most
        ink = "#fff" if abs(share) > 0.65 else "#000"
        cells.append(
            f'<td colspan={stop - start} style="background:{_colour(share)};color:{ink}" title="{value:+.4f} logits">'
            f"{escape(found.text((start, stop))) or '&nbsp;'}<small>{value:+.2f}</small></td>"
        )
        at = stop
    return f"<tr>{''.join(cells)}</tr>"


def _colour(share: float) -> str:
    """The colour of a share from -1 (red) to 1 (blue)."""
    return str(sample_colorscale("RdBu", [(max(-1.0, min(1.0, share)) + 1) / 2])[0])
