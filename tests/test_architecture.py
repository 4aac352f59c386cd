"""The layers of ARCHITECTURE.md, checked: imports go down only, and each foreign power has one home."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import mechinterp

PACKAGE = Path(__file__).parents[1] / "mechinterp"

# Modules and subpackages, the lowest level first. A module imports lower levels and its own subpackage,
# nothing else; a new one goes into the lowest level it can, and into ARCHITECTURE.md.
LAYERS = (
    ("errors", "listing"),
    ("registry", "jsontext", "atomic", "plain_files", "hub_errors"),
    ("sites", "metrics", "tasks"),
    ("models",),
    ("interventions",),
    ("hooks",),
    ("graph",),
    ("replacement", "scores", "places"),
    ("patched_run",),
    ("edges", "mask_gradients"),
    ("gradients",),
    ("activation_paths",),
    ("analysis",),
    ("decomposition",),
    ("circuit",),
    ("discovery",),
    ("evaluation",),
    ("files",),
    ("plots", "tables", "library"),
    ("report", "formats", "progress"),
    ("pipeline", "reevaluation", "exchange", "hub"),
    ("options", "stored", "terminal"),
    ("cli_exchange", "cli_hub", "cli_verify", "cli_view"),
    ("cli",),
    ("__init__", "__main__"),  # the public names: import everything, and are imported by nothing here
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}
TOP = len(LAYERS) - 1
# Library -> the only places that may import it; attribute -> the only places that may call it.
HOMES_OF_LIBRARIES = {"transformer_lens": {"models", "hooks"}, "plotly": {"plots", "report"}}
HOOKS = "register_forward_hook register_forward_pre_hook register_hook add_hook add_perma_hook"
HOOKS += " register_full_backward_hook register_full_backward_pre_hook"
HOMES_OF_ATTRIBUTES = {name: {"hooks"} for name in HOOKS.split()}
# Ctrl-C in the midst of these leaves gradients off or on; elsewhere `models.modes.Gradients` is used.
HOMES_OF_ATTRIBUTES |= {name: {"models"} for name in ("no_grad", "enable_grad", "set_grad_enabled", "inference_mode")}
MAX_LINES = 400


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, lazy ones too; `package` resolves the relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            if base == "mechinterp":  # `from mechinterp import graph` names a module
                yield from ((node.lineno, f"mechinterp.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base


def violations(source: str, *parts: str) -> list[str]:
    """What is wrong with the file `mechinterp/<parts>.py`, one line each; empty when nothing is."""
    tree, own = ast.parse(source), parts[0]
    if own not in LEVELS:
        return [f"{own} has no level: add it to LAYERS here and to ARCHITECTURE.md"]
    found: list[str] = []
    for line, name in imports(tree, ".".join(["mechinterp", *parts[:-1]])):
        top, _, rest = name.partition(".")
        if own not in HOMES_OF_LIBRARIES.get(top, {own}):
            found.append(f"{line}: imports {top}, which only {sorted(HOMES_OF_LIBRARIES[top])} may")
        target = rest.partition(".")[0] or "__init__"
        if top == "mechinterp" and target != own and LEVELS.get(target, TOP) >= LEVELS[own]:
            found.append(f"{line}: level {LEVELS[own]} imports {name}, level {LEVELS.get(target, TOP)}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and own not in HOMES_OF_ATTRIBUTES.get(node.attr, {own}):
            found.append(f"{node.lineno}: {node.attr} belongs in {sorted(HOMES_OF_ATTRIBUTES[node.attr])}")
    if {"utils", "util", "misc", "helpers", "helper", "common"} & set(parts):
        found.append("a name that says nothing: name the one idea of the file")
    if len(source.splitlines()) > MAX_LINES:
        found.append(f"more than {MAX_LINES} lines: find the second idea and give it a file")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_file_keeps_to_its_layer(path: Path) -> None:
    assert violations(path.read_text("utf-8"), *path.relative_to(PACKAGE).with_suffix("").parts) == []


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        ("edges", "import mechinterp.pipeline"),
        ("edges", "from mechinterp import discovery"),
        ("edges", "import mechinterp as mi"),
        ("edges", "from mechinterp import load_model"),
        ("edges", "from . import gradients"),
        ("tasks/pairs", "def late():\n    from ..hooks import HookManager"),
        ("hooks", "from mechinterp.graph import Graph"),
        ("analysis/logit_lens", "from transformer_lens.model_bridge import TransformerBridge"),
        ("discovery/eap", "import plotly.graph_objects as go"),
        ("edges", "module.register_forward_hook(print)"),
        ("edges", "with torch.no_grad():\n    pass"),
        ("tasks/utils", ""),
        ("newcomer", ""),
        ("graph", "\n" * (MAX_LINES + 1)),
    ],
)
def test_the_check_finds(parts: str, source: str) -> None:
    assert len(violations(source, *parts.split("/"))) == 1


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        ("edges", "from mechinterp.graph import Graph\nfrom .hooks import Run\nimport torch"),
        ("tasks/load", "from mechinterp.tasks.pairs import Pairs\nfrom .pairs import Pairs"),
        ("tasks/load", "from . import door\nfrom ..registry import unknown"),
        ("hooks", "import transformer_lens\nmodule.register_forward_hook(print)"),
        ("__init__", "from mechinterp.pipeline import discover"),
        ("graph", "\n" * MAX_LINES),
    ],
)
def test_the_check_allows(parts: str, source: str) -> None:
    assert violations(source, *parts.split("/")) == []


def test_no_public_name_is_hidden_by_a_module() -> None:
    """Python binds a module to its package when it is imported, over a function of the same name."""
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & set(mechinterp.__all__)
