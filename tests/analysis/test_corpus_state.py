"""A corpus that is read in any batches, or killed and resumed, gives the examples of one reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.base import checkpoint
from mechinterp.base.errors import InputError
from mechinterp.features.dictionary import sae
from tests.support.models_tiny import D_MODEL, tiny, tokens

TEXTS = [row[: 4 + i % 4] for i, row in enumerate(tokens(12, 9))]
DRAW = torch.Generator().manual_seed(0)
BASIS = sae(
    "resid_pre.1",
    torch.randn(D_MODEL, 6, generator=DRAW).double(),
    torch.randn(6, D_MODEL, generator=DRAW).double(),
    b_enc=torch.zeros(6).double(),
)


class Killed(BaseException):
    """What happens at any moment."""


def killed_at(texts: int) -> Any:
    def progress(done: int, total: int) -> None:
        assert total in (12, done)
        if done >= texts:
            raise Killed

    return progress


def examples(model: mi.HookManager, **keywords: Any) -> Any:
    given: dict[str, Any] = {"texts": TEXTS, "batch_size": 2, **keywords}
    found = mi.strongest_examples(model, BASIS, 3, n=5, **given)
    return found, found.strongest, found.fired


def notes(model: mi.HookManager, **keywords: Any) -> Any:
    wanted = [(BASIS.name, i) for i in (3, 0, 5)]
    given: dict[str, Any] = {"texts": TEXTS, "batch_size": 2, **keywords}
    return mi.feature_notes(model, [BASIS], wanted, **given)


@pytest.fixture(autouse=True)
def always_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EVERY_SECONDS", 0.0)


@pytest.mark.parametrize("call", [examples, notes])
@pytest.mark.parametrize("at", [2, 6, 12])
def test_a_killed_reading_goes_on_to_the_same_examples(call: Any, at: int, tmp_path: Path) -> None:
    model, state = tiny("gpt2"), tmp_path / "state"
    whole = call(model)
    with pytest.raises(Killed):
        call(model, resume=state, progress=killed_at(at))
    assert state.is_file()
    told: list[int] = []
    again = call(model, texts=iter(TEXTS), resume=state, progress=lambda done, total: told.append(done))
    assert again == whole and not state.exists()
    assert told == list(range(at + 2, 13, 2))


def test_a_reading_in_any_batches_is_the_same() -> None:
    def places(batch_size: int) -> Any:
        found, _, _ = examples(tiny("gpt2"), texts=(text for text in TEXTS), batch_size=batch_size)
        return [(one.text, one.position, one.ids) for one in found.strongest], found.read, found.fired, found.tokens

    assert places(1) == places(5) == places(12)


def test_a_state_goes_on_with_its_own_reading_only(tmp_path: Path) -> None:
    model, state = tiny("gpt2"), tmp_path / "state"
    with pytest.raises(Killed):
        examples(model, resume=state, progress=killed_at(6))
    kept = state.read_bytes()

    def refused(said: str, call: Any = examples, **keywords: Any) -> None:
        with pytest.raises(InputError, match=said) as raised:
            call(model, resume=state, **keywords)
        assert len(str(raised.value).splitlines()) == 1 and state.read_bytes() == kept

    changed = [text.clone() for text in TEXTS]
    changed[2][1] += 1
    refused("another corpus", texts=changed)
    refused("another corpus", texts=TEXTS[:4])
    refused("another run", notes)
    refused("another run", call=lambda model, **more: mi.strongest_examples(model, BASIS, 2, texts=TEXTS, n=5, **more))
    refused("not both", so_far=mi.Examples(f"{BASIS.name}.f3"))
    longer = [*TEXTS, *TEXTS[:3]]
    found, _, _ = examples(model, texts=longer, resume=state)  # texts were added at the end
    assert found == examples(model, texts=longer)[0] and found.read == 15
    state.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    kept = state.read_bytes()
    refused("damaged")


def wrong_states(state: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """States with a valid hash that no reading wrote."""
    for name in state:
        yield {key: value for key, value in state.items() if key != name}
        yield state | {name: state[name].double() if name != "value" else state[name].float()}
        if name not in ("ids", "value", "corpus"):
            yield state | {name: torch.full_like(state[name], -1)}
        yield state | {name: torch.cat([state[name], state[name][:1]])}
    yield state | {"ids": state["ids"] + 1000}
    yield state | {"position": state["position"] + 100}
    yield state | {"text": state["text"] + 100}
    yield state | {"read": torch.tensor([[6]])}


def test_an_impossible_state_is_refused(tmp_path: Path) -> None:
    model, state = tiny("gpt2"), tmp_path / "state"
    with pytest.raises(Killed):
        examples(model, resume=state, progress=killed_at(6))
    key, content = checkpoint.read_state(state)
    wrong = list(wrong_states(content))
    assert len(wrong) > 30
    for one in wrong:
        checkpoint.write_state(state, key, one)
        with pytest.raises(InputError, match="not a state of this reading"):
            examples(model, resume=state)
