"""What a result prints is short, says the finding, and is a table in a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mechinterp as mi
from mechinterp.circuit_file.verify.claims import Claim, Verification
from tests.support.models_tiny import pairs, tiny

LONGEST = 400


def test_results_print_their_facts() -> None:
    model, some = tiny("gpt2"), pairs()
    graph = mi.build_graph(model)
    circuit = mi.select(graph, mi.score_edges(model, graph, some, method="eap"), edges=40)
    result = mi.evaluate(model, circuit, some)
    failed = Verification(Path("x.json"), (Claim("a<b", False, "1", "2", ""),))
    shown: list[tuple[Any, str]] = [
        (mi.load_task("ioi"), "Task(ioi: "),
        (result, f"Evaluation(faithfulness {result.faithfulness:.3f} ["),
        (model.cache(some.clean), "Run(logits [3, 7, 50], recorded embed [3, 7, 16], "),
        (mi.logit_lens(model, some), "LogitLens(sites 7, resid_pre.0 to resid_final, pos 1, example 3, "),
        (mi.contextual_decomposition(model, some, "z"), "Decomposition(sources layer 3, head 4, "),
        (circuit, "Circuit("),
        (failed, "Verification(file x.json, claims 1, failed: a<b"),
        (Verification(Path("x.json"), ()), "Verification(file x.json, claims 0, nothing was checked, warnings none)"),
    ]
    for value, start in shown:
        text, html = repr(value), value._repr_html_()
        assert text.startswith(start), text
        assert len(text) < LONGEST and "\n" not in text and "tensor(" not in text
        assert html.startswith("<table><caption>") and "<script" not in html and "a<b" not in html
