"""The import hook that checks shapes while the tests run: jaxtyping with beartype, on the functions that state shapes.

jaxtyping's own hook wraps every function of a package, those that are made in a loop included; four in five take no
tensor whose shape they name, and wrapping those doubled the time of the tests. Their plain types are pyright's. Of a
function that is called very often, the first calls are checked and then one in some: checking all of them took a
seventh of the time of the tests.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import beartype
import jaxtyping

PACKAGE = "mechinterp"
SHAPED = frozenset({"Bool", "Float", "Int", "Shaped", "Cut", "Kept"})
"""The names under which shapes stand in annotations: what is imported from jaxtyping, and aliases of it."""
CHECK = "shape_checks.checked"
FIRST, EVERY = 100, 10
"""Of each function, so many first calls are checked, and of those after them one in `EVERY`."""


def install() -> None:
    """Check the shapes of what is imported from now on."""
    sys.meta_path.insert(0, _Finder())


CALLS: defaultdict[int, itertools.count[int]] = defaultdict(itertools.count)
"""How often each function was called; one that is made inside another counts by its code, not afresh each time."""


def checked(of: Any) -> Any:
    """The function, or the data class, with its shapes checked in the first calls and in some of the later ones."""
    check = jaxtyping.jaxtyped(typechecker=beartype.beartype)
    if not isinstance(of, type):
        return _sometimes(of, id(of.__code__), lambda: check(of))
    plain, made = of.__init__, check(of)
    checks = made.__init__
    made.__init__ = _sometimes(plain, id(made), lambda: checks)
    return made


def _sometimes(plain: Callable[..., Any], key: int, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    calls, made = CALLS[key], functools.cache(make)  # made when first needed, for that takes longer than a call

    @functools.wraps(plain)
    def called(*given: Any, **named: Any) -> Any:
        number = next(calls)
        return (made() if number < FIRST or number % EVERY == 0 else plain)(*given, **named)

    return called


def with_checks(source: str | bytes) -> ast.Module:
    """The module's tree, with a check on each function and data class that states a shape."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(map(_states_shape, _annotations(node))):
            node.decorator_list.append(_check_at(node))  # closest to the function, which still has its annotations
        elif isinstance(node, ast.ClassDef) and any(
            isinstance(field, ast.AnnAssign) and _states_shape(field.annotation) for field in node.body
        ):
            node.decorator_list.insert(0, _check_at(node))  # after @dataclass has made __init__
    imports = [isinstance(line, ast.ImportFrom) and line.module == "__future__" for line in tree.body]
    first = len(imports) - imports[::-1].index(True) if True in imports else 0
    tree.body[first:first] = ast.parse("from tests.support import shape_checks").body
    return ast.fix_missing_locations(tree)


def _annotations(function: ast.FunctionDef) -> list[ast.expr | None]:
    taken = function.args
    named = [*taken.posonlyargs, *taken.args, *taken.kwonlyargs, taken.vararg, taken.kwarg]
    return [*(one.annotation for one in named if one), function.returns]


def _states_shape(annotation: ast.expr | None) -> bool:
    return annotation is not None and any(
        isinstance(part, ast.Name) and part.id in SHAPED for part in ast.walk(annotation)
    )


def _check_at(node: ast.stmt) -> ast.expr:
    check = ast.parse(CHECK, mode="eval").body
    for part in ast.walk(check):
        ast.copy_location(part, node)
    return check


class _Loader(SourceFileLoader):
    def source_to_code(self, data: bytes, path: str, *, _optimize: int = -1) -> CodeType:  # pyright: ignore
        return compile(with_checks(data), path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: str) -> bytes:
        return super().get_data(_with_tag(path))

    def set_data(self, path: str, data: bytes, **mode: int) -> None:
        super().set_data(_with_tag(path), data, **mode)


TAG = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def _with_tag(path: str) -> str:
    """Compiled modules with checks have files of their own, beside those without."""
    return f"{path.removesuffix('.pyc')}.shapes-{TAG}.pyc" if path.endswith(".pyc") else path


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PACKAGE and not fullname.startswith(f"{PACKAGE}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
