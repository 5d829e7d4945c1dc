"""Every recipe by its name, and configurations as TOML files."""

from __future__ import annotations

import copy
import math
import pickle
import re
import tomllib
from dataclasses import fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from lbgym.errors import CheckpointError, InvalidOptionError, LbgymError, UnknownNameError
from lbgym.training import (
    RECIPES,
    PPOConfig,
    algo_of,
    make_config,
    read_checkpoint,
    read_config,
    to_toml,
    train,
)
from lbgym.training.config import TrainingConfig, plain_config, saved_config

#: What a family of recipes needs to be imported.
FRAMEWORKS = {"sb3": "stable_baselines3", "rllib": "ray", "benchmarl": "benchmarl"}


#: Recipes that can be imported here; in the environment of ``make test-frameworks`` that is all.
INSTALLED = [
    algo for algo, recipe in RECIPES.items() if recipe.module not in FRAMEWORKS or find_spec(FRAMEWORKS[recipe.module])
]


@pytest.mark.parametrize("module", FRAMEWORKS)
def test_the_names_are_those_of_the_modules(module: str) -> None:
    pytest.importorskip(FRAMEWORKS[module])
    algorithms = import_module(f"lbgym.training.{module}").ALGORITHMS
    assert {name for name, recipe in RECIPES.items() if recipe.module == module} == {
        f"{module}-{a}" for a in algorithms
    }


@pytest.mark.parametrize("algo", INSTALLED)
def test_a_configuration_survives_toml(algo: str, tmp_path: Path) -> None:
    plain = make_config(algo)
    assert isinstance(plain, TrainingConfig)
    changed = replace(plain, seed=7, gamma=0.5, total_steps=None, seconds=3.5, reward_type={"jain": 1.0, "max": 0.5})
    for config in (plain, changed):
        (tmp_path / "config.toml").write_text(to_toml(algo, config))
        named, values = read_config(tmp_path / "config.toml")
        assert named == algo
        # no null in TOML: what is left out is the default, so a limit that is None must not come back as a default
        read = make_config(algo, values)
        assert read == config


@pytest.mark.parametrize("algo", INSTALLED)
def test_every_field_says_what_it_is(algo: str) -> None:
    """The pages of the documentation are made from these words."""
    import inspect

    kind = type(make_config(algo))
    source = "".join(inspect.getsource(base) for base in kind.__mro__ if issubclass(base, TrainingConfig))
    for field in fields(kind):
        assert re.search(rf'^    {field.name}: .*\n(?: .*\n)*?    """', source, flags=re.MULTILINE), field.name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"gama": 0.9},
            UnknownNameError,
            "unknown setting 'gama' in the configuration of 'ppo'. Did you",
        ),
        ({"gamma": "0.9"}, InvalidOptionError, "gamma in the configuration of 'ppo' must be of type float, got '0.9'"),
        ({"num_envs": 2.5}, InvalidOptionError, "num_envs in the configuration of 'ppo' must be of type int, got 2.5"),
        ({"anneal_lr": 1}, InvalidOptionError, "must be of type true or false, got 1"),
        ({"seed": True}, InvalidOptionError, "must be of type int, got True"),
        ({"env_kwargs": [1]}, InvalidOptionError, "must be of type dict[str, Any], got [1]"),
        ({"policy": "mlp"}, UnknownNameError, "unknown setting 'policy'"),
        ({"action_weights": 3.0}, UnknownNameError, "unknown setting 'action_weights'"),
        ({"scenario": 3}, InvalidOptionError, "scenario in the configuration"),
        ({"num_envs": 0}, LbgymError, "PPOConfig.num_envs must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make_config("ppo", changes)


@pytest.mark.parametrize("algo", INSTALLED)
def test_every_number_has_its_limits(algo: str) -> None:
    """A number that makes no sense is refused before the training, which would fail, never end or say nothing."""
    config = make_config(algo)
    kind = type(config)
    for field in fields(kind):
        if not re.match(r"(int|float)\b", str(field.type)):
            continue
        takes_none = field.default is None or str(field.type).endswith("None")
        wrong = [math.nan, "5", True] + ([] if takes_none else [None])
        least = kind.whole_numbers.get(field.name)
        wrong += [10**400] if least is None else [2.5, least - 1]
        for value in wrong:
            with pytest.raises(InvalidOptionError, match=rf"^{kind.__name__}\.{field.name} must be a .*number.*, got "):
                replace(config, **{field.name: value})
    assert replace(config, seconds=None, num_servers=None) == config
    assert replace(config, checkpoint_every=math.inf, seconds=math.inf).checkpoint_every == math.inf
    # NumPy's scalars would not survive a checkpoint
    assert type(replace(config, gamma=np.float32(0.5), seed=np.int64(3)).seed) is int


@pytest.mark.parametrize(
    ("algo", "changes", "message"),
    [
        ("ppo", {"total_steps": 0}, "PPOConfig.total_steps must be a whole number of at least 1, got 0"),
        ("ppo", {"seconds": 0.0}, "PPOConfig.seconds must be a number above 0 seconds, got 0.0"),
        ("ppo", {"learning_rate": -1.0}, "PPOConfig.learning_rate must be a finite number of at least 0, got -1.0"),
        ("ppo", {"gamma": 7.5}, "PPOConfig.gamma must be a finite number from 0 to 1, got 7.5"),
        ("ppo", {"clip": -1.0}, "PPOConfig.clip must be a number of at least 0, got -1.0"),
        ("ppo", {"torch_threads": 0}, "PPOConfig.torch_threads must be a whole number from 1 to 4096, got 0"),
        ("ppo", {"checkpoint_every": -1.0}, "PPOConfig.checkpoint_every must be a number of at least 0 seconds, got"),
        ("ppo", {"seed": 2**64}, "PPOConfig.seed must be a whole number from 0 to 18446744073709551615, got"),
        ("sac-gru", {"tau": 1.5}, "SACGRUConfig.tau must be a finite number from 0 to 1, got 1.5"),
        ("sac-gru", {"initial_temperature": 0.0}, "initial_temperature must be a finite number above 0, got 0.0"),
        ("sac-gru", {"action_weights": ["a"]}, "each of SACGRUConfig.action_weights must be a finite number, got 'a'"),
        ("cma-es", {"learning_rate": 0.0}, "CMAESConfig.learning_rate must be a finite number above 0, got 0.0"),
        ("ppo", {"env_kwargs": {"num_envs": 3}}, "num_envs=3 in PPOConfig.env_kwargs: it is a field of PPOConfig"),
    ],
)
def test_numbers_that_make_no_sense(algo: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidOptionError, match=re.escape(message)):
        make_config(algo, changes)


@pytest.mark.parametrize("algo", INSTALLED)
def test_keys_that_the_environment_does_not_have(algo: str) -> None:
    kind: type[TrainingConfig] = RECIPES[algo].load(RECIPES[algo].config)
    with pytest.raises(UnknownNameError, match=rf"'step_intervall' in {kind.__name__}\.env_kwargs\. .*'step_interval'"):
        kind(env_kwargs={"step_intervall": 0.1})
    # What the environment takes, it takes here.
    config = kind(env_kwargs={"num_threads": 1, "step_interval": 0.5})
    assert config.environment_kwargs()["step_interval"] == 0.5
    several = {"action_offsets": "even"}
    if RECIPES[algo].module == "benchmarl":
        kind(env_kwargs=several)
        return
    with pytest.raises(UnknownNameError, match="unknown key 'action_offsets'"):
        kind(env_kwargs=several)


def test_names_that_there_are_not(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'poo'\. Did you mean 'ppo'\?"):
        make_config("poo")
    (tmp_path / "a.toml").write_text('algo = "sb3-dqm"\n')
    with pytest.raises(UnknownNameError, match=r"Did you mean 'sb3-dqn'\?"):
        read_config(tmp_path / "a.toml")


def test_a_setting_by_its_former_name_is_refused_with_the_present_one() -> None:
    pytest.importorskip("stable_baselines3")
    with pytest.raises(InvalidOptionError, match="policy in the configuration of 'sb3-ppo' is now called network"):
        make_config("sb3-ppo", {"policy": "mlp"})


def test_names_that_are_no_field_are_refused_by_the_class() -> None:
    with pytest.raises(InvalidOptionError, match="sees_weights in PPOConfig is now called observe_weights"):
        PPOConfig(sees_weights=True)  # type: ignore[call-arg]
    with pytest.raises(UnknownNameError, match=r"unknown setting 'lerning_rate' in PPOConfig.*'learning_rate'"):
        PPOConfig(lerning_rate=1.0)  # type: ignore[call-arg]
    with pytest.raises(InvalidOptionError, match=r"PPOConfig\.observe_weights must be true or false, got 'no'"):
        PPOConfig(observe_weights="no")  # type: ignore[arg-type]
    config = pickle.loads(pickle.dumps(PPOConfig(seed=5)))
    assert replace(copy.deepcopy(config), seed=6) == PPOConfig(seed=6)


@pytest.mark.parametrize("algo", INSTALLED)
def test_keys_that_the_recipe_sets_are_refused(algo: str) -> None:
    kind: type[TrainingConfig] = RECIPES[algo].load(RECIPES[algo].config)
    with pytest.raises(
        InvalidOptionError, match=rf"observe_weights=False in {kind.__name__}.env_kwargs: it is a field"
    ):
        kind(env_kwargs={"observe_weights": False})
    keys = {"observation": "dict", "normalize": not kind.needed.get("normalize", True)}
    if RECIPES[algo].module == "sb3":
        # Every layout will do.
        assert kind(env_kwargs=keys).environment_kwargs().items() >= keys.items()
        return
    for key, value in keys.items():
        with pytest.raises(
            InvalidOptionError, match=rf"{key}={value!r} in {kind.__name__}.env_kwargs: .* needs {key}="
        ):
            kind(env_kwargs={key: value})
    assert kind(env_kwargs={"observation": "flat"}).environment_kwargs()["observation"] == "flat"


def test_configurations_of_older_checkpoints_are_read() -> None:
    plain = plain_config(make_config("ppo"))
    assert saved_config(plain | {"policy": "mlp"}, "old.pt") == plain | {"network": "mlp"}


def test_the_recipe_says_the_algorithm() -> None:
    pytest.importorskip("stable_baselines3")
    with pytest.raises(InvalidOptionError, match="the recipe 'sb3-ppo' says which"):
        make_config("sb3-ppo", {"algorithm": "dqn"})


@pytest.mark.parametrize(
    ("text", "message"), [(None, "there is no configuration file"), ("gamma = ", "is not valid TOML")]
)
def test_files_that_cannot_be_read(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InvalidOptionError, match=message):
        read_config(file)


def test_a_scenario_is_looked_for_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("")
    (tmp_path / "config.toml").write_text('scenario = "mine.toml"\n')
    assert read_config(tmp_path / "config.toml") == (None, {"scenario": str(tmp_path / "mine.toml")})


def test_python_objects_have_no_toml() -> None:
    with pytest.raises(InvalidOptionError, match="reward_type is a Python object, which TOML cannot hold"):
        to_toml("ppo", PPOConfig(reward_type=lambda snapshot: 0.0))


def test_any_number_of_replicas_shares_the_flows() -> None:
    made = make_config("ppo", {"num_envs": 6})
    assert isinstance(made, PPOConfig)
    assert made.replicas_per_seed == 2


@pytest.mark.parametrize("algo", sorted({"ppo", "sac-gru", "sb3-a2c"} & set(INSTALLED)))
def test_one_function_trains_all(algo: str, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"scenario": "uniform", "num_envs": 4, "total_steps": 64, "max_steps": 16}
    if algo == "sac-gru":
        keys |= {"warmup": 1, "sequence_length": 8, "burn_in": 2}
    told = []
    result = train(algo, out=tmp_path, callback=lambda progress: told.append(progress.step), **keys)
    assert result.checkpoint == tmp_path / f"{algo}{RECIPES[algo].suffix}"
    assert [progress.step for progress in result.history] == told
    assert algo_of(result.checkpoint) == algo
    more = train(algo, resume_from=result.checkpoint, total_steps=128)
    assert more.history[0].step > 64
    assert more.checkpoint is None


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.pt does not exist"):
        algo_of(tmp_path / "none.pt")
    train("ppo", out=tmp_path, scenario="uniform", num_envs=4, total_steps=64)
    assert read_checkpoint(tmp_path / "ppo.pt")["algo"] == "ppo"
    with pytest.raises(CheckpointError, match="was trained by recipe 'ppo', not by 'sac-gru'"):
        make_config("sac-gru", resume_from=tmp_path / "ppo.pt")


def test_toml_is_toml() -> None:
    assert tomllib.loads(to_toml("ppo", PPOConfig()))["algo"] == "ppo"
