"""`--json`: one object on standard output, whose numbers are those of the file and of the Python functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mechinterp as mi
from mechinterp.cli import app as cli

STORED = Path(__file__).parents[2] / "circuits"


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = cli.main(list(words))
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


def test_show_has_every_edge_and_node(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = printed(capsys, "show", "ioi-bundled-mattr", "--json")
    file = json.loads((STORED / "ioi-bundled-mattr.circuit.json").read_text("utf-8"))
    assert code == 0 and found["kind"] == "circuit"
    assert found["edges"] == [{k: edge[k] for k in ("name", "score", "frequency")} for edge in file["edges"]]
    assert {node["name"] for node in found["nodes"]} == set(file["nodes"])
    assert found["evaluation"][0]["faithfulness"] == file["evaluation"][0]["faithfulness"]
    assert found["circuit_sha256"] == file["integrity"]["circuit_sha256"]


def test_diff_and_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    pair = ("ioi-bundled-mattr", "ioi-bundled-eap-ig")
    code, found = printed(capsys, "diff", *pair, "--json")
    expected = mi.diff_circuits(*pair)
    assert code == 1 and found["differs"] and found["kind"] == "difference"
    assert [row["jaccard"] for row in found["overlaps"]] == [row.jaccard for row in expected.overlaps()]
    assert {row["name"]: row["score_a"] for row in found["edges"]} == {e.name: e.score_a for e in expected.edges}
    assert printed(capsys, "diff", pair[0], pair[0], "--json")[0] == 0


def test_show_prints_roles_with_their_heads_and_compare_explains_its_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["show", "ioi-wang2022-heads", "--top", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    roles = json.loads((STORED / "ioi-wang2022-heads.circuit.json").read_text("utf-8"))["roles"]
    for role in roles.values():
        assert ", ".join(role["nodes"]) in shown
    few = ("--methods", "random", "--examples", "4", "--sizes", "0.5,1", "--out", str(tmp_path))
    assert cli.main(["compare", "ioi", *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    for column in ("CPR", "CMD", "log", "@80%", "fwd"):
        assert any(line.startswith(column) for line in lines)


def test_list_names_what_the_tables_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = printed(capsys, "list", "--json")
    assert code == 0 and {"ioi", "greater_than"} <= set(found["tasks"]) and "mattr" in found["methods"]
    assert "ioi-bundled-mattr" in found["stored_circuits"] and found["stored_directions"]


@pytest.mark.slow
def test_a_run_and_its_verification(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--method", "eap", "--examples", "20", "--edges", "60", "--no-roles", "--no-curve", "--out", str(tmp_path))
    code, found = printed(capsys, "run", "ioi", *small, "--json")
    assert code == 0 and found["kind"] == "run" and all(Path(path).is_file() for path in found["written"])
    code, checked = printed(capsys, "verify", found["file"], "--json")
    assert code == 0 and checked["passed"] and checked["model_available"] and len(checked["claims"]) > 5
    assert all(claim["ok"] for claim in checked["claims"])
    content = json.loads(Path(found["file"]).read_text("utf-8"))
    content["integrity"]["circuit_sha256"] = "0" * 64
    Path(found["file"]).write_text(json.dumps(content), "utf-8")
    assert cli.main(["show", found["file"], "--json"]) == 2 and not capsys.readouterr().out


def test_compare_gives_a_row_for_each_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--methods", "eap,random", "--examples", "4", "--sizes", "0.1,0.5,1", "--out", str(tmp_path))
    code, found = printed(capsys, "compare", "ioi", *few, "--json")
    assert code == 0 and {row["method"] for row in found["methods"]} == {"eap", "random"}
    assert Path(found["page"]).is_file()
