"""`python -m tools.pages [--check] [NAMES]`: runs the Python of the pages and stores what it prints and draws.

A name is the beginning of a page's path in docs/, such as `analyses/steering`. Pictures are drawn by Playwright, which
needs Chrome or Chromium. With `--check` the numbers are compared and nothing is stored; the tests do this, too.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from mechinterp.base.atomic_write import write_whole
from tools.notebooks.cells import working_in
from tools.notebooks.compare import differences
from tools.pages.draw import Draw, drawing
from tools.pages.run import DOCS, Result, pages, run


def main(arguments: list[str]) -> int:
    """Prints one line for each page with results. Exit code 1 with `--check` if one has other numbers."""
    parser = argparse.ArgumentParser(prog="python -m tools.pages", description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of paths in docs/; none: all")
    parser.add_argument("--check", action="store_true", help="compare with what is stored, and store nothing")
    asked = parser.parse_args(arguments)
    names = {path: path.relative_to(DOCS).as_posix() for path in pages()}
    chosen = [path for path, name in names.items() if not asked.names or name.startswith(tuple(asked.names))]
    if not chosen:
        print(f"No page begins with {' or '.join(asked.names)}; there are: {', '.join(names.values())}")
        return 1
    if asked.check:
        return max(_one(path, names[path], None) for path in chosen)
    with drawing() as draw:
        return max(_one(path, names[path], draw) for path in chosen)


def _one(path: Path, name: str, draw: Draw | None) -> int:
    with TemporaryDirectory() as folder, working_in(Path(folder)):
        found = run(path)
    if not found:
        return 0
    moved = differences([[{"text": one.stored}] for one in found], [[{"text": one.now}] for one in found])
    if draw is None:
        print(f"{name}:", "the same numbers" if not moved else "other numbers", *moved, sep="\n  ")
        return int(bool(moved))
    store(path, found, draw)
    print(f"{name}: {len(found)} results", *moved, sep="\n  ")
    return 0


def store(path: Path, found: list[Result], draw: Draw) -> None:
    """Write the page with these printed results, and its pictures."""
    text = path.read_text(encoding="utf-8")
    for one in reversed(found):
        if one.picture is not None:
            one.picture.parent.mkdir(parents=True, exist_ok=True)
            write_whole(one.picture, draw(one.figure, one.now).encode("utf-8"))
        elif differences([[{"text": one.stored}]], [[{"text": one.now}]]):  # else its line breaks and last digits stay
            text = text[: one.place[0]] + one.now + text[one.place[1] :]
    write_whole(path, text.encode("utf-8"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
