"""LaTeX in the pages becomes MathML when the site is built: browsers draw it without any script, font or network."""

from __future__ import annotations

import re
from html import unescape
from xml.etree import ElementTree

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
"""What pymdownx.arithmatex leaves of `$x$` (a span) and of `$$x$$` (a div)."""
PARTS = {"mfrac": 2, "msub": 2, "msup": 2, "munder": 2, "mover": 2, "mroot": 2, "msubsup": 3, "munderover": 3}
"""How many parts an element of MathML has."""


def typeset(content: str) -> str:
    """The HTML with every formula as MathML. Raises ValueError for LaTeX that would be drawn wrongly."""

    def made(found: re.Match[str]) -> str:
        tag, latex = found.group(1), unescape(found.group(2)).strip()
        if tag == "span":
            return as_mathml(latex, "inline")
        return f'<div class="formula">{as_mathml(latex, "block")}</div>'

    return FORMULA.sub(made, content)


def as_mathml(latex: str, display: str) -> str:
    """One formula. Errors that the converter lets pass are raised: an unknown command, a fraction of one part."""
    made = convert(latex, display=display)
    for bar in ("&#x02016;", "&#x0007C;"):  # each bar of a norm would stretch by what is beside it
        made = made.replace(f"<mo>{bar}</mo>", f'<mo stretchy="false">{bar}</mo>')
    for element in ElementTree.fromstring(made).iter():
        name = element.tag.rpartition("}")[2]
        if "\\" in (element.text or ""):
            raise ValueError(f"Unknown LaTeX command {element.text!r} in the formula {latex!r}.")
        if len(element) != PARTS.get(name, len(element)):
            raise ValueError(f"{name} needs {PARTS[name]} parts, and has {len(element)}, in the formula {latex!r}.")
    return made
