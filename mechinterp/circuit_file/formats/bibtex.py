r"""BibTeX for a circuit file: entries built field by field from what the file states.

LaTeX executes commands in a bibliography (`@preamble`, `\write18`, `\input`), so no text from a file is copied: of its
BibTeX only the plain fields of one entry are read, and every text is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata

from mechinterp.circuit_file.formats.node_link_graph import printable
from mechinterp.circuit_file.schema import CircuitFile

DISTRIBUTION = "mechinterp-circuits"
KINDS = ("article", "book", "inproceedings", "misc", "online", "phdthesis", "techreport", "unpublished")
FIELDS = (
    *("title", "author", "booktitle", "journal", "howpublished", "publisher", "school", "institution", "series"),
    *("volume", "number", "pages", "year", "month", "note", "doi", "eprint", "archiveprefix", "url"),
)
"""The fields that an entry can have, in the order of printing."""
_ENTRY = re.compile(r"\s*@([A-Za-z]{1,30})\s*\{\s*([^\s,{}]{1,200})\s*,(.*)\}\s*", re.DOTALL)
_FIELD = re.compile(r"\s*([A-Za-z]{1,30})\s*=\s*(?:(\{)|\"([^\"{}]*)\"|([0-9]{1,8}))")
_SIGNS = {"\\": "/", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", **{sign: f"\\{sign}" for sign in "&%$#_"}}


def citation_of(
    document: CircuitFile, *, author: str = "", year: str = "", url: str = "", packaged: bool = False
) -> str:
    """BibTeX entries for the paper (if the file names one), for the file with its hash, and for the software.

    The version of the software is the one that wrote the file, or the installed one if the file does not state it.

    Args:
        document: The file.
        author: Who made it, as BibTeX has it (`A and B`); of a file of the package its contributors.
        year: By default that of the file's `created_utc`, if it states one.
        url: Where it can be downloaded.
        packaged: Whether the file comes with the package, which is then where to get it.
    """
    made = document.provenance.versions.get("mechinterp")
    where = f" of the Python package {DISTRIBUTION} {metadata.version(DISTRIBUTION)}" if packaged else ""
    fields = {
        "title": f"{{{_closed(document.title)}}}",
        "author": author or ("{mechinterp contributors}" if packaged else ""),
        "howpublished": f"circuit file {document.id}.circuit.json{where}",
        "year": year or (document.created_utc or "")[:4],
        "url": url,
        "note": f"circuit sha256 {document.integrity.circuit_sha256}, status {document.status}",
    }
    software = {
        "title": "{mechinterp: find the circuit of a task in a transformer, write it to a file, and check it again}",
        "author": "{mechinterp contributors}",
        "version": made or metadata.version(DISTRIBUTION),
        "howpublished": f"Python package {DISTRIBUTION}",
    }
    entries = [_entry("misc", document.id, fields), _entry("misc", DISTRIBUTION, software)]
    return "\n\n".join([*_paper(document), *entries])


def _paper(document: CircuitFile) -> list[str]:
    """The entry of the paper: from the BibTeX in the file if that is one plain entry, else from its fields."""
    citation = document.citation
    if citation is None:
        return []
    read = None if citation.bibtex is None else read_entry(citation.bibtex)
    if read is not None:
        return [_entry(*read)]
    if citation.title is None:
        return []
    fields = {"title": citation.title, "author": " and ".join(citation.authors)}
    fields |= {"doi": citation.doi or "", "eprint": citation.arxiv or "", "url": citation.url or ""}
    return [_entry("article", f"{document.id}-paper", fields)]


def read_entry(text: str) -> tuple[str, str, dict[str, str]] | None:
    """(Kind, key, fields) of a text that is a single plain BibTeX entry with a title; None for anything else."""
    found = _ENTRY.fullmatch(text)
    if found is None or found[1].lower() not in KINDS:
        return None
    fields: dict[str, str] = {}
    rest = found[3]
    while rest.strip():
        field = _FIELD.match(rest)
        if field is None:
            return None
        end = field.end()
        if field[2]:
            end = _closing(rest, end)
            value = rest[field.end() : end - 1]
        else:
            value = field[3] or field[4] or ""
        fields[field[1].lower()] = value
        after = rest[end:].lstrip()
        if end < 0 or (after and not after.startswith(",")):
            return None
        rest = after[1:]
    return (found[1].lower(), found[2], fields) if fields.get("title") else None


def _closing(text: str, start: int) -> int:
    """The index after the closing brace that matches one opened before `start`; -1 if there is none."""
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return -1


def _entry(kind: str, key: str, fields: Mapping[str, str]) -> str:
    """The entry; unknown fields are left out, and every value is escaped."""
    order = (*FIELDS, "version")
    lines = [f"  {name} = {{{_tex(fields[name])}}}," for name in order if fields.get(name)]
    safe = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.:") else "-" for letter in key)
    return "\n".join([f"@{kind}{{{safe},", *lines, "}"])


def _tex(text: str) -> str:
    """The text escaped for use inside the braces of a field: balanced braces are kept, commands are not."""
    return "".join(_SIGNS.get(letter, letter) for letter in _closed(printable(text)))


def _closed(text: str) -> str:
    """The text, with parentheses instead of braces if these are not balanced."""
    depth = 0
    for letter in text:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth < 0:
            break
    return text if depth == 0 else text.replace("{", "(").replace("}", ")")
