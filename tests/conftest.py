"""Settings every test shares."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

# The benchmarks and the tests share their closed forms.
sys.path.insert(0, str(Path(__file__).parent.parent))

# The first example of a test may compile the kernel, so no deadline; the same examples in every run.
settings.register_profile(
    "lbgym", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lbgym")
