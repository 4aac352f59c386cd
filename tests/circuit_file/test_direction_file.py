"""Direction files: written, read, verified by measuring again; and what was changed in them is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError
from mechinterp.circuit_file.direction_schema import content_sha256, direction_finding, open_direction_file
from mechinterp.cli import app as cli
from mechinterp.direct import DirectSpec, command_of, discover_direction, sites_of

STORED = Path(__file__).parents[2] / "circuits" / "gendered_pronoun-bundled-mean-difference.direction.json"
SMALL: dict[str, Any] = dict(examples=16, validation_examples=8, test_examples=10, shuffles=2, position="end")


@pytest.fixture(scope="module")
def model() -> mi.HookManager:
    return mi.load_model("bundled")


@pytest.fixture(scope="module")
def made(model: mi.HookManager, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("directions")
    spec = DirectSpec("gendered_pronoun", layers="0,2,3", control_position="NAME", out=out, **SMALL)
    return discover_direction(spec, model=model).path


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    for path in made.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / made.name


def test_a_direction_that_does_no_more_than_a_random_one_is_called_so(made: Path) -> None:
    document = open_direction_file(made).document
    assert document.steering is not None

    def said(change: float) -> str:
        steering = document.steering.model_copy(update={"change": change, "random": (0.2, -0.9)})
        return direction_finding(document.model_copy(update={"steering": steering}))

    assert said(-0.48).endswith("by -0.48, random directions by up to 0.9: no more than one of these does")
    assert said(1.0).endswith("by 1, random directions by up to 0.9")


def changed(path: Path, change: Callable[[dict[str, Any]], None], *, forged: bool) -> None:
    """The file with a change; `forged`: with a hash that fits again."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    if forged:
        content["file_sha256"] = content_sha256(content)
    path.write_text(json.dumps(content), "utf-8")


def test_what_is_written_is_read_and_verifies(made: Path, model: mi.HookManager) -> None:
    document = open_direction_file(made).document
    direction = mi.load_direction(made)
    assert document.fit.classes == "answer" and document.without_direction == ("resid_pre.0",)
    assert direction.sha256 == document.direction_sha256 and str(direction.site) == document.site
    task = mi.load_task("gendered_pronoun")
    pairs = mi.orient_pairs(task.pairs(model, n=16), document.fit.positive)
    again = mi.find_direction(model, pairs, direction.site, "end")
    torch.testing.assert_close(again.read, direction.read)
    found = mi.verify_direction(made, model=model)
    assert found.ok, str(found)
    assert document.test.accuracy > 0.8 and document.steering is not None
    assert document.steering.change > 0 and len(document.steering.random) == 5


def test_one_changed_byte_of_the_numbers_is_found(copied: Path, model: mi.HookManager) -> None:
    tensors = next(copied.parent.glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(bytes(data))
    with pytest.raises(FormatError, match="not the file of numbers"):
        mi.load_direction(copied)
    found = mi.verify_direction(copied, model=model)
    assert [claim.name for claim in found.failed] == ["numbers"]
    assert cli.main(["verify", str(copied)]) == 1


FORGERIES: list[tuple[str, Callable[[dict[str, Any]], None], str]] = [
    ("accuracy", lambda c: c["test"].update(accuracy=0.3), "test.resid_pre"),
    ("shuffled", lambda c: c["scan"][0].update(shuffled=0.95), "shuffled"),
    ("gap", lambda c: c["test"].update(gap=9.0), "gap"),
    ("steering", lambda c: c["steering"].update(change=40.0), "steering.change"),
    ("random", lambda c: c["steering"].update(random=[0.0] * 5), "steering.random"),
    ("weights", lambda c: c["model"].update(weights_sha256="0" * 64), "model.weights_sha256"),
    ("method", lambda c: c["fit"].update(method="lda"), "fit.read"),
    ("position", lambda c: c["fit"].update(position="NAME"), "fit.read"),
    ("seed", lambda c: c["pairs"]["train"]["made_from"].update(seed=5), "pairs.train"),
    ("sha", lambda c: c.update(direction_sha256="1" * 64), "direction hash"),
    ("left out", lambda c: c.update(without_direction=[]), "sites without a direction"),
]


@pytest.mark.parametrize(("change", "claim"), [(c, n) for _, c, n in FORGERIES], ids=[name for name, _, _ in FORGERIES])
def test_a_forged_statement_fails_its_claim(
    change: Callable[[dict[str, Any]], None], claim: str, copied: Path, model: mi.HookManager
) -> None:
    changed(copied, change, forged=True)
    if claim == "sites without a direction":  # a site that is not stated is not tried
        assert mi.verify_direction(copied, model=model).ok
        return
    found = mi.verify_direction(copied, model=model)
    assert any(claim in failed.name for failed in found.failed), str(found)


def test_a_changed_file_is_refused(copied: Path, model: mi.HookManager) -> None:
    changed(copied, lambda c: c.update(title="another"), forged=False)
    with pytest.raises(FormatError, match="was changed after it was written"):
        mi.load_direction(copied)
    assert [claim.name for claim in mi.verify_direction(copied, model=model).failed] == ["file hash"]
    assert cli.main(["show", str(copied)]) == 2


HOSTILE: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda c: c.update(kind="circuit"), "kind is 'circuit'"),
    (lambda c: c.update(schema_version=True), "schema_version"),
    (lambda c: c.update(extra=1), "extra"),
    (lambda c: c.update(tensors="../other.direction.safetensors"), "tensors"),
    (lambda c: c["test"].update(accuracy=2.0), "accuracy"),
    (lambda c: c["test"].update(site="resid_pre.9"), "the direction at"),
    (lambda c: c["pairs"].pop("test"), "needs the pairs"),
    (lambda c: c["fit"].pop("positive"), "positive"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[message for _, message in HOSTILE])
def test_what_does_not_follow_the_schema_is_refused_in_one_line(
    change: Callable[[dict[str, Any]], None], message: str, copied: Path
) -> None:
    changed(copied, change, forged=True)
    with pytest.raises(FormatError, match=message) as error:
        open_direction_file(copied)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_stored_direction_verifies_and_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = STORED.name.removesuffix(".direction.json")
    assert cli.main(["verify", name]) == 0
    assert cli.main(["show", name]) == 0
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert "200 held-out prompts" in printed and "direction sha256" in printed
    assert "stored direction" in printed and name[:20] in printed


def test_the_command_writes_a_file_and_refuses_what_does_not_fit(
    tmp_path: Path, model: mi.HookManager, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = ["--examples", "8", "--validation-examples", "6", "--test-examples", "6"]
    given = ["direct", "gendered_pronoun", "--layers", "2", "--method", "lda", "--out", str(tmp_path), *counts]
    assert cli.main(given) == 0
    path = tmp_path / "gendered_pronoun-bundled-lda.direction.json"
    assert "next: discover-circuit verify" in capsys.readouterr().out and path.is_file()
    for words, message in (
        (["--method", "ldaa"], "Did you mean 'lda'"),
        (["--layers", "x"], "--layers is 'all'"),
        (["--site", "resid_pre.2", "--layers", "2"], "--layers goes with a kind"),
        (["--site", "resid_pree"], "resid_pre"),
        (["--position", "NAMES"], "NAME"),
        (["--classes", "answers"], "answer"),
    ):
        assert cli.main([*given, "--force", *words]) == 2
        assert message in capsys.readouterr().err
    command = command_of(DirectSpec("ioi", method="lda", control_position="S2", out=tmp_path))
    assert command == "discover-circuit direct ioi --method lda --control-position S2"
    with pytest.raises(InputError, match="same two answers"):
        discover_direction(DirectSpec("ioi", classes="answer", out=tmp_path, **SMALL), model=model)
    assert [str(site) for site in sites_of(model, "mlp_out", "1,2")] == ["mlp_out.1", "mlp_out.2"]


@pytest.mark.slow
def test_direct_takes_parameters_of_the_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are recorded, with the defaults of the others; the file verifies, and only the same command replaces it."""
    few = ["--examples", "16", "--validation-examples", "8", "--test-examples", "10", "--position", "end"]
    words = ["direct", "gendered_pronoun", "--method", "lda", "--layers", "2", *few, "--out", str(tmp_path), "-q"]
    assert cli.main([*words, "--set", "shrinkage=0.5"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    (path,) = tmp_path.glob("*.direction.json")
    assert "separates" in first and last == f"wrote {path}"
    document = open_direction_file(path).document
    assert document.fit.parameters == {"shrinkage": 0.5}
    assert document.provenance.command is not None and "--set shrinkage=0.5" in document.provenance.command
    assert mi.verify_direction(path).ok
    assert cli.main([*words, "--set", "shrinkage=0.4"]) == 2
    assert "is there already, made by: discover-circuit direct gendered_pronoun" in capsys.readouterr().err
    assert cli.main([*words, "--set", "shrinkage=x"]) == 2
    assert "shrinkage must be a number" in capsys.readouterr().err
