"""GGUF files: the same logits as the weights in a folder, and one line for what is damaged, hostile or half read."""

from __future__ import annotations

import hashlib
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.base.errors import FormatError, InputError, MechInterpError, UnsupportedError
from mechinterp.cli.app import main
from mechinterp.models import gguf_header
from mechinterp.models.gguf_header import read_header
from tests.support.gguf_files import write_gguf
from tests.support.models_tiny import as_installed, huggingface

# transformers leaves these at its defaults, so the tiny models have them, too.
FIXED: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 1024, "n_layer": 2, "num_hidden_layers": 2},
    "gemma2": {"query_pre_attn_scalar": 256},
    "llama": {"attention_bias": False},
    "qwen2": {},
}
X = torch.tensor([[5, 6, 7, 9, 2, 4], [8, 1, 3, 3, 7, 6]])
WORDS = [*(chr(letter) for letter in range(33, 81)), "\u0120", "AB"]
"""50 words: '!' to 'P', the space in GPT-2's letters, and one of two letters."""


def module_of(name: str, **config: Any) -> Any:
    return huggingface(name, dtype=torch.float32, **{"num_hidden_layers": 2, **FIXED[name], **config})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", module_of("llama", num_hidden_layers=1), words=WORDS
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF without a tokenizer, to be damaged."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return write_gguf(path, module_of("llama", num_hidden_layers=1)).read_bytes()


def load(path: Path, **keywords: Any) -> mi.HookManager:
    return as_installed(mi.load_model)(str(path), **keywords)


# -- the same model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_logits_are_those_of_the_same_weights_in_a_folder(name: str, tmp_path: Path) -> None:
    module = module_of(name)
    module.save_pretrained(tmp_path / "folder")
    folder = load(tmp_path / "folder")
    opened = load(write_gguf(tmp_path / "m.gguf", module, words=WORDS))
    # A GGUF keeps the norm's epsilon and the rotary base in float32.
    torch.testing.assert_close(opened.run(X).logits, folder.run(X).logits, rtol=1e-5, atol=1e-5)
    if name != "gemma2":  # its norms are stored as w + 1, which rounds
        assert opened.info.weights_sha256() == folder.info.weights_sha256()
    assert opened.dims == folder.dims or name == "gpt2"


def test_a_quantised_file_is_dequantised_to_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    module = module_of("llama", hidden_size=32, intermediate_size=64)
    path = write_gguf(tmp_path / "m.gguf", module, type_name="Q8_0")
    opened = load(path, dtype="float64")
    assert opened.dtype == torch.float64
    assert opened.info.file is not None
    assert opened.info.file.stored == "dequantised from Q8_0; also F32"
    assert not hasattr(opened.bridge.original_model.config, "quantization_config")
    # Blocks of 32 weights with one scale: the largest error is half a step of 1/127 of the block's largest weight.
    for name, weight in module.named_parameters():
        got = dict(opened.bridge.original_model.named_parameters())
        found = next(value for key, value in got.items() if key.replace("_original_component.", "") == name)
        assert float((found - weight).detach().abs().max()) <= float(weight.detach().abs().max()) / 127
    pairs = mi.Pairs(clean=X, corrupt=X.flip(1), right=[1, 2], wrong=[3, 5])
    assert bool(mi.score_edges(opened, mi.build_graph(opened), pairs).values.isfinite().all())


def test_the_tokenizer_comes_from_the_file_and_nothing_beside_it_is_read(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(llama.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "adapter_config.json").write_text("{}")
    opened = load(path)
    ids = opened.tokenizer.encode("A ABC", add_special_tokens=False)
    assert opened.tokenizer.convert_ids_to_tokens(ids) == ["A", "\u0120", "AB", "C"]


def test_the_record_names_the_file_and_its_hash_and_no_absolute_path(llama: Path) -> None:
    from mechinterp.circuit_file.provenance import model_record

    opened = load(llama)
    record = model_record(opened)
    assert (opened.info.origin, opened.info.name) == ("file", str(llama))
    assert record.name == "tiny.gguf" and record.file is not None
    assert record.file.sha256 == hashlib.sha256(llama.read_bytes()).hexdigest()
    assert record.file.types == ("F32",)


@pytest.mark.slow
def test_a_run_and_verify_of_its_file(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = load(llama)
    pairs = mi.Pairs(clean=X, corrupt=X.flip(1), right=[1, 2], wrong=[3, 5])
    circuit = mi.select(mi.build_graph(opened), mi.score_edges(opened, mi.build_graph(opened), pairs), edges=10)
    path = tmp_path / "c.circuit.json"
    mi.save_circuit(path, circuit, model=opened, result=mi.evaluate(opened, circuit, pairs))
    assert main(["verify", str(path)]) == 3  # not found: what needs no model holds
    assert "tiny.gguf" in (said := capsys.readouterr()).err + said.out
    assert main(["verify", str(path), "--model", str(llama)]) == 0
    (tmp_path / "tiny.gguf").write_bytes(llama.read_bytes())
    assert main(["verify", str(path)]) == 0  # beside the circuit file
    other = write_gguf(tmp_path / "tiny.gguf", module_of("llama", num_hidden_layers=1, seed=5), words=WORDS)
    assert main(["verify", str(path)]) == 1, other


# -- what transformers would not read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llama.rope.scaling.type": "linear"}, "rope.scaling.type = 'linear'"),
        ({"llama.rope.scaling.factor": 8.0}, "does not read it"),
        ({"llama.attention.key_length": 8}, "has 4 there"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
        ({"llama.attention.sliding_window": 3}, "sliding_window"),
    ],
)
def test_a_setting_that_would_be_left_out_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load(write_gguf(tmp_path / "m.gguf", module_of("llama"), settings=settings))


def test_a_tensor_that_would_be_left_out_is_refused(tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": np.full(2, 8, np.float32)}
    with pytest.raises(UnsupportedError, match="scales rotary angles"):
        load(write_gguf(tmp_path / "m.gguf", module_of("llama"), extra=factors))
    biases = {"blk.0.attn_q.bias": np.ones(16, np.float32)}
    with pytest.raises(UnsupportedError, match="would not be the file's"):
        load(write_gguf(tmp_path / "m.gguf", module_of("llama"), extra=biases))


def test_missing_and_misshapen_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="weights"):
        load(write_gguf(tmp_path / "m.gguf", module_of("llama"), without=["blk.1.ffn_up.weight"]))
    swapped = {"blk.0.ffn_up.weight": np.ones((16, 32), np.float32)}
    with pytest.raises(InputError, match="shapes differ"):
        load(write_gguf(tmp_path / "m.gguf", module_of("llama"), extra=swapped))


def test_a_family_that_transformers_does_not_know_is_one_line(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", module_of("llama"))
    path.write_bytes(path.read_bytes().replace(b"llama", b"lamma"))
    with pytest.raises(InputError, match=r"^Cannot load the GGUF file .*'lamma'.*\.$"):
        load(path)


def test_without_the_gguf_package_the_message_says_what_to_install(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mechinterp-circuits\[gguf\]'"):
        load(llama)


def test_names_and_options_that_do_not_fit(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no GGUF file"):
        load(tmp_path / "none.gguf")
    with pytest.raises(InputError, match="`revision` belongs to a hub id"):
        load(llama, revision="main")
    with pytest.raises(InputError, match="encoder"):
        as_installed(mi.load_encoder)(str(llama))


# -- hostile headers ---------------------------------------------------------------------------------------------------


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> bytes:
    return u64(len(value.encode())) + value.encode()


def header(*settings: bytes, n_settings: int | None = None, n_tensors: int = 1, version: int = 3) -> bytes:
    named = text("general.architecture") + u32(8) + text("llama")
    count = len(settings) + 1 if n_settings is None else n_settings
    return b"GGUF" + u32(version) + u64(n_tensors) + u64(count) + named + b"".join(settings)


def tensor(name: str = "a", shape: tuple[int, ...] = (4,), kind: int = 0, start: int = 0) -> bytes:
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(start)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF"),
    "other magic": (b"PK\x03\x04" + bytes(100), "not a GGUF"),
    "only magic": (b"GGUF", "cut off"),
    "version 1": (header(version=1), "version 1"),
    "big endian": (header(version=3 << 24), "big-endian"),
    "many tensors": (header(n_tensors=2**63), "tensors"),
    "no tensors": (header(n_tensors=0), "tensors"),
    "many settings": (header(n_settings=2**60), "settings follow"),
    "long string": (header(text("a") + u32(8) + u64(2**62)), "bytes; the most"),
    "long name": (header(u64(2**40)), "name of a setting"),
    "long array": (header(text("a") + u32(9) + u32(4) + u64(2**61)), "follow"),
    "array of strings": (header(text("a") + u32(9) + u32(8) + u64(2**50)), "follow"),
    "nested arrays": (header(text("a") + u32(9) + u32(9) + u64(1)), "array of type 9"),
    "unknown type": (header(text("a") + u32(77)), "type 77"),
    "twice": (header(*[text("a") + u32(4) + u32(1)] * 2) + tensor(), "twice"),
    "not UTF-8": (header(u64(1) + b"\xff" + u32(4) + u32(0)), "UTF-8"),
    "alignment 0": (header(text("general.alignment") + u32(4) + u32(0)) + tensor(), "alignment"),
    "alignment 12": (header(text("general.alignment") + u32(4) + u32(12)) + tensor(), "alignment"),
    "many axes": (header() + text("a") + u32(2**31) + bytes(64), "axes"),
    "huge shape": (header() + tensor(shape=(2**30, 2**30, 2**30)) + bytes(64), "cut off: its tensors need"),
    "zero shape": (header() + tensor(shape=(0, 4)), "shape"),
    "unknown tensor type": (header() + tensor(kind=4) + bytes(64), "type 4"),
    "half a block": (header() + tensor(shape=(33,), kind=3) + bytes(64), "blocks of 32"),
    "far away": (header() + tensor(start=2**60) + bytes(64), "cut off"),
    "not aligned": (header() + tensor(start=5) + bytes(64), "alignment"),
    "overlap": (header(n_tensors=2) + tensor("a") + tensor("b") + bytes(96), "overlap"),
    "same tensor": (header(n_tensors=2) + tensor() + tensor(start=32) + bytes(96), "twice"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_line_and_quick(name: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[name][0])
    begin = time.process_time()
    with pytest.raises(FormatError, match=HOSTILE[name][1]) as error:
        load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert time.process_time() - begin < 2


def test_a_file_cut_off_anywhere_is_one_line(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for size in (*range(0, 600, 7), len(small) // 2, len(small) - 33):
        path.write_bytes(small[:size])
        with pytest.raises(FormatError, match=r"cut off|not a GGUF|too short"):
            load(path)


def test_a_byte_changed_anywhere_in_the_header_never_ends_in_a_traceback(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    generator = torch.Generator().manual_seed(0)
    for at in torch.randperm(900, generator=generator)[:60].tolist():
        changed = bytearray(small)
        changed[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        path.write_bytes(bytes(changed))
        try:
            load(path)
        except MechInterpError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_count", 2**31, "layers"),
        ("block_count", 3, "layers"),
        ("context_length", 2**31, "at most"),
        ("feed_forward_length", 2**30, "weights"),
        ("vocab_size", 2**30, "weights"),
        ("attention.head_count", 2**20, "weights|Cannot load"),
        ("embedding_length", 2**30, "weights|Cannot load"),
        ("rope.dimension_count", 2**30, "weights|Cannot load"),
    ],
)
def test_sizes_that_the_tensors_do_not_have_allocate_nothing(
    name: str, value: int, message: str, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "m.gguf", module_of("llama", num_hidden_layers=1), settings={f"llama.{name}": value})
    with pytest.raises(MechInterpError, match=message):
        load(path)


def test_the_number_of_values_is_bounded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_ENTRIES", 40)
    with pytest.raises(FormatError, match="the most that"):
        read_header(llama)
    monkeypatch.undo()
    monkeypatch.setattr(gguf_header, "MAX_HEADER", 500)
    with pytest.raises(FormatError, match="header of more than 500 bytes"):
        read_header(llama)


def test_the_command_line_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    assert main(["run", "ioi", "--model", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert "is GGUF version 0" in said and said.count("\n") <= 2


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("no named pipes")
    import os

    os.mkfifo(tmp_path / "p.gguf")
    with pytest.raises(InputError, match="no GGUF file"):
        load(tmp_path / "p.gguf")
