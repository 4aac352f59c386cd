"""The circuit and direction files that can be given by name: those of the package, and those in ./out."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from mechinterp.base.errors import InputError
from mechinterp.base.plain_files import exists
from mechinterp.base.registry import MOST_SHOWN, unknown
from mechinterp.circuit_file.direction_schema import SUFFIX as DIRECTION_SUFFIX
from mechinterp.circuit_file.direction_schema import direction_finding, open_direction_file
from mechinterp.circuit_file.store import SUFFIX


def package_folders() -> tuple[Path, Path]:
    """Where the files of the package are: in the installed one, and in its source tree."""
    package = Path(str(resources.files("mechinterp")))
    return package / "_circuits", package.parent / "circuits"


def comes_with_the_package(path: Path) -> bool:
    """Whether a file is one of the package."""
    return any(path.resolve().is_relative_to(folder.resolve()) for folder in package_folders())


def stored_files(suffix: str = SUFFIX) -> dict[str, Path]:
    """The circuit files (or direction files) that come with the package, and those in ./out, by name."""
    found: dict[str, Path] = {}
    for folder in (*package_folders(), Path("out")):
        if folder.is_dir():
            for path in sorted(folder.rglob(f"*{suffix}")):
                found.setdefault(path.name.removesuffix(suffix), path)
    return found


def find_file(file: str | Path) -> Path:
    """The path of a circuit or direction file that is given by path, or by name if it is a stored one.

    Raises InputError for a name (no path, no ending) of no stored file, with the nearest one, or those of a task.
    """
    if file == "":
        raise InputError("The name of the file is empty; give a path, or the name of a stored circuit.")
    if isinstance(file, Path) or exists(file):
        return Path(file)
    stored = {**stored_files(DIRECTION_SUFFIX), **stored_files()}
    if file in stored:
        return stored[file]
    if Path(file).name == file and not Path(file).suffix and file not in ("", ".", ".."):
        raise _unknown_name(file, stored)
    return Path(file)


def _unknown_name(file: str, stored: Iterable[str]) -> InputError:
    """The error for a name of no stored file: for a task, or the beginning of names, with the files that are meant."""
    of_task, begun = (sorted(name for name in stored if name.startswith(start)) for start in (f"{file}-", file))
    own = (of_task or begun)[:MOST_SHOWN]
    if not own:
        return unknown("circuit", file, stored)
    nearest = " or ".join(filter(None, (", ".join(map(repr, own[:-1])), repr(own[-1]))))
    return InputError(f"Unknown circuit {file!r}. Did you mean {nearest}?")


def about_direction(path: Path) -> str:
    """One line on a direction file: its finding, or why it cannot be read."""
    try:
        document = open_direction_file(path).document
    except InputError as error:
        return f"cannot be read: {error}"
    return f"{direction_finding(document)} ({document.model.name}); {path}"


def about_file(path: Path) -> str:
    """One line on a circuit file: its finding, or why it cannot be read."""
    from mechinterp.circuit_file.store import open_circuit_file
    from mechinterp.circuit_file.summary import finding

    try:
        document = open_circuit_file(path).document
    except InputError as error:
        return f"cannot be read: {error}"
    return f"{finding(document)} ({document.model.name}); {path}"
