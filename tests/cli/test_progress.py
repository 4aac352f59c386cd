"""Progress without a terminal: a line every half minute, with the time that is left."""

from __future__ import annotations

import io

from rich.console import Console

from mechinterp.cli.progress_bars import _LogLines


def test_a_line_every_half_minute_says_how_long_it_takes() -> None:
    clock, out = [0.0], io.StringIO()
    lines = _LogLines(Console(file=out), lambda: clock[0])
    for second in range(0, 100, 10):
        clock[0] = float(second)
        lines.show("score the edges", second, 200)
    printed = out.getvalue().splitlines()
    assert len(printed) == 3
    assert printed[0] == "score the edges: 30 of 200 (15%), 0:30 so far, about 2:50 left"
    clock[0] = 125.0
    lines.show("faithfulness by size", 0, 10)
    assert out.getvalue().splitlines()[-1] == "faithfulness by size: 0 of 10 (0%), 0:00 so far"
