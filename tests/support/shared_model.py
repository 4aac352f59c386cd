"""The bundled model, loaded once for each process that runs tests: documentation, notebooks and commands load it again
and again, which took a tenth of the time of the tests.

A test that leaves it changed gets it loaded anew for the next one. The tests of loading, `tests/models`, load it
themselves.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any


def share_bundled() -> None:
    """Make `load_model("bundled")` give one model; called before anything else has imported the function."""
    from mechinterp.models import hook_manager

    hook_manager.load_model = shared(hook_manager.load_model)


def shared(load: Callable[..., Any]) -> Callable[..., Any]:
    """`load`, which keeps the bundled model as it is without options."""
    kept: Any = None
    state: Any = None

    @functools.wraps(load)
    def load_model(spec: Any, **options: Any) -> Any:
        nonlocal kept, state
        loading = os.environ.get("PYTEST_CURRENT_TEST", "").startswith("tests/models/")
        if loading or not isinstance(spec, str) or spec != "bundled" or _given(options):
            return load(spec, **options)
        if kept is None or _state(kept) != state:
            kept = load(spec, **options)
            state = _state(kept)
        return kept

    return load_model


def _state(model: Any) -> Any:
    """What shows that a test has changed the model: weights written to or replaced, edits and modes left on."""
    weights = [(id(value), value._version) for value in model.bridge.original_model.state_dict(keep_vars=True).values()]
    return weights, model.edited, any(module.training for module in model.bridge.original_model.modules())


def _given(options: dict[str, Any]) -> bool:
    return any(value is not None and value is not False for value in options.values())
