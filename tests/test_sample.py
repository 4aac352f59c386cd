"""Which cases of a slow test `make test` runs."""

from itertools import product

from tests.support.sample import SHARE, chosen


def test_a_share_is_kept_the_same_each_time_and_every_value_of_a_product_is_met() -> None:
    cases = {f"t[{a}-{b}]": {"a": a, "b": b, "c": object()} for a, b in product("uvwxy", range(4))}
    kept = chosen(cases)
    assert len(kept) == -(-20 // SHARE) and kept == chosen(dict(reversed(cases.items())))
    assert {cases[name]["a"] for name in kept} == set("uvwxy") and {cases[name]["b"] for name in kept} == set(range(4))


def test_over_many_tests_of_five_shapes_each_shape_is_met() -> None:
    kept = [chosen({f"test_{n}[{shape}]": {"name": shape} for shape in "abcde"}) for n in range(30)]
    assert all(len(names) == 2 for names in kept)
    assert all(sum(f"[{shape}]" in name for names in kept for name in names) >= 5 for shape in "abcde")
