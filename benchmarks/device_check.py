"""Every discovery method, analysis and evaluation on one device against the CPU, on tiny models in float32.

What is compared is the largest difference as a share of the largest value. `python -m benchmarks.gpu check` prints it.
"""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import mechinterp as mi
from benchmarks.families import answers, random_cuts, random_pairs
from benchmarks.family_models import FAMILIES
from benchmarks.stand_in_device import over_two_devices
from mechinterp.analysis.attribution import METHODS as ATTRIBUTIONS
from mechinterp.engines.decomposition.rules import PRESETS
from mechinterp.engines.mask_gradients import mask_gradients
from mechinterp.engines.replacement import KINDS, build_replacement
from mechinterp.evaluation.sizes import size_curve
from mechinterp.features.dictionary import cross_layer_features

CLOSE = 5e-4
"""Float32 with sums in another order: a few dozen roundings of 6e-8, through a softmax and a norm in every layer, in
models whose random weights amplify them."""
LEARNED = 5e-2
"""Adam divides a gradient by its own size, so where a gradient is all rounding, a step is as large as any other."""
SHAPES = ("GPT-2", "Llama", "Gemma 2", "GPT-NeoX, Pythia")
BY_NODE = ("acdc", "exact")
"""Methods that make a run for every edge: here for every node."""

Item = Callable[[mi.HookManager, mi.Pairs], object]


@dataclass(frozen=True)
class Checked:
    """The result of one item: its largest difference, or why there is none."""

    model: str
    name: str
    difference: float
    limit: float
    error: str = ""
    refused: str = ""
    """Both devices refuse it, with these words."""
    seconds: float = 0.0
    """On the device."""

    @property
    def ok(self) -> bool:
        """Whether both devices gave the same, or both refused."""
        return bool(self.refused) or (not self.error and self.difference <= self.limit)

    def __str__(self) -> str:
        said = self.error or (f"refused: {self.refused[:60]}" if self.refused else f"{self.difference:.1e}")
        return f"{'ok  ' if self.ok else 'FAIL'} {self.model:<18} {self.name:<44} {said} ({self.seconds:.2f} s)"


def items() -> dict[str, tuple[Item, float]]:
    """What is compared, by name, with the largest share by which results may differ."""
    found: dict[str, tuple[Item, float]] = {
        f"method {name}": (partial(_scores, name), LEARNED if name in _LEARNED else CLOSE) for name in mi.METHODS
    }
    found |= {f"{name}": (item, CLOSE) for name, item in (*_ENGINES.items(), *_analyses().items())}
    found |= {f"{name}": (item, CLOSE) for name, item in _EVALUATIONS.items()}
    return found | {"save and verify": (_verified, 0.0), "train_tuned_lens": (_tuned, LEARNED)}


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


_SETTINGS: dict[str, dict[str, Any]] = {
    "eap-ig": {"steps": 2},
    "eap-ig-activations": {"steps": 2},
    "eap-gp": {"steps": 2},
    "edge-pruning": {"learning_steps": 3, "drawings": 2},
    "subnetwork-probing": {"learning_steps": 3, "drawings": 2},
    "mattr": {"learning_steps": 3, "drawings": 2, "runs": 2},
    "ensemble": {"methods": "eap,relp"},
    "cd": {"top": 2},
    "path-patching": {"top": 2},
    "acdc": {"metric": "kl_to_clean", "order": "score"},
}
_LEARNED = ("edge-pruning", "subnetwork-probing", "mattr")


def _scores(method: str, model: mi.HookManager, pairs: mi.Pairs) -> object:
    level = "node" if method in BY_NODE else "edge"
    scores = mi.score_edges(
        model, mi.build_graph(model, level=level), pairs, method=method, **_SETTINGS.get(method, {})
    )
    return scores.total


def _edges(kind: str, model: mi.HookManager, pairs: mi.Pairs) -> object:
    graph = mi.build_graph(model)
    if kind == "mean-positional":  # prompts of one length
        length = int(pairs.mask.sum(1).mode().values)
        rows = (pairs.mask.sum(1) == length).nonzero().flatten()
        right, wrong = answers(pairs)
        clean, corrupt = pairs.clean[rows, :length], pairs.corrupt[rows, :length]
        pairs = mi.Pairs(clean=clean, corrupt=corrupt, right=right[rows], wrong=wrong[rows])
    replacement = build_replacement(kind, model, graph, pairs, 4)
    return mi.run_edges(model, graph, pairs, random_cuts(graph), replacement=replacement, metric="kl_to_clean")


def _edges_of(model: mi.HookManager, pairs: mi.Pairs, **how: Any) -> object:
    graph = mi.build_graph(model, **how)
    scores = mi.score_edges(model, graph, pairs, method="eap").total
    cut = graph.possible & (torch.rand(graph.possible.shape, generator=_generator()) < 0.3)
    return [scores, mi.run_edges(model, graph, pairs, cut)]


def _features(model: mi.HookManager, pairs: mi.Pairs) -> object:
    """The engines on a graph with features of transcoders (one writes in two layers) and of an attention's output."""
    d_model = model.dims.d_model
    weights = [torch.randn(*shape, generator=_generator()) for shape in ((d_model, 8), (8, d_model))]
    placed = [weight.to(model.device, model.dtype) for weight in weights]
    found: dict[mi.Basis, list[int]] = {mi.sae("attn_out.0", *placed, activation=mi.TopK(3)): [1, 2]}
    if model.dims.has_mlp:
        found[mi.transcoder("mlp_in.1", "mlp_out.1", *placed)] = [0, 5]
        both = torch.stack([placed[1], 0.5 * placed[1]], 1)
        found[cross_layer_features("mlp_in.0", ["mlp_out.0", "mlp_out.1"], placed[0], both)] = [1, 5]
        top = mi.top_features(model, pairs, list(found), 3, steps=2)
        assert sum(map(len, top.values())) == 3
    return [_edges_of(model, pairs, features=found), _mask_gradients(model, pairs, features=found)]


def _mask_gradients(model: mi.HookManager, pairs: mi.Pairs, **how: Any) -> object:
    graph, metric = mi.build_graph(model, **how), mi.get_metric("logit_diff")
    gates = torch.rand(2, *graph.possible.shape, generator=_generator()) * graph.possible
    pairs = pairs.to(model.device)
    values = build_replacement("corrupt", model, graph, pairs, 32).on(pairs)

    def loss(logits: Tensor) -> Tensor:
        return torch.stack([metric(one, pairs) for one in logits])

    return mask_gradients(model, graph, pairs, gates, values, loss)


def _steered(model: mi.HookManager, pairs: mi.Pairs) -> object:
    vector = torch.randn(model.dims.d_model, generator=_generator())
    matrix = torch.eye(model.dims.d_model) * 0.5
    found = mi.mean_difference(model, pairs.clean, pairs.corrupt, "resid_post.0", mask=pairs.mask, away_mask=pairs.mask)
    edits = [
        mi.add_direction("resid_pre.0", vector, 0.5, pairs=pairs, positions=1),
        mi.ablate_direction("resid_post.0", vector),
        mi.affine("resid_post.1", matrix, vector),
    ]
    return [found, model.run(pairs.clean, pairs.mask, interventions=edits).logits]


def _attention_edits(model: mi.HookManager, pairs: mi.Pairs) -> object:
    edits = [
        *mi.knock_out_attention(model, pairs, 2, 0),
        *mi.edit_pattern(model, pairs, 2, 1, scale=0.5, heads=["a0.h1"]),
    ]
    return model.run(pairs.clean, pairs.mask, interventions=edits).logits


def _subspace(model: mi.HookManager, pairs: mi.Pairs) -> object:
    basis = torch.linalg.qr(torch.randn(model.dims.d_model, 2, generator=_generator())).Q
    return mi.subspace_interchange(model, pairs, "resid_post.0", basis, placebos=2)


def _learned_subspace(model: mi.HookManager, pairs: mi.Pairs) -> object:
    basis = mi.learn_subspace(model, pairs, "resid_post.0", 2, epochs=2, batch_size=4)
    return basis @ basis.T


def _tuned(model: mi.HookManager, pairs: mi.Pairs) -> object:
    lens = mi.train_tuned_lens(model, pairs.clean, pairs.mask, steps=3, batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        mi.save_lens(Path(folder) / "lens.safetensors", lens)
        read = mi.load_lens(Path(folder) / "lens.safetensors")
    return [lens.weight, lens.bias, mi.logit_lens(model, pairs, lens=read).kl]


def _weights(model: mi.HookManager, pairs: mi.Pairs) -> object:
    ids = torch.arange(2, 8)
    return [
        mi.ov_circuit(model, "a0.h1", ids, ids),
        mi.qk_circuit(model, "a1.h1", ids, ids),
        mi.top_tokens(model, torch.randn(3, model.dims.d_model, generator=_generator()), 3),
        mi.neuron_tokens(model, 0, [0, 3], 3),
    ]


def _patchscope(model: mi.HookManager, pairs: mi.Pairs) -> object:
    return mi.patchscope(model, pairs.clean[:3, :3], pairs.corrupt[:3, :3], ["resid_post.0"], max_new_tokens=2)


def _phrases(model: mi.HookManager, pairs: mi.Pairs) -> object:
    return mi.phrase_relevance(model, pairs.clean[0, :5], 7, against=9, max_words=2)


_ENGINES: dict[str, Item] = {
    **{f"run_edges, {kind}": partial(_edges, kind) for kind in KINDS},
    "graph with named positions": partial(_edges_of, positions=("second",)),
    "graph with neurons": partial(_edges_of, neurons={1: [0, 2]}),
    "graph with features": _features,
    "graph with split input": partial(_edges_of, split_input=True),
    "mask_gradients": _mask_gradients,
    "run continued from its past": lambda model, pairs: _continued(model, pairs),
}


def _continued(model: mi.HookManager, pairs: mi.Pairs) -> object:
    tokens = pairs.clean[:1, :3]
    past = model.run(tokens[:, :2], keep_past=True).past
    return model.run(tokens[:, 2:], past=past, record=["resid_post.1"], device="cpu").values["resid_post.1"]


def _analyses() -> dict[str, Item]:
    found: dict[str, Item] = {
        "activation_patching, heads x positions": lambda m, p: mi.activation_patching(m, p, "z", positions="each"),
        "activation_patching, patterns": lambda m, p: mi.activation_patching(m, p, "pattern"),
        "activation_patching, mean": lambda m, p: mi.activation_patching(m, p, "mlp_out", replacement="mean"),
        "activation_patching, denoise": lambda m, p: mi.activation_patching(m, p, "q", direction="denoise"),
        "path_patching, MLPs recomputed": lambda m, p: mi.path_patching(m, p),
        "path_patching, direct to a query": lambda m, p: mi.path_patching(m, p, receivers="a1.h1<q>", meaning="direct"),
        "direct_logit_attribution": lambda m, p: mi.direct_logit_attribution(m, p, refine=["a0.h1", "m1"]),
        "causal_tracing": lambda m, p: mi.causal_tracing(m, p, 1, samples=2),
        "integrated_gradients": lambda m, p: mi.integrated_gradients(m, p, steps=3),
        "integrated_gradients, zero": lambda m, p: mi.integrated_gradients(m, p, steps=2, baseline="zero"),
        "relevance": lambda m, p: mi.relevance(m, p),
        "logit_lens": lambda m, p: _numbers_of_lens(mi.logit_lens(m, p, positions="each")),
        "writes_lens": lambda m, p: mi.writes_lens(m, p, ["a0.h1", "m1"]),
        "attention_between": lambda m, p: mi.attention_between(m, p, [0, 1, -1]),
        "attention_to": lambda m, p: mi.attention_to(m, p, -1, 0),
        "copying_scores": lambda m, p: mi.copying_scores(m),
        "composition_scores": lambda m, p: [mi.composition_scores(m, kind) for kind in "qkv"],
        "weights": _weights,
        "steering": _steered,
        "attention edits": _attention_edits,
        "subspace_interchange": _subspace,
        "learn_subspace": _learned_subspace,
        "patchscope": _patchscope,
        "phrase_relevance": _phrases,
        "top_neurons": lambda m, p: [tuple(sorted(v)) for v in mi.top_neurons(m, p, 4, steps=2).values()],
    }
    for kind in ("previous_token", "duplicate_token", "induction"):
        found[f"head_scores, {kind}"] = lambda m, p, kind=kind: mi.head_scores(m, kind, n=2, length=5)
    for method in ATTRIBUTIONS:
        found[f"attribution_patching, {method}"] = lambda m, p, method=method: mi.attribution_patching(
            m, p, method=method, steps=2, positions="each"
        )
    found["attribution_patching, atp-star, keys"] = lambda m, p: mi.attribution_patching(m, p, "k", method="atp-star")
    for preset in PRESETS:
        found[f"contextual_decomposition, {preset}"] = lambda m, p, preset=preset: (
            mi.contextual_decomposition(m, p, "z", preset=preset, replacement="mean", forward=True).relevant
        )
    found["contextual_decomposition, one backward"] = lambda m, p: mi.contextual_decomposition(m, p, "nodes").relevant
    return found


def _numbers_of_lens(lens: mi.LogitLens) -> object:
    return [lens.probabilities, lens.target_log_prob, lens.kl, lens.entropy]


def _circuit(model: mi.HookManager, pairs: mi.Pairs) -> mi.Circuit:
    """A circuit of random scores: the same on every device."""
    graph = mi.build_graph(model)
    return mi.select(graph, mi.score_edges(model, graph, pairs, method="random"), edges="30%")


def _curve(model: mi.HookManager, pairs: mi.Pairs) -> object:
    scores = mi.score_edges(model, mi.build_graph(model), pairs, method="random")
    return size_curve(model, scores, pairs, [5, 40])


def _stable(model: mi.HookManager, pairs: mi.Pairs) -> object:
    return mi.stable_scores(model, mi.build_graph(model), pairs, method="eap", resamples=4).scores.total


def _refined(model: mi.HookManager, pairs: mi.Pairs) -> object:
    return mi.refine_circuit(model, _circuit(model, pairs), pairs, drop=12, add=4).kept


def _orders(model: mi.HookManager, pairs: mi.Pairs) -> object:
    nodes = mi.build_graph(model, level="node")
    return [scores.total for scores in mi.acdc_thresholds(model, nodes, pairs, [1e-3, 0.1]).values()]


def _on_circuit(test: Callable[..., object], **how: Any) -> Item:
    return lambda model, pairs: test(model, _circuit(model, pairs), pairs, **how)


_EVALUATIONS: dict[str, Item] = {
    "evaluate": _on_circuit(mi.evaluate, n_random=2),
    "evaluate, mean": _on_circuit(mi.evaluate, n_random=1, replacement="mean", metric="kl_to_clean"),
    "size_curve": _curve,
    "stable_scores": _stable,
    "refine_circuit": _refined,
    "acdc_thresholds": _orders,
    "check_performance": lambda m, p: mi.check_performance(m, p),
    "node_minimality": _on_circuit(mi.node_minimality),
    "completeness": _on_circuit(mi.completeness, n_random=2),
    "equivalence_test": _on_circuit(mi.equivalence_test),
    "independence_test": _on_circuit(mi.independence_test, n_permutations=20),
    "necessity_test": _on_circuit(mi.necessity_test, n_random=4),
    "sufficiency_test": _on_circuit(mi.sufficiency_test, n_random=4),
    "measured_roles": lambda m, p: mi.measured_roles(m, _circuit(m, p), p, p).evidence,
    "check_predictions": lambda m, p: [one.value for one in mi.check_predictions(m, _predictions(), p)],
}


def _predictions() -> tuple[mi.Prediction, ...]:
    measures = (
        mi.PartsReplaced(parts=("a0.h1",)),
        mi.EdgesCut(edges=("a0.h1->logits",)),
        mi.Attention(head="a1.h0", query=-1, key=0),
        mi.DirectEffect(node="a1.h0"),
        mi.Detector(head="a0.h1", pattern="induction", n=2, length=4),
        mi.Copying(head="a0.h1"),
    )
    return tuple(mi.Prediction(name=str(i), measure=one, relation=">=", value=0.0) for i, one in enumerate(measures))


def _verified(model: mi.HookManager, pairs: mi.Pairs) -> object:
    """Saves a small circuit and verifies it on the CPU and on the model's own device: the claims that fail."""
    circuit = _circuit(model, pairs)
    result = mi.evaluate(model, circuit, pairs, n_random=2)
    n_claims: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.circuit.json"
        mi.save_circuit(path, circuit, model=model, result=result)
        given = "bundled" if model.info.origin == "bundled" else model
        for device in {"cpu", str(model.device)} if given == "bundled" else {None}:
            claims = mi.verify(path, model=given, device=device).claims
            if wrong := [claim.name for claim in claims if not claim.ok]:
                raise AssertionError(f"verified on {device}: {', '.join(wrong)}")
            n_claims.append(float(len(claims)))
    return n_claims[0]


def compare(
    device: torch.device, only: str = "", seconds: float = float("inf"), other: torch.device | None = None
) -> Iterator[Checked]:
    """Compares every item whose name contains `only`, on every model; nothing starts after so many seconds.

    With `other`, models are split over that device and `device`, which is the main one.
    """
    end = time.monotonic() + seconds
    for name, build in (models() if other is None else models_over(other)).items():
        pairs, cpu, there = build(device)
        for item, (run, limit) in items().items():
            if only in item and time.monotonic() < end:
                yield compared(name, item, run, limit, (cpu, pairs), (there, pairs.to(device)))


Made = tuple[mi.Pairs, mi.HookManager, mi.HookManager]


def models() -> Mapping[str, Callable[[torch.device], Made]]:
    """By name, what makes the pairs and the model on the CPU and on a device."""

    def bundled(device: torch.device) -> Made:
        cpu = mi.load_model("bundled")
        pairs = mi.load_task("ioi").pairs(cpu, n=6, split="train", seed=0)
        names = {**pairs.positions, "second": torch.ones(len(pairs), dtype=torch.long)}
        return replace_positions(pairs, names), cpu, mi.load_model("bundled", device=device)

    def tiny(label: str, device: torch.device) -> Made:
        pairs, module = _tiny(label)
        return pairs, mi.load_model(module), mi.load_model(copy.deepcopy(module).to(device))

    return {"bundled": bundled, **{label: partial(tiny, label) for label in SHAPES}}


def models_over(other: torch.device) -> Mapping[str, Callable[[torch.device], Made]]:
    """The tiny models on the CPU, and split over `other` and a main device."""

    def split(label: str, main: torch.device) -> Made:
        pairs, module = _tiny(label)
        return pairs, mi.load_model(module), mi.load_model(over_two_devices(copy.deepcopy(module), main, other))

    return {label: partial(split, label) for label in SHAPES}


def _tiny(label: str) -> tuple[mi.Pairs, Any]:
    family = next(family for family in FAMILIES if family.label.startswith(label))
    pairs = random_pairs()
    pairs = replace_positions(pairs, {"second": torch.ones(len(pairs), dtype=torch.long)})
    return pairs, replace(family, dtype=torch.float32).build()


def replace_positions(pairs: mi.Pairs, positions: Mapping[str, Tensor]) -> mi.Pairs:
    """The pairs with other named positions."""
    return mi.Pairs(
        clean=pairs.clean,
        corrupt=pairs.corrupt,
        right=pairs.right,
        wrong=pairs.wrong,
        mask=pairs.mask,
        positions=positions,
    )


def compared(
    model: str,
    name: str,
    run: Item,
    limit: float,
    expected: tuple[mi.HookManager, mi.Pairs],
    given: tuple[mi.HookManager, mi.Pairs],
) -> Checked:
    """One item on both devices; whatever it raises becomes a line."""
    try:
        try:
            right = numbers(run(*expected))
        except mi.MechInterpError as error:
            return _refused(model, name, run, given, error)
        start = time.perf_counter()
        got = numbers(run(*given))
        seconds = time.perf_counter() - start
        return Checked(model, name, _difference(got, right), limit, seconds=seconds)
    except Exception as error:  # the next item shall run
        trace = traceback.extract_tb(error.__traceback__)
        at = next((frame for frame in reversed(trace) if "mechinterp" in frame.filename), trace[-1])
        where = f"{Path(at.filename).name}:{at.lineno}"
        return Checked(model, name, float("nan"), limit, f"{where} {type(error).__name__}: {str(error)[:300]}")


def _refused(
    model: str, name: str, run: Item, given: tuple[mi.HookManager, mi.Pairs], error: mi.MechInterpError
) -> Checked:
    """The result where the CPU refuses: the device must do so too."""
    try:
        run(*given)
    except mi.MechInterpError as other:
        if type(other) is type(error):
            return Checked(model, name, 0.0, 0.0, refused=str(error))
        return Checked(model, name, float("nan"), 0.0, f"refused otherwise: {other}")
    return Checked(model, name, float("nan"), 0.0, f"only the CPU refuses: {error}")


def numbers(result: object) -> list[Tensor]:
    """All numbers of a result on the CPU in float64, in a fixed order. Raises TypeError if there are none."""
    found = list(_numbers(result))
    if not found:
        raise TypeError(f"{type(result).__name__} holds no numbers to compare.")
    return found


def _numbers(result: object) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result.detach().cpu().double()
    elif isinstance(result, (bool, int, float)):
        yield torch.tensor(float(result), dtype=torch.float64)
    elif isinstance(result, pd.DataFrame):
        yield torch.tensor(result.select_dtypes("number").to_numpy(dtype=float))
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _numbers(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _numbers(value)
    elif is_dataclass(result) and not isinstance(result, (mi.Pairs, mi.Graph, mi.Circuit)):
        for one in fields(result):
            yield from _numbers(getattr(result, one.name))


def _difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference as a share of the largest value of the same tensor; NaN must be in the same places."""
    if [one.shape for one in got] != [one.shape for one in expected]:
        raise ValueError("the results have other shapes")
    worst = 0.0
    for mine, right in zip(got, expected, strict=True):
        if not torch.equal(mine.isnan(), right.isnan()):
            raise ValueError("NaN is in other places")
        gap = (mine - right).nan_to_num(0, posinf=0, neginf=0).abs()
        if gap.numel():
            worst = max(worst, float(gap.max() / right.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-3)))
    return worst
