"""The frame of every page: one style, one security policy by hashes, nothing that is fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources


def html_page(title: str, body: str, *, styles: Sequence[str] = (), script: str = "", data: str = "") -> str:
    """A page as text, with the style of all pages; it runs only this script and takes only these styles.

    Args:
        title: the title, as plain text.
        body: HTML, every text in it escaped.
        styles: further style sheets, and those of `<style>` elements in the body.
        script: the script; "": none can run.
        data: JSON for the script, safe inside a script element.
    """
    style = "\n".join((resource("page.css"), *(sheet for sheet in styles if sheet not in body)))
    hashes = " ".join(f"'{_hash(sheet)}'" for sheet in (style, *(sheet for sheet in styles if sheet in body)))
    scripts = f"'{_hash(script)}'" if script else "'none'"
    policy = f"default-src 'none'; style-src {hashes}; script-src {scripts}; base-uri 'none'; form-action 'none'"
    run = f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n' if script else ""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n{run}</body>\n</html>\n"
    )


def resource(name: str) -> str:
    """The text of a file in this folder."""
    return (resources.files("mechinterp.views.report") / name).read_text("utf-8")


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode("utf-8")).digest()).decode("ascii")
