"""The equivalence and the independence test of a circuit. Rejecting either is evidence against the circuit.

Source: Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs" (arXiv 2410.13032); where the paper leaves
details open, we follow the authors' code (blei-lab/circuitry). `s` is the metric of an example, M the model, C the
circuit. The tests against random circuits are in `against_random.py`. Each test states its deviations.

A null hypothesis that is not rejected has not been shown to be true: with few examples nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import binom
from torch import Tensor

from mechinterp.base.errors import InputError
from mechinterp.base.progress import Progress, no_progress
from mechinterp.base.settings import Parameter
from mechinterp.evaluation.ablation import Ablation, AblationSetup
from mechinterp.evaluation.masks import mask_values, with_axes
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.hook_manager import HookManager
from mechinterp.tasks.metrics import Metric
from mechinterp.tasks.own_metric import MetricLike, as_metric
from mechinterp.tasks.pairs import Pairs

TIE = 1e-5
"""Two metric values are equal if they differ by less than this share of the mean size of the model's: float32 does not
resolve smaller differences of logits."""


@dataclass(frozen=True)
class HypothesisTest:
    """One test: its hypotheses, its settings and its outcome."""

    name: str
    null: str
    """The null hypothesis, in words."""
    if_rejected: str
    """What a rejection shows, in words."""
    statistic_name: str
    statistic: float
    p_value: float
    alpha: float
    details: Mapping[str, Parameter]
    """The test's settings and its other numbers."""
    metric: str
    ablation: Ablation
    n_examples: int
    circuit_digest: str
    pairs: Pairs = field(repr=False)
    reference: Pairs | None = field(default=None, repr=False)

    @property
    def rejected(self) -> bool:
        """Whether the p-value is at most alpha."""
        return self.p_value <= self.alpha

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        if self.rejected:
            return f"Rejected (p = {self.p_value:.3g}): {self.if_rejected}."
        return f"Not rejected (p = {self.p_value:.3g}): no evidence against '{self.null}', but no proof of it either."

    def to_frame(self) -> pd.DataFrame:
        """One row: test, statistic, its name, p_value, alpha, rejected, null, verdict, and the details."""
        row = {
            "test": self.name,
            "statistic": self.statistic,
            "statistic_name": self.statistic_name,
            "p_value": self.p_value,
            "alpha": self.alpha,
            "rejected": self.rejected,
            "null": self.null,
            "verdict": self.verdict,
            **self.details,
        }
        return with_axes(pd.DataFrame([row]), self.metric, self.ablation)


def check_level(alpha: float, **shares: float) -> None:
    """Return None when alpha and the named probabilities lie between 0 and 1. Raises InputError otherwise."""
    for name, value in {"alpha": alpha, **shares}.items():
        if not 0 < value < 1:
            raise InputError(f"{name} must lie between 0 and 1; got {value!r}.")


def equivalence_test(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    epsilon: float = 0.1,
    alpha: float = 0.05,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    progress: Progress = no_progress,
) -> HypothesisTest:
    """Tests whether the circuit does better than the model on about half of the examples, as an equivalent one would.

    Null: |P(s(C) > s(M)) - 1/2| <= epsilon. Statistic: |share of examples on which the circuit does better - 1/2|;
    p-value: the probability that a binomial share with success probability 1/2 + epsilon is at least as far from 1/2,
    which is the largest under the null. A tie counts half for either side, so a circuit that does exactly what the
    model does passes. Cost: two forwards per example.

    Source: Shi et al. 2024, the equivalence test. Deviations: ties (the paper assumes none); signs are counted, as in
    the paper, where the authors' code takes the mean of the differences.

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        pairs: The examples; use held-out ones.
        epsilon: How far from 1/2 the probability may be under the null.
        alpha: The significance level.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        batch_size: How many examples to run at a time.
        progress: Called with the number of runs done and their total; one run is one mask on one example.

    Raises:
        InputError: The metric measures the distance from the model (`kl_to_clean`), so that the model always wins.
    """
    check_level(alpha)
    if not 0 <= epsilon < 0.5:
        raise InputError(f"epsilon must be at least 0 and below 1/2; got {epsilon!r}.")
    metric = _own_performance(metric, "equivalence_test")
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, progress)
    full, ours = mask_values(setup, [torch.zeros_like(circuit.cut), circuit.cut]).unbind(1)
    ahead = metric.direction * (ours - full)
    tied = ahead.abs() <= TIE * full.abs().mean()
    n, n_ties, n_wins = len(ahead), int(tied.sum()), int((ahead[~tied] > 0).sum())
    return HypothesisTest(
        name="equivalence",
        null="on a random example the circuit does better than the model with probability 1/2, give or take "
        f"{epsilon:g}",
        if_rejected="the circuit and the model do not do equally well, which is evidence against the circuit",
        statistic_name="|share of examples on which the circuit does better - 1/2|",
        statistic=abs((n_wins + n_ties / 2) / n - 0.5),
        p_value=sign_p_value(n, n_wins, n_ties, epsilon),
        alpha=alpha,
        details={"epsilon": epsilon, "circuit_better": n_wins, "ties": n_ties, "model_better": n - n_wins - n_ties},
        ablation=setup.axes,
        **setup.stated(circuit),
    )


def sign_p_value(n: int, n_wins: int, n_ties: int, epsilon: float) -> float:
    """The probability that a Binomial(n, 1/2 + epsilon) number is as far from n / 2 as the wins plus half the ties.

    >>> sign_p_value(4, 4, 0, 0.0)
    0.125
    """
    twice = abs(2 * n_wins + n_ties - n)  # in half examples, so that everything is an integer
    if twice == 0:
        return 1.0
    low, high = (n - twice) // 2, (n + twice + 1) // 2
    return float(binom.cdf(low, n, 0.5 + epsilon) + binom.sf(high - 1, n, 0.5 + epsilon))


def independence_test(
    model: HookManager,
    circuit: Circuit,
    pairs: Pairs,
    *,
    n_permutations: int = 1000,
    alpha: float = 0.05,
    metric: MetricLike = "logit_diff",
    replacement: str = "corrupt",
    reference: Pairs | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = no_progress,
) -> HypothesisTest:
    """Tests whether the performance of the model without the circuit is independent of that of the whole model.

    Null: s(M without C), with every edge of the circuit cut, is independent of s(M). Statistic: HSIC with Gaussian
    kernels; p-value by permuting the examples of one of the two. `p_value_all_cut` in `details` is from the same test
    with every edge of the model cut: if it is small too, the corrupt prompts themselves carry information about the
    clean ones, and a rejection says nothing about the circuit. Cost: three forwards per example.

    Source: Shi et al. 2024, the independence test; Gretton et al. 2007 for HSIC. Deviations: the bandwidth of each
    kernel is the median distance of its own values (the authors' code uses one bandwidth, the median distance between
    the two kinds of values); the observed order counts as one of the permutations, so that the p-value is never 0
    (Phipson & Smyth 2010).

    Args:
        model: The model that the circuit was found in.
        circuit: The circuit.
        pairs: The examples; use held-out ones.
        n_permutations: How many permutations give the p-value.
        alpha: The significance level.
        metric: A metric, or the name of one.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        reference: The pairs whose corrupt prompts give the means; by default `pairs`.
        batch_size: How many examples to run at a time.
        seed: The seed of the permutations.
        progress: Called with the number of runs done and their total; one run is one mask on one example.

    Raises:
        InputError: The metric measures the distance from the model, or the model does equally well on all examples, so
            that nothing could depend on it.
    """
    check_level(alpha)
    metric = _own_performance(metric, "independence_test")
    setup = AblationSetup.of(model, circuit.graph, pairs, metric, replacement, reference, batch_size, progress)
    possible = circuit.graph.possible
    full, without, corrupt = mask_values(setup, [torch.zeros_like(possible), circuit.members, possible]).unbind(1)
    if _is_constant(full):
        raise InputError(
            f"The model's {metric.name} is the same on all {len(full)} examples, so nothing can depend on it; use a "
            "metric that varies, such as 'logit_diff', or other pairs."
        )
    statistic, p_value = hsic_test(without, full, n_permutations, seed)
    _, p_value_all_cut = hsic_test(corrupt, full, n_permutations, seed)
    return HypothesisTest(
        name="independence",
        null="how well the model does without the circuit is independent of how well the whole model does",
        if_rejected="how well the model does without the circuit still depends on how well the whole model does, which "
        "is evidence against the circuit (unless p_value_all_cut is small too)",
        statistic_name="HSIC",
        statistic=statistic,
        p_value=p_value,
        alpha=alpha,
        details={"n_permutations": n_permutations, "p_value_all_cut": p_value_all_cut, "seed": seed},
        ablation=replace(setup.axes, component="all edges of the circuit's members", set="circuit"),
        **setup.stated(circuit),
    )


def hsic_test(
    x: Float[Tensor, " example"], y: Float[Tensor, " example"], n_permutations: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """HSIC of two variables (Gaussian kernels, median bandwidth) and its p-value by permutation.

    HSIC is tr(K H L H) / (n - 1)^2. A variable that is constant has HSIC 0 and p-value 1. Time: n^2 per permutation.
    """
    if len(x) != len(y) or len(x) < 4 or n_permutations < 1:
        raise InputError(
            f"Give at least 4 examples of both variables and at least one permutation; got {len(x)} and {len(y)} "
            f"examples and n_permutations={n_permutations}."
        )
    if _is_constant(x) or _is_constant(y):
        return 0.0, 1.0
    a, b = _centred_kernel(x), _centred_kernel(y)
    scale = (len(x) - 1) ** 2
    observed = float((a * b).sum()) / scale
    generator = torch.Generator().manual_seed(seed)
    # A permutation that only swaps equal examples must not fall below the observed value by rounding.
    enough, as_large = observed - 1e-12 * abs(observed), 0
    for _ in range(n_permutations):
        order = torch.randperm(len(x), generator=generator)
        as_large += float((a * b[order][:, order]).sum()) / scale >= enough
    return observed, (1 + as_large) / (1 + n_permutations)


def _centred_kernel(values: Float[Tensor, " example"]) -> Float[Tensor, "example example"]:
    values = values.double()
    distances = (values[:, None] - values[None, :]).abs()
    apart = distances[torch.ones_like(distances, dtype=torch.bool).triu(1)]
    width = apart.median() if apart.median() > 0 else apart[apart > 0].median()
    kernel = torch.exp(-(distances**2) / (2 * width**2))
    kernel = kernel - kernel.mean(0, keepdim=True)
    return kernel - kernel.mean(1, keepdim=True)


def _is_constant(values: Float[Tensor, " example"]) -> bool:
    return float(values.max() - values.min()) <= TIE * float(values.abs().mean())


def _own_performance(metric: MetricLike, test: str) -> Metric:
    """The metric, if it does not compare with the model itself. Raises InputError otherwise."""
    metric = as_metric(metric)
    if metric.needs_reference:
        raise InputError(
            f"{test} compares how well the circuit and the model do the task, but {metric.name!r} measures the "
            "distance from the model. Use a metric of the answers, such as 'logit_diff'."
        )
    return metric
