"""The drawings of the concepts pages, as SVG text; lines and letters take the colours of the page, light or dark.

`python docs/make_pictures.py DIRECTORY` writes them as files, to look at one by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

INK, FAINT = "var(--md-default-fg-color, #222)", "var(--md-default-fg-color--light, #777)"
PAPER = "var(--md-default-bg-color, #fff)"
HEAD, MLP, END, CUT, KEPT = "#4a7fc1", "#9a63c7", "#7b8794", "#d2562b", "#2a9d6f"


def _svg(width: int, height: int, parts: Iterable[str], title: str) -> str:
    arrows = "".join(
        f'<marker id="tip-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerUnits="userSpaceOnUse" markerWidth="10" '
        f'markerHeight="10" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" style="fill:{colour}"/></marker>'
        for name, colour in (("ink", FAINT), ("cut", CUT), ("kept", KEPT))
    )
    head = (
        f'<svg class="drawing" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", f"<defs>{arrows}</defs>", *parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "middle", size: int = 13, colour: str = INK) -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" style="fill:{colour}">{escape(text)}</text>'
    )


def _box(x: float, y: float, width: float, text: str, colour: str, height: float = 26) -> str:
    place = f'x="{x - width / 2}" y="{y - height / 2}" width="{width}" height="{height}" rx="5"'
    return (
        f'<rect {place} style="fill:{PAPER}"/>'
        f'<rect {place} fill="{colour}" fill-opacity="0.16" stroke="{colour}" stroke-width="1.5"/>'
        f"{_text(x, y + 4.5, text)}"
    )


def _line(points: str, kind: str = "ink", width: float = 1.4, dashed: bool = False, tip: bool = True) -> str:
    colour = {"ink": FAINT, "cut": CUT, "kept": KEPT}[kind]
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    end = f' marker-end="url(#tip-{kind})"' if tip else ""
    return f'<path d="{points}" style="stroke:{colour};fill:none" stroke-width="{width}"{dash}{end}/>'


def graph() -> str:
    """Two layers of two heads and an MLP, with the edges of one small circuit."""
    places = {
        "input": (90, 330, END),
        "a0.h0": (230, 265, HEAD),
        "a0.h1": (310, 265, HEAD),
        "m0": (430, 215, MLP),
        "a1.h0": (230, 145, HEAD),
        "a1.h1": (310, 145, HEAD),
        "m1": (430, 95, MLP),
        "logits": (90, 35, END),
    }
    kept = [("input", "a0.h0"), ("a0.h0", "a1.h1"), ("input", "m0"), ("m0", "a1.h1"), ("a1.h1", "logits")]
    names = list(places)
    layer = {"input": 0, "a0.h0": 1, "a0.h1": 1, "m0": 2, "a1.h0": 3, "a1.h1": 3, "m1": 4, "logits": 5}
    parts: list[str] = []
    for only_kept in (False, True):
        for source in names:
            for target in names:
                if layer[source] < layer[target] and ((source, target) in kept) == only_kept:
                    (x, y, _), (u, v, _) = places[source], places[target]
                    curve = f"M{x} {y - 14} C{x} {y - 60} {u} {v + 60} {u} {v + 15}"
                    parts.append(_line(curve, "kept" if only_kept else "ink", 2.6 if only_kept else 0.7))
    parts += [_box(x, y, 62, name, colour) for name, (x, y, colour) in places.items()]
    for y, label in ((330, "what enters the first layer"), (265, "layer 0, heads"), (215, "layer 0, MLP")):
        parts.append(_text(700, y + 4, label, "end", 12, FAINT))
    for y, label in ((145, "layer 1, heads"), (95, "layer 1, MLP"), (35, "the final residual stream")):
        parts.append(_text(700, y + 4, label, "end", 12, FAINT))
    parts.append(
        _text(90, 366, "green: the edges of a circuit; thin: every other edge of the graph", "start", 12, FAINT)
    )
    return _svg(710, 376, parts, "The graph of a model with two layers of two heads and an MLP")


def readers() -> str:
    """One head has three inputs; under grouped-query attention two heads share a key and a value input."""
    parts = [_text(150, 22, "every head by itself"), _text(480, 22, "grouped-query attention")]
    for x, names in ((110, ("a5.h2<q>", "a5.h2<k>", "a5.h2<v>")),):
        for i, name in enumerate(names):
            parts += [_box(x - 50 + 90 * i, 130, 82, name, KEPT, 24), _line(f"M{x - 50 + 90 * i} 117 L150 77")]
        parts.append(_box(150, 62, 70, "a5.h2", HEAD))
    heads = (("a5.h2", 420), ("a5.h3", 540))
    for name, x in heads:
        parts += [
            _box(x, 62, 70, name, HEAD),
            _box(x - 62 * (x < 480) + 62 * (x > 480), 130, 82, f"{name}<q>", KEPT, 24),
        ]
        parts.append(_line(f"M{x - 62 * (x < 480) + 62 * (x > 480)} 117 L{x} 77"))
    for name, x in (("a5.kv1<k>", 442), ("a5.kv1<v>", 518)):
        parts.append(_box(x, 172, 74, name, KEPT, 24))
        parts += [_line(f"M{x} 159 L{u} 77") for _, u in heads]
    parts.append(_text(20, 214, "readers (green) feed writers (blue); an edge ends in a reader", "start", 12, FAINT))
    return _svg(660, 224, parts, "Readers of heads, with and without grouped-query attention")


def ablation() -> str:
    """A reader with one edge cut: its input is the stream less what the edge carried, plus the replacement."""
    parts = [_box(90, 70, 110, "a0.h0", HEAD), _box(90, 130, 110, "m0", MLP), _box(90, 190, 110, "input", END)]
    parts += [
        _line("M148 70 C240 70 260 110 318 122", "cut", 2.4, dashed=True),
        _line("M148 130 L318 130", "kept", 2.4),
        _line("M148 190 C240 190 260 150 318 138", "kept", 2.4),
        _box(375, 130, 110, "sum", END),
        _line("M432 130 L478 130"),
        _box(520, 130, 80, "norm", END),
        _line("M562 130 L598 130"),
        _box(646, 130, 90, "a1.h1<q>", KEPT),
        _text(232, 62, "cut: its value of the", "start", 12, CUT),
        _text(232, 78, "corrupt run (or a mean, or 0)", "start", 12, CUT),
        _text(232, 212, "kept: the value of this run", "start", 12, KEPT),
        _text(520, 168, "computed again from", "middle", 12, FAINT),
        _text(520, 183, "the changed input", "middle", 12, FAINT),
        _text(
            375, 24, "Only this reader sees the replacement: other readers of a0.h0 keep what they have.", "middle", 12
        ),
    ]
    return _svg(710, 226, parts, "One reader with one edge cut")


def positions() -> str:
    """Edges at named positions: a reader is there once for each name, and once for the rest."""
    words = ["When", "Mary", "and", "John", "went", ",", "John", "gave", "to"]
    names = ["", "IO", "", "S1", "S1+1", "", "S2", "", "end"]
    parts: list[str] = []
    for i, (word, name) in enumerate(zip(words, names, strict=True)):
        x = 60 + 70 * i
        parts += [_text(x, 150, word), _text(x, 172, name or "rest", "middle", 12, KEPT if name else FAINT)]
        parts.append(_box(x, 105, 58, "m0", MLP if name else END, 22))
    for place in (1, 6):
        x = 60 + 70 * place
        parts.append(_line(f"M{x} 92 L{x} 58", "kept", 2.2))
        parts.append(_box(x, 44, 78, "a1.h0<k>", KEPT, 22))
    parts += [
        _line(f"M{60 + 70 * 8} 92 L{60 + 70 * 8} 58", "kept", 2.2),
        _box(60 + 70 * 8, 44, 78, "a1.h0<q>", KEPT, 22),
        _text(
            330, 16, "an edge stays at one position; attention inside a head moves between them", "middle", 12, FAINT
        ),
        _text(28, 200, "Every token without a name of its own is `rest`, in each prompt.", "start", 12, FAINT),
    ]
    return _svg(680, 210, parts, "Named positions")


def faithfulness() -> str:
    """A number line from the empty circuit to the full model."""
    parts = [_line("M60 90 L640 90", "ink", 1.6)]
    for x, colour, above, below in (
        (130, END, "every edge cut", "m(empty)"),
        (500, KEPT, "the circuit alone", "m(circuit)"),
        (560, END, "no edge cut", "m(full)"),
    ):
        parts.append(f'<circle cx="{x}" cy="90" r="6" fill="{colour}"/>')
        up = 72 if x != 560 else 48
        parts += [_text(x, up, above, "middle", 12), _text(x, 114 if x != 560 else 132, below, "middle", 12)]
    parts += [
        _line("M130 152 L500 152", "kept", 2.4),
        _line("M130 172 L560 172", "ink", 2.4),
        _text(640, 156, "numerator", "end", 12, KEPT),
        _text(640, 176, "denominator", "end", 12, FAINT),
        _text(645, 84, "metric", "end", 12, FAINT),
        _text(60, 22, "faithfulness = (m(circuit) - m(empty)) / (m(full) - m(empty))", "start"),
    ]
    return _svg(680, 190, parts, "Faithfulness as a share of the way from the empty circuit to the full model")


def verification() -> str:
    """What `verify` does with a circuit file."""
    steps = [
        ("read", "schema, sizes, keys"),
        ("hash", "file, circuit, sidecar"),
        ("graph", "nodes, edges, rule"),
        ("model", "weights, tokenizer"),
        ("pairs", "made again, digests"),
        ("evaluate", "every number again"),
    ]
    parts: list[str] = []
    for i, (name, about) in enumerate(steps):
        x = 66 + 116 * i
        parts += [_box(x, 60, 92, name, KEPT if i < 3 else HEAD), _text(x, 96, about, "middle", 11, FAINT)]
        if i:
            parts.append(_line(f"M{x - 116 + 48} 60 L{x - 50} 60"))
    parts += [
        _text(20, 24, "without the model", "start", 12, KEPT),
        _text(368, 24, "with the model (exit code 3 without it)", "start", 12, HEAD),
        _text(
            20, 132, "exit code 0: every claim holds      1: a claim failed, and which      2: bad input", "start", 12
        ),
    ]
    return _svg(710, 146, parts, "The steps of verification")


PICTURES: dict[str, Callable[[], str]] = {
    "graph": graph,
    "readers": readers,
    "ablation": ablation,
    "positions": positions,
    "faithfulness": faithfulness,
    "verification": verification,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")
