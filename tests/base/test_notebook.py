"""Bars in a notebook: only there, only for what the user calls, and the result is the same."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers.utils import logging

import mechinterp as mi
from mechinterp.base import notebook
from mechinterp.base.progress import Progress, StageProgress, no_progress, no_stages


def counts(n: int, progress: Progress = no_progress) -> int:
    """Reports every step."""
    for i in range(n):
        progress(i + 1, n)
    return n


def stages(progress: StageProgress = no_stages) -> str:
    """Reports two stages."""
    progress("first", 1, 2)
    progress("second", 2, 2)
    return "done"


@pytest.mark.parametrize(("function", "arguments", "shown"), [(counts, (3,), "counts"), (stages, (), "second")])
def test_a_bar_is_drawn_and_removed(
    function: Any, arguments: Any, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = notebook.with_bar(function)
    assert drawn(*arguments) == function(*arguments) and capsys.readouterr().out.strip() == ""  # quick: no bar
    monkeypatch.setattr(notebook, "DELAY", 0)
    assert drawn(*arguments) == function(*arguments)
    assert shown in capsys.readouterr().out
    seen: list[Any] = []
    drawn(*arguments, progress=lambda *how: seen.append(how))
    assert len(seen) == (arguments[0] if arguments else 2) and shown not in capsys.readouterr().out


def test_functions_without_progress_stay_as_they_are() -> None:
    assert notebook.with_bar(mi.load_task) is mi.load_task and not notebook.in_notebook()


@pytest.mark.slow
def test_public_functions_draw_bars_in_a_kernel_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from mechinterp.evaluation.faithfulness import evaluate

    assert mi.evaluate is evaluate and isinstance(mi.Circuit, type)
    for name in ("evaluate", "Circuit"):
        monkeypatch.delitem(vars(mi), name)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=object))
    assert mi.evaluate is not evaluate and mi.evaluate.__wrapped__ is evaluate and isinstance(mi.Circuit, type)
    logging.enable_progress_bar()
    mi.load_model("bundled", dtype="float64")
    out, err = capfd.readouterr()
    assert "Loading weights" not in out + err
