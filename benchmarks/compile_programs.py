"""Compiles RASP programs to transformers and derives their circuits by brute force.

Run once, with Tracr (Lindner et al. 2023, arXiv 2301.05062) in its own environment, because it needs JAX:

    python -m venv /tmp/tracr && /tmp/tracr/bin/pip install tracr-pypi==1.0.0
    /tmp/tracr/bin/python -m benchmarks.compile_programs benchmarks/programs

One `NAME.npz` (weights, 64 pairs of random prompts) and one `NAME.json` (its source and its truths) per program;
`python -m benchmarks.ground_truth --more` reads them. `mechinterp` is not used: the truths come from the
NumPy forward below. An edge is in a truth when replacing it alone, by what the other prompt writes or by
zero, changes an output at some position of some prompt by more than 1e-3. Position 0 (BOS) is left out. A program is
kept if the compiled model agrees with Tracr's own and new pairs give the same truths.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

EFFECT = 1e-3
N_PAIRS = 64
Array = np.ndarray[Any, Any]
Edge = tuple[str, str]


@dataclass(frozen=True)
class Program:
    """A RASP program, the tokens and the length it is compiled for, and how its prompts are drawn."""

    rasp: Any
    vocab: tuple[str | int, ...]
    length: int
    causal: bool = False
    unique: bool = False
    """Whether a prompt has no token twice, as `sort_unique` requires."""


def programs() -> dict[str, Program]:
    """The programs by name: Tracr's own with other tokens and lengths than in `tests/data`, and some of ours."""
    from tracr.compiler import lib  # pyright: ignore[reportMissingImports]
    from tracr.rasp import rasp  # pyright: ignore[reportMissingImports]

    def select(keys: Any, queries: Any, how: Any = rasp.Comparison.EQ) -> Any:
        return rasp.Select(keys, queries, how)

    def share(token: str) -> Any:
        return lib.make_frac_prevs(rasp.tokens == token)

    def pair(first: Any, second: Any, how: Callable[[Any, Any], Any]) -> Any:
        return rasp.SequenceMap(how, first, second)

    tokens, indices, numbers = rasp.tokens, rasp.indices, (1, 2, 3)
    before = lib.shift_by(1, tokens)
    return {
        "count_a": Program(lib.make_count(tokens, "a"), tuple("abc"), 5),
        "count_a_long": Program(lib.make_count(tokens, "a"), tuple("abcd"), 8),
        "count_a_causal": Program(lib.make_count(tokens, "a"), tuple("abc"), 6, causal=True),
        "count_less_freq": Program(lib.make_count_less_freq(2), tuple("abc"), 5),
        "detect_a": Program(lib.detect_pattern(tokens, "a"), tuple("abc"), 5),
        "detect_ab": Program(lib.detect_pattern(tokens, "ab"), tuple("ab"), 5),
        "detect_ba_causal": Program(lib.detect_pattern(tokens, "ba"), tuple("abc"), 6, causal=True),
        "detect_abab": Program(lib.detect_pattern(tokens, "abab"), tuple("ab"), 7),
        "dominance": Program(
            rasp.Map(lambda x: x > 0, rasp.numerical(rasp.LinearSequenceMap(share("a"), share("b"), 1, -1))),
            tuple("abc"),
            5,
        ),
        "double": Program(rasp.Map(lambda x: 2 * x, tokens), numbers, 4),
        "first_seen": Program(
            rasp.Map(lambda n: n == 1, rasp.SelectorWidth(select(tokens, tokens))), tuple("abc"), 6, causal=True
        ),
        "first_token": Program(rasp.Aggregate(select(indices, indices, lambda k, q: k == 0), tokens), tuple("abc"), 5),
        "frac_prevs": Program(share("l"), tuple("helo"), 5),
        "frac_prevs_long": Program(share("("), tuple("ab()"), 10),
        "hist_causal": Program(lib.make_hist(), tuple("abc"), 6, causal=True),
        "hist_large": Program(lib.make_hist(), tuple("abcdef"), 8),
        "hist_small": Program(lib.make_hist(), tuple("ab"), 4),
        "hist_of_hist": Program(
            rasp.SelectorWidth(select(lib.make_hist(), lib.make_hist().named("again"))), tuple("abc"), 5
        ),
        "last_token": Program(rasp.Aggregate(select(indices, lib.make_length() - 1), tokens), tuple("abc"), 5),
        "map_chain": Program(rasp.Map(lambda x: x % 2, rasp.Map(lambda x: x + 1, before)), numbers, 5),
        "once": Program(rasp.Map(lambda n: n == 1, lib.make_hist()), tuple("abc"), 5),
        "pair_balance_causal": Program(lib.make_pair_balance(tokens, "(", ")"), tuple("ab()"), 6, causal=True),
        "palindrome": Program(pair(tokens, lib.make_reverse(tokens), lambda x, y: x == y), tuple("abc"), 5),
        "parity": Program(rasp.Map(lambda n: n % 2, lib.make_count(tokens, "a")), tuple("ab"), 6),
        "previous_same": Program(pair(tokens, before, lambda x, y: x == y), tuple("abc"), 5),
        "reverse": Program(lib.make_reverse(tokens), tuple("abcd"), 5),
        "reverse_long": Program(lib.make_reverse(tokens), tuple("ab"), 8),
        "shift_back": Program(lib.shift_by(-1, tokens), tuple("abc"), 5),
        "shift_by_2": Program(lib.shift_by(2, tokens), tuple("abcd"), 5),
        "shift_by_3_causal": Program(lib.shift_by(3, tokens), tuple("abc"), 7, causal=True),
        "shift_hist": Program(lib.shift_by(1, lib.make_hist()), tuple("abc"), 5),
        "shuffle_dyck": Program(lib.make_shuffle_dyck(["()"]), tuple("()"), 4),
        "sort_freq": Program(lib.make_sort_freq(4), numbers, 4),
        "sort_large": Program(lib.make_sort(tokens, tokens, max_seq_len=5, min_key=1), (1, 2, 3, 4, 5), 5),
        "sort_unique": Program(lib.make_sort_unique(tokens, tokens), (1, 2, 3, 4, 5, 6), 4, unique=True),
        "sum_of_two": Program(pair(tokens, before, lambda x, y: x + y if y else x), numbers, 5),
        "swap": Program(
            rasp.Aggregate(select(indices, indices, lambda k, q: k == (q - 1 if q % 2 else q + 1)), tokens),
            tuple("abc"),
            6,
        ),
        "token_and_place": Program(pair(tokens, indices, lambda x, i: x * i), numbers, 4),
        "three_in_a_row": Program(
            lib.make_nary_sequencemap(lambda x, y, z: x == y == z, tokens, before, lib.shift_by(2, tokens)),
            tuple("ab"),
            6,
        ),
    }


class Compiled:
    """The weights of one compiled program, and its forward with one edge replaced."""

    def __init__(self, program: Program) -> None:
        from tracr.compiler import compiling  # pyright: ignore[reportMissingImports]

        self.program = program
        self.assembled = compiling.compile_rasp_to_model(
            program.rasp,
            vocab=set(program.vocab),
            max_seq_len=program.length,
            causal=program.causal,
            compiler_bos="BOS",
            compiler_pad="compiler_pad",
        )
        params, config = self.assembled.params, self.assembled.model_config
        self.n_layers, self.n_heads, d_head = config.num_layers, config.num_heads, config.key_size
        self.arrays: dict[str, Array] = {
            "W_E": np.asarray(params["token_embed"]["embeddings"]),
            "W_pos": np.asarray(params["pos_embed"]["embeddings"]),
            "W_U": self._unembedding(),
        }
        for ours, theirs in (("Q", "query"), ("K", "key"), ("V", "value")):
            parts = [params[f"transformer/layer_{layer}/attn/{theirs}"] for layer in range(self.n_layers)]
            w = np.stack([part["w"].reshape(-1, self.n_heads, d_head).swapaxes(0, 1) for part in parts])
            b = np.stack([part["b"].reshape(self.n_heads, d_head) for part in parts])
            self.arrays |= {f"W_{ours}": w, f"b_{ours}": b}
        out = [params[f"transformer/layer_{layer}/attn/linear"] for layer in range(self.n_layers)]
        self.arrays["W_O"] = np.stack([part["w"].reshape(self.n_heads, d_head, -1) for part in out])
        self.arrays["b_O"] = np.stack([part["b"] for part in out])
        for ours, theirs in (("in", "linear_1"), ("out", "linear_2")):
            parts = [params[f"transformer/layer_{layer}/mlp/{theirs}"] for layer in range(self.n_layers)]
            self.arrays |= {f"W_{ours}": np.stack([part["w"] for part in parts])}
            self.arrays |= {f"b_{ours}": np.stack([part["b"] for part in parts])}
        self.arrays = {name: value.astype(np.float32) for name, value in self.arrays.items()}

    def _unembedding(self) -> Array:
        """One column per output direction."""
        labels, encoder = self.assembled.residual_labels, self.assembled.output_encoder
        name = self.program.rasp.label
        values = getattr(encoder, "encoding_map", None)
        wanted = [name] if values is None else [f"{name}:{value}" for value in values]
        matrix = np.zeros((len(labels), len(wanted)), np.float32)
        for column, label in enumerate(wanted):
            matrix[labels.index(label), column] = 1
        return matrix

    def edges(self) -> Iterator[Edge]:
        """All edges: (writer, channel of the reader)."""
        writers = ["embed", "pos_embed"]
        for layer in range(self.n_layers):
            heads = [f"a{layer}.h{head}" for head in range(self.n_heads)]
            yield from ((w, f"{head}.{part}") for head in heads for part in "qkv" for w in writers)
            writers += heads
            yield from ((w, f"m{layer}.in") for w in writers)
            writers.append(f"m{layer}")
        yield from ((w, "output") for w in writers)

    def run(self, tokens: Array, cut: Edge | None = None, other: dict[str, Array] | None = None) -> dict[str, Array]:
        """All writes and the output; `cut` carries `other`'s write, or zero."""
        a, writes = self.arrays, dict[str, Array]()
        writes["embed"], writes["pos_embed"] = (
            a["W_E"][tokens],
            np.broadcast_to(a["W_pos"], (len(tokens), *a["W_pos"].shape)),
        )

        def seen(channel: str, before: tuple[str, ...]) -> Array:
            total = sum(writes[name] for name in before)
            if cut is not None and cut[1] == channel:
                total = total - writes[cut[0]] + (0 if other is None else other[cut[0]])
            return np.asarray(total)

        allowed = np.tril(np.ones((tokens.shape[1],) * 2, bool)) if self.program.causal else True
        for layer in range(self.n_layers):
            before = tuple(writes)
            for head in range(self.n_heads):
                node = f"a{layer}.h{head}"
                q, k, v = (
                    seen(f"{node}.{part}", before) @ a[f"W_{part.upper()}"][layer, head]
                    + a[f"b_{part.upper()}"][layer, head]
                    for part in "qkv"
                )
                logits = np.where(allowed, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]), -np.inf)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                writes[node] = weights @ v @ a["W_O"][layer, head] + (a["b_O"][layer] if head == 0 else 0)
            hidden = np.maximum(seen(f"m{layer}.in", tuple(writes)) @ a["W_in"][layer] + a["b_in"][layer], 0)
            writes[f"m{layer}"] = hidden @ a["W_out"][layer] + a["b_out"][layer]
        writes["output"] = seen("output", tuple(writes)) @ a["W_U"]
        return writes

    def truth(self, clean: Array, corrupt: Array, zero: bool) -> list[Edge]:
        """The edges that change an output when replaced alone."""
        plain, other = self.run(clean)["output"], None if zero else self.run(corrupt)
        found: list[Edge] = []
        for edge in self.edges():
            change = np.abs(self.run(clean, edge, other)["output"] - plain)[:, 1:]
            if change.max() > EFFECT:
                found.append(edge)
        return found

    def prompts(self, n: int, rng: np.random.Generator) -> Array:
        """Random prompts: BOS and as many tokens as the model has positions for."""
        ids, program = self.assembled.input_encoder.encoding_map, self.program
        rows = [
            [
                "BOS",
                *(program.vocab[i] for i in rng.choice(len(program.vocab), program.length, replace=not program.unique)),
            ]
            for _ in range(n)
        ]
        return np.array([[ids[token] for token in row] for row in rows], np.int16)

    def check(self, tokens: Array) -> float:
        """The largest difference from Tracr's own run. Raises ValueError if it is more than rounding."""
        worst, ours = 0.0, self.run(tokens)
        for row, x in enumerate(tokens):
            theirs = np.asarray(self.assembled.forward(self.assembled.params, x[None]).transformer_output.output)[0]
            mine = sum(ours[name] for name in ours if name != "output")[row]
            worst = max(worst, float(np.abs(mine - theirs)[1:].max()))
        if worst > 1e-4:
            raise ValueError(f"the NumPy forward is {worst:g} off Tracr's")
        return worst


def write(folder: Path, name: str, program: Program) -> str:
    """One line about the program, after writing its two files."""
    compiled, rng = Compiled(program), np.random.default_rng(0)
    clean, corrupt = compiled.prompts(N_PAIRS, rng), compiled.prompts(N_PAIRS, rng)
    truths = {kind: compiled.truth(clean, corrupt, kind == "zero") for kind in ("resample", "zero")}
    fresh = compiled.prompts(4 * N_PAIRS, rng), compiled.prompts(4 * N_PAIRS, rng)
    again = {kind: compiled.truth(*fresh, kind == "zero") for kind in truths}
    if again != truths:
        raise ValueError(f"{name}: fresh prompts give other edges: {set(again['resample']) ^ set(truths['resample'])}")
    if np.abs(compiled.run(clean)["output"] - compiled.run(corrupt)["output"])[:, 1:].max() < EFFECT:
        raise ValueError(f"{name}: the output is the same for all prompts, so an empty circuit does all")
    difference, logits = compiled.check(clean[:8]), compiled.run(clean)["output"].astype(np.float32)
    np.savez_compressed(
        folder / f"{name}.npz", clean_tokens=clean, corrupt_tokens=corrupt, clean_logits=logits, **compiled.arrays
    )
    description = {
        "name": name,
        "source": "compiled with tracr-pypi 1.0.0 (Apache-2.0) by benchmarks/compile_programs.py",
        "config": {"attention_dir": "causal" if program.causal else "bidirectional"},
        "vocab": list(program.vocab),
        "length": program.length,
        "truth": {
            f"derived_{kind}": {"threshold": EFFECT, "n_pairs": N_PAIRS, "edges": edges}
            for kind, edges in truths.items()
        },
    }
    (folder / f"{name}.json").write_text(json.dumps(description, indent=1) + "\n")
    n_edges, sizes = len(list(compiled.edges())), ", ".join(f"{len(edges)} {kind}" for kind, edges in truths.items())
    return f"{name}: {compiled.n_layers} layers, {compiled.n_heads} heads, {n_edges} edges; {sizes}; {difference:.1e}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="default: all")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    for label, some in programs().items():
        if not asked.names or label in asked.names:
            print(write(asked.folder, label, some), flush=True)
