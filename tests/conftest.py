"""Settings every test shares."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The first example of a test may compile the kernel, so no deadline; the same examples in every run.
settings.register_profile(
    "lbgym", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lbgym")
