from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lbgym import LoadBalanceEnv
from lbgym.errors import LbgymError, PolicyError
from lbgym.evaluation import RunSettings, compare, parse_contender, simulate
from lbgym.evaluation.runner import agents_of, decide
from lbgym.policies import Policy, load_policy
from lbgym.scenarios import load_scenario

sb3 = pytest.importorskip("stable_baselines3")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

KEYS: dict[str, Any] = {"observation": "flat", "normalize": True}
ALGORITHMS = {
    "PPO": {"action_type": "discrete"},
    "A2C": {"action_type": "joint", "action_weights": (1.0, 2.0)},
    "DQN": {"action_type": "joint", "action_weights": (1.0, 2.0)},
    "SAC": {"action_type": "normalized"},
    "TD3": {"action_type": "continuous"},
}


def model_of(algorithm: str, env: LoadBalanceEnv, **options: Any) -> Any:
    small = {"policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
    if algorithm in ("PPO", "A2C"):
        small["n_steps"] = 8
    policy = "MultiInputPolicy" if env.observation_layout.observation == "dict" else "MlpPolicy"
    return getattr(sb3, algorithm)(policy, env, **small, **options)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_models_of_every_algorithm_act_as_they_did(algorithm: str, tmp_path: Path) -> None:
    keys = KEYS | ALGORITHMS[algorithm]
    env = LoadBalanceEnv(**keys)
    model = model_of(algorithm, env)
    model.lbgym_env_kwargs = keys | {"dispatch": "p2c_sed"}
    model.save(tmp_path / "model.zip")
    policy = load_policy(tmp_path / "model.zip")
    assert isinstance(policy, Policy) and policy.dispatch == "p2c_sed"
    seen, info = env.reset(seed=0)
    for _ in range(5):
        action = policy.act(seen, info)
        assert np.array_equal(action, model.predict(seen, deterministic=True)[0])
        seen, _, _, _, info = env.step(action)
    given = load_policy(tmp_path / "model.zip", algorithm=getattr(sb3, algorithm))
    assert np.array_equal(given.act(seen, info), policy.act(seen, info))


@pytest.mark.parametrize("observation", ["matrix", "flat", "dict"])
@pytest.mark.parametrize("use_ground_truth", [False, True])
@pytest.mark.parametrize("action_type", ["discrete", "joint", "continuous", "normalized"])
def test_the_environment_shows_in_the_spaces(
    observation: str, use_ground_truth: bool, action_type: str, tmp_path: Path
) -> None:
    keys = {"observation": observation, "normalize": True, "use_ground_truth": use_ground_truth}
    env = LoadBalanceEnv(**keys, action_type=action_type)
    model_of("PPO", env).save(tmp_path / "model.zip")
    policy = load_policy(tmp_path / "model.zip")
    expected = keys | {"action_type": action_type}
    assert {key: policy.env_kwargs[key] for key in expected} == expected
    layout, codec = policy.codecs(4)
    assert layout.space == env.observation_space and codec.space == env.action_space


def test_a_model_serves_in_a_comparison_and_sets_its_own_weights(tmp_path: Path) -> None:
    scenario = load_scenario("marllb-moderate")
    keys = {
        "observation": "matrix",
        "normalize": True,
        "action_type": "continuous",
        "min_weight": 0.5,
        "max_weight": 2.0,
    }
    env = LoadBalanceEnv(**keys, scenario=scenario)
    model = model_of("PPO", env, use_sde=False)
    model.lbgym_env_kwargs = keys | {"dispatch": "p2c_sed", "step_interval": 0.5}
    path = tmp_path / "agent.zip"
    model.save(path)
    contender = parse_contender(str(path))
    settings = RunSettings(duration=4.0, warmup=1.0, drain=2.0, keep_flows=True)
    run = simulate(scenario, contender, 0, settings, series=True)
    assert run is not None and run.dispatch == "p2c_sed" and run.series is not None
    # a step of 0.5 s as in training, but the flows and their window are everybody's
    assert np.allclose(np.diff(run.series.time), 0.5)
    other = simulate(scenario, parse_contender("sed"), 0, settings)
    assert other is not None and other.flows is not None and run.flows is not None
    assert np.array_equal(run.flows["arrival"], other.flows["arrival"])
    forced = simulate(scenario, parse_contender(f"sed+{path}"), 0, settings)
    assert forced is not None and forced.dispatch == "sed"
    # every balancer acts on its own observation, as the model itself would
    from lbgym.simulator import Simulation

    simulation = Simulation(scenario, dispatch="p2c_sed")
    agents = agents_of(contender, scenario, 0)
    snapshot, weights = simulation.reset([0]), np.ones((1, 2, 4))
    for _ in range(4):
        weights = decide(agents, snapshot, weights)
        for b in range(2):
            seen = env.observation_layout.encode(snapshot.stats[0, b], None, snapshot.active[0])
            expected = env.action_codec.to_weights(model.predict(seen, deterministic=True)[0])
            assert np.array_equal(weights[0, b], expected)
        snapshot = simulation.step(weights, 0.5)
    comparison = compare(scenario, [contender, "lsq"], 2, duration=4.0, processes=1)
    assert comparison.labels == ["agent", "lsq"] and "agent" in comparison.verdict("agent")


def test_a_model_for_other_servers_is_refused(tmp_path: Path) -> None:
    model_of("PPO", LoadBalanceEnv(**KEYS)).save(tmp_path / "four.zip")
    with pytest.raises(PolicyError, match=r"four\.zip was trained on observations Box.*8 servers"):
        compare("heterogeneous", [str(tmp_path / "four.zip")], 1, processes=1)


def test_a_model_with_unrecorded_weights_is_refused(tmp_path: Path) -> None:
    model_of("PPO", LoadBalanceEnv(**KEYS, action_weights=(1, 2, 3, 4, 5))).save(tmp_path / "five.zip")
    with pytest.raises(PolicyError, match=r"trained on actions MultiDiscrete\(\[5 5 5 5\]\)"):
        load_policy(tmp_path / "five.zip").codecs(4)
    told = load_policy(tmp_path / "five.zip", env_kwargs={"action_weights": (1, 2, 3, 4, 5)})
    assert told.codecs(4)[1].to_weights(np.array([0, 1, 2, 4])).tolist() == [1, 2, 3, 5]


def test_models_of_other_environments_are_refused(tmp_path: Path) -> None:
    sb3.PPO("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "cart.zip")
    with pytest.raises(PolicyError, match="not trained on an lbgym environment"):
        load_policy(tmp_path / "cart.zip")


@pytest.mark.parametrize("name", ["model.zip", "model.pt"])
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("no model")
    with pytest.raises(LbgymError, match=name):
        load_policy(tmp_path / name)
    with pytest.raises(PolicyError, match="no trained model at"):
        load_policy(tmp_path / "missing" / name)
    with pytest.raises(PolicyError, match=r"\.pt or \.zip file"):
        (tmp_path / "model.onnx").touch()
        load_policy(tmp_path / "model.onnx")


def test_a_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(PolicyError, match="not a model of Stable-Baselines3"):
        load_policy(tmp_path / "x.zip")


def test_our_checkpoints_balance_any_number_of_servers(tmp_path: Path) -> None:
    from lbgym.training import PPOConfig, train_ppo

    config = PPOConfig(
        scenario="uniform", total_steps=256, num_envs=8, num_steps=16, replicas_per_seed=2, dispatch="sed"
    )
    result = train_ppo(config, out=tmp_path)
    assert result.checkpoint is not None
    contender = parse_contender(f"agent={result.checkpoint}")
    for name in ("uniform", "marllb-moderate"):
        run = simulate(load_scenario(name), contender, 0, RunSettings(3.0, 1.0, 1.0), series=True)
        assert run is not None and run.dispatch == "sed" and run.series is not None
        assert np.isfinite(run.series.weights).all()
