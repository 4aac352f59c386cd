"""Which method finds small, stable, faithful circuits: all methods on the bundled tasks; the default run over seeds.

    python -m benchmarks.discovery                        # every method, every bundled task, five seeds (hours)
    python -m benchmarks.discovery --methods mattr,relp --tasks ioi --seeds 3
    python -m benchmarks.discovery --model .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --tasks ioi --device cuda
    python -m benchmarks.discovery --default              # the default run: seeds, half and double the pairs
    python -m benchmarks.discovery --table FILE           # the tables again, from the rows that were measured

Every row is appended to a JSON-lines file as soon as it is measured, and rows that are there are not measured again.
Sizes are chosen on validation pairs by the rule of `discover-circuit run`; all else is on held-out pairs. Areas:
CPR and CMD as in MIB (Mueller et al. 2025, arXiv 2504.13151), CPR also with faithfulness clipped at 1, since a circuit
above 1 overshoots; `log area` is the mean clipped faithfulness over the logarithm of the share. Jaccard is the mean
over couples of circuits of different seeds at the size of the median.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import mechinterp as mi
from mechinterp.base.errors import NoSmallCircuit
from mechinterp.evaluation.comparison import MIB_SHARES, area, top_edges
from mechinterp.evaluation.faithfulness import faithfulness_curve
from mechinterp.evaluation.sizes import SizeSearch, search_size
from mechinterp.graphs.circuit import on_paths
from mechinterp.graphs.select import sized
from mechinterp.run_spec import RunSpec

TASKS = ("ioi", "ioi_distractor", "greater_than", "induction", "gendered_pronoun", "subject_verb_agreement")
METHODS = ("mattr", "eap-ig-activations", "gim", "ensemble", "relp", "cd-edges", "eap-ig", "eap")
MOST_KEPT = 10_000
"""Edges of an order that a row keeps."""
PAIRS = 200
"""Train, validation and test pairs each."""


def measured(path: Path, key: dict[str, Any]) -> bool:
    """Whether the file has a row with this key."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in rows_of(path))


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none if it does not exist."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def add(path: Path, row: dict[str, Any]) -> None:
    """Return None after appending a row."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def default_runs(model: str, tasks: list[str], seeds: int, pairs: int, out: Path) -> Iterator[dict[str, Any]]:
    """The default run of every task: with each seed, and with half and double the pairs at seed 0."""
    for task in tasks:
        for seed, n in [*((seed, pairs) for seed in range(seeds)), (0, pairs // 2), (0, 2 * pairs)]:
            for method in (None, "eap-ig"):
                key = {"kind": "default", "model": model, "task": task, "seed": seed, "pairs": n, "method": method}
                if measured(out, key):
                    continue
                start, row = time.process_time(), dict(key)
                spec = RunSpec(
                    task,
                    model,
                    method=method,
                    examples=n,
                    validation_examples=PAIRS,
                    test_examples=PAIRS,
                    seed=seed,
                    roles=False,
                    out=out.parent / "runs",
                )
                try:
                    found = mi.discover(spec)
                except NoSmallCircuit as answer:
                    row |= {"edges": None, "answer": str(answer)}
                else:
                    entry, alike = found.evaluation, found.stability
                    row |= {
                        "selected": found.circuit.n_selected,
                        "edges": entry.n_edges,
                        "of": entry.n_edges_graph,
                        "faithfulness": entry.faithfulness,
                        "interval": entry.faithfulness_ci,
                        "kl": entry.kl,
                        "spread": found.curve.spread,
                        "core": alike.found.n_core / found.circuit.n_units if alike else None,
                        "jaccard": alike.found.jaccard if alike else None,
                    }
                row["seconds"] = time.process_time() - start
                add(out, row)
                yield row


def method_runs(
    name: str, device: str | None, level: str, tasks: list[str], methods: list[str], seeds: int, pairs: int, out: Path
) -> Iterator[dict[str, Any]]:
    """Every method on every task with every seed: areas, the size by the rule, and the order of edges (or nodes)."""
    model = mi.load_model(name, device=device)
    graph = mi.build_graph(model, level=level)
    sizes = [int(share * graph.n_units) for share in MIB_SHARES]
    for task in tasks:
        for seed in range(seeds):
            make = mi.load_task(task).pairs
            try:
                train = make(model, n=pairs, seed=seed)
                validation = make(model, n=PAIRS, seed=seed, skip=pairs)
                test = make(model, n=PAIRS, seed=seed, split="test")
            except mi.InputError as error:
                print(f"{task}: {error}", flush=True)
                break
            for method in methods:
                key = {"kind": "method", "task": task, "seed": seed, "pairs": pairs, "method": method}
                key |= {"model": Path(model.info.name).name, "level": level}
                if measured(out, key):
                    continue
                start = time.process_time()
                scores = mi.score_edges(model, graph, train, method=method)
                seconds = time.process_time() - start
                how = {"rule": "top", "by": "magnitude", "ratio": None}
                search = SizeSearch(model, scores, [(scores, validation)], how, "logit_diff", "corrupt", 32, seed=seed)
                scored = max(1, len(graph.unit[scores.values != 0].unique()))
                size = search_size(search, scored)
                masks = [on_paths(graph, top_edges(scores, n, by)) for by in ("value", "magnitude") for n in sizes]
                values = faithfulness_curve(model, masks, graph, test)
                value, magnitude = values[: len(sizes)], values[len(sizes) :]
                row = {**key, "size": size, "seconds": seconds, "forwards": scores.cost.get("forwards", 0) / pairs}
                row |= {
                    "CPR": area(MIB_SHARES, value),
                    "CPR clipped": area(MIB_SHARES, [min(1.0, one) for one in value]),
                    "CMD": area(MIB_SHARES, [abs(1 - one) for one in magnitude]),
                    "log area": log_area(magnitude),
                }
                if size is not None:
                    circuit = mi.select(graph, scores, **sized(graph, size))
                    found = mi.evaluate(model, circuit, test, n_random=0, seed=seed)
                    row |= {
                        "edges": circuit.n_edges,
                        "faithfulness": found.faithfulness,
                        "interval": found.faithfulness_ci,
                        "kl": found.kl,
                    }
                first = graph.first_of_unit
                order = torch.argsort(scores.values.cpu()[first[:, 0], first[:, 1]].abs(), descending=True, stable=True)
                row["order"] = order[: min(MOST_KEPT, graph.n_units // 2)].tolist()
                add(out, row)
                yield row


def log_area(magnitude: list[float] | tuple[float, ...]) -> float:
    """The mean of faithfulness, clipped to [0, 1], over the logarithm of the share."""
    logs = [math.log(share) for share in MIB_SHARES]
    return area(logs, [min(1.0, max(0.0, one)) for one in magnitude]) / (logs[-1] - logs[0])


AVERAGED = ("CPR", "CPR clipped", "CMD", "log area", "forwards", "seconds")


def sizes_of(edges: pd.Series) -> str:
    """The median and the range."""
    known = edges.dropna()
    return f"{int(known.median())} ({int(known.min())}-{int(known.max())})" if len(known) else "none"


def printed(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    rows = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in table.itertuples(index=False)]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def method_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per task and method: means over seeds; sizes are the median and the range over seeds."""
    found: list[dict[str, Any]] = []
    frame = pd.DataFrame([row for row in rows if row["kind"] == "method"])
    for (level, task, method), some in frame.groupby(["level", "task", "method"], sort=False):
        chosen = some["size"].dropna()
        sizes = some["edges"].dropna() if level == "edge" and len(chosen) else chosen
        at = int(chosen.median()) if len(chosen) else 0
        sets = [set(order[:at]) for order in some["order"]]
        alike = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)] if at else []
        found.append(
            {
                "task": task,
                "method": method,
                f"{level}s": sizes_of(sizes),
                "no size": f"{len(some) - len(sizes)} of {len(some)}",
                "faithfulness": some["faithfulness"].mean() if at else None,
                "KL": some["kl"].mean() if at else None,
                "Jaccard": sum(alike) / len(alike) if alike else None,
                **{
                    name: some[name].mean() for name in ("CPR", "CPR clipped", "CMD", "log area", "forwards", "seconds")
                },
            }
        )
    return pd.DataFrame(found)


def default_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per task: sizes over seeds and numbers of pairs, how many are within 20 % of their median, the rest."""
    found: list[dict[str, Any]] = []
    frame = pd.DataFrame([row for row in rows if row["kind"] == "default"])
    for task, every in frame.groupby("task", sort=False):
        some, other = every[every["method"].isna()], every[every["method"] == "eap-ig"]
        sizes, others = some["edges"].dropna(), other["edges"].dropna()
        if not len(sizes):
            found.append({"task": task, "runs": len(some), "edges": "none"})
            continue
        middle = sizes.median()
        inside = [low >= 0.9 and high <= 1.1 for low, high in some["interval"].dropna()]
        found.append(
            {
                "task": task,
                "runs": len(some),
                "edges": sizes_of(sizes),
                "within 20 %": int(((sizes / middle).between(0.8, 1.2)).sum()),
                "faithfulness": f"{some['faithfulness'].min():.2f}-{some['faithfulness'].max():.2f}",
                "interval in [.9, 1.1]": sum(inside),
                "KL": some["kl"].max(),
                "core": some["core"].min(),
                "Jaccard": some["jaccard"].min(),
                "eap-ig": f"{int(others.median())} ({int(others.min())}-{int(others.max())})"
                if len(others)
                else "none",
                "no size by eap-ig": len(other) - len(others),
                "seconds": some["seconds"].median(),
            }
        )
    return pd.DataFrame(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--default", action="store_true", help="the default run instead of all methods")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--device", help="of the methods' runs")
    parser.add_argument("--level", default="edge", help="of the methods' runs: edge or node")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--rows", type=Path, default=Path("out/discovery-benchmark.jsonl"))
    parser.add_argument("--table", type=Path, help="only print the tables of this file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.table is None:
        asked.rows.parent.mkdir(parents=True, exist_ok=True)
        tasks = asked.tasks.split(",")
        if asked.default:
            runs = default_runs(asked.model, tasks, asked.seeds, asked.pairs, asked.rows)
        else:
            methods = asked.methods.split(",")
            where = (asked.model, asked.device, asked.level)
            runs = method_runs(*where, tasks, methods, asked.seeds, asked.pairs, asked.rows)
        for row in runs:
            print({name: value for name, value in row.items() if name != "order"}, flush=True)
    rows = rows_of(asked.table or asked.rows)
    for kind, table in (("method", method_table), ("default", default_table)):
        if any(row["kind"] == kind for row in rows):
            print(printed(table(rows)))


if __name__ == "__main__":
    main()
