"""`load_pairs` reads texts and ids from JSONL and CSV alike, and answers every malformed file with one clear error."""

import csv
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechinterp.base.errors import FormatError, InputError
from mechinterp.tasks.pair_files import load_pairs
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.source import FileSource

TEXTS = [
    {"clean": "When Mary and John went", "corrupt": "When Lisa and Paul went", "right": " Mary", "wrong": [" John"]},
    {"clean": "Then, Mark gave a", "corrupt": "Then, Anna gave a", "right": [" ring", " book"], "wrong": " to"},
]  # fmt: skip
IDS = [
    {"clean": [5, 6, 7], "corrupt": [5, 8, 7], "right": 9, "wrong": 10, "positions": {"name": 1}},
    {"clean": [5, 7], "corrupt": [6, 7], "right": [9, 11], "wrong": [10], "positions": {"name": 0}},
]  # fmt: skip


def write(folder: Path, rows: list[dict], kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return path
    names = list(rows[0])
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, names)
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items() if v is not None})
    path.write_text(out.getvalue())
    return path


@pytest.fixture(params=["jsonl", "csv"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_ids_are_taken_as_they_are(tmp_path, kind: str) -> None:
    path = write(tmp_path, IDS, kind)
    pairs = load_pairs(path)
    expected = Pairs(
        clean=[[5, 6, 7], [5, 7]],
        corrupt=[[5, 8, 7], [6, 7]],
        right=[[9], [9, 11]],
        wrong=[10, 10],
        positions={"name": [1, 0]},
    )
    assert pairs.digest() == expected.digest()
    assert pairs.clean_text is None and len(pairs.report) == 0
    assert pairs.source == FileSource(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), None)


def test_texts_are_encoded_as_the_tokenizer_does_it(tmp_path, kind: str, tokenizer) -> None:
    pairs = load_pairs(write(tmp_path, TEXTS, kind), tokenizer)
    for row, texts in enumerate(TEXTS):
        assert pairs.clean[row][pairs.mask[row]].tolist() == tokenizer(texts["clean"]).input_ids
        assert pairs.corrupt[row][pairs.mask[row]].tolist() == tokenizer(texts["corrupt"]).input_ids
    assert pairs.right is not None and pairs.clean_text == tuple(row["clean"] for row in TEXTS)
    assert pairs.right[0, 0] in pairs.clean[0]  # " Mary" is the Mary of the prompt
    assert (pairs.right >= 0).sum(1).tolist() == [1, 2]
    assert isinstance(pairs.source, FileSource)
    assert pairs.source.prepend_bos == (int(pairs.clean[0, 0]) == tokenizer.bos_token_id)


def test_answers_and_positions_are_optional(tmp_path, kind: str) -> None:
    pairs = load_pairs(write(tmp_path, [{k: row[k] for k in ("clean", "corrupt")} for row in IDS], kind))
    assert pairs.right is None and pairs.wrong is None and not pairs.positions


def test_rows_that_the_tokenizer_cannot_use_are_reported_or_refused(tmp_path, kind: str, bpe, caplog) -> None:
    longer = {**TEXTS[0], "corrupt": "When Lisa and Paul and Anna went"}
    split = {**TEXTS[0], "right": " Christopher"}
    path = write(tmp_path, [TEXTS[0], longer, TEXTS[1], split], kind)
    pairs = load_pairs(path, bpe)
    lines = [3, 5] if kind == "csv" else [2, 4]
    assert len(pairs) == 2
    assert [entry.what for entry in pairs.report.dropped] == [f"line {line}" for line in lines]
    assert "5 tokens clean, 7 corrupt" in pairs.report.dropped[0].why
    assert "' Christopher' is" in pairs.report.dropped[1].why and "2 of 4 rows dropped" in caplog.text
    with pytest.raises(FormatError, match=f"line {lines[0]}: 5 tokens clean"):
        load_pairs(path, bpe, strict=True)


def test_unknown_words_are_reported_not_read_as_unk(tmp_path, words) -> None:
    rows = [*TEXTS, {**TEXTS[0], "clean": "When Mary and Zaphod went"}, {**TEXTS[0], "wrong": " Zaphod"}]
    reasons = [entry.why for entry in load_pairs(write(tmp_path, rows, "jsonl"), words).report.dropped]
    assert reasons == [
        "clean has words that the tokenizer does not know",
        "the answer ' Zaphod' is not in the tokenizer's vocabulary",
    ]


def test_too_few_usable_rows_are_refused_with_the_reason(tmp_path, bpe) -> None:
    rows = [TEXTS[0], {**TEXTS[0], "corrupt": "When"}]
    with pytest.raises(FormatError, match=r"1 of 2 rows cannot be used \(line 2: 5 tokens clean, 1 corrupt\)"):
        load_pairs(write(tmp_path, rows, "jsonl"), bpe)


def test_doubled_bos_is_refused(tmp_path, bpe, bpe_with_bos) -> None:
    """The second silent error of reading IOI wrongly: the text holds BOS and the tokenizer adds it."""
    rows = [{k: f"<|endoftext|>{row[k]}" for k in ("clean", "corrupt")} for row in TEXTS]
    path = write(tmp_path, rows, "jsonl")
    assert load_pairs(path, bpe).clean[0, 0] == bpe.bos_token_id
    for options in ({"model_or_tokenizer": bpe_with_bos}, {"model_or_tokenizer": bpe, "prepend_bos": True}):
        with pytest.raises(FormatError, match="BOS token 0 twice"):
            load_pairs(path, **options)
    assert torch.equal(load_pairs(path, bpe_with_bos, prepend_bos=False).clean, load_pairs(path, bpe).clean)


def test_prompts_that_hold_their_answers_are_refused(tmp_path, bpe, caplog) -> None:
    """When nearly all do, the answers were not cut off; a single one is legitimate, and is said."""
    late = {**TEXTS[0], "clean": "When John and John went to Mary", "corrupt": "When Lisa and Paul went to Mary"}
    with pytest.raises(FormatError, match="2 of 2 clean prompts hold their right answer"):
        load_pairs(write(tmp_path, [late, late], "jsonl"), bpe)
    assert not caplog.messages
    pairs = load_pairs(write(tmp_path, [TEXTS[1], late], "jsonl"), bpe)
    assert "1 of 2 clean prompts hold their right answer" in caplog.text
    assert len(pairs) == 2 and len(pairs[1:]) == 1  # a batch of such a row alone is not asked again


def test_an_answer_without_its_space_is_pointed_out(tmp_path, bpe, words, caplog) -> None:
    rows = [{**row, "right": "Mary"} for row in TEXTS]
    path = write(tmp_path, rows, "jsonl")
    load_pairs(path, words)
    assert "space" not in caplog.text  # a word-level tokenizer sees no difference
    load_pairs(path, bpe)
    assert "2 answers have no space before them" in caplog.text


def test_texts_need_a_tokenizer(tmp_path) -> None:
    with pytest.raises(InputError, match="give load_pairs the model or its tokenizer"):
        load_pairs(write(tmp_path, TEXTS, "jsonl"))


def test_ids_outside_the_vocabulary_are_refused(tmp_path, words) -> None:
    rows = [{**IDS[0], "wrong": 10**6}, IDS[1]]
    with pytest.raises(FormatError, match="wrong holds token id 1000000"):
        load_pairs(write(tmp_path, rows, "jsonl"), words)


GOOD = json.dumps(IDS[0])


def bad(match: str, line: str):
    return pytest.param(line, match, id=match)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        bad("line 2 is not valid JSON", '{"clean": [1'),
        bad("NaN is not a JSON number", '{"clean": [1, NaN], "corrupt": [1, 2]}'),
        bad("Infinity is not a JSON number", '{"clean": [1], "corrupt": [2], "positions": {"a": -Infinity}}'),
        bad("expected a whole number .* got 1e\\+300", '{"clean": [1, 1e300], "corrupt": [1, 2]}'),
        bad("has more than 19 digits", '{"clean": [1, 1' + "0" * 40 + '], "corrupt": [1, 2]}'),
        bad("has more than 19 digits", '{"clean": [1, 1' + "0" * 5000 + '], "corrupt": [1, 2]}'),
        bad("got -1", '{"clean": [1, -1], "corrupt": [1, 2]}'),
        bad("got 1.0", '{"clean": [1, 1.0], "corrupt": [1, 2]}'),
        bad("got True", '{"clean": [1, true], "corrupt": [1, 2]}'),
        bad("got None", '{"clean": null, "corrupt": [1, 2]}'),
        bad("not empty; got ''", '{"clean": "", "corrupt": "a"}'),
        bad("not empty; got \\[\\]", '{"clean": [], "corrupt": []}'),
        bad("both be text or both be token ids", '{"clean": "a", "corrupt": [1]}'),
        bad("'corrupt' is missing", '{"clean": [1]}'),
        bad("Unknown column 'wright'. Did you mean 'right'", '{"clean": [1], "corrupt": [2], "wright": 3}'),
        bad("the key .clean. is given twice", '{"clean": [1], "clean": [1], "corrupt": [2]}'),
        bad("a row is an object; got list", "[1, 2]"),
        bad("wrong is given without right", '{"clean": [1], "corrupt": [2], "wrong": 3}'),
        bad("the list of answers is empty", '{"clean": [1], "corrupt": [2], "right": []}'),
        bad("must map names to token indices", '{"clean": [1], "corrupt": [2], "positions": [1]}'),
        bad("positions.name: expected a whole number .* got '1'", GOOD.replace('"name": 1', '"name": "1"')),
        bad("the position 'name' is 3, but there are 3 tokens", GOOD.replace('"name": 1', '"name": 3')),
        bad("every row needs the same positions", GOOD.replace('"name": 1', '"nome": 1')),
        bad("differ in having 'right'", '{"clean": [1], "corrupt": [2], "positions": {"name": 0}}'),
        bad("line 2: right and wrong share the token 9", GOOD.replace("10", "9")),
        bad("nested more than", "[" * 200_000),
    ],
)  # fmt: skip
def test_a_malformed_row_is_refused_with_its_line(tmp_path, line: str, match: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(FormatError, match=match):
        load_pairs(path)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b"", "holds 0 examples"),
        ("a.jsonl", GOOD.encode(), "holds 1 examples; pairs need at least two"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"clean,corrupt\n", "holds 0 examples"),
        ("a.csv", b"clean,clean\n1,2\n", "'clean' is given twice"),
        ("a.csv", b"clean,corrupt\na\n", "line 2: 1 cells, but 2 columns"),
        ("a.csv", b'clean,corrupt\n"a,b\n', "not valid CSV"),
        ("a.csv", b"clean,corupt\na,b\n", "Unknown column 'corupt'. Did you mean 'corrupt'"),
        ("a.csv", b'clean,corrupt,positions\na,b,"{1"\n', "positions is not valid JSON"),
        ("a.csv", b"clean,corrupt\n" + b"a" * 200_000 + b",b\n", "not valid CSV"),
        ("a.json", b"[]", "are read from .jsonl or .csv files; got '.json'"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=match):
        load_pairs(tmp_path / name)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        load_pairs("no/such/file.csv")


def test_a_file_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mechinterp.tasks.input_checks.MAX_PADDED", 5)
    with pytest.raises(FormatError, match="padded"):
        load_pairs(write(tmp_path, IDS, "jsonl"))
    monkeypatch.setattr("mechinterp.tasks.pair_files.MAX_BYTES", 10)
    with pytest.raises(FormatError, match="larger than"):
        load_pairs(write(tmp_path, IDS, "jsonl"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"clean": JSON, "corrupt": JSON}, optional={"right": JSON, "wrong": JSON, "positions": JSON, "other": JSON}
        ),
        max_size=4,
    ),
    kind=st.sampled_from(["jsonl", "csv"]),
    cut=st.integers(0, 400),
)
def test_any_rows_are_pairs_or_one_error(rows, kind: str, cut: int, tmp_path_factory, words) -> None:
    path = tmp_path_factory.mktemp("rows") / f"rows.{kind}"
    if kind == "jsonl":
        content = "\n".join(json.dumps(row) for row in rows)
    else:
        content = "clean,corrupt,right\n" + "\n".join(
            f"{json.dumps(row['clean'])},{json.dumps(row['corrupt'])},x" for row in rows
        )
    path.write_text(content[: max(cut, 1)], encoding="utf-8")
    try:
        assert len(load_pairs(path, words)) >= 2
    except FormatError:
        return


def test_a_line_separator_inside_a_string_is_no_line_end(tmp_path, bpe) -> None:
    rows = [{"clean": "a\u2028b", "corrupt": "b\u2028a"}] * 2
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert load_pairs(path, bpe).clean_text == ("a\u2028b",) * 2
