"""What holds for every test: no network, checked shapes, property tests that do not depend on the machine's speed, and
which cases of slow tests `make test` runs."""

import gc
import os

import pytest
from hypothesis import settings

from tests.support import sample, shape_checks, shared_model

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is imported

shape_checks.install()  # before the first import of mechinterp
if "PYTEST_XDIST_WORKER" in os.environ:
    shared_model.share_bundled()

# No deadline: the first call of a model is slower than the rest. In CI the same examples every time,
# so that a red run can be repeated.
settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_finish() -> None:
    """Leave what the imports have made out of garbage collection, which otherwise goes through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before pytest's own, which applies `-m`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that only `make test-all` runs."""
    sample.mark_exhaustive(items)
