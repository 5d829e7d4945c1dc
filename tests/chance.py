"""What chance allows, for tests of real traffic, whose sample is another one in every run."""

from __future__ import annotations

from collections.abc import Iterable

from scipy.stats import binomtest

#: A correct program fails so often, in each number that is tested: all suites have fewer than a hundred.
_RARE = 1e-7


def as_likely(counts: Iterable[int], shares: Iterable[float]) -> bool:
    """True if independent draws by these shares give such counts, but for one case in ten million.

    Args:
        counts: of each kind; all draws are among them.
        shares: of each kind, adding up to 1.
    """
    counts = [int(count) for count in counts]
    total = sum(counts)
    return all(
        binomtest(count, total, share).pvalue > _RARE if share > 0.0 else count == 0
        for count, share in zip(counts, shares, strict=True)
    )
