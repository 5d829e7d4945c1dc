"""Sizes beyond all reason: one clear sentence, at once, and no traceback of the system's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lbgym import (
    FlowDispatchVectorEnv,
    LoadBalanceEnv,
    LoadBalanceVectorEnv,
    MultiLoadBalanceVectorEnv,
    ReservoirSampler,
    SharedMemoryRegion,
)
from lbgym.errors import InvalidWeightsError, LbgymError
from lbgym.evaluation import compare
from lbgym.scenarios import (
    Sampling,
    Scenario,
    ScenarioDistribution,
    Server,
    Uniform,
    Workload,
    default_scenario,
    servers_of,
)

HUGE = 10**12
BASE = default_scenario(2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda n: LoadBalanceEnv(num_servers=n), "num_servers must be a whole number from 1 to 65536"),
        (lambda n: LoadBalanceVectorEnv(n), "num_envs must be a whole number from 1 to 10000000"),
        (lambda n: FlowDispatchVectorEnv(n), "num_envs must be a whole number from 1 to 10000000"),
        (
            lambda n: MultiLoadBalanceVectorEnv(1, num_balancers=n),
            "num_balancers must be a whole number from 1 to 1024",
        ),
        (lambda n: BASE.with_changes(balancers=n), "balancers must be a whole number from 1 to 1024"),
        (lambda n: servers_of((n, Server())), "a group of servers must be a whole number from 0 to 65536"),
        (lambda n: ScenarioDistribution(base=BASE, num_servers=Uniform(1, n)), "num_servers must be a whole number"),
        (lambda n: Server(cores=n), "Server.cores must be a whole number from 1 to 2147483647"),
        (lambda n: Server(workers=n), "Server.workers must be a whole number from 1 to 2147483647"),
        (lambda n: Server(workers=1, backlog=n), "Server.backlog must be a whole number from 0 to 2147483647"),
        (lambda n: Sampling(capacity=n), "Sampling.capacity must be a whole number from 1 to 32767"),
        (lambda n: ReservoirSampler(capacity=n), "capacity must be a whole number from 1 to 32767"),
        (lambda n: Scenario(servers=(Server(),), workload=Workload(rate=n)), "the arrival rate, .* at most 1e\\+08"),
        (
            lambda n: SharedMemoryRegion.create("absurd", num_servers=4, capacity=n),
            "capacity must be a whole number from",
        ),
        (lambda n: SharedMemoryRegion.create("absurd", num_servers=n), "num_servers must be a whole number from 1 to"),
        (
            lambda n: compare("uniform", "sed", seeds=n, duration=1.0),
            "number of seeds must be a whole number from 1 to",
        ),
    ],
)
@pytest.mark.parametrize("size", [HUGE, 10**40])
def test_a_size_beyond_reason_is_one_sentence(make: Callable[[int], Any], sentence: str, size: int) -> None:
    with pytest.raises(LbgymError, match=sentence) as caught:
        make(size)
    assert "\n" not in str(caught.value)


def test_sizes_that_are_allowed_but_do_not_fit_into_memory() -> None:
    script = """
import resource
import lbgym
from lbgym.errors import InvalidOptionError
from lbgym.scenarios import Sampling, Scenario, Server, Workload

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
scenario = Scenario(
    servers=(Server(),) * 60_000, workload=Workload(rate=1.0), sampling=Sampling(capacity=32_767), balancers=1024
)
for make in (lbgym.LoadBalanceEnv, lbgym.LoadBalanceVectorEnv):
    try:
        make(scenario=scenario)
    except InvalidOptionError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    sentence = (
        "not enough memory for 1 replicas of 60,000 servers behind 1,024 balancers, their open flows and reservoirs"
    )
    assert [line.startswith(sentence) for line in done.stdout.splitlines()] == [True, True]


def test_a_maglev_table_that_one_weight_dominates_is_refused_where_it_would_take_minutes() -> None:
    n = 20_000
    env = LoadBalanceEnv(num_servers=n, dispatch="maglev", action_type="continuous", max_weight=1e12)
    env.reset(seed=0)
    weights = np.ones(n)
    weights[7] = 1e12
    with pytest.raises(
        InvalidWeightsError, match=r"a Maglev table of 20,000 servers takes too long .* largest is 1e\+12"
    ):
        env.step(weights)
    # The episode is as it was, and weights of a usual range are taken.
    weights[7] = 10.0
    *_, info = env.step(weights)
    assert info["weights"][7] == 10.0
    env.close()
    few = LoadBalanceEnv(num_servers=4, dispatch="maglev", action_type="continuous", max_weight=1e12)
    few.reset(seed=0)
    few.step(np.array([1e12, 1.0, 1.0, 1.0]))
    started = few._core.snapshot.started  # type: ignore[union-attr]
    assert started[0] == started.sum() > 0
    few.close()
