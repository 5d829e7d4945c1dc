"""The closed forms of ``benchmarks/exactness.py`` with fewer flows; the full size is run there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import exactness
from lbgym.scenarios import Server

from .running import run_flows, trace_scenario


@pytest.mark.parametrize("suite", [suite for suite, _ in exactness.SUITES], ids=lambda suite: suite.__name__)
def test_closed_form(suite):
    keys = {"servers": 1000, "replicas": 4} if suite is exactness.power_of_two else {}
    checks = suite(400_000, **keys)
    assert checks
    assert not [check for check in checks if not check.passed]


def rejected(gap: float, demand: float) -> int:
    scenario = trace_scenario(np.arange(200) * gap, np.full(200, demand), Server(workers=1, backlog=0))
    return int(run_flows(scenario, 400 * gap)[0].observe().rejected.sum())


def test_exact_ties_as_the_theory_says() -> None:
    """D/D/1/1: a tie is one where both instants are the same float64."""
    assert rejected(0.125, 0.125) == 0
    assert rejected(0.1, 0.1) == 21
    assert rejected(0.1, 0.1 * (1 - 1e-12)) == 0


def test_erlang_formulas():
    """Against the sums they abbreviate."""
    offered, servers = 3.2, 4
    terms = [offered**n / math.factorial(n) for n in range(servers + 1)]
    assert exactness.erlang_b(servers, offered) == pytest.approx(terms[-1] / sum(terms))
    late = terms[-1] / (1 - offered / servers)
    assert exactness.erlang_c(servers, offered) == pytest.approx(late / (sum(terms[:-1]) + late))


def test_a_false_closed_form_is_noticed():
    """3 % off the true mean sojourn fails by far more than four standard errors."""
    window = exactness.measure(exactness.cluster(0.5, exactness.Server()), 1_000_000, warm_up=200.0, seed=1)
    arguments = window.delta["fct_sum"][:, 0], window.completed[:, 0], window.flows
    assert exactness.from_replicas("true", 2.0, *arguments).passed
    assert not exactness.from_replicas("false", 2.06, *arguments).passed


def test_uneven_counts_are_noticed():
    assert exactness.chi_square("even", [10_000, 10_050, 9_950], [1, 1, 1], 30_000).passed
    assert not exactness.chi_square("uneven", [10_000, 10_500, 9_500], [1, 1, 1], 30_000).passed
    assert not exactness.chi_square("impossible", [10_000, 10_000, 1], [1, 1, 0], 20_001).passed


def test_normal_equivalent_keeps_the_tail():
    z = exactness.normal_equivalent(-3.0, 7)
    assert stats.norm.cdf(z) == pytest.approx(stats.t.cdf(-3.0, 7))
