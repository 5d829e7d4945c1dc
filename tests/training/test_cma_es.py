"""The recipe of the policy ``adaptive``: the search, what it minimises, and how it goes on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("cma")

from lbgym.errors import CheckpointError, InvalidOptionError, UnknownNameError, UnsupportedSpaceError
from lbgym.evaluation import compare
from lbgym.policies import load_policy, read_checkpoint
from lbgym.policies.estimator import CONSTANTS, initial_parameters
from lbgym.policies.neural import EstimatorPolicy
from lbgym.policies.pretrained import pretrained_file
from lbgym.scenarios import Exponential, Scenario, Server, Workload
from lbgym.training import CMAESConfig, Progress, train_cma_es
from lbgym.training.cma_es import Search
from lbgym.training.pretraining import FAMILIES, SHAPES, Shape, draw_scenarios, measure
from tests.test_cli import in_process

TINY: dict[str, Any] = {
    "scenario": "uniform", "num_envs": 4, "max_steps": 12, "warmup": 1.0, "hidden": 2, "network_from": 2,
    "scenarios": 1, "validate_every": 2, "threads": 1,
}  # fmt: skip
#: Environment steps of a generation: 4 candidates on 4 draws.
GENERATION = 4 * 4 * 12


def constants(**values: float) -> np.ndarray[Any, Any]:
    vector = initial_parameters(0)["constants"].copy()
    for name, value in values.items():
        vector[list(CONSTANTS).index(name)] = value
    return vector


#: Weights as configured and no background loads.
NOTHING = constants(gain=0.0, gain_load=0.0, gain_balancers=0.0, rest=-800.0, log_field=-800.0, relief=0.0)


def test_doing_nothing_under_sed_is_sed() -> None:
    rng = np.random.default_rng(0)
    scenarios = [s for shape in (Shape(2, 6, 3),) for s in draw_scenarios(shape, rng)]
    # Weights of one per usable core are what estimates of equal speeds agree with.
    scenarios = [
        replace(s, servers=tuple(replace(x, weight=float(x.usable_cores)) for x in s.servers)) for s in scenarios
    ]
    vectors = np.stack([NOTHING, constants()])
    score = measure({"constants": vectors}, scenarios, [1, 2, 3], servers=6, duration=8.0, warmup=2.0, dispatch="sed")
    assert not score.fct_mean[0].any() and not score.fct_p99[0].any()
    assert score.fct_mean[1].all()
    doubled = replace(score, fct_mean=np.array([[0.2, -0.4]]), fct_p99=np.zeros((1, 2)))
    assert doubled.total(0.0) == pytest.approx([-0.1]) and doubled.total(2.0) == pytest.approx([0.1])


def test_candidates_are_measured_as_the_policy_acts(tmp_path: Path) -> None:
    """A candidate's score is that of its file in a comparison on the same flows, but for float32 actions."""
    servers = tuple(Server(cores=2, speed=speed) for speed in (0.4, 1.0, 1.6))
    scenario = Scenario(servers=servers, workload=Workload(demand=Exponential(mean=0.1), load=0.7), balancers=2)
    config = CMAESConfig(**{**TINY, "scenario": scenario, "hidden": 0, "total_steps": 1})
    result = train_cma_es(config, out=tmp_path / "one.pt")
    parameters = {"constants": np.asarray(result.policy.parameters["constants"], np.float64)[None]}
    score = measure(parameters, [scenario], [5], servers=3, duration=30.0, warmup=5.0)
    found = compare(scenario, f"sed,mine={tmp_path / 'one.pt'}", [5], duration=30.0, warmup=5.0, processes=1)
    sed, mine = (found.values(label, "fct_mean")[0] for label in ("sed", "mine"))
    # The last flows are cut off in the one, and followed to their end in the other.
    assert np.exp(score.fct_mean[0, 0]) == pytest.approx(mine / sed, rel=0.03)


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = CMAESConfig(**TINY, total_steps=6 * GENERATION)
    seen: list[Progress] = []
    one = train_cma_es(whole, out=tmp_path / "one.pt", callback=seen.append)
    assert [p.step for p in seen] == [GENERATION * (i + 1) for i in range(6)]
    assert all(np.isfinite([p.reward, p.fct_mean, *p.losses.values()]).all() for p in seen)
    first = train_cma_es(replace(whole, total_steps=3 * GENERATION), out=tmp_path / "part")
    assert first.checkpoint == tmp_path / "part" / "cma-es.pt"
    other = train_cma_es(whole, resume_from=first.checkpoint, out=tmp_path / "other.pt")
    assert [p.step for p in other.history] == [p.step for p in seen[3:]]
    assert [p.losses for p in other.history] == [p.losses for p in seen[3:]]
    for name, values in one.policy.parameters.items():
        np.testing.assert_array_equal(values, other.policy.parameters[name])
    read = load_policy(tmp_path / "one.pt")
    assert read.env_kwargs["action_type"] == "index" and read.dispatch == "marginal" and read.num_servers is None
    with pytest.raises(CheckpointError, match=r"one\.pt has 4 candidates of \d+ parameters, but .* 5 of"):
        train_cma_es(replace(whole, num_envs=5), resume_from=tmp_path / "one.pt")


def test_the_search_finds_what_helps() -> None:
    """Weights are configured wrongly, so that estimates should be trusted."""
    servers = tuple(Server(cores=2, weight=weight) for weight in (1.0, 1.0, 8.0))
    scenario = Scenario(servers=servers, workload=Workload(demand=Exponential(mean=0.1), load=0.7))
    fixed = {name: value for name, (value, _) in CONSTANTS.items() if name not in ("log_noise", "log_smoothing")}
    config = CMAESConfig(
        **{**TINY, "scenario": scenario, "hidden": 0, "max_steps": 80, "warmup": 4.0, "num_envs": 6}, fixed=fixed
    )
    search = Search(config)
    # They are not at first.
    search._first[list(CONSTANTS).index("log_noise")] = 1.5
    search.prepare()
    before = search._best_score
    for _ in range(6):
        search.generation()
    assert search._best_score < before


def test_what_is_trained_on() -> None:
    rng = np.random.default_rng(3)
    drawn = [(shape, scenario) for shape in SHAPES for _ in range(4) for scenario in draw_scenarios(shape, rng)]
    assert {scenario.balancers for _, scenario in drawn} == {1, 2, 4, 8}
    assert all(2 <= scenario.num_servers <= shape.servers <= 64 for shape, scenario in drawn)
    assert {scenario.name for _, scenario in drawn} == {family.name for family, _ in FAMILIES}
    wrong = [any(s.weight not in (None, s.capacity) for s in scenario.servers) for _, scenario in drawn]
    assert 0 < sum(wrong) < len(drawn) and any(scenario.events for _, scenario in drawn)
    assert sum(share for _, share in FAMILIES) == pytest.approx(1.0)


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSpaceError, match="CMA-ES cannot take action_type 'discrete': use"):
        CMAESConfig(action_type="discrete")
    with pytest.raises(UnknownNameError, match=r"unknown constant 'gian' in CMAESConfig\.fixed\. Did you mean 'gain'"):
        CMAESConfig(fixed={"gian": 1.0})
    with pytest.raises(InvalidOptionError, match="below the episode's 3 s, which are max_steps=12; got 12"):
        CMAESConfig(max_steps=12)
    with pytest.raises(InvalidOptionError, match="must leave two constants or more to search for, got 0"):
        CMAESConfig(fixed={name: value for name, (value, _) in CONSTANTS.items()})
    with pytest.raises(InvalidOptionError, match=rf"to search for, got 1: fixed has 1 of {len(CONSTANTS)}, free 2"):
        CMAESConfig(fixed={"gain": 1.0}, free=("gain", "rest"))
    (tmp_path / "no.pt").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="damaged"):
        train_cma_es(CMAESConfig(**TINY, initial=str(tmp_path / "no.pt")))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> str:
        code, out, _ = in_process(capsys, *arguments)
        assert code == 0
        return out

    apart = ("scenario", "num_envs")
    options = [f"--set={name}={json.dumps(value)}" for name, value in TINY.items() if name not in apart]
    out = tmp_path / "mine.pt"
    run("train", "--algo", "cma-es", "--scenario", "uniform", "--num-envs", 4, "--steps", 1, "--out", out, *options)
    saved = read_checkpoint(out, "cma-es")
    assert saved["step"] == GENERATION and saved["config"]["scenario"] == "uniform"
    described = run("describe", out)
    assert re.search(r"recipe +cma-es, 192 steps, \d+ parameters", described) and "scenario  " in described
    card = json.loads(run("describe", "adaptive", "--json"))
    assert card["card"]["name"] == "adaptive" and card["servers"] is None and card["weights_alone"]
    # Whatever the terminal's width.
    shown = "".join(run("describe", "Adaptive").split())
    assert "trainedon" in shown and "limits" in shown and card["card"]["sha256"] in shown
    code, _, error = in_process(capsys, "describe", "adaptive", "--toml")
    assert code == 2 and "--toml is for scenarios, and 'adaptive' is a trained policy" in error


def test_training_can_begin_with_a_pretrained_policy() -> None:
    begun = Search(CMAESConfig(**{**TINY, "hidden": 0}, initial="adaptive"))
    known = load_policy(pretrained_file("adaptive"))
    assert isinstance(known, EstimatorPolicy)
    np.testing.assert_array_equal(begun._first, np.asarray(known.parameters["constants"], np.float64))
