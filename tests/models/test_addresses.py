"""One grammar of names: every form round-trips, and what is not a name gets one line with the nearest one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mechinterp.base.errors import InputError
from mechinterp.features.addresses import parse_feature
from mechinterp.features.neurons import neuron_basis
from mechinterp.models.components import parse_part
from mechinterp.models.sites import Address, Edge, Node
from tests.support.models_tiny import tiny

FORMS = {
    "input": Address("input"),
    "embed": Address("embed"),
    "logits": Address("logits"),
    "a9": Address("attention", 9),
    "a9.h12": Address("head", 9, 12),
    "a9.kv1": Address("kv_head", 9, 1),
    "m3": Address("mlp", 3),
    "m3.n17": Address("neuron", 3, 17),
    "m3.e5": Address("expert", 3, 5),
    "m3.f17": Address("feature", number=17, base="m3"),
    "m3.err": Address("error", base="m3"),
    "resid_pre.5": Address("site", 5, base="resid_pre.5"),
    "resid_pre.5.f17": Address("feature", number=17, base="resid_pre.5"),
    "resid_final": Address("site", base="resid_final"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read_with_channel_and_position(name: str) -> None:
    assert Address.parse(name) == FORMS[name]
    assert Address.parse(f"{name}@S2") == replace(FORMS[name], position="S2")
    assert Address.parse(f"{name}<q>@-1") == replace(FORMS[name], channel="q", position="-1")


@pytest.mark.parametrize("name", [name for name, one in FORMS.items() if one.kind not in ("site", "attention")])
def test_nodes_and_edges_have_the_same_names(name: str) -> None:
    assert str(Node.parse(name)) == name
    if name not in ("logits", "a9.kv1"):
        assert str(Edge.parse(f"{name}->logits@end")) == f"{name}->logits@end"


@pytest.mark.parametrize("reader", ["m3.f17<in>", "m3<router>", "a0.h1<k>", "m3@end"])
def test_inputs_of_every_kind(reader: str) -> None:
    assert str(Edge.parse(f"input->{reader}")) == f"input->{reader}"


@pytest.mark.parametrize("layer", [("m3.f17", 3), ("resid_pre.5.err", 5), ("a2.f0", 2), ("mine.f4", -1)])
def test_a_feature_is_in_the_layer_of_its_basis(layer: tuple[str, int]) -> None:
    assert Node.parse(layer[0]).layer == layer[1]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("a9.g6", "a9.h6"),
        ("a9h6", "a9.h6"),
        ("m3n17", "m3.n17"),
        ("resid_pe.5", "resid_pre.5"),
        ("imput", "input"),
        ("logit", "logits"),
        ("m3.er", "m3.err"),
    ],
)
def test_a_slip_gets_the_nearest_name(wrong: str, near: str) -> None:
    for parse in (Address.parse, lambda text: parse_part(tiny("gpt2"), text)):
        with pytest.raises(InputError, match=rf"Did you mean '{near}'\?") as caught:
            parse(wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "@S2", "a9.h9@", "a9.h9<q", "a9.h9<>", "a٣.h1", "a9.h1\n", "9", "<q>"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        Node.parse(text)
    assert "\n" not in str(caught.value)


def test_a_part_says_what_is_missing() -> None:
    with pytest.raises(InputError, match="no feature basis is given"):
        parse_part(tiny("gpt2"), "m1.f3")
    with pytest.raises(InputError, match="cannot be read or edited by itself"):
        parse_part(tiny("gpt2"), "m1.e3")
    with pytest.raises(InputError, match="is not a part of a model"):
        parse_part(tiny("gpt2"), "m1<q>")
    basis = neuron_basis("mlp_post.1", 32, label="m1")
    assert parse_feature("m1.f3@S2", [basis]).position == "S2"
    for wrong in ("m1", "m1.f3<q>"):
        with pytest.raises(InputError, match="is not a feature"):
            parse_feature(wrong, [basis])
