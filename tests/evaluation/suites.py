"""A protocol that takes a second, of the same type as the published ones; as a script, its runs in a folder."""

from __future__ import annotations

import sys

from lbgym.evaluation.suite import Case, Protocol, run_suite
from lbgym.scenarios import Event, Exponential, Scenario, Server, Workload

_SERVERS = (Server(cores=1), Server(cores=2), Server(cores=2, speed=0.5))


def small(name: str, **changes: object) -> Scenario:
    keys = {"servers": _SERVERS, "workload": Workload(load=0.7, demand=Exponential(mean=0.05)), "reject_timeout": 5.0}
    return Scenario(name=name, **({"duration": 8.0} | keys | changes))  # type: ignore[arg-type]


TINY = Protocol(
    version="tiny",
    cases=(
        Case(scenario=small("one"), family="steady", warmup=2.0),
        Case(scenario=small("two", balancers=2), family="steady", warmup=2.0),
        Case(scenario=small("down", events=(Event(time=4.0, kind="down", server=0),)), family="changing", warmup=2.0),
    ),
    seeds=(0, 1, 2, 5),
)


if __name__ == "__main__":
    run_suite(
        TINY,
        "sed,sed+latency",
        sys.argv[1],
        processes=int(sys.argv[2]),
        progress=lambda done, total, label, case, seed: print(done, label, case, seed, flush=True),
    )
