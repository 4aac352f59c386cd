"""`python -m benchmarks.families [--check | --write] [NAME ...]`: the table of model families of docs/families.md.

Every family is made tiny and random (two layers, four heads, float64), loaded, and compared with the same model under
plain Hugging Face hooks (`plain_hooks.py`). Without options the table is printed; `--write` puts it into the page,
`--check` says whether the page is up to date. About two minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.family_models import D_VOCAB, FAMILIES, N_HEADS, N_LAYERS, Family
from benchmarks.plain_hooks import PlainModel, Writes, run_plain
from mechinterp import Pairs, activation_patching, build_graph, get_metric, load_model, run_edges, score_edges
from mechinterp.base.errors import MechInterpError
from mechinterp.engines.edge_attribution import edge_gradients
from mechinterp.graphs.graph import Graph
from mechinterp.models.hook_manager import HookManager

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
BEGIN, END = "<!-- python -m benchmarks.families --write: begin -->", "<!-- end -->"
EXACT = 5e-6
"""Hugging Face computes RMSNorm, softmax and rotations in float32 even in a float64 model; relative to the largest."""


@dataclass(frozen=True)
class Row:
    """The result for one family; the numbers are largest differences, as shares of the largest value."""

    label: str
    architecture: str
    refused: str = ""
    """Why the model does not load; the other fields are then empty."""
    edges: float = float("nan")
    patching: float = float("nan")
    eap: float = float("nan")
    batches: float = float("nan")
    without: tuple[tuple[str, str], ...] = ()
    """(parts, reason) of what is refused on a model that loads."""

    @property
    def exact(self) -> bool:
        """Whether everything agrees with the plain hooks."""
        return all(value < EXACT for value in (self.edges, self.patching, self.eap, self.batches))


def random_pairs(n: int = 7, length: int = 7) -> Pairs:
    """Random prompts of lengths 7, 6, 5, 4, 3, 3, 3, padded, with one right and one wrong answer."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(1, D_VOCAB, (2, n, length), generator=generator)
    lengths = (length - torch.arange(n)).clamp(min=3)
    mask = torch.arange(length)[None] < lengths[:, None]
    return Pairs(clean=clean, corrupt=corrupt, right=torch.arange(n) + 1, wrong=torch.arange(n) + 25, mask=mask)


def random_cuts(graph: Graph, n: int = 3) -> Tensor:
    """Masks of cut edges: none, all, all into the logits, all but from nodes into the logits, and n random ones."""
    generator = torch.Generator().manual_seed(1)
    last = torch.zeros_like(graph.possible)
    last[-1] = True
    nodes_only = graph.possible.clone()
    nodes_only[-1, graph.n_inputs :] = False  # then all nodes read and write as in the corrupt run
    random = [graph.possible & (torch.rand(graph.possible.shape, generator=generator) < 0.3) for _ in range(n)]
    none = torch.zeros_like(graph.possible)
    return torch.stack([none, graph.possible, last & graph.possible, nodes_only, *random])


def logit_diff(logits: Tensor, pairs: Pairs) -> Tensor:
    """Right minus wrong at the last real token, without our own metric."""
    rows = torch.arange(len(logits))
    at = logits[rows, pairs.mask.sum(1) - 1]
    right, wrong = answers(pairs)
    return at[rows, right[:, 0]] - at[rows, wrong[:, 0]]


def answers(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """The right and the wrong answers, which `random_pairs` has."""
    assert pairs.right is not None and pairs.wrong is not None
    return pairs.right, pairs.wrong


def share_of(graph: Graph, cut: Tensor) -> dict[str, dict[str, Tensor]]:
    """Reader -> writer -> the entry of the mask, by the names of the graph."""
    found: dict[str, dict[str, Tensor]] = {}
    for r, w in graph.possible.nonzero().tolist():
        writer, _, reader = graph.edge_name(r, w).partition("->")
        if bool(cut[r, w] != 0) or cut.requires_grad:
            found.setdefault(reader, {})[writer] = cut[r, w]
    return found


def _gap(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value; infinite if a value is NaN."""
    gap = float((got.double() - expected.double()).abs().max() / expected.double().abs().max())
    return gap if gap == gap else float("inf")


def edges_gap(model: HookManager, plain: PlainModel, graph: Graph, pairs: Pairs, corrupt: Writes) -> float:
    """`run_edges` against plain hooks, for masks of all kinds; the two extremes also against the unedited model."""
    cuts = random_cuts(graph)
    expected = [
        logit_diff(run_plain(plain, pairs.clean, share=share_of(graph, cut), replacement=corrupt)[0], pairs)
        for cut in cuts.double()
    ]
    ends = [logit_diff(plain.logits(ids), pairs) for ids in (pairs.clean, pairs.corrupt)]
    got = run_edges(model, graph, pairs, cuts)
    same_as_corrupt = [1, 2, 3]
    return max(
        _gap(got, torch.stack(expected)),
        _gap(got[:1], ends[0][None]),
        _gap(got[same_as_corrupt], ends[1].expand(len(same_as_corrupt), -1)),
    )


def patching_gap(model: HookManager, plain: PlainModel, pairs: Pairs) -> float:
    """`activation_patching` of every head, MLP and residual stream at two positions against plain hooks."""
    other: dict[str, Tensor] = {}

    def note(name: str, value: Tensor) -> Tensor:
        other[name] = value.clone()
        return value

    run_plain(plain, pairs.corrupt, patch=note)
    clean = logit_diff(plain.logits(pairs.clean), pairs)

    def effect(name: str, position: int, head: int | None = None) -> Tensor:
        def edit(at: str, value: Tensor) -> Tensor:
            if at != name:
                return value
            value = value.clone()
            where = (slice(None), position) if head is None else (slice(None), position, head)
            value[where] = other[name][where]
            return value

        return clean - logit_diff(run_plain(plain, pairs.clean, patch=edit)[0], pairs)

    worst = 0.0
    dims = model.dims
    for kind, layers in (("z", dims.head_layers), ("mlp_out", dims.mlp_layers), ("resid_pre", range(N_LAYERS))):
        if not layers:
            continue
        got = activation_patching(model, pairs, kind, positions=[1, 2])
        expected = [
            effect(f"{kind}.{layer}", position, head)
            for layer in layers
            for head in (range(N_HEADS) if kind == "z" else [None])
            for position in (1, 2)
        ]
        worst = max(worst, _gap(got.values.flatten(0, -2), torch.stack(expected)))
    return worst


def eap_gap(model: HookManager, plain: PlainModel, graph: Graph, pairs: Pairs, corrupt: Writes) -> float:
    """`edge_gradients` against the derivative that autograd takes through the plain hooks, for every edge at once."""
    cut = torch.zeros(graph.possible.shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        share = share_of(graph, cut)
        logits, _ = run_plain(plain, pairs.clean, share=share, replacement=corrupt)
        (slope,) = torch.autograd.grad(logit_diff(logits, pairs).sum(), [cut])
    return _gap(edge_gradients(model, graph, pairs, get_metric("logit_diff")), -slope)


def batches_gap(model: HookManager, graph: Graph, pairs: Pairs) -> float:
    """One by one and without padding, in batches of 3, and all at once, under the same masks."""
    cuts = random_cuts(graph)[[1, -1]]
    together = run_edges(model, graph, pairs, cuts)
    alone: list[Tensor] = []
    right, wrong = answers(pairs)
    for row, length in enumerate(pairs.mask.sum(1).tolist()):
        twice = [row, (row + 1) % len(pairs)]  # pairs need two rows; the second is ignored
        clean, corrupt = pairs.clean[twice, :length], pairs.corrupt[twice, :length]
        bare = Pairs(clean=clean, corrupt=corrupt, right=right[twice], wrong=wrong[twice])
        alone.append(run_edges(model, graph, bare, cuts, batch_size=1)[:, :1])
    chunks = run_edges(model, graph, pairs, cuts, batch_size=3)
    return max(_gap(together, torch.cat(alone, -1)), _gap(chunks, together))


def refused_parts(model: HookManager, graph: Graph, pairs: Pairs) -> tuple[tuple[str, str], ...]:
    """(parts, reason) of everything that is refused on the model; sites by kind."""
    reasons: dict[str, str] = {}
    for site, reason in model.refused.items():
        if site.kind != "pos_embed":  # rotary models have none
            reasons[f"`{site.kind}`"] = reason
    for reason in model.bound_mlps.values():
        reasons["an MLP by itself"] = reason
    if model.dims.has_mlp and any(maps is None for maps in model.layout.mlp_maps):
        reasons["neurons"] = "An MLP is not a pair of matrices"
    for method in ("relp", "cd", "cd-edges"):
        try:
            score_edges(model, graph, pairs, method=method, metric="logit_diff")
        except Exception as error:  # the table shows what a user would see
            kind = "" if isinstance(error, MechInterpError) else f"{type(error).__name__}: "
            reasons[f"`{method}`"] = kind + one_line(error)
    if not model.keeps_past:
        reasons["keys and values are not kept"] = "A sweep runs all positions again"
    grouped: dict[str, list[str]] = {}
    for part, reason in reasons.items():
        grouped.setdefault(_general(reason, model.info.architecture), []).append(part)
    return tuple((", ".join(parts), reason) for reason, parts in grouped.items())


def _general(reason: str, architecture: str) -> str:
    """The reason without the details of this model: its class, numbers of layers, sizes."""
    reason = re.sub(r" \(off by [^)]*\)", "", reason.replace(architecture, "the model"))
    reason = re.sub(
        r"\b([Ll]ayer|m|pattern\.|scores\.|mlp_\w+\.|resid_\w+\.|z\.|q\.|k\.|v\.) ?\d+", r"\1 L", reason
    ).replace(". L", ".L")
    reason = re.sub(r"'a\d+'", "'aL'", reason).replace("attn_out.0", "attn_out.L").replace("blocks.0.", "blocks.L.")
    reason = reason.strip().rstrip(".")
    return reason[:1].upper() + reason[1:] + "."


def measure(family: Family) -> Row:
    """The row of one family."""
    architecture = family.model_class or f"{family.name}ForCausalLM"
    pairs = random_pairs()
    try:
        model = load_model(family.build())
    except MechInterpError as error:
        return Row(family.label, architecture, one_line(error))
    except Exception as error:  # from TransformerLens or transformers: the table shows it
        return Row(family.label, architecture, f"{type(error).__name__}: {one_line(error)}")
    without = refused_parts(model, build_graph(model), pairs)
    try:
        return Row(family.label, architecture, "", *gaps(family, model, pairs), without)
    except Exception as error:  # its structure differs from family_models.py
        not_compared = ("**not compared**", f"{type(error).__name__}: {one_line(error)}")
        return Row(family.label, architecture, without=(*without, not_compared))


def gaps(family: Family, model: HookManager, pairs: Pairs) -> tuple[float, float, float, float]:
    """The largest differences: edges, patching, EAP, batches."""
    plain, graph = PlainModel(family.build(), family.modules, model.dims.n_kv_heads), build_graph(model)
    with torch.no_grad():
        _, corrupt = run_plain(plain, pairs.corrupt)
        edges = edges_gap(model, plain, graph, pairs, corrupt)
        patching = patching_gap(model, plain, pairs)
        batches = batches_gap(model, graph, pairs)
    return edges, patching, eap_gap(model, plain, graph, pairs, corrupt), batches


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def table(rows: list[Row]) -> str:
    """The rows as Markdown: what loads, notes with the reasons for refused parts, and what does not load."""
    loads, refused = [row for row in rows if not row.refused], [row for row in rows if row.refused]
    notes = list(dict.fromkeys(reason for row in loads for _, reason in row.without))
    lines = [
        "| family | class in transformers | edges | patching | EAP | batches | refused parts |",
        "|---|---|---|---|---|---|---|",
        *(line(row, notes) for row in loads),
        "",
        "Why parts are refused:",
        "",
        *(f"{i}. {reason}" for i, reason in enumerate(notes, 1)),
        "",
        "Families, and settings of them, that do not load:",
        "",
        "| refused | class in transformers | why |",
        "|---|---|---|",
        *(line(row, []) for row in refused),
    ]
    return "\n".join(lines)


def line(row: Row, notes: list[str]) -> str:
    """The row as a line of Markdown; a reason is given as the number of its note."""
    cells = [row.refused.replace("|", "\\|")]
    if not row.refused:
        parts = [f"{parts} ({notes.index(reason) + 1})" for parts, reason in row.without]
        numbers = [_number(value) for value in (row.edges, row.patching, row.eap, row.batches)]
        cells = [*numbers, ", ".join(parts)]
    return "| " + " | ".join([row.label, f"`{row.architecture}`", *cells]) + " |"


def stored_notes() -> list[str]:
    """The notes of the page."""
    return re.findall(r"^\d+\. (.*)$", stored_table(), re.MULTILINE)


def _number(value: float) -> str:
    """One digit; in bold if it is not rounding."""
    return f"{value:.0e}" if value < EXACT else f"**{value:.2g}**"


def comparable(text: str) -> str:
    """The table without the sizes of its rounding errors, which differ between machines."""
    return re.sub(r"\| \d+e[-+]\d+ ", "| small ", text)


def stored_table() -> str:
    """The table of the page."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def measured(wanted: list[str], say: Callable[[Row], Any]) -> list[Row]:
    """The rows of the families whose label holds one of the names (all by default), one after another."""
    rows: list[Row] = []
    for family in FAMILIES:
        if not wanted or any(name.lower() in family.label.lower() for name in wanted):
            rows.append(measure(family))
            say(rows[-1])
    return rows


def main() -> int:
    """Prints, writes or checks the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only families whose label holds it")
    parser.add_argument("--write", action="store_true", help="put the table into docs/families.md")
    parser.add_argument("--check", action="store_true", help="compare with docs/families.md; exit code 1 if it differs")
    arguments = parser.parse_args()
    if arguments.names and (arguments.write or arguments.check):
        parser.error("the page holds all families; leave the names out")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = measured(arguments.names, lambda row: print(f"{row.label}: {row.refused or row}", file=sys.stderr))
    wrong = [row.label for row in rows if not row.refused and not row.exact]
    if wrong:
        print(f"Not exact: {', '.join(wrong)}", file=sys.stderr)
    text = table(rows)
    if arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    elif arguments.check:
        same = comparable(stored_table()) == comparable(text)
        print("The page is up to date." if same else "docs/families.md is out of date: run with --write.")
        return 0 if same and not wrong else 1
    else:
        print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
