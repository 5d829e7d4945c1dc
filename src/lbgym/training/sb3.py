"""Stable-Baselines3 on the vector environment: a thin adapter, and one recipe for its algorithms.

Stable-Baselines3 has no adapter for Gymnasium's vector environments, and wrapping single environments one by one is
many times slower than stepping all replicas at once.

One table, :data:`ALGORITHMS`, holds all that differs between the algorithms; the recipe, :func:`train_sb3`, is the
same for all.
"""

from __future__ import annotations

import inspect
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from ..errors import CheckpointError, InvalidOptionError, LbgymError, MissingExtraError, UnknownNameError

try:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
    from stable_baselines3.common.save_util import load_from_zip_file
    from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn
except ModuleNotFoundError as error:
    raise MissingExtraError("stable_baselines3", "sb3", "training with Stable-Baselines3") from error

from ..atomic import write_whole
from .config import PER_ALGORITHM, AlgorithmConfig, check_recipe, check_same, current_fields, plain_config
from .runs import Budget, Callback, Progress, Reporter, check_parameters, log_folder, output_file, torch_threads

if TYPE_CHECKING:
    from ..env.vector import LoadBalanceVectorEnv

#: Transitions per gradient step of the off-policy algorithms: with minibatches of 256 each serves about eight times.
TRANSITIONS_PER_GRADIENT_STEP = 32


@dataclass(frozen=True)
class Algorithm:
    """An algorithm of Stable-Baselines3: what it takes, and its defaults here.

    Attributes:
        module: where its class is.
        name: of its class.
        action_types: those it takes, the default first.
        networks: by the configuration's ``network``: a policy that Stable-Baselines3 knows by name, which may begin
            with "Mlp", or a class of :mod:`lbgym.training.sb3_policies`.
        num_envs: replicas.
        num_steps: steps of every replica between two updates.
        learning_rate: step size of the optimiser.
        options: further arguments of the class.
        env_kwargs: keys of the environment.
    """

    module: str
    name: str
    action_types: tuple[str, ...]
    networks: Mapping[str, str]
    num_envs: int
    num_steps: int
    learning_rate: float
    options: Mapping[str, Any] = field(default_factory=dict)
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> type[BaseAlgorithm]:
        """Import its class.

        Raises:
            MissingExtraError: if sb3-contrib, which has it, is not installed.
        """
        try:
            found: type[BaseAlgorithm] = getattr(import_module(self.module), self.name)
        except ModuleNotFoundError as error:
            raise MissingExtraError(self.module, "sb3", f"training with {self.name}") from error
        return found


_ANY_ACTION = ("normalized", "continuous", "discrete", "joint")
_ACTOR_CRITIC = {"mlp": "MlpPolicy", "equivariant": "EquivariantPolicy"}
# With gamma 0.95 a reward matters for about 20 steps: old experience is useless.
_REPLAY = {"buffer_size": 100_000, "learning_starts": 4_096, "batch_size": 256}

#: The algorithms by name.
ALGORITHMS = {
    "ppo": Algorithm("stable_baselines3", "PPO", _ANY_ACTION, _ACTOR_CRITIC, 256, 16, 1e-3),
    "a2c": Algorithm("stable_baselines3", "A2C", _ANY_ACTION, _ACTOR_CRITIC, 256, 8, 7e-4),
    "recurrent-ppo": Algorithm("sb3_contrib", "RecurrentPPO", _ANY_ACTION, {"mlp": "MlpLstmPolicy"}, 64, 16, 1e-3),
    "dqn": Algorithm(
        "stable_baselines3",
        "DQN",
        ("joint",),
        {"mlp": "MlpPolicy", "equivariant": "EquivariantQPolicy"},
        64,
        4,
        5e-4,
        _REPLAY | {"target_update_interval": 8_192, "exploration_fraction": 0.2},
        # Two levels make 2 ** 8 joint actions of the 8 servers of "heterogeneous"; three would be too many.
        {"action_weights": [1.0, 4.0]},
    ),
    "sac": Algorithm(
        "stable_baselines3",
        "SAC",
        ("normalized", "continuous"),
        {"mlp": "MlpPolicy", "equivariant": "EquivariantSACPolicy"},
        64,
        4,
        1e-3,
        # With an initial weight of 1 the entropy of an action per server outweighs scaled rewards for long.
        _REPLAY | {"ent_coef": "auto_0.02"},
    ),
    "td3": Algorithm(
        "stable_baselines3",
        "TD3",
        ("normalized", "continuous"),
        {"mlp": "MlpPolicy"},
        64,
        4,
        5e-4,
        _REPLAY | {"action_noise": 0.2},
    ),
}

# A loss of Progress -> names in Stable-Baselines3's logs; the first one present is taken.
_LOSSES = {
    "policy": ("policy_gradient_loss", "policy_loss", "actor_loss"),
    "value": ("value_loss", "critic_loss", "loss"),
    "kl": ("approx_kl",),
    "clipped": ("clip_fraction",),
    "temperature": ("ent_coef",),
}


class SB3VecEnv(VecEnv):
    """A :class:`lbgym.LoadBalanceVectorEnv` as Stable-Baselines3's ``VecEnv``.

    The replicas start again in the step that ends their episode, as Stable-Baselines3 expects; the last observation is
    in ``infos[i]["terminal_observation"]``, and ``infos[i]["TimeLimit.truncated"]`` is True, so that its value is
    bootstrapped. Between two ends of episodes the infos are empty: filling a dictionary per replica and step would cost
    more than the step. Attributes and methods are those of the one vector environment, whichever indices are asked for.

    Args:
        env: made with ``autoreset_mode=AutoresetMode.SAME_STEP``.

    Raises:
        LbgymError: for another autoreset mode.
    """

    def __init__(self, env: LoadBalanceVectorEnv) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise LbgymError(f"SB3VecEnv needs a vector environment with autoreset_mode SAME_STEP, got {mode}")
        self.env = env
        self._actions: NDArray[Any] | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> VecEnvObs:
        """Start every replica, with the seeds and options set by :meth:`seed` and :meth:`set_options`."""
        if any(options != self._options[0] for options in self._options):
            raise LbgymError("the replicas of one vector environment take the same options, got different ones")
        seeds = None if any(seed is None for seed in self._seeds) else [int(seed or 0) for seed in self._seeds]
        observation, _ = self.env.reset(seed=seeds, options=dict(self._options[0]) or None)
        self.reset_infos = [{} for _ in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Step every replica."""
        observation, rewards, terminated, truncated, info = self.env.step(self._actions)
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if dones.any():
            final = info["final_obs"]
            for i in np.flatnonzero(dones):
                last = {k: v[i] for k, v in final.items()} if isinstance(final, dict) else final[i]
                infos[i] = {
                    "terminal_observation": last,
                    "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
                }
        return observation, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Close the vector environment."""
        self.env.close()

    def get_images(self) -> Sequence[NDArray[Any] | None]:
        """Frames of the replicas."""
        frames = self.env.render()
        return [None] * self.num_envs if frames is None else list(frames)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return the vector environment's attribute, once per index."""
        return [getattr(self.env, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector environment; for all replicas or none."""
        if self._count(indices) != self.num_envs:
            raise LbgymError(
                f"the replicas share one vector environment: {attr_name!r} can be set for all {self.num_envs} of them, "
                f"not for {self._count(indices)}"
            )
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of the vector environment once; its result, once per index."""
        return [getattr(self.env, method_name)(*method_args, **method_kwargs)] * self._count(indices)

    def env_is_wrapped(
        self, wrapper_class: type[gymnasium.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """False: the replicas are no environments of their own and carry no wrappers."""
        return [False] * self._count(indices)

    def _count(self, indices: VecEnvIndices) -> int:
        return len(list(self._get_indices(indices)))


@dataclass(kw_only=True)
class SB3Config(AlgorithmConfig):
    """The configuration of a training with an algorithm of Stable-Baselines3 or sb3-contrib.

    The off-policy algorithms (DQN, SAC, TD3) make one gradient step per 32 transitions, whatever the number of
    replicas: all replicas go ``num_steps`` steps, then ``num_envs num_steps / 32`` gradient steps follow. For 32 to 256
    replicas that is 4 to 32 at a time with the default of 4 steps; more gradient steps per transition
    (``options={"gradient_steps": ...}``) learn from fewer steps of the environment, and cost their time.
    """

    algorithm: str = "ppo"
    """"ppo", "a2c", "dqn", "sac", "td3" or "recurrent-ppo": a name of ``ALGORITHMS``"""
    network: str = "mlp"
    """"mlp" (beside an LSTM for "recurrent-ppo"), or "equivariant", parameters shared over the servers, which
    "recurrent-ppo" and "td3" do not have"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of the algorithm's class over those of ``ALGORITHMS``; ``action_noise`` is the standard
    deviation of the noise, a number"""

    action_type: str = PER_ALGORITHM
    """an ``action_type`` of ``LoadBalanceEnv``: any for "ppo", "a2c" and "recurrent-ppo" (default "normalized"),
    "joint" for "dqn", and for "sac" and "td3" either "normalized" (default) or "continuous"."""
    observe_weights: bool = False
    """append each server's weight in force to the observation"""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """further keys of ``LoadBalanceVectorEnv``; "dqn" has ``action_weights`` of 1 and 4 unless given"""

    num_envs: int = PER_ALGORITHM
    """replicas; 256 for "ppo" and "a2c", 64 for the others"""
    num_steps: int = PER_ALGORITHM
    """steps of every replica between two updates; 16 for "ppo" and "recurrent-ppo", 8 for "a2c", 4 for the others"""
    learning_rate: float = PER_ALGORITHM
    """step size of the optimiser; 1e-3, but 7e-4 for "a2c" and 5e-4 for "dqn" and "td3"."""
    hidden: int = 64
    """width of the layers, two of them with "mlp", and of the LSTM"""
    log_std: float = -2.0
    """initial log standard deviation of continuous actions; on-policy algorithms only. With much more noise than this
    the first thing that dense layers learn is to keep all actions beyond the bounds, where the noise is cut off"""

    autoreset_mode: ClassVar[AutoresetMode] = AutoresetMode.SAME_STEP
    algorithms: ClassVar[Mapping[str, Algorithm]] = ALGORITHMS
    framework: ClassVar[tuple[str, str]] = ("Stable-Baselines3", "ppo")
    # No steps at all leave the model as it is made.
    whole_numbers: ClassVar[dict[str, int]] = AlgorithmConfig.whole_numbers | {"total_steps": 0}
    numbers: ClassVar[dict[str, dict[str, Any]]] = AlgorithmConfig.numbers | {"log_std": {}}
    needed: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = ALGORITHMS[self.algorithm]
        self.env_kwargs = {**kind.env_kwargs, **self.env_kwargs}
        if self.network not in kind.networks:
            having = [name for name, other in ALGORITHMS.items() if self.network in other.networks]
            raise LbgymError(
                f"there is no network {self.network!r} for {self.algorithm!r}, only for {', '.join(having)}: use "
                f"network {next(iter(kind.networks))!r}"
            )
        normalizes = self.algorithm in ("ppo", "recurrent-ppo") and self.options.get("normalize_advantage", True)
        if normalizes and self.num_envs * self.num_steps < 2:
            raise InvalidOptionError(
                f"SB3Config.num_envs * num_steps = {self.num_envs} * {self.num_steps} is a minibatch of one sample: "
                f"normalize_advantage needs at least 2"
            )

    def observation_kwargs(self) -> dict[str, Any]:
        """The environment keys that a policy's observations and actions depend on; every layout will do."""
        keys = super().observation_kwargs()
        return keys | {k: v for k, v in self.env_kwargs.items() if k in keys}


@dataclass(frozen=True)
class SB3Result:
    """A finished training run: Stable-Baselines3's model, its zip file (None without ``out``) and the history."""

    model: BaseAlgorithm
    checkpoint: Path | None
    history: list[Progress]


class _Watch(BaseCallback):
    """Reports progress, and stops when the reporter says so."""

    def __init__(self, budget: Budget, reporter: Reporter) -> None:
        super().__init__()
        self.budget, self.reporter = budget, reporter
        self.losses: dict[str, float] = {}
        self.reward = 0.0
        self.steps = 0
        self.stop = False

    def _on_rollout_start(self) -> None:
        # Said here, before the environment refuses what such a network does.
        _check_finite(self.model)

    def _on_step(self) -> bool:
        normalizer = self.training_env
        assert isinstance(normalizer, VecNormalize)
        self.reward += float(normalizer.get_original_reward().mean())
        self.steps += 1
        return not self.stop

    def _on_rollout_end(self) -> None:
        budget = self.budget
        budget.advance(self.num_timesteps - budget.step)
        if budget.fraction > 0.0:
            # Schedules, such as DQN's of exploration, follow the share of the budget, which may be one of time.
            self.model._total_timesteps = math.ceil(self.num_timesteps / budget.fraction)
        logged = getattr(self.logger, "name_to_value", {})
        # A log that was written in this rollout is empty: the losses are then still those before.
        self.losses |= {
            name: float(logged[key])
            for name, keys in _LOSSES.items()
            if (key := next((f"train/{k}" for k in keys if f"train/{k}" in logged), None)) is not None
        }
        self.model.lbgym_seconds = budget.seconds  # type: ignore[attr-defined]
        reward, self.reward, self.steps = self.reward / self.steps, 0.0, 0
        self.stop = self.reporter.report(reward=reward, fct_mean=float("nan"), losses=dict(self.losses))


def train_sb3(
    config: SB3Config | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    callback: Callback | None = None,
    tensorboard: bool = False,
) -> SB3Result:
    """Train with an algorithm of Stable-Baselines3.

    The model is saved in Stable-Baselines3's own format with one attribute more, ``lbgym_env_kwargs``: the environment
    keys that its observations and actions depend on.

    The replay buffer of DQN, SAC and TD3 is saved beside it at the end of the training, and when it is stopped or
    interrupted: ``sb3-sac.replay.pkl`` for ``sb3-sac.zip``. It is not saved with the checkpoints in between, since it
    has up to some hundred megabytes. Without it, as after a crash or with another number of replicas, a resumed
    training fills a new one with ``learning_starts`` random steps before it continues to learn.

    Args:
        config: None: the defaults.
        out: the model's file, ending in .zip, or a folder for ``sb3-ppo.zip`` and so on; always written whole or not at
            all. None: keep nothing.
        resume_from: a model saved here to continue, its pickled parts included, so a file you trust: parameters,
            optimiser, step count, scale of the rewards. Everything else is the configuration's.
        callback: receives the progress after every rollout; returning True stops the training.
        tensorboard: log to a folder ``tensorboard`` beside the model.

    If it is interrupted or fails, the model is saved before the exception propagates.

    Raises:
        CheckpointError: if the model does not fit the environment, or is of another algorithm, network or width.
        DivergedError: if its networks are not finite any more; nothing is saved then.
        MissingExtraError: for "recurrent-ppo" without sb3-contrib.
        UnknownNameError: for an option that the algorithm does not have.
    """
    config = config or SB3Config()
    kind = ALGORITHMS[config.algorithm].load()
    arguments = _arguments(config, kind)
    checkpoint = output_file(out, f"sb3-{config.algorithm}.zip")
    logs = log_folder(checkpoint, tensorboard)
    vector = config.make_env()
    with torch_threads(config.torch_threads):
        try:
            vector.reset(seed=config.seed)
            vector.step(vector.action_space.sample())  # Compiles the simulator outside the time budget.
            # Scale the rewards; observations are in [0, 1] already.
            env = VecNormalize(VecMonitor(SB3VecEnv(vector)), norm_obs=False, gamma=config.gamma)
            if (noise := arguments.get("action_noise")) is not None:
                size = env.action_space.shape or ()
                arguments["action_noise"] = NormalActionNoise(np.zeros(size), np.full(size, float(noise)))
            if resume_from is not None:
                model = _load(kind, Path(resume_from), config, env, arguments)
            else:
                model = _new(kind, config, env, arguments)
            model.set_logger(configure(str(logs), ["tensorboard"]) if logs is not None else configure(None, []))
            model.lbgym_env_kwargs = config.observation_kwargs()  # type: ignore[attr-defined]
            model.lbgym_config = plain_config(config)  # type: ignore[attr-defined]
            budget = Budget(config, model.num_timesteps, getattr(model, "lbgym_seconds", 0.0))

            def save(replay: bool = False) -> None:
                if checkpoint is not None:
                    _save(model, checkpoint, replay=replay)

            reporter = Reporter(budget, callback, None, save, config.checkpoint_every)
            watch = _Watch(budget, reporter)
            # learn() counts from the model's present step.
            remaining = (2**62 if config.total_steps is None else config.total_steps) - model.num_timesteps
            # In rollouts, or for off-policy algorithms in episodes; those of all replicas end together.
            log_interval = config.num_envs if isinstance(model, OffPolicyAlgorithm) else 1
            with reporter.saving(partial(save, replay=True)):
                if remaining > 0:
                    model.learn(remaining, callback=watch, log_interval=log_interval, reset_num_timesteps=False)
                if watch.stop:
                    # A callback can only stop in a step; that one was not learnt from.
                    model.num_timesteps = budget.step
        finally:
            vector.close()
    return SB3Result(model, checkpoint, reporter.history)


def _arguments(config: SB3Config, kind: type[BaseAlgorithm]) -> dict[str, Any]:
    """Collect the arguments of an algorithm's class, but for those of its network."""
    arguments: dict[str, Any] = {"learning_rate": config.learning_rate, "gamma": config.gamma}
    if issubclass(kind, OffPolicyAlgorithm):
        transitions = config.num_envs * config.num_steps
        arguments["train_freq"] = config.num_steps
        changeable = {"gradient_steps": max(1, transitions // TRANSITIONS_PER_GRADIENT_STEP)}
    else:
        arguments |= {"n_steps": config.num_steps, "gae_lambda": config.gae_lambda}
        changeable = {}
        if "n_epochs" in inspect.signature(kind).parameters:
            arguments["n_epochs"] = config.epochs
            arguments["batch_size"] = max(2, config.num_envs * config.num_steps // config.minibatches)
    owned = {"policy", "env", "seed", "device", "policy_kwargs", "tensorboard_log", "verbose", *arguments}
    known = {name for name in inspect.signature(kind).parameters if not name.startswith("_")} - owned
    for name in config.options:
        if name not in known:
            raise UnknownNameError("option", name, known, f"options of {config.algorithm!r}")
    return arguments | changeable | dict(ALGORITHMS[config.algorithm].options) | config.options


def _new(kind: type[BaseAlgorithm], config: SB3Config, env: VecEnv, arguments: dict[str, Any]) -> BaseAlgorithm:
    policy: Any = ALGORITHMS[config.algorithm].networks[config.network]
    if config.network == "equivariant":
        from . import sb3_policies

        policy = getattr(sb3_policies, policy)
        policy_kwargs: dict[str, Any] = {"features_extractor_kwargs": {"hidden": config.hidden}}
    else:
        if isinstance(env.observation_space, gymnasium.spaces.Dict):
            policy = policy.replace("Mlp", "MultiInput")
        policy_kwargs = {"net_arch": [config.hidden] * 2}
    if not issubclass(kind, OffPolicyAlgorithm):
        policy_kwargs["log_std_init"] = config.log_std
    if "Lstm" in str(policy):
        policy_kwargs["lstm_hidden_size"] = config.hidden
    model = kind(policy, env, seed=config.seed, device="cpu", policy_kwargs=policy_kwargs, **arguments)
    model.lbgym_seconds = 0.0  # type: ignore[attr-defined]
    return model


def replay_file(path: Path) -> Path:
    """Locate the replay buffer of a saved model."""
    return path.with_suffix(".replay.pkl")


def _check_finite(model: BaseAlgorithm) -> None:
    check_parameters(model.policy.state_dict(), model.num_timesteps)


def _save(model: BaseAlgorithm, path: Path, *, replay: bool = False) -> None:
    def save(stream: BinaryIO) -> None:
        assert isinstance(stream, io.BufferedIOBase)
        model.save(stream)

    def save_replay(stream: BinaryIO) -> None:
        assert isinstance(stream, io.BufferedIOBase)
        assert isinstance(model, OffPolicyAlgorithm)
        model.save_replay_buffer(stream)

    _check_finite(model)
    env = model.get_env()
    assert isinstance(env, VecNormalize)
    scale = env.ret_rms
    model.lbgym_returns = [float(scale.mean), float(scale.var), float(scale.count)]  # type: ignore[attr-defined]
    # A replay buffer beside a model must be that model's own.
    if isinstance(model, OffPolicyAlgorithm):
        replay_file(path).unlink(missing_ok=True)
    write_whole(path, save)
    if replay and isinstance(model, OffPolicyAlgorithm):
        write_whole(replay_file(path), save_replay)


def _load(
    kind: type[BaseAlgorithm], path: Path, config: SB3Config, env: VecNormalize, arguments: dict[str, Any]
) -> BaseAlgorithm:
    data = read_model(path)
    check_recipe(path, model_algo(data), "sb3", config.algorithm)
    if (data["observation_space"], data["action_space"]) != (env.observation_space, env.action_space):
        raise CheckpointError(
            f"model {path} takes observations {data['observation_space']} and gives actions {data['action_space']}, "
            f"but the environment to train on has {env.observation_space} and {env.action_space}"
        )
    # Models from before there was a choice have no network written down.
    check_same(path, {"network": "mlp"} | current_fields(data["lbgym_config"]), config, ("network", "hidden"))
    model = kind.load(path, env=env, device="cpu", **arguments)
    if (returns := data.get("lbgym_returns")) is not None:
        mean, var, env.ret_rms.count = returns
        env.ret_rms.mean, env.ret_rms.var = np.array(mean), np.array(var)
    if isinstance(model, OffPolicyAlgorithm):
        fresh = model.replay_buffer
        if replay_file(path).is_file():
            model.load_replay_buffer(replay_file(path))
        kept = model.replay_buffer
        assert fresh is not None
        assert kept is not None
        if kept is fresh or (kept.n_envs, kept.buffer_size) != (fresh.n_envs, fresh.buffer_size):
            model.replay_buffer = fresh
            model.learning_starts += model.num_timesteps
    return model


def read_model(path: Path) -> dict[str, Any]:
    """Read the data of a saved model beside its parameters.

    Raises:
        CheckpointError: if the file cannot be read, or was not saved here.
    """
    try:
        data, _, _ = load_from_zip_file(path, device="cpu")
    except FileNotFoundError as error:
        raise CheckpointError(f"model {path} does not exist") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not a model that can be read: {error}") from error
    if not data or data.get("lbgym_config") is None:
        raise CheckpointError(f"{path} is a Stable-Baselines3 model, but was not trained by lbgym")
    return data


def model_algo(data: Mapping[str, Any]) -> str:
    """Return the recipe of a model's data."""
    # Before there was a choice it was PPO.
    return f"sb3-{data['lbgym_config'].get('algorithm', 'ppo')}"
