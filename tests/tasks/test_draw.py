"""The stream of choices is fixed for ever: stored circuits are verified against pairs that it draws."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mechinterp.tasks.draw import Draw


def test_the_stream_is_the_published_one() -> None:
    draw = Draw("0/train/0")
    assert [draw.below(1000) for _ in range(6)] == [98, 501, 826, 588, 949, 757]
    assert Draw("0/train/0").sample("abcdefgh", 4) == ["c", "h", "g", "a"]


def test_other_keys_are_other_streams() -> None:
    streams = {tuple(Draw(f"{seed}/{split}/0").below(10**6) for _ in range(1)) for seed in range(20) for split in "ab"}
    assert len(streams) == 40


@given(st.integers(1, 30), st.data())
def test_a_sample_takes_no_place_twice(n: int, data) -> None:
    k = data.draw(st.integers(0, n))
    taken = Draw(str(data.draw(st.integers()))).sample(range(n), k)
    assert len(set(taken)) == k and set(taken) <= set(range(n))


def test_choices_are_even() -> None:
    draw = Draw("even")
    counts = Counter(draw.choice("abcde") for _ in range(5000))
    # Five standard deviations of a binomial with p = 1/5; the stream is fixed, so this cannot fail by chance.
    assert all(abs(count - 1000) < 5 * (5000 * 0.2 * 0.8) ** 0.5 for count in counts.values())
