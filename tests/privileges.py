"""What a test may do here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_UIDS = Path("/proc/self/uid_map")

#: For tests that become another user, which as the root of a user namespace may have nobody to become.
needs_others = pytest.mark.skipif(
    _UIDS.exists() and sum(int(line.split()[2]) for line in _UIDS.read_text().splitlines()) == 1,
    reason="in a user namespace with a single user",
)


def skip_if(reason: str, what: str) -> None:
    """Skip the test for this reason, if there is one; in CI, where nothing may be left out, it fails."""
    if reason and os.environ.get("CI"):
        pytest.fail(f"CI must run {what}: {reason}")
    if reason:
        pytest.skip(reason)
