"""Tasks make the same balanced, disjoint pairs everywhere, and their digest sees every change."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import mechinterp.tasks
from mechinterp.base.errors import FormatError, InputError
from mechinterp.tasks.make import _SAID
from mechinterp.tasks.metrics import get_metric
from mechinterp.tasks.pairs import Pairs
from mechinterp.tasks.source import TaskSource
from mechinterp.tasks.split import split_of
from mechinterp.tasks.task import Task, load_task, task_names
from tests.tasks.conftest import RARE_NAMES

FOLDER = Path(mechinterp.tasks.__file__).parent


def tokens(tokenizer, pairs: Pairs, table: str, name: str) -> list[str]:
    """The token at a named position of every example, spaces off."""
    ids = getattr(pairs, table).gather(1, pairs.positions[name][:, None])[:, 0]
    return [text.strip() for text in tokenizer.batch_decode(ids[:, None])]


def answers(tokenizer, ids: torch.Tensor) -> list[list[str]]:
    return [[tokenizer.decode([number]).strip() for number in row if number >= 0] for row in ids.tolist()]


FOR_DIGITS = "greater_than_digits"
"""The task that needs another kind of tokenizer than the others."""


@pytest.mark.parametrize("name", [name for name in task_names() if name != FOR_DIGITS])
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_task_of_the_package_makes_pairs(name: str, split: str, tokenizer) -> None:
    task = load_task(name)
    pairs = task.pairs(tokenizer, n=60, split=split)
    assert task.name == name and len(pairs) == 60
    assert set(pairs.positions) == set(task.positions)
    assert get_metric(task.metric).columns(pairs) is None or pairs.right is not None
    assert not torch.equal(pairs.clean, pairs.corrupt)
    assert torch.equal(pairs.positions["end"], pairs.lengths - 1)
    assert pairs.source == TaskSource(
        name, task.version, task.digest(), split, 60, 0, tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    )


def test_ioi_positions_and_answers_are_what_they_are_called(tokenizer) -> None:
    pairs = load_task("ioi").pairs(tokenizer, n=100, split="test", seed=3)
    at = {name: tokens(tokenizer, pairs, "clean", name) for name in pairs.positions}
    assert pairs.right is not None and pairs.wrong is not None and pairs.clean_text is not None
    assert [[name] for name in at["IO"]] == answers(tokenizer, pairs.right)
    assert [[name] for name in at["S1"]] == [[name] for name in at["S2"]] == answers(tokenizer, pairs.wrong)
    assert bool((pairs.positions["S1"] < pairs.positions["S2"]).all())
    assert torch.equal(pairs.positions["S1+1"], pairs.positions["S1"] + 1)
    assert set(at["end"]) == {"to", "it"} & set(at["end"])
    # The answers are the very tokens of the prompt, leading space included.
    assert torch.equal(pairs.clean.gather(1, pairs.positions["IO"][:, None]), pairs.right)


def test_abc_replaces_the_three_names_by_three_others_and_nothing_else(tokenizer) -> None:
    pairs = load_task("ioi").pairs(tokenizer, n=100)
    named = torch.zeros_like(pairs.mask)
    for name in ("IO", "S1", "S2"):
        named.scatter_(1, pairs.positions[name][:, None], True)
    assert torch.equal(pairs.clean != pairs.corrupt, named)
    corrupt = zip(*(tokens(tokenizer, pairs, "corrupt", name) for name in ("IO", "S1", "S2")), strict=True)
    clean = zip(*(tokens(tokenizer, pairs, "clean", name) for name in ("IO", "S1")), strict=True)
    for new, old in zip(corrupt, clean, strict=True):
        assert len({*new, *old}) == 5


def test_the_two_orders_are_equally_frequent_and_templates_take_turns(words) -> None:
    task = load_task("ioi")
    for split in ("train", "test"):
        pairs = task.pairs(words, n=96, split=split)
        abba = pairs.positions["IO"] < pairs.positions["S1"]
        assert int(abba.sum()) == 48
        # Also in every part of the set.
        assert all(int(abba[start : start + 2].sum()) == 1 for start in range(0, 96, 2))
        n_templates = len(getattr(task.spec.splits, split).templates)
        frames = Counter(_frame(task, pairs, row) for row in range(96))
        assert max(frames.values()) - min(frames.values()) <= 1 and len(frames) == n_templates


def _frame(task: Task, pairs: Pairs, row: int) -> str:
    """The template's text, by taking the drawn words out again."""
    drawn = {word for words in task.lists.values() for word in words}
    assert pairs.clean_text is not None
    order = "ABBA" if pairs.positions["IO"][row] < pairs.positions["S1"][row] else "BABA"
    pieces = pairs.clean_text[row].replace(",", " ,").replace(".", " .").split()
    return order + " ".join("*" if piece in drawn else piece for piece in pieces)


@pytest.mark.parametrize("name", [name for name in task_names() if load_task(name).spec.generator is None])
def test_splits_are_disjoint_in_templates(name: str) -> None:
    splits = load_task(name).spec.splits
    assert not {t.text for t in splits.train.templates} & {t.text for t in splits.test.templates}


@pytest.mark.slow
def test_splits_are_disjoint_in_name_pairs(words) -> None:
    task = load_task("ioi")
    seen = {}
    for split in ("train", "test"):
        pairs = task.pairs(words, n=400, split=split)
        at = (tokens(words, pairs, "clean", name) for name in ("IO", "S1"))
        seen[split] = {frozenset(pair) for pair in zip(*at, strict=True)}
        assert all(split_of(pair, 0.2) == split for pair in seen[split])
    assert not seen["train"] & seen["test"]


def test_pairs_depend_on_seed_and_split_alone(words) -> None:
    task = load_task("ioi")
    first = task.pairs(words, n=40, seed=1)
    assert first.digest() == load_task("ioi").pairs(words, n=40, seed=1).digest()
    digests = {first.digest(), task.pairs(words, n=40, seed=2).digest()}
    digests.add(task.pairs(words, n=40, seed=1, split="test").digest())
    assert len(digests) == 3


@pytest.mark.parametrize("name", task_names())
def test_fewer_pairs_are_the_first_of_more(name: str, words, digits) -> None:
    task = load_task(name)
    tokenizer = digits if name == FOR_DIGITS else words
    more, fewer = task.pairs(tokenizer, n=40), task.pairs(tokenizer, n=10)
    assert more[:10].digest() == fewer.digest()


def test_no_example_is_given_twice(words) -> None:
    pairs = load_task("subject_verb_agreement").pairs(words, n=300, split="test")
    assert pairs.clean_text is not None and pairs.corrupt_text is not None
    assert len(set(zip(pairs.clean_text, pairs.corrupt_text, strict=True))) == 300


def test_bos_shifts_everything_by_one_and_is_there_once(bpe) -> None:
    task = load_task("ioi")
    without, with_bos = task.pairs(bpe, n=40), task.pairs(bpe, n=40, prepend_bos=True)
    assert torch.equal(with_bos.clean[:, 1:], without.clean)
    assert bool((with_bos.clean[:, 0] == bpe.bos_token_id).all())
    assert not bool(((without.clean == bpe.bos_token_id) & without.mask).any())
    for name, at in without.positions.items():
        assert torch.equal(with_bos.positions[name], at + 1)
    assert isinstance(with_bos.source, TaskSource) and with_bos.source.prepend_bos


def test_bos_of_the_tokenizer_itself_is_used_once_and_can_be_left_out(bpe_with_bos) -> None:
    task = load_task("ioi")
    own = task.pairs(bpe_with_bos, n=10)
    assert bool(((own.clean == bpe_with_bos.bos_token_id) & own.mask).sum(1).eq(1).all())
    bare = task.pairs(bpe_with_bos, n=10, prepend_bos=False)
    assert torch.equal(own.clean[:, 1:], bare.clean)


def test_words_that_are_several_tokens_are_dropped_and_reported(bpe, caplog) -> None:
    _SAID.clear()  # other tests have used this tokenizer
    pairs = load_task("ioi").pairs(bpe, n=200)
    dropped = {entry.what for entry in pairs.report.dropped}
    assert {f"word {name!r} of the list 'names'" for name in RARE_NAMES} == dropped
    assert "tokens" in pairs.report.dropped[0].why and "names" in caplog.text
    assert pairs.clean_text is not None
    assert not any(name in text for text in pairs.clean_text for name in RARE_NAMES)


def test_greater_than_means_every_greater_number(tokenizer) -> None:
    task = load_task("greater_than")
    pairs = task.pairs(tokenizer, n=60)
    assert pairs.right is not None and pairs.wrong is not None
    years = tokens(tokenizer, pairs, "clean", "YEAR+1")
    centuries = tokens(tokenizer, pairs, "clean", "YEAR")
    assert centuries == tokens(tokenizer, pairs, "clean", "end")
    assert set(tokens(tokenizer, pairs, "corrupt", "YEAR+1")) == {"01"}
    suffixes = task.lists["suffixes"]
    right, wrong = answers(tokenizer, pairs.right), answers(tokenizer, pairs.wrong)
    for year, more, less in zip(years, right, wrong, strict=True):
        assert more == [suffix for suffix in suffixes if int(suffix) > int(year)]
        assert less == [suffix for suffix in suffixes if int(suffix) <= int(year)]


@pytest.mark.parametrize("split", ["train", "test"])
def test_greater_than_digit_by_digit(split: str, digits) -> None:
    task = load_task(FOR_DIGITS)
    pairs = task.pairs(digits, n=100, split=split)
    assert pairs.right is not None and pairs.wrong is not None and pairs.clean_text is not None
    assert len(pairs.report) == 0
    at = {name: tokens(digits, pairs, "clean", name) for name in task.positions}
    assert set(tokens(digits, pairs, "corrupt", "YEAR+3")) == {"0"}
    assert bool(((pairs.clean != pairs.corrupt).sum(1) == 1).all())
    rows = zip(pairs.clean_text, answers(digits, pairs.right), answers(digits, pairs.wrong), strict=True)
    for row, (text, more, less) in enumerate(rows):
        year, begun = re.findall(r"\d+", text)
        assert (at["YEAR"][row], at["YEAR+3"][row], at["end"][row]) == (year[0], year[3], year[2])
        assert begun == year[:3] and sorted([*more, *less]) == list("0123456789")
        assert begun[-1] not in more  # or `Pairs` would warn that the prompt holds its answer
        assert more and all((int(begun + digit) > int(year)) == (digit in more) for digit in "0123456789")


def test_a_tokenizer_that_splits_digits_is_told_which_task_it_can_use(digits, words) -> None:
    with pytest.raises(InputError, match=r"0 of its 618.*can use the task 'greater_than_digits'\.$"):
        load_task("greater_than").pairs(digits, n=4)
    with pytest.raises(InputError, match=r"can use 0 of its 324") as error:
        load_task(FOR_DIGITS).pairs(words, n=4)
    assert "can use the task" not in str(error.value)


def test_what_a_task_needs_is_said_once_for_each_tokenizer(bpe, words, caplog) -> None:
    _SAID.clear()
    task = load_task("ioi")
    caplog.set_level("INFO", "mechinterp")
    for tokenizer in (bpe, bpe, words):
        for split in ("train", "test"):
            task.pairs(tokenizer, n=4, split=split)
    needs = "task ioi needs words of one token (names, objects, places)"
    total = sum(map(len, task.lists.values()))
    assert [message.partition("; ")[0] for message in caplog.messages] == [needs] * 2
    assert caplog.messages[0].startswith(f"{needs}; 3 of {total} are left out with this tokenizer (word '")
    assert caplog.messages[1] == f"{needs}; this tokenizer can use all {total} words"
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_induction_repeats_and_its_corrupt_text_does_not(tokenizer) -> None:
    pairs = load_task("induction").pairs(tokenizer, n=50, split="test")
    assert pairs.right is not None and pairs.wrong is not None
    assert answers(tokenizer, pairs.right) == [[t] for t in tokens(tokenizer, pairs, "clean", "answer")]
    assert tokens(tokenizer, pairs, "clean", "prefix") == tokens(tokenizer, pairs, "clean", "end")
    assert torch.equal(pairs.positions["answer"], pairs.positions["prefix"] + 1)
    for row in range(50):
        clean, corrupt = (table[row][pairs.mask[row]].tolist() for table in (pairs.clean, pairs.corrupt))
        assert len(set(corrupt)) == len(corrupt)
        assert clean.count(int(pairs.right[row, 0])) == clean.count(int(pairs.wrong[row, 0])) == 1
        assert clean[-1] == corrupt[-1] and clean.count(clean[-1]) == 2


ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ioi", "greater_than", "docstring", "induction", "gendered_pronoun"])
@settings(max_examples=40)
@given(data=st.data())
def test_digest_sees_every_change_of_one_character(name: str, data, tmp_path_factory) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    comments = [i for line in _lines(text) for i in range(line[0] + line[2], line[1])]
    places = [i for i, c in enumerate(text) if c in ALPHABET and i not in set(comments)]
    place = data.draw(st.sampled_from(places))
    letter = data.draw(st.sampled_from(ALPHABET).filter(lambda c: c != text[place]))
    changed = tmp_path_factory.mktemp("task") / "changed.yaml"
    changed.write_text(text[:place] + letter + text[place + 1 :])
    try:
        task = load_task(changed)
    except InputError:
        return
    assert task.digest() != load_task(name).digest()


def _lines(text: str) -> list[tuple[int, int, int]]:
    """(start, stop, where a comment begins) of every line."""
    found, start = [], 0
    for line in text.split("\n"):
        mark = line.find("# ")
        found.append((start, start + len(line), mark if mark >= 0 else len(line)))
        start += len(line) + 1
    return found


def test_digest_sees_a_change_of_a_word_but_not_of_the_layout(tmp_path) -> None:
    task = load_task("ioi")
    names = list(task.lists["names"])
    for changed in (["Jessika", *names[1:]], names[::-1], names[:-1]):
        assert replace(task, lists={**task.lists, "names": tuple(changed)}).digest() != task.digest()
    lines = (FOLDER / "ioi.yaml").read_text().split("\n")
    (tmp_path / "same.yaml").write_text("# a comment\n" + "\n".join(lines[1:] + lines[:1]))
    assert load_task(tmp_path / "same.yaml").digest() == task.digest()


def test_the_order_of_keys_changes_neither_digest_nor_pairs(words, tmp_path) -> None:
    text = (FOLDER / "ioi.yaml").read_text()
    other = text.replace("{IO: names, S: names, PLACE: places,", "{PLACE: places, S: names, IO: names,")
    assert other != text
    (tmp_path / "other.yaml").write_text(other)
    one, two = load_task("ioi"), load_task(tmp_path / "other.yaml")
    assert one.digest() == two.digest()
    assert one.pairs(words, n=20).digest() == two.pairs(words, n=20).digest()


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; from mechinterp.tasks.task import task_names, load_task;"
        "[load_task(name) for name in task_names()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_are_refused_with_the_nearest(words) -> None:
    with pytest.raises(InputError, match=r"Unknown task 'ioy'. Did you mean 'ioi'"):
        load_task("ioy")
    with pytest.raises(InputError, match=r"Unknown split 'tset'. Did you mean 'test'"):
        load_task("ioi").pairs(words, n=4, split="tset")
    for n in (1, 0, -3, 10**9):
        with pytest.raises(InputError, match="n must be"):
            load_task("ioi").pairs(words, n=n)


class Slow:
    """A tokenizer without offsets."""

    bos_token_id = None
    is_fast = False


@pytest.mark.parametrize(
    ("given", "match"),
    [(Slow(), "has no character offsets"), (object(), "tokenizer.*is needed"), ("gpt2", "tokenizer.*is needed")],
)
def test_what_is_no_fast_tokenizer_is_refused(given, match: str) -> None:
    with pytest.raises(InputError, match=match):
        load_task("ioi").pairs(given, n=4)


def test_a_model_without_tokenizer_is_refused() -> None:
    class Model:
        tokenizer = None

    with pytest.raises(InputError, match="has no tokenizer"):
        load_task("ioi").pairs(Model(), n=4)


def test_a_model_with_a_smaller_vocabulary_is_refused(words) -> None:
    class Dims:
        d_vocab = 50

    class Model:
        tokenizer = words
        dims = Dims()

    with pytest.raises(InputError, match="the vocabulary has 50 ids"):
        load_task("ioi").pairs(Model(), n=4)


SMALL = """
name: colours
version: 1
title: The colour that is not repeated
source: made for a test
metric: logit_diff
answer: " {A}"
wrong: " {B}"
positions: [A, B1, end]
lists: {colours: [red, green, blue, black, white, brown]}
words: {A: colours, B: colours, C: colours}
corruption: {scheme: abc, slots: {A: C}}
pair_split: {slots: [A, B], test_fraction: 0.4}
splits:
  train: {templates: [{text: "I saw {A} and {B} and {B} and"}]}
  test: {templates: [{text: "We saw {A} and {B} and {B} and"}]}
"""


def small(tmp_path: Path, old: str = "", new: str = "") -> Task:
    assert old in SMALL
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.replace(old, new, 1) if old else SMALL)
    return load_task(path)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("metric:", "metrik:", "Unknown key 'metrik'. Did you mean 'metric'"),
        ("scheme: abc", "sceme: abc", "corruption: Unknown key 'sceme'. Did you mean 'scheme'"),
        ("scheme: abc", "scheme: cab", "'abc' or 'replace'"),
        ("{text: \"I", "{txt: \"I", r"splits.train.templates.0: Unknown key 'txt'. Did you mean 'text'"),
        ("version: 1", "version: one", "version"),
        ("version: 1", "version: 0", "version"),
        ("0.4", "nan", "test_fraction"),
        ("0.4", "1.5", "test_fraction"),
        ("C: colours}", "C: colour}", "Unknown word list 'colour'. Did you mean 'colours'"),
        ("{A} and {B}", "{A} and {D}", "Unknown slot 'D'"),
        ("{A} and {B}", "{A and {B}", "brace"),
        ("[A, B1, end]", "[A, B, end]", "'B' is ambiguous"),
        ("[A, B1, end]", "[A, B3, end]", "Unknown occurrence of a slot 'B3'"),
        ("[A, B1, end]", "[A, B1+x, end]", "written NAME"),
        ("{A: C}", "{A: Z}", "Unknown slot of the corruption 'Z'"),
        ("{A: C}", "{B1: C}", "must replace the answer A everywhere"),
        ("[A, B], test", "[A, Q], test", "Unknown slot of pair_split 'Q'"),
        ('"We saw', '"I saw', "is in both splits"),
        ("[red, green,", "[red, red,", "holds 'red' twice"),
        ('answer: " {A}"', "title2: x", "Unknown key"),
        ('answer: " {A}"', "", "a wrong answer but no right one"),
        ('answer: " {A}"', "answer: {list: colours, greater_than: A}", "compared as numbers"),
        ('answer: " {A}"', "answer: {list: colours}", "exactly one of"),
        ("name: colours", "name: colours\nname: again", "given twice"),
        ("name: colours", "name: &a colours\ntitle2: *a", "aliases"),
        ("name: colours", "name: [", "not valid YAML"),
        ("version: 1", "version: 1\ngenerator: repeated_words", "templates or a generator, not both"),
    ],
)  # fmt: skip
def test_a_task_file_that_does_not_fit_together_is_refused(tmp_path, old, new, match) -> None:
    with pytest.raises(FormatError, match=match):
        small(tmp_path, old, new)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "must hold a mapping"),
        (b"- a\n- b\n", "must hold a mapping"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "nested too deeply"),
        (b"a: " + b"x" * 2**21, "larger than"),
        (b"!!python/object/apply:os.system ['echo broken']", "must hold a mapping"),
    ],
)
def test_hostile_task_files_are_refused(tmp_path, content: bytes, match: str) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=match):
        load_task(path)


def test_a_missing_task_file_is_refused() -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        load_task("no/such/task.yaml")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_task_or_a_format_error(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("task") / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(FormatError):
        load_task(path)


def test_a_task_of_ones_own(tmp_path, words) -> None:
    words = _extended(words, "red green blue black white brown I We saw and")
    task = small(tmp_path)
    pairs = task.pairs(words, n=6, split="test")
    assert tokens(words, pairs, "clean", "A") == [row[0] for row in answers(words, pairs.right)]
    with pytest.raises(InputError, match="at most 40 different test examples with this tokenizer; got 500"):
        task.pairs(words, n=500, split="test")


def test_all_wrong_keys_of_a_task_file_are_told_at_once(tmp_path) -> None:
    """Unknown ones, missing ones and wrong values, at every depth, a line each."""
    text = (
        SMALL.replace("title:", "titel:").replace("source: made for a test\n", "").replace("scheme: abc", "sceme: abc")
    )
    text = text.replace("0.4", "2")
    path = tmp_path / "small.yaml"
    path.write_text(text)
    with pytest.raises(FormatError) as raised:
        load_task(path)
    first, *lines = str(raised.value).splitlines()
    assert first == f"{path} has 6 problems:"
    assert lines[0].startswith("  Unknown key 'titel'. Did you mean 'title'?")
    assert {line.split(":")[0].strip() for line in lines[1:]} == {
        *("title", "source", "corruption", "corruption.scheme", "pair_split.test_fraction")
    }


def test_all_that_does_not_fit_together_is_told_at_once(tmp_path) -> None:
    text = SMALL.replace("I saw {A}", "I saw {Q}").replace("We saw {A}", "We saw {R}").replace("[red,", "[red, red,")
    path = tmp_path / "small.yaml"
    path.write_text(text)
    with pytest.raises(FormatError, match="has 3 problems:") as raised:
        load_task(path)
    assert all(word in str(raised.value) for word in ("'red' twice", "slot 'Q'", "slot 'R'"))


def _extended(tokenizer, text: str):
    """A copy of the word-level tokenizer that knows these words as well."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    known = content["model"]["vocab"]
    for word in text.split():
        known.setdefault(word, len(known))
    made = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", unk_token="<unk>")


def test_words_outside_the_vocabulary_are_refused(tmp_path, words) -> None:
    """Not accepted as <unk>, neither in the lists nor in the templates."""
    lists_known = _extended(words, "red green blue black white brown I We and")
    with pytest.raises(InputError, match=r"does not know some word of"):
        small(tmp_path, "I saw", "I beheld").pairs(lists_known, n=4)
    with pytest.raises(InputError, match=r"can use 0 of its 6.*not in the vocabulary"):
        small(tmp_path, "[red, green, blue, black, white, brown]", "[qa, qb, qc, qd, qe, qf]").pairs(words, n=4)
