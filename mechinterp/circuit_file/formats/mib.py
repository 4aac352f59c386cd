"""`mib`: the folder of a submission to the MIB leaderboard's circuit track, and an offline check of one.

One folder per task and model, such as `ioi_gpt2`, with either one file of scores for every edge (`importances.json`)
or nine files of circuits with at most 0.1, 0.2, 0.5, 1, 2, 5, 10, 20 and 50 % of the edges (a tenth one, empty, is
allowed). The files are EAP-IG's JSON or `.pt` (signs: see `eap_ig.py`). MIB runs its models with separate keys and
values for every query head, so only the graph of GPT-2 is the same here; the check accepts files of all its models.

Source: github.com/hannamw/MIB-circuit-track, README ("Submitting to the MIB Leaderboard"), `run_attribution.py`,
`MIB_circuit_track/utils.py` (the table of tasks and models).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechinterp.base.errors import FormatError, InputError, UnsupportedError, clipped
from mechinterp.base.plain_files import is_folder, read_bounded
from mechinterp.base.registry import unknown
from mechinterp.circuit_file.formats.eap_ig import EapIgFile, circuit_of_file
from mechinterp.circuit_file.formats.eap_ig_json import read_eap_ig_json, to_eap_ig_json
from mechinterp.circuit_file.formats.eap_ig_pt import read_eap_ig_pt
from mechinterp.circuit_file.formats.foreign import MAX_BYTES
from mechinterp.circuit_file.formats.format import Export, Import
from mechinterp.circuit_file.formats.score_origin import Made
from mechinterp.circuit_file.schema import CircuitFile
from mechinterp.graphs.circuit import Circuit
from mechinterp.models.layout import Dims

NAME = "mib"
IMPORTANCES = "importances.json"
PERCENTAGES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
MODELS = {
    "gpt2": (12, 12, 768),
    "qwen2.5": (24, 14, 896),
    "gemma2": (26, 8, 2304),
    "llama3": (32, 32, 4096),
}
"""(layers, heads, d_model) of gpt2-small, Qwen/Qwen2.5-0.5B, google/gemma-2-2b and meta-llama/Llama-3.1-8B."""
TASKS = {
    "ioi": ("gpt2", "qwen2.5", "gemma2", "llama3"),
    "mcqa": ("qwen2.5", "gemma2", "llama3"),
    "arithmetic-addition": ("llama3",),
    "arithmetic-subtraction": ("llama3",),
    "arc-easy": ("gemma2", "llama3"),
    "arc-challenge": ("llama3",),
}
"""The models that each task is evaluated on."""
_OUR_MODELS = {"gpt2": "gpt2", "gpt2-small": "gpt2", "openai-community/gpt2": "gpt2"}
_SUFFIXES = (".json", ".pt")


def to_mib(circuit: Circuit, document: CircuitFile) -> dict[str, bytes]:
    """The folder of this task and model, as relative path to content: `{"ioi_gpt2/importances.json": ...}`.

    Raises InputError if MIB has no such task or model, UnsupportedError for a graph that it does not support and for a
    circuit without scores (see `mib_circuits`).
    """
    model = _OUR_MODELS.get(document.model.name)
    if model is None:
        raise unknown("model of MIB with a graph like ours", document.model.name, _OUR_MODELS)
    task = "none" if document.task is None else document.task.name
    if circuit.scores is None:
        raise UnsupportedError(
            "MIB takes scores for every edge, or nine circuits (mib_circuits); this circuit has no scores."
        )
    folder = _folder(circuit, task, model)
    return {f"{folder}/{IMPORTANCES}": to_eap_ig_json(circuit, document)}


def mib_circuits(circuits: Sequence[Circuit], document: CircuitFile, task: str, model: str) -> dict[str, bytes]:
    """The folder with nine circuits, the smallest first, as relative path to content. Scores are left out.

    Raises InputError unless they have at most 0.1, 0.2, 0.5, 1, 2, 5, 10, 20 and 50 % of the edges.
    """
    if len(circuits) != len(PERCENTAGES):
        raise InputError(f"MIB takes {len(PERCENTAGES)} circuits; got {len(circuits)}.")
    made: dict[str, bytes] = {}
    for circuit, percent in zip(circuits, PERCENTAGES, strict=True):
        if 100 * circuit.n_edges > percent * circuit.graph.n_edges:
            raise InputError(f"A circuit of {circuit.n_edges} edges has more than {percent} % of the graph's edges.")
        bare = Circuit(circuit.graph, circuit.kept, circuit.n_selected, circuit.selection)
        made[f"{_folder(circuit, task, model)}/{percent}.json"] = to_eap_ig_json(bare, document)
    return made


def from_mib(folder: Path, dims: Dims | None = None, made: Made | None = None) -> Circuit:
    """The circuit in the folder of one task, if that holds one file; with its scores if `made` is given.

    Raises FormatError for a folder of nine circuits (read one of them as eap-ig-json or eap-ig-pt) and for files of
    other formats; UnsupportedError if the format does not support `dims`.
    """
    found = _files(folder)
    if len(found) != 1:
        raise FormatError(f"{folder} holds {len(found)} .json or .pt files; read one of them as eap-ig-json or -pt.")
    return circuit_of_file(_read(found[0]), dims, made, NAME, str(found[0]))


def mib_problems(folder: Path) -> tuple[str, ...]:
    """The problems for which MIB would refuse a submission folder, one line each; empty if there are none.

    All files are read and compared with the model in the name of their folder.
    """
    if not is_folder(folder):
        return (f"{folder} is not a folder.",)
    problems: list[str] = []
    tasks: set[str] = set()
    models: set[str] = set()
    for entry in sorted(folder.iterdir()):
        task, _, model = entry.name.rpartition("_")
        if not is_folder(entry) or model not in TASKS.get(task, ()):
            problems.append(f"{clipped(entry.name)} is not a folder {{task}}_{{model}} of a task and model of MIB.")
            continue
        found = _folder_problems(entry, model)
        problems += found
        if not found:
            tasks.add(task)
            models.add(model)
    for kind, names in (("tasks", tasks), ("models", models)):
        if len(names) < 2:
            problems.append(f"MIB asks for at least 2 {kind}; got {len(names)} without problems.")
    return tuple(problems)


def _folder_problems(folder: Path, model: str) -> list[str]:
    problems: list[str] = []
    read: list[EapIgFile] = []
    for path in _files(folder):
        try:
            found = _read(path)
        except FormatError as error:
            problems.append(str(error))
            continue
        dims = found.graph.dims
        shape = (dims.n_layers, dims.n_heads, dims.d_model)
        if shape != MODELS[model] or dims.parallel:
            problems.append(f"{path}: layers, heads and d_model are {shape}; those of {model} are {MODELS[model]}.")
        read.append(found)
    if problems:
        return problems
    if len(read) == 1:
        return [] if read[0].scores is not None else [f"{folder} has one file, which must have scores for every edge."]
    if len(read) not in (len(PERCENTAGES), len(PERCENTAGES) + 1):
        return [f"{folder} has {len(read)} .json or .pt files; MIB takes one with scores, or nine circuits."]
    limits = (*(0,) * (len(read) - len(PERCENTAGES)), *PERCENTAGES)
    shares = sorted(100 * int(found.in_graph.sum()) / found.graph.n_edges for found in read)
    for share, limit in zip(shares, limits, strict=True):
        if share > limit:
            problems.append(f"{folder}: the circuit for {limit} % has {share:.3g} % of the edges.")
    return problems


def _files(folder: Path) -> list[Path]:
    if not is_folder(folder):
        raise FormatError(f"{folder} is not a folder.")
    return sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)


def _read(path: Path) -> EapIgFile:
    content = read_bounded(path, MAX_BYTES)
    return (read_eap_ig_json if path.suffix == ".json" else read_eap_ig_pt)(content, str(path))


def _folder(circuit: Circuit, task: str, model: str) -> str:
    if task not in TASKS:
        raise unknown("task of MIB", task, TASKS)
    if model not in TASKS[task]:
        raise unknown(f"model of MIB's {task}", model, TASKS[task])
    dims = circuit.graph.dims
    shape = (dims.n_layers, dims.n_heads, dims.d_model)
    if shape != MODELS[model]:
        raise InputError(f"The circuit's layers, heads and d_model are {shape}; those of {model} are {MODELS[model]}.")
    return f"{task}_{model}"


EXPORT = Export("", to_mib, "Lost: which edges are in the circuit counts for nothing there, only their scores do.")
IMPORT = Import(has_scores=True, has_sizes=True, read=from_mib)
