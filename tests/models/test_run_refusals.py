"""What the hook manager refuses by name: sites, tokens, positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechinterp.base.errors import BusyError, InputError, MechInterpError, SiteNotReached, UnsupportedError
from mechinterp.models.hook_manager import HookManager, load_model
from mechinterp.models.sites import Site
from tests.support.models_tiny import as_installed, build, tiny, tokens

X = tokens(3, 7)
ROUND_TRIP = 1e-12  # the same numbers through the same code, but batched otherwise: float64 rounding only


def run(model: HookManager, *args: Any, **keywords: Any) -> Any:
    """`model.run` as an installed package has it."""
    return as_installed(HookManager.run)(model, *args, **keywords)


@pytest.mark.parametrize(
    ("site", "error", "message"),
    [
        ("resid_pree.0", InputError, r"Did you mean 'resid_pre\.0'"),
        ("blocks.0.attn.hook_zz", InputError, r"Did you mean 'blocks\.0\.attn\.hook_z'"),
        ("z.7", InputError, "layers 0 to 2"),
        ("z", InputError, "needs a layer"),
        ("z.x", InputError, "whole number"),
        ("embed.0", InputError, "takes no layer"),
        (Site("z", 99), InputError, "layers 0 to 2"),
    ],
)
def test_unknown_sites_are_refused_by_name(site: Any, error: type[Exception], message: str) -> None:
    model = tiny("gpt2")
    for keywords in (
        {"record": [site]},
        {"stop": site},
        {"interventions": {site: torch.zeros_like}},
        {"grads": [site], "loss": lambda logits: logits.sum()},
    ):
        with pytest.raises(error, match=message):
            model.run(X, **keywords)


def test_sites_that_a_model_lacks_are_refused() -> None:
    assert not tiny("neox").has("resid_mid.0")
    with pytest.raises(UnsupportedError, match="resid_mid"):
        tiny("neox").run(X, record=["resid_mid.0"])
    with pytest.raises(UnsupportedError, match="pos_embed"):
        tiny("llama").run(X, record=["pos_embed"])
    with pytest.raises(UnsupportedError, match="mlp_out"):
        tiny("attention-only").run(X, record=["mlp_out.0"])


def test_a_site_that_fires_and_does_nothing_is_refused() -> None:
    """TransformerLens's native attention computes its scores beside the path that makes the pattern."""
    model = tiny("no-norm")
    assert not model.has("scores.1")
    assert Site("scores", 1) not in model.sites()
    with pytest.raises(UnsupportedError, match="logits do not depend"):
        model.run(X, interventions={"scores.1": torch.zeros_like})


class Aside(torch.nn.Module):
    """A hook point that fires on a copy nobody reads."""

    def __init__(self, point: torch.nn.Module) -> None:
        super().__init__()
        self.point = point

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        self.point(value.clone())
        return value


def test_a_needed_site_off_the_path_refuses_the_model() -> None:
    bridge = build("gpt2").bridge
    point = bridge.hook_dict["blocks.1.attn.hook_v"]
    bridge.blocks[1].attn.v.hook_out = Aside(point)
    assert bridge.hook_dict["blocks.1.attn.hook_v"] is point
    with pytest.raises(UnsupportedError, match=r"'v\.1' cannot be used.*logits do not depend"):
        load_model(bridge)


def test_a_filter_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(InputError, match="matches no site"):
        tiny("gpt2").run(X, record=lambda site: site.startswith("Z"))


def test_one_string_is_not_a_list_of_sites() -> None:
    with pytest.raises(InputError, match="take a list"):
        run(tiny("gpt2"), X, record="z.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X + 60,), "Token id .* vocabulary of 50"),
        ((-X,), "Token id -"),
        ((torch.ones(1, 33, dtype=torch.long),), "33 tokens.*reads 32"),
        ((X.float(),), "whole numbers"),
        ((X > 3,), "whole numbers"),
        ((X[0],), r"\[batch, pos\]"),
        (([[1, 2], [1]],), "do not form a rectangle"),
        ((X[:0],), "whole numbers"),
        (("hello",), "no tokenizer for texts"),
        ((X, torch.ones(3, 6)), "must agree"),
        ((X, torch.tensor([[1] * 7, [0] * 7, [1] * 7])), "no real token"),
    ],
)
def test_bad_tokens_and_masks_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny("gpt2"), *arguments)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"at": torch.full((3, 1), 7)}, "from 0 to 6"),
        ({"at": torch.full((3, 1), -2)}, "from 0 to 6"),
        ({"at": torch.tensor([1, 2, 3])}, r"\[batch, n\]"),
        ({"at": torch.zeros(2, 1, dtype=torch.long)}, "batch = 3"),
        ({"at": torch.zeros(3, 1)}, "whole numbers"),
        ({"start": (3, torch.zeros(3, 7, 16, dtype=torch.float64))}, "layers 0 to 2"),
        ({"start": (-1, torch.zeros(3, 7, 16, dtype=torch.float64))}, "layers 0 to 2"),
        ({"start": (1, torch.zeros(3, 7, 8, dtype=torch.float64))}, r"\[3, 7, 16\]"),
        ({"start": (1, torch.zeros(3, 7, 16))}, "float64"),
    ],
)
def test_bad_positions_and_starts_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny("gpt2"), X, **keywords)


def test_every_refusal_is_one_of_ours() -> None:
    for error in (InputError, UnsupportedError, SiteNotReached, BusyError):
        assert issubclass(error, MechInterpError)
