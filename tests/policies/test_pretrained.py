"""The policy ``adaptive``: what it decides, that it comes with the package, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lbgym.errors import CheckpointError, PolicyError, UnknownNameError
from lbgym.evaluation import compare, parse_contender
from lbgym.features import FEATURE_NAMES
from lbgym.policies import load_policy, make_agent, pretrained
from lbgym.policies.estimator import CONSTANTS, INPUTS, LARGEST_CHANGE, IndexEstimator, initial_parameters
from lbgym.policies.neural import EstimatorPolicy
from lbgym.policies.pretrained import cards
from lbgym.scenarios import Exponential, Scenario, Server, Workload, named_scenario
from lbgym.simulator import Simulation
from lbgym.snapshot import Snapshot

COLUMNS = 11


def observations(seed: int, shape: tuple[int, ...], steps: int = 12) -> list[tuple[NDArray[Any], NDArray[np.bool_]]]:
    """Features and active servers, with servers that come and go and servers that no flow has come back from."""
    rng = np.random.default_rng(seed)
    seen = []
    for step in range(steps):
        active = rng.random(shape) > (0.2 if step > 4 else 0.0)
        stats = rng.gamma(2.0, 0.5, (*shape, COLUMNS)) * active[..., None] * (rng.random((*shape, 1)) > 0.1)
        seen.append((stats.astype(np.float32), active))
    return seen


def parameters(seed: int, hidden: int = 4) -> dict[str, NDArray[Any]]:
    """Parameters of a policy that has learned something."""
    rng = np.random.default_rng(seed)
    found = initial_parameters(hidden, seed)
    found["constants"] = found["constants"] + 0.3 * rng.normal(size=len(CONSTANTS))
    found["head.weight"] = 0.3 * rng.normal(size=found["head.weight"].shape)
    return found


def pretrained_policy() -> EstimatorPolicy:
    policy = load_policy(pretrained.pretrained_file("adaptive"))
    assert isinstance(policy, EstimatorPolicy)
    return policy


@given(seed=st.integers(0, 2**16), servers=st.integers(1, 9))
def test_servers_that_are_permuted_have_their_actions_permuted(seed: int, servers: int) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(servers)
    weights, cores, m = rng.normal(size=servers), np.log(rng.integers(1, 9, servers)), np.log([3.0])
    one, other = (IndexEstimator(parameters(seed), 0.25) for _ in range(2))
    for stats, active in observations(seed, (servers,)):
        first = one(stats, active, weights, cores, m)
        second = other(stats[order], active[order], weights[order], cores[order], m)
        for a, b in zip(first, second, strict=True):
            np.testing.assert_allclose(a[order], b, rtol=1e-9, atol=1e-9)


def test_a_batch_of_candidates_acts_as_each_alone() -> None:
    candidates = [parameters(seed) for seed in range(3)]
    stacked = {name: np.stack([p[name] for p in candidates])[:, None] for name in candidates[0]}
    together = IndexEstimator(stacked, 0.25)
    alone = [[IndexEstimator(p, 0.25) for _ in range(2)] for p in candidates]
    weights, cores, m = np.zeros(5), np.log(np.array([1, 2, 4, 4, 8])), np.log([2.0])
    for stats, active in observations(1, (3, 2, 5)):
        changes, loads = together(stats, active, np.broadcast_to(weights, active.shape), cores, m)
        for p in range(3):
            for r in range(2):
                change, load = alone[p][r](stats[p, r], active[p, r], weights, cores, m)
                np.testing.assert_allclose(changes[p, r], change, rtol=1e-9, atol=1e-9)
                np.testing.assert_allclose(loads[p, r], load, rtol=1e-9, atol=1e-9)


def test_servers_that_do_not_exist_change_nothing() -> None:
    weights, cores, m = np.zeros(4), np.zeros(4), np.log([2.0])
    few, many = (IndexEstimator(parameters(3), 0.25) for _ in range(2))
    for stats, active in observations(2, (4,)):
        expected = few(stats, active, weights, cores, m)
        padded = np.concatenate([stats, np.zeros((3, COLUMNS), np.float32)]), np.append(active, [False] * 3)
        got = many(*padded, np.zeros(7), np.zeros(7), m)
        for a, b in zip(expected, got, strict=True):
            np.testing.assert_allclose(a, b[:4], rtol=1e-9, atol=1e-9)
            assert not b[4:].any()


@pytest.mark.parametrize(
    ("balancers", "per_core", "relief"), [(4, 0.7, 0.0), (4, 1.1, 0.3), (4, 3.0, 0.5), (1, 3.0, 0.0)]
)
def test_servers_near_saturation_are_relieved_of_flows_whatever_their_size(
    balancers: int, per_core: float, relief: float
) -> None:
    cores = np.array([1.0, 1.0, 4.0])
    stats = np.full((3, COLUMNS), 0.1, np.float32)
    stats[:, FEATURE_NAMES.index("n_flow_on")] = per_core * cores / balancers
    found = []
    for value in (1.0, 0.0):
        p = initial_parameters(0)
        for name, constant in (("relief", value), ("relief_from", 0.8)):
            p["constants"][list(CONSTANTS).index(name)] = constant
        estimator = IndexEstimator(p, 0.25)
        for _ in range(1000):
            _, loads = estimator(stats, np.ones(3, bool), np.log(cores), np.log(cores), np.log([float(balancers)]))
        found.append(loads * cores)
    np.testing.assert_allclose(found[1] - found[0], relief, atol=1e-6)
    assert (found[0] > 0.0).all()


def test_the_network_is_that_of_torch_to_float32_rounding() -> None:
    """The residual network written with torch's own layers, in float32."""
    torch = pytest.importorskip("torch")
    p = {name: value.astype(np.float32) for name, value in parameters(5, hidden=6).items()}
    estimator = IndexEstimator(p, 0.25)
    active = np.array([True, True, False, True])
    inputs = np.random.default_rng(0).normal(size=(4, len(INPUTS)))
    estimator(np.zeros((4, COLUMNS), np.float32), active, np.zeros(4), np.zeros(4), np.zeros(1))
    assert estimator._given is not None
    got = estimator._residual(inputs, estimator._given)
    encoder, head = torch.nn.Linear(len(INPUTS), 6), torch.nn.Linear(18, 2)
    with torch.no_grad():
        for layer, name in ((encoder, "encoder"), (head, "head")):
            layer.weight.copy_(torch.from_numpy(p[f"{name}.weight"].T))
            layer.bias.copy_(torch.from_numpy(p[f"{name}.bias"]))
        hidden = torch.tanh(encoder(torch.from_numpy(inputs.astype(np.float32))))[torch.from_numpy(active)]
        pooled = torch.cat([hidden.mean(0), hidden.amax(0)]).expand(len(hidden), -1)
        expected = head(torch.cat([hidden, pooled], -1)).numpy()
    np.testing.assert_allclose(got[active], expected, rtol=2e-5, atol=2e-6)


def test_equal_servers_get_equal_scores_whatever_is_configured_for_all() -> None:
    policy = pretrained_policy()
    agent = make_agent("adaptive", scenario=named_scenario("uniform"))
    agent.fit(4)
    stats = np.tile(np.linspace(0.5, 1.5, COLUMNS, dtype=np.float32), (4, 1))
    snapshot = Snapshot(1, 0.25, np.ones(4, np.bool_), stats, None, *np.zeros((4, 4), np.int64), 0)
    weights = agent(snapshot, np.ones(4))
    assert len(set(weights.tolist())) == 1
    assert agent.background is not None and len(set(agent.background.tolist())) == 1
    assert policy.num_servers is None


def play(balancers: int, seed: int, scenario: Scenario) -> tuple[NDArray[Any], NDArray[Any]]:
    """Weights of every step of every balancer, and FCTs."""
    agents = [make_agent("adaptive", scenario.num_servers, scenario=scenario) for _ in range(balancers)]
    simulation = Simulation(scenario, dispatch="marginal", service=False, record_flows=True)
    snapshot, weights, decided = simulation.reset([seed]), np.ones((balancers, scenario.num_servers)), []
    for _ in range(40):
        now = snapshot.part(0)
        weights = np.stack([a(replace(now, stats=now.stats[b]), weights[b]) for b, a in enumerate(agents)])
        loads = np.stack([np.asarray(agent.background) for agent in agents])
        decided.append(np.stack([weights, loads]))
        snapshot = simulation.step(weights[None], 0.25, background=loads[None])
    return np.array(decided), simulation.take_flows()["fct"]


def test_it_decides_the_same_bit_for_bit() -> None:
    servers = (Server(cores=2), Server(cores=2, speed=0.4), Server(cores=4))
    workload = Workload(demand=Exponential(mean=0.1), load=0.8)
    scenario = Scenario(servers=servers, workload=workload, balancers=2)
    first, second = play(2, 3, scenario), play(2, 3, scenario)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    decided = first[0]
    # Per core the slow server is worth less than the others, and each balancer counts on what the other holds.
    speeds = decided[-1, 0] / [2, 2, 4]
    assert (speeds[:, 1] < 0.8 * speeds[:, 0]).all() and (decided[-1, 1] > 0).all()
    assert (decided[:, 0].max(-1) / decided[:, 0].min(-1) <= 4 * np.exp(2 * LARGEST_CHANGE)).all()


def test_its_balancers_remember_for_themselves() -> None:
    agent = make_agent("adaptive", 3)
    twin = agent.copy()
    stats = np.ones((3, COLUMNS), np.float32)
    stats[1] *= 4.0
    snapshot = Snapshot(1, 0.25, np.ones(3, np.bool_), stats, None, *np.zeros((4, 3), np.int64), 0)
    for _ in range(20):
        agent(snapshot, np.ones(3))
    fresh = make_agent("adaptive", 3)
    assert np.array_equal(twin(snapshot, np.ones(3)), fresh(snapshot, np.ones(3)))
    assert not np.array_equal(agent(snapshot, np.ones(3)), fresh(snapshot, np.ones(3)))


def test_it_beats_what_knows_as_little_where_speeds_are_unknown() -> None:
    servers = tuple(Server(cores=2, speed=speed) for speed in (0.3, 0.5, 1.0, 1.0, 2.0, 2.0))
    scenario = Scenario(servers=servers, workload=Workload(demand=Exponential(mean=0.1), load=0.8), balancers=2)
    found = compare(scenario, "lsq,sed,adaptive", range(2), duration=30.0, processes=1)
    for metric in ("fct_mean", "fct_p99"):
        ours = found.values("adaptive", metric).mean()
        assert ours < 0.9 * min(found.values(other, metric).mean() for other in ("lsq", "sed"))


def test_weights_only() -> None:
    scenario = named_scenario("uniform")
    agent = make_agent("adaptive", scenario=scenario)
    n = scenario.num_servers
    agent.fit(n, index=False)
    stats = np.ones((n, COLUMNS), np.float32)
    weights = agent(Snapshot(1, 0.25, np.ones(n, np.bool_), stats, None, *np.zeros((4, n), np.int64), 0), np.ones(n))
    assert agent.weights_only and agent.background is None and agent.index(weights) is None and (weights > 0).all()
    agent.fit(n, index=True)
    assert not agent.weights_only
    # A rule that counts no flows gets weights, a rule without weights nothing.
    assert compare(scenario, "lsq,wcmp+adaptive", range(1), duration=5.0, processes=1).labels[1] == "wcmp+adaptive"
    with pytest.raises(PolicyError, match="'lsq' reads no weights"):
        parse_contender("lsq+adaptive")


def test_the_file_in_the_package() -> None:
    folder = Path(pretrained.__file__).parent
    assert sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) <= 500_000
    known = pretrained.card("Adaptive")
    assert pretrained.pretrained_file("adaptive") == folder / known.file
    assert known.trained_on and known.command and known.limits and known.suite["summary"]
    assert parse_contender("adaptive").path == str(folder / known.file)


def test_acting_needs_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from lbgym.policies import make_agent
print(make_agent("adaptive", 3).name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "adaptive\n"


def test_names_that_there_are_not() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown pretrained policy 'adaptiv'\. Did you mean 'adaptive'"):
        pretrained.pretrained_file("adaptiv")
    with pytest.raises(UnknownNameError, match=r"unknown policy 'adaptve'\. Did you mean 'adaptive'"):
        make_agent("adaptve", 3)
    with pytest.raises(UnknownNameError, match=r"unknown contender 'adaptve'\. Did you mean 'adaptive'"):
        parse_contender("adaptve")


def test_files_that_are_not_what_the_index_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = pretrained.card("adaptive")
    monkeypatch.setattr(cards, "_index", lambda: {"adaptive": replace(known, sha256="0" * 64)})
    with pytest.raises(CheckpointError, match=r"adaptive.pt has SHA-256 [0-9a-f]{12}\.\.\., and index.toml says 0{12}"):
        make_agent("adaptive")
    monkeypatch.setattr(cards, "_index", lambda: {"adaptive": replace(known, file="lost.pt")})
    with pytest.raises(CheckpointError, match=r"lost\.pt cannot be read"):
        parse_contender("adaptive")
    with pytest.raises(CheckpointError, match="has format 2; this lbgym reads 1"):
        cards.read_index("format = 2")
    with pytest.raises(CheckpointError, match="pretrained policy 'a' has no sha256, version"):
        cards.read_index('format = 1\n[a]\nfile = "a.pt"')


def test_parameters_of_another_version() -> None:
    with pytest.raises(CheckpointError, match=r"has \d+ constants, and these .* of another version's with 3"):
        IndexEstimator({"constants": np.zeros(3)}, 0.25)


def test_the_first_estimate_is_what_is_configured() -> None:
    """Before any flow has come back weights are as configured, and only the balancers' own flows count."""
    first = IndexEstimator(initial_parameters(4), 0.25)
    weights = np.log([1.0, 3.0, 2.0])
    change, load = first(np.zeros((3, COLUMNS), np.float32), np.ones(3, np.bool_), weights, np.zeros(3), np.zeros(1))
    constants = dict(zip(CONSTANTS, initial_parameters(0)["constants"], strict=True))
    np.testing.assert_allclose(change, 0.0, atol=1e-12)
    np.testing.assert_allclose(load, math.exp(constants["rest"] - 0.5 * constants["rest_load"]))


def background_of(flows: list[list[float]], steps: int, **constants: float) -> NDArray[np.float64]:
    """Background loads of four servers of a core behind three balancers, after so many steps of these flows in turn."""
    values = dict.fromkeys(CONSTANTS, 0.0) | {"log_slow": 0.7, "log_noise": 30.0, "rest": -30.0, "log_linear": -30.0}
    values |= {"log_memory": 4.0, "log_long": 4.0} | constants
    estimator = IndexEstimator({"constants": np.array([values[name] for name in CONSTANTS])}, 0.25)
    stats = np.zeros((4, COLUMNS))
    stats[:, FEATURE_NAMES.index("fct_mean_decay")] = 0.1
    for step in range(steps):
        stats[:, FEATURE_NAMES.index("n_flow_on")] = flows[step % len(flows)]
        _, load = estimator(stats, np.ones(4, np.bool_), np.zeros(4), np.zeros(4), np.array([math.log(3.0)]))
    return load


def test_other_balancers_hold_what_this_one_does_unless_that_is_chance() -> None:
    # A second says little: all servers are thought to be alike.
    brief = background_of([[6.0, 2.0, 4.0, 4.0]], 4, log_sampling=3.0)
    np.testing.assert_allclose(brief, background_of([[4.0] * 4], 4), rtol=0.05)
    # What stays so for ten minutes is no chance.
    np.testing.assert_allclose(background_of([[6.0, 2.0, 4.0, 4.0]], 2400), [12.0, 4.0, 8.0, 8.0], rtol=0.02)
    # The level follows within seconds, the shares do not.
    rising = background_of([[2.0, 6.0, 4.0, 4.0]] * 600 + [[24.0, 8.0, 16.0, 16.0]] * 40, 640)
    assert rising.sum() == pytest.approx(2 * 64.0, rel=0.05) and rising[0] < rising[1]


def test_an_offset_by_capacities_changes_no_order() -> None:
    """It adds the same to every score of the rule where servers hold no fewer flows than they have cores."""
    flows = [[3.0, 1.0, 2.0, 5.0]]
    near, far = background_of(flows, 400), background_of(flows, 400, log_linear=1.0)
    np.testing.assert_allclose(far - near, math.e * 2 / 3, rtol=1e-9)
