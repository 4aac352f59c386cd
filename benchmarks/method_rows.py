"""One row per discovery method, on IOI in the bundled model: what the methods' pages show as a picture and as a table.

    python -m benchmarks.method_rows              # every method that has no row yet
    python -m benchmarks.method_rows eap gim      # these, again

Each method scores 100 train pairs with its default settings; its circuits, by magnitude, are evaluated on 100 held-out
pairs, and so is the circuit that it chooses itself. CPR and CMD are MIB's (mechinterp/evaluation/comparison.py). Rows
go to docs/methods/rows.jsonl as soon as they are measured; `docs/method_rows.py` reads them.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

import mechinterp as mi
from mechinterp.evaluation.comparison import MIB_SHARES, area, top_edges
from mechinterp.evaluation.faithfulness import faithfulness_curve
from mechinterp.graphs.circuit import on_paths

ROWS = Path(__file__).parents[1] / "docs" / "methods" / "rows.jsonl"
SIZES = (6, 9, 15, 23, 32, 47, 67, 95, 135, 190, 270, 479)
PAIRS = 100


def row_of(method: str, model: mi.HookManager, graph: mi.Graph, train: mi.Pairs, test: mi.Pairs) -> dict[str, Any]:
    """The row of one method: areas, cost, and faithfulness with its interval and KL at each size."""
    start = time.process_time()
    scores = mi.score_edges(model, graph, train, method=method)
    seconds = time.process_time() - start
    mib = [int(share * graph.n_edges) for share in MIB_SHARES]
    masks = [on_paths(graph, top_edges(scores, n, by)) for by in ("value", "magnitude") for n in mib]
    values = faithfulness_curve(model, masks, graph, test)
    value, magnitude = values[: len(mib)], values[len(mib) :]
    row: dict[str, Any] = {
        "method": method,
        "date": date.today().isoformat(),
        "pairs": PAIRS,
        "settings": dict(scores.parameters),
        "CPR": area(MIB_SHARES, value),
        "CMD": area(MIB_SHARES, [abs(1 - one) for one in magnitude]),
        "forwards": scores.cost.get("forwards", 0) / len(train),
        "backwards": scores.cost.get("backwards", 0) / len(train),
        "seconds": seconds,
        "circuits": [
            circuit_of(mi.Circuit(graph, on_paths(graph, top_edges(scores, n, "magnitude")), n), model, test, n)
            for n in SIZES
        ],
    }
    threshold = mi.METHODS.get(method).threshold
    if threshold is not None:
        own = mi.select(graph, scores, threshold=threshold)
        row["own"] = circuit_of(own, model, test, own.n_edges) if own.n_edges else None
    return row


def circuit_of(circuit: mi.Circuit, model: mi.HookManager, test: mi.Pairs, size: int) -> dict[str, Any]:
    """What is kept of one circuit."""
    found = mi.evaluate(model, circuit, test, n_random=0)
    numbers = {"faithfulness": found.faithfulness, "low": found.faithfulness_ci[0], "high": found.faithfulness_ci[1]}
    return {"size": size, "edges": circuit.n_edges} | {k: round(v, 5) for k, v in (*numbers.items(), ("kl", found.kl))}


def main(asked: list[str]) -> None:
    """Measures the methods asked for, or those without a row, and writes each row at once."""
    torch.set_num_threads(1)
    rows = (
        {row["method"]: row for row in map(json.loads, ROWS.read_text("utf-8").splitlines())} if ROWS.exists() else {}
    )
    model, task = mi.load_model("bundled"), mi.load_task("ioi")
    train, test = task.pairs(model, n=PAIRS, split="train"), task.pairs(model, n=PAIRS, split="test")
    graph = mi.build_graph(model)
    for method in asked or [name for name in mi.METHODS if name not in rows]:
        rows[method] = row_of(method, model, graph, train, test)
        ordered = [rows[name] for name in mi.METHODS if name in rows]
        ROWS.write_text("".join(json.dumps(row) + "\n" for row in ordered), encoding="utf-8")
        print(method, f"{rows[method]['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
