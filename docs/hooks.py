"""What MkDocs calls: marks such as `<!-- generated: command-line -->` become text made from the code itself.

So what the pages say of commands, methods, tasks, formats and the schema cannot drift from what the package does.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from generated import GENERATED
from make_pictures import PICTURES
from mkdocs.structure.files import File

from mechinterp.circuit_file.schema import json_schema

MARK = re.compile(r"^<!-- (generated|picture): ([a-z-]+)(?: ([^ >]+))? -->$", re.MULTILINE)
SCHEMA = "circuit-file/circuit-1.schema.json"


def on_files(files: Any, config: Any) -> Any:
    """Add the JSON Schema of circuit files to the site."""
    files.append(File.generated(config, SCHEMA, content=json.dumps(json_schema(), indent=1)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is generated, or drawn, in the place of every mark. Raises KeyError for a mark that is unknown."""

    def made(found: re.Match[str]) -> str:
        kind, name, argument = found.groups()
        if kind == "picture":
            return PICTURES[name]()
        return GENERATED[name](*([argument] if argument else []))

    return MARK.sub(made, markdown)
