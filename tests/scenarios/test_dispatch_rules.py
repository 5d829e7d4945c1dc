"""The table of dispatch rules agrees with what the simulator does under each."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lbgym.cli import main
from lbgym.scenarios import DISPATCH_RULES, RULES, WEIGHTED_RULES, Scenario, Server, Workload, servers_of
from lbgym.simulator import Simulation, dispatch, layout

SCENARIO = Scenario(servers=servers_of((4, Server(cores=2)), (2, Server(speed=0.5))), workload=Workload(load=0.9))


def flows(rule: str, weights: list[float]) -> bytes:
    simulation = Simulation(SCENARIO, dispatch=rule, record_flows=True)
    simulation.reset([1])
    simulation.step(np.array([[weights]]), 20.0)
    return simulation.take_flows()["server"].tobytes()


def test_the_kernel_numbers_the_rules_in_the_order_of_the_table() -> None:
    assert [getattr(layout, name.upper()) for name in DISPATCH_RULES] == list(range(len(RULES)))
    assert len(RULES) == layout.EXTERNAL


@pytest.mark.parametrize("name", DISPATCH_RULES)
def test_weights_matter_where_the_table_says(name: str) -> None:
    changed = flows(name, [1.0] * 6) != flows(name, [1.0, 5.0, 1.0, 3.0, 0.2, 1.0])
    assert changed == RULES[name].weighted == (name in WEIGHTED_RULES)


@pytest.mark.parametrize("name", DISPATCH_RULES)
def test_the_kernels_predicates_agree_with_the_table(name: str) -> None:
    rule, number = RULES[name], DISPATCH_RULES.index(name)
    assert dispatch.is_oracle(number) == rule.oracle == name.startswith("oracle_")
    assert dispatch.is_two_choice(number) == (rule.mechanism == "two_choices")
    assert dispatch.uses_counters(number) == (rule.mechanism == "index")
    # Unfinished work shrinks all the time: no score of it can be kept.
    assert dispatch.keeps_scores(number) == (rule.mechanism == "index" and name != "oracle_least_work")


def test_the_command_line_lists_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["scenarios", "--rules", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert [rule["name"] for rule in listed] == list(DISPATCH_RULES)
    with pytest.raises(SystemExit):
        main(["scenarios", "--rules"])
    out = capsys.readouterr().out
    assert all(name in out for name in DISPATCH_RULES)
