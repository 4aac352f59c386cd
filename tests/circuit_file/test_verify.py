"""`verify`: a file that holds is said to hold, and every change of what it states is caught and named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError
from mechinterp.circuit_file.schema import circuit_sha256
from mechinterp.circuit_file.store import file_sha256, open_circuit_file
from mechinterp.circuit_file.verify.claims import UnverifiedModel
from mechinterp.cli import app as cli
from mechinterp.graphs.circuit import Circuit
from mechinterp.pipeline import RunSpec, discover
from mechinterp.tasks import task as task_module
from tests.support import models_tiny as tiny
from tests.support.words_model import save_words_model

IOI = Path(task_module.__file__).parent / "ioi.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a task file of one's own, and the circuit files of two runs on them."""
    folder = tmp_path_factory.mktemp("made")
    save_words_model(folder / "model")
    (folder / "mine.yaml").write_text(
        IOI.read_text("utf-8").replace("name: ioi", "name: mine").replace(" gave ", " handed ", 1), "utf-8"
    )
    for task in (str(folder / "mine.yaml"), "ioi"):
        sizes: dict[str, int] = {"examples": 12, "validation_examples": 12, "test_examples": 10, "resamples": 4}
        model = str(folder / "model")
        discover(RunSpec(task, model, method="eap-ig", edges=20, anyway=True, out=folder, **sizes))
    return folder


@pytest.fixture
def place(tmp_path: Path, made: Path) -> Path:
    """The circuit file of the run on the task file, in a copy of the folder that it states."""
    shutil.copytree(made, tmp_path / "copy")
    path = tmp_path / "copy" / "mine-model-eap-ig.circuit.json"
    here = str(tmp_path / "copy")
    edited(path, lambda content: content["model"].update(name=f"{here}/model"))
    return edited(path, lambda content: content["task"].update(path=f"{here}/mine.yaml"))


def edited(path: Path, change: Callable[[dict[str, Any]], None], *, sealed: bool = True) -> Path:
    """The file with its content changed, and its hashes made right again: what somebody would do on purpose."""
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")
    if sealed:
        content["integrity"]["circuit_sha256"] = circuit_sha256(open_circuit_file(path).document)
        content["integrity"]["file_sha256"] = file_sha256(content)
        path.write_text(json.dumps(content), "utf-8")
    return path


@pytest.mark.slow
def test_a_graph_without_edges_is_refused(place: Path) -> None:
    """What divides by it cannot fail later."""
    path = edited(place, lambda content: content["evaluation"][0].update(n_edges_graph=0), sealed=False)
    with pytest.raises(FormatError, match="n_edges_graph"):
        open_circuit_file(path)


def failed(path: Path, **options: Any) -> set[str]:
    """The names of the claims that fail."""
    found = mi.verify(path, **options)
    assert not found.ok
    assert all(str(claim) in str(found) for claim in found.failed)
    return {claim.name for claim in found.failed}


@pytest.mark.slow
def test_a_file_holds(place: Path) -> None:
    found = mi.verify(place, rescore=True)
    assert found.ok, str(found)
    assert found.notes == ("evaluation: none of the 10 prompts of 'evaluation' is among the 12 of 'discovery'.",)
    names = {claim.name for claim in found.claims}
    assert {"file hash", "circuit hash", "graph", "selection", "model.weights_sha256", "tokenizer", "task"} < names
    assert {"pairs.discovery", "pairs.evaluation", "evaluation.faithfulness", "curve.faithfulness"} < names
    assert {"scores again", "task file", "evaluation.random_faithfulness"} < names
    assert str(found).endswith("every claim holds")


def test_stages_are_reported(place: Path) -> None:
    """Of what takes long with the runs that are done, and those of all."""
    told: list[tuple[str, int, int]] = []
    mi.verify(place, progress=lambda *done: told.append(done))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["file", "model", "task", "evaluation", "curve"]
    for stage in ("evaluation", "curve"):
        steps = [(done, total) for name, done, total in told if name == stage]
        assert len({total for _, total in steps}) == 1 and steps[0][0] == 0 and steps[-1][0] == steps[-1][1] > 10


# -- one character -----------------------------------------------------------------------------------------------------


def test_one_character_of_an_edge(place: Path) -> None:
    text = place.read_text("utf-8")
    name = json.loads(text)["edges"][3]["name"]
    other = name.replace("h0", "h1") if "h0" in name else name.replace("h1", "h0") if "h1" in name else "m0->logits"
    place.write_text(text.replace(f'"{name}"', f'"{other}"', 1), "utf-8")
    assert {"file hash", "circuit hash"} <= failed(place)


@pytest.mark.slow
def test_one_digit_of_a_score(place: Path) -> None:
    edited(
        place, lambda content: content["edges"][3].update(score=content["edges"][3]["score"] * 1.00001), sealed=False
    )
    assert failed(place) == {"file hash", "scores of the edges"}


def test_one_bit_of_the_sidecar(place: Path) -> None:
    sidecar = place.with_name("mine-model-eap-ig.scores.safetensors")
    content = bytearray(sidecar.read_bytes())
    content[-5] ^= 1
    sidecar.write_bytes(bytes(content))
    assert failed(place) == {"sidecar"}


@pytest.mark.slow
def test_one_word_of_the_task_file(place: Path) -> None:
    task = place.with_name("mine.yaml")
    task.write_text(task.read_text("utf-8").replace(" went to ", " want to ", 1), "utf-8")
    assert failed(place) == {"task file"}


def test_one_word_of_the_package_s_task(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = tmp_path / "tasks"
    shutil.copytree(IOI.parent, changed)
    (changed / "ioi.yaml").write_text(IOI.read_text("utf-8").replace(" went to ", " want to "), "utf-8")
    monkeypatch.setattr(task_module, "_FOLDER", changed)
    assert "task" in failed(made / "ioi-model-eap-ig.circuit.json")


@pytest.mark.slow
def test_one_weight(place: Path) -> None:
    weights = place.parent / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors["transformer.h.0.mlp.c_fc.bias"][0] += 1e-7
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    assert "model.weights_sha256" in failed(place)


def test_one_word_of_the_tokenizer(place: Path) -> None:
    tokenizer = place.parent / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text("utf-8").replace('"Mary"', '"Marx"'), "utf-8")
    assert "tokenizer" in failed(place)


# -- a lie with right hashes -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "field",
    [
        *("circuit_value", "full_value", "empty_value", "faithfulness", "faithfulness_ci", "example_quartiles", "kl"),
        *("accuracy", "accuracy_full", "random_faithfulness"),
    ],
)
def test_a_better_number(place: Path, field: str) -> None:
    def better(content: dict[str, Any]) -> None:
        stated = content["evaluation"][0]
        value = stated[field]
        stated[field] = [value[0] + 0.01, *value[1:]] if isinstance(value, list) else value + 0.01

    assert failed(edited(place, better)) == {f"evaluation.{field}"}


@pytest.mark.slow
@pytest.mark.parametrize("field", ["n_examples", "n_edges", "n_edges_graph", "n_ratio"])
def test_another_count(place: Path, field: str) -> None:
    assert failed(edited(place, lambda c: c["evaluation"][0].update({field: c["evaluation"][0][field] + 1}))) == {
        f"evaluation.{field}"
    }


@pytest.mark.slow
def test_another_curve(place: Path) -> None:
    changed = edited(place, lambda c: c["curve"]["points"][1].update(faithfulness=0.95))
    assert failed(changed) == {"curve.faithfulness"}


@pytest.mark.slow
def test_an_edge_less(place: Path) -> None:
    def drop(content: dict[str, Any]) -> None:
        content["edges"].pop(0)
        content["selection"]["n_edges"] -= 1

    names = failed(edited(place, drop))
    assert "selection" in names and "evaluation.n_edges" in names


@pytest.mark.slow
def test_a_looser_tolerance(place: Path) -> None:
    def loosen(content: dict[str, Any]) -> None:
        content["evaluation"][0]["tolerance"] = {"relative": 0.1, "absolute": 0.1}
        content["evaluation"][0]["faithfulness"] += 0.01

    assert failed(edited(place, loosen)) == {"evaluation.tolerance", "evaluation.faithfulness"}


@pytest.mark.slow
def test_another_ablation_or_metric(place: Path) -> None:
    edited(place, lambda c: c["evaluation"][0]["ablation"].update(set="circuit"))
    edited(place, lambda c: c["evaluation"][0]["metric"].update(unit="nats"))
    assert failed(place) == {"evaluation.ablation", "evaluation.metric"}


@pytest.mark.slow
def test_other_scores(place: Path) -> None:
    """All scores doubled in both files, hashes right: only the discovery itself can tell."""
    sidecar = place.with_name("mine-model-eap-ig.scores.safetensors")
    graph = mi.load_circuit(place).graph
    table = 2 * safetensors.torch.load_file(sidecar)["scores"]
    content = safetensors.torch.save({"scores": table})
    sidecar.write_bytes(content)

    def double(document: dict[str, Any]) -> None:
        document["integrity"]["sidecar"]["sha256"] = hashlib.sha256(content).hexdigest()
        for edge in document["edges"]:
            edge["score"] = float(f"{float(table[graph.edge_index(edge['name'])]):.6g}")

    edited(place, double)
    assert mi.verify(place).ok
    assert failed(place, rescore=True) == {"scores again"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "claim"),
    [("seed", "pairs.evaluation"), ("split", "pairs.evaluation"), ("prepend_bos", "pairs.evaluation")],
)
def test_other_pairs(place: Path, part: str, claim: str) -> None:
    other = {"seed": 1, "split": "train", "prepend_bos": False}[part]
    names = failed(edited(place, lambda c: c["pairs"]["evaluation"]["made_from"].update({part: other})))
    assert {claim, "evaluation"} <= names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("attention", "sdpa"),
        ("architecture", "LlamaForCausalLM"),
        ("processing", "compatibility"),
        ("loader", "another"),
    ],
)
def test_another_model_record(place: Path, field: str, other: str) -> None:
    assert f"model.{field}" in failed(edited(place, lambda c: c["model"].update({field: other})))


@pytest.mark.slow
def test_another_dtype(place: Path) -> None:
    """The model is loaded in the dtype that the file states; its weights are then not those that it states."""
    assert "model.weights_sha256" in failed(edited(place, lambda c: c["model"].update(dtype="float64")))


@pytest.mark.slow
def test_another_target_for_the_size(place: Path) -> None:
    changed = {"rule": "smallest size whose faithfulness reaches the target", "target": 0.5, "pairs": "discovery"}
    assert mi.verify(place).ok
    edited(place, lambda c: c["selection"].update(size=changed))
    points = [p for p in json.loads(place.read_text("utf-8"))["curve"]["points"] if p["faithfulness"] >= 0.5]
    assert points and points[0]["n_selected"] != 20
    assert failed(place) == {"selection.size", "selection.size.pairs"}  # the curve is on the validation pairs


# -- what is not there -------------------------------------------------------------------------------------------------


def test_a_model_that_is_gone(place: Path) -> None:
    shutil.rmtree(place.parent / "model")
    names = failed(place)
    assert {"model", "pairs.evaluation", "evaluation"} <= names


@pytest.mark.slow
def test_a_model_beside_the_file_is_found(place: Path) -> None:
    edited(place, lambda c: c["model"].update(name="model"))
    assert mi.verify(place).ok


@pytest.mark.slow
def test_a_task_file_that_is_gone_is_a_note(place: Path) -> None:
    place.with_name("mine.yaml").unlink()
    found = mi.verify(place)
    assert found.ok and "is not beside the circuit file" in found.notes[0]


@pytest.mark.slow
def test_a_missing_sidecar_leaves_the_rest_to_be_checked(place: Path) -> None:
    place.with_name("mine-model-eap-ig.scores.safetensors").unlink()
    found = mi.verify(place)
    assert [claim.name for claim in found.failed] == ["sidecar"]
    assert "evaluation.faithfulness" in {claim.name for claim in found.claims}


@pytest.mark.slow
def test_other_versions_are_notes(place: Path) -> None:
    edited(place, lambda c: c["provenance"]["versions"].update(torch="1.0"))
    found = mi.verify(place)
    assert found.ok and any("torch" in note and "1.0" in note for note in found.notes)


def test_no_circuit_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.circuit.json").write_text("{}")
    with pytest.raises(FormatError):
        mi.verify(tmp_path / "a.circuit.json")


# -- models in memory --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Circuit, mi.HookManager]:
    model = tiny.build("llama", dtype=torch.float32)
    pairs = tiny.pairs(8, padded=True)
    circuit = mi.select(mi.build_graph(model), mi.score_edges(model, mi.build_graph(model), pairs), edges=80)
    path = tmp_path_factory.mktemp("memory") / "a.circuit.json"
    means = mi.evaluate(model, circuit, pairs[:5], replacement="mean", reference=pairs, metric="prob_diff")
    mi.save_circuit(path, circuit, model=model, result=[mi.evaluate(model, circuit, pairs), means])
    return path, circuit, model


def test_a_model_in_memory_is_not_available_later(
    in_memory: tuple[Path, Circuit, mi.HookManager], capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of the hub that cannot be reached: exit code 3, unless a claim that needs no model failed."""
    with pytest.raises(UnverifiedModel, match=r"claims that need no model hold.*give it: --model PATH, or verify"):
        mi.verify(in_memory[0])
    for command in ("verify", "eval"):
        assert cli.main([command, str(in_memory[0])]) == 3
        err = capsys.readouterr().err
        assert "--model PATH" in err and err.count("\n") == 1


def test_a_failed_claim_is_told_although_the_model_is_absent(
    in_memory: tuple[Path, Circuit, mi.HookManager], tmp_path: Path
) -> None:
    shutil.copytree(in_memory[0].parent, tmp_path / "copy")
    path = tmp_path / "copy" / in_memory[0].name
    assert {"file hash", "model"} <= failed(edited(path, lambda content: content.update(title="another"), sealed=False))


def test_token_ids_in_the_file_suffice(in_memory: tuple[Path, Circuit, mi.HookManager]) -> None:
    path, _, model = in_memory
    found = mi.verify(path, model=model, rescore=True)
    assert found.ok, str(found)
    assert {"evaluation[0].kl", "evaluation[1].kl"} < {claim.name for claim in found.claims}


def test_another_model_is_told(in_memory: tuple[Path, Circuit, mi.HookManager]) -> None:
    other = tiny.build("llama", dtype=torch.float32, seed=1)
    names = failed(in_memory[0], model=other)
    assert {"model.weights_sha256", "evaluation[0].circuit_value"} <= names
    assert "model.dims" in failed(in_memory[0], model=tiny.tiny("gpt2"))


def test_a_changed_token_id_is_told(in_memory: tuple[Path, Circuit, mi.HookManager], tmp_path: Path) -> None:
    shutil.copytree(in_memory[0].parent, tmp_path / "copy")
    path = tmp_path / "copy" / "a.circuit.json"

    def change(content: dict[str, Any]) -> None:
        row = content["pairs"]["discovery"]["made_from"]["clean"][0]
        row[0] = row[0] % 40 + 1

    assert {"pairs.discovery", "evaluation[0]"} <= failed(edited(path, change), model=in_memory[2])


def test_a_tolerance_of_one_s_own(in_memory: tuple[Path, Circuit, mi.HookManager], tmp_path: Path) -> None:
    shutil.copytree(in_memory[0].parent, tmp_path / "copy")
    path = edited(
        tmp_path / "copy" / "a.circuit.json", lambda c: c["evaluation"][0].update(kl=c["evaluation"][0]["kl"] * 1.01)
    )
    assert failed(path, model=in_memory[2]) == {"evaluation[0].kl"}
    assert mi.verify(path, model=in_memory[2], tolerance=0.05).ok
    with pytest.raises(InputError, match="tolerance must be"):
        mi.verify(path, tolerance=2.0)
