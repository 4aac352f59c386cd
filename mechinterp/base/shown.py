"""How results look in a notebook: small HTML tables. Imports no torch."""

from __future__ import annotations

import html
from collections.abc import Iterable


def facts_table(title: str, facts: Iterable[tuple[str, object]]) -> str:
    """An HTML table with a name and a value in each row, under a title.

    >>> facts_table("Run", [("logits", "[1, 3, 50]")])
    '<table><caption>Run</caption><tr><th>logits</th><td>[1, 3, 50]</td></tr></table>'
    """
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in facts)
    return f"<table><caption>{html.escape(title)}</caption>{rows}</table>"


class Shown:
    """A result that is printed as a short list of facts, in a notebook as a table; give `_facts`."""

    def _facts(self) -> Iterable[tuple[str, object]]:
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = ", ".join(f"{name} {value}" if name else str(value) for name, value in self._facts())
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        return facts_table(type(self).__name__, self._facts())
