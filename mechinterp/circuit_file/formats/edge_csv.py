"""`csv`: one line an edge: `edge,writer,reader,score`.

The reader holds the channel and the position (`a9.h9<q>@end`). Every cell begins with a letter, a digit or the
minus sign of a number, so that no spreadsheet reads it as a formula.
"""

from __future__ import annotations

import csv
import io

from mechinterp.circuit_file.formats.format import Export
from mechinterp.circuit_file.formats.node_link_graph import edge_scores
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit


def to_csv(circuit: Circuit, document: CircuitFile) -> bytes:
    """The edges with their unrounded scores (an empty cell: no score), UTF-8, one line each, sorted by name."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("edge", "writer", "reader", "score"))
    for name, score in edge_scores(circuit).items():
        source, _, reader = name.partition("->")
        writer.writerow((name, source, reader, "" if score is None else repr(score)))
    return out.getvalue().encode("utf-8")


EXPORT = Export(".csv", to_csv, "Lost: everything but the edges and their scores.")
