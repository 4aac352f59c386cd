"""The stored notebooks as pages: prose, code, what it printed, tables, and pictures as files beside the page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "notebooks"


@dataclass(frozen=True)
class Picture:
    """A figure of a notebook: the name of its file, the heading it stands under, and its bytes."""

    name: str
    heading: str
    content: bytes


def notebooks() -> list[Path]:
    """All notebooks, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def page(path: Path) -> str:
    """The notebook as Markdown; links to other notebooks and to the documentation lead to their pages."""
    out: list[str] = []
    for cell in _cells(path):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            text = re.sub(r"\]\((\d\d_\w+)\.ipynb\)", r"](\1.md)", text)
            out.append(text.replace("](../docs/", "](../"))
            continue
        out.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            out.append(_output(path, cell, output))
    title, _, rest = "\n\n".join(out).partition("\n")
    link = (
        f"This page is [`notebooks/{path.name}`](../how-to/index.md#notebooks) with the outputs that are stored in it."
    )
    return f"{title}\n\n{link}\n{rest}\n"


def pictures(path: Path) -> Iterator[Picture]:
    """The figures of a notebook, in order."""
    heading = ""
    for cell in _cells(path):
        found = re.findall(r"^#+ (.*)$", "".join(cell["source"]), re.MULTILINE)
        if cell["cell_type"] == "markdown":
            heading = found[-1] if found else heading
            continue
        for output in cell["outputs"]:
            if "image/png" in output.get("data", {}):
                yield Picture(_picture_name(path, cell), heading, base64.b64decode(output["data"]["image/png"]))


def gallery() -> str:
    """Every picture of the notebooks, with the place where it is made."""
    out: list[str] = []
    for path in notebooks():
        shown = list(pictures(path))
        if not shown:
            continue
        title = "".join(_cells(path)[0]["source"]).partition("\n")[0].removeprefix("# ")
        out += [f"## {title}", "", f"From [{path.stem[:2]}](tutorials/{path.stem}.md).", ""]
        out += [f"**{one.heading}**\n\n![{one.heading}](tutorials/{one.name})\n" for one in shown]
    return "\n".join(out)


def _cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _picture_name(path: Path, cell: dict[str, Any]) -> str:
    return f"{path.stem[:2]}-{cell['id']}.png"


def _output(path: Path, cell: dict[str, Any], output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![What the code above draws]({_picture_name(path, cell)})"
    if "text/html" in data:
        table = re.sub(r"<style.*?</style>|\s*\n\s*", "", "".join(data["text/html"]), flags=re.DOTALL)
        return f'<div class="output">{table}</div>'
    return f"```text\n{''.join(data.get('text/plain') or output['text']).rstrip()}\n```"
