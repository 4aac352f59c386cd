"""The layers of ARCHITECTURE.md, checked: imports between folders go down only, and each foreign power has one home."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mechinterp

PACKAGE = Path(__file__).parents[1] / "mechinterp"

# Folders (and the few modules beside them), the lowest layer first. A file imports lower layers and its own folder,
# nothing else. Folders in one row do not import each other.
LAYERS = (
    ("base",),
    ("tasks",),
    ("models",),
    ("graphs",),
    ("engines",),
    ("features",),
    ("analysis",),
    ("discovery", "evaluation"),
    ("circuit_file",),
    ("views",),
    ("run_spec",),
    ("run_examples",),
    ("pipeline", "exchange"),
    ("compare", "direct", "run_costs", "shard_files"),
    ("cli",),
    ("__init__", "__main__"),  # the public names: import everything, and are imported by nothing here
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
TOP = len(LAYERS) - 1
# Library -> the only places that may import it; attribute -> the only places that may call it.
HOMES_OF_LIBRARIES = {"transformer_lens": {"models"}, "plotly": {"views"}, "typer": {"cli"}}
HOOKS = "register_forward_hook register_forward_pre_hook register_hook add_hook add_perma_hook"
HOOKS += " register_full_backward_hook register_full_backward_pre_hook"
HOMES_OF_ATTRIBUTES = {name: {"models/hook_manager"} for name in HOOKS.split()}
# Ctrl-C in the midst of these leaves gradients off or on; elsewhere `models.modes.Gradients` is used.
HOMES_OF_ATTRIBUTES |= {name: {"models"} for name in ("no_grad", "enable_grad", "set_grad_enabled", "inference_mode")}
MAX_LINES = 600


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, lazy ones too; `package` resolves the relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if base == "mechinterp":  # `from mechinterp import graphs` names a module
                yield from ((node.lineno, f"mechinterp.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def violations(source: str, *parts: str) -> list[str]:
    """What is wrong with the file `mechinterp/<parts>.py`, one line each; empty when nothing is."""
    tree, own, path = ast.parse(source), parts[0], "/".join(parts)
    if own not in LEVELS:
        return [f"{own} has no layer: add it to LAYERS here and to ARCHITECTURE.md"]
    found: list[str] = []
    for line, name in imports(tree, ".".join(["mechinterp", *parts[:-1]])):
        top, _, rest = name.partition(".")
        if own not in HOMES_OF_LIBRARIES.get(top, {own}):
            found.append(f"{line}: imports {top}, which only {sorted(HOMES_OF_LIBRARIES[top])} may")
        target = rest.partition(".")[0] or "__init__"
        if top == "mechinterp" and target != own and LEVELS.get(target, TOP) >= LEVELS[own]:
            found.append(f"{line}: layer {LEVELS[own]} imports {name}, layer {LEVELS.get(target, TOP)}")
        if top == "tools":
            found.append(f"{line}: imports tools, which are not in the wheel")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not {own, path} & HOMES_OF_ATTRIBUTES.get(node.attr, {path}):
            found.append(f"{node.lineno}: {node.attr} belongs in {sorted(HOMES_OF_ATTRIBUTES[node.attr])}")
    if {"utils", "util", "misc", "helpers", "helper", "common"} & set(parts):
        found.append("a name that says nothing: name the one idea of the file")
    if len(source.splitlines()) > MAX_LINES:
        found.append(f"more than {MAX_LINES} lines: one idea, or two files?")
    return found


def imported_modules(source: str) -> set[str]:
    """The modules (and names in them) that a file imports at run time, inside functions too; not for types alone."""
    tree = ast.parse(source)
    guarded = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    for_types = {inner for block in guarded for statement in block.body for inner in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in for_types:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def module_imports() -> dict[str, set[str]]:
    """Which modules of the package each of its modules imports."""
    paths = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts): p for p in PACKAGE.rglob("*.py")}
    return {name: imported_modules(p.read_text("utf-8")) & paths.keys() - {name} for name, p in paths.items()}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_keeps_to_its_layer(path: Path) -> None:
    assert violations(path.read_text("utf-8"), *path.relative_to(PACKAGE).with_suffix("").parts) == []


@pytest.mark.slow
def test_no_modules_import_each_other_in_a_circle() -> None:
    found = module_imports()
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in sorted(found[name]):
                visit(target, (*above, name))
            done.add(name)

    for name in sorted(found):
        visit(name, ())


def test_imports_inside_functions_count_as_imports() -> None:
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a.b import c\ndef late():\n    from d.e import f"
    )
    assert {"d.e", "d.e.f"} <= imported_modules(source) and "a.b" not in imported_modules(source)


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        ("engines/edge_patching", "import mechinterp.pipeline"),
        ("engines/edge_patching", "from mechinterp import discovery"),
        ("engines/edge_patching", "import mechinterp as mi"),
        ("engines/edge_patching", "from mechinterp import load_model"),
        ("engines/edge_patching", "from ..analysis import relevance"),
        ("evaluation/masks", "from mechinterp.discovery.method import score_edges"),
        ("tasks/pairs", "def late():\n    from ..models.hook_manager import HookManager"),
        ("analysis/logit_lens", "from transformer_lens.model_bridge import TransformerBridge"),
        ("discovery/eap", "import plotly.graph_objects as go"),
        ("models/load", "module.register_forward_hook(print)"),
        ("engines/edge_patching", "with torch.no_grad():\n    pass"),
        ("models/load", "from tools.train_bundled import train"),
        ("tasks/utils", ""),
        ("newcomer", ""),
        ("graphs/graph", "\n" * (MAX_LINES + 1)),
    ],
)
def test_the_check_finds(parts: str, source: str) -> None:
    assert len(violations(source, *parts.split("/"))) == 1


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        ("engines/edge_patching", "from mechinterp.graphs.graph import Graph\nfrom .grid import Grid\nimport torch"),
        ("tasks/task", "from mechinterp.tasks.pairs import Pairs\nfrom .pairs import Pairs"),
        ("tasks/task", "from . import pairs\nfrom ..base.registry import unknown"),
        ("models/hook_manager", "import transformer_lens\nmodule.register_forward_hook(print)"),
        ("__init__", "from mechinterp.pipeline import discover"),
        ("graphs/graph", "\n" * MAX_LINES),
    ],
)
def test_the_check_allows(parts: str, source: str) -> None:
    assert violations(source, *parts.split("/")) == []


def test_no_public_name_is_hidden_by_a_module() -> None:
    """Python binds a module to its package when it is imported, over a function of the same name."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(mechinterp.__all__)
