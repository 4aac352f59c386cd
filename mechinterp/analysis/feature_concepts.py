"""`feature_concepts`: the several concepts of a feature, as groups of its strongest examples.

Source: PRISM, Kopf et al. 2025 (arXiv 2506.15538). Deviations: their examples are drawn from a top percentile and
clustered by k-means over a sentence embedding; here they are the strongest, one per text, and are joined by average
linkage over what the model itself holds at the firing token, so that their number need not be given. Any embedding
can be given instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from mechinterp.analysis.describe import Example, Examples, strongest_examples
from mechinterp.analysis.describe_subject import Subject, subject_of
from mechinterp.analysis.texts import Texts, padded
from mechinterp.base.errors import InputError
from mechinterp.models.feature_basis import FeatureBasis
from mechinterp.models.hook_manager import HookManager
from mechinterp.models.modes import Gradients
from mechinterp.models.sites import Site


@dataclass(frozen=True)
class Concept:
    """One of the concepts of a feature: examples that are alike.

    Args:
        examples: The examples, the strongest first.
        words: What a language model said of them, if one was asked.
    """

    examples: tuple[Example, ...]
    words: str = ""

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens on which it fires, the most frequent first."""
        return tuple(
            word for word, _ in Counter(one.words[one.position].strip() for one in self.examples).most_common()
        )

    def evidence(self) -> str:
        """Its examples as text, a line each: what a language model may be asked to put into words."""
        return "\n".join(f"{one.value:.3g}  {one.marked()}" for one in self.examples)


@dataclass(frozen=True, eq=False)
class FeatureConcepts:
    """The concepts of a feature.

    Args:
        name: The feature.
        concepts: Its concepts, the one with most examples first.
        similarity: The mean cosine between examples of any two concepts, and on the diagonal between different
            examples of one (1 if there is one example only). Far below the diagonal: the concepts are unrelated.
        examples: All examples that were grouped.
    """

    name: str
    concepts: tuple[Concept, ...]
    similarity: Float[Tensor, "concept concept"]
    examples: Examples

    def __repr__(self) -> str:
        shown = "; ".join(f"{len(one.examples)}: {', '.join(one.tokens[:4])}" for one in self.concepts)
        return f"FeatureConcepts({self.name}, {len(self.concepts)} in {len(self.examples.strongest)} examples: {shown})"

    def to_frame(self) -> pd.DataFrame:
        """A row per concept: examples (their number), strongest (activation), tokens, example (token marked), words."""
        rows = [
            {
                "examples": len(one.examples),
                "strongest": one.examples[0].value,
                "tokens": ", ".join(one.tokens[:6]),
                "example": one.examples[0].marked(),
                "words": one.words,
            }
            for one in self.concepts
        ]
        return pd.DataFrame(rows, columns=["examples", "strongest", "tokens", "example", "words"])


def feature_concepts(
    model: HookManager,
    subject: FeatureBasis | str,
    feature: int | None = None,
    *,
    texts: Texts,
    n: int = 60,
    concepts: int | None = None,
    similarity: float = 0.5,
    embed: Callable[[Sequence[Example]], Float[Tensor, "example d"]] | None = None,
    skip: int = 0,
    batch_size: int = 16,
    words: Callable[[str], str] | None = None,
) -> FeatureConcepts:
    """The several concepts of a feature, neuron or head, as groups of its strongest examples that are alike.

    Two examples are as alike as the cosine between what the model holds at their firing tokens, where the feature
    reads; every value has length 1, and the mean over all tokens of the examples is subtracted. Groups are joined by
    average linkage as long as their mean cosine is at least `similarity`.

    Args:
        model: The model.
        subject: As in `describe`.
        feature: The number of the feature.
        texts: The corpus, read once; it may be an iterator over any number of texts.
        n: Examples that are grouped, one per text at most. A concept that fires weakly needs many to be among them.
        concepts: At most so many groups, instead of a cut at `similarity`.
        similarity: Groups are joined down to this mean cosine.
        embed: Vectors of the examples instead, whose cosines are taken as they are: a sentence embedding, say.
        skip: So many tokens at the beginning of every text are not looked at.
        batch_size: Texts per run.
        words: Called with the evidence of each concept; what it returns is kept. No language model is called otherwise.

    Cost: one forward per text up to the layer that is read, and one of each example.

    Raises InputError for a feature that does not fire in the texts, and for vectors that do not fit.
    """
    if n < 1 or (concepts is not None and concepts < 1):
        raise InputError("`n` and `concepts` must be at least 1.")
    if not -1 <= similarity <= 1:
        raise InputError(f"`similarity` is a cosine, from -1 to 1; got {similarity}.")
    found = subject_of(model, subject, feature)
    examples = strongest_examples(model, subject, feature, texts=texts, n=n, skip=skip, batch_size=batch_size)
    if not examples.strongest:
        raise InputError(f"{found.name} does not fire in the texts, so there is nothing to group.")
    if embed is None:
        with Gradients(False) as off, off:
            vectors = _held(model, found, examples.strongest, batch_size)
    else:
        vectors = _checked(embed(examples.strongest), len(examples.strongest))
    unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    alike = (unit @ unit.T).clamp(-1, 1)
    groups = _groups(alike, concepts, similarity)
    made = [Concept(tuple(examples.strongest[i] for i in group)) for group in groups]
    if words is not None:
        made = [replace(one, words=str(words(one.evidence()))) for one in made]
    return FeatureConcepts(found.name, tuple(made), _between(alike, groups), examples)


def _held(
    model: HookManager, subject: Subject, examples: Sequence[Example], batch_size: int
) -> Float[Tensor, "example d"]:
    """What the model holds at every firing token, of length 1, less the mean over all tokens of the examples."""
    site = subject.read_site
    if site is None:
        site = subject.site if isinstance(subject.site, Site) else subject.site.sites_in[0]
    at: list[Tensor] = []
    total, count = 0.0, 0
    for first in range(0, len(examples), batch_size):
        some = examples[first : first + batch_size]
        rows = [torch.tensor(one.ids[: one.position + 1]) for one in some]
        tokens, mask = padded(rows, model.device)
        value = model.run(tokens, mask, record=[site]).values[site].double().flatten(2)
        value = value / value.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        at += [value[row, one.position].cpu() for row, one in enumerate(some)]
        total, count = total + value[mask].sum(0).cpu(), count + int(mask.sum())
    return torch.stack(at) - total / count


def _checked(vectors: Tensor, n: int) -> Float[Tensor, "example d"]:
    if vectors.ndim != 2 or len(vectors) != n or not bool(vectors.isfinite().all()):
        raise InputError(
            f"`embed` must return a finite vector for each of the {n} examples; got {list(vectors.shape)}."
        )
    return vectors.detach().double().cpu()


def _groups(alike: Float[Tensor, "n n"], most: int | None, similarity: float) -> list[list[int]]:
    """The examples of every group, the strongest first; the largest group first."""
    if len(alike) == 1:
        return [[0]]
    apart = (1 - (alike + alike.T) / 2).clamp(min=0).fill_diagonal_(0).numpy()
    tree = linkage(squareform(apart, checks=False), "average")
    numbers = (
        fcluster(tree, 1 - similarity + 1e-9, "distance") if most is None else fcluster(tree, most, "maxclust")
    ).tolist()
    groups = [[i for i, own in enumerate(numbers) if own == number] for number in sorted(set(numbers))]
    return sorted(groups, key=lambda group: (-len(group), group[0]))


def _between(alike: Float[Tensor, "n n"], groups: Sequence[Sequence[int]]) -> Float[Tensor, "k k"]:
    """The mean cosine between different examples of any two groups."""
    found = torch.ones(len(groups), len(groups), dtype=alike.dtype)
    for i, one in enumerate(groups):
        for j, other in enumerate(groups):
            part = alike[list(one)][:, list(other)]
            if i != j:
                found[i, j] = part.mean()
            elif len(one) > 1:
                found[i, i] = (part.sum() - part.diagonal().sum()) / (len(one) * (len(one) - 1))
    return found
