"""`Pairs` accepts every way to write the same examples, keeps one form of them, and refuses the rest."""

import copy
import math
import pickle
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from mechinterp.base.errors import InputError
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.source import FileSource, source_record

CLEAN = [[5, 6, 7, 8], [5, 9], [4, 4, 4]]
CORRUPT = [[5, 1, 7, 8], [5, 1], [4, 4, 2]]


def some_pairs(**changes) -> Pairs:
    given = {
        "clean": CLEAN,
        "corrupt": CORRUPT,
        "right": [[10, 11], [12], [13]],
        "wrong": [14, 15, 16],
        "positions": {"first": [0, 0, 0], "second": [1, 1, 2]},
        "answer_pos": [[3, 1], [1, -1], [2, -1]],
    }
    return Pairs(**{**given, **changes})


def test_canonical_form() -> None:
    pairs = some_pairs()
    assert len(pairs) == 3
    assert pairs.clean.tolist() == [[5, 6, 7, 8], [5, 9, 0, 0], [4, 4, 4, 0]]
    assert pairs.mask.sum(1).tolist() == pairs.lengths.tolist() == [4, 2, 3]
    assert pairs.right is not None and pairs.right.tolist() == [[10, 11], [12, -1], [13, -1]]
    assert pairs.wrong is not None and pairs.wrong.tolist() == [[14], [15], [16]]


def test_answer_position_is_the_last_real_token_by_default() -> None:
    assert some_pairs(answer_pos=None).answer_pos.tolist() == [[3], [1], [2]]


@st.composite
def padded(draw):
    """The same examples written into a wider table, each row's run at a place of its own."""
    width = draw(st.integers(4, 8))
    starts = [draw(st.integers(0, width - len(row))) for row in CLEAN]
    fill = draw(st.integers(-3, 20))
    clean, corrupt = torch.full((3, width), fill), torch.full((3, width), fill)
    mask = torch.zeros(3, width, dtype=torch.bool)
    for row, start in enumerate(starts):
        run = slice(start, start + len(CLEAN[row]))
        clean[row, run], corrupt[row, run] = torch.tensor(CLEAN[row]), torch.tensor(CORRUPT[row])
        mask[row, run] = True
    return clean, corrupt, mask, torch.tensor(starts)


@pytest.mark.slow
@given(padded())
def test_padding_may_be_anywhere_and_positions_move_with_it(table) -> None:
    clean, corrupt, mask, starts = table
    expected = some_pairs()
    moved = some_pairs(
        clean=clean,
        corrupt=corrupt,
        mask=mask,
        positions={name: at + starts for name, at in expected.positions.items()},
        answer_pos=torch.where(expected.answer_pos < 0, -1, expected.answer_pos + starts[:, None]),
    )
    assert moved.digest() == expected.digest()
    assert torch.equal(moved.clean, expected.clean) and torch.equal(moved.mask, expected.mask)
    assert torch.equal(moved.answer_pos, expected.answer_pos)


def test_lists_arrays_and_tensors_are_the_same() -> None:
    clean, corrupt = [[1, 2], [3, 4]], [[1, 5], [3, 5]]
    made = [
        Pairs(clean=kind(clean), corrupt=kind(corrupt), right=kind([7, 8]))
        for kind in (list, np.array, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32))
    ]
    assert len({pairs.digest() for pairs in made}) == 1
    assert all(pairs.clean.dtype == torch.int64 for pairs in made)


def bad(match: str, **changes):
    return pytest.param(changes, match, id=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        bad("equal shapes", corrupt=torch.zeros(3, 5, dtype=torch.int64)),
        bad("differ in length at row 1", corrupt=[[5, 1, 7, 8], [5, 1, 1], [4, 4]]),
        bad("at least two examples", clean=[[1, 2]], corrupt=[[1, 3]]),
        bad("negative token id -1", clean=[[5, 6, 7, 8], [5, -1], [4, 4, 4]]),
        bad("negative token id -2", clean=torch.tensor([[1, -2], [1, 1], [1, 1]]), corrupt=[[1, 1]] * 3),
        bad("clean must hold whole numbers; got nan", clean=[[5, 6, 7, math.nan], [5, 9], [4, 4, 4]]),
        bad("clean must hold whole numbers; got 5.0", clean=[[5.0, 6, 7, 8], [5, 9], [4, 4, 4]]),
        bad("clean must hold whole numbers; got True", clean=[[True, 6, 7, 8], [5, 9], [4, 4, 4]]),
        bad("clean must hold whole numbers; got '5'", clean=[["5", 6, 7, 8], [5, 9], [4, 4, 4]]),
        bad("whole numbers .*got torch.float32", clean=torch.ones(3, 4), corrupt=torch.ones(3, 4)),
        bad("is not a token id or position", clean=[[5, 6, 7, 10**30], [5, 9], [4, 4, 4]]),
        bad("is empty", clean=[], corrupt=[]),
        bad("mask has a hole in row 0", clean=[[1, 2, 3]] * 3, corrupt=[[1, 2, 4]] * 3, mask=[[1, 0, 1]] * 3),
        bad("Row 1 has no real token", clean=[[1, 2]] * 3, corrupt=[[1, 3]] * 3, mask=[[1, 1], [0, 0], [1, 1]]),
        bad("mask must be boolean", clean=[[1, 2]] * 3, corrupt=[[1, 3]] * 3, mask=[[1, 2]] * 3),
        bad("mask must have the shape", clean=[[1, 2]] * 3, corrupt=[[1, 3]] * 3, mask=[[1, 1, 1]] * 3),
        bad("right and wrong must differ; row 0", wrong=[11, 15, 16]),
        bad("3 of 3 clean prompts hold their right answer at the answer position", right=[[8, 11], [9], [4]]),
        bad("wrong answers are given without right", right=None),
        bad("right must be .batch. or", right=[1, 2]),
        bad("right has no entry in row 1", right=[[10], [-1], [13]]),
        bad("right holds the same number twice in row 0", right=[[10, 10], [12], [13]]),
        bad("only -1 .* may be negative", wrong=[14, -5, 16]),
        bad("answer_pos of row 1 is 2, outside", answer_pos=[3, 2, 2]),
        bad("answer_pos has no entry in row 0", answer_pos=[-1, -1, -1]),
        bad(r"positions\['first'\] of row 1 is 3, outside the row's real tokens 0..1", positions={"first": [3, 3, 2]}),
        bad(r"positions\['first'\] is -1 in row 2", positions={"first": [0, 0, -1]}),
        bad(r"positions\['first'\] must be \[batch\]", positions={"first": [0, 0]}),
        bad("name must not be empty", positions={"": [0, 0, 0]}),
        bad("clean_text must be 3 strings", clean_text=["a"]),
    ],
)  # fmt: skip
def test_refusals(changes, match) -> None:
    with pytest.raises(InputError, match=match):
        some_pairs(**changes)


def test_a_set_of_answers_may_hold_the_last_token_by_chance_but_not_always() -> None:
    prompts = [[1, 17], [1, 20]]
    Pairs(clean=prompts, corrupt=prompts, right=[[16, 17, 18], [16, 17, 18]])
    with pytest.raises(InputError, match="position late"):
        Pairs(clean=prompts, corrupt=prompts, right=[[16, 17], [20, 21]])


def test_reading_before_the_answer_is_not_the_error_of_reading_it_late() -> None:
    prompts = [[1, 2, 9], [1, 3, 9]]
    assert len(Pairs(clean=prompts, corrupt=prompts, right=[9, 9], answer_pos=[1, 1])) == 2


@pytest.mark.slow
@given(st.data())
def test_digest_sees_any_single_change(data) -> None:
    pairs = some_pairs()
    tables = {
        "clean": [list(row) for row in CLEAN],
        "corrupt": [list(row) for row in CORRUPT],
        "right": [[10, 11], [12], [13]],
        "wrong": [[14], [15], [16]],
        "first": [[0], [0], [0]],
        "second": [[1], [1], [2]],
    }
    name = data.draw(st.sampled_from(sorted(tables)))
    row = data.draw(st.integers(0, 2))
    place = data.draw(st.integers(0, len(tables[name][row]) - 1))
    limit = len(CLEAN[row]) - 1 if name in ("first", "second") else 60
    value = data.draw(st.integers(0, limit).filter(lambda v: v != tables[name][row][place]))
    tables[name][row][place] = value
    try:
        changed = some_pairs(
            clean=tables["clean"],
            corrupt=tables["corrupt"],
            right=tables["right"],
            wrong=tables["wrong"],
            positions={key: [entry[0] for entry in tables[key]] for key in ("first", "second")},
        )
    except InputError:
        return
    assert changed.digest() != pairs.digest()


def test_digest_sees_what_is_absent_and_names() -> None:
    digests = [
        some_pairs().digest(),
        some_pairs(wrong=None).digest(),
        some_pairs(wrong=None, right=None).digest(),
        some_pairs(answer_pos=None).digest(),
        some_pairs(positions={}).digest(),
        some_pairs(positions={"first": [1, 1, 2], "second": [0, 0, 0]}).digest(),
    ]
    assert len(set(digests)) == len(digests)


def test_digest_is_the_published_one() -> None:
    """A stored circuit keeps this digest; if this test fails, every stored digest has become void."""
    pairs = Pairs(clean=[[1, 2], [3]], corrupt=[[1, 4], [5]], right=[6, 7], wrong=[8, 9], positions={"a": [1, 0]})
    assert pairs.digest() == "f11b41b68d5b16c298175059c45ec91cb57123412d4b459bfa077fea5f7a52fa"


@given(st.lists(st.integers(-3, 2), min_size=1, max_size=5))
def test_rows_keep_their_content(rows) -> None:
    pairs = some_pairs(clean_text=["a", "b", "c"])
    part = pairs[rows]
    assert part.clean.tolist() == [pairs.clean.tolist()[row] for row in rows]
    assert part.positions["second"].tolist() == [[1, 1, 2][row] for row in rows]
    assert part.clean_text == tuple("abc"[row] for row in rows)
    assert part.clean.shape[1] == pairs.clean.shape[1]


@pytest.mark.parametrize("rows", [slice(1, None), slice(None, None, -1), [2, 0], torch.tensor([True, False, True])])
def test_slices_lists_and_masks_choose_rows(rows) -> None:
    pairs = some_pairs()
    assert torch.equal(pairs[rows].clean, torch.from_numpy(pairs.clean.numpy()[_numpy(rows)].copy()))


def _numpy(rows):
    return rows.numpy() if isinstance(rows, torch.Tensor) else rows


@pytest.mark.parametrize("rows", [0, slice(3, None), [], [3], [0.5, 1.0], torch.tensor([True])])
def test_a_choice_of_nothing_or_of_nonsense_is_refused(rows) -> None:
    # The tests run with the shape checker, which stops a wrong type before we do.
    with pytest.raises((InputError, TypeCheckError)):
        some_pairs()[rows]


@given(st.integers(1, 5))
def test_chunks_are_the_whole(batch_size: int) -> None:
    pairs = some_pairs()
    chunks = list(pairs.chunks(batch_size))
    assert [len(chunk) for chunk in chunks[:-1]] == [batch_size] * (len(chunks) - 1)
    assert torch.equal(torch.cat([chunk.answer_pos for chunk in chunks]), pairs.answer_pos)


def test_chunks_of_nothing_are_refused_at_once() -> None:
    with pytest.raises(InputError, match="batch_size"):
        some_pairs().chunks(0)


def test_a_part_of_a_source_does_not_claim_to_be_it() -> None:
    pairs = some_pairs(source=FileSource("x.jsonl", "0" * 64, None))
    assert pairs[0:2].source is None
    assert pairs[:].source is pairs.to("cpu").source is pairs.source
    assert source_record(pairs.source)["kind"] == "file" and source_record(None) == {"kind": "tensors"}


def test_pairs_can_be_copied_and_sent_to_another_process() -> None:
    pairs = some_pairs(source=FileSource("x.jsonl", "0" * 64, None))
    for made in (copy.deepcopy(pairs), pickle.loads(pickle.dumps(pairs))):
        assert made.digest() == pairs.digest() and made.source == pairs.source
        assert isinstance(made.positions, MappingProxyType)


def test_vocabulary() -> None:
    pairs = some_pairs()
    pairs.check_vocabulary(17)
    with pytest.raises(InputError, match=r"wrong holds token id 16 in row 2.*16 ids"):
        pairs.check_vocabulary(16)


def test_doubled_bos() -> None:
    pairs = some_pairs()
    pairs.check_bos(5)
    with pytest.raises(InputError, match="clean begins with the BOS token 4 twice in row 2"):
        pairs.check_bos(4)


def test_nothing_of_the_caller_is_kept_or_changed() -> None:
    clean = torch.tensor([[1, 2, 3], [4, 5, 6]])
    positions = {"a": torch.tensor([0, 1])}
    pairs = Pairs(clean=clean, corrupt=clean, positions=positions)
    before = pairs.digest()
    clean[0, 0] = 9
    positions["a"][0] = 2
    positions["b"] = torch.tensor([0, 0])
    assert pairs.digest() == before
    assert isinstance(pairs.positions, MappingProxyType)
    with pytest.raises(AttributeError):
        pairs.clean = clean  # type: ignore[misc]
