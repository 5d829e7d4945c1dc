"""Settings every test shares."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.forked import WARM, Template

# The benchmarks and the tests share their closed forms.
sys.path.insert(0, str(Path(__file__).parent.parent))

# The first example of a test may compile the kernel, so no deadline; the same examples in every run.
settings.register_profile(
    "lbgym", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
# For what has run with all of them before: on another Python, with other versions, with another clock.
settings.register_profile("again", settings.get_profile("lbgym"), max_examples=10)
settings.load_profile("lbgym")


@pytest.fixture(scope="session")
def python() -> Iterator[Template]:
    """Runs Python's files and modules in processes that need not import what takes seconds to import."""
    modules = ["torch._dynamo", "torch.utils.tensorboard", "stable_baselines3", "matplotlib.pyplot", "scipy.stats"]
    with Template([*modules, "typer", "rich.table", "rich.progress"], WARM) as template:
        yield template


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    """Every test has the logger as an import leaves it, and leaves no thread of ours behind."""
    logger = logging.getLogger("lbgym")
    before = logger.handlers[:], logger.level, logger.propagate
    running = set(threading.enumerate())
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)
    ours = [new for new in set(threading.enumerate()) - running if new.name.startswith("lbgym-")]
    for thread in ours:
        thread.join(10.0)
    left = [thread.name for thread in ours if thread.is_alive()]
    assert not left, f"threads that the test has left behind: {left}"
