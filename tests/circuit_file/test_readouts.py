"""Circuits that explain a direction: their file names the direction's file, verifies with it, and with no other one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError
from mechinterp.circuit_file.schema import circuit_sha256
from mechinterp.circuit_file.store import file_sha256, open_circuit_file
from mechinterp.cli import app as cli
from mechinterp.direct import DirectSpec, discover_direction
from mechinterp.evaluation.direct_effects import direct_effects
from mechinterp.views.report.node_details import node_details

STORED = "gendered_pronoun-bundled-mean-difference"
SMALL: dict[str, Any] = dict(
    examples=12, validation_examples=12, test_examples=12, roles=False, resamples=0, curve=False, edges=20
)


@pytest.fixture(scope="module")
def model() -> mi.HookManager:
    return mi.load_model("bundled")


@pytest.fixture(scope="module")
def found(model: mi.HookManager, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a direction and a circuit that explains it."""
    out = tmp_path_factory.mktemp("readouts")
    few: dict[str, Any] = dict(examples=12, validation_examples=8, test_examples=8, shuffles=1, position="end")
    direction = discover_direction(DirectSpec("gendered_pronoun", layers="2", out=out, **few), model=model)
    spec = mi.RunSpec("gendered_pronoun", method="eap-ig", direction=str(direction.path), out=out, **SMALL)
    return mi.discover(spec).path


@pytest.fixture
def copied(found: Path, tmp_path: Path) -> Path:
    """A copy of all its files, that a test may change."""
    for path in found.parent.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / found.name


def forged(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The file with a change, and hashes that fit again."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")
    content["integrity"]["circuit_sha256"] = circuit_sha256(open_circuit_file(path).document)
    content["integrity"]["file_sha256"] = file_sha256(content)
    path.write_text(json.dumps(content), "utf-8")
    return path


def test_the_file_verifies_from_its_files_alone(found: Path, model: mi.HookManager) -> None:
    document = open_circuit_file(found).document
    record = document.readout
    assert document.schema_version == 2 and record is not None and record.site == "resid_pre.2"
    assert document.model.origin == "bundled" and document.model.dims.n_layers == model.dims.n_layers
    circuit = mi.load_circuit(found)
    assert circuit.graph.dims.n_layers == 2 and circuit.graph.dims.d_vocab_out == 2
    result = mi.verify(found, rescore=True)
    assert result.ok, str(result)
    # The pairs are the task's, made again and read at the direction's position, its positive class clean.
    assert all(entry.made_from.kind == "task" and entry.made_from.read_at == "end" for entry in document.pairs.values())
    assert not any(warning.name == "pairs not of the task" for warning in result.warnings)
    assert {"direction", "evaluation.faithfulness"} <= {claim.name for claim in result.claims}
    assert document.evaluation[0].metric.name == "direction"
    direction = mi.load_direction(found.parent / record.where.rpartition("/")[2])
    assert mi.verify(found, model=mi.read_direction(model, direction)).ok


def test_the_numbers_of_the_file_are_readings_of_the_direction(found: Path, model: mi.HookManager) -> None:
    """The full model's value is the mean reading of the prompts of the positive class, which the run made clean."""
    document = open_circuit_file(found).document
    assert document.readout is not None
    direction = mi.load_direction(found.parent / Path(document.readout.where).name)
    pairs = mi.load_task("gendered_pronoun").pairs(model, n=12, split="test")
    oriented = mi.orient_pairs(pairs, direction.about["positive"])
    at = oriented.positions["end"]
    values = model.run(oriented.clean, oriented.mask, record=["resid_pre.2"]).values["resid_pre.2"]
    reading = direction.reading(values)[torch.arange(len(pairs)), at].mean()
    assert document.evaluation[0].full_value == pytest.approx(float(reading), rel=1e-4)
    again = mi.reevaluate(found, examples=12).evaluation
    assert again.full_value == pytest.approx(document.evaluation[0].full_value, rel=1e-5)


def test_a_changed_byte_or_another_direction_fails(copied: Path, model: mi.HookManager) -> None:
    other = mi.load_direction(Path(mi.__file__).parents[1] / "circuits" / f"{STORED}.direction.json")
    refused = mi.verify(copied, direction=other, model=model)
    assert next(claim.name for claim in refused.failed) == "direction" and not refused.ok
    tensors = next(copied.parent.glob("*.direction.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(bytes(data))
    changed = mi.verify(copied, model=model)
    assert [claim.name for claim in changed.failed] == ["direction", "evaluation"], str(changed)
    assert "not the file of numbers" in changed.failed[0].detail
    assert cli.main(["verify", str(copied)]) == 1


def test_a_moved_direction_is_asked_for_and_can_be_given(copied: Path, model: mi.HookManager) -> None:
    stem = next(copied.parent.glob("*.direction.json"))
    away = copied.parent / "away"
    away.mkdir()
    for path in copied.parent.glob("*.direction.*"):
        path.rename(away / path.name)
    lost = forged(copied, lambda content: content["readout"].update(where="nowhere.direction.json"))
    assert "Give it: --direction FILE" in mi.verify(lost, model=model).failed[0].detail
    assert mi.verify(lost, model=model, direction=away / stem.name).ok
    forged(copied, lambda content: content["readout"].update(where="/etc/x.direction.json"))
    assert "outside the working folder" in mi.verify(copied, model=model).failed[0].detail


def test_what_does_not_fit_is_refused(found: Path, copied: Path, tmp_path: Path, model: mi.HookManager) -> None:
    with pytest.raises(FormatError, match="version is 2 if, and only if"):
        forged(copied, lambda content: content.update(schema_version=1))
    stored = mi.load_circuit("ioi-bundled-eap-ig")
    with pytest.raises(InputError, match="explains the logits, not a direction"):
        mi.verify("ioi-bundled-eap-ig", direction=STORED, model=model)
    with pytest.raises(InputError, match=r"NAME\.direction\.json"):
        mi.discover("gendered_pronoun", method="eap", direction="ioi-bundled-eap-ig", out=tmp_path, **SMALL)
    with pytest.raises(InputError, match="do not have the same two answers"):
        mi.discover("ioi", method="eap", direction=STORED, out=tmp_path, model=model, **SMALL)
    assert stored.graph.dims.n_layers == model.dims.n_layers
    with pytest.raises(FormatError, match=r"cannot be explained at 'resid_pre\.0'"):
        mi.load_circuit(forged(found_copy(found, tmp_path), lambda c: c["readout"].update(site="resid_pre.0")))


def found_copy(found: Path, folder: Path) -> Path:
    for path in found.parent.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder / found.name


def test_roles_are_on_the_reading(model: mi.HookManager, copied: Path) -> None:
    """Direct effects are the parts of the difference of the readings; roles by them are in the file, and verify."""
    path = next(copied.parent.glob("*.direction.json"))
    direction = mi.load_direction(path)
    readout, task = mi.read_direction(model, direction), mi.load_task("gendered_pronoun")
    oriented = mi.orient_pairs(task.pairs(model, n=12, split="train"), direction.about["positive"])
    pairs = direction.pairs(oriented)
    graph = mi.build_graph(readout)
    whole = mi.Circuit(graph, graph.possible, n_selected=graph.n_edges)
    roles = mi.measured_roles(readout, whole, pairs, pairs, metric="direction", n_patched=4)
    assert not roles.notes
    effects = direct_effects(readout, pairs, 5)
    at = oriented.positions["end"]

    def reading(tokens: torch.Tensor) -> float:
        values = model.run(tokens, oriented.mask, record=["resid_pre.2"]).values["resid_pre.2"]
        return float(direction.reading(values)[torch.arange(len(oriented)), at].mean())

    total = float(effects.mean().values.sum())
    assert total == pytest.approx(reading(oriented.clean) - reading(oriented.corrupt), abs=1e-5)
    written = {row["node"]: row["direct effect"] for row in roles.evidence.to_dict("records")}
    assert written == pytest.approx({node: float(effects.mean().at(node=node).values) for node in written}, abs=1e-6)
    # Nothing is between the last MLP and the reading, so what it writes is all that replacing it costs.
    (last,) = mi.activation_patching(readout, pairs, ["m1"], metric="direction").mean().values.flatten().tolist()
    assert written["m1"] == pytest.approx(last, abs=1e-5)
    options: dict[str, Any] = {**SMALL, "roles": True, "out": copied.parent}
    spec = mi.RunSpec("gendered_pronoun", method="eap-ig", direction=str(path), **options)
    made = mi.discover(spec)
    assert made.roles is not None and not made.roles.notes
    stated = {role.label: role for role in made.document.roles.values()}
    assert "m1" in stated["MLPs that write toward the reading"].nodes
    assert "the right answers" not in stated["MLPs that write toward the reading"].description
    measures = [entry.prediction.measure for entry in made.roles.predictions]
    assert any(isinstance(measure, mi.DirectEffect) for measure in measures)
    assert all(getattr(measure, "metric", "direction") == "direction" for measure in measures)
    result = mi.verify(made.path)
    assert result.ok, str(result)


def test_the_page_is_of_the_reading(copied: Path, model: mi.HookManager) -> None:
    """Its direct effects are on the reading, which has no tokens: a readout's two columns are no vocabulary."""
    made = mi.write_page(copied, model=model)
    assert made.notes == ("Written tokens are left out: the circuit explains the reading of a direction, not logits.",)
    page = made.path.read_text("utf-8")
    assert "reading of the direction, clean less corrupt prompt" in page and '"unit":"of the reading"' in page
    direction = mi.load_direction(next(copied.parent.glob("*.direction.json")))
    circuit, readout = mi.load_circuit(copied), mi.read_direction(model, direction)
    pairs = mi.load_task("gendered_pronoun").pairs(model, n=12, split="test")
    read = direction.pairs(mi.orient_pairs(pairs, direction.about["positive"]))
    details = node_details(readout, circuit, read, "evaluation")
    assert details.prompts and not any(prompt.written for prompt in details.prompts) and details.prompts[0].patterns
    effects = direct_effects(readout, read, 12).mean()
    assert details.direct == pytest.approx({n: float(effects.at(node=n).values) for n in details.direct}, abs=1e-6)
