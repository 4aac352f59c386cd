"""Shapes in signatures are checked while the tests run: the import hook of `tests/support/shape_checks.py`."""

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from jaxtyping import TypeCheckError

import mechinterp
from mechinterp.tasks import metrics
from tests.support.shape_checks import EVERY, FIRST, SHAPED, with_checks

MODULES = sorted(Path(mechinterp.__file__).parent.rglob("*.py"))
CODE = '''"""What a module has before its code."""
from __future__ import annotations

from dataclasses import dataclass
from jaxtyping import Float, Int
from torch import Tensor

def plain(x: int) -> Float[Tensor, "a b"]:
    return Float

def twice(x: Float[Tensor, "a"], *, y: Float[Tensor, "a"]):
    return x + y

def made():
    def inner(x: Int[Tensor, "a"] | None):
        return x
    return inner

@dataclass(frozen=True)
class Held:
    x: Float[Tensor, "a"]
    y: Float[Tensor, "a"]

    @property
    def both(self) -> Float[Tensor, "a a"]:
        return self.x

    def unchecked(self, x: int):
        return x
'''


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("checked")
    monkeypatch.setitem(sys.modules, "checked", module)  # where a data class looks its annotations up
    exec(compile(with_checks(CODE), "checked.py", "exec", dont_inherit=True), vars(module))
    return module


def test_wrong_shapes_are_refused_where_a_signature_states_them(checked):
    one, two = torch.zeros(1), torch.zeros(2)
    assert torch.equal(checked.twice(one, y=one), two[:1]) and checked.made()(None) is None
    for wrong in (
        lambda: checked.twice(one, y=two),
        lambda: checked.plain(1),
        lambda: checked.made()(one),
        lambda: checked.Held(one, two),
        lambda: checked.Held(one, one).both,
    ):
        with pytest.raises(TypeCheckError):
            wrong()


def test_of_many_calls_the_first_and_some_later_ones_are_checked(checked):
    wrong = torch.zeros(1), torch.zeros(2)

    def refused() -> bool:
        try:
            checked.twice(wrong[0], y=wrong[1])
        except TypeCheckError:
            return True
        return False

    found = [refused() for _ in range(FIRST + 3 * EVERY)]
    assert all(found[:FIRST]) and sum(found[FIRST:]) == 3
    inner = [checked.made() for _ in range(FIRST + 1)]  # counted together, though each is made anew
    assert all(each(torch.zeros(1, dtype=torch.int)) is not None for each in inner)


def test_other_functions_are_left_as_they_are(checked):
    assert not hasattr(checked.Held.unchecked, "__wrapped__")


def test_the_package_is_imported_with_its_checks():
    stated = {
        name
        for name, value in vars(metrics).items()
        if inspect.isfunction(value) and "Float[" in str(value.__annotations__)
    }
    assert stated and all(hasattr(getattr(metrics, name), "__wrapped__") for name in stated)


def names_of_shapes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping":
            yield from (alias.asname or alias.name for alias in node.names)
        if isinstance(node, ast.Import):
            assert "jaxtyping" not in [alias.name for alias in node.names]
    for node in tree.body:  # `Cut = Bool[Tensor, "..."] | ...`
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.expr):
            used = {
                part.value.id
                for part in ast.walk(node.value)
                if isinstance(part, ast.Subscript) and isinstance(part.value, ast.Name)
            }
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if used & SHAPED:
                yield from (target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.slow
def test_the_hook_knows_every_name_that_states_a_shape():
    known = {name for path in MODULES for name in names_of_shapes(ast.parse(path.read_text("utf-8")))}
    assert known == SHAPED
