"""`latex`: the strongest edges as a table for a paper (`\\usepackage{booktabs}`).

Every character is escaped. Characters beyond Latin-1, for which pdflatex has no glyphs, are written as `?`.
"""

from __future__ import annotations

from mechinterp.circuit_file.formats.format import Export
from mechinterp.circuit_file.formats.node_link_graph import edge_scores, printable, score_text
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.circuit_file.summary import finding
from mechinterp.graphs.circuit import Circuit

MOST_ROWS = 40
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "'": r"\textquotesingle{}",
    "-": "{-}",  # so that two of them are not a dash, and ?` and !` below not Spanish marks
    "?": "{?}",
    "!": "{!}",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    **{letter: f"\\{letter}" for letter in "{}$&#_%"},
}


def to_latex(circuit: Circuit, document: CircuitFile) -> bytes:
    r"""The `MOST_ROWS` strongest edges with score and roles, as a `table` environment with a caption.

    It needs the packages booktabs and textcomp (part of LaTeX since 2020).
    """
    roles: dict[str, str] = {}
    for role in document.roles.values():
        for name in role.nodes:
            roles[name] = f"{roles[name]}, {role.label}" if name in roles else role.label
    scores = edge_scores(circuit)
    ranked = sorted(scores, key=lambda name: (-abs(scores[name] or 0.0), name))
    lines = [
        f"% circuit sha256 {document.integrity.circuit_sha256}",
        r"\begin{table}",
        r"\centering",
        f"\\caption{{{_caption(document, len(ranked))}}}",
        r"\begin{tabular}{rlrl}",
        r"\toprule",
        r" & Edge & Score & Role \\",
        r"\midrule",
    ]
    for i, name in enumerate(ranked[:MOST_ROWS], 1):
        shown = _number(scores[name])
        writer, _, reader = name.partition("->")
        edge = rf"\texttt{{{latex_text(writer)}}} $\to$ \texttt{{{latex_text(reader)}}}"
        lines.append(rf"{i} & {edge} & {shown} & {latex_text(roles.get(_node(writer, reader), ''))} \\")
    if len(ranked) > MOST_ROWS:
        lines += [r"\midrule", rf"\multicolumn{{4}}{{l}}{{and {len(ranked) - MOST_ROWS} more}} \\"]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]).encode("utf-8")


def latex_text(text: str) -> str:
    """The text on one line, escaped so that LaTeX prints it literally."""
    latin = (letter if letter <= "\u00ff" else "?" for letter in printable(text))
    return "".join(_SPECIAL.get(letter, letter) for letter in latin)


def _caption(document: CircuitFile, n_edges: int) -> str:
    title, found = latex_text(document.title), latex_text(finding(document))
    shown = "All its edges" if n_edges <= MOST_ROWS else f"The {MOST_ROWS} strongest of {n_edges} edges"
    facts = "" if found == title else f" {found}."
    return f"{title}.{facts} {shown}; a positive score helps the task. Roles are those of the writer."


def _number(score: float | None) -> str:
    """The score at 4 significant digits in math mode; a dash if there is none."""
    mantissa, e, exponent = score_text(score).partition("e")
    power = rf" \times 10^{{{int(exponent)}}}" if e else ""
    return f"${mantissa}{power}$" if mantissa else "--"


def _node(writer: str, reader: str) -> str:
    """The node that an edge leaves, with the position of the edge if it has one."""
    _, at, position = reader.partition("@")
    return f"{writer}{at}{position}"


EXPORT = Export(".tex", to_latex, "Lost: all but the 40 strongest edges; scores have 4 digits.")
