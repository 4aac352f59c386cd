"""What a run does: each option once, with type, default, bounds and help. Imports no torch.

The command line makes its parameters and checks from these fields (`cli/options.py`), and `command_of` writes the
command that repeats a run, so a new option is one field here.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

from mechinterp.base.errors import InputError, clip
from mechinterp.base.plain_files import is_file, is_folder
from mechinterp.circuit_file.limits import MAX_EXAMPLES
from mechinterp.circuit_file.store import SUFFIX, sidecar_name

LEVELS = ("edge", "node", "neuron", "feature")
ORDERS = ("value", "magnitude")
RULES = ("top", "greedy", "ilp")
"""The same as `mechinterp.graphs.select.RULES`."""
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The same as `mechinterp.models.placement.PLACEMENTS`."""
REPLACEMENTS = ("corrupt", "mean", "mean-positional", "zero")
"""The same as `mechinterp.engines.replacement.KINDS`."""
EFFORTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "quick": ("ensemble", ()),
    "standard": ("mattr", ()),
    "thorough": ("mattr", ("runs=8", "learning_steps=300", "drawings=8")),
}
"""What runs by default at each effort: the method with its settings (why: docs/methods/index.md)."""
RESAMPLES = 100
"""Resamples of the examples where scores add up over examples, so that they cost no runs."""
AUTO = "auto"
"""The batch size that is chosen by what fits the device."""
BATCH_SIZE = 32
NEURONS = FEATURES = 50
"""Neurons, or features of dictionaries, that become nodes by default."""


@dataclass(frozen=True)
class Option:
    """How a field of `RunSpec` is written on the command line.

    Args:
        help: Its line of `--help`; `{names}` stands for the known names.
        flag: By default the field's name with dashes.
        metavar: What `--help` calls its value; by default the type.
        least: Smallest number allowed.
        most: Largest number allowed.
        kind: What the value names, for the message about an unknown name: a method, a level.
        names: The known names of that kind; empty if a registry has them.
        default_of: The option whose value this one takes on the command line if it is not given.
        after: The option below which `--help` shows this one; by default the field before it.
        recorded: Whether a circuit file records it; what cannot change the circuit is not recorded.
        word: A word that may take the place of a number, in `run` only.
    """

    help: str
    flag: str = ""
    metavar: str | None = None
    least: int | float | None = None
    most: int | float | None = None
    kind: str = ""
    names: tuple[str, ...] = ()
    default_of: str = ""
    after: str = ""
    recorded: bool = True
    word: str = ""


def option(help: str, **how: Any) -> dict[str, Option]:
    """The metadata of a field: its `Option`."""
    return {"option": Option(help, **how)}


@dataclass(frozen=True)
class RunSpec:
    """What to discover, and how.

    Without `edges`, `nodes` and `threshold` the circuit is the smallest whose faithfulness on the validation pairs lies
    in [0.92, 1.1] with its whole interval (see `mechinterp.evaluation.sizes`), or the one that the method itself
    chooses (`cd`).

    Args:
        task: The name of a task, a task file (.yaml), or a file of pairs (.jsonl, .csv).
        model: `bundled`, a directory, a GGUF file, or a hub id (also `id@revision`).
        revision: Branch, tag or commit of a hub model.
        method: How edges are scored: a name in `METHODS`; by default what `effort` says.
        effort: Which method runs by default, and how long: `quick`, `standard` or `thorough`.
        metric: Task performance: a name in `METRICS`; by default the task's own.
        steps: Integration steps of `eap-ig`; by default 5.
        level: What is chosen: `edge`, `node`, `neuron` (nodes, with the strongest neurons among them) or `feature`
            (nodes, with the strongest of `features` among them).
        positions: Named positions by which edges are separated: names separated by commas, or `all`.
        neurons: Number of neurons that become nodes at level `neuron`; by default 50.
        features: Where dictionaries are whose features become nodes, as `load_bases` takes it: folders,
            `org/name/folder@revision`, `bundled:m1`. At level `edge` the circuit is of edges between these nodes.
        top: How many of their features become nodes, the strongest of all dictionaries; by default 50.
        direction: A direction file (or the name of a stored one) that the circuit explains instead of the logits.
        edges: Edges to select: a number, or a share such as `5%`.
        nodes: The same for nodes, at every other level.
        threshold: Selects every edge whose score (or its magnitude, see `by`) is above this, in the metric's unit.
        rule: How edges are selected: `top`, `greedy` or `ilp` (see `select`).
        by: The order of edges: `value` (the most helpful first) or `magnitude`.
        ratio: Share of the edges, from 0 to 1, that are taken from the most helpful ones first.
        refine: After the size is chosen, drop every edge that costs less than this much KL divergence (nats) by exact
            runs on the train pairs (see `refine_circuit`).
        refine_add: With `refine`, how many of the strongest edges outside of the circuit are then tried.
        examples: Train pairs, with which the circuit is discovered. Of a file of pairs these are the first.
        validation_examples: Pairs on which the size is chosen, neither train nor held-out ones.
        test_examples: Held-out pairs, on which it is evaluated. Of a file of pairs these are the last.
        seed: Seed of the pairs, the random circuits and the intervals.
        bos: Whether prompts begin with the BOS token; by default as the tokenizer does it.
        dtype: The model's dtype; by default float32.
        device: The model's device; by default the CPU.
        device_map: In place of `device`, how accelerate shares the layers out over all GPUs: `auto`, `balanced`,
            `balanced_low_0` or `sequential`. (Another map: load the model with it, and give `discover(model=...)`.)
        batch_size: Pairs per forward; does not change the result. `auto`: the largest that fits half of the memory of
            the device, by an estimate (see `mechinterp.discovery.memory`); the file records the number.
        replacement: What a cut edge carries: `corrupt`, `mean`, `mean-positional` or `zero`.
        settings: Further parameters of the method, each as `name=value`.
        roles: Whether to measure roles of heads and MLPs (see `measured_roles`), on at most 100 train and test pairs.
        resamples: How often the train pairs are drawn again for the stability of the circuit; by default 100 where
            scores add up over examples, as often as the method itself does it where it averages runs, otherwise 0.
        curve: Whether to measure faithfulness at small sizes, too; without, only those that decide the size.
        anyway: Go on although the model does not do the task.
        restart: Start again instead of resuming a killed run, and delete the states of all unfinished runs that write
            the same file.
        out: Folder for the files.
        shard: Only the scores of one shard of the train pairs, such as `3/8`, for `discover-circuit merge`.
    """

    task: str = field(metadata=option("The name of a task, or a file.", metavar="TASK|PAIRS_FILE", recorded=False))
    model: str = field(
        default="bundled", metadata=option("'bundled', a directory, a .gguf file, or a hub id (id@revision).")
    )
    revision: str | None = field(default=None, metadata=option("Branch, tag or commit of a hub model."))
    method: str | None = field(
        default=None, metadata=option("How edges are scored: {names}.  [default: mattr; see --effort]", kind="method")
    )
    effort: str = field(
        default="standard",
        metadata=option(
            "What runs without --method: quick (ensemble), standard (mattr) or thorough (mattr with more runs).",
            kind="effort",
            names=tuple(EFFORTS),
        ),
    )
    metric: str | None = field(
        default=None, metadata=option("The measure of task performance.  [default: the task's]", kind="metric")
    )
    steps: int | None = field(
        default=None, metadata=option("Integration steps of eap-ig.  [default: 5]", least=1, most=1000)
    )
    level: str = field(
        default="edge",
        metadata=option(
            "What is chosen: {names} (nodes, with single neurons or features among them).", kind="level", names=LEVELS
        ),
    )
    positions: str | None = field(
        default=None,
        metadata=option("Separate edges by these named positions: names separated by commas, or 'all'."),
    )
    neurons: int | None = field(
        default=None,
        metadata=option(f"The strongest neurons that become nodes, for --level neuron.  [default: {NEURONS}]", least=1),
    )
    features: tuple[str, ...] = field(
        default=(),
        metadata=option(
            "A dictionary whose strongest features become nodes: a folder, org/name/folder@revision or bundled:m1; "
            "repeatable.",
            metavar="WHERE",
        ),
    )
    top: int | None = field(
        default=None,
        metadata=option(f"How many features of all dictionaries become nodes.  [default: {FEATURES}]", least=1),
    )
    direction: str | None = field(
        default=None,
        metadata=option("Explain the direction of this file (or stored name) instead of the logits.", metavar="FILE"),
    )
    edges: int | str | None = field(default=None, metadata=option("Select this many edges, or a share such as 5%."))
    nodes: int | str | None = field(
        default=None, metadata=option("The same for nodes, with --level node, neuron or feature.")
    )
    threshold: float | None = field(
        default=None, metadata=option("Select every edge whose score (or its magnitude, see --by) is above this.")
    )
    rule: str = field(
        default="top",
        metadata=option(
            "top, greedy (grown back from the logits), or ilp (the best circuit of its size).", kind="rule", names=RULES
        ),
    )
    by: str = field(
        default="magnitude",
        metadata=option(
            "Order edges by score: value (the most helpful first) or magnitude.",
            kind="order",
            names=ORDERS,
            after="threshold",
        ),
    )
    ratio: float | None = field(
        default=None, metadata=option("Take this share of the edges from the most helpful ones first.", least=0, most=1)
    )
    refine: float | None = field(
        default=None,
        metadata=option(
            "Then drop each edge that costs less than this (KL divergence, nats), by exact runs; such as 0.001.",
            metavar="TAU",
            least=0,
        ),
    )
    refine_add: int = field(
        default=0,
        metadata=option("With --refine, then try this many of the strongest edges outside of the circuit.", least=0),
    )
    examples: int = field(
        default=200, metadata=option("Train pairs, to find the circuit with.", least=2, most=MAX_EXAMPLES)
    )
    validation_examples: int = field(
        default=200,
        metadata=option("Pairs to choose the size with.", least=2, most=MAX_EXAMPLES, default_of="examples"),
    )
    test_examples: int = field(
        default=200, metadata=option("Held-out pairs.", least=2, most=MAX_EXAMPLES, default_of="examples")
    )
    seed: int = field(
        default=0, metadata=option("Seed of the pairs, the random circuits and the intervals.", least=0, most=2**62)
    )
    bos: bool | None = field(
        default=None,
        metadata=option("Whether prompts begin with the BOS token.  [default: as the tokenizer does it]"),
    )
    dtype: str | None = field(default=None, metadata=option("float32, bfloat16, ...  [default: float32]"))
    device: str | None = field(default=None, metadata=option("cpu, cuda, cuda:1, mps.  [default: cpu]", recorded=False))
    device_map: str | None = field(
        default=None,
        metadata=option(
            "In place of --device, share the layers out over all GPUs: {names}.",
            kind="device map",
            names=DEVICE_MAPS,
            recorded=False,
        ),
    )
    batch_size: int | str = field(
        default=BATCH_SIZE,
        metadata=option(
            "Pairs per forward, or 'auto': as many as fit the device; does not change the result.", least=1, word=AUTO
        ),
    )
    replacement: str = field(
        default="corrupt",
        metadata=option("What a cut edge carries: {names}.", kind="replacement", names=REPLACEMENTS, after="ratio"),
    )
    settings: tuple[str, ...] = field(
        default=(),
        metadata=option("A parameter of the method; repeatable.", flag="--set", metavar="NAME=VALUE", after="steps"),
    )
    roles: bool = field(default=True, metadata=option("Measure roles of heads and MLPs, as predictions."))
    resamples: int | None = field(
        default=None,
        metadata=option(
            "How often the train pairs are drawn again, for the stability of the circuit.  [default: 100 where scores "
            "add up over pairs, otherwise what the method averages]",
            least=0,
            most=10_000,
            after="test_examples",
        ),
    )
    curve: bool = field(
        default=True, metadata=option("Measure faithfulness at small sizes, too, not only at those that decide.")
    )
    anyway: bool = field(default=False, metadata=option("Go on although the model does not do the task."))
    restart: bool = field(
        default=False,
        metadata=option("Start again, and delete the states of unfinished runs that write this file.", recorded=False),
    )
    out: Path = field(default=Path("out"), metadata=option("Folder for the files.", after="batch_size", recorded=False))
    shard: str | None = field(
        default=None,
        metadata=option(
            "Only score shard I of N of the train pairs, for `merge` (methods whose scores add up).",
            metavar="I/N",
            after="restart",
            recorded=False,
        ),
    )

    @property
    def n_at_once(self) -> int:
        """The batch size as a number; the default one before `auto` is chosen."""
        return BATCH_SIZE if self.batch_size == AUTO else int(self.batch_size)


def parsed_shard(text: str) -> tuple[int, int]:
    """The number of a shard, from 1, and of how many.

    >>> parsed_shard("3/8")
    (3, 8)
    """
    number, slash, count = text.partition("/")
    digits = slash and text.isascii() and number.isdecimal() and count.isdecimal() and len(text) <= 11
    if not digits or not 1 <= int(number) <= int(count):
        raise InputError(f"A shard is I/N with I from 1 to N, such as 3/8; got {clip(text, 40)!r}.")
    return int(number), int(count)


def resolved(spec: RunSpec) -> RunSpec:
    """The run with its method named: the one of its effort, and the settings of the effort before its own."""
    if spec.method is not None:
        return spec
    method, settings = EFFORTS[spec.effort]
    return replace(spec, method=method, settings=(*settings, *spec.settings))


COMPARE = (
    *("task", "methods", "model", "revision", "metric", "settings", "level", "positions", "neurons", "features", "top"),
    *("direction", "replacement", "sizes", "examples", "seed", "bos", "dtype", "device", "device_map"),
    *("batch_size", "anyway", "out"),
)
"""The options of `discover-circuit compare` as `--help` shows them; all but `methods` and `sizes` are fields."""


@dataclass(frozen=True)
class Declared:
    """A field of `RunSpec`: its name, type and default (`dataclasses.MISSING` for the task), and its option."""

    name: str
    hint: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """The option as it is typed: `--batch-size`."""
        return self.option.flag or f"--{self.name.replace('_', '-')}"


def declared() -> dict[str, Declared]:
    """The fields of `RunSpec` by name, in their order."""
    hints = get_type_hints(RunSpec)
    return {f.name: Declared(f.name, hints[f.name], f.default, f.metadata["option"]) for f in fields(RunSpec)}


def shown_order() -> tuple[str, ...]:
    """The names of all fields in the order in which `discover-circuit run --help` shows them."""
    known = declared()
    order = [name for name in known if not known[name].option.after]
    for name in known:
        if after := known[name].option.after:
            order.insert(order.index(after) + 1, name)
    return tuple(order)


def words_of(spec: RunSpec, names: Iterable[str]) -> list[str]:
    """The words of a command line that set these fields of `spec`: those that are recorded and not the default."""
    known, words = declared(), list[str]()
    for name in names:
        flag, option, default, value = known[name].flag, known[name].option, known[name].default, getattr(spec, name)
        same = getattr(spec, option.default_of) if option.default_of else default
        if not option.recorded or value == same:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag.removeprefix('--')}")
        elif isinstance(value, tuple):
            words += [word for entry in value for word in (flag, str(entry))]
        else:
            words += [flag, str(value)]
    return words


def command_of(spec: RunSpec) -> str:
    """The command line that repeats a run, without the folder of its files."""
    return shlex.join(["discover-circuit", "run", spec.task, *words_of(spec, declared())])


def comparison_path(spec: RunSpec) -> Path:
    """Where the page of a comparison goes: `OUT/{task}-comparison.html`."""
    return spec.out / f"{stem(spec.task)}-comparison.html"


def parsed_sizes(text: str) -> tuple[float, ...]:
    """The shares of all edges that `--sizes` names.

    >>> parsed_sizes("0.1,1")
    (0.1, 1.0)
    """
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"Sizes are 'mib' or numbers separated by commas, such as 0.01,0.1,1; got {text!r}.") from None
    check_shares(shares)
    return shares


def check_shares(shares: Sequence[float]) -> None:
    """Return None if shares increase from above 0 to 1. Raises InputError otherwise."""
    rising = all(a < b for a, b in pairwise(shares))
    if len(shares) < 2 or not rising or not shares[0] > 0 or shares[-1] != 1:
        raise InputError(f"Shares must increase, from above 0 to 1; got {list(shares)}.")


def compare_command(spec: RunSpec, methods: Sequence[str], sizes: str) -> str:
    """The command line that repeats a comparison, without the folder of its page."""
    words = ["discover-circuit", "compare", spec.task, "--methods", ",".join(methods), "--sizes", sizes]
    others = [name for name in COMPARE if name in declared() and name not in ("settings", "examples")]
    words += [*words_of(spec, ("settings", *others)), "--examples", str(spec.examples)]
    return shlex.join(words)


def stem(task: str) -> str:
    """The name of a task, or of the file that it is in."""
    return Path(task).stem if Path(task).suffix else task


def output_path(spec: RunSpec) -> Path:
    """Where the circuit file of a run goes: `OUT/{task}-{model}-{method}.circuit.json`, with features `-features` more.

    Raises InputError if the folder cannot be made, before anything slow begins.
    """
    spec = resolved(spec)
    given = Path(spec.model)
    if is_folder(given):
        model = given.resolve().name
    elif is_file(given):
        model = given.stem
    else:
        model = spec.model.rpartition("/")[2].replace("@", "-")
    parts = [stem(spec.task), model, str(spec.method), *(["features"] if spec.features else [])]
    parts += ["direction"] if spec.direction is not None else []
    path = spec.out / f"{'-'.join(parts)}{SUFFIX}"
    sidecar_name(path)
    try:
        spec.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot write to {spec.out}: {error.strerror or error}.") from error
    return path
