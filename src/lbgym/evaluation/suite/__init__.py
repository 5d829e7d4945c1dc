"""A fixed benchmark: contenders through a versioned protocol, scores, results that anyone can repeat."""

from __future__ import annotations

from .protocol import Case, Protocol
from .protocols import protocol_names, protocol_of
from .results import Entry, SuiteResult, read_result
from .run import Backend, run_suite
from .scores import Estimate, Scores
from .verify import Mismatch, Verification, verify_result

__all__ = [
    "Backend",
    "Case",
    "Entry",
    "Estimate",
    "Mismatch",
    "Protocol",
    "Scores",
    "SuiteResult",
    "Verification",
    "protocol_names",
    "protocol_of",
    "read_result",
    "run_suite",
    "verify_result",
]
