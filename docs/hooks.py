"""What MkDocs calls: notebooks become pages, formulas MathML, and marks such as `<!-- generated: command-line -->`
text made from the code itself.

So what the pages say of commands, methods, tasks, formats and the schema cannot drift from what the package does.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import tutorials
from formulas import typeset
from generated import GENERATED
from make_pictures import PICTURES
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

from mechinterp.circuit_file.schema import json_schema

MARK = re.compile(r"^<!-- (generated|picture): ([a-z-]+)(?: ([^ >]+))? -->$", re.MULTILINE)
SHIM, OWN_SHIM = "https://unpkg.com/iframe-worker/shim", "iframe-worker.js"
SCHEMA = "circuit-file/circuit-1.schema.json"


def on_files(files: Any, config: Any) -> Any:
    """Add the JSON Schema of circuit files to the site, and the notebooks with their pictures."""
    files.append(File.generated(config, SCHEMA, content=json.dumps(json_schema(), indent=1)))
    for path in tutorials.notebooks():
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=tutorials.page(path)))
        for picture in tutorials.pictures(path):
            files.append(File.generated(config, f"tutorials/{picture.name}", content=picture.content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is generated, or drawn, in the place of every mark. Raises KeyError for a mark that is unknown."""

    def made(found: re.Match[str]) -> str:
        kind, name, argument = found.groups()
        if kind == "picture":
            return f'<div class="wide">{PICTURES[name]()}</div>'
        return GENERATED[name](*([argument] if argument else []))

    return MARK.sub(made, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Typeset the formulas of a page."""
    return typeset(html)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Take the script for the search of a site that is opened as files from the site itself, not from elsewhere."""
    return output.replace(SHIM, get_relative_url(OWN_SHIM, page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for pages that are no Markdown (404.html)."""
    return output_content.replace(SHIM, OWN_SHIM)
