"""The documentation builds strictly, holds every public name, and its examples run as they stand there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from mkdocs.commands.build import build
from mkdocs.config import load_config

import mechinterp
from mechinterp import compare, pipeline
from mechinterp.circuit_file.formats.names import EXPORTS, IMPORTS
from mechinterp.cli import app as cli
from mechinterp.cli.app import app
from mechinterp.run_spec import resolved
from mechinterp.tasks.metric_names import METRICS
from tools.notebooks.compare import differences
from tools.pages.run import numbers, numbers_of, pictures_of, run

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NAMES = {path: path.relative_to(ROOT / "docs").as_posix() for path in PAGES}
COMMANDS: Any = typer.main.get_command(app)


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


RUNNABLE = [path for path in PAGES if blocks(path, "python")]


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNNABLE, ids=NAMES.get)
def test_the_python_of_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the files that the page shows; what it registers is forgotten afterwards.

    What it prints and draws has the numbers that the page shows: a `text` block after it, and the pictures.
    """
    for registry in (mechinterp.METHODS, METRICS, EXPORTS, IMPORTS):
        for names in ("_values", "_about"):
            monkeypatch.setattr(registry, names, dict(getattr(registry, names)))
    monkeypatch.chdir(tmp_path)
    for name, text in shown_files(path):
        Path(name).write_text(text, encoding="utf-8")
    found = run(path)
    moved = differences([[{"text": one.stored}] for one in found], [[{"text": one.now}] for one in found])
    assert not moved, f"python -m tools.pages {NAMES[path].removesuffix('.md')} stores what it shows now"


def test_every_analysis_and_method_has_a_result_and_a_picture() -> None:
    """With a caption and words for who cannot see it; pictures are light, and none is left over."""
    pictures = {picture for path in PAGES for picture in pictures_of(path)}
    drawn = {path.resolve() for path in (ROOT / "docs" / "pictures").rglob("*.svg")}
    assert drawn == {path for path in pictures if path.parent.parent.name == "pictures"}
    assert all(path.stat().st_size < 60_000 and numbers(path) for path in drawn)
    for path in PAGES:
        if path.parent.name not in ("analyses", "methods") or path.stem == "index":
            continue
        text = path.read_text(encoding="utf-8")
        shown = re.search(r"^!\[[^\]]{20,}\]\(\S+\)({ \.page })?\n\n[^\s`].{20,}$", text, re.MULTILINE)
        assert shown, f"{NAMES[path]} has no picture with words and a caption"
        result = r"^```text\n|<!-- generated: method-results|^\$ discover-circuit.*\n[^`]"
        assert re.search(result, text, re.MULTILINE), f"{NAMES[path]} shows no result"


def test_the_picture_of_a_method_is_of_its_row() -> None:
    """Its numbers are those of the stored row, so a row that is measured again cannot leave an old picture."""
    method_rows = of_the_docs("method_rows")
    assert set(method_rows.rows()) == set(mechinterp.METHODS)
    for name in method_rows.rows():
        if name != "weight-magnitude":  # drawn with random
            picture = ROOT / "docs" / "pictures" / "methods" / f"{name.replace('random', 'baselines')}.svg"
            assert not differences(
                [[{"text": numbers(picture)}]], [[{"text": numbers_of(method_rows.figure(name))}]]
            ), f"python -m tools.pages methods/{picture.stem} draws it again"


def shown_files(path: Path) -> list[tuple[str, str]]:
    """The files that a page shows, with their names: fences such as ```yaml title="mine.yaml"."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r'^```[a-z]+ title="([^"/]+)"\n(.*?)^```', text, re.DOTALL | re.MULTILINE)


SHOWN = [
    (path, line[2:])
    for path in PAGES
    for block in blocks(path, "console")
    for line in block.splitlines()
    if line.startswith("$ discover-circuit")
]


@pytest.mark.parametrize(("path", "line"), SHOWN, ids=[f"{NAMES[path]}: {line}" for path, line in SHOWN])
def test_a_command_that_is_shown_can_be_given(
    path: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It parses: the command, its arguments, options and settings exist. Nothing is run."""
    monkeypatch.chdir(tmp_path)
    for name, text in shown_files(path):
        Path(name).write_text(text, encoding="utf-8")
    words = shlex.split(line, comments=True)[1:]
    action = COMMANDS.main(words, prog_name="discover-circuit", standalone_mode=False)
    assert callable(action)
    if action.func is cli._do_run:
        pipeline._settings(resolved(pipeline.RunSpec(**action.args[0])))
    elif action.func is cli._do_compare:
        asked, methods = action.args[:2]
        compare._settings_by_method(pipeline.RunSpec(**asked), methods)


STORED = re.compile(r"ioi-bundled-(mattr|eap-ig)")
QUICK = [
    (path, block)
    for path in PAGES
    for block in blocks(path, "console")
    if re.match(rf"\$ discover-circuit (show|cite|validate) (\S*/)?{STORED.pattern}", block) and "\n" in block.strip()
]


@pytest.mark.slow
def test_the_output_that_is_shown_is_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of commands that only read a stored circuit; `discover-circuit run ioi` makes the first of them."""
    shown = [block.splitlines() for _, block in QUICK]
    given: list[list[str]] = []
    for lines in shown:
        words = shlex.split(lines[0])[2:]
        stored = [STORED.search(word) for word in words]
        given.append([found.group() if found else word for found, word in zip(stored, words, strict=True)])
    assert len(given) >= 3 and {"ioi-bundled-mattr", "ioi-bundled-eap-ig"} <= {
        word for words in given for word in words
    }
    monkeypatch.setenv("COLUMNS", "80")  # as on a terminal
    for lines, words in zip(shown, given, strict=True):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = cli.main(words)
        assert code == 0
        found = [line.rstrip() for line in out.getvalue().splitlines()]
        assert not [line for line in lines[1:] if line.rstrip() not in found and "…" not in line], lines[0]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built documentation, as by `mkdocs build --strict` in this process; with `--quiet` it overlooks warnings.

    mkdocs comes with the extra `docs`, and so with `dev`.
    """
    out = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(out))
        config.plugins.on_startup(command="build", dirty=False)
        try:
            build(config)
        finally:
            config.plugins.on_shutdown()
    return out


def of_the_docs(name: str) -> Any:
    """A module of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_become_markdown() -> None:
    """Doctests are code, lists are lists; `<` and `*` outside of code stay, and so do names of arguments."""
    as_markdown = of_the_docs("docstrings").as_markdown
    assert as_markdown("Args:\n    *a: one\n    **b: 2 * 3\n") == "Args:\n    *a: one\n    **b: 2 \\* 3"
    made = as_markdown("The <q> of `a<b>`:\n- 2 * 3\n\n>>> 1 + 1\n2\n\nEnd.")
    assert made == "The &lt;q> of `a<b>`:\n\n- 2 \\* 3\n\n\n```pycon\n>>> 1 + 1\n2\n```\n\nEnd."


def test_a_formula_becomes_mathml_and_a_wrong_one_is_an_error() -> None:
    """The converter itself draws an unknown command as its name, and leaves a missing part out."""
    formulas = of_the_docs("formulas")
    made = formulas.typeset('<p>of <span class="arithmatex">\\(x_k &lt; \\lVert y \\rVert\\)</span></p>')
    assert made.startswith('<p>of <math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert "<msub><mi>x</mi><mi>k</mi></msub>" in made and "&#x0003C;" in made
    assert made.count('<mo stretchy="false">&#x02016;</mo>') == 2
    with pytest.raises(ValueError, match=r"Unknown LaTeX command .*nosuch"):
        formulas.as_mathml(r"\nosuch x", "block")
    with pytest.raises(ValueError, match="mfrac needs 2 parts, and has 1"):
        formulas.as_mathml(r"\frac{1}", "block")


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    found = {name.rpartition(".")[2] for name in re.findall(r'<h3 id="(mechinterp\.[\w.]+)"', text)}
    assert not set(mechinterp.__all__) - found


def test_every_command_is_in_the_reference(site: Path) -> None:
    text = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    assert set(COMMANDS.commands) <= set(re.findall(r'<h2 id="([a-z-]+)"', text))


def test_a_reader_fetches_nothing_from_elsewhere(site: Path) -> None:
    """Links go elsewhere, but no script, style, font or picture comes from there."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*>", text):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag) or 'rel="canonical"' in tag, (
                f"{page.name}: {tag}"
            )


def test_nothing_is_left_unmade(site: Path) -> None:
    """No mark, no formula: each `$$` pair of a page's text is a block of MathML."""
    formulas = 0
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<!-- generated" not in text and "arithmatex" not in text, page.name
        source = ROOT / "docs" / page.relative_to(site).with_suffix(".md")
        if source.exists():
            written = source.read_text(encoding="utf-8").count("$$")
            assert text.count('display="block"') * 2 == written, page.name
            formulas += written // 2
    assert formulas >= 30


def test_the_notebooks_are_pages_with_their_pictures(site: Path) -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = (site / "tutorials" / f"{path.stem}.html").read_text(encoding="utf-8")
        drawn = re.findall(r'<img [^>]*src="([^"]+)"', text)
        assert len(drawn) == path.read_text(encoding="utf-8").count('"image/png"')
        assert all((site / "tutorials" / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
        assert ".ipynb)" not in text
